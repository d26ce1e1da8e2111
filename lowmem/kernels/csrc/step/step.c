/* A decode step without Python: every thread walks through all layers, and threads wait for each other where one needs the
 * results of the others. */
#include "isa.h"
#include "types.h"

enum { COLUMNS = 16 }; /* floats of a cache line */

typedef struct {
    const lm_model *model;
    const int64_t *ids;
    int64_t rows, length;
    float *logits;
    float *stream, *other; /* [rows, embd]: the residual stream, and the one that replaces it */
    float *normal, *added; /* [rows, embd]: the stream's norm; the output of attention or MLP */
    float *wide;           /* [rows, outputs of c_attn, or inner] */
    float *mixed;          /* [rows, embd]: attention's output before its projection */
    void *linear, *attention; /* workspaces */
} step;

static int64_t head_size(const lm_model *m) { return m->embd / m->heads; }

static int64_t attention_width(const lm_model *m) { return m->embd + 2 * m->kv_heads * head_size(m); }

/* A float32 matrix of the step without gaps between rows. */
static lm_matrix matrix(const step *s, float *values, int64_t columns)
{
    return (lm_matrix){values, s->rows, columns, LM_F32};
}

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
static size_t arrange(step *s, char *workspace)
{
    const lm_model *m = s->model;
    const int64_t width = attention_width(m) > m->inner ? attention_width(m) : m->inner;
    const size_t narrow = (size_t)(s->rows * m->embd) * sizeof(float);
    const lm_kv kv = {m->heads, m->kv_heads, head_size(m), m->capacity, NULL, NULL};
    size_t at = 0, linear = linear_workspace(&m->head, s->rows, 0);
    for (int64_t i = 0; i < m->layers; i++) {
        const lm_layer *layer = m->layer + i;
        linear = linear_workspace(&layer->c_attn, s->rows, linear);
        linear = linear_workspace(&layer->attn_proj, s->rows, linear);
        linear = linear_workspace(&layer->c_fc, s->rows, linear);
        linear = linear_workspace(&layer->mlp_proj, s->rows, linear);
    }
    s->stream = part(workspace, &at, narrow);
    s->other = part(workspace, &at, narrow);
    s->normal = part(workspace, &at, narrow);
    s->added = part(workspace, &at, narrow);
    s->mixed = part(workspace, &at, narrow);
    s->wide = part(workspace, &at, (size_t)(s->rows * width) * sizeof(float));
    s->linear = part(workspace, &at, linear);
    s->attention = part(workspace, &at, lm_attention_workspace(&kv, s->rows, s->length + s->rows));
    return at;
}

size_t lm_step_workspace(const lm_model *model, int64_t rows)
{
    step s = {.model = model, .rows = rows, .length = model->capacity - rows};
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

static void multiply(const step *s, const lm_weight *w, lm_matrix x, lm_matrix y, lm_team *team)
{
    if (w->packed)
        lm_linear_team(w->packed, &x, (int)w->planes, &y, s->linear, team);
    else
        lm_dense_team(w->dense, &x, &y, team);
}

/* The embeddings of tokens and positions into the stream. */
static void embed(const step *s, lm_team *team)
{
    const lm_model *m = s->model;
    int64_t first, last;
    own_columns(team, m->embd, &first, &last);
    for (int64_t r = 0; r < s->rows; r++) {
        const uint16_t *token = m->wte + s->ids[r] * m->embd, *position = m->wpe + (s->length + r) * m->embd;
        for (int64_t i = first; i < last; i++)
            s->stream[r * m->embd + i] = lm_from_16(token[i], m->wte_type) + lm_from_16(position[i], m->wpe_type);
    }
    lm_barrier(team);
}

/* Add `added` (if not NULL) to the stream, and normalize the result. */
static void add_and_normalize(step *s, const float *added, const lm_norm *norm, lm_team *team)
{
    const lm_model *m = s->model;
    int64_t first, last;
    own_columns(team, m->embd, &first, &last);
    for (int64_t r = 0; r < s->rows; r++) {
        const int64_t row = r * m->embd;
        const lm_residual residual = {s->stream + row, added ? added + row : NULL, m->embd, norm, m->epsilon,
                                      s->other + row, s->normal + row};
        lm_isa_selected()->elementwise->add_norm(&residual, first, last);
    }
    float *stream = s->stream; /* other threads may still read it */
    s->stream = s->other;
    s->other = stream;
    lm_barrier(team);
}

/* Append the keys and values among c_attn's outputs to the cache. */
static void append_keys(const step *s, const lm_layer *layer, lm_team *team)
{
    const lm_model *m = s->model;
    const int64_t size = head_size(m), width = attention_width(m), count = s->rows * m->kv_heads;
    for (int64_t i = lm_rank(team); i < count; i += lm_size(team)) {
        const int64_t r = i / m->kv_heads, head = i % m->kv_heads;
        const float *key = s->wide + r * width + (m->multi_query ? m->embd : 3 * head * size + size);
        const int64_t to = (head * m->capacity + s->length + r) * size;
        for (int64_t d = 0; d < size; d++) {
            layer->keys[to + d] = lm_to_bf16(key[d]);
            layer->values[to + d] = lm_to_bf16(key[size + d]);
        }
    }
}

static void activate(const step *s, lm_team *team)
{
    int64_t first, last;
    own_columns(team, s->model->inner, &first, &last);
    for (int64_t r = 0; r < s->rows; r++)
        lm_isa_selected()->elementwise->activate(s->model->activation, s->wide + r * s->model->inner + first, last - first);
    lm_barrier(team);
}

static void walk(void *context, lm_team *team)
{
    step own = *(const step *)context, *s = &own; /* every thread swaps the streams in its own copy */
    const lm_model *m = s->model;
    const int64_t size = head_size(m), width = attention_width(m);
    const float *added = NULL;
    const lm_matrix normal = matrix(s, s->normal, m->embd), sum = matrix(s, s->added, m->embd);
    const lm_matrix qkv = matrix(s, s->wide, width), inner = matrix(s, s->wide, m->inner);
    const lm_query query = {s->wide, width, m->multi_query ? size : 3 * size, s->rows, s->length + s->rows, m->scaling};
    embed(s, team);
    for (int64_t i = 0; i < m->layers; i++) {
        const lm_layer *layer = m->layer + i;
        const lm_kv kv = {m->heads, m->kv_heads, size, m->capacity, layer->keys, layer->values};
        add_and_normalize(s, added, &layer->ln_1, team);
        multiply(s, &layer->c_attn, normal, qkv, team);
        append_keys(s, layer, team);
        lm_attention_team(&kv, &query, s->mixed, s->attention, team);
        multiply(s, &layer->attn_proj, matrix(s, s->mixed, m->embd), sum, team);
        add_and_normalize(s, s->added, &layer->ln_2, team);
        multiply(s, &layer->c_fc, normal, inner, team);
        activate(s, team);
        multiply(s, &layer->mlp_proj, inner, sum, team);
        added = s->added;
    }
    add_and_normalize(s, added, &m->ln_f, team);
    multiply(s, &m->head, normal, matrix(s, s->logits, m->vocab), team);
}

void lm_step(const lm_model *model, const int64_t *ids, int64_t rows, int64_t length, float *logits, void *workspace)
{
    step s = {.model = model, .ids = ids, .rows = rows, .length = length, .logits = logits};
    arrange(&s, lm_align(workspace));
    lm_run(walk, &s);
}
