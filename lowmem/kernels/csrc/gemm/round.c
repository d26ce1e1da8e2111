/* Round a column block: idle threads take slabs of outputs. */
#include "isa.h"
#include "types.h"

typedef struct {
    lm_round_shared shared;
    char *threads; /* the buffers of all threads */
} task;

static size_t thread_bytes(void) { return (size_t)LM_ROUND_BUFFERS * LM_ROUND_MOST * LM_SLAB * sizeof(float); }

size_t lm_round_workspace(void)
{
    return LM_ALIGNMENT + (size_t)2 * LM_ROUND_MOST * LM_ROUND_MOST * sizeof(float) + (size_t)lm_threads() * thread_bytes();
}

/* Transpose column j of R. */
static void transpose(const lm_round_shared *s, int64_t j)
{
    const lm_round *g = &s->job;
    for (int64_t i = 0; i <= j; i++)
        s->turned[j * g->columns + i] = g->r[i * g->r_row + j];
}

/* Row i of its group's R R^T. */
static void measure(const lm_round_shared *s, int64_t i)
{
    const lm_round *g = &s->job;
    const int64_t first = i / g->width * g->width, last = first + g->width;
    for (int64_t j = first; j < last; j++) {
        const float *a = g->r + i * g->r_row, *b = g->r + j * g->r_row;
        float sum = 0;
        for (int64_t k = i > j ? i : j; k < last; k++)
            sum += a[k] * b[k];
        s->metric[i * g->width + j - first] = sum;
    }
}

static void work(void *context, lm_team *team)
{
    const task *t = context;
    const lm_round_shared *s = &t->shared;
    for (int64_t j; (j = lm_next(team)) < s->job.columns;) {
        transpose(s, j);
        if (s->job.search == 2 && s->job.passes)
            measure(s, j);
    }
    lm_barrier(team);
    float *buffers = (float *)(t->threads + (size_t)lm_rank(team) * thread_bytes());
    for (int64_t first; (first = lm_next(team) * LM_SLAB) < s->job.out;)
        lm_isa_selected()->round(s, buffers, first);
    lm_barrier(team);
}

void lm_round_run(const lm_round *job, void *workspace)
{
    char *aligned = lm_align(workspace);
    const size_t corner = (size_t)LM_ROUND_MOST * LM_ROUND_MOST * sizeof(float);
    task t = {.shared = {.job = *job, .turned = (float *)aligned, .metric = (float *)(aligned + corner)},
              .threads = aligned + 2 * corner};
    lm_run(work, &t);
}
