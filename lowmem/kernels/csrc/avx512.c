/* The packed kernels with AVX-512: VNNI for products of bytes, VBMI2 and GFNI for fields of 3 and 2 bits (Ice Lake, Zen 4
 * and later).
 *
 * Digits lie as digits_avx512.c makes them, [group][row][step][plane][4 bytes], where a step is four inputs of each of 16
 * outputs, as GPTQ's words come apart.
 */
#if defined(__x86_64__)
#include <string.h>

#include "avx512.h"
#include "types.h"

/* Vectors of 16 outputs that are worked on at a time: with one or two rows more, or the sums would wait for each other. */
enum { WIDE = 2, WIDEST = 4, PANEL = 16 * WIDE };
#define FEW_WIDE(rows) ((rows) <= 2 ? WIDEST : WIDE)

/* ---- weights ------------------------------------------------------------------------------------------------- */

enum { FULL = 0xffff };

INLINE __m512i load_words(const uint32_t *words, __mmask16 mask)
{
    return mask == FULL ? _mm512_loadu_si512(words) : _mm512_maskz_loadu_epi32(mask, words);
}

/* Rows of words that come apart together, and the pieces, of so many steps each, in which they are taken apart: a piece at
 * a time leaves the registers to the sums. */
#define UNIT_ROWS(bits) ((bits) == 3 ? 3 : 1)
#define UNIT_PIECES(bits) ((bits) == 3 ? 4 : (bits) == 2 ? 2 : 1)
#define PIECE_STEPS(bits) ((bits) == 8 ? 1 : 2)
#define UNIT_STEPS(bits) (UNIT_PIECES(bits) * PIECE_STEPS(bits))

/* Bits from.. of each byte, by themselves: a shift and a mask at once. */
INLINE __m512i field(__m512i v, int bits, int from)
{
    uint64_t matrix = 0; /* byte 7 - i of it chooses the bits whose sum becomes bit i */
    UNROLL
    for (int i = 0; i < bits; i++)
        matrix |= (uint64_t)(1u << (from + i)) << (8 * (7 - i));
    return _mm512_gf2p8affine_epi64_epi8(v, _mm512_set1_epi64((long long)matrix), 0);
}

/* A piece of 16 outputs' words[0], words[stride] and words[2 stride]: vectors of [16 outputs][4 inputs]. */
INLINE void unpack(int bits, int piece, const uint32_t *words, int64_t stride, __mmask16 mask, __m512i step[2])
{
    if (bits == 3) {
        /* 96 bits are four pieces of eight fields; byte i of a piece takes the 8 bits from 6i on, two fields and 2 bits. */
        const __m512i spread = _mm512_set1_epi64(0x322c2620120c0600), spread_8 = _mm512_set1_epi64(0x3a342e281a140e08);
        __m512i first = load_words(words + (piece < 2 ? 0 : piece == 2 ? stride : 2 * stride), mask);
        if (piece == 1)
            first = _mm512_shrdi_epi32(first, load_words(words + stride, mask), 24);
        else if (piece == 2)
            first = _mm512_shrdi_epi32(first, load_words(words + 2 * stride, mask), 16);
        first = _mm512_multishift_epi64_epi8(piece == 3 ? spread_8 : spread, first);
        step[0] = _mm512_and_si512(first, _mm512_set1_epi8(0x07));
        step[1] = field(first, 3, 3);
        return;
    }
    __m512i v = load_words(words, mask);
    if (bits == 8) {
        step[0] = v;
    } else if (bits == 4) {
        step[0] = _mm512_and_si512(v, _mm512_set1_epi8(0x0f));
        step[1] = _mm512_and_si512(_mm512_srli_epi32(v, 4), _mm512_set1_epi8(0x0f));
    } else {
        step[0] = piece ? field(v, 2, 4) : _mm512_and_si512(v, _mm512_set1_epi8(0x03));
        step[1] = field(v, 2, 4 * piece + 2);
    }
}

INLINE __m512 load_floats(const void *values, int type, int64_t at, __mmask16 mask)
{
    if (type == LM_F32)
        return _mm512_maskz_loadu_ps(mask, (const float *)values + at);
    __m256i half = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)values + at);
    if (type == LM_F16)
        return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/* As most weights are: symmetric, with float16 scales. Known before the loops, it saves a fifth of a small group's time. */
static inline int is_plain(const lm_packed *w) { return !w->zeros && w->scales_type == LM_F16; }

