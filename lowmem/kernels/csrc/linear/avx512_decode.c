/* Packed linears with AVX-512 for few rows: weights are multiplied as they stream by. */
#if defined(__x86_64__)
#include "avx512_weights.h"

/* Rows and vectors of 16 outputs of a register tile: as many as there are registers for, so that sums do not wait for each
 * other. */
enum { MOST_ROWS = 4, WIDE = 2, WIDEST = 4 };
#define WIDTH(rows, planes) ((rows) <= 2 || (planes) != 3 ? WIDEST : WIDE)

/* ---- prefetching --------------------------------------------------------------------------------------------- */

/* Distance in bytes inside a tile of the tiled layout: the more work a byte is, the further. A unit of planes is not read in
 * the order of memory: it goes to the second cache from FAR_AHEAD and to the first from near by. */
#define AHEAD(bits) ((bits) == 8 ? 4096 : (bits) == 4 ? 8192 : IS_PLANAR(bits) ? 2048 : 6144)
enum { FAR_AHEAD = 16384 };
/* Also one line of each page, some rows of words ahead, since a TLB miss takes longer than reading a small page, above all
 * in a virtual machine; and the scales of later groups, a stream too thin for the hardware's prefetcher. 64 rows of the
 * tiled layout are 16 KiB. */
enum { ROWS_AHEAD = 64, PAGE_ROWS = 16, GROUPS_AHEAD = 16, LINE = 64 };

INLINE void prefetch_group(shape s, const tile *t, const uint32_t *words)
{
    const lm_packed *w = t->w;
    for (int row = 0; row < t->input->group * s.bits / 32; row += PAGE_ROWS)
        _mm_prefetch((const char *)(words + (ROWS_AHEAD + row) * lm_word_stride(w)), _MM_HINT_T0);
    const int64_t later = lm_group_at(w, t->scale_row + GROUPS_AHEAD, t->output);
    const int width = s.plain || w->scales_type != LM_F32 ? 2 : 4;
    for (int byte = 0; byte < 16 * s.wide * width; byte += LINE)
        _mm_prefetch((const char *)w->scales + later * width + byte, _MM_HINT_T0);
    if (!s.plain && w->zeros)
        _mm_prefetch((const char *)w->zeros + later, _MM_HINT_T0);
}

/* One unit's words ahead, in the order of memory. */
INLINE void prefetch_unit(shape s, const uint32_t *words, int64_t stride)
{
    const int unit_rows = UNIT_ROWS(s.bits); /* UNROLL takes only plain conditions, here and below */
    UNROLL
    for (int u = 0; u < unit_rows; u++)
        UNROLL
        for (int v = 0; v < s.wide; v++)
            _mm_prefetch((const char *)(words + u * stride + 16 * v) + AHEAD(s.bits), _MM_HINT_T0);
}

/* The same for planes, a part before every piece, since many prefetches at once wait for each other. */
INLINE void prefetch_planes(shape s, int piece, const uint32_t *words, int64_t stride)
{
    const int parts = UNIT_PIECES(s.bits), lines = UNIT_ROWS(s.bits) * s.wide, last = (piece + 1) * lines / parts;
    UNROLL
    for (int line = piece * lines / parts; line < last; line++) {
        const char *at = (const char *)(words + line / s.wide * stride + 16 * (line % s.wide));
        _mm_prefetch(at + AHEAD(s.bits), _MM_HINT_T0);
        _mm_prefetch(at + FAR_AHEAD, _MM_HINT_T1);
    }
}

/* ---- one and two rows: the sums of each plane, and y, in registers ------------------------------------------- */

typedef __m512i sums_of_tile[MOST_ROWS][WIDEST][3]; /* those in use are in registers */

INLINE __m512 as_float(int planes, const __m512i sum[3])
{
    if (planes == 1)
        return _mm512_cvtepi32_ps(sum[0]);
    __m512 low = _mm512_cvtepi32_ps(_mm512_add_epi32(sum[0], _mm512_slli_epi32(sum[1], 8)));
    return planes != 3 ? low : _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[2]), _mm512_set1_ps(65536), low);
}

INLINE void start_sums(shape s, const tile *t, sums_of_tile sum)
{
    const int32_t *sums = t->input->sums + 3 * (t->group * t->input->rows + t->row);
    const int count = LM_SUMS(s.planes);
    UNROLL
    for (int r = 0; r < s.rows; r++)
        UNROLL
        for (int v = 0; v < s.wide; v++)
            UNROLL
            for (int p = 0; p < count; p++)
                sum[r][v][p] = minus_zeros(s.plain, t, v, sums[3 * r + p]);
}

