/* Attention inside a team of threads, and what an instruction set provides for it. */
#ifndef LOWMEM_ATTENTION_KERNELS_H
#define LOWMEM_ATTENTION_KERNELS_H

#include "attention.h"
#include "threads.h"

/* Attention of a few rows of one sequence. The query's values are float32; out: float32 [rows, heads * size]. */
typedef struct {
    lm_kv kv;
    lm_query query;
    float *out;
} lm_attention;

enum { LM_ATTENTIONS = 16 }; /* of one call, at most */

/* Bytes of workspace that lm_attention_team needs for these attentions; values, keys and results may be NULL. */
size_t lm_attention_workspace(const lm_attention *attentions, int64_t count);
/* Attentions of several sequences. Every thread calls it, and all have finished when it returns. A row's result depends
 * neither on the other rows nor on threads. */
void lm_attention_team(const lm_attention *attentions, int64_t count, void *workspace, lm_team *team);

enum {
    LM_CHUNK = 256, /* keys of a chunk, at most */
    LM_LANES = 48,  /* lanes of a group, at most: a lane is one row of one head */
    LM_BUNDLE = 16  /* lanes are a multiple of it; also the dimensions that are merged at a time */
};

typedef uint32_t __attribute__((may_alias, aligned(2))) lm_element; /* a float, or two bfloat16, unaligned */

/* A chunk of keys and a group of lanes. */
typedef struct {
    const uint16_t *keys, *values; /* [count, size] */
    int64_t count, size;
    const lm_element *queries; /* [size][lanes] floats, or [size / 2][lanes] pairs of bfloat16 */
    const int32_t *limit;      /* lane l sees the first limit[l] keys */
    int64_t lanes;
    float *part;          /* result: [2 + size][lanes], the peaks, the totals and the weighted sums of values */
    float *scores;        /* of this thread: [LM_CHUNK][LM_LANES] */
    lm_element *elements; /* of this thread: [LM_CHUNK + 4, size] */
    const uint16_t *next; /* the keys of this thread's next chunk, which are prefetched */
} lm_chunk;

/* The parts of all chunks of a bundle of lanes. */
typedef struct {
    const float *parts; /* of the first chunk: of the bundle's first lane */
    int64_t stride, chunks;
    int64_t lanes;      /* of the group that the bundle belongs to */
    int64_t first;      /* of the LM_BUNDLE dimensions that are merged */
    float *out;         /* result: [LM_BUNDLE dimensions][LM_BUNDLE lanes] */
} lm_merge;

typedef struct {
    int pairs; /* whether an element is a pair of bfloat16 */
    void (*chunk)(const lm_chunk *chunk);
    void (*merge)(const lm_merge *merge);
} lm_attention_kernels;

extern const lm_attention_kernels lm_attention_portable;
#if defined(__x86_64__)
extern const lm_attention_kernels lm_attention_avx2, lm_attention_bf16;
#elif defined(__aarch64__)
extern const lm_attention_kernels lm_attention_neon;
#endif

#endif
