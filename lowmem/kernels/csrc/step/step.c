/* A step without Python: every thread walks through all layers, and threads wait for each other where one needs the
 * results of the others. */
#include "types.h"
#include "walk.h"

enum { COLUMNS = 16, TOGETHER = 3 }; /* floats of a cache line; linears of one input */

/* A float32 matrix without gaps between rows. */
static lm_matrix matrix(int64_t rows, float *values, int64_t columns) { return (lm_matrix){values, rows, columns, LM_F32}; }

/* Whether a layer has this linear. */
static int has(const lm_weight *w) { return w->packed || w->dense; }

/* ---- workspace ----------------------------------------------------------------------------------------------- */

/* The larger of `most` and what this linear needs. */
static size_t linear_workspace(const lm_weight *w, int64_t rows, size_t most)
{
    const size_t bytes = w->packed ? lm_linear_workspace(w->packed, rows, (int)w->planes) : 0;
    return bytes > most ? bytes : most;
}

/* The part of the workspace at *at, which advances to the next part. NULL for no workspace: only sizes are computed. */
static void *part(char *workspace, size_t *at, size_t bytes)
{
    void *result = workspace ? workspace + *at : NULL;
    *at += lm_aligned(bytes);
    return result;
}

/* Assign the parts of the workspace. Returns the bytes of all of them. */
static size_t arrange(lm_step *s, char *workspace)
{
    const lm_model *m = s->model;
    const int64_t width = lm_qkv_width(m) > m->inner ? lm_qkv_width(m) : m->inner;
    const size_t row = (size_t)s->rows * sizeof(float), narrow = row * (size_t)m->embd;
    size_t at = 0, linear = linear_workspace(&m->head, s->wanted, 0), gate = 0;
    for (const lm_layer *layer = m->layer; layer < m->layer + m->layers; layer++) {
        const lm_weight *all[] = {&layer->q, &layer->k, &layer->v, &layer->attn_proj, &layer->gate, &layer->up, &layer->mlp_proj};
        for (size_t i = 0; i < sizeof all / sizeof *all; i++)
            linear = linear_workspace(all[i], s->rows, linear);
        if (has(&layer->gate))
            gate = row * (size_t)m->inner;
    }
    s->places = part(workspace, &at, (size_t)s->rows * sizeof(lm_place));
    s->stream = part(workspace, &at, narrow);
    s->other = part(workspace, &at, narrow);
    s->normal = part(workspace, &at, narrow);
    s->added = part(workspace, &at, narrow);
    s->mixed = part(workspace, &at, row * (size_t)(m->heads * m->size));
    s->wide = part(workspace, &at, row * (size_t)width);
    s->gate = part(workspace, &at, gate);
    s->linear = part(workspace, &at, linear);
    s->attention = part(workspace, &at, lm_heads_workspace(s));
    return at;
}

static lm_step step_of(const lm_model *model, const lm_feed *feeds, int64_t count)
{
    lm_step s = {.model = model, .feeds = feeds, .count = count};
    for (int64_t i = 0; i < count; i++) {
        s.rows += feeds[i].rows;
        s.wanted += feeds[i].wanted;
    }
    return s;
}

size_t lm_forward_workspace(const lm_model *model, const lm_feed *feeds, int64_t count)
{
    lm_step s = step_of(model, feeds, count);
    return arrange(&s, NULL) + LM_ALIGNMENT;
}

/* ---- the parts of a layer: one thread's share ---------------------------------------------------------------- */

/* This thread's share of `count` columns, in whole cache lines. */
static void own_columns(const lm_team *team, int64_t count, int64_t *first, int64_t *last)
{
    lm_share(team, (count + COLUMNS - 1) / COLUMNS, first, last);
    *first *= COLUMNS;
    *last = lm_min(*last * COLUMNS, count);
}

static void multiply(const lm_step *s, const lm_weight *w, lm_matrix x, lm_matrix y, lm_team *team)
{
    if (w->packed)
        lm_linears_team(&(lm_product){w->packed, y}, 1, &x, (int)w->planes, s->linear, team);
    else
        lm_dense_team(w->dense, &x, &y, team);
}

/* Whether the input is quantized alike for both. */
static int alike(const lm_weight *a, const lm_weight *b)
{
    return a->packed && b->packed && a->planes == b->planes && a->packed->bits == b->packed->bits
        && lm_kernel_group(a->packed->group) == lm_kernel_group(b->packed->group);
}

/* A linear and where its outputs go. */
typedef struct {
    const lm_weight *weight;
    lm_matrix y;
} output;

static void multiply_all(const lm_step *s, const output *outputs, int64_t count, lm_matrix x, lm_team *team)
{
    lm_product products[TOGETHER];
    for (int64_t i = 0, together; i < count; i += together) {
        const lm_weight *first = outputs[i].weight;
        for (together = 0; i + together < count && alike(first, outputs[i + together].weight); together++)
            products[together] = (lm_product){outputs[i + together].weight->packed, outputs[i + together].y};
        if (together > 1) {
            lm_linears_team(products, together, &x, (int)first->planes, s->linear, team);
        } else {
            together = 1;
            multiply(s, first, x, outputs[i].y, team);
        }
    }
}

