/* Large matrix products for the converter, in float32 or of bfloat16 factors summed in float32.
 *
 * They differ from a BLAS in three points: a factor of either type is converted while it is packed; the upper triangle of
 * a result can be computed alone; and transposed factors are not copied. A result does not depend on the number of threads,
 * but on the instruction set (lm_gemm_name), since sums of floats are not associative.
 */
#ifndef LOWMEM_GEMM_H
#define LOWMEM_GEMM_H

#include "lowmem.h"

/* c[i * c_row + j] += alpha * sum_k a[i * a_row + k * a_column] * b[k * b_row + j * b_column], i < m, j < n.
 * Strides count values. c must not overlap a or b. */
typedef struct {
    int64_t m, n, k;
    const void *a, *b;
    int64_t a_row, a_column, b_row, b_column;
    float *c;
    int64_t c_row;
    float alpha;
    int32_t a_type, b_type; /* LM_F32 or LM_BF16 */
    int32_t upper;          /* compute and write only the elements with i <= j */
    int32_t bf16;           /* factors may be rounded to bfloat16, where the CPU gains by it */
} lm_gemm;

/* Bytes of workspace with the present number of threads. */
LM_EXPORT size_t lm_gemm_workspace(void);
LM_EXPORT void lm_gemm_run(const lm_gemm *job, void *workspace);
/* The kernels on which results depend: "AVX-512 BF16", "AVX-512", "AVX2", "NEON" or "portable C". */
LM_EXPORT const char *lm_gemm_name(void);

/* Multiply the upper triangle of a square matrix by `scale` and mirror it into the lower one (layout.c). */
LM_EXPORT void lm_mirror(float *matrix, int64_t n, int64_t row, float scale);
/* matrix[order][:, order] in place. order: a permutation of 0..n-1. workspace: n floats. */
LM_EXPORT void lm_permute(float *matrix, int64_t n, int64_t row, const int64_t *order, void *workspace);

#endif
