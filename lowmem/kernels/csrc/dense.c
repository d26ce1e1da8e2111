/* A dense linear for a few rows: pieces of its outputs to whoever is free. */
#include "lowmem.h"
#include "types.h"

enum { PIECE_BYTES = 2 << 20, OUTPUTS = 24 };

void lm_dense_team(const lm_dense *w, const float *x, int64_t rows, float *y, int64_t y_stride, lm_team *team)
{
    const lm_isa *isa = lm_best_isa();
    /* Long enough that the memory streams, and some for every thread where there is little to do. */
    int64_t width = w->in ? PIECE_BYTES / (2 * w->in) : w->out, fair = w->out / (4 * lm_size(team));
    width = (width < fair ? width : fair) / OUTPUTS * OUTPUTS;
    if (width < OUTPUTS)
        width = OUTPUTS;
    for (int64_t piece; (piece = lm_next(team)) * width < w->out;) {
        const int64_t first = piece * width, last = w->out - first < width ? w->out : first + width;
        isa->dense(w, x, rows, first, last, y + first, y_stride);
    }
    lm_barrier(team);
}

typedef struct {
    const lm_dense *w;
    const void *x;
    void *out;
    float *workspace;
    int64_t rows;
    int x_type, out_type;
} call;

/* From `from` to `to`, each thread its share of the values. */
static void convert(const void *from, int from_type, void *to, int to_type, int64_t count, const lm_team *team)
{
    const int64_t rank = lm_rank(team), size = lm_size(team);
    for (int64_t i = count * rank / size; i < count * (rank + 1) / size; i++)
        lm_store(to, to_type, i, lm_load(from, from_type, i));
}

static void body(void *context, lm_team *team)
{
    const call *c = context;
    const lm_dense *w = c->w;
    const float *x = c->x;
    float *y = c->out, *converted = c->workspace;
    if (c->x_type != LM_F32) {
        convert(c->x, c->x_type, converted, LM_F32, c->rows * w->in, team);
        lm_barrier(team);
        x = converted;
    }
    if (c->out_type != LM_F32)
        y = converted + c->rows * w->in;
    lm_dense_team(w, x, c->rows, y, w->out, team);
    if (c->out_type != LM_F32)
        convert(y, LM_F32, c->out, c->out_type, c->rows * w->out, team);
}

void lm_dense_linear(const lm_dense *w, const void *x, int x_type, int64_t rows, void *out, int out_type, void *workspace)
{
    call c = {w, x, out, workspace, rows, x_type, out_type};
    lm_run(body, &c);
}
