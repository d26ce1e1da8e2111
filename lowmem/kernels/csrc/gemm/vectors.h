/* Vectors of floats for the code that all instruction sets share. Their files define TARGET, their function attribute, and
 * LANES, the floats in a vector, before they include it. */
#ifndef LOWMEM_VECTORS_H
#define LOWMEM_VECTORS_H

#include <stdint.h>

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

#define INLINE TARGET static inline __attribute__((always_inline))

INLINE vec all_of(float x) { return x - (vec){0}; }

INLINE vec pick(ivec where, vec yes, vec no) { return (vec)((where & (ivec)yes) | (~where & (ivec)no)); }
INLINE vec smaller(vec a, vec b) { return pick(a < b, a, b); }
INLINE vec larger(vec a, vec b) { return pick(a > b, a, b); }

/* To nearest, ties to even, for |x| < 2^22. */
INLINE vec rounded(vec x) { return (x + all_of(12582912.0f)) - all_of(12582912.0f); }

#endif
