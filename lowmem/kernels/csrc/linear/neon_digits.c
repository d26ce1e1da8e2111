/* Activations as bytes, for the NEON kernels.
 *
 * The layout is [group][row][plane][step][4 bytes]: a step is the four inputs of one output that a dot-product instruction
 * takes. With LM_PAIRED the upper digits come first, then the lower ones, a digit for two inputs. Which four inputs of a
 * unit form step s follows from how GPTQ's words unpack (neon_weights.h):
 *
 *   8 bits      inputs 4s, 4s+1, 4s+2, 4s+3: the word unchanged
 *   3, 4 bits   of 8 inputs the even ones, then the odd ones
 *   2 bits      of 16 inputs j, j+4, j+8, j+12 for j = 0..3
 *   5 to 7      inputs s, s+16, s+8, s+24: the bytes of four rows of words, transposed
 */
#if defined(__aarch64__)
#define TARGET
#include "digits.h"
#include "neon.h"

#define ODD_EVEN(k) k, k + 2, k + 4, k + 6, k + 1, k + 3, k + 5, k + 7
#define FOUR(k) k, k + 4, k + 8, k + 12
#define FOURS(k) FOUR(k), FOUR(k + 1), FOUR(k + 2), FOUR(k + 3)
#define TURNED(k) k, k + 16, k + 8, k + 24, k + 1, k + 17, k + 9, k + 25

static const uint8_t eights[UNIT] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                     16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
static const uint8_t odd_even[UNIT] = {ODD_EVEN(0), ODD_EVEN(8), ODD_EVEN(16), ODD_EVEN(24)};
static const uint8_t fours[UNIT] = {FOURS(0), FOURS(16)};
static const uint8_t turned[UNIT] = {TURNED(0), TURNED(2), TURNED(4), TURNED(6)};

/* Which input of a unit each byte of its steps belongs to. */
static const uint8_t *step_order(int bits)
{
    return bits == 8 ? eights : bits == 2 ? fours : IS_PLANAR(bits) ? turned : odd_even;
}

/* Which pair of a unit's inputs each byte of its pairs belongs to: those of a step and of the step after it. */
static const uint8_t *pair_order(int bits)
{
    static const uint8_t twos[UNIT / 2] = {0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15};
    return bits == 2 ? twos : eights;
}

/* 16 integers, their lowest bytes. */
INLINE int8x16_t low_bytes(const int32x4_t q[4])
{
    const int16x8_t first = vuzp1q_s16(vreinterpretq_s16_s32(q[0]), vreinterpretq_s16_s32(q[1]));
    const int16x8_t second = vuzp1q_s16(vreinterpretq_s16_s32(q[2]), vreinterpretq_s16_s32(q[3]));
    return vuzp1q_s8(vreinterpretq_s8_s16(first), vreinterpretq_s8_s16(second));
}

/* Write the lowest bytes of a unit's integers in the order of its steps. */
INLINE void put_steps(const int32x4_t q[8], const uint8_t *order, uint8_t *to)
{
    const int8x16x2_t bytes = {{low_bytes(q), low_bytes(q + 4)}};
    vst1q_s8((int8_t *)to, vqtbl2q_s8(bytes, vld1q_u8(order)));
    vst1q_s8((int8_t *)to + 16, vqtbl2q_s8(bytes, vld1q_u8(order + 16)));
}

/* What is above the lowest balanced digit. */
INLINE int32x4_t above_digit(int32x4_t q) { return vshrq_n_s32(vaddq_s32(q, vdupq_n_s32(128)), 8); }

INLINE int32x4_t low_digit(int32x4_t q) { return vshrq_n_s32(vshlq_n_s32(q, 24), 24); }

/* Bring 8 integers into LM_PAIRED's form (linear.h), as upper digits. lower: those of the pairs. Returns the sum of the
 * integers, in four parts. */
