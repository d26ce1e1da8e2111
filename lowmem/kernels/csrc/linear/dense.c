/* A dense linear for few rows: idle threads take pieces of its outputs. */
#include "isa.h"
#include "types.h"

enum { PIECE_BYTES = 2 << 20, OUTPUTS = 24 };

void lm_dense_team(const lm_dense *w, const lm_matrix *x, const lm_matrix *y, lm_team *team)
{
    /* Large enough for long streams of memory, and several for every thread of a small linear. */
    const int64_t streaming = w->inputs ? PIECE_BYTES / (2 * w->inputs) : w->outputs, fair = w->outputs / (4 * lm_size(team));
    int64_t width = lm_min(streaming, fair) / OUTPUTS * OUTPUTS;
    if (width < OUTPUTS)
        width = OUTPUTS;
    lm_dense_piece piece = {.w = w, .x = x->values, .rows = x->rows, .stride = y->stride};
    while ((piece.first = lm_next(team) * width) < w->outputs) {
        piece.last = lm_min(piece.first + width, w->outputs);
        piece.y = (float *)y->values + piece.first;
        lm_isa_selected()->linear->dense(&piece);
    }
    lm_barrier(team);
}

typedef struct {
    const lm_dense *w;
    const lm_matrix *x, *y;
    float *workspace;
} call;

/* Convert a matrix without gaps, this thread's share of its values. */
static void convert(const lm_matrix *from, const lm_matrix *to, const lm_team *team)
{
    int64_t first, last;
    lm_share(team, from->rows * from->stride, &first, &last);
    for (int64_t i = first; i < last; i++)
        lm_store(to->values, to->type, i, lm_load(from->values, from->type, i));
}

static void body(void *context, lm_team *team)
{
    const call *c = context;
    const lm_dense *w = c->w;
    const int64_t rows = c->x->rows;
    lm_matrix x = *c->x, y = *c->y;
    if (x.type != LM_F32) {
        x = (lm_matrix){c->workspace, rows, w->inputs, LM_F32};
        convert(c->x, &x, team);
        lm_barrier(team);
    }
    if (y.type != LM_F32)
        y = (lm_matrix){c->workspace + rows * w->inputs, rows, w->outputs, LM_F32};
    lm_dense_team(w, &x, &y, team);
    if (c->y->type != LM_F32)
        convert(&y, c->y, team);
}

void lm_dense_linear(const lm_dense *w, const lm_matrix *x, const lm_matrix *y, void *workspace)
{
    call c = {w, x, y, workspace};
    lm_run(body, &c);
}
