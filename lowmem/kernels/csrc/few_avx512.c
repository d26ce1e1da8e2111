/* The packed kernels with AVX-512 for a few rows: weights are multiplied as they stream by. */
#if defined(__x86_64__)
#include "sums_avx512.h"

/* ---- a row or two: sums of each plane, and y, in registers ---------------------------------------------------- */

INLINE __m512 as_float(int planes, const __m512i sum[3])
{
    if (planes == 1)
        return _mm512_cvtepi32_ps(sum[0]);
    __m512 low = _mm512_cvtepi32_ps(_mm512_add_epi32(sum[0], _mm512_slli_epi32(sum[1], 8)));
    return planes != 3 ? low : _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[2]), _mm512_set1_ps(65536), low);
}

/* Vectors of 16 outputs that are worked on at a time: as many as there are registers for, or the sums would wait for each
 * other. */
enum { MOST_ROWS = 4, WIDE = 2, WIDEST = 4 };
#define WIDTH(rows, planes) ((rows) <= 2 || (planes) != 3 ? WIDEST : WIDE)

typedef __m512i sums_of_tile[MOST_ROWS][WIDEST][3]; /* the used ones live in registers */

INLINE void start_sums(int plain, int planes, int rows, int wide, const lm_group *at, int64_t row, int64_t output, const __mmask16 *mask,
                       sums_of_tile sum)
{
    const int32_t *sums = at->input->sums + 3 * (at->group * at->input->rows + row);
    const int count = LM_SUMS(planes);
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int v = 0; v < wide; v++)
            UNROLL
            for (int p = 0; p < count; p++)
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
    const int width = input->group, unit_rows = UNIT_ROWS(bits), pieces = UNIT_PIECES(bits), steps = PIECE_STEPS(bits), fours = STEP_DIGITS(steps, planes);
    const int64_t next = lm_word_stride(w), row_bytes = DIGIT_BYTES(width, planes);
    __m512 y[MOST_ROWS][WIDEST];
    load_y(rows, wide, to, stride, mask, y);
    for (int64_t g = first; g < last; g++) {
        const lm_group at = {w, input, g, g * width / w->group};
        const uint32_t *words = lm_words(w, g * width * bits / 32, output);
        const uint8_t *digits = (const uint8_t *)input->digits + (g * input->rows + row) * row_bytes;
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
                __m512i step[WIDEST][3];
                UNROLL
                for (int v = 0; v < wide; v++)
                    unpack(bits, piece, words + 16 * v, next, mask[v], step[v]);
                if (planes == LM_PAIRED) {
                    UNROLL
                    for (int v = 0; v < wide; v++)
                        step[v][2] = pairs_of(bits, words + 16 * v, mask[v], step[v]);
                }
                UNROLL
                for (int d = 0; d < fours; d++, digits += 4) {
                    const int s = planes == LM_PAIRED ? d : d / planes, p = planes == LM_PAIRED ? d < 2 : d % planes;
                    UNROLL
                    for (int r = 0; r < rows; r++) {
                        __m512i x = broadcast(digits + r * row_bytes);
                        UNROLL
                        for (int v = 0; v < wide; v++)
                            sum[r][v][p] = dot(sum[r][v][p], step[v][s], x);
                    }
                }
            }
            words += UNIT_ROWS(bits) * next;
        }
        scale_sums(plain, planes, rows, wide, &at, row, output, mask, sum, y);
    }
    store_y(rows, wide, to, stride, mask, y);
}

/* ---- three and four rows: planes one after the other into the same sums, so that these are of more columns -------- */

/* Add the products of a group's weights and one plane of its digits: `fours` of each row's digits for a piece, `gap` bytes
 * apart, then on by `next` to those of the next piece. pairs: they are what pairs share. first: the plane that asks for memory
 * ahead. */
INLINE void add_plane(int bits, int pairs, int first, int rows, int wide, int width, const uint32_t *words, int64_t stride,
                      const __mmask16 *mask, const uint8_t *digits, int64_t row_bytes, int gap, int next, __m512i *sum)
{
    const int pieces = UNIT_PIECES(bits), unit_rows = UNIT_ROWS(bits), fours = pairs ? 1 : PIECE_STEPS(bits);
    for (int k = 0; k < width; k += 4 * UNIT_STEPS(bits)) {
        if (first) {
            UNROLL
            for (int u = 0; u < unit_rows; u++)
                UNROLL
                for (int v = 0; v < wide; v++)
                    _mm_prefetch((const char *)(words + u * stride + 16 * v) + AHEAD(bits), _MM_HINT_T0);
        }
        UNROLL
        for (int piece = 0; piece < pieces; piece++) {
            __m512i step[WIDEST][2];
            UNROLL
            for (int v = 0; v < wide; v++) {
                if (!pairs || bits != 4)
                    unpack(bits, piece, words + 16 * v, stride, mask[v], step[v]);
                if (pairs)
                    step[v][0] = pairs_of(bits, words + 16 * v, mask[v], step[v]);
            }
            UNROLL
            for (int s = 0; s < fours; s++)
                UNROLL
                for (int r = 0; r < rows; r++) {
                    __m512i x = broadcast(digits + r * row_bytes + gap * s);
                    UNROLL
                    for (int v = 0; v < wide; v++)
                        sum[r * wide + v] = dot(sum[r * wide + v], step[v][s], x);
                }
            digits += next;
        }
        words += unit_rows * stride;
    }
}

