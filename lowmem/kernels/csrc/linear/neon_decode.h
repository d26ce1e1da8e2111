/* Packed linears with NEON for few rows, and the products of a tile. The file of an instruction set defines
 *
 *   TARGET                              its function attribute
 *   SUMS                                vectors of four outputs that registers hold the sums of
 *   total                               the sums of four outputs
 *   add_steps(bits, count, w, x, sum)   add the products of `count` steps of weights, signed integers of `bits` bits plus a
 *                                       sign, with their digits, four steps in a vector
 *   sums_of(sum)                        the four outputs' sums
 *   raise(sum)                          times 256
 *   hold(sum)                           keeps it in registers at this point (HOLD)
 *
 * and then includes this, which defines lm_decode, and multiply_rows for weights in scratch too.
 */
#include "neon_tiles.h"

/* ---- products ------------------------------------------------------------------------------------------------ */

/* One pass over a group's weights: `count` planes from `plane` on, for `wide` vectors of outputs from `from` on. */
typedef struct {
    int count, wide;
    int pairs; /* whether the first of the planes has the digits that pairs share */
    int plane, from, prefetch;
} pass;

/* Vectors of outputs of a tile with `sets` sums each. */
#define WIDE(sets) ((sets) * VECTORS <= SUMS ? VECTORS : VECTORS / 2)

INLINE void prefetch_unit(shape s, const block *b, int unit)
{
    for (int i = unit * s.bits; i < (unit + 1) * s.bits; i++)
        __builtin_prefetch((const void *)((uintptr_t)(b->words + i * b->word_stride) + (uintptr_t)b->ahead * 4));
}

/* Add to sum[(row * p.count + plane) * p.wide + vector]. */
INLINE void add_planes(shape s, pass p, const tile *t, total *sum)
{
    const tile now = *t;
    const int units = t->at->input->group / UNIT, planes = t->at->input->planes;
    const int64_t row_bytes = DIGIT_BYTES((int64_t)t->at->input->group, planes);
    const int8_t *digits[3];
    UNROLL
    for (int c = 0; c < p.count; c++)
        digits[c] = digits_of(t, planes, p.plane + c);
    for (int unit = 0; unit < units; unit++) {
        if (p.prefetch)
            prefetch_unit(s, t->b, unit);
        UNROLL
        for (int v = 0; v < p.wide; v++) {
            int8x16_t step[STEPS], pair[PAIR_STEPS];
            load_unit(s, &now, unit, p.from + v, step, pair);
            UNROLL
            for (int r = 0; r < s.rows; r++)
                UNROLL
                for (int c = 0; c < p.count; c++) {
                    const int shared = p.pairs && c == 0;
                    const int8_t *from = digits[c] + r * row_bytes;
                    total *to = &sum[(r * p.count + c) * p.wide + v];
                    const int8x16_t x[2] = {vld1q_s8(from), shared ? vdupq_n_s8(0) : vld1q_s8(from + 16)};
                    if (shared)
                        add_steps(s.unpacked ? 8 : s.bits + 4, PAIR_STEPS, pair, x, to);
                    else
                        add_steps(s.bits, STEPS, step, x, to);
                    hold(to);
                }
        }
        UNROLL
        for (int c = 0; c < p.count; c++)
            digits[c] += p.pairs && c == 0 ? UNIT / 2 : UNIT;
    }
}

INLINE int32x4_t plus_raised(int32x4_t low, int32x4_t high)
{
    return vreinterpretq_s32_u32(vaddq_u32(vreinterpretq_u32_s32(low), vshlq_n_u32(vreinterpretq_u32_s32(high), 8)));
}

/* ---- one row: all planes in one pass ------------------------------------------------------------------------- */

INLINE void multiply_row(shape s, const tile *t)
{
    const int planes = LM_SUMS(s.planes), wide = WIDE(planes), paired = s.planes == LM_PAIRED;
    for (int from = 0; from < VECTORS; from += wide) {
        total sum[SUMS];
        UNROLL
        for (int i = 0; i < planes * wide; i++)
            sum[i] = (total){0};
        add_planes(s, (pass){planes, wide, paired, 0, from, from == 0}, t, sum);
        UNROLL
        for (int v = 0; v < wide; v++) {
            int32x4_t low = sums_of(sum[v]), highest = low;
            if (planes > 1)
                low = plus_raised(low, sums_of(sum[wide + v]));
            if (planes == 3)
                highest = sums_of(sum[2 * wide + v]);
            add_scaled(s, t, from + v, &low, &highest, 1);
        }
    }
}

/* ---- several rows: one plane after the other into the same sums ----------------------------------------------- */

/* Add a plane's products to sum[row][vector]. */
typedef void (*plane_kernel)(const tile *t, int plane, total *sum);

