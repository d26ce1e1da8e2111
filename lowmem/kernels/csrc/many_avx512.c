/* The packed kernels with AVX-512 for many rows: a group's weights are unpacked once, and multiplied by all of them. */
#if defined(__x86_64__)
#include "sums_avx512.h"

enum { WIDE = 2, PANEL = 16 * WIDE }; /* vectors of outputs that are worked on at a time */

/* Where the unpacked pairs of LM_PAIRED lie, behind the steps. */
static inline uint8_t *pairs_in(uint8_t *scratch, int width) { return scratch + LM_MANY_COLUMNS * width; }

/* The group's weights for columns first..last-1 into [panel][step][16 WIDE outputs][4 inputs], and for LM_PAIRED the pairs
 * of two steps likewise; what lies beyond is 0. */
INLINE void unpack_group(int bits, int planes, const lm_group *at, int64_t first, int64_t last, uint8_t *scratch)
{
    const lm_packed *w = at->w;
    const int width = at->input->group, pieces = UNIT_PIECES(bits), steps = PIECE_STEPS(bits);
    for (int64_t o = first; o < last; o += 16) {
        const __mmask16 mask = last - o >= 16 ? FULL : (__mmask16)((1u << (last - o)) - 1);
        const uint32_t *words = lm_words(w, at->group * width * bits / 32, o);
        const int64_t column = o - first, panel = column / PANEL * PANEL, inside = column % PANEL * 4;
        uint8_t *to = scratch + panel * width + inside, *pairs = pairs_in(scratch, width) + panel * width / 2 + inside;
        for (int k = 0; k < width; k += 4 * UNIT_STEPS(bits)) {
            UNROLL
            for (int piece = 0; piece < pieces; piece++) {
                __m512i step[2];
                unpack(bits, piece, words, lm_word_stride(w), mask, step);
                for (int s = 0; s < steps; s++, to += 4 * PANEL)
                    _mm512_store_si512((void *)to, step[s]);
                if (planes == LM_PAIRED) {
                    _mm512_store_si512((void *)pairs, pairs_of(bits, words, mask, step));
                    pairs += 4 * PANEL;
                }
            }
            words += UNIT_ROWS(bits) * lm_word_stride(w);
        }
    }
}

/* Rows of a tile: as many as the registers hold sums of. Of three planes the third has sums of its own. */
#define TILE(planes) ((planes) == 3 ? 6 : 12)
enum { MOST_ROWS = 12, REST = 4 };

/* Add the products of one plane: `fours` of each row's digits in turn, then on by `next`. ahead: what a tile of other rows
 * will read, asked for as this one goes on. */
INLINE const uint8_t *add_products(int rows, int width, int fours, int next, int64_t row_bytes, const uint8_t *weights,
                                   const uint8_t *digits, const uint8_t *ahead, __m512i *sum)
{
    /* Three rows are one register and what the CPU adds to it, or there are not enough for their addresses. */
    const uint8_t *base[MOST_ROWS / 3];
    const int bases = (rows + 2) / 3;
    UNROLL
    for (int i = 0; i < bases; i++)
        base[i] = digits + 3 * i * row_bytes;
    for (int k = 0; k < width; k += 4 * fours) {
        _mm_prefetch((const char *)ahead, _MM_HINT_T0);
        ahead += 16 * fours;
        UNROLL
        for (int s = 0; s < fours; s++) {
            __m512i w[WIDE];
            UNROLL
            for (int v = 0; v < WIDE; v++)
                w[v] = _mm512_load_si512((const void *)(weights + 64 * v));
            UNROLL
            for (int r = 0; r < rows; r++) {
                __m512i x = broadcast(base[r / 3] + r % 3 * row_bytes + 4 * s);
                UNROLL
                for (int v = 0; v < WIDE; v++)
                    sum[r * WIDE + v] = dot(sum[r * WIDE + v], w[v], x);
            }
            weights += 64 * WIDE;
        }
        UNROLL
        for (int i = 0; i < bases; i++) {
            base[i] += next;
            __asm__("" : "+r"(base[i])); /* no register for each row after all */
        }
    }
    return ahead;
}

/* Tiles whose digits are asked for ahead: with many inputs they come from memory for every piece of columns. */
enum { TILES_AHEAD = 2 };

/* to[r * stride + o] += the group's part of `rows` rows and PANEL columns. scratch: the columns' unpacked weights, `column`
 * the first of these. */
