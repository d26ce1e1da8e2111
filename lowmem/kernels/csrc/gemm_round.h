/* Rounding one column block of a weight: GPTQ inside the block, the grids of its groups, and a second look at the
 * integers (convert/math/gptq.py tells the method; convert/groups.py is the same in torch).
 *
 * Everything lies transposed: a row is one column of the weight, and neighbouring floats are neighbouring outputs,
 * which know nothing of each other. With H = R R^T, the block's own part of R in `r`, and E = W - Q, the squared error
 * that a group adds is |V|^2, V = T - s R^T z, where T = R^T W + what earlier columns ask for, z are the integers less
 * the zero-point and s is the scale. */
#ifndef LOWMEM_GEMM_ROUND_H
#define LOWMEM_GEMM_ROUND_H

#include "lowmem.h"

enum { LM_ROUND_MOST = 256, LM_RANGES_MOST = 16 };

typedef struct {
    int64_t columns, width; /* of the block, at most LM_ROUND_MOST; of a group: divides `columns`, or is `columns` */
    int64_t out;
    float *error;    /* [columns, out] W, and then W - Q */
    float *residual; /* [columns, out] what earlier columns ask for, and then V */
    const float *r;  /* [columns, columns] with r_row between rows: on and above the diagonal */
    uint8_t *codes;  /* [columns, out] */
    float *scales, *zeros; /* [columns / width, out]; given where search is 0 */
    int64_t error_row, residual_row, r_row, codes_row, grid_row;
    float ranges[LM_RANGES_MOST]; /* tried, as shares of the range that leaves no weight out */
    int32_t ranges_count;
    int32_t maxq, sym;
    int32_t search; /* 0: the grids are given. 1: by what they leave of each weight. 2: by what GPTQ leaves. */
    int32_t passes; /* of coordinate descent inside a group, where search is 2 */
} lm_round;

/* Bytes of workspace with the threads that are set. */
LM_EXPORT size_t lm_round_workspace(void);
LM_EXPORT void lm_round_run(const lm_round *job, void *workspace);

/* ---- what an instruction set gives --------------------------------------------------------------------------- */

enum { LM_SLAB = 64 }; /* outputs that are worked on at a time */

/* What all slabs of a block share. */
typedef struct {
    lm_round job;
    float *turned;  /* [columns, columns]: turned[j * columns + i] = R[i, j] */
    float *metric;  /* [columns, width]: a group's own R R^T */
    char *threads;  /* of each thread: LM_ROUND_BUFFERS matrices [columns, LM_SLAB] */
} lm_round_shared;

enum { LM_ROUND_BUFFERS = 6 };

typedef void lm_round_slab(const lm_round_shared *shared, float *buffers, int64_t first);
extern lm_round_slab lm_round_portable;
#if defined(__x86_64__)
extern lm_round_slab lm_round_avx2, lm_round_avx512;
#endif

#endif
