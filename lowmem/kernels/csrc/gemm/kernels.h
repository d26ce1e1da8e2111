/* What an instruction set provides for matrix products, rounding and training. */
#ifndef LOWMEM_GEMM_KERNELS_H
#define LOWMEM_GEMM_KERNELS_H

#include "gemm.h"
#include "round.h"
#include "train.h"

/* ---- products ------------------------------------------------------------------------------------------------ */

/* A panel of a factor: a matrix of `rows` rows (of a), or columns (of b), that is packed as [words][width]. A word is a
 * float32, or two bfloat16 of neighbouring k. */
typedef struct {
    int64_t words;       /* of k */
    int64_t k;           /* values of k: words or 2 words, the last word perhaps half full */
    const void *source;  /* the first row at the first k */
    int64_t row, column; /* strides over rows and over k */
    int32_t type;
    int32_t rows;
    int32_t width; /* of a packed panel: rows past `rows` are zero */
} lm_panel;

typedef struct {
    const char *name;
    int32_t rows, columns; /* of a tile */
    int32_t pairs;         /* whether a word is two bfloat16 */
    void (*pack)(const lm_panel *panel, void *into);
    /* c[i * c_row + j] += alpha * (a b)[i, j] for the whole tile. */
    void (*tile)(int64_t words, const void *a, const void *b, float *c, int64_t c_row, float alpha);
} lm_gemm_kernels;

enum { LM_GEMM_TILE = 12 * 32 }; /* rows * columns of a tile, at most */

extern const lm_gemm_kernels lm_gemm_portable;
#if defined(__x86_64__)
extern const lm_gemm_kernels lm_gemm_avx2, lm_gemm_avx512, lm_gemm_avx512_bf16;
#elif defined(__aarch64__)
extern const lm_gemm_kernels lm_gemm_neon;
#endif

/* ---- rounding ------------------------------------------------------------------------------------------------ */

enum {
    LM_SLAB = 64,        /* outputs that are rounded at a time */
    LM_ROUND_BUFFERS = 6 /* matrices [columns, LM_SLAB] of each thread */
};

/* What all slabs of a block share. */
typedef struct {
    lm_round job;
    float *turned; /* [columns, columns]: turned[j * columns + i] = R[i, j] */
    float *metric; /* [columns, width]: R R^T of each group */
} lm_round_shared;

/* Round the outputs first..first + LM_SLAB - 1, or those left. buffers: LM_ROUND_BUFFERS matrices. */
typedef void lm_round_slab(const lm_round_shared *shared, float *buffers, int64_t first);
extern lm_round_slab lm_round_portable;
#if defined(__x86_64__)
extern lm_round_slab lm_round_avx2, lm_round_avx512;
#elif defined(__aarch64__)
extern lm_round_slab lm_round_neon;
#endif

/* ---- training ------------------------------------------------------------------------------------------------ */

/* What all units of a step share. */
typedef struct {
    lm_train job;
    int64_t unit;          /* rows of a unit: whole groups */
    float *sums;           /* [units, out]: squared gradients, summed over the unit's rows */
    float *row_factors;    /* [inputs] */
    float *column_factors; /* [out]: the gradient for z times both is about 1 */
} lm_train_shared;

typedef struct {
    void (*measure)(const lm_train_shared *shared, int64_t unit);
    void (*move)(const lm_train_shared *shared, int64_t unit);
} lm_train_kernels;

extern const lm_train_kernels lm_train_portable;
#if defined(__x86_64__)
extern const lm_train_kernels lm_train_avx2, lm_train_avx512;
#endif

#endif