/* As few_panel, for one or two planes; y stays in memory. */
INLINE void some_panel(int plain, int bits, int planes, int rows, int wide, const lm_packed *w, const lm_input *input, int64_t first,
                       int64_t last, int64_t row, int64_t output, const __mmask16 *mask, float *to, int64_t stride)
{
    const int width = input->group, steps = PIECE_STEPS(bits), is_paired = planes == LM_PAIRED;
    const int gap = is_paired ? 4 : 4 * planes, piece = 4 * STEP_DIGITS(steps, planes);
    const int64_t next = lm_word_stride(w), row_bytes = DIGIT_BYTES(width, planes);
    for (int64_t g = first; g < last; g++) {
        const lm_group at = {w, input, g, g * width / w->group};
        const uint32_t *words = lm_words(w, g * width * bits / 32, output);
        const uint8_t *digits = (const uint8_t *)input->digits + (g * input->rows + row) * row_bytes;
        __m512i sum[MOST_ROWS * WIDEST];
        prefetch_group(plain, bits, wide, &at, words, output);
        clear_sums(rows, wide, sum);
        if (planes != 1) {
            add_zeros(plain, 1, rows, wide, &at, row, output, mask, sum);
            add_plane(bits, 0, 1, rows, wide, width, words, next, mask, digits + (is_paired ? 0 : 4), row_bytes, gap, piece, sum);
            raise_sums(rows, wide, sum);
        }
        add_zeros(plain, 0, rows, wide, &at, row, output, mask, sum);
        add_plane(bits, is_paired, planes == 1, rows, wide, width, words, next, mask, digits + (is_paired ? 8 : 0), row_bytes, gap,
                  piece, sum);
        add_scaled(plain, rows, wide, &at, row, output, mask, sum, NULL, to, stride);
    }
}

/* ---- columns and rows --------------------------------------------------------------------------------------------- */

/* The same for outputs begin..end-1. */
typedef void (*few_kernel)(const lm_packed *w, const lm_input *input, int64_t first, int64_t last, int64_t row, int64_t begin,
                           int64_t end, float *y, int64_t stride);

INLINE void few_columns(int plain, int bits, int planes, int rows, const lm_packed *w, const lm_input *input, int64_t first, int64_t last,
                        int64_t row, int64_t begin, int64_t end, float *y, int64_t stride)
{
    const __mmask16 full[WIDEST] = {FULL, FULL, FULL, FULL};
    const int wide = WIDTH(rows, planes);
    int64_t o = begin;
    for (; o + 16 * wide <= end; o += 16 * wide)
        if (rows <= 2 || planes == 3)
            few_panel(plain, bits, planes, rows, wide, w, input, first, last, row, o, full, y + o - begin, stride);
        else
            some_panel(plain, bits, planes, rows, wide, w, input, first, last, row, o, full, y + o - begin, stride);
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
FEW_ROWS(2, LM_PAIRED) FEW_ROWS(3, LM_PAIRED) FEW_ROWS(4, LM_PAIRED)

#define FEW_NAMES(bits, planes)                                                                                        \
    {few_##bits##_##planes##_1, few_##bits##_##planes##_2, few_##bits##_##planes##_3, few_##bits##_##planes##_4}
#define FEW_TABLE(bits) {FEW_NAMES(bits, 1), FEW_NAMES(bits, 2), FEW_NAMES(bits, 3), FEW_NAMES(bits, LM_PAIRED)}
#define FEW_TABLE_8 {FEW_NAMES(8, 1), FEW_NAMES(8, 2), FEW_NAMES(8, 3)}

void lm_few_avx512(const lm_packed *w, const lm_input *input, int64_t first, int64_t last, float *y, int64_t stride)
{
    static const few_kernel kernels[4][4][4] = {FEW_TABLE(2), FEW_TABLE(3), FEW_TABLE(4), FEW_TABLE_8};
    const few_kernel(*by_planes)[4] = kernels[w->bits == 8 ? 3 : w->bits - 2];
    clear(input, last - first, y, stride);
    /* Panels one after the other; GPTQ's rows group by group, all columns of each. Up to four rows are a panel's at once; for
     * more, its group's weights are taken again from the nearest cache. */
    const int64_t groups = w->in / input->group;
    const int64_t columns = w->panels ? LM_PANEL : last - first, at_once = w->panels && input->rows <= MOST_ROWS ? groups : 1;
    for (int64_t o = first; o < last; o += columns) {
        const int64_t end = last - o < columns ? last : o + columns;
        for (int64_t g = 0; g < groups; g += at_once)
            for (int64_t r = 0; r < input->rows; r += MOST_ROWS) {
                const int64_t rows = input->rows - r < MOST_ROWS ? input->rows - r : MOST_ROWS;
                by_planes[input->planes - 1][rows - 1](w, input, g, g + at_once, r, o, end, y + r * stride + o - first,
                                                       stride);
            }
    }
    add_bias(w, input, first, last, y, stride);
}

#endif
