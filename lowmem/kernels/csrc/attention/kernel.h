/* One chunk of keys for up to LM_LANES lanes. Each instruction set's file includes this once, after defining
 *
 *   TARGET         its function attribute
 *   WIDTH          floats in a vector
 *   WIDE, ITEMS    of a register tile: vectors of lanes, and keys or values
 *   PAIRS          2: products are of pairs of bfloat16; 1: of floats
 *   MULTIPLY_ADD   (sum, element, vector): of such elements, the first one broadcast
 *
 * A lane is one row of one head. A key is broadcast against the queries of all heads that share it, so that no key is
 * expanded and nothing is summed across lanes. A lane's values never depend on the other lanes.
 */
#include <float.h>
#include <math.h>

#include "kernels.h"
#include "types.h"

#define INLINE static inline __attribute__((always_inline)) TARGET
#define UNROLL _Pragma("GCC unroll 8")
#define TILE_STEP(depth) ((depth) * ITEMS + 16)

typedef float vector __attribute__((vector_size(4 * WIDTH)));
typedef int32_t integers __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t bits __attribute__((vector_size(4 * WIDTH))); /* where sums may wrap */
typedef float unaligned __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

INLINE vector load(const void *from) { return (vector) * (const unaligned *)from; }

INLINE void store(void *to, vector value) { *(unaligned *)to = (unaligned)value; }

INLINE vector all(float value) { return value - (vector){0}; }

INLINE vector pick(integers mask, vector yes, vector no) { return (vector)(((integers)yes & mask) | ((integers)no & ~mask)); }

#include "exp2.h"

/* ---- products ------------------------------------------------------------------------------------------------ */

/* out[item][lane] = the sum over k of a(item, k) b[k][lane], k in order. b and out have `lanes` columns. */
typedef struct {
    const lm_element *a, *b;
    float *out;
    int64_t item_step, k_step; /* a(item, k) is a[item * item_step + k * k_step] inside a tile of ITEMS items */
    int64_t tile_step;         /* elements of a from one tile to the next */
    int64_t count, depth, lanes; /* items, k, lanes */
    const void *ahead;           /* bytes to prefetch meanwhile */
    int64_t bytes;
} product;

INLINE void tile(int wide, int items, const product *p, const lm_element *a, const lm_element *b, float *out)
{
    const int64_t item_step = p->item_step, k_step = p->k_step, depth = p->depth, lanes = p->lanes;
    vector sum[ITEMS][WIDE];
    UNROLL
    for (int i = 0; i < items; i++)
        UNROLL
        for (int v = 0; v < wide; v++)
            sum[i][v] = (vector){0};
    for (int64_t k = 0; k < depth; k++) {
        vector w[WIDE];
        UNROLL
        for (int v = 0; v < wide; v++)
            w[v] = load(b + k * lanes + v * WIDTH);
        UNROLL
        for (int i = 0; i < items; i++)
            UNROLL
            for (int v = 0; v < wide; v++)
                sum[i][v] = MULTIPLY_ADD(sum[i][v], a[i * item_step + k * k_step], w[v]);
    }
    UNROLL
    for (int i = 0; i < items; i++)
        UNROLL
        for (int v = 0; v < wide; v++)
            store(out + i * lanes + v * WIDTH, sum[i][v]);
}

/* All items for `wide` vectors of lanes from `lane` on. Each tile prefetches `lines` cache lines from *ahead on. */
INLINE void all_items(int wide, const product *p, int64_t lane, const char **ahead, int64_t lines)
{
    const lm_element *a = p->a, *b = p->b + lane;
    int64_t i = 0;
    for (; i + ITEMS <= p->count; i += ITEMS, a += p->tile_step) {
        for (int line = 0; line < lines; line++)
            __builtin_prefetch(*ahead + 64 * line);
        *ahead += 64 * lines;
        tile(wide, ITEMS, p, a, b, p->out + lane + i * p->lanes);
    }
    for (; i < p->count; i++, a += p->item_step)
        tile(wide, 1, p, a, b, p->out + lane + i * p->lanes);
}

INLINE void multiply(product p)
{
    const int64_t tiles = p.count / ITEMS * ((p.lanes + WIDE * WIDTH - 1) / (WIDE * WIDTH));
    const int64_t lines = tiles ? (p.bytes / 64 + tiles - 1) / tiles : 0;
    const char *ahead = p.ahead;
    int64_t lane = 0;
    for (; lane + WIDE * WIDTH <= p.lanes; lane += WIDE * WIDTH)
        all_items(WIDE, &p, lane, &ahead, lines);
    for (; lane < p.lanes; lane += WIDTH)
        all_items(1, &p, lane, &ahead, 0);
}

/* ---- softmax ------------------------------------------------------------------------------------------------- */

/* Turn the scores [count][lanes] into weights 2^(score - peak), as elements [count / PAIRS][lanes] in the same place, and
 * store each lane's peak and total in the chunk's part. Keys that a lane does not see get the weight 0, exactly as if they
 * did not exist. */
