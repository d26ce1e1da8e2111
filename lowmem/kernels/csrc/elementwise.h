/* What a decoder layer does beside its products: norms and activations. */
#ifndef LOWMEM_ELEMENTWISE_H
#define LOWMEM_ELEMENTWISE_H

#include <stdint.h>

/* Of a whole model, from its config. */
enum { LM_GELU = 0, LM_GELU_TANH = 1 };

/* sum = x + y (y may be NULL), and the layer norm of it times weight plus bias (bfloat16): columns first..last-1 of both,
 * of a row of `size` values, a multiple of 16. sum must not be x. Every call sums the row in the same order. */
void lm_add_norm(const float *x, const float *y, int64_t size, const uint16_t *weight, const uint16_t *bias, float epsilon,
                 int64_t first, int64_t last, float *sum, float *normal);
/* In place; errors up to 2e-7 of |x|. */
void lm_activate(int activation, float *x, int64_t count);

#endif
