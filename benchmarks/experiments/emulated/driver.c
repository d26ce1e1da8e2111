/* Compute the cases of a file with one instruction set, for a comparison between machines.
 *
 *   driver SET [FILL] < CASES > RESULTS     SET: a name of the table in isa.c; exit code 3 if the CPU lacks it
 *   driver < /dev/null                      the names of the sets that the CPU has, one a line
 *
 * FILL is a byte, 0 by default. Workspaces and outputs are filled with it before a kernel runs; no result depends on it.
 * A case is a number of 64 bits, its kind, then the numbers of the kind's structure here, then its tensors without gaps.
 * A result is the kind's tensors without gaps. Both are in the byte order of the machine. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attention/attention.h"
#include "gemm/gemm.h"
#include "gemm/round.h"
#include "linear/linear.h"

static void *take(size_t bytes)
{
    void *memory = malloc(bytes + 1);
    if (!memory || fread(memory, 1, bytes, stdin) != bytes) {
        fprintf(stderr, "the case ends early\n");
        exit(1);
    }
    return memory;
}

static int fill;

/* Memory that a kernel writes before it reads it. */
static void *filled(size_t bytes)
{
    void *memory = malloc(bytes + 1);
    if (!memory)
        exit(1);
    return memset(memory, fill, bytes + 1);
}

static void give(const void *memory, size_t bytes)
{
    if (fwrite(memory, 1, bytes, stdout) != bytes)
        exit(1);
}

static size_t width(int64_t type) { return type == LM_F32 ? 4 : 2; }

/* qweight, scales, zeros, bias and x in; y out. */
static void packed(void)
{
    const struct {
        int64_t bits, group, inputs, outputs, scales_type, has_zeros, has_bias, tiled, rows, x_type, planes, y_type;
    } *c = take(sizeof *c);
    const size_t words = (size_t)(c->inputs / 32 * c->bits), groups = (size_t)(c->inputs / c->group);
    const size_t out = (size_t)c->outputs, tiles = (out + LM_TILE_OUTPUTS - 1) / LM_TILE_OUTPUTS * LM_TILE_OUTPUTS;
    lm_packed w = {.bits = (int32_t)c->bits, .group = (int32_t)c->group, .inputs = c->inputs, .outputs = c->outputs,
                   .scales_type = (int32_t)c->scales_type, .bias_type = LM_F32};
    w.qweight = take(words * out * 4);
    w.scales = take(groups * out * width(c->scales_type));
    w.zeros = c->has_zeros ? take(groups * out) : NULL;
    w.bias = c->has_bias ? take(out * 4) : NULL;
    if (c->tiled) {
        uint32_t *qweight = filled(words * tiles * 4);
        void *scales = filled(groups * tiles * width(c->scales_type));
        uint8_t *zeros = c->has_zeros ? filled(groups * tiles) : NULL;
        lm_tile_weight(&w, qweight, scales, zeros);
        w.qweight = qweight, w.scales = scales, w.zeros = zeros, w.tiled = 1;
    }
    const lm_matrix x = {take((size_t)(c->rows * c->inputs) * width(c->x_type)), c->rows, c->inputs, (int32_t)c->x_type};
    const size_t bytes = (size_t)(c->rows * c->outputs) * width(c->y_type);
    const lm_matrix y = {filled(bytes), c->rows, c->outputs, (int32_t)c->y_type};
    lm_linear(&w, &x, (int)c->planes, &y, filled(lm_linear_workspace(&w, c->rows, (int)c->planes)));
    give(y.values, bytes);
}

