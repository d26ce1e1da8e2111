/* One chunk of keys, attended to by up to LM_LANES heads side by side. Included once for each instruction set, with
 *
 *   NAME(x)        x with the instruction set's suffix
 *   TARGET         its attribute
 *   WIDTH          floats in a vector
 *   WIDE, ITEMS    vectors of heads, and keys or values, whose sums the registers hold
 *   PAIRS          2: products are of pairs of bfloat16, 1: of floats
 *   MULTIPLY_ADD   (sum, element, vector): of such elements, the first broadcast
 *
 * Heads are lanes: a key is broadcast against the queries of all heads that share it, so that nothing is expanded
 * and nothing is summed across lanes. What a lane holds never depends on the others.
 */
#define INLINE static inline __attribute__((always_inline)) TARGET
#define UNROLL _Pragma("GCC unroll 8")
#define VECTOR NAME(vector)
#define INTEGERS NAME(integers)
#define BITS NAME(bits)
#define LOOSE NAME(loose)
#define TILE_STEP(depth) ((depth) * ITEMS + 16)

typedef float VECTOR __attribute__((vector_size(4 * WIDTH)));
typedef int32_t INTEGERS __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t BITS __attribute__((vector_size(4 * WIDTH))); /* where sums may wrap */
typedef float LOOSE __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

INLINE VECTOR NAME(load)(const void *from) { return (VECTOR) * (const LOOSE *)from; }

INLINE void NAME(store)(void *to, VECTOR value) { *(LOOSE *)to = (LOOSE)value; }

INLINE VECTOR NAME(all)(float value) { return value - (VECTOR){0}; }

INLINE VECTOR NAME(select)(INTEGERS mask, VECTOR yes, VECTOR no)
{
    return (VECTOR)(((INTEGERS)yes & mask) | ((INTEGERS)no & ~mask));
}

/* 2^x to 1e-7 for x <= 0; exactly 0 from -126 down. Minimax polynomial on [-1/2, 1/2]. */
INLINE VECTOR NAME(exp2)(VECTOR x)
{
    const VECTOR shift = NAME(all)(0x1.8p23f);
    INTEGERS none = x <= -126.0f;
    VECTOR whole = x + shift, f = x - (whole - shift);
    VECTOR y = f * 1.5403530393e-4f + 1.3333558146e-3f;
    y = y * f + 9.6181291076e-3f;
    y = y * f + 5.5504108665e-2f;
    y = y * f + 2.4022650696e-1f;
    y = y * f + 6.9314718056e-1f;
    y = y * f + 1.0f;
    return (VECTOR)(((BITS)y + ((BITS)whole << 23)) & ~(BITS)none);
}

/* out[item][lane] = sum over k of a(item, k) b[k][lane], k in order. a(item, k) lies at item * item_step + k * k_step; b and
 * out are `lanes` wide. */
