/* Products, rounding and training in plain C. Compilers vectorize the tiles of 4 x 8; rounding uses vectors of 16 bytes. */
#define TARGET
#define LANES 4
#define FMA(a, b, c) ((a) * (b) + (c))
#define NAME lm_round_portable
#define TRAIN lm_train_portable
#include "pack.h"
#include "round_slab.h"
#include "train_unit.h"

enum { ROWS = 4, COLUMNS = 8 };

static void tile(int64_t words, const void *pa, const void *pb, float *c, int64_t c_row, float alpha)
{
    const float *a = pa, *b = pb;
    float sums[ROWS][COLUMNS] = {{0}};
    for (int64_t k = 0; k < words; k++, a += ROWS, b += COLUMNS)
        for (int i = 0; i < ROWS; i++)
            for (int j = 0; j < COLUMNS; j++)
                sums[i][j] += a[i] * b[j];
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < COLUMNS; j++)
            c[i * c_row + j] += alpha * sums[i][j];
}

const lm_gemm_kernels lm_gemm_portable = {"portable C", ROWS, COLUMNS, 0, pack_floats, tile};
