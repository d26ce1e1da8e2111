/* The kernels in plain C, for any CPU: the rule of lowmem.h as directly as it can be said. Sixteen outputs are four values
 * of the vector type that gcc and clang have on every machine, and that NEON and SSE2 have registers of.
 *
 * Digits lie as [group][row][part][input], 16 bits each: one part, the whole q, but with 3 planes a part for each.
 */
#include <math.h>
#include <string.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "digits.h"
#include "lowmem.h"
#include "types.h"

enum { WIDE = 4, PANEL = 4 * WIDE, WIDEST = 256 }; /* vectors; outputs worked on at a time; inputs of a group, at most */
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

static size_t digit_bytes(int64_t rows, int64_t in, int planes) { return (size_t)(rows * in) * 2 * (size_t)PARTS(planes); }

/* To nearest, ties to even, for |v| < 2^23: above 2^23 a float has no fraction. */
static inline float rounded(float v)
{
    const float edge = copysignf(0x1p23f, v);
    return (v + edge) - edge;
}

/* The lowest balanced digit of q, -128..127. */
static inline int32_t low_digit(int32_t q) { return ((q + 128) & 255) - 128; }

/* q of an even input and of the odd one after it, as LM_PAIRED holds them (lowmem.h). */
static void pair(int32_t q[2])
{
    const int32_t sixteenths = (q[1] + 8) >> 4, rest = sixteenths & 15;
    q[0] = rest + ((q[0] - rest + 8) & ~15);
    q[1] = 16 * sixteenths;
}

static void quantize_group(const float *x, int width, int planes, int16_t *digits, float *scale, int32_t *sums)
{
    const int32_t limit = lm_limit(planes);
    uint32_t most = 0; /* as integers: NaN above infinity above all that is finite */
    for (int k = 0; k < width; k++) {
        const uint32_t magnitude = lm_to_bits(x[k]) & 0x7fffffff;
        most = magnitude > most ? magnitude : most;
    }
    const float a = lm_from_bits(most);
    const float inverse = lm_inverse(a, limit);
    *scale = a / (float)limit;
    int32_t q[WIDEST], sum[3] = {0, 0, 0};
    for (int k = 0; k < width; k++) {
        const float v = x[k] * inverse, low = -(float)limit, high = (float)limit;
        /* NaN becomes the lowest, as x86 converts it. */
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
    memcpy(sums, sum, (size_t)LM_SUMS(planes) * sizeof sum[0]);
}

static void quantize(const void *x, int x_type, int64_t stride, lm_input *input, int64_t first, int64_t last)
{
    const int width = input->group;
    for (int64_t g = first; g < last; g++)
        for (int64_t r = 0; r < input->rows; r++) {
            const int64_t index = g * input->rows + r, at = r * stride + g * width;
            float values[WIDEST];
            for (int k = 0; k < width; k++)
                values[k] = lm_load(x, x_type, at + k);
            quantize_group(values, width, input->planes, (int16_t *)input->digits + index * width * PARTS(input->planes),
                           input->scales + index, input->sums + 3 * index);
        }
}

/* ---- weights ------------------------------------------------------------------------------------------------- */

INLINE fields load(const uint32_t *words)
{
    fields value;
    memcpy(&value, words, sizeof value);
    return value;
}

/* w - zero of a group's inputs and 16 outputs, whose rows of words are `stride` apart. */
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
            if (here + bits > 32) /* 3 bits: the rest is in the next row of words */
                value |= load(words + 4 * v) << (32 - here);
            weights[k][v] = (integers)(value & ((1u << bits) - 1)) - zero[v];
        }
    }
}

/* The same for any bits, and for the last outputs, where fewer than 16 are left: nothing past them is touched. */
static void unpack_panel(const lm_packed *w, int64_t input, int width, int64_t scale_at, int64_t output, int count,
                         integers (*weights)[WIDE])
{
    const uint32_t *words = lm_words(w, input * w->bits / 32, output);
    int64_t stride = lm_word_stride(w);
    uint32_t room[WIDEST * 8 / 32 * PANEL];
    int32_t zeros[PANEL];
    for (int o = 0; o < PANEL; o++)
        zeros[o] = w->zeros && o < count ? w->zeros[scale_at + o] : 1 << (w->bits - 1);
    if (count < PANEL) {
        memset(room, 0, sizeof room);
        for (int i = 0; i < width * w->bits / 32; i++)
            memcpy(room + i * PANEL, words + i * stride, (size_t)count * 4);
        words = room;
        stride = PANEL;
    }
    if (w->bits == 8)
        unpack(8, width, words, stride, zeros, weights);
    else if (w->bits == 4)
        unpack(4, width, words, stride, zeros, weights);
    else if (w->bits == 3)
        unpack(3, width, words, stride, zeros, weights);
    else
        unpack(2, width, words, stride, zeros, weights);
}

