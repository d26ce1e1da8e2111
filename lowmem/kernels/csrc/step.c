/* A decode step without a line of Python in it: every thread walks through all layers, and they meet where one needs what
 * the others have made. */
#include "step.h"

#include "elementwise.h"
#include "internal.h"
#include "types.h"

enum { ALIGNMENT = 64, COLUMNS = 16 };

typedef struct {
    const lm_model *model;
    const int64_t *ids;
    int64_t rows, length;
    float *logits;
    /* [rows, embd]: the residual stream and the one it becomes; its norm; what a layer's half adds to it. */
    float *stream, *other, *normal, *added;
    float *wide, *mixed; /* [rows, outputs of c_attn, or inner], [rows, embd]: attention's output */
    void *linear, *attention;
} step;

static int64_t head_size(const lm_model *m) { return m->embd / m->heads; }

static int64_t attention_width(const lm_model *m) { return m->embd + 2 * m->kv_heads * head_size(m); }

/* The layer's keys and values as attention takes them. */
static lm_kv kv_of(const lm_model *m, const lm_layer *layer)
{
    return (lm_kv){m->heads, m->kv_heads, head_size(m), m->capacity, layer->keys, layer->values};
}

/* ---- workspace ----------------------------------------------------------------------------------------------- */

static size_t linear_workspace(const lm_weight *w, int64_t rows, size_t most)
{
    size_t bytes = w->packed ? lm_linear_workspace(w->packed, rows, (int)w->planes) : 0;
    return bytes > most ? bytes : most;
}

/* The next part of the workspace, and where the one behind it begins; with NULL only that. */
static void *part(char *workspace, size_t *at, size_t bytes)
{
    void *result = workspace ? workspace + *at : NULL;
    *at += (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return result;
}

/* The parts into the step; all their bytes. */
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
    return arrange(&s, NULL) + ALIGNMENT;
}

/* ---- the parts of a layer, a thread's share of each ---------------------------------------------------------- */

/* The columns of `count` that are this thread's: whole cache lines. */
static void own_columns(const lm_team *team, int64_t count, int64_t *first, int64_t *last)
{
    const int64_t pieces = (count + COLUMNS - 1) / COLUMNS, rank = lm_rank(team), size = lm_size(team);
    *first = pieces * rank / size * COLUMNS;
    *last = pieces * (rank + 1) / size * COLUMNS;
    if (*last > count)
        *last = count;
}

static void multiply(const step *s, const lm_weight *w, const float *x, int64_t in, float *y, int64_t out, lm_team *team)
{
    if (w->packed)
        lm_linear_team(w->packed, x, in, s->rows, (int)w->planes, y, out, s->linear, team);
    else
        lm_dense_team(w->dense, x, s->rows, y, out, team);
}

/* Before the first layer: what the tokens and their positions stand for. */
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

/* The stream with what was added to it, and its norm. */
static void add_and_normalize(step *s, const float *added, const lm_norm *norm, lm_team *team)
{
    const lm_model *m = s->model;
    int64_t first, last;
    own_columns(team, m->embd, &first, &last);
    for (int64_t r = 0; r < s->rows; r++) {
        const int64_t row = r * m->embd;
        lm_add_norm(s->stream + row, added ? added + row : NULL, m->embd, norm->weight, norm->bias, m->epsilon, first, last,
                    s->other + row, s->normal + row);
    }
    float *stream = s->stream; /* others may still read it */
    s->stream = s->other;
    s->other = stream;
    lm_barrier(team);
}

/* New keys and values out of c_attn's outputs into the cache. */
static void remember(const step *s, const lm_layer *layer, lm_team *team)
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
        lm_activate(s->model->activation, s->wide + r * s->model->inner + first, last - first);
    lm_barrier(team);
}

static void walk(void *context, lm_team *team)
{
    step own = *(const step *)context, *s = &own; /* its streams change places, in every thread alike */
    const lm_model *m = s->model;
    const int64_t size = head_size(m), width = attention_width(m);
    const float *added = NULL;
    embed(s, team);
    for (int64_t i = 0; i < m->layers; i++) {
        const lm_layer *layer = m->layer + i;
        const lm_kv kv = kv_of(m, layer);
        add_and_normalize(s, added, &layer->ln_1, team);
        multiply(s, &layer->c_attn, s->normal, m->embd, s->wide, width, team);
        remember(s, layer, team);
        lm_attention_team(&kv, s->wide, width, m->multi_query ? size : 3 * size, s->rows, s->length + s->rows, m->scaling,
                          s->mixed, s->attention, team);
        multiply(s, &layer->attn_proj, s->mixed, m->embd, s->added, m->embd, team);
        add_and_normalize(s, s->added, &layer->ln_2, team);
        multiply(s, &layer->c_fc, s->normal, m->embd, s->wide, m->inner, team);
        activate(s, team);
        multiply(s, &layer->mlp_proj, s->wide, m->inner, s->added, m->embd, team);
        added = s->added;
    }
    add_and_normalize(s, added, &m->ln_f, team);
    multiply(s, &m->head, s->normal, m->embd, s->logits, m->vocab, team);
}

void lm_step(const lm_model *model, const int64_t *ids, int64_t rows, int64_t length, float *logits, void *workspace)
{
    step s = {.model = model, .ids = ids, .rows = rows, .length = length, .logits = logits};
    arrange(&s, (char *)(((uintptr_t)workspace + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT));
    lm_run(walk, &s);
}
