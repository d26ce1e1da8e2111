/* Packed linears with AVX2: products of pairs of 16-bit integers (vpmaddwd), weights and digits alike. */
#if defined(__x86_64__)
#include "avx2_weights.h"

/* What a kernel is compiled for. All calls pass constants, and all functions that take it are inlined. */
typedef struct {
    int bits, planes;
    int rows; /* of a tile */
} shape;

typedef __m256i sums_of_tile[6][WIDE];

/* Add the products of a tile's rows with one pair of inputs. Row r of part i has its digits `width` after the last one. */
INLINE void add_pair(int rows, int hold, const __m256i w[WIDE], const int16_t *digits, int width, sums_of_tile sum)
{
    UNROLL
    for (int r = 0; r < rows; r++) {
        __m256i x = broadcast(digits + r * width);
        UNROLL
        for (int v = 0; v < WIDE; v++) {
            sum[r][v] = _mm256_add_epi32(sum[r][v], _mm256_madd_epi16(w[v], x));
            if (hold)
                HOLD(sum[r][v]);
        }
    }
}

/* y = fmaf(c, scale * weight_scale, y) for the rows of a tile. */
INLINE void add_group(shape s, const float *scales, const block *b, sums_of_tile sum)
{
    UNROLL
    for (int v = 0; v < WIDE; v++) {
        __m256 weight_scale = load_8(b->scales, b->scales_type, 8 * v);
        UNROLL
        for (int r = 0; r < s.rows; r++) {
            float *y = b->y + r * b->y_stride + 8 * v;
            __m256 c;
            if (s.planes == 3) {
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

/* ---- decode: weights as they stream by ----------------------------------------------------------------------- */

/* Prefetch distances in outputs. A group has as many streams of words as rows of words: too many for the hardware's
 * prefetcher. With 8 bits they also exceed the ways of the first cache, since rows lie about a power of two apart: the
 * second cache takes them, from further ahead. In the tiled layout there is one stream. */
#define AHEAD(bits) ((bits) == 8 ? 256 : 96)
enum { TILED_AHEAD = 1024 };
#define PREFETCH(bits, words)                                                                                          \
    ((bits) == 8 ? _mm_prefetch((const char *)(words), _MM_HINT_T1) : _mm_prefetch((const char *)(words), _MM_HINT_T0))

/* The initial value of a sum: -zero times the sum of the digits. */
INLINE __m256i minus_zeros(int bits, const uint8_t *zeros, uint32_t sum)
{
    if (!zeros)
        return _mm256_set1_epi32((int32_t)(0u - (sum << (bits - 1))));
    return _mm256_mullo_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)zeros)), _mm256_set1_epi32((int32_t)(0u - sum)));
}

INLINE void decode_block(shape s, const lm_group *at, int64_t row, const block *b)
{
    const int width = at->input->group, parts = PARTS(s.planes);
    const int sources = UNIT_SOURCES(s.bits), pairs = SOURCE_PAIRS(s.bits); /* UNROLL takes only plain conditions */
    const int64_t index = at->group * at->input->rows + row;
    const int32_t *sums = at->input->sums + 3 * index;
    const int16_t *digits = digits_of(at, row);
    const uint32_t *words = b->words;
    sums_of_tile sum;
    UNROLL
    for (int r = 0; r < s.rows * parts; r++)
        UNROLL
        for (int v = 0; v < WIDE; v++) {
            const int32_t *p = sums + (s.planes == 3 ? r : 3 * r);
            uint32_t total = s.planes == 2 ? (uint32_t)p[0] + ((uint32_t)p[1] << 8) : (uint32_t)p[0];
            sum[r][v] = minus_zeros(s.bits, b->zeros ? b->zeros + 8 * v : NULL, total);
        }
    for (int k = 0; k < width; k += 2 * UNIT_PAIRS(s.bits)) {
        for (int i = 0; i < UNIT_ROWS(s.bits); i++)
            PREFETCH(s.bits, (uintptr_t)(words + i * b->word_stride) + (uintptr_t)b->ahead * 4);
        UNROLL
        for (int i = 0; i < sources; i++) {
            __m256i from[WIDE], high[WIDE];
            UNROLL
            for (int v = 0; v < WIDE; v++) {
                from[v] = source(s.bits, i, words + 8 * v, b->word_stride);
                high[v] = high_source(s.bits, i, words + 8 * v, b->word_stride);
            }
            UNROLL
            for (int j = 0; j < pairs; j++) {
                __m256i pair[WIDE];
                UNROLL
                for (int v = 0; v < WIDE; v++)
                    pair[v] = pair_of(s.bits, j, from[v], high[v]);
                add_pair(s.rows * parts, s.rows * parts > 1, pair, digits + 2 * (i * pairs + j), width, sum);
            }
        }
        digits += 2 * UNIT_PAIRS(s.bits);
        words += UNIT_ROWS(s.bits) * b->word_stride;
    }
    add_group(s, at->input->scales + index, b, sum);
}

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
    float *y = p->piece->y + p->row * stride - p->piece->first;
    for (int64_t o = p->begin; o < p->end; o += BLOCK) {
        block whole = block_of(&p->at, o, y + o, stride);
        whole.ahead = w->tiled ? TILED_AHEAD : o + AHEAD(s.bits) < p->end ? AHEAD(s.bits) : AHEAD(s.bits) + next;
        if (p->end - o >= BLOCK) {
            decode_block(s, &p->at, p->row, &whole);
        } else {
            spare memory;
            block b = spare_block(&whole, p->end - o, s.rows, &memory);
            spare_words(&p->at, &b, p->end - o, &memory);
            decode_block(s, &p->at, p->row, &b);
            put_back(&whole, p->end - o, s.rows, &memory);
        }
    }
}

