/* Rounding one column block of a weight: GPTQ inside the block, the grids of its groups, and coordinate descent on the
 * integers. convert/math/gptq.py describes the method; convert/math/rounding.py is the same in torch.
 *
 * Matrices are transposed: a row is one column of the weight, and neighbouring floats belong to neighbouring outputs, which
 * are independent. With H = R R^T, the block's own part of R in `r`, and E = W - Q, the squared error that a group adds is
 * |V|^2, V = T - s R^T z. T is R^T W plus the correction that earlier columns require, z are the integers less the
 * zero-point, and s is the scale. */
#ifndef LOWMEM_ROUND_H
#define LOWMEM_ROUND_H

#include "lowmem.h"

enum { LM_ROUND_MOST = 256, LM_RANGES_MOST = 16 };

typedef struct {
    int64_t columns, width; /* of the block, at most LM_ROUND_MOST; of a group, a divisor of `columns` */
    int64_t out;
    float *error;           /* [columns, out]: W, replaced by W - Q */
    float *residual;        /* [columns, out]: the correction that earlier columns require, replaced by V */
    const float *r;         /* [columns, columns]: read on and above the diagonal */
    uint8_t *codes;         /* [columns, out], result */
    float *scales, *zeros;  /* [columns / width, out], results; inputs if search is 0 */
    int64_t error_row, residual_row, r_row, codes_row, grid_row; /* strides */
    float ranges[LM_RANGES_MOST]; /* to try, as shares of the range that contains all weights */
    int32_t ranges_count;
    int32_t maxq, sym;
    int32_t search; /* 0: grids are given. 1: minimize each weight's own error. 2: minimize GPTQ's error. */
    int32_t passes; /* of coordinate descent inside a group, if search is 2 */
} lm_round;

/* Bytes of workspace with the present number of threads. */
LM_EXPORT size_t lm_round_workspace(void);
LM_EXPORT void lm_round_run(const lm_round *job, void *workspace);

#endif
