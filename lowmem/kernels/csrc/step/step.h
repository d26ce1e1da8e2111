/* One step of transformers' GPTBigCode, Llama and their relatives, for several sequences: token ids in, logits out, in one
 * call. */
#ifndef LOWMEM_STEP_H
#define LOWMEM_STEP_H

#include "linear/linear.h"

/* `activation` of a model. */
enum { LM_GELU = 0, LM_GELU_TANH = 1, LM_SILU = 2 };

/* A linear: one of the two is NULL; both are where a model has none. */
typedef struct {
    const lm_packed *packed;
    const lm_dense *dense;
    int64_t planes; /* of the packed linear's activations */
} lm_weight;

/* A norm of rows: bfloat16 [size of a row] each. weight NULL: no norm. bias: NULL for none. */
typedef struct {
    const uint16_t *weight, *bias;
    float epsilon;
    int32_t centred; /* 1: LayerNorm, which subtracts the mean. 0: RMSNorm */
} lm_norm;

typedef struct {
    lm_norm ln_1, ln_2;     /* before attention, and before the MLP */
    lm_norm q_norm, k_norm; /* of each head's query and key, or none */
    lm_weight q, k, v;      /* without k and v, the outputs of q are all of them */
    lm_weight attn_proj;
    lm_weight gate;         /* if any, its activation multiplies up's outputs; otherwise they are activated */
    lm_weight up, mlp_proj;
    uint16_t *keys, *values; /* the KV cache: bfloat16 [slots, kv_heads, capacity, size] */
} lm_layer;

typedef struct {
    int64_t layers, embd, heads, kv_heads, size, inner, vocab, capacity; /* size: of a head, a multiple of 16, as embd is */
    /* Of each head, the dimensions that turn with the position: i < rotary / 2 with i + rotary / 2. 0: none */
    int64_t rotary;
    /* Outputs of q, k and v: 0: all queries, all keys, all values. 1: for each head its query, key and value. */
    int32_t interleaved;
    int32_t activation;         /* LM_GELU, LM_GELU_TANH or LM_SILU */
    float scaling;              /* of the product of query and key */
    float embedding_scale, residual_scale, head_scale; /* of tokens; of what a layer adds; of the head's inputs */
    int16_t wte_type, wpe_type; /* LM_BF16 or LM_F16 */
    const uint16_t *wte, *wpe;  /* [vocab, embd], [positions, embd]; wpe may be NULL */
    const float *cosines, *sines; /* [positions, rotary / 2] */
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
