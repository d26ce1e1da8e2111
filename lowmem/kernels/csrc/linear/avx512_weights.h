/* Weights as the AVX-512 kernels unpack them, and the sums of a register tile. The kernels use VNNI for products of bytes,
 * VBMI, VBMI2 and GFNI for fields of 3 and 2 bits and for planes (Ice Lake, Zen 4 and later).
 *
 * A step is four inputs of each of 16 outputs, in the order in which GPTQ's words unpack. avx512_digits.c brings the
 * activations into the same order.
 */
#ifndef LOWMEM_AVX512_WEIGHTS_H
#define LOWMEM_AVX512_WEIGHTS_H

#include "avx512.h"

/* ---- unpacking ----------------------------------------------------------------------------------------------- */

INLINE __m512i load_words(const uint32_t *words, __mmask16 mask)
{
    return mask == FULL ? _mm512_loadu_si512(words) : _mm512_maskz_loadu_epi32(mask, words);
}

/* Units: UNIT_ROWS rows of words that are unpacked together, in UNIT_PIECES pieces of PIECE_STEPS steps. Unpacking piece by
 * piece leaves the registers to the sums. */
#define UNIT_ROWS(bits) ((bits) == 3 || IS_PLANAR(bits) ? (bits) : 1)
#define UNIT_PIECES(bits) ((bits) == 3 || IS_PLANAR(bits) ? 4 : (bits) == 2 ? 2 : 1)
#define PIECE_STEPS(bits) ((bits) == 8 ? 1 : 2)
#define UNIT_STEPS(bits) (UNIT_PIECES(bits) * PIECE_STEPS(bits))

/* `bits` bits of each byte, from bit `from` on, moved to bit `to`: shifts and a mask in one instruction. */
INLINE __m512i moved(__m512i v, int bits, int from, int to)
{
    uint64_t matrix = 0; /* byte 7 - i selects the bits whose sum becomes bit i */
    UNROLL
    for (int i = 0; i < bits; i++)
        matrix |= (uint64_t)(1u << (from + i)) << (8 * (7 - to - i));
    return _mm512_gf2p8affine_epi64_epi8(v, _mm512_set1_epi64((long long)matrix), 0);
}

INLINE __m512i field(__m512i v, int bits, int from) { return moved(v, bits, from, 0); }

/* Add a plane of `bits` bits (2 or 1) to a piece's steps at bit `to`. `words`: the plane's first row. Byte i of each word of
 * `spread` gets the bits of the piece's inputs 2i, for the first step, and 2i + 1, for the second. */
INLINE void add_high_plane(int bits, int to, int piece, const uint32_t *words, int64_t stride, __mmask16 mask, __m512i step[2])
{
    const int rows = 4 / bits, from = 8 * bits * (piece % rows);
    const uint64_t offsets = bits == 2 ? 0x2c2824200c080400 : 0x2624222006040200;
    const __m512i order = _mm512_set1_epi64((long long)(offsets + (uint64_t)from * 0x0101010101010101));
    const __m512i spread = _mm512_multishift_epi64_epi8(order, load_words(words + piece / rows * stride, mask));
    step[0] = _mm512_or_si512(step[0], moved(spread, bits, 0, to));
    step[1] = _mm512_or_si512(step[1], moved(spread, bits, bits, to));
}

/* Unpack a piece of a unit, whose rows are words[0], words[stride] and so on of 16 outputs, into the vectors
 * [16 outputs][4 inputs] of its steps. */
