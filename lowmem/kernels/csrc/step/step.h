/* One step of transformers' GPTBigCode, for several sequences: token ids in, logits out, in one call. */
#ifndef LOWMEM_STEP_H
#define LOWMEM_STEP_H

#include "linear/linear.h"

/* `activation` of a model. */
enum { LM_GELU = 0, LM_GELU_TANH = 1 };

/* A linear: one of the two is NULL. */
typedef struct {
    const lm_packed *packed;
    const lm_dense *dense;
    int64_t planes; /* of the packed linear's activations */
} lm_weight;

/* A LayerNorm: bfloat16 [embd] each. */
typedef struct {
    const uint16_t *weight, *bias;
} lm_norm;

typedef struct {
    lm_norm ln_1, ln_2;
    lm_weight c_attn, attn_proj, c_fc, mlp_proj;
    uint16_t *keys, *values; /* the KV cache: bfloat16 [slots, kv_heads, capacity, size of a head] */
} lm_layer;

typedef struct {
    int64_t layers, embd, heads, kv_heads, inner, vocab, capacity;
    /* 1: c_attn's outputs are all queries, one key and one value. 0: for each head its query, key and value. */
    int32_t multi_query;
    int32_t activation; /* LM_GELU or LM_GELU_TANH */
    float epsilon, scaling;
    int16_t wte_type, wpe_type; /* LM_BF16 or LM_F16 */
    const uint16_t *wte, *wpe;  /* [vocab, embd], [positions, embd] */
    lm_norm ln_f;
    lm_weight head;
    const lm_layer *layer; /* [layers] */
} lm_model;

/* The tokens of one sequence that a step appends. */
typedef struct {
    int64_t slot;   /* of the KV cache */
    int64_t length; /* tokens that the slot holds */
    int64_t rows;   /* tokens to append */
    int64_t wanted; /* of how many of the last ones the logits are wanted */
} lm_feed;

/* Bytes of workspace that lm_forward needs with the present number of threads. */
LM_EXPORT size_t lm_forward_workspace(const lm_model *model, const lm_feed *feeds, int64_t count);
/* Process the tokens `ids`, those of one feed after those of the other, and write the wanted logits, [rows, vocab] in the same
 * order. Their keys and values are appended to the slots, which differ. length + rows is within capacity and positions; ids
 * are within the vocabulary. Everything between the linears is float32, and a row's result does not depend on the other rows
 * of its feed or of others: a prompt's tokens leave the same bits in whatever steps they are processed. */
LM_EXPORT void lm_forward(const lm_model *model, const lm_feed *feeds, int64_t count, const int64_t *ids, float *logits,
                       void *workspace);

#endif
