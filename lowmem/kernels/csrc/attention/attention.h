/* Causal attention over the KV cache. */
#ifndef LOWMEM_ATTENTION_H
#define LOWMEM_ATTENTION_H

#include "lowmem.h"

/* The keys and values of one decoder layer and one sequence, bfloat16 [kv_heads, capacity, size] each. */
typedef struct {
    int64_t heads, kv_heads; /* heads / kv_heads query heads share each key head */
    int64_t size;            /* of a head: a multiple of 16 */
    int64_t capacity;
    const uint16_t *keys, *values;
} lm_kv;

/* The queries of the last `rows` of `length` tokens. Row r sees the keys 0..length - rows + r. */
typedef struct {
    const void *values; /* row r of head h begins at value r * row_stride + h * head_stride */
    int64_t row_stride, head_stride;
    int64_t rows, length;
    float scaling; /* of the product of query and key */
} lm_query;

/* Bytes of workspace that lm_prompt_attention needs with the present number of threads. */
LM_EXPORT size_t lm_prompt_attention_workspace(const lm_kv *kv, int64_t length);
/* Attention of any number of rows. The query's values are bfloat16; out: bfloat16 [rows, heads * size]. A row's result
 * depends neither on the other rows nor on threads. */
LM_EXPORT void lm_prompt_attention(const lm_kv *kv, const lm_query *query, uint16_t *out, void *workspace);

#endif
