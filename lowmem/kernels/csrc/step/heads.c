/* Attention in a step: from the outputs of q, k and v to those of the heads. */
#include "types.h"
#include "walk.h"

enum { TOGETHER = 16 }; /* rows that attend at a time: their lanes stay in the caches */

/* The attentions of one call: up to TOGETHER rows, of one sequence or of several. */
typedef struct {
    lm_attention each[LM_ATTENTIONS];
    int64_t count;
    int64_t feed, done, row; /* where the next call begins: a feed, its rows that are done, and the row of the step */
} attentions;

/* The next attentions of this layer (NULL: only sizes are wanted). Returns whether there are any. */
static int next_attentions(const lm_step *s, const lm_layer *layer, attentions *a)
{
    const lm_model *m = s->model;
    const int64_t size = m->size, width = lm_qkv_width(m), slot = m->kv_heads * m->capacity * size;
    int64_t left = TOGETHER;
    for (a->count = 0; a->feed < s->count && left && a->count < LM_ATTENTIONS;) {
        const lm_feed *f = s->feeds + a->feed;
        const int64_t rows = lm_min(f->rows - a->done, left);
        lm_attention now = {
            .kv = {m->heads, m->kv_heads, size, m->capacity, NULL, NULL},
            .query = {NULL, width, m->interleaved ? 3 * size : size, rows, f->length + a->done + rows, m->scaling}};
        if (layer) {
            now.kv.keys = layer->keys + f->slot * slot;
            now.kv.values = layer->values + f->slot * slot;
            now.query.values = s->wide + a->row * width;
            now.out = s->mixed + a->row * m->heads * size;
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

size_t lm_heads_workspace(const lm_step *s)
{
    size_t most = 0;
    for (attentions a = {.count = 0}; next_attentions(s, NULL, &a);) {
        const size_t bytes = lm_attention_workspace(a.each, a.count);
        most = bytes > most ? bytes : most;
    }
    return most;
}

/* Normalize and rotate a query or a key of row `r`. */
static void turn(const lm_step *s, const lm_norm *norm, int64_t r, float *x)
{
    const lm_model *m = s->model;
    const int64_t half = m->rotary / 2, at = half ? s->places[r].position * half : 0;
    if (!norm->weight && !half)
        return;
    const lm_turn head = {x, m->size, norm, half, m->cosines + at, m->sines + at};
    lm_isa_selected()->elementwise->turn(&head);
}

/* Append a row's key and value of one head to the cache. */
static void append(const lm_step *s, const lm_layer *layer, int64_t r, int64_t head)
{
    const lm_model *m = s->model;
    const lm_place *at = s->places + r;
    const float *row = s->wide + r * lm_qkv_width(m), *key = row + lm_head_at(m, 1, head), *value = row + lm_head_at(m, 2, head);
    const int64_t to = ((at->slot * m->kv_heads + head) * m->capacity + at->position) * m->size;
    for (int64_t d = 0; d < m->size; d++) {
        layer->keys[to + d] = lm_to_bf16(key[d]);
        layer->values[to + d] = lm_to_bf16(value[d]);
    }
}

/* Keys first, then the queries if they change. */
static void turn_and_append(const lm_step *s, const lm_layer *layer, lm_team *team)
{
    const lm_model *m = s->model;
    const int64_t width = lm_qkv_width(m), keys = s->rows * m->kv_heads;
    for (int64_t i = lm_rank(team); i < keys; i += lm_size(team)) {
        const int64_t r = i / m->kv_heads, head = i % m->kv_heads;
        turn(s, &layer->k_norm, r, s->wide + r * width + lm_head_at(m, 1, head));
        append(s, layer, r, head);
    }
    if (!m->rotary && !layer->q_norm.weight)
        return; /* attention's own first barrier comes before it reads keys */
    for (int64_t i = lm_rank(team); i < s->rows * m->heads; i += lm_size(team)) {
        const int64_t r = i / m->heads, head = i % m->heads;
        turn(s, &layer->q_norm, r, s->wide + r * width + lm_head_at(m, 0, head));
    }
    lm_barrier(team);
}

void lm_heads_team(const lm_step *s, const lm_layer *layer, lm_team *team)
{
    turn_and_append(s, layer, team);
    for (attentions a = {.count = 0}; next_attentions(s, layer, &a);)
        lm_attention_team(a.each, a.count, s->attention, team);
}