/* The embeddings of tokens and positions into the stream. */
static void embed(const lm_step *s, lm_team *team)
{
    const lm_model *m = s->model;
    int64_t first, last;
    own_columns(team, m->embd, &first, &last);
    for (int64_t r = 0; r < s->rows; r++) {
        const uint16_t *token = m->wte + s->ids[r] * m->embd, *position = m->wpe + (m->wpe ? s->places[r].position * m->embd : 0);
        float *to = s->stream + r * m->embd;
        for (int64_t i = first; i < last; i++)
            to[i] = lm_from_16(token[i], m->wte_type) * m->embedding_scale;
        for (int64_t i = first; m->wpe && i < last; i++)
            to[i] += lm_from_16(position[i], m->wpe_type);
    }
    lm_barrier(team);
}

/* Add `added` (if not NULL) to the stream, and normalize the result. Each thread takes columns, whose sums it needs of whole
 * rows, or rows where there are enough of them. */
static void add_and_normalize(lm_step *s, const float *added, const lm_norm *norm, lm_team *team)
{
    const lm_model *m = s->model;
    int64_t first = 0, last = m->embd, begin = 0, end = s->rows;
    if (s->rows < 2 * lm_size(team))
        own_columns(team, m->embd, &first, &last);
    else
        lm_share(team, s->rows, &begin, &end);
    for (int64_t r = begin; r < end; r++) {
        const int64_t row = r * m->embd;
        const lm_residual residual = {s->stream + row, added ? added + row : NULL, m->residual_scale, m->embd, norm,
                                      s->other + row, s->normal + row};
        lm_isa_selected()->elementwise->add_norm(&residual, first, last);
    }
    float *stream = s->stream; /* other threads may still read it */
    s->stream = s->other;
    s->other = stream;
    lm_barrier(team);
}

/* The layer's queries, keys and values into `wide`. */
static void project(const lm_step *s, const lm_layer *layer, lm_matrix x, lm_team *team)
{
    const lm_model *m = s->model;
    const lm_matrix all = matrix(s->rows, s->wide, lm_qkv_width(m));
    output outputs[] = {{&layer->q, all}, {&layer->k, all}, {&layer->v, all}};
    outputs[1].y.values = s->wide + lm_head_at(m, 1, 0);
    outputs[2].y.values = s->wide + lm_head_at(m, 2, 0);
    multiply_all(s, outputs, has(&layer->k) ? 3 : 1, x, team);
}

/* The inputs of the MLP's last linear into `wide`. */
static void expand(const lm_step *s, const lm_layer *layer, lm_matrix x, lm_team *team)
{
    const int64_t inner = s->model->inner;
    const int gated = has(&layer->gate);
    /* The activated ones in `wide`, so that both kinds end there. */
    const output outputs[] = {{gated ? &layer->gate : &layer->up, matrix(s->rows, s->wide, inner)},
                              {&layer->up, matrix(s->rows, s->gate, inner)}};
    multiply_all(s, outputs, gated ? 2 : 1, x, team);
    int64_t first, last;
    own_columns(team, inner, &first, &last);
    for (int64_t r = 0; r < s->rows; r++) {
        const int64_t at = r * inner + first;
        lm_isa_selected()->elementwise->activate(s->model->activation, s->wide + at, gated ? s->gate + at : NULL, last - first);
    }
    lm_barrier(team);
}

/* Bring the wanted rows of `normal` together, in `added`, as the head takes them. */
static void gather_wanted(const lm_step *s, lm_team *team)
{
    const int64_t embd = s->model->embd;
    int64_t first, last, to = 0, end = 0;
    own_columns(team, embd, &first, &last);
    for (const lm_feed *f = s->feeds; f < s->feeds + s->count; f++) {
        end += f->rows;
        for (int64_t r = end - f->wanted; r < end; r++, to++)
            for (int64_t i = first; i < last; i++)
                s->added[to * embd + i] = s->normal[r * embd + i] * s->model->head_scale;
    }
    lm_barrier(team);
}

static void walk(void *context, lm_team *team)
{
    lm_step own = *(const lm_step *)context, *s = &own; /* every thread swaps the streams in its own copy */
    const lm_model *m = s->model;
    const lm_matrix normal = matrix(s->rows, s->normal, m->embd), mixed = matrix(s->rows, s->mixed, m->heads * m->size);
    const lm_matrix inner = matrix(s->rows, s->wide, m->inner), sum = matrix(s->rows, s->added, m->embd);
    const float *added = NULL;
    embed(s, team);
    for (const lm_layer *layer = m->layer; layer < m->layer + m->layers; layer++) {
        add_and_normalize(s, added, &layer->ln_1, team);
        project(s, layer, normal, team);
        lm_heads_team(s, layer, team);
        multiply(s, &layer->attn_proj, mixed, sum, team);
        add_and_normalize(s, s->added, &layer->ln_2, team);
        expand(s, layer, normal, team);
        multiply(s, &layer->mlp_proj, inner, sum, team);
        added = s->added;
    }
    add_and_normalize(s, added, &m->ln_f, team);
    gather_wanted(s, team);
    multiply(s, &m->head, matrix(s->wanted, s->added, m->embd), matrix(s->wanted, s->logits, m->vocab), team);
}

void lm_forward(const lm_model *model, const lm_feed *feeds, int64_t count, const int64_t *ids, float *logits, void *workspace)
{
    lm_step s = step_of(model, feeds, count);
    s.ids = ids;
    s.logits = logits;
    arrange(&s, lm_align(workspace));
    lm_place *to = s.places;
    for (const lm_feed *f = feeds; f < feeds + count; f++)
        for (int64_t r = 0; r < f->rows; r++)
            *to++ = (lm_place){f->slot, f->length + r};
    lm_run(walk, &s);
}
