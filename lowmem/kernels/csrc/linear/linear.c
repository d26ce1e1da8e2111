/* A packed linear from activations to outputs: quantize the activations, then give pieces of outputs to idle threads. */
#include "isa.h"
#include "types.h"

enum { DECODE_KERNEL_ROWS = 2 * LM_DECODE_ROWS, DECODE_COLUMNS = 4096, PREFILL_ROWS = 512 };
/* The distance of a thread's outputs behind its scratch, not a multiple of a page: else loads from one would wait for
 * stores to the other. */
enum { SCRATCH = LM_SCRATCH_BYTES + 33 * LM_ALIGNMENT };

/* A linear on at most PREFILL_ROWS rows; offsets into the workspace: the input's parts, then each thread's own part. */
typedef struct {
    const lm_packed *w;
    int planes;
    int64_t rows;
    size_t scales, sums, threads, thread_bytes, bytes;
} plan;

static size_t thread_bytes(int64_t rows)
{
    if (rows <= DECODE_KERNEL_ROWS)
        return lm_aligned((size_t)(rows * DECODE_COLUMNS) * sizeof(float));
    return lm_aligned((size_t)(rows * LM_PREFILL_COLUMNS) * sizeof(float)) + SCRATCH;
}

static plan plan_of(const lm_packed *w, int planes, int64_t rows)
{
    /* A pair of weights of more than 4 bits does not fit in a byte. */
    plan p = {.w = w, .planes = w->bits > 4 && planes == LM_PAIRED ? 2 : planes, .rows = lm_min(rows, PREFILL_ROWS)};
    const int64_t groups = w->inputs / lm_kernel_group(w->group);
    p.scales = lm_aligned(lm_isa_selected()->linear->digit_bytes(p.rows, w->inputs, p.planes));
    p.sums = p.scales + lm_aligned((size_t)(groups * p.rows) * sizeof(float));
    p.threads = p.sums + lm_aligned((size_t)(3 * groups * p.rows) * sizeof(int32_t));
    p.thread_bytes = thread_bytes(p.rows);
    p.bytes = p.threads + (size_t)lm_threads() * p.thread_bytes + LM_ALIGNMENT;
    return p;
}

size_t lm_linear_workspace(const lm_packed *w, int64_t rows, int planes) { return plan_of(w, planes, rows).bytes; }

int lm_has_width(int bits) { return bits >= 2 && bits <= 8; }

int32_t lm_kernel_group(int32_t group)
{
    if (group <= 256)
        return group;
    for (int32_t width = 256; width > 32; width /= 2)
        if (group % width == 0)
            return width;
    return 32;
}

enum { STORED = 256 }; /* columns that are finished at a time */

/* Store a piece's sums plus bias in `y`. */
static void store(const lm_piece *p, const lm_matrix *y)
{
    const lm_packed *w = p->w;
    for (int64_t first = p->first; first < p->last; first += STORED) {
        const int64_t columns = lm_min(p->last - first, STORED);
        float bias[STORED];
        if (w->bias)
            for (int64_t o = 0; o < columns; o++)
                bias[o] = lm_load(w->bias, w->bias_type, first + o);
        for (int64_t r = 0; r < p->input->rows; r++) {
            float *from = p->y + r * p->stride + first - p->first;
            void *to = (char *)y->values + (size_t)(r * y->stride + first) * lm_width(y->type);
            if (w->bias)
                for (int64_t o = 0; o < columns; o++)
                    from[o] += bias[o];
            if (y->type == LM_F32)
                memcpy(to, from, (size_t)columns * sizeof(float));
            else if (y->type == LM_BF16)
                for (int64_t o = 0; o < columns; o++)
                    ((uint16_t *)to)[o] = lm_to_bf16(from[o]);
            else
                for (int64_t o = 0; o < columns; o++)
                    ((uint16_t *)to)[o] = lm_to_f16(from[o]);
        }
    }
}

static lm_matrix rows_from(const lm_matrix *m, int64_t first, int64_t rows)
{
    return (lm_matrix){(char *)m->values + (size_t)(first * m->stride) * lm_width(m->type), rows, m->stride, m->type};
}