INLINE void unpack(int bits, int piece, const uint32_t *words, int64_t stride, __mmask16 mask, __m512i step[2])
{
    if (bits == 3) {
        /* 96 bits are four pieces of eight fields. Byte i of a piece takes the 8 bits from 6i on: two fields and 2 bits. */
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
    __m512i v = load_words(IS_PLANAR(bits) ? words + piece * stride : words, mask);
    if (bits == 8) {
        step[0] = v;
    } else if (bits == 4 || IS_PLANAR(bits)) {
        step[0] = _mm512_and_si512(v, _mm512_set1_epi8(0x0f));
        step[1] = _mm512_and_si512(_mm512_srli_epi32(v, 4), _mm512_set1_epi8(0x0f));
        if (bits >= 6 && IS_PLANAR(bits))
            add_high_plane(2, 4, piece, words + 4 * stride, stride, mask, step);
        if (bits % 2 && IS_PLANAR(bits))
            add_high_plane(1, bits - 1, piece, words + (bits - 1) * stride, stride, mask, step);
    } else {
        step[0] = piece ? field(v, 2, 4) : _mm512_and_si512(v, _mm512_set1_epi8(0x03));
        step[1] = field(v, 2, 4 * piece + 2);
    }
}

/* The pairs of a piece's two steps, in a byte each, by which LM_PAIRED's shared digits are multiplied. GPTQ's words of
 * 4 bits consist of them. */
INLINE __m512i pairs_of(int bits, const uint32_t *words, __mmask16 mask, const __m512i step[2])
{
    return bits == 4 ? load_words(words, mask) : _mm512_or_si512(step[0], _mm512_slli_epi32(step[1], 4));
}

/* Groups of four digits in a piece of `steps` steps. With LM_PAIRED two steps share a third group of lower digits. */
#define STEP_DIGITS(steps, planes) ((planes) == LM_PAIRED ? (steps) * 3 / 2 : (steps) * (planes))

/* _mm512_dpbusd_epi32. For the intrinsic, gcc 12 copies every sum to another register and back, a fifth of the time. */
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

/* ---- register tiles ------------------------------------------------------------------------------------------ */

/* What a kernel is compiled for. All calls pass constants, and all functions that take it are inlined. */
typedef struct {
    int plain; /* is_plain(weight) */
    int bits, planes;
    int rows, wide; /* of a tile: rows of activations, vectors of 16 outputs */
} shape;

/* Most weights are symmetric with float16 scales. Knowing this before the loops saves a fifth of a small group's time. */
static inline int is_plain(const lm_packed *w) { return !w->zeros && w->scales_type == LM_F16; }

/* A tile of outputs, for one group of inputs. */
typedef struct {
    const lm_packed *w;
    const lm_input *input;
    int64_t group, scale_row; /* of inputs; the row of scales that it belongs to */
    int64_t scale_at;         /* the index into scales and zeros of the tile's first output */
    int64_t row, output;      /* the tile's first */
    const __mmask16 *mask;    /* the outputs in each vector */
    float *y;                 /* of the tile's first row and output */
    int64_t stride;
} tile;

/* Set the group of inputs. A tile of outputs does not cross a tile of the tiled layout. */
static inline void set_group(tile *t, int64_t group)
{
    t->group = group;
    t->scale_row = lm_scale_row(t->w, t->input, group);
    t->scale_at = lm_group_at(t->w, t->scale_row, t->output);
}

static inline const uint8_t *digits_of(const tile *t, int planes)
{
    return (const uint8_t *)t->input->digits +
           (t->group * t->input->rows + t->row) * DIGIT_BYTES((int64_t)t->input->group, planes);
}

static inline const uint32_t *words_of(const tile *t, int bits)
{
    return lm_words(t->w, t->group * t->input->group * bits / 32, t->output);
}

/* The initial value of vector v's sums: -zero times the sum of the digits, for each of 16 outputs. */
INLINE __m512i minus_zeros(int plain, const tile *t, int v, int32_t sum)
{
    if (plain || !t->w->zeros)
        return _mm512_set1_epi32(-(1 << (t->w->bits - 1)) * sum);
    const __m512i zeros = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(t->mask[v], t->w->zeros + t->scale_at + 16 * v));
    return _mm512_mullo_epi32(zeros, _mm512_set1_epi32(-sum));
}

/* The weight's scales of vector v. */
INLINE __m512 weight_scales(int plain, const tile *t, int v)
{
    return load_16(t->w->scales, plain ? LM_F16 : t->w->scales_type, t->scale_at + 16 * v, t->mask[v]);
}

/* The functions below keep sums in registers: sum[r * wide + v] holds 16 outputs. Planes are added one after the other; the
 * sums of the upper of two planes are shifted left by 8 bits before the lower one is added. UNROLL dissolves the loops, or
 * the sums would be in memory. */

INLINE void clear_sums(shape s, __m512i *sum)
{
    UNROLL
    for (int r = 0; r < s.rows; r++)
        UNROLL
        for (int v = 0; v < s.wide; v++)
            sum[r * s.wide + v] = _mm512_setzero_si512();
}

INLINE void raise_sums(shape s, __m512i *sum)
{
    UNROLL
    for (int r = 0; r < s.rows; r++)
        UNROLL
        for (int v = 0; v < s.wide; v++)
            sum[r * s.wide + v] = _mm512_slli_epi32(sum[r * s.wide + v], 8);
}

/* Add -zero times the sum of the plane's digits. */
INLINE void add_zeros(shape s, int plane, const tile *t, __m512i *sum)
{
    const int32_t *sums = t->input->sums + 3 * (t->group * t->input->rows + t->row) + plane;
    UNROLL
    for (int r = 0; r < s.rows; r++)
        UNROLL
        for (int v = 0; v < s.wide; v++) {
            const __m512i zeros = minus_zeros(s.plain, t, v, sums[3 * r]);
            sum[r * s.wide + v] = _mm512_add_epi32(sum[r * s.wide + v], zeros);
            __asm__("" : "+v"(sum[r * s.wide + v])); /* in one register from here on: gcc uses two otherwise */
        }
}

/* y += the sums times their scales. highest: the third plane's sums, or NULL. */
INLINE void add_scaled(shape s, const tile *t, const __m512i *sum, const __m512 *highest)
{
    const float *scales = t->input->scales + t->group * t->input->rows + t->row;
    UNROLL
    for (int v = 0; v < s.wide; v++) {
        const __m512 weight_scale = weight_scales(s.plain, t, v);
        UNROLL
        for (int r = 0; r < s.rows; r++) {
            float *to = t->y + r * t->stride + 16 * v;
            __m512 c = _mm512_cvtepi32_ps(sum[r * s.wide + v]);
            if (highest)
                c = _mm512_fmadd_ps(highest[r * s.wide + v], _mm512_set1_ps(65536), c);
            const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(scales[r]), weight_scale);
            _mm512_mask_storeu_ps(to, t->mask[v], _mm512_fmadd_ps(c, scale, _mm512_maskz_loadu_ps(t->mask[v], to)));
        }
    }
}

#endif
