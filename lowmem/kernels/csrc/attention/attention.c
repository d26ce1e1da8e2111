/* Attention of a few rows over the KV cache, of several sequences at once. No key or value is expanded to the heads that
 * share it.
 *
 * Keys are taken in chunks of a fixed length, whose results are merged as in Dao et al. 2022 ("FlashAttention"): each chunk
 * stores the peak and the total of its weights and the weighted sum of its values. Idle threads take chunks, of whichever
 * sequence; the results are merged in order. All queries of all rows that share a KV head are lanes side by side. The softmax is in powers of
 * two, with log2(e) in the queries' scale.
 */
#include "isa.h"
#include "types.h"

/* An attention, and offsets into the workspace, in floats. */
typedef struct {
    const lm_kv *kv;
    const lm_query *query;
    float *out;
    int64_t lanes, groups, chunks;
    int64_t limits;                /* [chunks][lanes]: how many of a chunk's keys each lane sees */
    int64_t queries, query_stride; /* [kv_heads][groups of lanes][size][lanes] */
    int64_t parts, part_stride;    /* [kv_heads][chunks][groups of lanes][2 + size][lanes] */
    int64_t pieces, bundles; /* of this attention and of all before it: chunks by groups of lanes; bundles */
} plan;

/* All attentions of a call. */
typedef struct {
    plan each[LM_ATTENTIONS];
    int64_t count;
    int64_t own, own_stride; /* [threads]: scores and elements */
    int64_t floats;
} plans;

static plans plan_all(const lm_attention *attentions, int64_t count)
{
    plans all = {.count = count};
    int64_t at = 0, pieces = 0, bundles = 0;
    for (int64_t i = 0; i < count; i++) {
        const lm_kv *kv = &attentions[i].kv;
        const lm_query *query = &attentions[i].query;
        plan p = {.kv = kv, .query = query, .out = attentions[i].out, .limits = at};
        p.lanes = lm_round_up(query->rows * (kv->heads / kv->kv_heads), LM_BUNDLE);
        p.groups = (p.lanes + LM_LANES - 1) / LM_LANES;
        p.chunks = (query->length + LM_CHUNK - 1) / LM_CHUNK;
        p.queries = p.limits + p.chunks * p.lanes;
        p.query_stride = p.lanes * kv->size;
        p.parts = p.queries + kv->kv_heads * p.query_stride;
        p.part_stride = (2 + kv->size) * p.lanes;
        at = p.parts + kv->kv_heads * p.chunks * p.part_stride;
        p.pieces = pieces += kv->kv_heads * p.chunks * p.groups;
        p.bundles = bundles += kv->kv_heads * (p.lanes / LM_BUNDLE) * (kv->size / LM_BUNDLE);
        all.each[i] = p;
    }
    all.own = at;
    all.own_stride = LM_CHUNK * LM_LANES + (LM_CHUNK + 4) * attentions[0].kv.size;
    all.floats = at + lm_threads() * all.own_stride;
    return all;
}

size_t lm_attention_workspace(const lm_attention *attentions, int64_t count)
{
    return (size_t)plan_all(attentions, count).floats * sizeof(float) + LM_ALIGNMENT;
}

/* The lanes of the group that begins at `lane`. */
static int64_t lanes_from(const plan *p, int64_t lane) { return lm_min(p->lanes - lane, LM_LANES); }

/* LM_BUNDLE lanes of a KV head and as many dimensions: the unit of work before and after the chunks. */
typedef struct {
    int64_t head, lane, dimension;
    int64_t group, lanes; /* the group of lanes that it belongs to */
} bundle;

static int64_t bundles(const plan *p) { return p->kv->kv_heads * (p->lanes / LM_BUNDLE) * (p->kv->size / LM_BUNDLE); }

static int64_t pieces(const plan *p) { return p->kv->kv_heads * p->chunks * p->groups; }

static bundle bundle_of(const plan *p, int64_t number)
{
    const int64_t pieces = p->kv->size / LM_BUNDLE, per_head = p->lanes / LM_BUNDLE;
    const int64_t lane = number / pieces % per_head * LM_BUNDLE, group = lane / LM_LANES * LM_LANES;
    return (bundle){number / pieces / per_head, lane, number % pieces * LM_BUNDLE, group, lanes_from(p, group)};
}

/* Scale the queries and write them into lanes, and set what each lane sees; one thread's share. Lanes without a row see all
 * keys with a query of zeros. One thread writes all lanes of a bundle, which share cache lines. */