TARGET static void softmax(const lm_chunk *c)
{
    const int64_t count = c->count, lanes = c->lanes; /* in registers: stores may alias *c */
    const int32_t *limit = c->limit;
    float *scores = c->scores, *peaks = c->part, *totals = c->part + lanes;
    for (int64_t lane = 0; lane < lanes; lane += WIDTH) {
        integers seen = *(const integers *)(limit + lane);
        vector peak = all(-FLT_MAX), total = {0};
        float *column = scores + lane;
        for (int32_t k = 0; k < count; k++) {
            vector s = load(column + k * lanes);
            peak = pick((s > peak) & (seen > k), s, peak);
        }
        const vector nothing = all(-INFINITY);
        for (int32_t k = 0; k < count; k += PAIRS) {
            vector p = pick(seen > k, load(column + k * lanes) - peak, nothing);
            exp2_of(&p);
#if PAIRS == 2
            vector q = {0};
            if (k + 1 < count) {
                q = pick(seen > k + 1, load(column + (k + 1) * lanes) - peak, nothing);
                exp2_of(&q);
            }
            /* To nearest, ties to even. The total sums the rounded weights, by which values are multiplied. */
            bits low = (bits)p, high = (bits)q;
            low = (low + 0x7fff + (low >> 16 & 1)) & 0xffff0000;
            high = (high + 0x7fff + (high >> 16 & 1)) & 0xffff0000;
            total += (vector)low;
            total += (vector)high;
            p = (vector)(low >> 16 | high);
#else
            total += p;
#endif
            store(column + k / PAIRS * lanes, p);
        }
        store(peaks + lane, peak);
        store(totals + lane, total);
    }
}

/* ---- a chunk ------------------------------------------------------------------------------------------------- */

/* Rearrange a chunk's values [count, size] into elements, floats or pairs of two rows, as
 * [size / ITEMS][count / PAIRS][ITEMS]. Tiles are contiguous and a cache line apart, since lines that are written together
 * would otherwise compete for one place in the cache. gcc 12 heeds `restrict` on parameters, not on local variables. */
TARGET static void spread_values(const uint16_t *restrict from, int64_t count, int64_t size, lm_element *restrict to)
{
    const int64_t depth = (count + PAIRS - 1) / PAIRS;
    for (int64_t k = 0; k < depth; k++)
        for (int64_t d = 0; d < size; d += ITEMS) {
            const uint16_t *restrict a = from + k * PAIRS * size + d;
            lm_element *restrict column = to + d / ITEMS * TILE_STEP(depth) + k * ITEMS;
#if PAIRS == 2
            if (2 * k + 1 < count) {
                for (int i = 0; i < ITEMS; i++)
                    column[i] = a[i] | (uint32_t)a[size + i] << 16;
                continue;
            }
#endif
            for (int i = 0; i < ITEMS; i++)
                column[i] = PAIRS == 2 ? a[i] : (uint32_t)a[i] << 16;
        }
}

TARGET static void chunk(const lm_chunk *chunk)
{
    const lm_chunk c = *chunk;
    const int64_t bytes = 2 * c.count * c.size, depth = (c.count + PAIRS - 1) / PAIRS, width = c.size / PAIRS;
#if PAIRS == 2
    const lm_element *keys = (const lm_element *)c.keys;
#else
    lm_element *restrict keys = c.elements;
    for (int64_t i = 0; i < c.count * c.size; i++)
        keys[i] = (uint32_t)c.keys[i] << 16;
#endif
    multiply((product){.a = keys, .b = c.queries, .out = c.scores, .item_step = width, .k_step = 1,
                       .tile_step = ITEMS * width, .count = c.count, .depth = width, .lanes = c.lanes,
                       .ahead = c.values, .bytes = bytes});
    softmax(&c);
    spread_values(c.values, c.count, c.size, c.elements);
    multiply((product){.a = c.elements, .b = (const lm_element *)c.scores, .out = c.part + 2 * c.lanes, .item_step = 1,
                       .k_step = ITEMS, .tile_step = TILE_STEP(depth), .count = c.size, .depth = depth, .lanes = c.lanes,
                       .ahead = c.next, .bytes = bytes});
}

TARGET static void merge(const lm_merge *merge)
{
    const lm_merge m = *merge;
    for (int64_t lane = 0; lane < LM_BUNDLE; lane += WIDTH) {
        const float *from = m.parts + lane;
        vector peak = all(-FLT_MAX), total = {0};
        for (int64_t c = 0; c < m.chunks; c++) {
            vector p = load(from + c * m.stride);
            peak = pick(p > peak, p, peak);
        }
        for (int64_t d = 0; d < LM_BUNDLE; d++)
            store(m.out + d * LM_BUNDLE + lane, (vector){0});
        for (int64_t c = 0; c < m.chunks; c++) {
            vector weight = load(from + c * m.stride) - peak;
            exp2_of(&weight);
            const float *sums = from + c * m.stride + (2 + m.first) * m.lanes;
            total += weight * load(from + c * m.stride + m.lanes);
            for (int64_t d = 0; d < LM_BUNDLE; d++) {
                float *to = m.out + d * LM_BUNDLE + lane;
                store(to, load(to) + weight * load(sums + d * m.lanes));
            }
        }
        for (int64_t d = 0; d < LM_BUNDLE; d++) {
            float *to = m.out + d * LM_BUNDLE + lane;
            store(to, load(to) / total);
        }
    }
}