/* The linears of a call. */
typedef struct {
    const lm_product *each;
    int64_t count, outputs; /* linears, and outputs of all */
    int64_t columns;        /* of a piece */
} products;

/* Set the outputs of piece `number` and return its linear; NULL past the last piece. */
static const lm_product *piece_of(const products *all, int64_t number, lm_piece *piece)
{
    for (const lm_product *p = all->each; p < all->each + all->count; p++) {
        const int64_t pieces = (p->w->outputs + all->columns - 1) / all->columns;
        if (number < pieces) {
            piece->w = p->w;
            piece->first = number * all->columns;
            piece->last = lm_min(piece->first + all->columns, p->w->outputs);
            return p;
        }
        number -= pieces;
    }
    return NULL;
}

/* One thread's part in linears on at most PREFILL_ROWS rows, which begin at row `begin` of their results. */
static void multiply(const plan *p, products all, const lm_matrix *x, int64_t begin, char *workspace, lm_team *team)
{
    const lm_packed *w = p->w;
    const lm_linear_kernels *kernels = lm_isa_selected()->linear;
    lm_input input = {.rows = x->rows, .inputs = w->inputs, .group = lm_kernel_group(w->group), .planes = p->planes,
                      .bits = w->bits, .digits = workspace, .scales = (float *)(workspace + p->scales),
                      .sums = (int32_t *)(workspace + p->sums)};
    int64_t first, last;
    lm_share(team, w->inputs / input.group, &first, &last);
    kernels->quantize(x, &input, first, last);
    lm_barrier(team);
    char *own = workspace + p->threads + (size_t)lm_rank(team) * p->thread_bytes;
    const int decode = x->rows <= DECODE_KERNEL_ROWS;
    /* Wide pieces read memory in long streams; four pieces a thread keep the wait for the last thread short. */
    const int64_t fair = lm_round_up(all.outputs / (4 * lm_size(team)), LM_TILE_OUTPUTS);
    all.columns = decode ? lm_min(fair, DECODE_COLUMNS) : LM_PREFILL_COLUMNS;
    if (all.columns < LM_TILE_OUTPUTS)
        all.columns = LM_TILE_OUTPUTS;
    lm_piece piece = {.input = &input, .y = (float *)(decode ? own : own + SCRATCH), .stride = all.columns, .scratch = own};
    for (const lm_product *now; (now = piece_of(&all, lm_next(team), &piece));) {
        for (int64_t r = 0; r < x->rows; r++)
            memset(piece.y + r * piece.stride, 0, (size_t)(piece.last - piece.first) * sizeof(float));
        if (decode)
            kernels->decode(&piece);
        else
            kernels->prefill(&piece);
        const lm_matrix to = rows_from(&now->y, begin, x->rows);
        store(&piece, &to);
    }
    lm_barrier(team);
}

void lm_linears_team(const lm_product *all, int64_t count, const lm_matrix *x, int planes, void *workspace, lm_team *team)
{
    products found = {.each = all, .count = count};
    for (int64_t i = 0; i < count; i++)
        found.outputs += all[i].w->outputs;
    for (int64_t r = 0; r < x->rows; r += PREFILL_ROWS) {
        const int64_t rows = lm_min(x->rows - r, PREFILL_ROWS);
        const plan p = plan_of(all->w, planes, rows);
        const lm_matrix from = rows_from(x, r, rows);
        multiply(&p, found, &from, r, lm_align(workspace), team);
    }
}

typedef struct {
    const lm_packed *w;
    const lm_matrix *x, *y;
    int planes;
    void *workspace;
} call;

static void body(void *context, lm_team *team)
{
    const call *c = context;
    lm_linears_team(&(lm_product){c->w, *c->y}, 1, c->x, c->planes, c->workspace, team);
}

void lm_linear(const lm_packed *w, const lm_matrix *x, int planes, const lm_matrix *y, void *workspace)
{
    call c = {w, x, y, planes, workspace};
    lm_run(body, &c);
}