/* y += the group's sums times their scales. */
INLINE void scale_sums(shape s, const tile *t, sums_of_tile sum, __m512 y[MOST_ROWS][WIDEST])
{
    const float *scales = t->input->scales + t->group * t->input->rows + t->row;
    UNROLL
    for (int v = 0; v < s.wide; v++) {
        const __m512 weight_scale = weight_scales(s.plain, t, v);
        UNROLL
        for (int r = 0; r < s.rows; r++) {
            const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(scales[r]), weight_scale);
            y[r][v] = _mm512_fmadd_ps(as_float(s.planes, sum[r][v]), scale, y[r][v]);
        }
    }
}

/* A tile's part of groups first..last-1. */
INLINE void decode_tile(shape s, tile t, int64_t first, int64_t last)
{
    const int width = t.input->group, pieces = UNIT_PIECES(s.bits), fours = STEP_DIGITS(PIECE_STEPS(s.bits), s.planes);
    const int64_t next = lm_word_stride(t.w), row_bytes = DIGIT_BYTES(width, s.planes);
    __m512 y[MOST_ROWS][WIDEST];
    UNROLL
    for (int r = 0; r < s.rows; r++)
        UNROLL
        for (int v = 0; v < s.wide; v++)
            y[r][v] = _mm512_maskz_loadu_ps(t.mask[v], t.y + r * t.stride + 16 * v);
    for (int64_t g = first; g < last; g++) {
        set_group(&t, g);
        const uint32_t *words = words_of(&t, s.bits);
        const uint8_t *digits = digits_of(&t, s.planes);
        sums_of_tile sum;
        prefetch_group(s, &t, words);
        start_sums(s, &t, sum);
        for (int k = 0; k < width; k += 4 * UNIT_STEPS(s.bits)) {
            if (!IS_PLANAR(s.bits))
                prefetch_unit(s, words, next);
            UNROLL
            for (int piece = 0; piece < pieces; piece++) {
                if (IS_PLANAR(s.bits))
                    prefetch_planes(s, piece, words, next);
                __m512i step[WIDEST][3];
                UNROLL
                for (int v = 0; v < s.wide; v++)
                    unpack(s.bits, piece, words + 16 * v, next, t.mask[v], step[v]);
                if (s.planes == LM_PAIRED) {
                    UNROLL
                    for (int v = 0; v < s.wide; v++)
                        step[v][2] = pairs_of(s.bits, words + 16 * v, t.mask[v], step[v]);
                }
                UNROLL
                for (int d = 0; d < fours; d++, digits += 4) {
                    const int i = s.planes == LM_PAIRED ? d : d / s.planes, p = s.planes == LM_PAIRED ? d < 2 : d % s.planes;
                    UNROLL
                    for (int r = 0; r < s.rows; r++) {
                        __m512i x = broadcast(digits + r * row_bytes);
                        UNROLL
                        for (int v = 0; v < s.wide; v++)
                            sum[r][v][p] = dot(sum[r][v][p], step[v][i], x);
                    }
                }
            }
            words += UNIT_ROWS(s.bits) * next;
        }
        scale_sums(s, &t, sum, y);
    }
    UNROLL
    for (int r = 0; r < s.rows; r++)
        UNROLL
        for (int v = 0; v < s.wide; v++)
            _mm512_mask_storeu_ps(t.y + r * t.stride + 16 * v, t.mask[v], y[r][v]);
}

/* ---- three and four rows: planes one after the other into the same sums, so that a tile has more outputs ------- */

/* A plane's digits: where the first piece's are, bytes from one four to the next, and from one piece to the next. */
typedef struct {
    const uint8_t *digits;
    int gap, next;
    int pairs;    /* the digits are those that pairs share */
    int prefetch; /* the weights' first plane */
} plane;

/* Add the products of a group's weights, from its first row of words on, and one plane of its digits. */
INLINE void add_plane(shape s, const tile *t, const uint32_t *words, plane p, __m512i *sum)
{
    const int width = t->input->group, pieces = UNIT_PIECES(s.bits), fours = p.pairs ? 1 : PIECE_STEPS(s.bits);
    const int64_t stride = lm_word_stride(t->w), row_bytes = DIGIT_BYTES(width, s.planes);
    for (int k = 0; k < width; k += 4 * UNIT_STEPS(s.bits)) {
        if (p.prefetch && !IS_PLANAR(s.bits))
            prefetch_unit(s, words, stride);
        UNROLL
        for (int piece = 0; piece < pieces; piece++) {
            if (p.prefetch && IS_PLANAR(s.bits))
                prefetch_planes(s, piece, words, stride);
            __m512i step[WIDEST][2];
            UNROLL
            for (int v = 0; v < s.wide; v++) {
                if (!p.pairs || s.bits != 4)
                    unpack(s.bits, piece, words + 16 * v, stride, t->mask[v], step[v]);
                if (p.pairs)
                    step[v][0] = pairs_of(s.bits, words + 16 * v, t->mask[v], step[v]);
            }
            UNROLL
            for (int i = 0; i < fours; i++)
                UNROLL
                for (int r = 0; r < s.rows; r++) {
                    __m512i x = broadcast(p.digits + r * row_bytes + p.gap * i);
                    UNROLL
                    for (int v = 0; v < s.wide; v++)
                        sum[r * s.wide + v] = dot(sum[r * s.wide + v], step[v][i], x);
                }
            p.digits += p.next;
        }
        words += UNIT_ROWS(s.bits) * stride;
    }
}

