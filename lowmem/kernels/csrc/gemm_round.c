/* A column block, slab by slab: each slab of outputs is one piece of work for one thread. */
#include "gemm_round.h"

#include "gemm.h"

typedef struct {
    lm_round_shared shared;
    lm_round_slab *slab;
} task;

static size_t thread_bytes(void) { return (size_t)LM_ROUND_BUFFERS * LM_ROUND_MOST * LM_SLAB * sizeof(float); }

size_t lm_round_workspace(void)
{
    return 64 + (size_t)2 * LM_ROUND_MOST * LM_ROUND_MOST * sizeof(float) + (size_t)lm_threads() * thread_bytes();
}

static lm_round_slab *chosen(void)
{
#if defined(__x86_64__)
    const char *name = lm_gemm_name();
    if (name[0] == 'A' && name[3] == '-') /* AVX-512, with BF16 or without */
        return lm_round_avx512;
    if (name[0] == 'A')
        return lm_round_avx2;
#endif
    return lm_round_portable;
}

static void turn(const lm_round_shared *s, int64_t j)
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
        turn(s, j);
        if (s->job.search == 2 && s->job.passes)
            measure(s, j);
    }
    lm_barrier(team);
    float *buffers = (float *)(s->threads + (size_t)lm_rank(team) * thread_bytes());
    for (int64_t first; (first = lm_next(team) * LM_SLAB) < s->job.out;)
        t->slab(s, buffers, first);
    lm_barrier(team);
}

void lm_round_run(const lm_round *job, void *workspace)
{
    char *aligned = (char *)(((uintptr_t)workspace + 63) & ~(uintptr_t)63);
    const size_t corner = (size_t)LM_ROUND_MOST * LM_ROUND_MOST * sizeof(float);
    task t = {.shared = {.job = *job, .turned = (float *)aligned, .metric = (float *)(aligned + corner),
                         .threads = aligned + 2 * corner},
              .slab = chosen()};
    lm_run(work, &t);
}
