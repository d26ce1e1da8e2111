/* Attention of a prompt's rows over the KV cache: a few rows at a time, all keys that the last of them sees. */
#include <stdint.h>

#include "internal.h"
#include "lowmem.h"
#include "types.h"

enum { ROWS = 16, ALIGNMENT = 64 }; /* at a time: their lanes and parts stay in the caches */

typedef struct {
    const lm_kv *kv;
    const uint16_t *q;
    uint16_t *out;
    int64_t q_stride, head_stride, rows, length;
    float scaling;
    float *queries, *mixed; /* [ROWS, heads * size] each */
    void *attention;
} call;

static size_t aligned(size_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

static size_t block_bytes(const lm_kv *kv) { return aligned((size_t)(ROWS * kv->heads * kv->size) * sizeof(float)); }

static int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

size_t lm_prompt_attention_workspace(const lm_kv *kv, int64_t length)
{
    return 2 * block_bytes(kv) + lm_attention_workspace(kv, at_most(ROWS, length), length) + ALIGNMENT;
}

static void body(void *context, lm_team *team)
{
    const call *c = context;
    const lm_kv *kv = c->kv;
    const int64_t width = kv->heads * kv->size, rank = lm_rank(team), size = lm_size(team);
    for (int64_t first = 0; first < c->rows; first += ROWS) {
        const int64_t rows = at_most(c->rows - first, ROWS), heads = rows * kv->heads;
        const int64_t begin = heads * rank / size, end = heads * (rank + 1) / size;
        for (int64_t i = begin; i < end; i++) {
            const uint16_t *from = c->q + (first + i / kv->heads) * c->q_stride + i % kv->heads * c->head_stride;
            for (int64_t d = 0; d < kv->size; d++)
                c->queries[i * kv->size + d] = lm_from_bf16(from[d]);
        }
        lm_barrier(team);
        lm_attention_team(kv, c->queries, width, kv->size, rows, c->length - c->rows + first + rows, c->scaling, c->mixed,
                          c->attention, team);
        uint16_t *to = c->out + first * width;
        for (int64_t i = begin * kv->size; i < end * kv->size; i++)
            to[i] = lm_to_bf16(c->mixed[i]);
        lm_barrier(team);
    }
}

void lm_prompt_attention(const lm_kv *kv, const uint16_t *q, int64_t q_stride, int64_t head_stride, int64_t rows,
                         int64_t length, float scaling, uint16_t *out, void *workspace)
{
    char *memory = (char *)aligned((size_t)workspace);
    call c = {kv,     q,       out, q_stride, head_stride, rows, length, scaling, (float *)memory, (float *)(memory + block_bytes(kv)),
              memory + 2 * block_bytes(kv)};
    lm_run(body, &c);
}
