/* The packed kernels with AVX2: products of 16-bit pairs (vpmaddwd), weights and digits alike.
 *
 * A word of GPTQ's holds in each of its 16-bit halves as many fields, so one shift and one mask give a pair of inputs of
 * eight outputs: inputs j and j + n/2 of n = 4 (8 bits), 8 (4 and 3 bits) or 16 (2 bits) consecutive ones.
 *
 * Digits lie in pairs likewise (digits_avx2.c).
 */
#if defined(__x86_64__)
#include <string.h>

#include "avx2.h"

enum { WIDE = 2, PANEL = 8 * WIDE }; /* vectors, and outputs, that are worked on at a time */
enum { WIDEST = 256 };               /* inputs of a group, at most */

/* Outputs by which words are asked for ahead of their use: as many streams as a group has rows of words are too many for
 * a CPU to follow by itself. With 8 bits they are also too many for the lines that share a place in the first cache, since
 * rows lie a power of two apart or nearly so: the second cache takes them, from further ahead. */
#define AHEAD(bits) ((bits) == 8 ? 256 : 96)
enum { PANELS_AHEAD = 1024 };
#define ASK(bits, words)                                                                                               \
    ((bits) == 8 ? _mm_prefetch((const char *)(words), _MM_HINT_T1) : _mm_prefetch((const char *)(words), _MM_HINT_T0))

/* ---- weights ------------------------------------------------------------------------------------------------- */

/* Rows of words that come apart together, the sources that they give, the pairs of a source, and the bits between. */
#define UNIT_ROWS(bits) ((bits) == 3 ? 3 : 1)
#define UNIT_SOURCES(bits) ((bits) == 3 ? 4 : 1)
#define SOURCE_PAIRS(bits) ((bits) == 8 ? 2 : (bits) == 2 ? 8 : 4)
#define UNIT_PAIRS(bits) (UNIT_SOURCES(bits) * SOURCE_PAIRS(bits))

INLINE __m256i load_words(const uint32_t *words) { return _mm256_loadu_si256((const void *)words); }

/* Eight outputs: in both halves of each word the fields of some inputs, from the lowest bit up. */
INLINE __m256i source(int bits, int index, const uint32_t *words, int64_t stride)
{
    if (bits != 3)
        return load_words(words);
    /* 96 bits are four pieces of eight fields: the upper four of a piece go 4 bits up, into the upper half. */
    __m256i low, high;
    if (index == 0) {
        low = load_words(words);
        high = _mm256_slli_epi32(low, 4);
    } else if (index == 1) {
        __m256i next = load_words(words + stride);
        low = _mm256_or_si256(_mm256_srli_epi32(load_words(words), 24), _mm256_slli_epi32(next, 8));
        high = _mm256_slli_epi32(next, 12);
    } else if (index == 2) {
        __m256i word = load_words(words + stride);
        low = _mm256_srli_epi32(word, 16);
        high = _mm256_or_si256(_mm256_srli_epi32(word, 12), _mm256_slli_epi32(load_words(words + 2 * stride), 20));
    } else {
        __m256i word = load_words(words + 2 * stride);
        low = _mm256_srli_epi32(word, 8);
        high = _mm256_srli_epi32(word, 4);
    }
    return _mm256_blend_epi16(low, high, 0xaa);
}

/* Pair `index` of a source, as two integers of 16 bits for each output. */
INLINE __m256i pair_of(int bits, int index, __m256i source)
{
    __m256i pair = index ? _mm256_srli_epi16(source, index * bits) : source;
    if (bits != 3 && index == SOURCE_PAIRS(bits) - 1) /* the half's highest bits: nothing is above them */
        return pair;
    return _mm256_and_si256(pair, _mm256_set1_epi16((short)((1 << bits) - 1)));
}

INLINE __m256i broadcast(const int16_t *pair)
{
    int32_t both;
    memcpy(&both, pair, 4);
    return _mm256_set1_epi32(both);
}

/* 16 outputs of one group of inputs, wherever they lie. */
typedef struct {
    const uint32_t *words;
    const void *scales;
    const uint8_t *zeros; /* or NULL: all are 2^(bits-1) */
    float *y;
    int64_t word_stride, y_stride;
    int64_t ahead; /* words from these to those that are wanted soon; they may lie outside of the tensor */
    int scales_type;
} panel;

