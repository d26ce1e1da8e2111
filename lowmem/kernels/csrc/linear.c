/* A packed linear from activations to outputs: digits first, then columns, a piece at a time to whoever is free. */
#include <string.h>

#include "lowmem.h"
#include "types.h"

enum { ALIGNMENT = 64, FEW_ROWS = 2 * LM_FEW, FEW_COLUMNS = 4096, MANY_ROWS = 512 };
/* Outputs begin so far behind a thread's scratch that both are not a multiple of a page apart: loads from one would wait
 * for stores to the other. */
enum { SCRATCH = LM_SCRATCH_BYTES + 33 * ALIGNMENT };

static size_t aligned(size_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

static int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

/* The workspace of `rows` rows: the input's parts, then what each thread has of its own. */
typedef struct {
    size_t scales, sums, threads, thread_bytes, bytes;
} layout;

static size_t thread_bytes(int64_t rows)
{
    if (rows <= FEW_ROWS)
        return aligned((size_t)rows * FEW_COLUMNS * sizeof(float));
    return aligned((size_t)at_most(rows, MANY_ROWS) * LM_MANY_COLUMNS * sizeof(float)) + SCRATCH;
}

/* Two weights of 8 bits are no byte. */
static int planes_of(const lm_packed *w, int planes) { return w->bits == 8 && planes == LM_PAIRED ? 2 : planes; }

static layout layout_of(const lm_packed *w, int64_t rows, int planes)
{
    const int64_t part = at_most(rows, MANY_ROWS), groups = w->in / lm_kernel_group(w->group);
    layout l;
    l.scales = aligned(lm_best_isa()->digit_bytes(part, w->in, planes));
    l.sums = l.scales + aligned((size_t)(groups * part) * sizeof(float));
    l.threads = l.sums + aligned((size_t)(3 * groups * part) * sizeof(int32_t));
    l.thread_bytes = thread_bytes(part);
    l.bytes = l.threads + (size_t)lm_threads() * l.thread_bytes + ALIGNMENT; /* the workspace may lie anywhere */
    return l;
}

size_t lm_linear_workspace(const lm_packed *w, int64_t rows, int planes)
{
    return layout_of(w, rows, planes_of(w, planes)).bytes;
}

static void store(const float *y, int64_t y_stride, int64_t rows, int64_t columns, char *out, int type, int64_t out_stride,
                  int64_t first)
{
    const size_t width = type == LM_F32 ? 4 : 2;
    for (int64_t r = 0; r < rows; r++) {
        void *to = out + ((size_t)(r * out_stride + first)) * width;
        const float *from = y + r * y_stride;
        if (type == LM_F32)
            memcpy(to, from, (size_t)columns * 4);
        else if (type == LM_BF16)
            for (int64_t o = 0; o < columns; o++)
                ((uint16_t *)to)[o] = lm_to_bf16(from[o]);
        else
            for (int64_t o = 0; o < columns; o++)
                lm_store(to, LM_F16, o, from[o]);
    }
}

/* One thread's share; at most MANY_ROWS rows. */
static void share(const lm_packed *w, const void *x, int x_type, int64_t x_stride, int64_t rows, int planes, char *out,
                  int out_type, int64_t out_stride, char *workspace, lm_team *team)
{
    const lm_isa *isa = lm_best_isa();
    const layout l = layout_of(w, rows, planes);
    const int rank = lm_rank(team), size = lm_size(team);
    const int32_t group = lm_kernel_group(w->group);
    const int64_t groups = w->in / group;
    lm_input input = {rows, w->in, group, planes, w->bits, workspace, (float *)(workspace + l.scales),
                      (int32_t *)(workspace + l.sums)};
    isa->quantize(x, x_type, x_stride, &input, groups * rank / size, groups * (rank + 1) / size);
    lm_barrier(team);
    char *own = workspace + l.threads + (size_t)rank * l.thread_bytes;
    const int is_few = rows <= FEW_ROWS;
    float *y = (float *)(is_few ? own : own + SCRATCH);
    /* Few rows: the wider a piece, the longer the memory's streams; four a thread, so that one who is late costs little. */
    int64_t columns = is_few ? at_most((w->out / (4 * size) + LM_PANEL - 1) / LM_PANEL * LM_PANEL, FEW_COLUMNS) : LM_MANY_COLUMNS;
    if (columns < LM_PANEL)
        columns = LM_PANEL;
    for (int64_t piece; (piece = lm_next(team)) * columns < w->out;) {
        const int64_t first = piece * columns, last = at_most(first + columns, w->out);
        if (is_few)
            isa->few(w, &input, first, last, y, columns);
        else
            isa->many(w, &input, first, last, y, columns, own);
        store(y, columns, rows, last - first, out, out_type, out_stride, first);
    }
    lm_barrier(team);
}

typedef struct {
    const lm_packed *w;
    const char *x;
    char *out, *workspace;
    int64_t rows, x_stride, out_stride;
    int x_type, planes, out_type;
} call;

static void shares(void *context, lm_team *team)
{
    const call *c = context;
    const size_t x_width = c->x_type == LM_F32 ? 4 : 2, out_width = c->out_type == LM_F32 ? 4 : 2;
    for (int64_t r = 0; r < c->rows; r += MANY_ROWS)
        share(c->w, c->x + (size_t)(r * c->x_stride) * x_width, c->x_type, c->x_stride, at_most(c->rows - r, MANY_ROWS),
              c->planes, c->out + (size_t)(r * c->out_stride) * out_width, c->out_type, c->out_stride, c->workspace, team);
}

static char *align(void *workspace) { return (char *)aligned((size_t)workspace); }

void lm_linear(const lm_packed *w, const void *x, int x_type, int64_t rows, int planes, void *out, int out_type,
               void *workspace)
{
    call c = {w, x, out, align(workspace), rows, w->in, w->out, x_type, planes_of(w, planes), out_type};
    lm_run(shares, &c);
}

void lm_linear_team(const lm_packed *w, const float *x, int64_t x_stride, int64_t rows, int planes, float *y, int64_t y_stride,
                    void *workspace, lm_team *team)
{
    call c = {w, (const char *)x, (char *)y, align(workspace), rows, x_stride, y_stride, LM_F32, planes_of(w, planes), LM_F32};
    shares(&c, team);
}
