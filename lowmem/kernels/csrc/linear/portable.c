/* The kernels in plain C, for any CPU: the rule of linear.h written as directly as possible. Sixteen outputs are four vectors
 * of the vector extension of gcc and clang, which NEON and SSE2 registers hold.
 *
 * The digits' layout is [group][row][part][input], 16 bits each. A part holds the whole q; with 3 planes there is a part for
 * each plane.
 */
#include <math.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "digits.h"
#include "types.h"

enum { WIDE = 4, BLOCK = 4 * WIDE, WIDEST = 256 }; /* vectors and outputs of a block; inputs of a group, at most */
#if defined(__SSE2__)
enum { TILE = 2 }; /* rows whose sums the registers hold */
#else
enum { TILE = 4 };
#endif
#define PARTS(planes) ((planes) == 3 ? 3 : 1)
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef int32_t integers __attribute__((vector_size(16)));
typedef uint32_t fields __attribute__((vector_size(16)));

/* ---- activations --------------------------------------------------------------------------------------------- */

/* To nearest, ties to even, for |v| < 2^23: above 2^23 a float has no fraction. */
static inline float rounded(float v)
{
    const float edge = copysignf(0x1p23f, v);
    return (v + edge) - edge;
}

/* The lowest balanced digit of q, -128..127. */
static inline int32_t low_digit(int32_t q) { return ((q + 128) & 255) - 128; }

/* The integers of an even input and of the odd one after it, in LM_PAIRED's form (linear.h). */
static void pair(int32_t q[2])
{
    const int32_t sixteenths = (q[1] + 8) >> 4, rest = sixteenths & 15;
    q[0] = rest + ((q[0] - rest + 8) & ~15);
    q[1] = 16 * sixteenths;
}

static void quantize_group(int type, int planes, const lm_digit_group *g)
{
    const int32_t limit = lm_limit(planes);
    const int width = g->width;
    int16_t *digits = g->digits;
    float x[WIDEST];
    uint32_t most = 0; /* compared as integers: NaN > infinity > finite numbers */
    for (int k = 0; k < width; k++) {
        x[k] = lm_load(g->x, type, g->at + k);
        const uint32_t magnitude = lm_to_bits(x[k]) & 0x7fffffff;
        most = magnitude > most ? magnitude : most;
    }
    const float a = lm_from_bits(most);
    const float inverse = lm_inverse(a, limit);
    *g->scale = a / (float)limit;
    int32_t q[WIDEST], sum[3] = {0, 0, 0};
    for (int k = 0; k < width; k++) {
        const float v = x[k] * inverse, low = -(float)limit, high = (float)limit;
        /* NaN becomes the lowest integer, as x86 converts it. */
        q[k] = (int32_t)(v > low ? rounded(v < high ? v : high) : low);
    }
    if (planes == LM_PAIRED)
        for (int k = 0; k < width; k += 2)
            pair(q + k);
    for (int k = 0; k < width; k++) {
        const int32_t p0 = low_digit(q[k]), rest = (q[k] - p0) / 256, p1 = low_digit(rest), p2 = (rest - p1) / 256;
        sum[0] += p0;
        sum[1] += p1;
        sum[2] += p2;
        digits[k] = (int16_t)(planes == 3 ? p0 : q[k]);
        if (planes == 3) {
            digits[width + k] = (int16_t)p1;
            digits[2 * width + k] = (int16_t)p2;
        }
    }
    memcpy(g->sums, sum, (size_t)LM_SUMS(planes) * sizeof sum[0]);
}

#define DIGIT_BYTES(inputs, planes) ((inputs) * PARTS(planes) * 2)
LM_QUANTIZE_ALL(portable, , DIGIT_BYTES)

/* ---- weights ------------------------------------------------------------------------------------------------- */

INLINE fields load(const uint32_t *words)
{
    fields value;
    memcpy(&value, words, sizeof value);
    return value;
}

