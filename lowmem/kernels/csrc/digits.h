/* What the makers of digits have in common: the scale of a group, and the walk over groups and rows. */
#ifndef LOWMEM_DIGITS_H
#define LOWMEM_DIGITS_H

#include <float.h>

#include "lowmem.h"

/* The largest integer of so many planes. With LM_PAIRED a lower digit moves the second of a pair by up to 16 * 128, and an
 * upper digit must still hold the rest. */
static inline int32_t lm_limit(int planes)
{
    return planes == 1 ? 127 : planes == 2 ? 32639 : planes == 3 ? 8355711 : 30448;
}

/* limit / a, or 0 where nothing is there, or nothing that can be scaled: the scale, a / limit, says what it was. */
static inline float lm_inverse(float a, int32_t limit)
{
    const float inverse = (float)limit / a;
    return inverse <= FLT_MAX ? inverse : 0;
}

/* Rows are taken a few at a time, their groups one after the other: whole pages of activations are then read in turn, and
 * whole ones of digits written. */
enum { LM_ROWS_AT_ONCE = 8 };

/* NAME_type_planes for every type and every `planes`, made of quantize_group, and NAME, which chooses; `digit` is the
 * type of a digit, and count(width, planes) how many there are of so many inputs. */
#define LM_QUANTIZE(target, name, digit, count, type, planes)                                                          \
    target static void name##_##type##_##planes(const void *x, int64_t stride, lm_input *input, int64_t first,         \
                                                int64_t last)                                                          \
    {                                                                                                                  \
        const int64_t width = input->group, rows = input->rows;                                                        \
        for (int64_t begin = 0; begin < rows; begin += LM_ROWS_AT_ONCE)                                                \
            for (int64_t g = first; g < last; g++)                                                                     \
                for (int64_t r = begin; r < begin + LM_ROWS_AT_ONCE && r < rows; r++) {                                \
                    const int64_t index = g * rows + r;                                                                \
                    quantize_group(x, type, r * stride + g * width, (int)width, input->bits, planes,                   \
                                   (digit *)input->digits + count(index * width, planes), input->scales + index,      \
                                   input->sums + 3 * index);                                                           \
                }                                                                                                      \
    }
#define LM_QUANTIZE_TYPE(target, name, digit, count, type)                                                             \
    LM_QUANTIZE(target, name, digit, count, type, 1)                                                                   \
    LM_QUANTIZE(target, name, digit, count, type, 2) LM_QUANTIZE(target, name, digit, count, type, 3)                  \
    LM_QUANTIZE(target, name, digit, count, type, 4)
#define LM_QUANTIZE_ALL(target, name, digit, count)                                                                    \
    LM_QUANTIZE_TYPE(target, name, digit, count, 0)                                                                    \
    LM_QUANTIZE_TYPE(target, name, digit, count, 1) LM_QUANTIZE_TYPE(target, name, digit, count, 2)                    \
    void name(const void *x, int x_type, int64_t stride, lm_input *input, int64_t first, int64_t last)                 \
    {                                                                                                                  \
        typedef void (*kernel)(const void *, int64_t, lm_input *, int64_t, int64_t);                                   \
        static const kernel kernels[3][4] = {{name##_0_1, name##_0_2, name##_0_3, name##_0_4},                         \
                                             {name##_1_1, name##_1_2, name##_1_3, name##_1_4},                         \
                                             {name##_2_1, name##_2_2, name##_2_3, name##_2_4}};                        \
        kernels[x_type][input->planes - 1](x, stride, input, first, last);                                             \
    }

#endif
