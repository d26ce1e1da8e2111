/* Attention of a prompt's rows over the KV cache, a few rows at a time. */
#include "kernels.h"
#include "types.h"

enum { ROWS = 16 }; /* at a time: their lanes and parts stay in the caches */

typedef struct {
    const lm_kv *kv;
    const lm_query *query;
    uint16_t *out;
    float *queries, *mixed; /* [ROWS, heads * size] each */
    void *workspace;        /* of lm_attention_team */
} call;

static size_t block_bytes(const lm_kv *kv) { return lm_aligned((size_t)(ROWS * kv->heads * kv->size) * sizeof(float)); }

size_t lm_prompt_attention_workspace(const lm_kv *kv, int64_t length)
{
    const lm_attention most = {.kv = *kv, .query = {.rows = lm_min(ROWS, length), .length = length}};
    return 2 * block_bytes(kv) + lm_attention_workspace(&most, 1) + LM_ALIGNMENT;
}

static void body(void *context, lm_team *team)
{
    const call *c = context;
    const lm_kv *kv = c->kv;
    const lm_query *all = c->query;
    const int64_t width = kv->heads * kv->size;
    for (int64_t first = 0; first < all->rows; first += ROWS) {
        const int64_t rows = lm_min(all->rows - first, ROWS), length = all->length - all->rows + first + rows;
        const lm_attention attention = {*kv, {c->queries, width, kv->size, rows, length, all->scaling}, c->mixed};
        int64_t begin, end;
        lm_share(team, rows * kv->heads, &begin, &end);
        for (int64_t i = begin; i < end; i++) {
            const uint16_t *from = (const uint16_t *)all->values + (first + i / kv->heads) * all->row_stride +
                                   i % kv->heads * all->head_stride;
            for (int64_t d = 0; d < kv->size; d++)
                c->queries[i * kv->size + d] = lm_from_bf16(from[d]);
        }
        lm_barrier(team);
        lm_attention_team(&attention, 1, c->workspace, team);
        uint16_t *to = c->out + first * width;
        for (int64_t i = begin * kv->size; i < end * kv->size; i++)
            to[i] = lm_to_bf16(c->mixed[i]);
        lm_barrier(team);
    }
}

void lm_prompt_attention(const lm_kv *kv, const lm_query *query, uint16_t *out, void *workspace)
{
    char *memory = lm_align(workspace);
    call c = {kv, query, out, (float *)memory, (float *)(memory + block_bytes(kv)), memory + 2 * block_bytes(kv)};
    lm_run(body, &c);
}