/* w - zero of a group's inputs and BLOCK outputs, whose rows of words are `stride` apart. */
INLINE void unpack(int bits, int width, const uint32_t *words, int64_t stride, const int32_t *zeros, integers (*weights)[WIDE])
{
    integers zero[WIDE];
    memcpy(zero, zeros, sizeof zero);
    for (int k = 0, shift = 0; k < width; k++) {
        const int here = shift;
        const uint32_t *row = words;
        shift += bits;
        if (shift >= 32) {
            words += stride;
            shift -= 32;
        }
        UNROLL
        for (int v = 0; v < WIDE; v++) {
            fields value = load(row + 4 * v) >> here;
            if (here + bits > 32) /* 3 bits: a field may cross into the next row of words */
                value |= load(words + 4 * v) << (32 - here);
            weights[k][v] = (integers)(value & ((1u << bits) - 1)) - zero[v];
        }
    }
}

/* The values of input `index` of a unit of 32 in a plane of `bits` bits, whose first row is `words`. */
INLINE fields in_plane(int bits, int index, const uint32_t *words, int64_t stride)
{
    return load(words + index * bits / 32 * stride) >> (index * bits % 32) & ((1u << bits) - 1);
}

/* As `unpack`, for the widths that are stored in planes. Unrolled by rows of words, since shifts by constants are faster. */
INLINE void unpack_planes(int bits, int width, const uint32_t *words, int64_t stride, const int32_t *zeros,
                          integers (*weights)[WIDE])
{
    integers zero[WIDE];
    memcpy(zero, zeros, sizeof zero);
    for (int k = 0; k < width; k += 32, words += bits * stride)
        UNROLL
        for (int row = 0; row < 4; row++)
            UNROLL
            for (int j = 0; j < 8; j++)
                UNROLL
                for (int v = 0; v < WIDE; v++) {
                    const int i = 8 * row + j;
                    fields value = in_plane(4, i, words + 4 * v, stride);
                    if (bits >= 6)
                        value |= in_plane(2, i, words + 4 * stride + 4 * v, stride) << 4;
                    if (bits % 2)
                        value |= in_plane(1, i, words + (bits - 1) * stride + 4 * v, stride) << (bits - 1);
                    weights[k + i][v] = (integers)value - zero[v];
                }
}

/* One group of inputs and `count` outputs of a block. */
typedef struct {
    const lm_packed *w;
    int64_t input, scale_row, output; /* the first input, its row of scales, the first output */
    int width, count;                 /* inputs, outputs */
} block;

/* Unpack a block of any width of weights. Where fewer than BLOCK outputs are left, nothing past them is read. */
static void unpack_block(const block *b, integers (*weights)[WIDE])
{
    const lm_packed *w = b->w;
    const uint32_t *words = lm_words(w, b->input * w->bits / 32, b->output);
    const uint8_t *from = w->zeros ? w->zeros + lm_group_at(w, b->scale_row, b->output) : NULL;
    int64_t stride = lm_word_stride(w);
    uint32_t spare[WIDEST * 8 / 32 * BLOCK];
    int32_t zeros[BLOCK];
    for (int o = 0; o < BLOCK; o++)
        zeros[o] = from && o < b->count ? from[o] : 1 << (w->bits - 1);
    if (b->count < BLOCK) {
        memset(spare, 0, sizeof spare);
        for (int i = 0; i < b->width * w->bits / 32; i++)
            memcpy(spare + i * BLOCK, words + i * stride, (size_t)b->count * sizeof(uint32_t));
        words = spare;
        stride = BLOCK;
    }
    if (w->bits == 8)
        unpack(8, b->width, words, stride, zeros, weights);
    else if (w->bits == 7)
        unpack_planes(7, b->width, words, stride, zeros, weights);
    else if (w->bits == 6)
        unpack_planes(6, b->width, words, stride, zeros, weights);
    else if (w->bits == 5)
        unpack_planes(5, b->width, words, stride, zeros, weights);
    else if (w->bits == 4)
        unpack(4, b->width, words, stride, zeros, weights);
    else if (w->bits == 3)
        unpack(3, b->width, words, stride, zeros, weights);
    else
        unpack(2, b->width, words, stride, zeros, weights);
}

/* Four weights times a digit, both signed integers of at most 16 bits. */
INLINE integers times(integers weights, int16_t digit)
{
#if defined(__SSE2__) /* has products of 16 bits, not of 32: the upper halves are multiplied by 0 */
    return (integers)_mm_madd_epi16((__m128i)weights, _mm_set1_epi32((uint16_t)digit));
#else
    return weights * (int32_t)digit;
#endif
}

