/* The C interface of lowmem's kernels for the CPU. C11, libc and POSIX threads, nothing else.
 *
 * A packed linear is read where GPTQ's tensors lie, mapped from their file: `qweight` has, for each output, 32 bits
 * of consecutive inputs, and 16 outputs side by side are one vector of 64 bytes whose bytes a dot-product
 * instruction can take after one shift and one mask. So a load costs nothing, and the first token is there when the
 * weights have been read once. Their order in memory is another matter: the same words in panels of 64 outputs, one
 * panel after the other, are read at the memory's own pace, while rows a page apart are not (lm_to_panels).
 *
 * What is computed, by every instruction set to the last bit:
 *
 *   For each row and each group of inputs (at most 256, see lm_kernel_group), a = max |x|, scale = a / L, and
 *   q = round(x * (L / a)) to nearest even, held within ±L. L is 127, 32639 or 8355711: one, two or three bytes
 *   ("planes") in balanced digits, q = p0 + 256 p1 + 65536 p2 with digits -128..127. Two planes hold more than a bfloat16
 *   or float16 does beside its group's largest, three as much as a float32.
 *
 *   LM_PAIRED is one plane and a half, for weights of at most 4 bits: L is 30448, and of q of an even input and r of the
 *   next one (m = floor((r + 8) / 16), d = m mod 16) become q' = d + 16 floor((q - d + 8) / 16) and r' = 16 m. Both are
 *   then off by 8 at most, 12 bits, and with the digit p = q' - 256 h, the same for both, r' = 16 p + 256 k: so
 *   w q' + v r' = 256 (w h + v k) + p (w + 16 v), where w + 16 v is a byte, as GPTQ packs 4 bits. Three products of
 *   bytes for two inputs, where two planes take four.
 *
 *   c = the exact integer sum over the group of (w - zero) q, brought to float: with one plane, two and LM_PAIRED
 *   (float)(int32)c, with three fmaf((float)c2, 65536, (float)(c0 + 256 c1)), where ck are the sums of plane k.
 *
 *   y = fmaf(c, scale * weight_scale, y) over the groups in their order, from y = 0; then y + bias.
 *
 * So a row's result does not depend on the rows beside it, on threads, or on the machine.
 */
#ifndef LOWMEM_H
#define LOWMEM_H

#include <stddef.h>
#include <stdint.h>

#define LM_EXPORT __attribute__((visibility("default")))

enum { LM_F32 = 0, LM_F16 = 1, LM_BF16 = 2 };

/* A GPTQ weight. bits 8, 4, 3 or 2; `group` inputs share a scale (a multiple of 32 that divides `in`). */
typedef struct {
    int32_t bits, group;
    int64_t in, out;
    const uint32_t *qweight; /* [in * bits / 32, out] */
    const void *scales;      /* [in / group, out] */
    const uint8_t *zeros;    /* [in / group, out], or NULL: all are 2^(bits-1) */
    const void *bias;        /* [out], or NULL */
    int32_t scales_type, bias_type;
    int32_t panels; /* qweight, scales and zeros are in panels: [out / LM_PANEL, rounded up][rows][LM_PANEL] */
} lm_packed;

#define LM_PANEL 64

/* A dense weight [out, in], of 16 bits: LM_F16, or LM_BF16. */
typedef struct {
    int64_t in, out;
    const uint16_t *weight;
    const void *bias; /* [out], or NULL */
    int32_t bias_type, weight_type;
} lm_dense;

/* Rows of activations as integers: made by lm_isa.quantize, in an order of bytes that is the instruction set's own. */
typedef struct {
    int64_t rows, in;
    int32_t group;  /* of the quantization: lm_kernel_group of the weight */
    int32_t planes; /* 1, 2, 3 or LM_PAIRED */
    int32_t bits;   /* of the weight that they are for */
    void *digits;   /* lm_isa.digit_bytes bytes, 64-byte aligned */
    float *scales;  /* [in / group, rows] */
    int32_t *sums;  /* [in / group, rows, 3]: of each plane's digits; LM_PAIRED has two, the lower one times its weights */
} lm_input;

/* For weights of 8 bits it is two planes. */
enum { LM_PAIRED = 4 };
#define LM_SUMS(planes) ((planes) == LM_PAIRED ? 2 : (planes))

/* ---- threads (threads.c) ------------------------------------------------------------------------------------- */

typedef struct lm_team lm_team;
typedef void (*lm_body)(void *context, lm_team *team);

/* Run body on every thread at once, the caller being one of them. Not reentrant: one caller at a time. */
LM_EXPORT void lm_run(lm_body body, void *context);
/* All threads of the team wait for each other. */
void lm_barrier(lm_team *team);
int lm_rank(const lm_team *team);
int lm_size(const lm_team *team);
/* The next piece of work: 0, 1, 2 … each given to one thread. Every thread asks until it gets >= count; then all
 * must meet in lm_barrier, which starts the next count from 0. */
int64_t lm_next(lm_team *team);

/* threads: how many; gomp_parallel: address of the GOMP_parallel of the OpenMP that torch uses, so that its threads
 * do the work, or NULL for threads of our own. */
LM_EXPORT void lm_set_threads(int threads, void *gomp_parallel);
LM_EXPORT int lm_threads(void);

/* ---- instruction sets (isa.c chooses) ------------------------------------------------------------------------ */

