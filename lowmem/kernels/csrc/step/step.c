/* A step without Python: every thread walks through all layers, and threads wait for each other where one needs the
 * results of the others. */
#include "isa.h"
#include "types.h"

enum { COLUMNS = 16, TOGETHER = 16 }; /* floats of a cache line; rows that attend at a time: their lanes stay in the caches */

/* Where a row's key and value go. */
typedef struct {
    int64_t slot, position;
} place;

typedef struct {
    const lm_model *model;
    const lm_feed *feeds;
    const int64_t *ids;
    int64_t count, rows, wanted; /* feeds, and rows of all feeds */
    float *logits;
    place *places;         /* [rows] */
    float *stream, *other; /* [rows, embd]: the residual stream, and the one that replaces it */
    float *normal, *added; /* [rows, embd]: the stream's norm; the output of attention or MLP */
    float *wide;           /* [rows, outputs of c_attn, or inner] */
    float *mixed;          /* [rows, embd]: attention's output before its projection */
    void *linear, *attention; /* workspaces */
} step;

static int64_t head_size(const lm_model *m) { return m->embd / m->heads; }

static int64_t attention_width(const lm_model *m) { return m->embd + 2 * m->kv_heads * head_size(m); }

/* A float32 matrix without gaps between rows. */
static lm_matrix matrix(int64_t rows, float *values, int64_t columns) { return (lm_matrix){values, rows, columns, LM_F32}; }

/* ---- attention's calls --------------------------------------------------------------------------------------- */

/* The attentions of one call: up to TOGETHER rows, of one sequence or of several. */
typedef struct {
    lm_attention each[LM_ATTENTIONS];
    int64_t count;
    int64_t feed, done, row; /* where the next call begins: a feed, its rows that are done, and the row of the step */
} attentions;

/* The next attentions of this layer (NULL: only sizes are wanted). Returns whether there are any. */
static int next_attentions(const step *s, const lm_layer *layer, attentions *a)
{
    const lm_model *m = s->model;
    const int64_t size = head_size(m), width = attention_width(m), slot = m->kv_heads * m->capacity * size;
    int64_t left = TOGETHER;
    for (a->count = 0; a->feed < s->count && left && a->count < LM_ATTENTIONS;) {
        const lm_feed *f = s->feeds + a->feed;
        const int64_t rows = lm_min(f->rows - a->done, left);
        lm_attention now = {
            .kv = {m->heads, m->kv_heads, size, m->capacity, NULL, NULL},
            .query = {NULL, width, m->multi_query ? size : 3 * size, rows, f->length + a->done + rows, m->scaling}};
        if (layer) {
            now.kv.keys = layer->keys + f->slot * slot;
            now.kv.values = layer->values + f->slot * slot;
            now.query.values = s->wide + a->row * width;
            now.out = s->mixed + a->row * m->embd;
        }
        a->each[a->count++] = now;
        left -= rows;
        a->row += rows;
        a->done += rows;
        if (a->done == f->rows) {
            a->feed++;
            a->done = 0;
        }
    }
    return a->count > 0;
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
    size_t at = 0, linear = linear_workspace(&m->head, s->wanted, 0), attention = 0;
    for (attentions a = {.count = 0}; next_attentions(s, NULL, &a);) {
        const size_t bytes = lm_attention_workspace(a.each, a.count);
        attention = bytes > attention ? bytes : attention;
    }
    for (int64_t i = 0; i < m->layers; i++) {
        const lm_layer *layer = m->layer + i;
        linear = linear_workspace(&layer->c_attn, s->rows, linear);
        linear = linear_workspace(&layer->attn_proj, s->rows, linear);
        linear = linear_workspace(&layer->c_fc, s->rows, linear);
        linear = linear_workspace(&layer->mlp_proj, s->rows, linear);
    }
    s->places = part(workspace, &at, (size_t)s->rows * sizeof(place));
    s->stream = part(workspace, &at, narrow);
    s->other = part(workspace, &at, narrow);
    s->normal = part(workspace, &at, narrow);
    s->added = part(workspace, &at, narrow);
    s->mixed = part(workspace, &at, narrow);
    s->wide = part(workspace, &at, (size_t)(s->rows * width) * sizeof(float));
    s->linear = part(workspace, &at, linear);
    s->attention = part(workspace, &at, attention);
    return at;
}

