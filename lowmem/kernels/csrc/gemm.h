/* Large matrix products for the converter (gemm.c), in float32 or of bfloat16 factors summed in float32.
 *
 * What a BLAS would do, but for three things: a factor may be stored in either type and is brought to the
 * arithmetic's while it is packed; only the upper triangle of a result may be wanted; and nothing is copied
 * that lies transposed. A result does not depend on the number of threads, but on the instruction set: sums of
 * floats are not associative. lm_gemm_name says which one computes.
 */
#ifndef LOWMEM_GEMM_H
#define LOWMEM_GEMM_H

#include "lowmem.h"

/* c[i * c_row + j] += alpha * sum_k a[i * a_row + k * a_column] * b[k * b_row + j * b_column], i < m, j < n.
 * Types are LM_F32 or LM_BF16; strides count values. c may not overlap a or b. */
typedef struct {
    int64_t m, n, k;
    const void *a, *b;
    int64_t a_row, a_column, b_row, b_column;
    float *c;
    int64_t c_row;
    float alpha;
    int32_t a_type, b_type;
    int32_t upper; /* only elements with i <= j are computed and written */
    int32_t bf16;  /* factors may be rounded to bfloat16 (they are where the CPU gains by it) */
} lm_gemm;

/* Bytes of workspace, with the threads that are set. */
LM_EXPORT size_t lm_gemm_workspace(void);
/* workspace: 64-byte aligned, or with 64 bytes to spare. */
LM_EXPORT void lm_gemm_run(const lm_gemm *job, void *workspace);
/* "AVX-512 BF16", "AVX-512", "AVX2" or "portable C"; lm_gemm_use chooses another for tests, 0 when this CPU cannot. */
LM_EXPORT const char *lm_gemm_name(void);
LM_EXPORT int lm_gemm_use(const char *name);

/* The upper triangle of a square matrix times `scale`, and its mirror image below (gemm_layout.c). */
LM_EXPORT void lm_mirror(float *matrix, int64_t n, int64_t row, float scale);
/* matrix[order][:, order] in place; workspace: n floats. order: a permutation of 0..n-1. */
LM_EXPORT void lm_permute(float *matrix, int64_t n, int64_t row, const int64_t *order, void *workspace);

/* ---- what an instruction set gives --------------------------------------------------------------------------- */

/* A panel holds, for each word of k, one word for each of its rows (or columns): a float32, or two bfloat16 of
 * neighbouring k. Rows beyond the matrix are zero. */
typedef struct {
    int64_t words;       /* of k */
    int64_t k;           /* values: words, or 2 words, the last one perhaps half */
    const void *source;  /* of the first row and k */
    int64_t row, column; /* strides over rows and over k */
    int32_t type;
    int32_t rows;        /* there are; the others up to `width` are zero */
    int32_t width;
} lm_panel;

typedef struct {
    int32_t rows, columns; /* of a tile */
    int32_t pairs;         /* whether a word is two bfloat16 */
    void (*pack)(const lm_panel *panel, void *into);
    /* c[i * c_row + j] += alpha * (a b)[i, j] for the whole tile. */
    void (*tile)(int64_t words, const void *a, const void *b, float *c, int64_t c_row, float alpha);
} lm_tiles;

enum { LM_TILE_MOST = 12 * 32 };

extern const lm_tiles lm_tiles_portable;
#if defined(__x86_64__)
extern const lm_tiles lm_tiles_avx2, lm_tiles_avx512, lm_tiles_bf16;
#endif

#endif