typedef struct {
    const char *name; /* "AVX-512 VNNI", "AVX2", "portable C" */
    size_t (*digit_bytes)(int64_t rows, int64_t in, int planes);
    /* Rows x [.., in] of LM_ type, of groups first..last-1 (as numbered by input->group), into input. */
    void (*quantize)(const void *x, int x_type, int64_t stride, lm_input *input, int64_t first, int64_t last);
    /* y[r * stride + o - first] for o in first..last-1 (multiples of 16, or last = out) and every row: with bias.
     * `few`: takes the weights apart as they stream by, for a step's rows and short prompts; `many`: unpacks them into
     * scratch first. */
    void (*few)(const lm_packed *w, const lm_input *input, int64_t first, int64_t last, float *y, int64_t stride);
    void (*many)(const lm_packed *w, const lm_input *input, int64_t first, int64_t last, float *y, int64_t stride,
                 void *scratch);
    /* y[r * stride + o - first] = sum_i x[r * in + i] weight[o, i] + bias[o], all in float32, for o in first..last-1. */
    void (*dense)(const lm_dense *w, const float *x, int64_t rows, int64_t first, int64_t last, float *y,
                  int64_t stride);
} lm_isa;

#define LM_FEW 16 /* rows of a step, at most */
#define LM_MANY_COLUMNS 128            /* columns that `many` is given at a time, at most */
#define LM_SCRATCH_BYTES (128 * 384)   /* what `many` needs a thread */

extern const lm_isa lm_portable;
#if defined(__x86_64__)
extern const lm_isa lm_avx2, lm_avx512;
#endif
/* The best that this CPU has. */
const lm_isa *lm_best_isa(void);
/* Its name; lm_use_isa("portable C") chooses another for tests, 0 when this CPU cannot. */
LM_EXPORT const char *lm_isa_name(void);
LM_EXPORT int lm_use_isa(const char *name);
/* LM_CONTRACT: raised with every change to a structure or function of these headers, so that a library compiled from
 * other sources than the Python beside it is refused. */
enum { LM_CONTRACT = 5 };
LM_EXPORT int lm_contract(void);

/* The group in which activations are quantized: the weight's own up to 256, else the largest of 256, 128, 64, 32 that
 * divides it. */
LM_EXPORT int32_t lm_kernel_group(int32_t group);

/* ---- linears (linear.c) -------------------------------------------------------------------------------------- */

/* Bytes of workspace that lm_linear needs for so many rows with the threads that are set. */
LM_EXPORT size_t lm_linear_workspace(const lm_packed *w, int64_t rows, int planes);
/* out [rows, w->out] = x [rows, w->in] (both contiguous) times the weight, plus bias. */
LM_EXPORT void lm_linear(const lm_packed *w, const void *x, int x_type, int64_t rows, int planes, void *out, int out_type,
                         void *workspace);
/* The same inside a team, x and y float32, y [rows, w->out] with its own stride: every thread calls it, and
 * all have finished when it returns. */
void lm_linear_team(const lm_packed *w, const float *x, int64_t x_stride, int64_t rows, int planes, float *y, int64_t y_stride,
                    void *workspace, lm_team *team);
/* The same for a dense weight; no workspace. x [rows, in] contiguous. */
void lm_dense_team(const lm_dense *w, const float *x, int64_t rows, float *y, int64_t y_stride, lm_team *team);
/* out [rows, w->out] = x [rows, w->in] times the dense weight, for a few rows; workspace: rows * in + rows * out floats. */
LM_EXPORT void lm_dense_linear(const lm_dense *w, const void *x, int x_type, int64_t rows, void *out, int out_type,
                               void *workspace);

/* ---- attention (attention.c, prompt.c) ----------------------------------------------------------------------- */

/* Keys and values of one decoder layer, bfloat16 [kv_heads, capacity, size] each, and the heads that share them. */
typedef struct {
    int64_t heads, kv_heads, size, capacity; /* size: of a head, a multiple of 16 */
    const uint16_t *keys, *values;
} lm_kv;

/* Bytes of workspace that lm_prompt_attention needs, with the threads that are set. */
LM_EXPORT size_t lm_prompt_attention_workspace(const lm_kv *kv, int64_t length);
/* Causal attention of the last `rows` of `length` tokens: row r sees the keys 0..length - rows + r. Its query for head h, of
 * bfloat16, begins at q + r * q_stride + h * head_stride; out: bfloat16 [rows, heads * size]. A row's result does not
 * depend on the others, nor on threads. */
LM_EXPORT void lm_prompt_attention(const lm_kv *kv, const uint16_t *q, int64_t q_stride, int64_t head_stride, int64_t rows,
                                   int64_t length, float scaling, uint16_t *out, void *workspace);

/* ---- the order that is read fastest (panels.c) ---------------------------------------------------------------- */

/* Copy w's qweight, scales and zeros (where it has any) into panels, outputs beyond w->out being 0, with all threads: the
 * same words, in another order. The sizes are rows * LM_PANEL * panels of each one's elements. */
LM_EXPORT void lm_to_panels(const lm_packed *w, uint32_t *qweight, void *scales, uint8_t *zeros);

/* ---- the memory's own pace (stream.c) ------------------------------------------------------------------------ */

/* Read `bytes` once with all threads, as fast as this CPU can; the exclusive or of all words. */
LM_EXPORT uint64_t lm_read(const void *memory, size_t bytes);

/* ---- files that are lost while they are mapped (fault.c) ------------------------------------------------------ */

/* From now on a page that cannot be read (SIGBUS) puts the terminal back as it is now, writes `line` to standard error and
 * ends the process with exit_code; NULL: what was before. 0, or -1 where the system refuses. One at a time. */
LM_EXPORT int lm_tell_bus_errors(const char *line, int exit_code);

#endif