INLINE void NAME(tile)(int wide, int items, const element *a, int64_t item_step, int64_t k_step, int64_t depth,
                       const element *b, float *out, int64_t lanes)
{
    VECTOR sum[ITEMS][WIDE];
    UNROLL
    for (int i = 0; i < items; i++)
        UNROLL
        for (int v = 0; v < wide; v++)
            sum[i][v] = (VECTOR){0};
    for (int64_t k = 0; k < depth; k++) {
        VECTOR w[WIDE];
        UNROLL
        for (int v = 0; v < wide; v++)
            w[v] = NAME(load)(b + k * lanes + v * WIDTH);
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
            NAME(store)(out + i * lanes + v * WIDTH, sum[i][v]);
}

/* What will be read soon: `lines` cache lines from `from` on, some of them at every tile. */
typedef struct {
    const char *from;
    int64_t lines;
} NAME(ahead);

INLINE void NAME(items)(int wide, const element *a, int64_t item_step, int64_t k_step, int64_t tile_step, int64_t count,
                        int64_t depth, const element *b, float *out, int64_t lanes, NAME(ahead) * soon)
{
    int64_t i = 0;
    for (; i + ITEMS <= count; i += ITEMS, a += tile_step) {
        for (int line = 0; line < soon->lines; line++)
            __builtin_prefetch(soon->from + 64 * line);
        soon->from += 64 * soon->lines;
        NAME(tile)(wide, ITEMS, a, item_step, k_step, depth, b, out + i * lanes, lanes);
    }
    for (; i < count; i++, a += item_step)
        NAME(tile)(wide, 1, a, item_step, k_step, depth, b, out + i * lanes, lanes);
}

/* `count` items, tile_step apart every ITEMS of them. `soon`: bytes that are fetched meanwhile. */
TARGET static void NAME(product)(const element *a, int64_t item_step, int64_t k_step, int64_t tile_step, int64_t count,
                                 int64_t depth, const element *b, float *out, int64_t lanes, const void *soon, int64_t bytes)
{
    const int64_t tiles = count / ITEMS * ((lanes + WIDE * WIDTH - 1) / (WIDE * WIDTH));
    NAME(ahead) ahead = {soon, tiles ? (bytes / 64 + tiles - 1) / tiles : 0};
    int64_t lane = 0;
    for (; lane + WIDE * WIDTH <= lanes; lane += WIDE * WIDTH)
        NAME(items)(WIDE, a, item_step, k_step, tile_step, count, depth, b + lane, out + lane, lanes, &ahead);
    ahead.lines = 0;
    for (; lane < lanes; lane += WIDTH)
        NAME(items)(1, a, item_step, k_step, tile_step, count, depth, b + lane, out + lane, lanes, &ahead);
}

/* Scores [count][lanes] to weights 2^(score - peak), as elements [count / PAIRS][lanes] in the same place; peak and total
 * of each lane. Lane l sees the first limit[l] of the keys: the others get 0, and cannot be told from keys that are
 * not there. */
TARGET static void NAME(softmax)(float *scores, int64_t count, int64_t lanes, const int32_t *limit, float *peaks,
                                 float *totals)
{
    for (int64_t lane = 0; lane < lanes; lane += WIDTH) {
        INTEGERS seen = *(const INTEGERS *)(limit + lane);
        VECTOR peak = NAME(all)(-FLT_MAX), total = {0};
        float *column = scores + lane;
        for (int32_t k = 0; k < count; k++) {
            VECTOR s = NAME(load)(column + k * lanes);
            peak = NAME(select)((s > peak) & (seen > k), s, peak);
        }
        const VECTOR nothing = NAME(all)(-INFINITY);
        for (int32_t k = 0; k < count; k += PAIRS) {
            VECTOR p = NAME(exp2)(NAME(select)(seen > k, NAME(load)(column + k * lanes) - peak, nothing));
#if PAIRS == 2
            VECTOR q = {0};
            if (k + 1 < count)
                q = NAME(exp2)(NAME(select)(seen > k + 1, NAME(load)(column + (k + 1) * lanes) - peak, nothing));
            /* To nearest, ties to even; what is summed is what is multiplied. */
            BITS low = (BITS)p, high = (BITS)q;
            low = (low + 0x7fff + (low >> 16 & 1)) & 0xffff0000;
            high = (high + 0x7fff + (high >> 16 & 1)) & 0xffff0000;
            total += (VECTOR)low;
            total += (VECTOR)high;
            p = (VECTOR)(low >> 16 | high);
#else
            total += p;
#endif
            NAME(store)(column + k / PAIRS * lanes, p);
        }
        NAME(store)(peaks + lane, peak);
        NAME(store)(totals + lane, total);
    }
}

/* `count` rows of `size` bfloat16 into elements that are multiplied with weights, floats or pairs of two rows, as
 * [size / ITEMS][count / PAIRS][ITEMS]: a tile of them lies together, and a cache line apart from the next, or lines
 * that are written together would all want one place in the cache. */
TARGET static void NAME(spread)(const uint16_t *restrict from, int64_t count, int64_t size, element *restrict to)
{
    const int64_t depth = (count + PAIRS - 1) / PAIRS;
    for (int64_t k = 0; k < depth; k++)
        for (int64_t d = 0; d < size; d += ITEMS) {
            const uint16_t *restrict a = from + k * PAIRS * size + d;
            element *restrict tile = to + d / ITEMS * TILE_STEP(depth) + k * ITEMS;
#if PAIRS == 2
            if (2 * k + 1 < count) {
                for (int i = 0; i < ITEMS; i++)
                    tile[i] = a[i] | (uint32_t)a[size + i] << 16;
                continue;
            }
#endif
            for (int i = 0; i < ITEMS; i++)
                tile[i] = PAIRS == 2 ? a[i] : (uint32_t)a[i] << 16;
        }
}

/* See kernels.chunk. */
TARGET static void NAME(chunk)(const uint16_t *keys, const uint16_t *values, int64_t count, int64_t size,
                               const element *queries, const int32_t *limit, int64_t lanes, float *part, scratch *own,
                               const uint16_t *next)
{
    float *peaks = part, *totals = part + lanes, *sums = part + 2 * lanes;
    const int64_t bytes = 2 * count * size, depth = (count + PAIRS - 1) / PAIRS;
#if PAIRS == 2
    NAME(product)((const element *)keys, size / 2, 1, ITEMS * size / 2, count, size / 2, queries, own->scores, lanes, values, bytes);
#else
    element *restrict widened = own->elements;
    for (int64_t i = 0; i < count * size; i++)
        widened[i] = (uint32_t)keys[i] << 16;
    NAME(product)(own->elements, size, 1, ITEMS * size, count, size, queries, own->scores, lanes, values, bytes);
#endif
    NAME(softmax)(own->scores, count, lanes, limit, peaks, totals);
    NAME(spread)(values, count, size, own->elements);
    NAME(product)(own->elements, 1, ITEMS, TILE_STEP(depth), size, depth, (const element *)own->scores, sums, lanes, next, bytes);
}

/* See kernels.merge. */
TARGET static void NAME(merge)(const float *parts, int64_t stride, int64_t chunks, int64_t lanes, int64_t first, int64_t count,
                               float *out)
{
    for (int64_t lane = 0; lane < LM_BUNDLE; lane += WIDTH) {
        const float *from = parts + lane;
        VECTOR peak = NAME(all)(-FLT_MAX), total = {0};
        for (int64_t c = 0; c < chunks; c++) {
            VECTOR p = NAME(load)(from + c * stride);
            peak = NAME(select)(p > peak, p, peak);
        }
        for (int64_t d = 0; d < count; d++)
            NAME(store)(out + d * LM_BUNDLE + lane, (VECTOR){0});
        for (int64_t c = 0; c < chunks; c++) {
            VECTOR weight = NAME(exp2)(NAME(load)(from + c * stride) - peak);
            const float *sums = from + c * stride + (2 + first) * lanes;
            total += weight * NAME(load)(from + c * stride + lanes);
            for (int64_t d = 0; d < count; d++) {
                float *to = out + d * LM_BUNDLE + lane;
                NAME(store)(to, NAME(load)(to) + weight * NAME(load)(sums + d * lanes));
            }
        }
        for (int64_t d = 0; d < count; d++) {
            float *to = out + d * LM_BUNDLE + lane;
            NAME(store)(to, NAME(load)(to) / total);
        }
    }
}

#undef INLINE
#undef UNROLL
#undef VECTOR
#undef INTEGERS
#undef BITS
#undef LOOSE
#undef TILE_STEP
#undef NAME
#undef TARGET
#undef WIDTH
#undef WIDE
#undef ITEMS
#undef PAIRS
#undef MULTIPLY_ADD
