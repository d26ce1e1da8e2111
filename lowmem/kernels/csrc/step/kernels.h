/* What an instruction set provides for a decode step beside its products: norms, rotations and activations. */
#ifndef LOWMEM_STEP_KERNELS_H
#define LOWMEM_STEP_KERNELS_H

#include "step.h"

/* A residual addition and the norm of its result, for one row. */
typedef struct {
    const float *x, *y; /* [size]; y may be NULL */
    float scale;        /* of y */
    int64_t size;       /* a multiple of 16 */
    const lm_norm *norm;
    float *sum, *normal; /* results [size]: x + scale y, which must not be x, and its norm times weight plus bias */
} lm_residual;

/* A query or a key of one head. */
typedef struct {
    float *x;            /* [size] */
    int64_t size;        /* a multiple of 16 */
    const lm_norm *norm; /* without a weight: none */
    int64_t half;        /* i < half turns with i + half; 0: no rotation */
    const float *cosines, *sines; /* [half] */
} lm_turn;

typedef struct {
    /* Columns first..last-1 of both results. Every call sums the row in the same order. */
    void (*add_norm)(const lm_residual *row, int64_t first, int64_t last);
    /* In place: its norm, then its rotation. */
    void (*turn)(const lm_turn *head);
    /* In place, one of LM_GELU and its kin, then times `by`, which may be NULL. An activation's error is at most 2e-7 of |x|. */
    void (*activate)(int activation, float *x, const float *by, int64_t count);
} lm_elementwise_kernels;

extern const lm_elementwise_kernels lm_elementwise_portable;
#if defined(__x86_64__)
extern const lm_elementwise_kernels lm_elementwise_avx2;
#endif

#endif