/* The weight, bias and x in; y, float32, out. */
static void dense(void)
{
    const struct {
        int64_t inputs, outputs, type, rows;
    } *c = take(sizeof *c);
    lm_dense w = {.inputs = c->inputs, .outputs = c->outputs, .bias_type = LM_F32, .weight_type = (int32_t)c->type};
    w.weight = take((size_t)(c->inputs * c->outputs) * 2);
    w.bias = take((size_t)c->outputs * 4);
    const lm_matrix x = {take((size_t)(c->rows * c->inputs) * 4), c->rows, c->inputs, LM_F32};
    const lm_matrix y = {filled((size_t)(c->rows * c->outputs) * 4), c->rows, c->outputs, LM_F32};
    lm_dense_linear(&w, &x, &y, filled((size_t)(c->rows * (c->inputs + c->outputs)) * 4));
    give(y.values, (size_t)(c->rows * c->outputs) * 4);
}

/* Keys, values and queries in; the heads' outputs out. All are bfloat16. */
static void attention(void)
{
    const struct {
        int64_t heads, kv_heads, size, length, rows;
    } *c = take(sizeof *c);
    const size_t stored = (size_t)(c->kv_heads * c->length * c->size) * 2, asked = (size_t)(c->rows * c->heads * c->size) * 2;
    lm_kv kv = {c->heads, c->kv_heads, c->size, c->length, NULL, NULL};
    kv.keys = take(stored), kv.values = take(stored);
    const lm_query query = {take(asked), c->heads * c->size, c->size, c->rows, c->length, 0.125f};
    uint16_t *out = filled(asked);
    lm_prompt_attention(&kv, &query, out, filled(lm_prompt_attention_workspace(&kv, c->length)));
    give(out, asked);
}

/* a [m, k] and b [k, n] in, float32; c out. */
static void gemm(void)
{
    const struct {
        int64_t m, n, k, upper, bf16;
    } *c = take(sizeof *c);
    lm_gemm job = {.m = c->m, .n = c->n, .k = c->k, .a_row = c->k, .a_column = 1, .b_row = c->n, .b_column = 1, .c_row = c->n,
                   .alpha = -1.5f, .upper = (int32_t)c->upper, .bf16 = (int32_t)c->bf16};
    job.a = take((size_t)(c->m * c->k) * 4), job.b = take((size_t)(c->k * c->n) * 4);
    job.c = memset(filled((size_t)(c->m * c->n) * 4), 0, (size_t)(c->m * c->n) * 4); /* it is added to */
    lm_gemm_run(&job, filled(lm_gemm_workspace()));
    give(job.c, (size_t)(c->m * c->n) * 4);
}

/* The weight, the residual [columns, out] and r [columns, columns] in; the integers, scales and errors out. */
static void rounding(void)
{
    const struct {
        int64_t columns, width, out, maxq, sym, search, passes;
    } *c = take(sizeof *c);
    const size_t weights = (size_t)(c->columns * c->out), grids = (size_t)(c->columns / c->width * c->out);
    lm_round job = {.columns = c->columns, .width = c->width, .out = c->out, .error_row = c->out, .residual_row = c->out,
                    .r_row = c->columns, .codes_row = c->out, .grid_row = c->out, .ranges = {1.0f, 0.9f, 0.8f},
                    .ranges_count = 3, .maxq = (int32_t)c->maxq, .sym = (int32_t)c->sym, .search = (int32_t)c->search,
                    .passes = (int32_t)c->passes};
    job.error = take(weights * 4), job.residual = take(weights * 4), job.r = take((size_t)(c->columns * c->columns) * 4);
    job.codes = filled(weights), job.scales = filled(grids * 4), job.zeros = filled(grids * 4);
    lm_round_run(&job, filled(lm_round_workspace()));
    give(job.codes, weights);
    give(job.scales, grids * 4);
    give(job.error, weights * 4);
}

int main(int count, char **arguments)
{
    static void (*const kinds[])(void) = {packed, dense, attention, gemm, rounding};
    if (count < 2) {
        for (int i = 0; lm_isa_at(i); i++)
            if (lm_use_isa(lm_isa_at(i)))
                puts(lm_isa_at(i));
        return 0;
    }
    if (!lm_use_isa(arguments[1]))
        return 3;
    if (count > 2)
        fill = atoi(arguments[2]);
    for (int64_t kind; fread(&kind, sizeof kind, 1, stdin);)
        kinds[kind]();
    return 0;
}
