/* What the files of the kernels share beside the contract of lowmem.h. */
#ifndef LOWMEM_INTERNAL_H
#define LOWMEM_INTERNAL_H

#include "lowmem.h"

/* ---- attention over the KV cache (attention.c) --------------------------------------------------------------- */

/* Bytes that lm_attention_team needs for `rows` rows whose last sees `length` keys, with the threads that are set. */
size_t lm_attention_workspace(const lm_kv *kv, int64_t rows, int64_t length);
/* Row r of `rows` sees the keys 0..length - rows + r. Its query for head h begins at q + r * q_stride + h * head_stride;
 * its output, [heads * size], at out + r * heads * size. scaling: of a product of query and key. Every thread
 * calls it, and all have finished when it returns. A row's result does not depend on the others, nor on threads. */
void lm_attention_team(const lm_kv *kv, const float *q, int64_t q_stride, int64_t head_stride, int64_t rows, int64_t length,
                       float scaling, float *out, void *workspace, lm_team *team);

#endif