INLINE void many_tile(int plain, int planes, int rows, const lm_group *at, uint8_t *scratch, int64_t column, int64_t row,
                      int64_t output, const __mmask16 *mask, const uint8_t *ahead, float *to, int64_t stride)
{
    const lm_input *input = at->input;
    const int width = input->group, next = planes == LM_PAIRED ? 12 : 4 * planes;
    const int64_t row_bytes = DIGIT_BYTES(width, planes);
    const uint8_t *digits = (const uint8_t *)input->digits + (at->group * input->rows + row) * row_bytes;
    const uint8_t *steps = scratch + column * width;
    __m512i sum[MOST_ROWS * WIDE];
    __m512 highest[MOST_ROWS * WIDE];
    clear_sums(rows, WIDE, sum);
    if (planes == 3) {
        add_zeros(plain, 2, rows, WIDE, at, row, output, mask, sum);
        ahead = add_products(rows, width, 1, next, row_bytes, steps, digits + 8, ahead, sum);
        UNROLL
        for (int r = 0; r < rows; r++)
            UNROLL
            for (int v = 0; v < WIDE; v++)
                highest[r * WIDE + v] = _mm512_cvtepi32_ps(sum[r * WIDE + v]);
        clear_sums(rows, WIDE, sum);
    }
    if (planes != 1) {
        add_zeros(plain, 1, rows, WIDE, at, row, output, mask, sum);
        if (planes == LM_PAIRED)
            ahead = add_products(rows, width, 2, next, row_bytes, steps, digits, ahead, sum);
        else
            ahead = add_products(rows, width, 1, next, row_bytes, steps, digits + 4, ahead, sum);
        raise_sums(rows, WIDE, sum);
    }
    add_zeros(plain, 0, rows, WIDE, at, row, output, mask, sum);
    if (planes == LM_PAIRED)
        add_products(rows, width / 2, 1, next, row_bytes, pairs_in(scratch, width) + column * width / 2, digits + 8, ahead, sum);
    else
        add_products(rows, width, 1, next, row_bytes, steps, digits, ahead, sum);
    add_scaled(plain, rows, WIDE, at, row, output, mask, sum, planes == 3 ? highest : NULL, to, stride);
}

typedef void (*many_kernel)(const lm_group *at, int64_t first, int64_t last, float *y, int64_t stride, uint8_t *scratch);

INLINE void many_columns(int plain, int bits, int planes, const lm_group *at, int64_t first, int64_t last, float *y, int64_t stride,
                         uint8_t *scratch)
{
    const int64_t rows = at->input->rows, row_bytes = DIGIT_BYTES(at->input->group, planes);
    unpack_group(bits, planes, at, first, last, scratch);
    int64_t tile = TILE(planes);
    for (int64_t r = 0; r < rows; r += tile) {
        tile = rows - r >= TILE(planes) ? TILE(planes) : rows - r >= REST ? REST : 1;
        for (int64_t o = first; o < last; o += PANEL) {
            int64_t left = last - o;
            const __mmask16 mask[WIDE] = {left >= 16 ? FULL : (__mmask16)((1u << left) - 1),
                                          left >= 32   ? FULL
                                          : left <= 16 ? 0
                                                       : (__mmask16)((1u << (left - 16)) - 1)};
            /* Each panel asks for its share, in the order of memory: what lies behind the last row is the next group. */
            const int64_t bytes = tile * row_bytes, panels = LM_MANY_COLUMNS / PANEL;
            const uint8_t *ahead = (const uint8_t *)at->input->digits + (at->group * rows + r) * row_bytes +
                                   TILES_AHEAD * bytes + (o - first) / PANEL * (bytes / panels);
            float *to = y + r * stride + o - first;
            if (tile == TILE(planes))
                many_tile(plain, planes, TILE(planes), at, scratch, o - first, r, o, mask, ahead, to, stride);
            else if (tile == REST)
                many_tile(plain, planes, REST, at, scratch, o - first, r, o, mask, ahead, to, stride);
            else
                many_tile(plain, planes, 1, at, scratch, o - first, r, o, mask, ahead, to, stride);
        }
    }
}

#define MANY(bits, planes)                                                                                             \
    TARGET static void many_##bits##_##planes(const lm_group *at, int64_t first, int64_t last, float *y, int64_t stride, \
                                              uint8_t *scratch)                                                        \
    {                                                                                                                  \
        if (is_plain(at->w))                                                                                           \
            many_columns(1, bits, planes, at, first, last, y, stride, scratch);                                        \
        else                                                                                                           \
            many_columns(0, bits, planes, at, first, last, y, stride, scratch);                                        \
    }
#define MANY_PLANES(bits) MANY(bits, 1) MANY(bits, 2) MANY(bits, 3)
MANY_PLANES(2) MANY_PLANES(3) MANY_PLANES(4) MANY_PLANES(8)
MANY(2, LM_PAIRED) MANY(3, LM_PAIRED) MANY(4, LM_PAIRED)
#define MANY_TABLE(bits) {many_##bits##_1, many_##bits##_2, many_##bits##_3, many_##bits##_LM_PAIRED}

static void many(const lm_packed *w, const lm_input *input, int64_t first, int64_t last, float *y, int64_t stride,
                 void *scratch)
{
    static const many_kernel kernels[4][4] = {MANY_TABLE(2), MANY_TABLE(3), MANY_TABLE(4), {many_8_1, many_8_2, many_8_3}};
    const many_kernel kernel = kernels[w->bits == 8 ? 3 : w->bits - 2][input->planes - 1];
    clear(input, last - first, y, stride);
    for (int64_t g = 0; g < w->in / input->group; g++) {
        const lm_group at = {w, input, g, g * input->group / w->group};
        kernel(&at, first, last, y, stride, scratch);
    }
    add_bias(w, input, first, last, y, stride);
}

const lm_isa lm_avx512 = {"AVX-512 VNNI", lm_digit_bytes_avx512, lm_quantize_avx512, lm_few_avx512, many, lm_dense_avx512};

#endif
