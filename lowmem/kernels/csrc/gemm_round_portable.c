/* Column blocks in plain C, in vectors of 16 bytes, which every CPU of today has. */
#define TARGET
#define LANES 4
#define FMA(a, b, c) ((a) * (b) + (c))
#define NAME lm_round_portable
#include "gemm_round_slab.h"
