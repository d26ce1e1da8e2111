/* Linears inside a team of threads, and what an instruction set provides for them. */
#ifndef LOWMEM_LINEAR_KERNELS_H
#define LOWMEM_LINEAR_KERNELS_H

#include "linear.h"
#include "threads.h"

/* A packed linear and where its outputs go. */
typedef struct {
    const lm_packed *w;
    lm_matrix y;
} lm_product;

/* lm_linear inside a team, for `count` linears of one input: every thread calls it, and all have finished when it returns.
 * Their weights have the same inputs, lm_kernel_group and bits, so that the input is quantized once. */
void lm_linears_team(const lm_product *products, int64_t count, const lm_matrix *x, int planes, void *workspace, lm_team *team);
/* One dense linear, without a workspace. x and y are float32, and x has no gaps between rows. */
void lm_dense_team(const lm_dense *w, const lm_matrix *x, const lm_matrix *y, lm_team *team);

/* Rows of activations as integers, in a byte order of the instruction set's own. */
typedef struct {
    int64_t rows, inputs;
    int32_t group;  /* lm_kernel_group of the weight */
    int32_t planes; /* 1, 2, 3 or LM_PAIRED */
    int32_t bits;   /* of the weight */
    void *digits;   /* lm_linear_kernels.digit_bytes bytes, 64-byte aligned */
    float *scales;  /* [inputs / group, rows] */
    int32_t *sums;  /* [inputs / group, rows, 3]: the sum of each plane's digits. LM_PAIRED has two; the first one counts
                       a shared digit once for each product that it takes part in. NEON keeps other sums, see neon.h. */
} lm_input;

/* The planes whose sums are kept. */
#define LM_SUMS(planes) ((planes) == LM_PAIRED ? 2 : (planes))

/* Outputs first..last-1 of a packed linear, for all rows. `first` is a multiple of 16; `last` is one too, or w->outputs. */
typedef struct {
    const lm_packed *w;
    const lm_input *input;
    int64_t first, last;
    float *y; /* output o of row r is y[r * stride + o - first]; the kernels add to it */
    int64_t stride;
    void *scratch; /* LM_SCRATCH_BYTES of this thread; `prefill` only */
} lm_piece;

enum {
    LM_PREFILL_COLUMNS = 128,     /* outputs of a piece for `prefill`, at most */
    LM_SCRATCH_BYTES = 128 * 384  /* LM_PREFILL_COLUMNS unpacked weights of a group, and LM_PAIRED's pairs */
};

/* Outputs first..last-1 of a dense linear, for all rows: y[r * stride + o - first] is the sum over i of
 * x[r * in + i] weight[o, i], plus bias, in float32. */
typedef struct {
    const lm_dense *w;
    const float *x;
    int64_t rows, first, last;
    float *y;
    int64_t stride;
} lm_dense_piece;

/* What a dense kernel is compiled for: the weight's type, and the rows and outputs of a register tile. All calls pass
 * constants, and all functions that take it are inlined. */
typedef struct {
    int type, rows, outputs;
} lm_dense_shape;

typedef struct {
    size_t (*digit_bytes)(int64_t rows, int64_t in, int planes);
    /* Quantize groups first..last-1 (numbered by input->group) of all rows of x into input. */
    void (*quantize)(const lm_matrix *x, lm_input *input, int64_t first, int64_t last);
    void (*decode)(const lm_piece *piece);  /* unpacks weights as they stream by: for a step's rows and short prompts */
    void (*prefill)(const lm_piece *piece); /* unpacks weights into scratch, then multiplies all rows */
    void (*dense)(const lm_dense_piece *piece);
} lm_linear_kernels;

extern const lm_linear_kernels lm_linear_portable;
#if defined(__x86_64__)
extern const lm_linear_kernels lm_linear_avx2, lm_linear_avx512;
#elif defined(__aarch64__)
extern const lm_linear_kernels lm_linear_neon, lm_linear_neon_dotprod, lm_linear_neon_i8mm;
#endif

/* ---- where a weight's words and scales lie ------------------------------------------------------------------- */

/* Whether a weight is stored in planes (linear.h). */
#define IS_PLANAR(bits) ((bits) >= 5 && (bits) <= 7)

/* Words from one row of words to the next. */
static inline int64_t lm_word_stride(const lm_packed *w) { return w->tiled ? LM_TILE_OUTPUTS : w->outputs; }

/* The word of row `row` for output `o`. The outputs that follow in the same tile lie beside it. */
static inline const uint32_t *lm_words(const lm_packed *w, int64_t row, int64_t o)
{
    if (!w->tiled)
        return w->qweight + row * w->outputs + o;
    return w->qweight + (o / LM_TILE_OUTPUTS * (w->inputs * w->bits / 32) + row) * LM_TILE_OUTPUTS + o % LM_TILE_OUTPUTS;
}

/* The index into scales and zeros of output `o` of a group. */
static inline int64_t lm_group_at(const lm_packed *w, int64_t group, int64_t o)
{
    return w->tiled ? (o / LM_TILE_OUTPUTS * (w->inputs / w->group) + group) * LM_TILE_OUTPUTS + o % LM_TILE_OUTPUTS
                    : group * w->outputs + o;
}

/* The row of the weight's scales that group `group` of the input belongs to. */
static inline int64_t lm_scale_row(const lm_packed *w, const lm_input *input, int64_t group)
{
    return group * input->group / w->group;
}

#endif