/* What a group's sums begin with: -zero times the sum of the digits, for each of 16 outputs. */
INLINE __m512i minus_zeros(int plain, const lm_packed *w, int64_t at, __mmask16 mask, int32_t sum)
{
    if (plain || !w->zeros)
        return _mm512_set1_epi32(-(1 << (w->bits - 1)) * sum);
    __m512i zeros = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, w->zeros + at));
    return _mm512_mullo_epi32(zeros, _mm512_set1_epi32(-sum));
}

INLINE __m512 as_float(int planes, const __m512i sum[3])
{
    if (planes == 1)
        return _mm512_cvtepi32_ps(sum[0]);
    __m512 low = _mm512_cvtepi32_ps(_mm512_add_epi32(sum[0], _mm512_slli_epi32(sum[1], 8)));
    return planes == 2 ? low : _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[2]), _mm512_set1_ps(65536), low);
}

/* _mm512_dpbusd_epi32, for which gcc 12 copies every sum to another register and back, a fifth of the time. */
INLINE __m512i dot(__m512i sum, __m512i w, __m512i x)
{
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
}

INLINE __m512i broadcast(const uint8_t *digits)
{
    int32_t word;
    memcpy(&word, digits, 4);
    return _mm512_set1_epi32(word);
}

/* One group of inputs: scale_row is the row of the weight's scales that it belongs to. */
typedef struct {
    const lm_packed *w;
    const lm_input *input;
    int64_t group, scale_row;
} lm_group;

enum { MOST_ROWS = 12 };
typedef __m512i sums_of_tile[MOST_ROWS][WIDEST][3]; /* the used ones live in registers */

INLINE void start_sums(int plain, int planes, int rows, int wide, const lm_group *at, int64_t row, int64_t output, const __mmask16 *mask,
                       sums_of_tile sum)
{
    const int32_t *sums = at->input->sums + 3 * (at->group * at->input->rows + row);
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int v = 0; v < wide; v++)
            UNROLL
            for (int p = 0; p < planes; p++)
                sum[r][v][p] = minus_zeros(plain, at->w, lm_group_at(at->w, at->scale_row, output + 16 * v), mask[v], sums[3 * r + p]);
}

/* y += the group's sums times their scales. */
INLINE void scale_sums(int plain, int planes, int rows, int wide, const lm_group *at, int64_t row, int64_t output, const __mmask16 *mask,
                       sums_of_tile sum, __m512 y[MOST_ROWS][WIDEST])
{
    const float *scales = at->input->scales + at->group * at->input->rows + row;
    UNROLL
    for (int v = 0; v < wide; v++) {
        __m512 weight_scale = load_floats(at->w->scales, plain ? LM_F16 : at->w->scales_type, lm_group_at(at->w, at->scale_row, output + 16 * v), mask[v]);
        UNROLL
        for (int r = 0; r < rows; r++)
            y[r][v] = _mm512_fmadd_ps(as_float(planes, sum[r][v]), _mm512_mul_ps(_mm512_set1_ps(scales[r]), weight_scale), y[r][v]);
    }
}

INLINE void load_y(int rows, int wide, const float *from, int64_t stride, const __mmask16 *mask, __m512 y[MOST_ROWS][WIDEST])
{
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int v = 0; v < wide; v++)
            y[r][v] = _mm512_maskz_loadu_ps(mask[v], from + r * stride + 16 * v);
}

INLINE void store_y(int rows, int wide, float *to, int64_t stride, const __mmask16 *mask, __m512 y[MOST_ROWS][WIDEST])
{
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int v = 0; v < wide; v++)
            _mm512_mask_storeu_ps(to + r * stride + 16 * v, mask[v], y[r][v]);
}

/* ---- a few rows: weights as they stream by ------------------------------------------------------------------- */

/* Bytes that are asked for ahead where weights lie one after the other: the more work a byte is, the further. */
#define AHEAD(bits) ((bits) == 8 ? 4096 : (bits) == 4 ? 8192 : 6144)
/* Beside them, one line of each page, rows of words ahead: to find where a small page lies takes longer than to read it, the
 * more so in a virtual machine. And the scales of groups ahead: a stream so thin that the hardware forgets it. In a panel 64
 * rows are 16 KiB. */
enum { ROWS_AHEAD = 64, PAGE_ROWS = 16, GROUPS_AHEAD = 16, LINE = 64 };