/* Rows of a tile: as many as the registers hold sums of. */
#define DECODE_TILE(planes) ((planes) == 3 ? 2 : 4)

#define DECODE(bits, planes, rows)                                                                                     \
    TARGET static void decode_##bits##_##planes##_##rows(const part *p)                                                \
    {                                                                                                                  \
        decode_columns((shape){bits, planes, rows}, p);                                                                \
    }
#define DECODE_ROWS(bits, planes)                                                                                      \
    DECODE(bits, planes, 1) DECODE(bits, planes, 2) DECODE(bits, planes, 3) DECODE(bits, planes, 4)
#define DECODE_PLANES(bits) DECODE_ROWS(bits, 1) DECODE_ROWS(bits, 2) DECODE(bits, 3, 1) DECODE(bits, 3, 2)
DECODE_PLANES(2) DECODE_PLANES(3) DECODE_PLANES(4) DECODE_PLANES(5) DECODE_PLANES(6) DECODE_PLANES(7) DECODE_PLANES(8)

#define NAMES(bits, planes)                                                                                            \
    {decode_##bits##_##planes##_1, decode_##bits##_##planes##_2, decode_##bits##_##planes##_3, decode_##bits##_##planes##_4}
#define TABLE(bits) {NAMES(bits, 1), NAMES(bits, 2), {decode_##bits##_3_1, decode_##bits##_3_2}}

static void decode(const lm_piece *piece)
{
    typedef void (*kernel)(const part *);
    static const kernel kernels[9][3][4] = {[2] = TABLE(2), [3] = TABLE(3), [4] = TABLE(4), [5] = TABLE(5),
                                            [6] = TABLE(6), [7] = TABLE(7), [8] = TABLE(8)};
    const lm_packed *w = piece->w;
    const lm_input *input = piece->input;
    const kernel *by_rows = kernels[w->bits][input->planes == LM_PAIRED ? 1 : input->planes - 1];
    const int64_t tile = DECODE_TILE(input->planes), groups = w->inputs / input->group, outputs = piece->last - piece->first;
    /* The tiled layout tile by tile; GPTQ's rows group by group. Several tiles of rows read the same words: the second
     * one finds them in the cache. */
    const int64_t step = w->tiled ? LM_TILE_OUTPUTS : input->rows <= tile ? outputs : 256;
    const int64_t pieces = (outputs + step - 1) / step;
    for (int64_t i = 0; i < groups * pieces; i++) {
        part p = {.piece = piece, .at = group_of(piece, w->tiled ? i % groups : i / pieces)};
        p.begin = piece->first + (w->tiled ? i / groups : i % pieces) * step;
        p.end = lm_min(p.begin + step, piece->last);
        for (p.row = 0; p.row < input->rows; p.row += tile)
            by_rows[lm_min(input->rows - p.row, tile) - 1](&p);
    }
}

/* ---- prefill: a group's weights are unpacked once ------------------------------------------------------------ */

/* w - zero of BLOCK outputs and a group's inputs, as [pair][BLOCK outputs][2 inputs]. */
INLINE void unpack_block(int bits, int width, const block *b, int16_t *to)
{
    const int sources = UNIT_SOURCES(bits), pairs = SOURCE_PAIRS(bits);
    __m256i zero[WIDE];
    for (int v = 0; v < WIDE; v++) {
        zero[v] = _mm256_set1_epi16((short)(1 << (bits - 1)));
        if (b->zeros) {
            __m256i z = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)(b->zeros + 8 * v)));
            zero[v] = _mm256_or_si256(z, _mm256_slli_epi32(z, 16));
        }
    }
    const uint32_t *words = b->words;
    for (int k = 0; k < width; k += 2 * UNIT_PAIRS(bits)) {
        UNROLL
        for (int i = 0; i < sources; i++) {
            __m256i from[WIDE], high[WIDE];
            UNROLL
            for (int v = 0; v < WIDE; v++) {
                from[v] = source(bits, i, words + 8 * v, b->word_stride);
                high[v] = high_source(bits, i, words + 8 * v, b->word_stride);
            }
            UNROLL
            for (int j = 0; j < pairs; j++) {
                UNROLL
                for (int v = 0; v < WIDE; v++)
                    _mm256_storeu_si256((void *)(to + 2 * BLOCK * (i * pairs + j) + 16 * v),
                                        _mm256_sub_epi16(pair_of(bits, j, from[v], high[v]), zero[v]));
            }
        }
        to += 2 * BLOCK * UNIT_PAIRS(bits);
        words += UNIT_ROWS(bits) * b->word_stride;
    }
}

