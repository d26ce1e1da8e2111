/* The packed kernels with AVX-512 for many rows: a group's weights are unpacked once, and multiplied by all of them. */
#if defined(__x86_64__)
#include "weights_avx512.h"

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

/* Rows of a tile: as many as the registers hold sums of. Of two planes the upper one's sums are moved up by its 8 bits, and
 * the lower one's are added to them; of three the third has sums of its own. */
#define TILE(planes) ((planes) == 3 ? 6 : 12)
enum { MOST_ROWS = 12, REST = 4 };
typedef __m512i sums_of_tile[MOST_ROWS][WIDE]; /* live in registers */

/* A tile of rows and PANEL columns of a group. sums: of its first row's digits, of plane 0. */
typedef struct {
    const lm_group *group;
    const __mmask16 *mask;
    const int32_t *sums;
    int64_t output;
} lm_tile;

/* Add -zero times the sum of the plane's digits. */
INLINE void add_zeros(int plain, int plane, int rows, const lm_tile *tile, sums_of_tile sum)
{
    const lm_packed *w = tile->group->w;
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int v = 0; v < WIDE; v++) {
            const int64_t at = lm_group_at(w, tile->group->scale_row, tile->output + 16 * v);
            sum[r][v] = _mm512_add_epi32(sum[r][v], minus_zeros(plain, w, at, tile->mask[v], tile->sums[3 * r + plane]));
            __asm__("" : "+v"(sum[r][v])); /* in a register of its own from here on */
        }
}

/* Add the products of one plane: `fours` of each row's digits in turn, then on by `next`. ahead: what a tile of other rows
 * will read, asked for as this one goes on. */
INLINE const uint8_t *add_products(int rows, int width, int fours, int next, int64_t row_bytes, const uint8_t *weights,
                                   const uint8_t *digits, const uint8_t *ahead, sums_of_tile sum)
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
                    sum[r][v] = dot(sum[r][v], w[v], x);
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

INLINE void clear_sums(int rows, sums_of_tile sum)
{
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int v = 0; v < WIDE; v++)
            sum[r][v] = _mm512_setzero_si512();
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
    const lm_tile tile = {at, mask, input->sums + 3 * (at->group * input->rows + row), output};
    sums_of_tile sum;
    __m512 highest[MOST_ROWS][WIDE];
    clear_sums(rows, sum);
    if (planes == 3) {
        add_zeros(plain, 2, rows, &tile, sum);
        ahead = add_products(rows, width, 1, next, row_bytes, steps, digits + 8, ahead, sum);
        UNROLL
        for (int r = 0; r < rows; r++)
            UNROLL
            for (int v = 0; v < WIDE; v++)
                highest[r][v] = _mm512_cvtepi32_ps(sum[r][v]);
        clear_sums(rows, sum);
    }
    if (planes != 1) {
        add_zeros(plain, 1, rows, &tile, sum);
        if (planes == LM_PAIRED)
            ahead = add_products(rows, width, 2, next, row_bytes, steps, digits, ahead, sum);
        else
            ahead = add_products(rows, width, 1, next, row_bytes, steps, digits + 4, ahead, sum);
        UNROLL
        for (int r = 0; r < rows; r++)
            UNROLL
            for (int v = 0; v < WIDE; v++)
                sum[r][v] = _mm512_slli_epi32(sum[r][v], 8);
    }
    add_zeros(plain, 0, rows, &tile, sum);
    if (planes == LM_PAIRED)
        add_products(rows, width / 2, 1, next, row_bytes, pairs_in(scratch, width) + column * width / 2, digits + 8, ahead, sum);
    else
        add_products(rows, width, 1, next, row_bytes, steps, digits, ahead, sum);
    const float *scales = input->scales + at->group * input->rows + row;
    UNROLL
    for (int v = 0; v < WIDE; v++) {
        const __m512 weight_scale = load_floats(at->w->scales, plain ? LM_F16 : at->w->scales_type,
                                                lm_group_at(at->w, at->scale_row, output + 16 * v), mask[v]);
        UNROLL
        for (int r = 0; r < rows; r++) {
            float *y = to + r * stride + 16 * v;
            __m512 c = _mm512_cvtepi32_ps(sum[r][v]);
            if (planes == 3)
                c = _mm512_fmadd_ps(highest[r][v], _mm512_set1_ps(65536), c);
            const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(scales[r]), weight_scale);
            _mm512_mask_storeu_ps(y, mask[v], _mm512_fmadd_ps(c, scale, _mm512_maskz_loadu_ps(mask[v], y)));
        }
    }
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
