/* A dense weight of 16 bits times a few rows, with AVX2. */
#if defined(__x86_64__)
#include "avx2.h"

enum { MOST_ROWS = 4, MOST_OUTPUTS = 8 };
enum { LINE = 32, AHEAD = 512 }; /* inputs of a cache line, and by which they are asked for ahead of their use */

INLINE void add_products(int type, int rows, int outputs, const uint16_t *weight, const float *x, int64_t in,
                         __m256 sum[MOST_ROWS][MOST_OUTPUTS])
{
    __m256 w[MOST_OUTPUTS];
    UNROLL
    for (int o = 0; o < outputs; o++)
        w[o] = load_8(weight + o * in, type, 0);
    UNROLL
    for (int r = 0; r < rows; r++) {
        __m256 v = _mm256_loadu_ps(x + r * in);
        UNROLL
        for (int o = 0; o < outputs; o++)
            sum[r][o] = _mm256_fmadd_ps(w[o], v, sum[r][o]);
    }
}

INLINE float sum_of(__m256 v)
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

/* `rows` rows and `outputs` outputs at once. Each sum has the same order whatever the tile: 8 lanes, their tree, and the
 * last inputs that fill no vector. */
INLINE void tile(int type, int rows, int outputs, const lm_dense *w, const float *x, int64_t first, float *y, int64_t stride)
{
    const int64_t in = w->in, whole = in / 8 * 8;
    const uint16_t *weight = w->weight + first * in;
    __m256 sum[MOST_ROWS][MOST_OUTPUTS];
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int o = 0; o < outputs; o++)
            sum[r][o] = _mm256_setzero_ps();
    int64_t i = 0;
    for (; i + LINE <= in; i += LINE) {
        UNROLL
        for (int o = 0; o < outputs; o++)
            _mm_prefetch((const char *)((uintptr_t)(weight + o * in + i) + 2 * AHEAD), _MM_HINT_T0);
        UNROLL
        for (int part = 0; part < LINE; part += 8)
            add_products(type, rows, outputs, weight + i + part, x + i + part, in, sum);
    }
    for (; i < whole; i += 8)
        add_products(type, rows, outputs, weight + i, x + i, in, sum);
    for (int o = 0; o < outputs; o++)
        for (int r = 0; r < rows; r++) {
            float total = sum_of(sum[r][o]);
            for (i = whole; i < in; i++)
                total += lm_load(weight, type, o * in + i) * x[r * in + i];
            y[r * stride + o] = w->bias ? total + lm_load(w->bias, w->bias_type, first + o) : total;
        }
}

/* Tiles of `outputs`, then one at a time. */
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
COLUMNS(LM_BF16, 1, 8) COLUMNS(LM_BF16, 2, 4) COLUMNS(LM_BF16, 3, 3) COLUMNS(LM_BF16, 4, 2)
COLUMNS(LM_F16, 1, 8) COLUMNS(LM_F16, 2, 4) COLUMNS(LM_F16, 3, 3) COLUMNS(LM_F16, 4, 2)
#define NAMES(type) columns_##type##_1, columns_##type##_2, columns_##type##_3, columns_##type##_4

void lm_dense_avx2(const lm_dense *w, const float *x, int64_t rows, int64_t first, int64_t last, float *y, int64_t stride)
{
    typedef void (*kernel)(const lm_dense *, const float *, int64_t, int64_t, float *, int64_t);
    static const kernel bf16[MOST_ROWS] = {NAMES(LM_BF16)}, f16[MOST_ROWS] = {NAMES(LM_F16)};
    const kernel *kernels = w->weight_type == LM_F16 ? f16 : bf16;
    /* A part of the outputs that stays in the cache while all rows pass over it. */
    const int64_t part = rows > MOST_ROWS ? 24 : last - first;
    for (int64_t o = first; o < last; o += part) {
        const int64_t end = last - o < part ? last : o + part;
        for (int64_t r = 0; r < rows; r += MOST_ROWS) {
            const int64_t count = rows - r < MOST_ROWS ? rows - r : MOST_ROWS;
            kernels[count - 1](w, x + r * w->in, o, end, y + r * stride + o - first, stride);
        }
    }
}
#endif
