/* Packed linears with NEON for few rows, and the products of a tile. The file of an instruction set defines
 *
 *   TARGET                              its function attribute
 *   SUMS                                vectors of four outputs, times planes, that registers hold the sums of
 *   total                               the sums of four outputs
 *   add_steps(bits, count, w, x, sum)   add the products of `count` steps of weights, signed integers of `bits` bits plus a
 *                                       sign, with their digits, four steps in a vector
 *   sums_of(sum)                        the four outputs' sums
 *   raise(sum)                          times 256
 *   hold(sum)                           keeps it in registers at this point (HOLD)
 *
 * and then includes this, which defines lm_decode, and multiply for a tile.
 */
#include "neon_tiles.h"

/* ---- products ------------------------------------------------------------------------------------------------ */

/* One pass over a group's weights: `count` planes from `first` on, for `wide` vectors of outputs from `from` on. */
typedef struct {
    int first, count, wide, from;
    int prefetch;
} pass;

INLINE void prefetch_unit(shape s, const block *b, int unit)
{
    for (int i = unit * s.bits; i < (unit + 1) * s.bits; i++)
        __builtin_prefetch((const void *)((uintptr_t)(b->words + i * b->word_stride) + (uintptr_t)b->ahead * 4));
}

/* Add to sum[(row * p.count + plane) * p.wide + vector]. */
INLINE void add_planes(shape s, pass p, const tile *t, total *sum)
{
    const tile now = *t;
    const int units = t->at->input->group / UNIT;
    const int64_t row_bytes = DIGIT_BYTES((int64_t)t->at->input->group, s.planes);
    const int8_t *digits[3];
    UNROLL
    for (int c = 0; c < p.count; c++)
        digits[c] = digits_of(t, s.planes, p.first + c);
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
                    const int shared = s.planes == LM_PAIRED && p.first + c == 0;
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
            digits[c] += s.planes == LM_PAIRED && p.first + c == 0 ? UNIT / 2 : UNIT;
    }
}

/* ---- sums ---------------------------------------------------------------------------------------------------- */

INLINE void clear(int count, total *sum)
{
    UNROLL
    for (int i = 0; i < count; i++)
        sum[i] = (total){0};
}

INLINE int32x4_t plus_raised(int32x4_t low, int32x4_t high)
{
    return vreinterpretq_s32_u32(vaddq_u32(vreinterpretq_u32_s32(low), vshlq_n_u32(vreinterpretq_u32_s32(high), 8)));
}

/* Few sums: all planes in one pass. */
INLINE void at_once(shape s, const tile *t, int wide, int from)
{
    const int planes = LM_SUMS(s.planes);
    total sum[SUMS];
    int32x4_t low[SUMS], highest[SUMS];
    clear(s.rows * planes * wide, sum);
    add_planes(s, (pass){0, planes, wide, from, !s.unpacked && from == 0}, t, sum);
    UNROLL
    for (int r = 0; r < s.rows; r++)
        UNROLL
        for (int v = 0; v < wide; v++) {
            const total *each = sum + r * planes * wide + v;
            const int32x4_t first = sums_of(each[0]);
            low[r * wide + v] = planes == 1 ? first : plus_raised(first, sums_of(each[wide]));
            highest[r * wide + v] = planes == 3 ? sums_of(each[2 * wide]) : first;
        }
    UNROLL
    for (int v = 0; v < wide; v++)
        add_scaled(s, t, from + v, low + v, highest + v, wide);
}

/* One plane after the other into the same sums. The third plane has sums of its own. */
INLINE void plane_by_plane(shape s, const tile *t, int wide, int from)
{
    const int planes = LM_SUMS(s.planes), count = s.rows * wide;
    total sum[SUMS];
    int32x4_t low[SUMS], highest[SUMS];
    clear(count, sum);
    UNROLL
    for (int plane = planes - 1; plane >= 0; plane--) {
        add_planes(s, (pass){plane, 1, wide, from, !s.unpacked && from == 0 && plane == planes - 1}, t, sum);
        UNROLL
        for (int i = 0; i < count; i++) {
            if (plane == 2)
                highest[i] = sums_of(sum[i]), sum[i] = (total){0};
            else if (plane == 1)
                sum[i] = raise(sum[i]);
            else
                low[i] = sums_of(sum[i]);
        }
    }
    UNROLL
    for (int v = 0; v < wide; v++)
        add_scaled(s, t, from + v, low + v, s.planes == 3 ? highest + v : low + v, wide);
}