/* As decode_tile, for one or two planes; y stays in memory. */
INLINE void decode_tile_by_planes(shape s, tile t, int64_t first, int64_t last)
{
    const int paired = s.planes == LM_PAIRED;
    for (int64_t g = first; g < last; g++) {
        set_group(&t, g);
        const uint32_t *words = words_of(&t, s.bits);
        const uint8_t *digits = digits_of(&t, s.planes);
        __m512i sum[MOST_ROWS * WIDEST];
        plane p = {.gap = paired ? 4 : 4 * s.planes, .next = 4 * STEP_DIGITS(PIECE_STEPS(s.bits), s.planes)};
        prefetch_group(s, &t, words);
        clear_sums(s, sum);
        if (s.planes != 1) {
            p.digits = digits + (paired ? 0 : 4), p.pairs = 0, p.prefetch = 1;
            add_zeros(s, 1, &t, sum);
            add_plane(s, &t, words, p, sum);
            raise_sums(s, sum);
        }
        p.digits = digits + (paired ? 8 : 0), p.pairs = paired, p.prefetch = s.planes == 1;
        add_zeros(s, 0, &t, sum);
        add_plane(s, &t, words, p, sum);
        add_scaled(s, &t, sum, NULL);
    }
}

/* ---- a piece ------------------------------------------------------------------------------------------------- */

/* What one call of a kernel computes: some rows, the outputs from the tile's on up to end-1, groups first..last-1. */
typedef struct {
    tile tile;
    int64_t end, first, last;
} part;

INLINE void decode_columns(shape s, const part *p)
{
    const __mmask16 full[WIDEST] = {FULL, FULL, FULL, FULL};
    tile t = p->tile;
    t.mask = full;
    s.wide = WIDTH(s.rows, s.planes);
    for (; t.output + 16 * s.wide <= p->end; t.output += 16 * s.wide, t.y += 16 * s.wide) {
        if (s.rows <= 2 || s.planes == 3)
            decode_tile(s, t, p->first, p->last);
        else
            decode_tile_by_planes(s, t, p->first, p->last);
    }
    s.wide = 1;
    for (; t.output < p->end; t.output += 16, t.y += 16) {
        const __mmask16 mask[1] = {first_lanes(p->end - t.output)};
        t.mask = mask;
        decode_tile(s, t, p->first, p->last);
    }
}

#define DECODE(bits, planes, rows)                                                                                     \
    TARGET static void decode_##bits##_##planes##_##rows(const part *p)                                                \
    {                                                                                                                  \
        if (is_plain(p->tile.w))                                                                                       \
            decode_columns((shape){1, bits, planes, rows, 0}, p);                                                      \
        else                                                                                                           \
            decode_columns((shape){0, bits, planes, rows, 0}, p);                                                      \
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

void lm_decode_avx512(const lm_piece *piece)
{
    typedef void (*kernel)(const part *);
    static const kernel kernels[9][4][4] = {[2] = TABLE(2),      [3] = TABLE(3),      [4] = TABLE(4),     [5] = WIDE_TABLE(5),
                                            [6] = WIDE_TABLE(6), [7] = WIDE_TABLE(7), [8] = WIDE_TABLE(8)};
    const lm_packed *w = piece->w;
    const lm_input *input = piece->input;
    const kernel *by_rows = kernels[w->bits][input->planes - 1];
    /* The tiled layout tile by tile; GPTQ's rows group by group, all columns of each. Up to four rows take all groups of
     * a tile at once; more rows take each group's weights again from the nearest cache. */
    const int64_t groups = w->inputs / input->group;
    const int64_t columns = w->tiled ? LM_TILE_OUTPUTS : piece->last - piece->first;
    const int64_t at_once = w->tiled && input->rows <= MOST_ROWS ? groups : 1;
    part p = {.tile = {.w = w, .input = input, .stride = piece->stride}};
    tile *t = &p.tile;
    for (t->output = piece->first; t->output < piece->last; t->output += columns) {
        p.end = lm_min(t->output + columns, piece->last);
        for (p.first = 0; p.first < groups; p.first += at_once) {
            p.last = p.first + at_once;
            for (t->row = 0; t->row < input->rows; t->row += MOST_ROWS) {
                t->y = piece->y + t->row * piece->stride + t->output - piece->first;
                by_rows[lm_min(input->rows - t->row, MOST_ROWS) - 1](&p);
            }
        }
    }
}

#endif
