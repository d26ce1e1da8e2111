/* Attention in plain C. */
#define TARGET
#define WIDTH 4
#define WIDE 2
#define ITEMS 4
#define PAIRS 1
#define MULTIPLY_ADD(sum, x, w) ((sum) + lm_from_bits(x) * (w))
#include "kernel.h"

const lm_attention_kernels lm_attention_portable = {0, chunk, merge};
