/* Attention of a few rows over the KV cache: no key or value is expanded to the heads that share it.
 *
 * Keys are taken in chunks of a fixed length, whose results are put together as in Dao et al. 2022 ("FlashAttention"):
 * each chunk leaves its weights' peak and total and the weighted sum of its values. Chunks go to whatever thread is
 * free, and are put together in their order. All queries that share a KV head, of all rows, are lanes side by side.
 *
 * With AVX-512 BF16 products are of bfloat16 (the queries and the weights are rounded to it, as torch does) summed in
 * float32; else all is float32. Softmax in powers of two, its log2(e) in the queries' scale.
 */
#include <float.h>
#include <math.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "internal.h"
#include "lowmem.h"
#include "types.h"

enum {
    CHUNK = 256,   /* keys */
    LM_LANES = 48, /* heads at a time */
    LM_BUNDLE = 16 /* lanes are a multiple of it; also the dimensions that are put together at a time */
};

typedef uint32_t __attribute__((may_alias, aligned(2))) element; /* a float, or two bfloat16, wherever they lie */

/* What a thread needs while it works on a chunk; elements has room for CHUNK rows of a head's size, and
 * for a cache line between every four columns. */
typedef struct {
    float *scores;
    element *elements;
} scratch;

typedef struct {
    int pairs; /* whether a query's elements are pairs of bfloat16 */
    /* part: [2 + size][lanes], the peaks, the totals and the sums of lanes that see the first limit[lane] of `count` keys.
     * next: the keys that this thread takes after them. */
    void (*chunk)(const uint16_t *keys, const uint16_t *values, int64_t count, int64_t size, const element *queries,
                  const int32_t *limit, int64_t lanes, float *part, scratch *own, const uint16_t *next);
    /* out [count][LM_BUNDLE]: dimensions first.. of LM_BUNDLE lanes from `chunks` parts that lie `stride` apart. */
    void (*merge)(const float *parts, int64_t stride, int64_t chunks, int64_t lanes, int64_t first, int64_t count, float *out);
} kernels;

#define NAME(x) x##_portable
#define TARGET
#define WIDTH 4
#define WIDE 2
#define ITEMS 4
#define PAIRS 1
#define MULTIPLY_ADD(sum, x, w) ((sum) + lm_from_bits(x) * (w))
#include "attention_kernel.h"

static const kernels portable = {0, chunk_portable, merge_portable};

#if defined(__x86_64__)
#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#define WIDTH 8
#define WIDE 2
#define ITEMS 4
#define PAIRS 1
#define MULTIPLY_ADD(sum, x, w) ((vector_avx2)_mm256_fmadd_ps(_mm256_broadcast_ss((const float *)&(x)), (__m256)(w), (__m256)(sum)))
#include "attention_kernel.h"

static const kernels avx2 = {0, chunk_avx2, merge_avx2};

#define NAME(x) x##_bf16
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,fma")))
#define WIDTH 16
#define WIDE 3
#define ITEMS 8
#define PAIRS 2
#define MULTIPLY_ADD(sum, x, w)                                                                                        \
    ((vector_bf16)_mm512_dpbf16_ps((__m512)(sum), (__m512bh)_mm512_set1_epi32((int)(x)), (__m512bh)(w)))
#include "attention_kernel.h"

static const kernels bf16 = {1, chunk_bf16, merge_bf16};
#endif

static const kernels *best_kernels(void)
{
#if defined(__x86_64__)
    const lm_isa *isa = lm_best_isa();
    __builtin_cpu_init();
    if (isa == &lm_avx512 && __builtin_cpu_supports("avx512bf16"))
        return &bf16;
    if (isa != &lm_portable)
        return &avx2;
#endif
    return &portable;
}

static int64_t rounded_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

/* The workspace, in floats. */
typedef struct {
    int64_t lanes, chunks;
    int64_t limits, queries, query_stride, parts, part_stride, own, own_stride, count;
} layout;

static layout layout_of(const lm_kv *kv, int64_t rows, int64_t length)
{
    layout l;
    l.lanes = rounded_up(rows * (kv->heads / kv->kv_heads), LM_BUNDLE);
    l.chunks = (length + CHUNK - 1) / CHUNK;
    l.limits = 0; /* [chunks][lanes]: of the keys of a chunk, how many each lane sees */
    l.queries = l.limits + l.chunks * l.lanes;
    l.query_stride = l.lanes * kv->size; /* [kv_heads][groups of lanes][size][lanes] */
    l.parts = l.queries + kv->kv_heads * l.query_stride;
    l.part_stride = (2 + kv->size) * l.lanes; /* [kv_heads][chunks][groups of lanes][2 + size][lanes] */
    l.own = l.parts + kv->kv_heads * l.chunks * l.part_stride;
    l.own_stride = CHUNK * LM_LANES + (CHUNK + 4) * kv->size; /* [threads]: scores and elements */
    l.count = l.own + lm_threads() * l.own_stride;
    return l;
}

size_t lm_attention_workspace(const lm_kv *kv, int64_t rows, int64_t length)
{
    return (size_t)layout_of(kv, rows, length).count * sizeof(float) + 64;
}

static int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

/* The lanes of a group: LM_LANES of them, or what is left. */
static int64_t lanes_from(const layout *l, int64_t lane) { return at_most(l->lanes - lane, LM_LANES); }

