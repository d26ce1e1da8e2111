/* A dense weight of 16 bits times a few rows, with AVX-512: the head, at the memory's pace. */
#if defined(__x86_64__)
#include "avx512.h"
#include "types.h"

/* One row reads one output after the other: memory in one stream, where eight of them, 12 KB apart, take 15 % longer. Several
 * rows have more to do for each weight, and read x less often when outputs share it. */
enum { MOST_ROWS = 4, MOST_OUTPUTS = 6 };
/* Weights ahead; for one row also one line of each page, to find which takes longer than to read it. */
enum { AHEAD_ALONE = 2048, AHEAD = 512, PAGE_VALUES = 2048, PAGES_AHEAD = 8192 };

/* 16 weights as floats; the masked ones are 0 and are not read. */
INLINE __m512 load_weights(int type, const uint16_t *from, __mmask16 mask)
{
    __m256i half = mask == 0xffff ? _mm256_loadu_si256((const void *)from) : _mm256_maskz_loadu_epi16(mask, from);
    if (type == LM_F16)
        return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

INLINE __m512 load_x(const float *from, __mmask16 mask)
{
    return mask == 0xffff ? _mm512_loadu_ps(from) : _mm512_maskz_loadu_ps(mask, from);
}

/* Of 32 inputs: w0 x0 + w1 x1 is one term, so that a sum waits for one addition only. */
INLINE void add_products(int type, int rows, int outputs, const uint16_t *weight, const float *x, int64_t in, __mmask16 low,
                         __mmask16 high, __m512 sum[MOST_ROWS][MOST_OUTPUTS])
{
    __m512 w0[MOST_OUTPUTS], w1[MOST_OUTPUTS];
    UNROLL
    for (int o = 0; o < outputs; o++) {
        w0[o] = load_weights(type, weight + o * in, low);
        w1[o] = load_weights(type, weight + o * in + 16, high);
    }
    UNROLL
    for (int r = 0; r < rows; r++) {
        __m512 x0 = load_x(x + r * in, low), x1 = load_x(x + r * in + 16, high);
        UNROLL
        for (int o = 0; o < outputs; o++)
            sum[r][o] = _mm512_add_ps(sum[r][o], _mm512_fmadd_ps(w0[o], x0, _mm512_mul_ps(w1[o], x1)));
    }
}

/* `rows` rows and `outputs` outputs at once. Each sum has the same order whatever the tile: 16 lanes, then their tree. */
INLINE void tile(int type, int rows, int outputs, const lm_dense *w, const float *x, int64_t first, float *y, int64_t stride)
{
    const int64_t in = w->in;
    const uint16_t *weight = w->weight + first * in;
    __m512 sum[MOST_ROWS][MOST_OUTPUTS];
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int o = 0; o < outputs; o++)
            sum[r][o] = _mm512_setzero_ps();
    const int64_t distance = outputs == 1 ? AHEAD_ALONE : AHEAD;
    int64_t i = 0;
    for (; i + 32 <= in; i += 32) {
        /* Behind the end of a row is the next one, which this tile has read: what is wanted there is the next tile's. */
        const uint16_t *ahead = weight + i + distance + (i + distance < in ? 0 : (outputs - 1) * in);
        UNROLL
        for (int o = 0; o < outputs; o++)
            _mm_prefetch((const char *)(ahead + o * in), _MM_HINT_T0);
        if (outputs == 1 && i % PAGE_VALUES == 0)
            _mm_prefetch((const char *)(weight + i + PAGES_AHEAD), _MM_HINT_T0);
        add_products(type, rows, outputs, weight + i, x + i, in, 0xffff, 0xffff, sum);
    }
    if (i < in) {
        const uint32_t mask = (1u << (in - i)) - 1; /* fewer than 32 */
        add_products(type, rows, outputs, weight + i, x + i, in, (__mmask16)mask, (__mmask16)(mask >> 16), sum);
    }
    for (int o = 0; o < outputs; o++) {
        float bias = w->bias ? lm_load(w->bias, w->bias_type, first + o) : 0;
        for (int r = 0; r < rows; r++)
            y[r * stride + o] = _mm512_reduce_add_ps(sum[r][o]) + bias;
    }
}

/* Wide tiles of `outputs`, then one at a time. */
INLINE void columns(int type, int rows, int outputs, const lm_dense *w, const float *x, int64_t first, int64_t last,
                    float *y, int64_t stride)
{
    int64_t o = first;
    for (; o + outputs <= last; o += outputs)
        tile(type, rows, outputs, w, x, o, y + o - first, stride);
    for (; o < last; o++)
        tile(type, rows, 1, w, x, o, y + o - first, stride);
}

#define COLUMNS(type, rows, outputs)                                                                                   \
    TARGET static void columns_##type##_##rows(const lm_dense *w, const float *x, int64_t first, int64_t last,         \
                                               float *y, int64_t stride)                                               \
    {                                                                                                                  \
        columns(type, rows, outputs, w, x, first, last, y, stride);                                                    \
    }
COLUMNS(LM_BF16, 1, 1) COLUMNS(LM_BF16, 2, 6) COLUMNS(LM_BF16, 3, 4) COLUMNS(LM_BF16, 4, 4)
COLUMNS(LM_F16, 1, 1) COLUMNS(LM_F16, 2, 6) COLUMNS(LM_F16, 3, 4) COLUMNS(LM_F16, 4, 4)
#define NAMES(type) columns_##type##_1, columns_##type##_2, columns_##type##_3, columns_##type##_4

void lm_dense_avx512(const lm_dense *w, const float *x, int64_t rows, int64_t first, int64_t last, float *y, int64_t stride)
{
    typedef void (*kernel)(const lm_dense *, const float *, int64_t, int64_t, float *, int64_t);
    static const kernel bf16[MOST_ROWS] = {NAMES(LM_BF16)}, f16[MOST_ROWS] = {NAMES(LM_F16)};
    const kernel *kernels = w->weight_type == LM_F16 ? f16 : bf16;
    /* A part of the outputs that stays in the cache while all rows pass over it. */
    int64_t part = rows > MOST_ROWS ? 24 : last - first;
    for (int64_t o = first; o < last; o += part) {
        int64_t end = last - o < part ? last : o + part;
        for (int64_t r = 0; r < rows; r += MOST_ROWS) {
            int64_t count = rows - r < MOST_ROWS ? rows - r : MOST_ROWS;
            kernels[count - 1](w, x + r * w->in, o, end, y + r * stride + o - first, stride);
        }
    }
}
#endif
