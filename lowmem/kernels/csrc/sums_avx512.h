/* Sums of a tile of rows and columns that the AVX-512 kernels add one plane after the other to: sum[r * wide + v] are 16
 * outputs, in a register each. Of two planes the upper one's sums are moved up by its 8 bits before the lower one's are added.
 */
#ifndef LOWMEM_SUMS_AVX512_H
#define LOWMEM_SUMS_AVX512_H

#include "weights_avx512.h"

/* Loops of at most 16, which UNROLL takes apart: else the sums would be in memory. */
INLINE void clear_sums(int rows, int wide, __m512i *sum)
{
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int v = 0; v < wide; v++)
            sum[r * wide + v] = _mm512_setzero_si512();
}

INLINE void raise_sums(int rows, int wide, __m512i *sum)
{
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int v = 0; v < wide; v++)
            sum[r * wide + v] = _mm512_slli_epi32(sum[r * wide + v], 8);
}

/* Add -zero times the sum of the plane's digits. */
INLINE void add_zeros(int plain, int plane, int rows, int wide, const lm_group *at, int64_t row, int64_t output, const __mmask16 *mask,
                      __m512i *sum)
{
    const int32_t *sums = at->input->sums + 3 * (at->group * at->input->rows + row) + plane;
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int v = 0; v < wide; v++) {
            const int64_t index = lm_group_at(at->w, at->scale_row, output + 16 * v);
            const __m512i zeros = minus_zeros(plain, at->w, index, mask[v], sums[3 * r]);
            sum[r * wide + v] = _mm512_add_epi32(sum[r * wide + v], zeros);
            __asm__("" : "+v"(sum[r * wide + v])); /* from here on in a register of its own: gcc keeps two otherwise */
        }
}

/* y += the sums times their scales. highest: of the third plane, or NULL. */
INLINE void add_scaled(int plain, int rows, int wide, const lm_group *at, int64_t row, int64_t output, const __mmask16 *mask,
                       const __m512i *sum, const __m512 *highest, float *y, int64_t stride)
{
    const lm_packed *w = at->w;
    const float *scales = at->input->scales + at->group * at->input->rows + row;
    UNROLL
    for (int v = 0; v < wide; v++) {
        const __m512 weight_scale = load_floats(w->scales, plain ? LM_F16 : w->scales_type,
                                                lm_group_at(w, at->scale_row, output + 16 * v), mask[v]);
        UNROLL
        for (int r = 0; r < rows; r++) {
            float *to = y + r * stride + 16 * v;
            __m512 c = _mm512_cvtepi32_ps(sum[r * wide + v]);
            if (highest)
                c = _mm512_fmadd_ps(highest[r * wide + v], _mm512_set1_ps(65536), c);
            const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(scales[r]), weight_scale);
            _mm512_mask_storeu_ps(to, mask[v], _mm512_fmadd_ps(c, scale, _mm512_maskz_loadu_ps(mask[v], to)));
        }
    }
}

#endif