INLINE void add_plane(shape s, int pairs, const tile *t, int plane, total *sum)
{
    const int wide = WIDE(s.rows);
    const int first = !s.unpacked && plane == LM_SUMS(t->at->input->planes) - 1;
    for (int from = 0; from < VECTORS; from += wide, sum += wide) {
        total now[SUMS];
        UNROLL
        for (int r = 0; r < s.rows; r++)
            UNROLL
            for (int v = 0; v < wide; v++)
                now[r * wide + v] = sum[r * VECTORS + v];
        add_planes(s, (pass){1, wide, pairs, plane, from, first && from == 0}, t, now);
        UNROLL
        for (int r = 0; r < s.rows; r++)
            UNROLL
            for (int v = 0; v < wide; v++)
                sum[r * VECTORS + v] = now[r * wide + v];
    }
}

/* plane_BITS_PAIRS_ROWS, of weights as they stream by, and scratch_CLASS_PAIRS_ROWS, of weights in scratch. */
#define PLANE(bits, pairs, rows)                                                                                       \
    TARGET static void plane_##bits##_##pairs##_##rows(const tile *t, int plane, total *sum)                           \
    {                                                                                                                  \
        add_plane((shape){bits, pairs ? LM_PAIRED : 1, rows, 0}, pairs, t, plane, sum);                                \
    }
#define SCRATCH(class, pairs, rows)                                                                                    \
    TARGET static void scratch_##class##_##pairs##_##rows(const tile *t, int plane, total *sum)                        \
    {                                                                                                                  \
        add_plane((shape){class, pairs ? LM_PAIRED : 1, rows, 1}, pairs, t, plane, sum);                               \
    }

/* Sums become outputs once all planes are added. */
INLINE void finish(shape s, const tile *t, const int32x4_t *low, const int32x4_t *highest)
{
    UNROLL
    for (int v = 0; v < VECTORS; v++)
        add_scaled(s, t, v, low + v, highest + v, VECTORS);
}

/* A tile of several rows, or of weights in scratch. kernels: for a plane of its own, and for the digits that pairs share. */
INLINE void multiply_tile(int rows, const tile *t, const plane_kernel kernels[2])
{
    const int planes = t->at->input->planes;
    total sum[MOST_ROWS * VECTORS];
    int32x4_t low[MOST_ROWS * VECTORS], highest[MOST_ROWS * VECTORS];
    for (int i = 0; i < rows * VECTORS; i++) {
        sum[i] = (total){0};
        highest[i] = vdupq_n_s32(0);
    }
    for (int plane = LM_SUMS(planes) - 1; plane >= 0; plane--) {
        kernels[planes == LM_PAIRED && plane == 0](t, plane, sum);
        for (int i = 0; plane == 2 && i < rows * VECTORS; i++) {
            highest[i] = sums_of(sum[i]);
            sum[i] = (total){0};
        }
        for (int i = 0; plane == 1 && i < rows * VECTORS; i++)
            sum[i] = raise(sum[i]);
    }
    for (int i = 0; i < rows * VECTORS; i++)
        low[i] = sums_of(sum[i]);
    if (planes == 3)
        finish((shape){.planes = 3, .rows = rows}, t, low, highest);
    else if (planes == LM_PAIRED)
        finish((shape){.planes = LM_PAIRED, .rows = rows}, t, low, low);
    else
        finish((shape){.planes = 1, .rows = rows}, t, low, low);
}

TARGET static void multiply_rows(const tile *t, int rows, const plane_kernel kernels[2])
{
    if (rows == 4)
        multiply_tile(4, t, kernels);
    else if (rows == 3)
        multiply_tile(3, t, kernels);
    else if (rows == 2)
        multiply_tile(2, t, kernels);
    else
        multiply_tile(1, t, kernels);
}

/* ---- decode: weights as they stream by ----------------------------------------------------------------------- */

/* Prefetch distances in outputs: a group has as many streams of words as rows of words, too many for the hardware's
 * prefetcher; in the tiled layout there is one. */
enum { AHEAD = 96, TILED_AHEAD = 1024 };

/* What one call of a kernel computes: some rows from `row` on, outputs begin..end-1, one group. */
typedef struct {
    const lm_piece *piece;
    lm_group at;
    int64_t row, begin, end;
} part;