/* words: the group's first. */
INLINE void prefetch_group(int plain, int bits, int wide, const lm_group *at, const uint32_t *words, int64_t output)
{
    const lm_packed *w = at->w;
    for (int row = 0; row < at->input->group * bits / 32; row += PAGE_ROWS)
        _mm_prefetch((const char *)(words + (ROWS_AHEAD + row) * lm_word_stride(w)), _MM_HINT_T0);
    const int64_t later = lm_group_at(w, at->scale_row + GROUPS_AHEAD, output);
    const int width = plain || w->scales_type != LM_F32 ? 2 : 4;
    for (int byte = 0; byte < 16 * wide * width; byte += LINE)
        _mm_prefetch((const char *)w->scales + later * width + byte, _MM_HINT_T0);
    if (!plain && w->zeros)
        _mm_prefetch((const char *)w->zeros + later, _MM_HINT_T0);
}

/* y += groups first..last-1 of `rows` rows and 16 `wide` outputs. */
INLINE void few_panel(int plain, int bits, int planes, int rows, int wide, const lm_packed *w, const lm_input *input, int64_t first,
                      int64_t last, int64_t row, int64_t output, const __mmask16 *mask, float *to, int64_t stride)
{
    const int width = input->group, unit_rows = UNIT_ROWS(bits), pieces = UNIT_PIECES(bits), steps = PIECE_STEPS(bits);
    const int64_t next = lm_word_stride(w);
    __m512 y[MOST_ROWS][WIDEST];
    load_y(rows, wide, to, stride, mask, y);
    for (int64_t g = first; g < last; g++) {
        const lm_group at = {w, input, g, g * width / w->group};
        const uint32_t *words = lm_words(w, g * width * bits / 32, output);
        const uint8_t *digits = (const uint8_t *)input->digits + (g * input->rows + row) * width * planes;
        sums_of_tile sum;
        prefetch_group(plain, bits, wide, &at, words, output);
        start_sums(plain, planes, rows, wide, &at, row, output, mask, sum);
        for (int k = 0; k < width; k += 4 * UNIT_STEPS(bits)) {
            UNROLL
            for (int u = 0; u < unit_rows; u++) /* in the order of memory */
                UNROLL
                for (int v = 0; v < wide; v++)
                    _mm_prefetch((const char *)(words + u * next + 16 * v) + AHEAD(bits), _MM_HINT_T0);
            UNROLL
            for (int piece = 0; piece < pieces; piece++) {
                __m512i step[WIDEST][2];
                UNROLL
                for (int v = 0; v < wide; v++)
                    unpack(bits, piece, words + 16 * v, next, mask[v], step[v]);
                UNROLL
                for (int s = 0; s < steps; s++, digits += 4 * planes)
                    UNROLL
                    for (int r = 0; r < rows; r++)
                        UNROLL
                        for (int p = 0; p < planes; p++) {
                            __m512i x = broadcast(digits + r * width * planes + p * 4);
                            UNROLL
                            for (int v = 0; v < wide; v++)
                                sum[r][v][p] = dot(sum[r][v][p], step[v][s], x);
                        }
            }
            words += UNIT_ROWS(bits) * next;
        }
        scale_sums(plain, planes, rows, wide, &at, row, output, mask, sum, y);
    }
    store_y(rows, wide, to, stride, mask, y);
}

/* The same for outputs begin..end-1. */
typedef void (*few_kernel)(const lm_packed *w, const lm_input *input, int64_t first, int64_t last, int64_t row, int64_t begin,
                           int64_t end, float *y, int64_t stride);

INLINE void few_columns(int plain, int bits, int planes, int rows, const lm_packed *w, const lm_input *input, int64_t first, int64_t last,
                        int64_t row, int64_t begin, int64_t end, float *y, int64_t stride)
{
    const __mmask16 full[WIDEST] = {FULL, FULL, FULL, FULL};
    int64_t o = begin;
    for (; o + 16 * FEW_WIDE(rows) <= end; o += 16 * FEW_WIDE(rows))
        few_panel(plain, bits, planes, rows, FEW_WIDE(rows), w, input, first, last, row, o, full, y + o - begin, stride);
    for (; o < end; o += 16) {
        const __mmask16 mask[1] = {end - o >= 16 ? FULL : (__mmask16)((1u << (end - o)) - 1)};
        few_panel(plain, bits, planes, rows, 1, w, input, first, last, row, o, mask, y + o - begin, stride);
    }
}

#define FEW(bits, planes, rows)                                                                                        \
    TARGET static void few_##bits##_##planes##_##rows(const lm_packed *w, const lm_input *input, int64_t first,         \
                                                      int64_t last, int64_t row, int64_t begin, int64_t end, float *y, \
                                                      int64_t stride)                                                  \
    {                                                                                                                  \
        if (is_plain(w))                                                                                               \
            few_columns(1, bits, planes, rows, w, input, first, last, row, begin, end, y, stride);                     \
        else                                                                                                           \
            few_columns(0, bits, planes, rows, w, input, first, last, row, begin, end, y, stride);                     \
    }