#define UNPACK(bits)                                                                                                   \
    TARGET static void unpack_##bits(int width, const block *b, int16_t *to) { unpack_block(bits, width, b, to); }
UNPACK(2) UNPACK(3) UNPACK(4) UNPACK(5) UNPACK(6) UNPACK(7) UNPACK(8)

INLINE void prefill_tile(shape s, const lm_group *at, int64_t row, const int16_t *weights, const block *b)
{
    const int width = at->input->group, parts = PARTS(s.planes);
    const int16_t *digits = digits_of(at, row);
    sums_of_tile sum;
    UNROLL
    for (int r = 0; r < s.rows * parts; r++)
        UNROLL
        for (int v = 0; v < WIDE; v++)
            sum[r][v] = _mm256_setzero_si256();
    for (int k = 0; k < width; k += 2, digits += 2, weights += 2 * BLOCK) {
        __m256i w[WIDE];
        UNROLL
        for (int v = 0; v < WIDE; v++)
            w[v] = _mm256_loadu_si256((const void *)(weights + 16 * v));
        add_pair(s.rows * parts, 1, w, digits, width, sum);
    }
    add_group(s, at->input->scales + at->group * at->input->rows + row, b, sum);
}

#define PREFILL_TILE(planes) ((planes) == 3 ? 2 : 6)

/* Planes but three have one part: they share the kernels of one plane. */
#define PREFILL(planes, rows)                                                                                          \
    TARGET static void prefill_##planes##_##rows(const lm_group *at, int64_t row, const int16_t *weights, const block *b) \
    {                                                                                                                  \
        prefill_tile((shape){0, planes, rows}, at, row, weights, b);                                                   \
    }
PREFILL(1, 1) PREFILL(1, 2) PREFILL(1, 6) PREFILL(3, 1) PREFILL(3, 2)

/* A group's weights for the piece's outputs, at most as many as fit the scratch, times all rows. */
static void prefill_group(const lm_piece *p, const lm_group *at)
{
    typedef void (*unpacker)(int, const block *, int16_t *);
    typedef void (*kernel)(const lm_group *, int64_t, const int16_t *, const block *);
    static const unpacker unpackers[9] = {[2] = unpack_2, [3] = unpack_3, [4] = unpack_4, [5] = unpack_5,
                                          [6] = unpack_6, [7] = unpack_7, [8] = unpack_8};
    const unpacker unpack = unpackers[p->w->bits];
    const int64_t rows = p->input->rows, width = p->input->group;
    const int planes = p->input->planes, most = PREFILL_TILE(planes);
    int16_t *scratch = p->scratch;
    spare memory;
    for (int64_t o = p->first; o < p->last; o += BLOCK) {
        block b = block_of(at, o, NULL, 0);
        if (p->last - o < BLOCK) {
            b = spare_block(&b, p->last - o, 0, &memory);
            spare_words(at, &b, p->last - o, &memory);
        }
        unpack((int)width, &b, scratch + (o - p->first) * width);
    }
    for (int64_t r = 0, tile; r < rows; r += tile) {
        tile = rows - r >= most ? most : rows - r >= 2 ? 2 : 1;
        const kernel multiply = planes == 3 ? (tile == 2 ? prefill_3_2 : prefill_3_1)
                                : tile == 6 ? prefill_1_6
                                : tile == 2 ? prefill_1_2
                                            : prefill_1_1;
        for (int64_t o = p->first; o < p->last; o += BLOCK) {
            const block whole = block_of(at, o, p->y + r * p->stride + o - p->first, p->stride);
            const int16_t *weights = scratch + (o - p->first) * width;
            if (p->last - o >= BLOCK) {
                multiply(at, r, weights, &whole);
            } else {
                const block b = spare_block(&whole, p->last - o, (int)tile, &memory);
                multiply(at, r, weights, &b);
                put_back(&whole, p->last - o, (int)tile, &memory);
            }
        }
    }
}

static void prefill(const lm_piece *piece)
{
    const int64_t fitting = LM_SCRATCH_BYTES / (2 * piece->input->group) / BLOCK * BLOCK;
    const int64_t step = lm_min(fitting, LM_PREFILL_COLUMNS);
    lm_piece p = *piece;
    for (p.first = piece->first; p.first < piece->last; p.first += step) {
        p.last = lm_min(p.first + step, piece->last);
        p.y = piece->y + p.first - piece->first;
        for (int64_t g = 0; g < p.w->inputs / p.input->group; g++) {
            const lm_group at = group_of(&p, g);
            prefill_group(&p, &at);
        }
    }
}

const lm_linear_kernels lm_linear_avx2 = {lm_digit_bytes_avx2, lm_quantize_avx2, decode, prefill, lm_dense_avx2};

#endif