INLINE int32x4_t pair_digits(int32x4_t q[2], int32x4_t *lower)
{
    const int32x4_t eight = vdupq_n_s32(8), fifteen = vdupq_n_s32(15);
    int32x4_t even = vuzp1q_s32(q[0], q[1]), odd = vuzp2q_s32(q[0], q[1]);
    const int32x4_t sixteenths = vshrq_n_s32(vaddq_s32(odd, eight), 4), rest = vandq_s32(sixteenths, fifteen);
    even = vaddq_s32(rest, vbicq_s32(vaddq_s32(vsubq_s32(even, rest), eight), fifteen));
    odd = vshlq_n_s32(sixteenths, 4);
    const int32x4_t total = vaddq_s32(even, odd), digit = low_digit(even);
    even = vshrq_n_s32(vsubq_s32(even, digit), 8);
    odd = vshrq_n_s32(vsubq_s32(odd, vshlq_n_s32(digit, 4)), 8);
    q[0] = vzip1q_s32(even, odd);
    q[1] = vzip2q_s32(even, odd);
    *lower = digit;
    return total;
}

/* To nearest, ties to even. NaN becomes the lowest integer, as x86 converts it. */
INLINE int32x4_t rounded(float32x4_t v, int32_t limit)
{
    const int32x4_t low = vdupq_n_s32(-limit), q = vminq_s32(vmaxq_s32(vcvtnq_s32_f32(v), low), vdupq_n_s32(limit));
    return vbslq_s32(vceqq_f32(v, v), q, low);
}

/* The largest magnitude of a group, as bits: NaN > infinity > finite numbers. */
INLINE uint32_t largest(int type, const lm_digit_group *g)
{
    uint32x4_t most = vdupq_n_u32(0);
    for (int k = 0; k < g->width; k += 4) {
        const uint32x4_t bits = vreinterpretq_u32_f32(load_4(g->x, type, g->at + k));
        most = vmaxq_u32(most, vandq_u32(bits, vdupq_n_u32(0x7fffffff)));
    }
    return vmaxvq_u32(most);
}

INLINE void quantize_group(int type, int planes, const lm_digit_group *g)
{
    const int32_t limit = lm_limit(planes);
    const int width = g->width;
    const uint8_t *order = step_order(g->bits);
    uint8_t *digits = g->digits;
    const float a = lm_from_bits(largest(type, g)), inverse = lm_inverse(a, limit);
    *g->scale = a / (float)limit;
    int32x4_t low = vdupq_n_s32(0), shared = low, highest = low;
    for (int k = 0; k < width; k += UNIT) {
        int32x4_t q[8];
        for (int i = 0; i < 8; i++)
            q[i] = rounded(vmulq_n_f32(load_4(g->x, type, g->at + k + 4 * i), inverse), limit);
        if (planes == LM_PAIRED) {
            int32x4_t lower[4];
            for (int i = 0; i < 4; i++) {
                low = vaddq_s32(low, pair_digits(q + 2 * i, lower + i));
                shared = vaddq_s32(shared, lower[i]);
            }
            put_steps(q, order, digits + k);
            vst1q_s8((int8_t *)digits + width + k / 2, vqtbl1q_s8(low_bytes(lower), vld1q_u8(pair_order(g->bits))));
            continue;
        }
        for (int i = 0; i < 8; i++)
            low = vaddq_s32(low, q[i]);
        for (int plane = 0; plane < planes; plane++) {
            put_steps(q, order, digits + plane * width + k);
            for (int i = 0; i < 8; i++)
                q[i] = above_digit(q[i]);
            if (plane == 1)
                for (int i = 0; planes == 3 && i < 8; i++) {
                    highest = vaddq_s32(highest, q[i]);
                    low = vsubq_s32(low, vshlq_n_s32(q[i], 16));
                }
        }
    }
    g->sums[SUM_LOW] = vaddvq_s32(low);
    g->sums[SUM_SHARED] = vaddvq_s32(shared);
    g->sums[SUM_HIGHEST] = vaddvq_s32(highest);
}

LM_QUANTIZE_ALL(neon, , DIGIT_BYTES)

#endif
