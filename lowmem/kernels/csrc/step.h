/* One decode step of transformers' GPTBigCode: token ids in, logits out, in one lm_run. */
#ifndef LOWMEM_STEP_H
#define LOWMEM_STEP_H

#include "lowmem.h"

enum { LM_STEP_ROWS = 16 }; /* at most */

/* One of the two; the other is NULL. */
typedef struct {
    const lm_packed *packed;
    const lm_dense *dense;
    int64_t planes; /* of the activations that the packed one is given */
} lm_weight;

/* Of a LayerNorm: bfloat16 [embd] each. */
typedef struct {
    const uint16_t *weight, *bias;
} lm_norm;

typedef struct {
    lm_norm ln_1, ln_2;
    lm_weight c_attn, attn_proj, c_fc, mlp_proj;
    uint16_t *keys, *values; /* the KV cache: bfloat16 [kv_heads, capacity, size of a head] */
} lm_layer;

typedef struct {
    int64_t layers, embd, heads, kv_heads, inner, vocab, capacity;
    /* c_attn's outputs: all queries, a key and a value (1), or for each head its query, key and value (0). */
    int32_t multi_query;
    int32_t activation; /* LM_GELU.. */
    float epsilon, scaling;
    int16_t wte_type, wpe_type; /* LM_BF16 or LM_F16 */
    const uint16_t *wte, *wpe; /* [vocab, embd], [positions, embd] */
    lm_norm ln_f;
    lm_weight head;
    const lm_layer *layer;
} lm_model;

/* Bytes of workspace for `rows` rows, with the threads that are set. */
LM_EXPORT size_t lm_step_workspace(const lm_model *model, int64_t rows);
/* The tokens `ids` [rows] at the positions length.. into logits [rows, vocab]; their keys and values join the cache, of
 * which `length` tokens are filled. 1..LM_STEP_ROWS rows, length + rows within capacity and positions, ids within the
 * vocabulary. All between the linears is float32, and a row's result does not depend on the rows beside it. */
LM_EXPORT void lm_step(const lm_model *model, const int64_t *ids, int64_t rows, int64_t length, float *logits, void *workspace);

#endif
