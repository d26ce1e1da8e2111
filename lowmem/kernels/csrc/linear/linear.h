/* Linears on packed and dense weights.
 *
 * A packed linear is read where GPTQ's tensors lie, mapped from their file. `qweight` stores for each output 32 bits of
 * consecutive inputs. 16 neighbouring outputs make a vector of 64 bytes, whose bytes a dot-product instruction takes after
 * one shift and one mask. So loading costs nothing, and the first token needs one pass over the weights. GPTQ's rows,
 * however, lie pages apart, and are read at two thirds of the memory bandwidth. The tiled layout (lm_tile_weight) holds the
 * same words in tiles of 64 outputs, one tile after the other, and is read at full bandwidth.
 *
 * Every instruction set computes the following, to the last bit:
 *
 *   For each row and each group of inputs (at most 256, see lm_kernel_group), a = max |x|, scale = a / L, and
 *   q = round(x * (L / a)) to nearest even, clamped to ±L. L is 127, 32639 or 8355711: one, two or three bytes
 *   ("planes") of balanced digits, q = p0 + 256 p1 + 65536 p2, each digit in -128..127. Two planes resolve more than
 *   bfloat16 or float16 does relative to the largest of the group, three as much as float32.
 *
 *   LM_PAIRED is one plane and a half, for weights of at most 4 bits. L is 30448. An even input's q and the next input's r
 *   become, with m = floor((r + 8) / 16) and d = m mod 16, q' = d + 16 floor((q - d + 8) / 16) and r' = 16 m. Both are
 *   off by at most 8, which leaves 12 bits. Both now share the digit p = q' - 256 h, since r' = 16 p + 256 k. So
 *   w q' + v r' = 256 (w h + v k) + p (w + 16 v), where w + 16 v is a byte, as GPTQ packs 4 bits. Two inputs take three
 *   products of bytes instead of the four of two planes.
 *
 *   c = the exact integer sum over the group of (w - zero) q, as float: with one plane, two and LM_PAIRED
 *   (float)(int32)c, with three fmaf((float)c2, 65536, (float)(c0 + 256 c1)), where ck is the sum of plane k.
 *
 *   y = fmaf(c, scale * weight_scale, y) over the groups in order, from y = 0; then y + bias.
 *
 * So a row's result does not depend on the other rows, the threads or the machine.
 */
#ifndef LOWMEM_LINEAR_H
#define LOWMEM_LINEAR_H

#include "lowmem.h"

enum {
    LM_TILE_OUTPUTS = 64, /* outputs of a tile of the tiled layout */
    LM_DECODE_ROWS = 16,  /* rows of a decode step, at most */
    LM_PAIRED = 4         /* as `planes`: one plane and a half. With weights of more than 4 bits it means two. */
};

/* A GPTQ weight. Along the inputs 8, 4, 3 and 2 bits are one stream of bits. 7, 6 and 5 bits are stored in planes: of every 32
 * inputs, 4 rows of words with the low 4 bits, then 2 rows with the next 2 (7 and 6 bits), then 1 row with the next one (7 and
 * 5 bits); a plane's values lie as those of a weight of its width. */
typedef struct {
    int32_t bits;            /* 8, 7, 6, 5, 4, 3 or 2 */
    int32_t group;           /* inputs that share a scale: a multiple of 32 that divides `inputs` */
    int64_t inputs, outputs;
    const uint32_t *qweight; /* [inputs * bits / 32, outputs] */
    const void *scales;      /* [inputs / group, outputs] */
    const uint8_t *zeros;    /* [inputs / group, outputs]; NULL: all are 2^(bits-1) */
    const void *bias;        /* [outputs] or NULL */
    int32_t scales_type, bias_type;
    int32_t tiled; /* qweight, scales and zeros are [outputs / LM_TILE_OUTPUTS, rounded up][rows][LM_TILE_OUTPUTS] */
} lm_packed;

/* A dense weight [outputs, inputs] of 16 bits. */
typedef struct {
    int64_t inputs, outputs;
    const uint16_t *weight;
    const void *bias; /* [outputs] or NULL */
    int32_t bias_type;
    int32_t weight_type; /* LM_F16 or LM_BF16 */
} lm_dense;

/* Whether weights of `bits` bits are supported. */
LM_EXPORT int lm_has_width(int bits);
/* The group in which activations are quantized: the weight's own up to 256, else the largest of 256, 128, 64 and 32 that
 * divides it. */
LM_EXPORT int32_t lm_kernel_group(int32_t group);
/* Bytes of workspace that lm_linear needs for `rows` rows with the present number of threads. */
LM_EXPORT size_t lm_linear_workspace(const lm_packed *w, int64_t rows, int planes);
/* y [rows, outputs] = x [rows, inputs] times the weight, plus bias. planes: 1, 2, 3 or LM_PAIRED, of the activations. */
LM_EXPORT void lm_linear(const lm_packed *w, const lm_matrix *x, int planes, const lm_matrix *y, void *workspace);
/* The same for a dense weight and few rows. x and y have no gaps between rows. workspace: rows * (inputs + outputs) floats. */
LM_EXPORT void lm_dense_linear(const lm_dense *w, const lm_matrix *x, const lm_matrix *y, void *workspace);

/* Copy w's qweight, scales and zeros (if any) into the tiled layout with all threads; outputs past w->outputs are 0. Each
 * destination has room for rows * LM_TILE_OUTPUTS elements a tile. */
LM_EXPORT void lm_tile_weight(const lm_packed *w, uint32_t *qweight, void *scales, uint8_t *zeros);
/* The same for a weight of 3 bits whose qweight is in planes: of every 32 inputs 2 rows with the low 2 bits, then 1 row with
 * the next one. The copy is the stream that the kernels multiply by. */
LM_EXPORT void lm_tile_planes(const lm_packed *w, uint32_t *qweight, void *scales, uint8_t *zeros);

#endif