static step step_of(const lm_model *model, const lm_feed *feeds, int64_t count)
{
    step s = {.model = model, .feeds = feeds, .count = count};
    for (int64_t i = 0; i < count; i++) {
        s.rows += feeds[i].rows;
        s.wanted += feeds[i].wanted;
    }
    return s;
}

size_t lm_forward_workspace(const lm_model *model, const lm_feed *feeds, int64_t count)
{
    step s = step_of(model, feeds, count);
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
        const uint16_t *token = m->wte + s->ids[r] * m->embd, *position = m->wpe + s->places[r].position * m->embd;
        for (int64_t i = first; i < last; i++)
            s->stream[r * m->embd + i] = lm_from_16(token[i], m->wte_type) + lm_from_16(position[i], m->wpe_type);
    }
    lm_barrier(team);
}

/* Add `added` (if not NULL) to the stream, and normalize the result. Each thread takes columns, whose sums it needs of whole
 * rows, or rows where there are enough of them. */
static void add_and_normalize(step *s, const float *added, const lm_norm *norm, lm_team *team)
{
    const lm_model *m = s->model;
    int64_t first = 0, last = m->embd, begin = 0, end = s->rows;
    if (s->rows < 2 * lm_size(team))
        own_columns(team, m->embd, &first, &last);
    else
        lm_share(team, s->rows, &begin, &end);
    for (int64_t r = begin; r < end; r++) {
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
        const place *at = s->places + r;
        const int64_t to = ((at->slot * m->kv_heads + head) * m->capacity + at->position) * size;
        for (int64_t d = 0; d < size; d++) {
            layer->keys[to + d] = lm_to_bf16(key[d]);
            layer->values[to + d] = lm_to_bf16(key[size + d]);
        }
    }
}

static void attend(const step *s, const lm_layer *layer, lm_team *team)
{
    for (attentions a = {.count = 0}; next_attentions(s, layer, &a);)
        lm_attention_team(a.each, a.count, s->attention, team);
}

/* Bring the wanted rows of `normal` together, in `added`. */
static void gather_wanted(const step *s, lm_team *team)
{
    const int64_t embd = s->model->embd;
    int64_t first, last, to = 0, end = 0;
    own_columns(team, embd, &first, &last);
    for (const lm_feed *f = s->feeds; f < s->feeds + s->count; f++) {
        end += f->rows;
        for (int64_t r = end - f->wanted; r < end; r++, to++)
            memcpy(s->added + to * embd + first, s->normal + r * embd + first, (size_t)(last - first) * sizeof(float));
    }
    lm_barrier(team);
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
    const lm_matrix normal = matrix(s->rows, s->normal, m->embd), mixed = matrix(s->rows, s->mixed, m->embd);
    const lm_matrix qkv = matrix(s->rows, s->wide, attention_width(m)), inner = matrix(s->rows, s->wide, m->inner);
    const lm_matrix sum = matrix(s->rows, s->added, m->embd), wanted = matrix(s->wanted, s->added, m->embd);
    const float *added = NULL;
    embed(s, team);
    for (int64_t i = 0; i < m->layers; i++) {
        const lm_layer *layer = m->layer + i;
        add_and_normalize(s, added, &layer->ln_1, team);
        multiply(s, &layer->c_attn, normal, qkv, team);
        append_keys(s, layer, team);
        attend(s, layer, team);
        multiply(s, &layer->attn_proj, mixed, sum, team);
        add_and_normalize(s, s->added, &layer->ln_2, team);
        multiply(s, &layer->c_fc, normal, inner, team);
        activate(s, team);
        multiply(s, &layer->mlp_proj, inner, sum, team);
        added = s->added;
    }
    add_and_normalize(s, added, &m->ln_f, team);
    gather_wanted(s, team);
    multiply(s, &m->head, wanted, matrix(s->wanted, s->logits, m->vocab), team);
}

void lm_forward(const lm_model *model, const lm_feed *feeds, int64_t count, const int64_t *ids, float *logits, void *workspace)
{
    step s = step_of(model, feeds, count);
    s.ids = ids;
    s.logits = logits;
    arrange(&s, lm_align(workspace));
    place *to = s.places;
    for (const lm_feed *f = feeds; f < feeds + count; f++)
        for (int64_t r = 0; r < f->rows; r++)
            *to++ = (place){f->slot, f->length + r};
    lm_run(walk, &s);
}
