/* Dense linears with AVX-512: the head, at full memory bandwidth. */
#if defined(__x86_64__)
#include "avx512.h"

enum { MOST_ROWS = 4, MOST_OUTPUTS = 6 };
/* Prefetch distances in weights; for one row also one line of each page, since a TLB miss takes longer than the read. */
enum { AHEAD_ALONE = 2048, AHEAD = 512, PAGE_VALUES = 2048, PAGES_AHEAD = 8192 };

typedef __m512 sums_of_tile[MOST_ROWS][MOST_OUTPUTS];

/* Products of 32 inputs from `i` on. w0 x0 + w1 x1 is one term, so that a sum waits for one addition only. `lanes` masks
 * the inputs. */
INLINE void add_products(lm_dense_shape s, const uint16_t *weight, const lm_dense_piece *p, int64_t i, uint32_t lanes, sums_of_tile sum)
{
    const int64_t in = p->w->inputs;
    const __mmask16 low = (__mmask16)lanes, high = (__mmask16)(lanes >> 16);
    __m512 w0[MOST_OUTPUTS], w1[MOST_OUTPUTS];
    UNROLL
    for (int o = 0; o < s.outputs; o++) {
        w0[o] = load_16(weight + o * in + i, s.type, 0, low);
        w1[o] = load_16(weight + o * in + i + 16, s.type, 0, high);
    }
    UNROLL
    for (int r = 0; r < s.rows; r++) {
        const float *x = p->x + r * in + i;
        __m512 x0 = load_16(x, LM_F32, 0, low), x1 = load_16(x + 16, LM_F32, 0, high);
        UNROLL
        for (int o = 0; o < s.outputs; o++)
            sum[r][o] = _mm512_add_ps(sum[r][o], _mm512_fmadd_ps(w0[o], x0, _mm512_mul_ps(w1[o], x1)));
    }
}

/* A tile of s.rows rows and s.outputs outputs, from output `first` on. Each sum has the same order in every tile: 16 lanes, then their tree. */
INLINE void tile(lm_dense_shape s, const lm_dense_piece *p, int64_t first)
{
    const lm_dense *w = p->w;
    const int64_t in = w->inputs;
    const uint16_t *weight = w->weight + first * in;
    float *y = p->y + first - p->first;
    sums_of_tile sum;
    UNROLL
    for (int r = 0; r < s.rows; r++)
        UNROLL
        for (int o = 0; o < s.outputs; o++)
            sum[r][o] = _mm512_setzero_ps();
    const int64_t distance = s.outputs == 1 ? AHEAD_ALONE : AHEAD;
    int64_t i = 0;
    for (; i + 32 <= in; i += 32) {
        /* The end of a row is followed by the next row, which this tile has read: prefetch the next tile's instead. */
        const uint16_t *ahead = weight + i + distance + (i + distance < in ? 0 : (s.outputs - 1) * in);
        UNROLL
        for (int o = 0; o < s.outputs; o++)
            _mm_prefetch((const char *)(ahead + o * in), _MM_HINT_T0);
        if (s.outputs == 1 && i % PAGE_VALUES == 0)
            _mm_prefetch((const char *)(weight + i + PAGES_AHEAD), _MM_HINT_T0);
        add_products(s, weight, p, i, 0xffffffff, sum);
    }
    if (i < in)
        add_products(s, weight, p, i, (1u << (in - i)) - 1, sum);
    for (int o = 0; o < s.outputs; o++) {
        float bias = w->bias ? lm_load(w->bias, w->bias_type, first + o) : 0;
        for (int r = 0; r < s.rows; r++)
            y[r * p->stride + o] = _mm512_reduce_add_ps(sum[r][o]) + bias;
    }
}

/* One row reads one output after the other: one stream of memory, where eight of them, 12 KB apart, take 15 % longer.
 * Several rows compute more for each weight, and read x less often when outputs share it. */
#define OUTPUTS_1 1
#define OUTPUTS_2 6
#define OUTPUTS_3 4
#define OUTPUTS_4 4
#include "dense_columns.h"

void lm_dense_avx512(const lm_dense_piece *piece) { dense_columns(piece); }
#endif
