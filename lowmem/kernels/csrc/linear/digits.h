/* Quantizing activations: what all instruction sets share. */
#ifndef LOWMEM_DIGITS_H
#define LOWMEM_DIGITS_H

#include <float.h>

#include "kernels.h"

/* The largest integer with `planes` planes. With LM_PAIRED the shared digit moves the second of a pair by up to 16 * 128,
 * and its upper digit must still hold the rest. */
static inline int32_t lm_limit(int planes)
{
    return planes == 1 ? 127 : planes == 2 ? 32639 : planes == 3 ? 8355711 : 30448;
}

/* limit / a; 0 if that is not finite. The scale, a / limit, is 0 or not finite then as well. */
static inline float lm_inverse(float a, int32_t limit)
{
    const float inverse = (float)limit / a;
    return inverse <= FLT_MAX ? inverse : 0;
}

/* One group of inputs of one row. */
typedef struct {
    const void *x; /* the group begins at value `at` */
    int64_t at;
    int width;     /* inputs */
    int bits;      /* of the weight */
    void *digits;  /* destinations */
    float *scale;
    int32_t *sums;
} lm_digit_group;

/* Rows are taken a few at a time, with their groups in order: activations are then read, and digits written, in whole
 * pages. */
enum { LM_ROWS_AT_ONCE = 8 };

/* Define an instruction set's functions lm_digit_bytes_SET and lm_quantize_SET: LM_QUANTIZE_ALL(set, target, bytes). The
 * file has defined quantize_group(type, planes, group), which is compiled for every type and every `planes`;
 * bytes(inputs, planes) is the size of the digits of `inputs` inputs. */
#define LM_QUANTIZE(target, bytes, type, planes)                                                                       \
    target static void quantize_##type##_##planes(const lm_matrix *x, lm_input *input, int64_t first, int64_t last)    \
    {                                                                                                                  \
        const int64_t width = input->group, rows = input->rows;                                                        \
        for (int64_t begin = 0; begin < rows; begin += LM_ROWS_AT_ONCE)                                                \
            for (int64_t g = first; g < last; g++)                                                                     \
                for (int64_t r = begin; r < begin + LM_ROWS_AT_ONCE && r < rows; r++) {                                \
                    const int64_t index = g * rows + r;                                                                \
                    const lm_digit_group group = {x->values, r * x->stride + g * width, (int)width, input->bits,       \
                                                  (char *)input->digits + bytes(index * width, planes),                \
                                                  input->scales + index, input->sums + 3 * index};                     \
                    quantize_group(type, planes, &group);                                                              \
                }                                                                                                      \
    }
#define LM_QUANTIZE_TYPE(target, bytes, type)                                                                          \
    LM_QUANTIZE(target, bytes, type, 1)                                                                                \
    LM_QUANTIZE(target, bytes, type, 2) LM_QUANTIZE(target, bytes, type, 3) LM_QUANTIZE(target, bytes, type, 4)
#define LM_QUANTIZE_ALL(set, target, bytes)                                                                            \
    LM_QUANTIZE_TYPE(target, bytes, 0) LM_QUANTIZE_TYPE(target, bytes, 1) LM_QUANTIZE_TYPE(target, bytes, 2)           \
    size_t lm_digit_bytes_##set(int64_t rows, int64_t in, int planes) { return (size_t)bytes(rows * in, planes); }     \
    void lm_quantize_##set(const lm_matrix *x, lm_input *input, int64_t first, int64_t last)                           \
    {                                                                                                                  \
        typedef void (*kernel)(const lm_matrix *, lm_input *, int64_t, int64_t);                                       \
        static const kernel kernels[3][4] = {{quantize_0_1, quantize_0_2, quantize_0_3, quantize_0_4},                 \
                                             {quantize_1_1, quantize_1_2, quantize_1_3, quantize_1_4},                 \
                                             {quantize_2_1, quantize_2_2, quantize_2_3, quantize_2_4}};                \
        kernels[x->type][input->planes - 1](x, input, first, last);                                                    \
    }

#endif