/* Where fewer than 16 outputs are left, they are worked on here, so that nothing past the end is touched. */
typedef struct {
    uint32_t words[WIDEST * 8 / 32 * PANEL];
    float scales[PANEL], y[6 * PANEL];
    uint8_t zeros[PANEL];
} rest;

/* A group of inputs for some rows; scale_row is the row of the weight's scales that it belongs to. */
typedef struct {
    const lm_packed *w;
    const lm_input *input;
    int64_t group, scale_row;
} lm_group;

static const int16_t *digits_of(const lm_group *at, int64_t row)
{
    return (const int16_t *)at->input->digits +
           (at->group * at->input->rows + row) * at->input->group * PARTS(at->input->planes);
}

static panel panel_of(const lm_group *at, int64_t output, float *y, int64_t y_stride)
{
    const lm_packed *w = at->w;
    const int64_t scale = lm_group_at(w, at->scale_row, output);
    return (panel){lm_words(w, at->group * at->input->group * w->bits / 32, output),
                   (const char *)w->scales + scale * (w->scales_type == LM_F32 ? 4 : 2),
                   w->zeros ? w->zeros + scale : NULL,
                   y,
                   lm_word_stride(w),
                   y_stride,
                   0,
                   w->scales_type};
}

/* The same with `count` outputs and with `rows` rows of y, moved to where there is room for 16. */
static panel rest_of(const lm_packed *w, panel p, int64_t count, int rows, rest *room)
{
    memset(room->scales, 0, sizeof room->scales + sizeof room->y);
    memset(room->zeros, 0, sizeof room->zeros);
    for (int64_t o = 0; o < count; o++)
        room->scales[o] = lm_load(p.scales, p.scales_type, o);
    if (w->zeros)
        memcpy(room->zeros, p.zeros, (size_t)count);
    for (int r = 0; r < rows; r++)
        memcpy(room->y + r * PANEL, p.y + r * p.y_stride, (size_t)count * sizeof(float));
    return (panel){p.words, room->scales, w->zeros ? room->zeros : NULL, room->y, p.word_stride, PANEL, 0, LM_F32};
}

static void rest_words(const lm_group *at, panel *p, int64_t count, rest *room)
{
    memset(room->words, 0, sizeof room->words);
    for (int64_t i = 0; i < (int64_t)at->input->group * at->w->bits / 32; i++)
        memcpy(room->words + i * PANEL, p->words + i * p->word_stride, (size_t)count * 4);
    p->words = room->words;
    p->word_stride = PANEL;
}

static void put_back(panel p, int64_t count, int rows, const rest *room)
{
    for (int r = 0; r < rows; r++)
        memcpy(p.y + r * p.y_stride, room->y + r * PANEL, (size_t)count * sizeof(float));
}

/* y = fmaf(c, scale * weight_scale, y) for the rows of a tile. */
INLINE void add_group(int planes, int rows, const float *scales, const panel *p, __m256i sum[6][WIDE])
{
    UNROLL
    for (int v = 0; v < WIDE; v++) {
        __m256 weight_scale = load_8(p->scales, p->scales_type, 8 * v);
        UNROLL
        for (int r = 0; r < rows; r++) {
            float *y = p->y + r * p->y_stride + 8 * v;
            __m256 c;
            if (planes == 3) {
                __m256i low = _mm256_add_epi32(sum[3 * r][v], _mm256_slli_epi32(sum[3 * r + 1][v], 8));
                c = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[3 * r + 2][v]), _mm256_set1_ps(65536), _mm256_cvtepi32_ps(low));
            } else {
                c = _mm256_cvtepi32_ps(sum[r][v]);
            }
            __m256 scale = _mm256_mul_ps(_mm256_set1_ps(scales[r]), weight_scale);
            _mm256_storeu_ps(y, _mm256_fmadd_ps(c, scale, _mm256_loadu_ps(y)));
        }
    }
}

static void clear(const lm_input *input, int64_t columns, float *y, int64_t stride)
{
    for (int64_t r = 0; r < input->rows; r++)
        memset(y + r * stride, 0, (size_t)columns * sizeof(float));
}

/* The sum is finished by the bias, or by nothing. */
TARGET static void add_bias(const void *bias, int type, int64_t rows, int64_t first, int64_t last, float *y, int64_t stride)
{
    if (!bias)
        return;
    for (int64_t r = 0; r < rows; r++, y += stride) {
        int64_t o = first;
        for (; o + 8 <= last; o += 8)
            _mm256_storeu_ps(y + o - first, _mm256_add_ps(_mm256_loadu_ps(y + o - first), load_8(bias, type, o)));
        for (; o < last; o++)
            y[o - first] += lm_load(bias, type, o);
    }
}