/* Queries into lanes, scaled, and what each lane sees; a thread's share of them. Lanes without a head see everything
 * with a query of zeros. A bundle's lanes are one thread's: they share cache lines. */
static void prepare(const lm_kv *kv, const layout *l, int pairs, const float *q, int64_t q_stride, int64_t head_stride,
                    int64_t rows, int64_t length, float scaling, float *workspace, const lm_team *team)
{
    const int64_t share = kv->heads / kv->kv_heads, bundles = l->lanes / LM_BUNDLE, pieces = kv->size / LM_BUNDLE;
    const int64_t count = kv->kv_heads * bundles * pieces, size = lm_size(team);
    const float scale = scaling * 1.44269504f;
    int32_t *limits = (int32_t *)(workspace + l->limits);
    for (int64_t i = count * lm_rank(team) / size; i < count * (lm_rank(team) + 1) / size; i++) {
        const int64_t piece = i % pieces * LM_BUNDLE, first = i / pieces % bundles * LM_BUNDLE, head = i / pieces / bundles;
        const int64_t group = first / LM_LANES * LM_LANES, lanes = lanes_from(l, group);
        for (int64_t lane = first; lane < first + LM_BUNDLE; lane++) {
            const int64_t row = lane / share, seen = row < rows ? length - rows + row + 1 : length;
            for (int64_t c = 0; i < bundles * pieces && piece == 0 && c < l->chunks; c++) {
                int64_t left = seen - c * CHUNK;
                limits[c * l->lanes + lane] = (int32_t)(left < 0 ? 0 : at_most(left, CHUNK));
            }
            const float *from = row < rows ? q + row * q_stride + (head * share + lane % share) * head_stride : NULL;
            float *to = workspace + l->queries + head * l->query_stride + group * kv->size + lane - group;
            for (int64_t d = piece; d < piece + LM_BUNDLE; d += pairs ? 2 : 1) {
                uint32_t bits = 0;
                if (from)
                    bits = pairs ? lm_to_bf16(from[d] * scale) | (uint32_t)lm_to_bf16(from[d + 1] * scale) << 16
                                 : lm_to_bits(from[d] * scale);
                memcpy(to + (pairs ? d / 2 : d) * lanes, &bits, 4);
            }
        }
    }
}

void lm_attention_team(const lm_kv *kv, const float *q, int64_t q_stride, int64_t head_stride, int64_t rows, int64_t length,
                       float scaling, float *out, void *workspace, lm_team *team)
{
    const kernels *k = best_kernels();
    const layout l = layout_of(kv, rows, length);
    const int64_t share = kv->heads / kv->kv_heads, groups = (l.lanes + LM_LANES - 1) / LM_LANES;
    float *const memory = (float *)(((uintptr_t)workspace + 63) & ~(uintptr_t)63);
    float *const own = memory + l.own + lm_rank(team) * l.own_stride;
    scratch mine = {own, (element *)(own + CHUNK * LM_LANES)};
    prepare(kv, &l, k->pairs, q, q_stride, head_stride, rows, length, scaling, memory, team);
    lm_barrier(team);
    const int64_t count = kv->kv_heads * l.chunks * groups;
    for (int64_t i = lm_next(team), next; i < count; i = next) {
        const int64_t group = i % groups * LM_LANES, chunk = i / groups % l.chunks, head = i / groups / l.chunks;
        const int64_t row = head * kv->capacity + chunk * CHUNK, lanes = lanes_from(&l, group);
        next = lm_next(team); /* known now, so that it can be fetched while this one is worked on */
        const int64_t next_row = next < count ? next / groups / l.chunks * kv->capacity + next / groups % l.chunks * CHUNK : row;
        k->chunk(kv->keys + row * kv->size, kv->values + row * kv->size, at_most(length - chunk * CHUNK, CHUNK), kv->size,
                 (const element *)(memory + l.queries + head * l.query_stride + group * kv->size),
                 (const int32_t *)(memory + l.limits) + chunk * l.lanes + group, lanes,
                 memory + l.parts + (head * l.chunks + chunk) * l.part_stride + group * (2 + kv->size), &mine,
                 kv->keys + next_row * kv->size);
    }
    lm_barrier(team);
    const int64_t bundles = l.lanes / LM_BUNDLE, pieces = kv->size / LM_BUNDLE;
    for (int64_t i; (i = lm_next(team)) < kv->kv_heads * bundles * pieces;) {
        const int64_t piece = i % pieces * LM_BUNDLE, lane = i / pieces % bundles * LM_BUNDLE, head = i / pieces / bundles;
        const int64_t group = lane / LM_LANES * LM_LANES, lanes = lanes_from(&l, group);
        float block[LM_BUNDLE * LM_BUNDLE];
        k->merge(memory + l.parts + head * l.chunks * l.part_stride + group * (2 + kv->size) + lane - group, l.part_stride,
                 l.chunks, lanes, piece, LM_BUNDLE, block);
        for (int64_t j = 0; j < LM_BUNDLE && lane + j < rows * share; j++) {
            float *to = out + (lane + j) / share * kv->heads * kv->size + (head * share + (lane + j) % share) * kv->size + piece;
            for (int64_t d = 0; d < LM_BUNDLE; d++)
                to[d] = block[d * LM_BUNDLE + j];
        }
    }
    lm_barrier(team);
}
