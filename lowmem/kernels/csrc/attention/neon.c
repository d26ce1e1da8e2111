/* Attention with NEON, in float32. */
#if defined(__aarch64__)
#include <arm_neon.h>

#define TARGET
#define WIDTH 4
#define WIDE 4
#define ITEMS 4
#define PAIRS 1
#define MULTIPLY_ADD(sum, x, w) ((vector)vfmaq_n_f32((float32x4_t)(sum), (float32x4_t)(w), lm_from_bits(x)))
#include "kernel.h"

const lm_attention_kernels lm_attention_neon = {0, chunk, merge};
#endif