#define FEW_ROWS(bits, planes)                                                                                         \
    FEW(bits, planes, 1) FEW(bits, planes, 2) FEW(bits, planes, 3) FEW(bits, planes, 4)
#define FEW_PLANES(bits) FEW_ROWS(bits, 1) FEW_ROWS(bits, 2) FEW_ROWS(bits, 3)
FEW_PLANES(2) FEW_PLANES(3) FEW_PLANES(4) FEW_PLANES(8)

#define FEW_NAMES(bits, planes)                                                                                        \
    {few_##bits##_##planes##_1, few_##bits##_##planes##_2, few_##bits##_##planes##_3, few_##bits##_##planes##_4}
#define FEW_TABLE(bits) {FEW_NAMES(bits, 1), FEW_NAMES(bits, 2), FEW_NAMES(bits, 3)}

static void clear(const lm_input *input, int64_t columns, float *y, int64_t stride)
{
    for (int64_t r = 0; r < input->rows; r++)
        memset(y + r * stride, 0, (size_t)columns * sizeof(float));
}

/* The sum is finished by the bias, or by nothing. */
TARGET static void add_bias(const lm_packed *w, const lm_input *input, int64_t first, int64_t last, float *y, int64_t stride)
{
    if (!w->bias)
        return;
    for (int64_t o = first; o < last; o += 16) {
        const __mmask16 mask = last - o >= 16 ? FULL : (__mmask16)((1u << (last - o)) - 1);
        const __m512 bias = load_floats(w->bias, w->bias_type, o, mask);
        for (int64_t r = 0; r < input->rows; r++) {
            float *to = y + r * stride + o - first;
            _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), bias));
        }
    }
}

static void few(const lm_packed *w, const lm_input *input, int64_t first, int64_t last, float *y, int64_t stride)
{
    static const few_kernel kernels[4][3][4] = {FEW_TABLE(2), FEW_TABLE(3), FEW_TABLE(4), FEW_TABLE(8)};
    const few_kernel(*by_planes)[4] = kernels[w->bits == 8 ? 3 : w->bits - 2];
    clear(input, last - first, y, stride);
    /* Panels one after the other; GPTQ's rows group by group, all columns of each. One or two rows keep the sums of a
     * whole panel in registers; for more, its group's weights are taken again from the nearest cache. */
    const int64_t groups = w->in / input->group;
    const int64_t columns = w->panels ? LM_PANEL : last - first, at_once = w->panels && input->rows <= 2 ? groups : 1;
    for (int64_t o = first; o < last; o += columns) {
        const int64_t end = last - o < columns ? last : o + columns;
        for (int64_t g = 0; g < groups; g += at_once)
            for (int64_t r = 0; r < input->rows; r += 4) {
                int64_t rows = input->rows - r < 4 ? input->rows - r : 4;
                by_planes[input->planes - 1][rows - 1](w, input, g, g + at_once, r, o, end, y + r * stride + o - first,
                                                       stride);
            }
    }
    add_bias(w, input, first, last, y, stride);
}

/* ---- many rows: a group's weights unpacked once -------------------------------------------------------------- */

/* The group's weights for columns first..last-1 into [panel][step][16 WIDE outputs][4 inputs]; what lies beyond is 0. */
INLINE void unpack_group(int bits, const lm_group *at, int64_t first, int64_t last, uint8_t *scratch)
{
    const lm_packed *w = at->w;
    const int width = at->input->group, pieces = UNIT_PIECES(bits), steps = PIECE_STEPS(bits);
    for (int64_t o = first; o < last; o += 16) {
        const __mmask16 mask = last - o >= 16 ? FULL : (__mmask16)((1u << (last - o)) - 1);
        const uint32_t *words = lm_words(w, at->group * width * bits / 32, o);
        int64_t column = o - first;
        uint8_t *to = scratch + column / PANEL * PANEL * width + column % PANEL * 4;
        for (int k = 0; k < width; k += 4 * UNIT_STEPS(bits)) {
            UNROLL
            for (int piece = 0; piece < pieces; piece++) {
                __m512i step[2];
                unpack(bits, piece, words, lm_word_stride(w), mask, step);
                for (int s = 0; s < steps; s++, to += 4 * PANEL)
                    _mm512_store_si512((void *)to, step[s]);
            }
            words += UNIT_ROWS(bits) * lm_word_stride(w);
        }
    }
}

/* Tiles whose digits are asked for ahead: with many inputs they come from memory for every piece of columns. */
enum { TILES_AHEAD = 2 };