/* ---- a few rows: weights as they stream by ------------------------------------------------------------------- */

/* What a group's sums begin with: -zero times the sum of the digits. */
INLINE __m256i begin(int bits, const uint8_t *zeros, uint32_t sum)
{
    if (!zeros)
        return _mm256_set1_epi32((int32_t)(0u - (sum << (bits - 1))));
    return _mm256_mullo_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)zeros)), _mm256_set1_epi32((int32_t)(0u - sum)));
}

INLINE void few_panel(int bits, int planes, int rows, const lm_group *at, int64_t row, const panel *p)
{
    const int width = at->input->group, parts = PARTS(planes), sources = UNIT_SOURCES(bits), pairs = SOURCE_PAIRS(bits);
    const int64_t index = at->group * at->input->rows + row;
    const int32_t *sums = at->input->sums + 3 * index;
    const int16_t *digits = digits_of(at, row);
    const uint32_t *words = p->words;
    __m256i sum[6][WIDE];
    UNROLL
    for (int r = 0; r < rows * parts; r++)
        UNROLL
        for (int v = 0; v < WIDE; v++) {
            const int32_t *s = sums + (planes == 3 ? r : 3 * r);
            uint32_t total = planes == 2 ? (uint32_t)s[0] + ((uint32_t)s[1] << 8) : (uint32_t)s[0];
            sum[r][v] = begin(bits, p->zeros ? p->zeros + 8 * v : NULL, total);
        }
    for (int k = 0; k < width; k += 2 * UNIT_PAIRS(bits)) {
        for (int i = 0; i < UNIT_ROWS(bits); i++)
            ASK(bits, (uintptr_t)(words + i * p->word_stride) + (uintptr_t)p->ahead * 4);
        UNROLL
        for (int i = 0; i < sources; i++) {
            __m256i from[WIDE];
            UNROLL
            for (int v = 0; v < WIDE; v++)
                from[v] = source(bits, i, words + 8 * v, p->word_stride);
            UNROLL
            for (int s = 0; s < pairs; s++) {
                __m256i pair[WIDE];
                UNROLL
                for (int v = 0; v < WIDE; v++)
                    pair[v] = pair_of(bits, s, from[v]);
                UNROLL
                for (int r = 0; r < rows * parts; r++) {
                    __m256i x = broadcast(digits + r * width + 2 * (i * pairs + s));
                    UNROLL
                    for (int v = 0; v < WIDE; v++) {
                        sum[r][v] = _mm256_add_epi32(sum[r][v], _mm256_madd_epi16(pair[v], x));
                        if (rows * parts > 1)
                            HOLD(sum[r][v]);
                    }
                }
            }
        }
        digits += 2 * UNIT_PAIRS(bits);
        words += UNIT_ROWS(bits) * p->word_stride;
    }
    add_group(planes, rows, at->input->scales + index, p, sum);
}

typedef void (*few_kernel)(const lm_group *at, int64_t row, int64_t first, int64_t last, float *y, int64_t stride);

INLINE void few_columns(int bits, int planes, int rows, const lm_group *at, int64_t row, int64_t first, int64_t last, float *y,
                        int64_t stride)
{
    /* From the end of these outputs on to the next group's beginning; in panels all follows in its order. */
    const int64_t next = (int64_t)at->input->group * bits / 32 * at->w->out - (last - first);
    for (int64_t o = first; o < last; o += PANEL) {
        panel where = panel_of(at, o, y + o - first, stride);
        where.ahead = at->w->panels ? PANELS_AHEAD : o + AHEAD(bits) < last ? AHEAD(bits) : AHEAD(bits) + next;
        if (last - o >= PANEL) {
            few_panel(bits, planes, rows, at, row, &where);
        } else {
            rest room;
            panel there = rest_of(at->w, where, last - o, rows, &room);
            rest_words(at, &there, last - o, &room);
            few_panel(bits, planes, rows, at, row, &there);
            put_back(where, last - o, rows, &room);
        }
    }
}

/* Rows of a tile: as many as the registers hold sums of. */
#define FEW_TILE(planes) ((planes) == 3 ? 2 : 4)