/* The group's sums for `count` arrays of digits. */
INLINE void add_products(int count, int width, const integers (*weights)[WIDE], const int16_t *digits, int32_t (*sums)[BLOCK])
{
    integers sum[TILE][WIDE] = {{{0}}};
    for (int k = 0; k < width; k++)
        UNROLL
        for (int i = 0; i < count; i++)
            UNROLL
            for (int v = 0; v < WIDE; v++)
                sum[i][v] += times(weights[k][v], digits[i * width + k]);
    memcpy(sums, sum, (size_t)count * sizeof sum[0]);
}

/* y = fmaf(c, scale * weight_scale, y) for `count` outputs of one row, from the sums of its parts. */
static void add_group(int parts, int count, int32_t (*sums)[BLOCK], const float *scales, float *y)
{
    float c[BLOCK];
    for (int o = 0; o < BLOCK; o++)
        c[o] = parts == 1 ? (float)sums[0][o] : fmaf((float)sums[2][o], 65536, (float)(sums[0][o] + 256 * sums[1][o]));
    for (int o = 0; o < count; o++)
        y[o] = fmaf(c[o], scales[o], y[o]);
}

/* Add one group's part of BLOCK outputs from `output` on, or of those left, to y, for all rows. */
static void add_block(const lm_piece *p, int64_t group, int64_t output)
{
    const lm_packed *w = p->w;
    const lm_input *input = p->input;
    const int width = input->group, parts = PARTS(input->planes), count = (int)lm_min(p->last - output, BLOCK);
    const block b = {w, group * width, lm_scale_row(w, input, group), output, width, count};
    const int64_t scale_at = lm_group_at(w, b.scale_row, output), index = group * input->rows;
    const int16_t *digits = (const int16_t *)input->digits + index * parts * width;
    integers weights[WIDEST][WIDE];
    unpack_block(&b, weights);
    const int64_t tile = parts == 3 ? 1 : TILE;
    for (int64_t r = 0; r < input->rows; r += tile) {
        const int64_t rows = lm_min(input->rows - r, tile);
        const int16_t *from = digits + r * parts * width;
        int32_t sums[TILE > 3 ? TILE : 3][BLOCK];
        if (rows * parts == TILE)
            add_products(TILE, width, weights, from, sums);
        else
            for (int64_t i = 0; i < rows * parts; i++)
                add_products(1, width, weights, from + i * width, sums + i);
        for (int64_t i = 0; i < rows; i++) {
            float scales[BLOCK];
            for (int o = 0; o < count; o++)
                scales[o] = input->scales[index + r + i] * lm_load(w->scales, w->scales_type, scale_at + o);
            add_group(parts, count, sums + i, scales, p->y + (r + i) * p->stride + output - p->first);
        }
    }
}

/* Unpacks once for all rows: for decode and prefill alike. */
static void multiply(const lm_piece *p)
{
    for (int64_t g = 0; g < p->w->inputs / p->input->group; g++)
        for (int64_t o = p->first; o < p->last; o += BLOCK)
            add_block(p, g, o);
}

/* ---- dense --------------------------------------------------------------------------------------------------- */

enum { LANES = 16 };

INLINE void dense_of(int type, const lm_dense_piece *p)
{
    const lm_dense *w = p->w;
    for (int64_t o = p->first; o < p->last; o++) {
        const uint16_t *weight = w->weight + o * w->inputs;
        const float bias = w->bias ? lm_load(w->bias, w->bias_type, o) : 0;
        for (int64_t r = 0; r < p->rows; r++) {
            const float *row = p->x + r * w->inputs;
            float sum[LANES] = {0};
            int64_t i = 0;
            for (; i + LANES <= w->inputs; i += LANES)
                for (int l = 0; l < LANES; l++)
                    sum[l] += lm_from_16(weight[i + l], type) * row[i + l];
            for (; i < w->inputs; i++)
                sum[0] += lm_from_16(weight[i], type) * row[i];
            for (int half = LANES / 2; half; half /= 2)
                for (int l = 0; l < half; l++)
                    sum[l] += sum[l + half];
            p->y[r * p->stride + o - p->first] = sum[0] + bias;
        }
    }
}

static void dense(const lm_dense_piece *p)
{
    if (p->w->weight_type == LM_F16)
        dense_of(LM_F16, p);
    else
        dense_of(LM_BF16, p);
}

const lm_linear_kernels lm_linear_portable = {lm_digit_bytes_portable, lm_quantize_portable, multiply, multiply, dense};