/* `rows` rows of a part. s.rows is 1 for one row; kernels are for several. */
INLINE void decode_columns(shape s, const part *p, int rows, const plane_kernel *kernels)
{
    const lm_packed *w = p->piece->w;
    const int64_t stride = p->piece->stride;
    /* From the end of these outputs to the beginning of the next group's; the tiled layout is contiguous. */
    const int64_t next = (int64_t)p->at.input->group * w->bits / 32 * w->outputs - (p->end - p->begin);
    float *y = p->piece->y + p->row * stride + p->begin - p->piece->first;
    spare memory;
    block whole = block_of(&p->at, p->begin, y, stride);
    for (int64_t o = p->begin; o < p->end; o += BLOCK) {
        block b = whole;
        if (p->end - o < BLOCK) {
            b = spare_block(&whole, p->end - o, rows, &memory);
            spare_words(&p->at, &b, p->end - o, &memory);
        }
        b.ahead = w->tiled ? TILED_AHEAD : o + AHEAD < p->end ? AHEAD : AHEAD + next;
        const tile t = {&p->at, &b, p->row, NULL, NULL};
        if (s.rows == 1)
            multiply_row(s, &t);
        else
            multiply_rows(&t, rows, kernels);
        if (p->end - o < BLOCK)
            put_back(&whole, p->end - o, rows, &memory);
        whole = block_after(&whole);
    }
}

#define DECODE(bits, planes)                                                                                           \
    TARGET static void decode_##bits##_##planes(const part *p)                                                         \
    {                                                                                                                  \
        decode_columns((shape){bits, planes, 1, 0}, p, 1, NULL);                                                       \
    }
#define DECODE_PLANES(bits) DECODE(bits, 1) DECODE(bits, 2) DECODE(bits, 3)
#define PLANES(bits, pairs) PLANE(bits, pairs, 2) PLANE(bits, pairs, 3) PLANE(bits, pairs, 4)
DECODE_PLANES(2) DECODE_PLANES(3) DECODE_PLANES(4) DECODE_PLANES(5) DECODE_PLANES(6) DECODE_PLANES(7) DECODE_PLANES(8)
PLANES(2, 0) PLANES(3, 0) PLANES(4, 0) PLANES(5, 0) PLANES(6, 0) PLANES(7, 0) PLANES(8, 0)
DECODE(2, 4) DECODE(3, 4) DECODE(4, 4) PLANES(2, 1) PLANES(3, 1) PLANES(4, 1) /* planes 4: LM_PAIRED */

#define ROW(bits) {decode_##bits##_1, decode_##bits##_2, decode_##bits##_3}
#define PAIRED_ROW(bits) {decode_##bits##_1, decode_##bits##_2, decode_##bits##_3, decode_##bits##_4}
#define ROWS(bits) {{plane_##bits##_0_2}, {plane_##bits##_0_3}, {plane_##bits##_0_4}}
#define PAIRED_ROWS(bits)                                                                                              \
    {{plane_##bits##_0_2, plane_##bits##_1_2},                                                                         \
     {plane_##bits##_0_3, plane_##bits##_1_3},                                                                         \
     {plane_##bits##_0_4, plane_##bits##_1_4}}

TARGET static void decode_rows(const part *p, int rows, const plane_kernel *kernels)
{
    decode_columns((shape){0}, p, rows, kernels);
}

static void lm_decode(const lm_piece *piece)
{
    typedef void (*row_kernel)(const part *);
    static const row_kernel row[9][4] = {[2] = PAIRED_ROW(2), [3] = PAIRED_ROW(3), [4] = PAIRED_ROW(4), [5] = ROW(5),
                                           [6] = ROW(6),        [7] = ROW(7),        [8] = ROW(8)};
    static const plane_kernel rows[9][MOST_ROWS - 1][2] = {
        [2] = PAIRED_ROWS(2), [3] = PAIRED_ROWS(3), [4] = PAIRED_ROWS(4), [5] = ROWS(5),
        [6] = ROWS(6),        [7] = ROWS(7),        [8] = ROWS(8),
    };
    const lm_packed *w = piece->w;
    const lm_input *input = piece->input;
    const int64_t groups = w->inputs / input->group, outputs = piece->last - piece->first;
    /* The tiled layout tile by tile; GPTQ's rows group by group. Several tiles of rows read the same words: the second
     * one finds them in the cache. */
    const int64_t step = w->tiled ? LM_TILE_OUTPUTS : input->rows <= MOST_ROWS ? outputs : 256;
    const int64_t pieces = (outputs + step - 1) / step;
    for (int64_t i = 0; i < groups * pieces; i++) {
        part p = {.piece = piece, .at = group_of(piece, w->tiled ? i % groups : i / pieces)};
        p.begin = piece->first + (w->tiled ? i / groups : i % pieces) * step;
        p.end = lm_min(p.begin + step, piece->last);
        for (p.row = 0; p.row < input->rows; p.row += MOST_ROWS) {
            const int count = (int)lm_min(input->rows - p.row, MOST_ROWS);
            if (count == 1)
                row[w->bits][input->planes - 1](&p);
            else
                decode_rows(&p, count, rows[w->bits][count - 2]);
        }
    }
}