/* `ahead`: what a tile of other rows will read, a share of it. */
INLINE void many_tile(int plain, int planes, int rows, const lm_group *at, const uint8_t *weights, int64_t row, int64_t output,
                      const __mmask16 *mask, const uint8_t *ahead, float *to, int64_t stride)
{
    const int width = at->input->group;
    const uint8_t *digits = (const uint8_t *)at->input->digits + (at->group * at->input->rows + row) * width * planes;
    sums_of_tile sum;
    start_sums(plain, planes, rows, WIDE, at, row, output, mask, sum);
    for (int k = 0; k < width; k += 4) {
        if (k % 16 == 0) {
            _mm_prefetch((const char *)ahead, _MM_HINT_T0);
            ahead += 64;
        }
        __m512i w[WIDE];
        UNROLL
        for (int v = 0; v < WIDE; v++)
            w[v] = _mm512_load_si512((const void *)(weights + 64 * v));
        UNROLL
        for (int r = 0; r < rows; r++)
            UNROLL
            for (int p = 0; p < planes; p++) {
                __m512i x = broadcast(digits + r * width * planes + p * 4);
                UNROLL
                for (int v = 0; v < WIDE; v++)
                    sum[r][v][p] = dot(sum[r][v][p], w[v], x);
            }
        weights += 64 * WIDE;
        digits += 4 * planes;
    }
    __m512 y[MOST_ROWS][WIDEST];
    load_y(rows, WIDE, to, stride, mask, y);
    scale_sums(plain, planes, rows, WIDE, at, row, output, mask, sum, y);
    store_y(rows, WIDE, to, stride, mask, y);
}

/* Rows of a tile: as many as the registers hold sums of. */
#define TILE(planes) ((planes) == 1 ? 12 : (planes) == 2 ? 6 : 4)

typedef void (*many_kernel)(const lm_group *at, int64_t first, int64_t last, float *y, int64_t stride, uint8_t *scratch);

INLINE void many_columns(int plain, int bits, int planes, const lm_group *at, int64_t first, int64_t last, float *y, int64_t stride,
                         uint8_t *scratch)
{
    const int64_t rows = at->input->rows;
    unpack_group(bits, at, first, last, scratch);
    int64_t tile = TILE(planes);
    for (int64_t r = 0; r < rows; r += tile) {
        tile = rows - r >= TILE(planes) ? TILE(planes) : rows - r >= 2 ? 2 : 1;
        for (int64_t o = first; o < last; o += PANEL) {
            int64_t left = last - o;
            const __mmask16 mask[WIDE] = {left >= 16 ? FULL : (__mmask16)((1u << left) - 1),
                                          left >= 32   ? FULL
                                          : left <= 16 ? 0
                                                       : (__mmask16)((1u << (left - 16)) - 1)};
            const uint8_t *weights = scratch + (o - first) * at->input->group;
            /* Each panel asks for its share, in the order of memory: what lies behind the last row is the next group. */
            const int64_t bytes = tile * at->input->group * planes, panels = LM_MANY_COLUMNS / PANEL;
            const uint8_t *ahead = (const uint8_t *)at->input->digits +
                                   (at->group * rows + r) * at->input->group * planes + TILES_AHEAD * bytes +
                                   (o - first) / PANEL * (bytes / panels);
            float *to = y + r * stride + o - first;
            if (tile == TILE(planes))
                many_tile(plain, planes, TILE(planes), at, weights, r, o, mask, ahead, to, stride);
            else if (tile == 2)
                many_tile(plain, planes, 2, at, weights, r, o, mask, ahead, to, stride);
            else
                many_tile(plain, planes, 1, at, weights, r, o, mask, ahead, to, stride);
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
#define MANY_TABLE(bits) {many_##bits##_1, many_##bits##_2, many_##bits##_3}

static void many(const lm_packed *w, const lm_input *input, int64_t first, int64_t last, float *y, int64_t stride,
                 void *scratch)
{
    static const many_kernel kernels[4][3] = {MANY_TABLE(2), MANY_TABLE(3), MANY_TABLE(4), MANY_TABLE(8)};
    const many_kernel kernel = kernels[w->bits == 8 ? 3 : w->bits - 2][input->planes - 1];
    clear(input, last - first, y, stride);
    for (int64_t g = 0; g < w->in / input->group; g++) {
        const lm_group at = {w, input, g, g * input->group / w->group};
        kernel(&at, first, last, y, stride, scratch);
    }
    add_bias(w, input, first, last, y, stride);
}

const lm_isa lm_avx512 = {"AVX-512 VNNI", lm_digit_bytes_avx512, lm_quantize_avx512, few, many, lm_dense_avx512};

#endif
