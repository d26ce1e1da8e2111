/* Tiles of 4 x 8 in plain C, which a compiler can vectorize for whatever there is. */
#define PACK_TARGET
#include "gemm_pack.h"

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

const lm_tiles lm_tiles_portable = {ROWS, COLUMNS, 0, pack_floats, tile};
