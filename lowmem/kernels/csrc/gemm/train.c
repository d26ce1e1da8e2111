/* A step of training the integers of a weight: idle threads take units of rows, whole groups of inputs. */
#include <math.h>

#include "isa.h"
#include "types.h"

enum { UNIT = 128 }; /* rows of a unit, unless a group has more */

typedef struct {
    lm_train_shared shared;
    int64_t units;
} task;

static int64_t unit_of(const lm_train *job) { return job->width * (job->width < UNIT ? UNIT / job->width : 1); }

static int64_t units_of(const lm_train *job) { return (job->inputs + unit_of(job) - 1) / unit_of(job); }

static size_t sums_bytes(const lm_train *job)
{
    return lm_aligned((size_t)(units_of(job) * job->out) * sizeof(float));
}

size_t lm_train_workspace(const lm_train *job)
{
    return LM_ALIGNMENT + sums_bytes(job) + lm_aligned((size_t)job->inputs * sizeof(float)) +
           (size_t)job->out * sizeof(float);
}

/* The usual size of each gradient is the root of its row's mean square times its column's, over the mean of all. */
static void factors(const task *t, lm_team *team)
{
    const lm_train_shared *s = &t->shared;
    const lm_train *job = &s->job;
    int64_t first, last;
    lm_share(team, job->out, &first, &last);
    for (int64_t j = first; j < last; j++) {
        float sum = 0;
        for (int64_t unit = 0; unit < t->units; unit++)
            sum += s->sums[unit * job->out + j];
        job->columns[j] = job->keep * job->columns[j] + (1 - job->keep) * (sum / (float)job->inputs);
        s->column_factors[j] = job->columns[j] > 0 ? 1 / sqrtf(job->columns[j]) : 0;
    }
    double mean = 0; /* every thread adds all of them, in the same order */
    for (int64_t i = 0; i < job->inputs; i++)
        mean += job->rows[i];
    mean /= (double)job->inputs;
    lm_share(team, job->inputs, &first, &last);
    for (int64_t i = first; i < last; i++)
        s->row_factors[i] = job->rows[i] > 0 ? sqrtf((float)mean / job->rows[i]) : 0;
}

static void work(void *context, lm_team *team)
{
    const task *t = context;
    const lm_train_kernels *kernels = lm_isa_selected()->train;
    for (int64_t unit; (unit = lm_next(team)) < t->units;)
        kernels->measure(&t->shared, unit);
    lm_barrier(team);
    factors(t, team);
    lm_barrier(team);
    for (int64_t unit; (unit = lm_next(team)) < t->units;)
        kernels->move(&t->shared, unit);
    lm_barrier(team);
}

void lm_train_run(const lm_train *job, void *workspace)
{
    char *sums = lm_align(workspace), *rows = sums + sums_bytes(job);
    char *columns = rows + lm_aligned((size_t)job->inputs * sizeof(float));
    task t = {.shared = {*job, unit_of(job), (float *)sums, (float *)rows, (float *)columns}, .units = units_of(job)};
    lm_run(work, &t);
}