#define FEW(bits, planes, rows)                                                                                        \
    TARGET static void few_##bits##_##planes##_##rows(const lm_group *at, int64_t row, int64_t first, int64_t last,    \
                                                      float *y, int64_t stride)                                        \
    {                                                                                                                  \
        few_columns(bits, planes, rows, at, row, first, last, y, stride);                                              \
    }
#define FEW_ROWS(bits, planes) FEW(bits, planes, 1) FEW(bits, planes, 2) FEW(bits, planes, 3) FEW(bits, planes, 4)
#define FEW_PLANES(bits) FEW_ROWS(bits, 1) FEW_ROWS(bits, 2) FEW(bits, 3, 1) FEW(bits, 3, 2)
FEW_PLANES(2) FEW_PLANES(3) FEW_PLANES(4) FEW_PLANES(8)

#define FEW_NAMES(bits, planes)                                                                                        \
    {few_##bits##_##planes##_1, few_##bits##_##planes##_2, few_##bits##_##planes##_3, few_##bits##_##planes##_4}
#define FEW_TABLE(bits) {FEW_NAMES(bits, 1), FEW_NAMES(bits, 2), {few_##bits##_3_1, few_##bits##_3_2}}

static void few(const lm_packed *w, const lm_input *input, int64_t first, int64_t last, float *y, int64_t stride)
{
    static const few_kernel kernels[4][3][4] = {FEW_TABLE(2), FEW_TABLE(3), FEW_TABLE(4), FEW_TABLE(8)};
    const few_kernel *by_rows = kernels[w->bits == 8 ? 3 : w->bits - 2][input->planes == LM_PAIRED ? 1 : input->planes - 1];
    const int64_t tile = FEW_TILE(input->planes), groups = w->in / input->group;
    /* Panels one after the other; GPTQ's rows group by group. Several tiles read the same words: the second finds them
     * in the cache. */
    const int64_t step = w->panels ? LM_PANEL : input->rows <= tile ? last - first : 256;
    const int64_t pieces = (last - first + step - 1) / step;
    clear(input, last - first, y, stride);
    for (int64_t i = 0; i < groups * pieces; i++) {
        const int64_t g = w->panels ? i % groups : i / pieces, o = first + (w->panels ? i / groups : i % pieces) * step;
        const lm_group at = {w, input, g, g * input->group / w->group};
        for (int64_t r = 0; r < input->rows; r += tile) {
            const int64_t rows = input->rows - r < tile ? input->rows - r : tile;
            by_rows[rows - 1](&at, r, o, last - o < step ? last : o + step, y + r * stride + o - first, stride);
        }
    }
    add_bias(w->bias, w->bias_type, input->rows, first, last, y, stride);
}

/* ---- many rows: a group's weights unpacked once -------------------------------------------------------------- */

/* w - zero of 16 outputs and a group's inputs, as [pair][16 outputs][2 inputs]. */
INLINE void unpack_panel(int bits, int width, const panel *p, int16_t *to)
{
    const int sources = UNIT_SOURCES(bits), pairs = SOURCE_PAIRS(bits);
    __m256i zero[WIDE];
    for (int v = 0; v < WIDE; v++) {
        zero[v] = _mm256_set1_epi16((short)(1 << (bits - 1)));
        if (p->zeros) {
            __m256i z = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)(p->zeros + 8 * v)));
            zero[v] = _mm256_or_si256(z, _mm256_slli_epi32(z, 16));
        }
    }
    const uint32_t *words = p->words;
    for (int k = 0; k < width; k += 2 * UNIT_PAIRS(bits)) {
        UNROLL
        for (int i = 0; i < sources; i++) {
            __m256i from[WIDE];
            UNROLL
            for (int v = 0; v < WIDE; v++)
                from[v] = source(bits, i, words + 8 * v, p->word_stride);
            UNROLL
            for (int s = 0; s < pairs; s++) {
                UNROLL
                for (int v = 0; v < WIDE; v++)
                    _mm256_storeu_si256((void *)(to + 2 * PANEL * (i * pairs + s) + 16 * v),
                                        _mm256_sub_epi16(pair_of(bits, s, from[v]), zero[v]));
            }
        }
        to += 2 * PANEL * UNIT_PAIRS(bits);
        words += UNIT_ROWS(bits) * p->word_stride;
    }
}

#define UNPACK(bits)                                                                                                   \
    TARGET static void unpack_##bits(int width, const panel *p, int16_t *to) { unpack_panel(bits, width, p, to); }
UNPACK(2) UNPACK(3) UNPACK(4) UNPACK(8)

