/* A step while threads walk through it, and its attention (heads.c). */
#ifndef LOWMEM_STEP_WALK_H
#define LOWMEM_STEP_WALK_H

#include "isa.h"

/* Where a row's key and value go. */
typedef struct {
    int64_t slot, position;
} lm_place;

typedef struct {
    const lm_model *model;
    const lm_feed *feeds;
    const int64_t *ids;
    int64_t count, rows, wanted; /* feeds, and rows of all feeds */
    float *logits;
    lm_place *places;      /* [rows] */
    float *stream, *other; /* [rows, embd]: the residual stream, and the one that replaces it */
    float *normal, *added; /* [rows, embd]: the stream's norm; the output of attention or MLP */
    float *wide;           /* [rows, outputs of q, k and v], or [rows, inner] */
    float *gate;           /* [rows, inner] */
    float *mixed;          /* [rows, heads * size]: attention's output before its projection */
    void *linear, *attention; /* workspaces */
} lm_step;

/* Outputs of q, k and v together. */
static inline int64_t lm_qkv_width(const lm_model *m) { return (m->heads + 2 * m->kv_heads) * m->size; }

/* The first of the outputs that belong to head `head` of the queries, keys (part 1) or values (part 2). */
static inline int64_t lm_head_at(const lm_model *m, int part, int64_t head)
{
    if (m->interleaved)
        return (3 * head + part) * m->size;
    return ((part > 0 ? m->heads : 0) + (part > 1 ? m->kv_heads : 0) + head) * m->size;
}

/* Bytes of workspace that the step's attention needs. */
size_t lm_heads_workspace(const lm_step *s);
/* Inside a team: normalize and rotate queries and keys, append keys and values to the cache, and attend. */
void lm_heads_team(const lm_step *s, const lm_layer *layer, lm_team *team);

#endif
