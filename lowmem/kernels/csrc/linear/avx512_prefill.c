/* Packed linears with AVX-512 for many rows: a group's weights are unpacked once and multiplied by all rows. */
#if defined(__x86_64__)
#include "avx512_weights.h"

enum { WIDE = 2, BLOCK = 16 * WIDE }; /* vectors of outputs, and outputs, of a register tile */

/* Scratch holds the steps of the piece's weights, then LM_PAIRED's pairs. */
static inline uint8_t *pairs_in(uint8_t *scratch, int width) { return scratch + LM_PREFILL_COLUMNS * width; }

/* Unpack a group's weights for the piece's outputs into [block][step][BLOCK outputs][4 inputs], and for LM_PAIRED the pairs
 * of two steps likewise. Outputs past the end are 0. */
INLINE void unpack_group(shape s, const lm_piece *p, int64_t group)
{
    const lm_packed *w = p->w;
    const int width = p->input->group, pieces = UNIT_PIECES(s.bits), steps = PIECE_STEPS(s.bits);
    uint8_t *scratch = p->scratch;
    for (int64_t o = p->first; o < p->last; o += 16) {
        const __mmask16 mask = first_lanes(p->last - o);
        const uint32_t *words = lm_words(w, group * width * s.bits / 32, o);
        const int64_t column = o - p->first, block = column / BLOCK * BLOCK, inside = column % BLOCK * 4;
        uint8_t *to = scratch + block * width + inside, *pairs = pairs_in(scratch, width) + block * width / 2 + inside;
        for (int k = 0; k < width; k += 4 * UNIT_STEPS(s.bits)) {
            UNROLL
            for (int piece = 0; piece < pieces; piece++) {
                __m512i step[2];
                unpack(s.bits, piece, words, lm_word_stride(w), mask, step);
                for (int i = 0; i < steps; i++, to += 4 * BLOCK)
                    _mm512_store_si512((void *)to, step[i]);
                if (s.planes == LM_PAIRED) {
                    _mm512_store_si512((void *)pairs, pairs_of(s.bits, words, mask, step));
                    pairs += 4 * BLOCK;
                }
            }
            words += UNIT_ROWS(s.bits) * lm_word_stride(w);
        }
    }
}

/* Rows of a tile: as many as the registers hold sums of. The third of three planes has sums of its own. */
#define TILE(planes) ((planes) == 3 ? 6 : 12)
enum { MOST_ROWS = 12, REST = 4 };

/* One plane of a tile. */
typedef struct {
    const uint8_t *weights; /* unpacked */
    const uint8_t *digits;  /* of the tile's first row */
    int width;              /* inputs, or pairs of inputs */
    int fours;              /* fours of digits that lie together */
    int next;               /* bytes from these to the next ones */
    int64_t row_bytes;
} plane;

/* Add the products of one plane. ahead: digits of a later tile of rows, prefetched; returns where it ended. */
INLINE const uint8_t *add_products(int rows, const plane *p, const uint8_t *ahead, __m512i *sum)
{
    /* Three rows share an address register, with offsets that the CPU adds: one a row are too many. */
    const uint8_t *base[MOST_ROWS / 3], *weights = p->weights;
    const int bases = (rows + 2) / 3;
    UNROLL
    for (int i = 0; i < bases; i++)
        base[i] = p->digits + 3 * i * p->row_bytes;
    for (int k = 0; k < p->width; k += 4 * p->fours) {
        _mm_prefetch((const char *)ahead, _MM_HINT_T0);
        ahead += 16 * p->fours;
        UNROLL
        for (int i = 0; i < p->fours; i++) {
            __m512i w[WIDE];
            UNROLL
            for (int v = 0; v < WIDE; v++)
                w[v] = _mm512_load_si512((const void *)(weights + 64 * v));
            UNROLL
            for (int r = 0; r < rows; r++) {
                __m512i x = broadcast(base[r / 3] + r % 3 * p->row_bytes + 4 * i);
                UNROLL
                for (int v = 0; v < WIDE; v++)
                    sum[r * WIDE + v] = dot(sum[r * WIDE + v], w[v], x);
            }
            weights += 64 * WIDE;
        }
        UNROLL
        for (int i = 0; i < bases; i++) {
            base[i] += p->next;
            __asm__("" : "+r"(base[i])); /* or gcc gives each row a register after all */
        }
    }
    return ahead;
}

/* Tiles whose digits are prefetched: with many inputs they come from memory for every piece of outputs. */
enum { TILES_AHEAD = 2 };