/* Four weights times a digit, both of at most 16 bits with their sign. */
INLINE integers times(integers weights, int16_t digit)
{
#if defined(__SSE2__) /* has no product of 32 bits, but of 16: the upper halves are taken 0 times */
    return (integers)_mm_madd_epi16((__m128i)weights, _mm_set1_epi32((uint16_t)digit));
#else
    return weights * (int32_t)digit;
#endif
}

/* The group's sums for `count` arrays of digits. */
INLINE void add_products(int count, int width, const integers (*weights)[WIDE], const int16_t *digits, int32_t (*sums)[PANEL])
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

/* y = fmaf(c, scale * weight_scale, y) for one row; sums of its parts. */
static void add_group(int parts, int count, int32_t (*sums)[PANEL], float scale, const float *weight_scale, float *y)
{
    float c[PANEL];
    for (int o = 0; o < PANEL; o++)
        c[o] = parts == 1 ? (float)sums[0][o] : fmaf((float)sums[2][o], 65536, (float)(sums[0][o] + 256 * sums[1][o]));
    for (int o = 0; o < count; o++)
        y[o] = fmaf(c[o], scale * weight_scale[o], y[o]);
}

/* One group's part of `count` outputs, for all rows: the weights are unpacked once. */
static void add_panel(const lm_packed *w, const lm_input *input, int64_t group, int64_t output, int count, float *y,
                      int64_t stride)
{
    const int width = input->group, parts = PARTS(input->planes);
    const int64_t scale_at = lm_group_at(w, group * width / w->group, output), index = group * input->rows;
    const int16_t *digits = (const int16_t *)input->digits + index * parts * width;
    integers weights[WIDEST][WIDE];
    float weight_scale[PANEL] = {0};
    unpack_panel(w, group * width, width, scale_at, output, count, weights);
    for (int o = 0; o < count; o++)
        weight_scale[o] = lm_load(w->scales, w->scales_type, scale_at + o);
    const int64_t tile = parts == 3 ? 1 : TILE;
    for (int64_t r = 0; r < input->rows; r += tile) {
        const int64_t rows = input->rows - r < tile ? input->rows - r : tile;
        const int16_t *from = digits + r * parts * width;
        int32_t sums[TILE > 3 ? TILE : 3][PANEL];
        if (rows * parts == TILE)
            add_products(TILE, width, weights, from, sums);
        else
            for (int64_t i = 0; i < rows * parts; i++)
                add_products(1, width, weights, from + i * width, sums + i);
        for (int64_t i = 0; i < rows; i++)
            add_group(parts, count, sums + i, input->scales[index + r + i], weight_scale, y + (r + i) * stride);
    }
}

static void few(const lm_packed *w, const lm_input *input, int64_t first, int64_t last, float *y, int64_t stride)
{
    for (int64_t r = 0; r < input->rows; r++)
        memset(y + r * stride, 0, (size_t)(last - first) * sizeof(float));
    for (int64_t g = 0; g < w->in / input->group; g++)
        for (int64_t o = first; o < last; o += PANEL)
            add_panel(w, input, g, o, last - o < PANEL ? (int)(last - o) : PANEL, y + o - first, stride);
    if (w->bias)
        for (int64_t r = 0; r < input->rows; r++)
            for (int64_t o = first; o < last; o++)
                y[r * stride + o - first] += lm_load(w->bias, w->bias_type, o);
}

/* `few` unpacks once for all rows already. */
static void many(const lm_packed *w, const lm_input *input, int64_t first, int64_t last, float *y, int64_t stride,
                 void *scratch)
{
    (void)scratch;
    few(w, input, first, last, y, stride);
}

/* ---- dense --------------------------------------------------------------------------------------------------- */

enum { LANES = 16 };

INLINE void dense_of(int type, const lm_dense *w, const float *x, int64_t rows, int64_t first, int64_t last, float *y,
                     int64_t stride)
{
    for (int64_t o = first; o < last; o++) {
        const uint16_t *weight = w->weight + o * w->in;
        const float bias = w->bias ? lm_load(w->bias, w->bias_type, o) : 0;
        for (int64_t r = 0; r < rows; r++) {
            const float *row = x + r * w->in;
            float sum[LANES] = {0};
            int64_t i = 0;
            for (; i + LANES <= w->in; i += LANES)
                for (int l = 0; l < LANES; l++)
                    sum[l] += lm_from_16(weight[i + l], type) * row[i + l];
            for (; i < w->in; i++)
                sum[0] += lm_from_16(weight[i], type) * row[i];
            for (int half = LANES / 2; half; half /= 2)
                for (int l = 0; l < half; l++)
                    sum[l] += sum[l + half];
            y[r * stride + o - first] = sum[0] + bias;
        }
    }
}

static void dense(const lm_dense *w, const float *x, int64_t rows, int64_t first, int64_t last, float *y, int64_t stride)
{
    if (w->weight_type == LM_F16)
        dense_of(LM_F16, w, x, rows, first, last, y, stride);
    else
        dense_of(LM_BF16, w, x, rows, first, last, y, stride);
}

const lm_isa lm_portable = {"portable C", digit_bytes, quantize, few, many, dense};