INLINE void multiply(shape s, const tile *t)
{
    const int planes = LM_SUMS(s.planes), few = s.rows * planes <= MOST_ROWS, sets = few ? s.rows * planes : s.rows;
    const int wide = sets * VECTORS <= SUMS ? VECTORS : sets * VECTORS / 2 <= SUMS ? VECTORS / 2 : 1;
    for (int from = 0; from < VECTORS; from += wide) {
        if (few)
            at_once(s, t, wide, from);
        else
            plane_by_plane(s, t, wide, from);
    }
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

INLINE void decode_columns(shape s, const part *p)
{
    const lm_packed *w = p->piece->w;
    const int64_t stride = p->piece->stride;
    /* From the end of these outputs to the beginning of the next group's; the tiled layout is contiguous. */
    const int64_t next = (int64_t)p->at.input->group * s.bits / 32 * w->outputs - (p->end - p->begin);
    float *y = p->piece->y + p->row * stride + p->begin - p->piece->first;
    spare memory;
    block whole = block_of(&p->at, p->begin, y, stride);
    for (int64_t o = p->begin; o < p->end; o += BLOCK) {
        block b = whole;
        if (p->end - o < BLOCK) {
            b = spare_block(&whole, p->end - o, s.rows, &memory);
            spare_words(&p->at, &b, p->end - o, &memory);
        }
        b.ahead = w->tiled ? TILED_AHEAD : o + AHEAD < p->end ? AHEAD : AHEAD + next;
        multiply(s, &(tile){&p->at, &b, p->row, NULL, NULL});
        if (p->end - o < BLOCK)
            put_back(&whole, p->end - o, s.rows, &memory);
        whole = block_after(&whole);
    }
}

#define DECODE(bits, planes, rows)                                                                                     \
    TARGET static void decode_##bits##_##planes##_##rows(const part *p)                                                \
    {                                                                                                                  \
        decode_columns((shape){bits, planes, rows, 0}, p);                                                             \
    }
#define DECODE_ROWS(bits, planes)                                                                                      \
    DECODE(bits, planes, 1) DECODE(bits, planes, 2) DECODE(bits, planes, 3) DECODE(bits, planes, 4)
#define DECODE_PLANES(bits) DECODE_ROWS(bits, 1) DECODE_ROWS(bits, 2) DECODE_ROWS(bits, 3)
DECODE_PLANES(2) DECODE_PLANES(3) DECODE_PLANES(4) DECODE_PLANES(5) DECODE_PLANES(6) DECODE_PLANES(7) DECODE_PLANES(8)
DECODE_ROWS(2, 4) DECODE_ROWS(3, 4) DECODE_ROWS(4, 4) /* 4: LM_PAIRED */

#define NAMES(bits, planes)                                                                                            \
    {decode_##bits##_##planes##_1, decode_##bits##_##planes##_2, decode_##bits##_##planes##_3, decode_##bits##_##planes##_4}
#define TABLE(bits) {NAMES(bits, 1), NAMES(bits, 2), NAMES(bits, 3), NAMES(bits, 4)}
#define WIDE_TABLE(bits) {NAMES(bits, 1), NAMES(bits, 2), NAMES(bits, 3)} /* without LM_PAIRED */

static void lm_decode(const lm_piece *piece)
{
    typedef void (*kernel)(const part *);
    static const kernel kernels[9][4][MOST_ROWS] = {
        [2] = TABLE(2),      [3] = TABLE(3),      [4] = TABLE(4),     [5] = WIDE_TABLE(5),
        [6] = WIDE_TABLE(6), [7] = WIDE_TABLE(7), [8] = WIDE_TABLE(8),
    };
    const lm_packed *w = piece->w;
    const lm_input *input = piece->input;
    const kernel *by_rows = kernels[w->bits][input->planes - 1];
    const int64_t groups = w->inputs / input->group, outputs = piece->last - piece->first;
    /* The tiled layout tile by tile; GPTQ's rows group by group. Several tiles of rows read the same words: the second
     * one finds them in the cache. */
    const int64_t step = w->tiled ? LM_TILE_OUTPUTS : input->rows <= MOST_ROWS ? outputs : 256;
    const int64_t pieces = (outputs + step - 1) / step;
    for (int64_t i = 0; i < groups * pieces; i++) {
        part p = {.piece = piece, .at = group_of(piece, w->tiled ? i % groups : i / pieces)};
        p.begin = piece->first + (w->tiled ? i / groups : i % pieces) * step;
        p.end = lm_min(p.begin + step, piece->last);
        for (p.row = 0; p.row < input->rows; p.row += MOST_ROWS)
            by_rows[lm_min(input->rows - p.row, MOST_ROWS) - 1](&p);
    }
}
