/* Norms, rotations and activations in vectors of 8 floats, with the same bits on every machine: in plain C, and compiled for AVX2. */
#include "kernels.h"
#include "types.h"

#include <math.h>

#define INLINE static inline __attribute__((always_inline))

typedef float vector __attribute__((vector_size(32)));
typedef int32_t integers __attribute__((vector_size(32)));
typedef uint32_t bits __attribute__((vector_size(32))); /* where sums may wrap */
typedef float unaligned __attribute__((vector_size(32), aligned(4), may_alias));

enum { WIDTH = 8 };

#define LOAD(from) ((vector) * (const unaligned *)(from))
#define STORE(to, value) (*(unaligned *)(to) = (unaligned)(value))
#define ALL(value) ((value) - (vector){0})
#define SELECT(mask, yes, no) ((vector)(((integers)(yes) & (mask)) | ((integers)(no) & ~(mask))))

/* ---- norm ---------------------------------------------------------------------------------------------------- */

#define TERM(i) (y ? LOAD(x + (i)) + LOAD(y + (i)) * row->scale : LOAD(x + (i)))

/* Vectors are passed by address: the convention for passing them by value depends on the instruction set. */
INLINE float sum_of(const vector *x, const vector *y)
{
    const vector a = *x + *y;
    return ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]));
}

INLINE float mean_of(const lm_residual *row)
{
    const float *x = row->x, *y = row->y;
    vector a = {0}, b = {0};
    for (int64_t i = 0; i < row->size; i += 2 * WIDTH) {
        a += TERM(i);
        b += TERM(i + WIDTH);
    }
    return sum_of(&a, &b) / (float)row->size;
}

/* What a row less `mean` is multiplied by. */
INLINE float norm_scale(const lm_residual *row, float mean)
{
    const float *x = row->x, *y = row->y;
    vector a = {0}, b = {0};
    for (int64_t i = 0; i < row->size; i += 2 * WIDTH) {
        vector c = TERM(i) - mean, d = TERM(i + WIDTH) - mean;
        a += c * c;
        b += d * d;
    }
    return 1 / sqrtf(sum_of(&a, &b) / (float)row->size + row->norm->epsilon);
}

INLINE void add_norm(const lm_residual *row, int64_t first, int64_t last)
{
    const float *x = row->x, *y = row->y, y_scale = row->scale;
    const uint16_t *weight = row->norm->weight, *bias = row->norm->bias;
    float *sum = row->sum, *normal = row->normal;
    const float mean = row->norm->centred ? mean_of(row) : 0, scale = norm_scale(row, mean);
    for (int64_t i = first; i < last; i++) {
        float value = y ? x[i] + y[i] * y_scale : x[i];
        sum[i] = value;
        normal[i] = (value - mean) * scale * lm_from_bf16(weight[i]);
    }
    for (int64_t i = first; bias && i < last; i++)
        normal[i] += lm_from_bf16(bias[i]);
}

/* ---- rotation ------------------------------------------------------------------------------------------------ */

INLINE void turn(const lm_turn *head)
{
    const lm_norm *norm = head->norm;
    float *x = head->x;
    if (norm->weight) {
        const lm_residual row = {.x = x, .size = head->size, .norm = norm};
        const float mean = norm->centred ? mean_of(&row) : 0, scale = norm_scale(&row, mean);
        for (int64_t i = 0; i < head->size; i++)
            x[i] = (x[i] - mean) * scale * lm_from_bf16(norm->weight[i]) + (norm->bias ? lm_from_bf16(norm->bias[i]) : 0);
    }
    for (int64_t i = 0; i < head->half; i += WIDTH) {
        const vector a = LOAD(x + i), b = LOAD(x + head->half + i), c = LOAD(head->cosines + i), s = LOAD(head->sines + i);
        STORE(x + i, a * c - b * s);
        STORE(x + head->half + i, b * c + a * s);
    }
}

/* ---- activations --------------------------------------------------------------------------------------------- */

#include "exp2.h"

/* x Phi(x). erfc as in Abramowitz and Stegun, 7.1.26, of |x|, so that the left tail is accurate. */
INLINE void gelu(vector *x)
{
    const vector z = (vector)((integers)*x & 0x7fffffff) * 0.70710678f, t = 1 / (1 + z * 0.3275911f);
    vector p = t * 1.061405429f - 1.453152027f, e = z * z * -1.44269504f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    exp2_of(&e);
    const vector tail = *x * 0.5f * (p * t * e);
    *x = SELECT(*x > 0, *x - tail, tail);
}

/* x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3): 0.5 x (1 + tanh u) without cancellation. */
INLINE void gelu_tanh(vector *x)
{
    const vector u = (*x + *x * *x * *x * 0.044715f) * (2 * 0.79788456f * 1.44269504f);
    vector e = (vector)((integers)u | INT32_MIN); /* -|2u|, in powers of two */
    exp2_of(&e);
    *x = SELECT(u > 0, *x, *x * e) / (1 + e);
}

/* x / (1 + e^-x). */
INLINE void silu(vector *x)
{
    vector e = (vector)((integers)*x | INT32_MIN) * 1.44269504f;
    exp2_of(&e);
    *x = SELECT(*x > 0, *x, *x * e) / (1 + e);
}

INLINE void activate_vector(int activation, vector *x)
{
    if (activation == LM_GELU)
        gelu(x);
    else if (activation == LM_GELU_TANH)
        gelu_tanh(x);
    else
        silu(x);
}

/* At most a vector. */
INLINE void activate_bytes(int activation, float *x, const float *by, size_t bytes)
{
    vector v = {0}, factor = ALL(1.0f);
    memcpy(&v, x, bytes);
    if (by)
        memcpy(&factor, by, bytes);
    activate_vector(activation, &v);
    v *= factor;
    memcpy(x, &v, bytes);
}

INLINE void activate(int activation, float *x, const float *by, int64_t count)
{
    int64_t i = 0;
    for (; i + WIDTH <= count; i += WIDTH)
        activate_bytes(activation, x + i, by ? by + i : NULL, WIDTH * sizeof(float));
    activate_bytes(activation, x + i, by ? by + i : NULL, (size_t)(count - i) * sizeof(float));
}

/* ---- instruction sets ---------------------------------------------------------------------------------------- */

#define KERNELS(set, target)                                                                                           \
    target static void add_norm_##set(const lm_residual *row, int64_t first, int64_t last) { add_norm(row, first, last); } \
    target static void turn_##set(const lm_turn *head) { turn(head); }                                                 \
    target static void activate_##set(int activation, float *x, const float *by, int64_t count)                       \
    {                                                                                                                  \
        activate(activation, x, by, count);                                                                            \
    }                                                                                                                  \
    const lm_elementwise_kernels lm_elementwise_##set = {add_norm_##set, turn_##set, activate_##set};

KERNELS(portable, )
#if defined(__x86_64__)
KERNELS(avx2, __attribute__((target("avx2"))))
#endif
