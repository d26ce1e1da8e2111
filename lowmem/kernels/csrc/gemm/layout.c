/* Prepare a Hessian for its factorization, in place: fill its lower triangle, permute its columns. */
#include "gemm.h"
#include "threads.h"
#include "types.h"

enum { BLOCK = 64 };

typedef struct {
    float *matrix;
    int64_t n, row;
    float scale;
    const int64_t *order;
    float *kept;
} task;

/* Scale a block on or above the diagonal, and copy it to its mirror image. */
static void mirror_block(const task *t, int64_t top, int64_t left)
{
    const int64_t bottom = lm_min(top + BLOCK, t->n), right = lm_min(left + BLOCK, t->n);
    for (int64_t i = top; i < bottom; i++) {
        float *line = t->matrix + i * t->row;
        for (int64_t j = top == left ? i : left; j < right; j++)
            line[j] *= t->scale;
    }
    for (int64_t j = left; j < right; j++) {
        float *line = t->matrix + j * t->row;
        const int64_t end = top == left ? j : bottom;
        for (int64_t i = top; i < end; i++)
            line[i] = t->matrix[i * t->row + j];
    }
}

static void mirror(void *context, lm_team *team)
{
    const task *t = context;
    const int64_t blocks = (t->n + BLOCK - 1) / BLOCK;
    for (int64_t b; (b = lm_next(team)) < blocks;)
        for (int64_t c = b; c < blocks; c++)
            mirror_block(t, b * BLOCK, c * BLOCK);
    lm_barrier(team);
}

/* Follow every cycle of the permutation row by row. All threads work on the same row, each on its part of the columns, and
 * wait for each other, since the next step overwrites the row that this one reads. */
static void permute(void *context, lm_team *team)
{
    const task *t = context;
    const int64_t n = t->n, part = (n + lm_size(team) - 1) / lm_size(team);
    const int64_t first = lm_min(n, lm_rank(team) * part), last = lm_min(n, first + part);
    for (int64_t start = 0; start < n; start++) {
        /* A cycle begins at its smallest row. */
        int64_t i = t->order[start], length = 1;
        for (; i > start; i = t->order[i])
            length++;
        if (i < start)
            continue;
        lm_barrier(team); /* all have read the row kept for the last cycle */
        memcpy(t->kept + first, t->matrix + start * t->row + first, (size_t)(last - first) * sizeof(float));
        lm_barrier(team);
        for (i = start; length--; i = t->order[i]) {
            const float *from = length ? t->matrix + t->order[i] * t->row : t->kept;
            float *to = t->matrix + i * t->row;
            for (int64_t j = first; j < last; j++)
                to[j] = from[t->order[j]];
            lm_barrier(team);
        }
    }
    lm_barrier(team);
}

void lm_mirror(float *matrix, int64_t n, int64_t row, float scale)
{
    task t = {.matrix = matrix, .n = n, .row = row, .scale = scale};
    lm_run(mirror, &t);
}

void lm_permute(float *matrix, int64_t n, int64_t row, const int64_t *order, void *workspace)
{
    task t = {.matrix = matrix, .n = n, .row = row, .order = order, .kept = workspace};
    lm_run(permute, &t);
}
