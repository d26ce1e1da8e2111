/* Dense linears with AVX2. */
#if defined(__x86_64__)
#include "avx2.h"

enum { MOST_ROWS = 4, MOST_OUTPUTS = 8 };

typedef __m256 sums_of_tile[MOST_ROWS][MOST_OUTPUTS];

INLINE void add_products(lm_dense_shape s, const uint16_t *weight, const lm_dense_piece *p, int64_t i, sums_of_tile sum)
{
    const int64_t in = p->w->inputs;
    __m256 w[MOST_OUTPUTS];
    UNROLL
    for (int o = 0; o < s.outputs; o++)
        w[o] = load_8(weight + o * in + i, s.type, 0);
    UNROLL
    for (int r = 0; r < s.rows; r++) {
        __m256 v = _mm256_loadu_ps(p->x + r * in + i);
        UNROLL
        for (int o = 0; o < s.outputs; o++)
            sum[r][o] = _mm256_fmadd_ps(w[o], v, sum[r][o]);
    }
}

INLINE float sum_of(__m256 v)
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

#define ZERO _mm256_setzero_ps()
#include "dense_tile.h"

#define OUTPUTS_1 8
#define OUTPUTS_2 4
#define OUTPUTS_3 3
#define OUTPUTS_4 2
#include "dense_columns.h"

void lm_dense_avx2(const lm_dense_piece *piece) { dense_columns(piece); }
#endif