INLINE void many_tile(int planes, int rows, const lm_group *at, int64_t row, const int16_t *weights, const panel *p)
{
    const int width = at->input->group, parts = PARTS(planes);
    const int16_t *digits = digits_of(at, row);
    __m256i sum[6][WIDE];
    UNROLL
    for (int r = 0; r < rows * parts; r++)
        UNROLL
        for (int v = 0; v < WIDE; v++)
            sum[r][v] = _mm256_setzero_si256();
    for (int k = 0; k < width; k += 2, digits += 2, weights += 2 * PANEL) {
        __m256i w[WIDE];
        UNROLL
        for (int v = 0; v < WIDE; v++)
            w[v] = _mm256_loadu_si256((const void *)(weights + 16 * v));
        UNROLL
        for (int r = 0; r < rows * parts; r++) {
            __m256i x = broadcast(digits + r * width);
            UNROLL
            for (int v = 0; v < WIDE; v++) {
                sum[r][v] = _mm256_add_epi32(sum[r][v], _mm256_madd_epi16(w[v], x));
                HOLD(sum[r][v]);
            }
        }
    }
    add_group(planes, rows, at->input->scales + at->group * at->input->rows + row, p, sum);
}

#define MANY_TILE(planes) ((planes) == 3 ? 2 : 6)

#define MANY(planes, rows)                                                                                             \
    TARGET static void many_##planes##_##rows(const lm_group *at, int64_t row, const int16_t *weights, const panel *p) \
    {                                                                                                                  \
        many_tile(planes, rows, at, row, weights, p);                                                                  \
    }
MANY(1, 1) MANY(1, 2) MANY(1, 6) MANY(3, 1) MANY(3, 2)

typedef void (*many_kernel)(const lm_group *at, int64_t row, const int16_t *weights, const panel *p);

/* A group's weights for columns first..last-1, at most as many as fit the scratch, times all rows. */
static void many_columns(const lm_group *at, int64_t first, int64_t last, float *y, int64_t stride, int16_t *scratch)
{
    const lm_packed *w = at->w;
    const int64_t rows = at->input->rows, width = at->input->group;
    const int planes = at->input->planes, most = MANY_TILE(planes);
    rest room;
    for (int64_t o = first; o < last; o += PANEL) {
        panel p = panel_of(at, o, NULL, 0);
        if (last - o < PANEL) {
            p = rest_of(w, p, last - o, 0, &room);
            rest_words(at, &p, last - o, &room);
        }
        (w->bits == 8   ? unpack_8
         : w->bits == 4 ? unpack_4
         : w->bits == 3 ? unpack_3
                        : unpack_2)((int)width, &p, scratch + (o - first) * width);
    }
    for (int64_t r = 0, tile; r < rows; r += tile) {
        tile = rows - r >= most ? most : rows - r >= 2 ? 2 : 1;
        const many_kernel kernel = planes == 3 ? (tile == 2 ? many_3_2 : many_3_1)
                                   : tile == 6 ? many_1_6
                                   : tile == 2 ? many_1_2
                                               : many_1_1;
        for (int64_t o = first; o < last; o += PANEL) {
            const panel where = panel_of(at, o, y + r * stride + o - first, stride);
            const int16_t *weights = scratch + (o - first) * width;
            if (last - o >= PANEL) {
                kernel(at, r, weights, &where);
            } else {
                const panel there = rest_of(w, where, last - o, (int)tile, &room);
                kernel(at, r, weights, &there);
                put_back(where, last - o, (int)tile, &room);
            }
        }
    }
}

static void many(const lm_packed *w, const lm_input *input, int64_t first, int64_t last, float *y, int64_t stride,
                 void *scratch)
{
    const int64_t fitting = LM_SCRATCH_BYTES / (2 * input->group) / PANEL * PANEL;
    const int64_t step = fitting < LM_MANY_COLUMNS ? fitting : LM_MANY_COLUMNS;
    clear(input, last - first, y, stride);
    for (int64_t o = first; o < last; o += step)
        for (int64_t g = 0; g < w->in / input->group; g++) {
            const lm_group at = {w, input, g, g * input->group / w->group};
            many_columns(&at, o, last - o < step ? last : o + step, y + o - first, stride, scratch);
        }
    add_bias(w->bias, w->bias_type, input->rows, first, last, y, stride);
}

const lm_isa lm_avx2 = {"AVX2", lm_digit_bytes_avx2, lm_quantize_avx2, few, many, lm_dense_avx2};

#endif
