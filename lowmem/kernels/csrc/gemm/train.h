/* One step of training the integers of a weight by the gradient of a loss. convert/stages/integers.py describes the method,
 * and is the same in torch.
 *
 * Matrices are transposed, [inputs, out]. A weight's hidden value is its integer (less the zero-point) plus a fraction in
 * units of 2^-16; the integer is the hidden value rounded. */
#ifndef LOWMEM_TRAIN_H
#define LOWMEM_TRAIN_H

#include "lowmem.h"

typedef struct {
    int64_t inputs, width, out; /* width: inputs of a group, a divisor of `inputs`; out: a multiple of 16 */
    const void *slope;          /* [inputs, out]: the loss's gradient for the weight, contiguous */
    int8_t *z;                  /* [inputs, out], changed */
    int16_t *fraction;          /* [inputs, out], changed */
    const float *scales;        /* [inputs / width, out] */
    const uint8_t *zeros;       /* [inputs / width, out] */
    float *scale_slope;         /* [inputs / width, out], result: the gradient for the scales, before the step */
    float *rows, *columns;      /* [inputs], [out]: running mean squares of the gradient for z, changed */
    float keep;                 /* the share of the running means that stays; 0 in the first step */
    float rate;                 /* the step where the gradient has its usual size, in steps of the grid */
    float most;                 /* the largest step, in units of `rate` */
    int32_t maxq, slope_type;   /* LM_F32 or LM_BF16 */
} lm_train;

/* Bytes of workspace that a job needs. */
LM_EXPORT size_t lm_train_workspace(const lm_train *job);
LM_EXPORT void lm_train_run(const lm_train *job, void *workspace);

#endif