static void prepare(const plan *p, int pairs, float *workspace, const lm_team *team)
{
    const lm_kv *kv = p->kv;
    const lm_query *query = p->query;
    const int64_t share = kv->heads / kv->kv_heads;
    const float scale = query->scaling * 1.44269504f;
    int32_t *limits = (int32_t *)(workspace + p->limits);
    int64_t begin, end;
    lm_share(team, bundles(p), &begin, &end);
    for (int64_t i = begin; i < end; i++) {
        const bundle b = bundle_of(p, i);
        for (int64_t lane = b.lane; lane < b.lane + LM_BUNDLE; lane++) {
            const int64_t row = lane / share, head = b.head * share + lane % share;
            const int64_t seen = row < query->rows ? query->length - query->rows + row + 1 : query->length;
            for (int64_t c = 0; b.head == 0 && b.dimension == 0 && c < p->chunks; c++) {
                const int64_t left = seen - c * LM_CHUNK;
                limits[c * p->lanes + lane] = (int32_t)(left < 0 ? 0 : lm_min(left, LM_CHUNK));
            }
            const float *from = row < query->rows
                ? (const float *)query->values + row * query->row_stride + head * query->head_stride : NULL;
            float *to = workspace + p->queries + b.head * p->query_stride + b.group * kv->size + lane - b.group;
            for (int64_t d = b.dimension; d < b.dimension + LM_BUNDLE; d += pairs ? 2 : 1) {
                uint32_t bits = 0;
                if (from)
                    bits = pairs ? lm_to_bf16(from[d] * scale) | (uint32_t)lm_to_bf16(from[d + 1] * scale) << 16
                                 : lm_to_bits(from[d] * scale);
                memcpy(to + (pairs ? d / 2 : d) * b.lanes, &bits, 4);
            }
        }
    }
}

/* A chunk of an attention's keys and a group of its lanes. */
typedef struct {
    const plan *p;
    int64_t head, chunk, group;
    const uint16_t *keys;
    int64_t first; /* value of the chunk's first key, and of its first value */
} piece;

/* Piece `i` of all attentions; p NULL past the end. */
static piece piece_of(const plans *all, int64_t i)
{
    for (const plan *p = all->each; p < all->each + all->count; p++) {
        if (i >= p->pieces)
            continue;
        i -= p->pieces - pieces(p);
        piece found = {.p = p, .head = i / p->groups / p->chunks, .chunk = i / p->groups % p->chunks,
                       .group = i % p->groups * LM_LANES};
        found.first = (found.head * p->kv->capacity + found.chunk * LM_CHUNK) * p->kv->size;
        found.keys = p->kv->keys + found.first;
        return found;
    }
    return (piece){.p = NULL};
}

static void all_chunks(const plans *all, const lm_attention_kernels *kernels, float *workspace, lm_team *team)
{
    float *const own = workspace + all->own + lm_rank(team) * all->own_stride;
    for (piece now = piece_of(all, lm_next(team)), next; now.p; now = next) {
        const plan *p = now.p;
        const lm_kv *kv = p->kv;
        next = piece_of(all, lm_next(team)); /* taken now, so that its keys can be prefetched */
        const lm_chunk c = {
            .keys = now.keys,
            .values = kv->values + now.first,
            .count = lm_min(p->query->length - now.chunk * LM_CHUNK, LM_CHUNK),
            .size = kv->size,
            .queries = (const lm_element *)(workspace + p->queries + now.head * p->query_stride + now.group * kv->size),
            .limit = (const int32_t *)(workspace + p->limits) + now.chunk * p->lanes + now.group,
            .lanes = lanes_from(p, now.group),
            .part = workspace + p->parts + (now.head * p->chunks + now.chunk) * p->part_stride + now.group * (2 + kv->size),
            .scores = own,
            .elements = (lm_element *)(own + LM_CHUNK * LM_LANES),
            .next = next.p ? next.keys : now.keys,
        };
        kernels->chunk(&c);
    }
}

/* Merge the chunks of bundle `i` of one attention. */
static void merge_bundle(const plan *p, int64_t i, const lm_attention_kernels *kernels, const float *workspace)
{
    const lm_kv *kv = p->kv;
    const int64_t share = kv->heads / kv->kv_heads, lanes = p->query->rows * share;
    const bundle b = bundle_of(p, i);
    float merged[LM_BUNDLE * LM_BUNDLE];
    const lm_merge m = {
        .parts = workspace + p->parts + b.head * p->chunks * p->part_stride + b.group * (2 + kv->size) + b.lane - b.group,
        .stride = p->part_stride, .chunks = p->chunks, .lanes = b.lanes, .first = b.dimension, .out = merged};
    kernels->merge(&m);
    for (int64_t j = 0; j < LM_BUNDLE && b.lane + j < lanes; j++) {
        const int64_t row = (b.lane + j) / share, head = b.head * share + (b.lane + j) % share;
        float *to = p->out + (row * kv->heads + head) * kv->size + b.dimension;
        for (int64_t d = 0; d < LM_BUNDLE; d++)
            to[d] = merged[d * LM_BUNDLE + j];
    }
}

static void merge_all(const plans *all, const lm_attention_kernels *kernels, const float *workspace, lm_team *team)
{
    const plan *p = all->each, *end = p + all->count;
    for (int64_t i = lm_next(team);; i = lm_next(team)) {
        while (p < end && i >= p->bundles) /* numbers only grow */
            p++;
        if (p == end)
            return;
        merge_bundle(p, i - (p->bundles - bundles(p)), kernels, workspace);
    }
}

void lm_attention_team(const lm_attention *attentions, int64_t count, void *workspace, lm_team *team)
{
    const lm_attention_kernels *kernels = lm_isa_selected()->attention;
    const plans all = plan_all(attentions, count);
    float *memory = (float *)lm_align(workspace);
    for (int64_t i = 0; i < count; i++)
        prepare(all.each + i, kernels->pairs, memory, team);
    lm_barrier(team);
    all_chunks(&all, kernels, memory, team);
    lm_barrier(team);
    merge_all(&all, kernels, memory, team);
    lm_barrier(team);
}