/* Add the group's part of s.rows rows and BLOCK outputs to y. */
INLINE void prefill_tile(shape s, const tile *t, uint8_t *scratch, int64_t column, const uint8_t *ahead)
{
    const int width = t->input->group, paired = s.planes == LM_PAIRED;
    const uint8_t *digits = digits_of(t, s.planes);
    plane p = {.weights = scratch + column * width, .width = width, .fours = 1, .next = paired ? 12 : 4 * s.planes,
               .row_bytes = DIGIT_BYTES((int64_t)width, s.planes)};
    __m512i sum[MOST_ROWS * WIDE];
    __m512 highest[MOST_ROWS * WIDE];
    clear_sums(s, sum);
    if (s.planes == 3) {
        p.digits = digits + 8;
        add_zeros(s, 2, t, sum);
        ahead = add_products(s.rows, &p, ahead, sum);
        UNROLL
        for (int r = 0; r < s.rows; r++)
            UNROLL
            for (int v = 0; v < WIDE; v++)
                highest[r * WIDE + v] = _mm512_cvtepi32_ps(sum[r * WIDE + v]);
        clear_sums(s, sum);
    }
    if (s.planes != 1) {
        p.digits = digits + (paired ? 0 : 4), p.fours = paired ? 2 : 1;
        add_zeros(s, 1, t, sum);
        ahead = add_products(s.rows, &p, ahead, sum);
        raise_sums(s, sum);
    }
    p.digits = digits, p.fours = 1;
    if (paired)
        p.weights = pairs_in(scratch, width) + column * width / 2, p.digits = digits + 8, p.width = width / 2;
    add_zeros(s, 0, t, sum);
    add_products(s.rows, &p, ahead, sum);
    add_scaled(s, t, sum, s.planes == 3 ? highest : NULL);
}

INLINE void prefill_group(shape s, const lm_piece *p, int64_t group)
{
    const lm_input *input = p->input;
    const int64_t rows = input->rows, row_bytes = DIGIT_BYTES((int64_t)input->group, s.planes);
    tile t = {.w = p->w, .input = input, .stride = p->stride};
    unpack_group(s, p, group);
    int64_t tile_rows = TILE(s.planes);
    for (t.row = 0; t.row < rows; t.row += tile_rows) {
        const int64_t left = rows - t.row;
        tile_rows = left >= TILE(s.planes) ? TILE(s.planes) : left >= REST ? REST : 1;
        for (t.output = p->first; t.output < p->last; t.output += BLOCK) {
            const int64_t column = t.output - p->first;
            const __mmask16 mask[WIDE] = {first_lanes(p->last - t.output), first_lanes(p->last - t.output - 16)};
            /* Each block prefetches its share, in the order of memory: the next group follows the last row. */
            const int64_t bytes = tile_rows * row_bytes, blocks = LM_PREFILL_COLUMNS / BLOCK;
            set_group(&t, group);
            const uint8_t *ahead = digits_of(&t, s.planes) + TILES_AHEAD * bytes + column / BLOCK * (bytes / blocks);
            t.mask = mask;
            t.y = p->y + t.row * p->stride + column;
            if (tile_rows == TILE(s.planes))
                s.rows = TILE(s.planes), prefill_tile(s, &t, p->scratch, column, ahead);
            else if (tile_rows == REST)
                s.rows = REST, prefill_tile(s, &t, p->scratch, column, ahead);
            else
                s.rows = 1, prefill_tile(s, &t, p->scratch, column, ahead);
        }
    }
}

#define PREFILL(bits, planes)                                                                                          \
    TARGET static void prefill_##bits##_##planes(const lm_piece *p, int64_t group)                                     \
    {                                                                                                                  \
        if (is_plain(p->w))                                                                                            \
            prefill_group((shape){1, bits, planes, 0, WIDE}, p, group);                                                \
        else                                                                                                           \
            prefill_group((shape){0, bits, planes, 0, WIDE}, p, group);                                                \
    }
#define PREFILL_PLANES(bits) PREFILL(bits, 1) PREFILL(bits, 2) PREFILL(bits, 3)
PREFILL_PLANES(2) PREFILL_PLANES(3) PREFILL_PLANES(4) PREFILL_PLANES(5) PREFILL_PLANES(6) PREFILL_PLANES(7) PREFILL_PLANES(8)
PREFILL(2, 4) PREFILL(3, 4) PREFILL(4, 4) /* 4: LM_PAIRED */
#define TABLE(bits) {prefill_##bits##_1, prefill_##bits##_2, prefill_##bits##_3, prefill_##bits##_4}
#define WIDE_TABLE(bits) {prefill_##bits##_1, prefill_##bits##_2, prefill_##bits##_3} /* without LM_PAIRED */

static void prefill(const lm_piece *p)
{
    typedef void (*kernel)(const lm_piece *, int64_t);
    static const kernel kernels[9][4] = {[2] = TABLE(2),      [3] = TABLE(3),      [4] = TABLE(4),     [5] = WIDE_TABLE(5),
                                         [6] = WIDE_TABLE(6), [7] = WIDE_TABLE(7), [8] = WIDE_TABLE(8)};
    const kernel by_group = kernels[p->w->bits][p->input->planes - 1];
    for (int64_t g = 0; g < p->w->inputs / p->input->group; g++)
        by_group(p, g);
}

const lm_linear_kernels lm_linear_avx512 = {
    lm_digit_bytes_avx512, lm_quantize_avx512, lm_decode_avx512, prefill, lm_dense_avx512,
};

#endif
