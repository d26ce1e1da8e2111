/* Run the kernels on random shapes and values, in a build with sanitizers (build.py). The program fails on any access outside
 * a tensor, and on any bit that differs between instruction sets, thread counts or layouts where the headers promise equality.
 * Usage: fuzz SEED ROUNDS. Equal seeds give equal runs.
 *
 * Every tensor borders on inaccessible memory: a red zone of AddressSanitizer, or a protected page, which also catches
 * vector instructions that the sanitizers do not instrument. */
#define _GNU_SOURCE
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "isa.h"
#include "pages.h"

/* ---- numbers ------------------------------------------------------------------------------------------------- */

static uint64_t state;

static uint64_t draw(void) /* splitmix64 */
{
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static int64_t between(int64_t low, int64_t high) { return low + (int64_t)(draw() % (uint64_t)(high - low + 1)); }
static int one_in(int64_t n) { return draw() % (uint64_t)n == 0; }
static int64_t one_of(const int64_t *from, int64_t count) { return from[between(0, count - 1)]; }
#define ONE_OF(...) one_of((const int64_t[]){__VA_ARGS__}, sizeof((const int64_t[]){__VA_ARGS__}) / sizeof(int64_t))

static float normal(void)
{
    float sum = 0;
    for (int i = 0; i < 4; i++)
        sum += (float)(draw() >> 40) / (float)(1 << 24) - 0.5f;
    return sum * 1.7f;
}

/* ---- memory -------------------------------------------------------------------------------------------------- */

typedef struct {
    char *start;
    size_t inside; /* bytes of the pages that may be used */
    int guarded;   /* 0: from malloc */
} piece;

static piece pieces[4096];
static int used;

/* Allocate exactly `bytes` bytes, aligned to `unit` and no more. */
static void *exactly(size_t bytes, size_t unit)
{
    const int way = (int)between(0, 3);
    piece *p = &pieces[used++];
    if (used == sizeof pieces / sizeof *pieces)
        abort();
    if (way < 2) {
        const size_t shift = way ? (size_t)between(0, 63) / unit * unit : 0;
        *p = (piece){malloc(bytes + shift), 0, 0};
        return p->start + shift;
    }
    const size_t page = page_size(), whole = (bytes + page - 1) / page * page;
    *p = (piece){guarded_pages(whole), whole, 1};
    return way == 2 ? p->start + page + whole - bytes : p->start + page; /* protected page after, or before */
}

static void forget(void)
{
    while (used) {
        const piece p = pieces[--used];
        if (p.guarded)
            free_pages(p.start, p.inside);
        else
            free(p.start);
    }
}

static void *any_bits(size_t bytes, size_t unit)
{
    char *at = exactly(bytes, unit);
    for (size_t i = 0; i < bytes; i++)
        at[i] = (char)draw();
    return at;
}

static size_t width_of(int type) { return type == LM_F32 ? 4 : 2; }

static uint16_t half_of(int type, float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (type == LM_BF16)
        return (uint16_t)(bits >> 16);
    const int32_t exponent = (int32_t)(bits >> 23 & 255) - 112; /* truncated; denormals become 0 */
    return (uint16_t)((bits >> 16 & 0x8000) | (exponent <= 0 ? 0 : exponent > 30 ? 0x7bff : (uint32_t)exponent << 10 | (bits >> 13 & 1023)));
}

static void put(void *values, int type, int64_t at, float value)
{
    const uint16_t half = half_of(type, value);
    if (type == LM_F32)
        memcpy((char *)values + 4 * at, &value, 4);
    else
        memcpy((char *)values + 2 * at, &half, 2);
}

/* Random values around 0. wild: random bits, including NaN, infinity and denormals. */
static void *numbers(int64_t count, int type, float spread, int wild)
{
    if (wild)
        return any_bits((size_t)count * width_of(type), width_of(type));
    void *values = exactly((size_t)count * width_of(type), width_of(type));
    for (int64_t i = 0; i < count; i++)
        put(values, type, i, normal() * (one_in(64) ? 30 * spread : spread));
    return values;
}

/* ---- comparing ---------------------------------------------------------------------------------------------- */

static const char *what = "";

static _Noreturn void differ(const char *between_what)
{
    fprintf(stderr, "%s: %s differ\n", what, between_what);
    exit(1);
}

static int is_nan(const char *at, int type)
{
    uint32_t bits = 0;
    memcpy(&bits, at, width_of(type));
    return type == LM_F32    ? (bits & 0x7fffffff) > 0x7f800000
           : type == LM_BF16 ? (bits & 0x7fff) > 0x7f80
                             : (bits & 0x7fff) > 0x7c00;
}

static void expect_same(const char *between_what, const void *a, const void *b, int64_t count, int type)
{
    const size_t width = width_of(type);
    for (int64_t i = 0; i < count; i++) {
        const char *x = (const char *)a + (size_t)i * width, *y = (const char *)b + (size_t)i * width;
        if (memcmp(x, y, width) && !(is_nan(x, type) && is_nan(y, type)))
            differ(between_what);
    }
}

/* Select an instruction set of the table. Returns 0 if the CPU lacks it or a quick build left it out. */
static int use_isa(int i) { return lm_use_isa(lm_isa_at(i)) && lm_isa_selected()->linear->decode; }

/* ---- linears ------------------------------------------------------------------------------------------------- */

static lm_packed random_packed(int64_t in, int64_t group, int64_t out, int wild)
{
    lm_packed w = {.bits = (int32_t)ONE_OF(8, 7, 6, 5, 4, 3, 2), .group = (int32_t)group, .inputs = in, .outputs = out,
                   .scales_type = (int32_t)between(0, 2), .bias_type = (int32_t)between(0, 2)};
    const int64_t rows = in / 32 * w.bits, groups = in / group;
    w.qweight = any_bits((size_t)(rows * out) * 4, 4);
    w.scales = numbers(groups * out, w.scales_type, 0.02f, wild);
    if (one_in(2))
        w.zeros = any_bits((size_t)(groups * out), 1);
    for (int64_t i = 0; w.zeros && i < groups * out; i++)
        ((uint8_t *)w.zeros)[i] &= (uint8_t)((1 << w.bits) - 1);
    if (one_in(2))
        w.bias = numbers(out, w.bias_type, 1, wild);
    return w;
}

static void multiply(const lm_packed *w, const lm_matrix *x, int planes, const lm_matrix *y)
{
    lm_linear(w, x, planes, y, exactly(lm_linear_workspace(w, x->rows, planes), 1));
}

static void packed(void)
{
    what = "lm_linear";
    const int64_t group = ONE_OF(32, 32, 64, 96, 128, 160, 256, 288, 512), in = group * between(1, 3);
    const int64_t out = one_in(4) ? between(1, 20) : between(1, 330);
    const int64_t rows = one_in(40) ? between(505, 530) : one_in(3) ? between(33, 50) : between(1, 33);
    const int wild = one_in(6), x_type = (int)between(0, 2), out_type = (int)between(0, 2), planes = (int)between(1, LM_PAIRED);
    const lm_packed w = random_packed(in, group, rows > 100 ? between(1, 40) : out, wild);
    const size_t bytes = (size_t)(rows * w.outputs) * width_of(out_type);
    const lm_matrix x = {numbers(rows * in, x_type, 1, wild), rows, in, x_type};
    void *first = NULL;
    for (int i = 0; lm_isa_at(i); i++) {
        if (!use_isa(i))
            continue;
        lm_set_threads((int)between(1, 4), NULL);
        void *y = exactly(bytes, width_of(out_type));
        multiply(&w, &x, planes, &(lm_matrix){y, rows, w.outputs, out_type});
        if (first)
            expect_same(lm_isa_at(i), first, y, rows * w.outputs, out_type);
        else
            first = y;
        const int64_t tiles = (w.outputs + LM_TILE_OUTPUTS - 1) / LM_TILE_OUTPUTS * LM_TILE_OUTPUTS, groups = in / group;
        uint32_t *words = exactly((size_t)(tiles * in / 32 * w.bits) * 4, 4);
        void *scales = exactly((size_t)(tiles * groups) * width_of(w.scales_type), width_of(w.scales_type));
        uint8_t *zeros = w.zeros ? exactly((size_t)(tiles * groups), 1) : NULL;
        lm_tile_weight(&w, words, scales, zeros);
        lm_packed other = w;
        other.qweight = words, other.scales = scales, other.zeros = zeros, other.tiled = 1;
        void *z = exactly(bytes, width_of(out_type));
        multiply(&other, &x, planes, &(lm_matrix){z, rows, w.outputs, out_type});
        expect_same("layouts", first, z, rows * w.outputs, out_type);
        if (w.bits == 3)
            lm_tile_planes(&w, words, scales, zeros);
    }
}

static lm_dense random_dense(int64_t in, int64_t out)
{
    lm_dense w = {.inputs = in, .outputs = out, .bias_type = (int32_t)between(0, 2), .weight_type = (int32_t)between(1, 2)};
    w.weight = numbers(in * out, w.weight_type, 0.1f, one_in(8));
    if (one_in(2))
        w.bias = numbers(out, w.bias_type, 1, 0);
    return w;
}

static void dense(void)
{
    what = "lm_dense_linear";
    const int64_t rows = between(1, 12);
    const lm_dense w = random_dense(one_in(20) ? 0 : between(1, 200), one_in(20) ? 0 : between(1, 90));
    const int x_type = (int)between(0, 2), out_type = (int)between(0, 2);
    void *x = numbers(rows * w.inputs, x_type, 1, one_in(8));
    for (int i = 0; lm_isa_at(i); i++) {
        if (!use_isa(i))
            continue;
        void *y[2];
        for (int turn = 0; turn < 2; turn++) { /* the result must not depend on the number of threads */
            lm_set_threads(turn ? (int)between(2, 4) : 1, NULL);
            y[turn] = exactly((size_t)(rows * w.outputs) * width_of(out_type), width_of(out_type));
            const lm_matrix from = {x, rows, w.inputs, x_type}, to = {y[turn], rows, w.outputs, out_type};
            lm_dense_linear(&w, &from, &to, exactly((size_t)(rows * (w.inputs + w.outputs)) * 4, 4));
        }
        expect_same("threads", y[0], y[1], rows * w.outputs, out_type);
    }
}

/* ---- attention and a step ------------------------------------------------------------------------------------ */

static void attention(void)
{
    what = "lm_prompt_attention";
    const int64_t kv_heads = between(1, 3), heads = kv_heads * between(1, one_in(5) ? 50 : 6), size = 16 * between(1, 4);
    const int64_t length = one_in(3) ? between(250, 600) : between(1, 80), rows = between(1, length < 40 ? length : 40);
    const int64_t capacity = length + between(0, 9), head_stride = size + between(0, 3), q_stride = heads * head_stride + between(0, 5);
    const lm_kv kv = {heads, kv_heads, size, capacity, numbers(kv_heads * capacity * size, LM_BF16, 1, one_in(8)),
                      numbers(kv_heads * capacity * size, LM_BF16, 1, one_in(8))};
    const uint16_t *q = numbers((rows - 1) * q_stride + (heads - 1) * head_stride + size, LM_BF16, 1, one_in(8));
    for (int i = 0; lm_isa_at(i); i++) {
        if (!use_isa(i))
            continue;
        uint16_t *y[2];
        for (int turn = 0; turn < 2; turn++) {
            lm_set_threads(turn ? (int)between(2, 4) : 1, NULL);
            y[turn] = exactly((size_t)(rows * heads * size) * 2, 2);
            const lm_query query = {q, q_stride, head_stride, rows, length, 0.25f};
            lm_prompt_attention(&kv, &query, y[turn], exactly(lm_prompt_attention_workspace(&kv, length), 1));
        }
        expect_same("threads", y[0], y[1], rows * heads * size, LM_BF16);
    }
}

static lm_weight random_weight(int64_t in, int64_t out, lm_packed *packed_room, lm_dense *dense_room)
{
    if (in % 32 == 0 && one_in(2)) {
        *packed_room = random_packed(in, in % 64 || one_in(2) ? 32 : 64, out, 0);
        return (lm_weight){packed_room, NULL, between(1, 3)};
    }
    *dense_room = random_dense(in, out);
    dense_room->bias_type = LM_BF16;
    if (dense_room->bias)
        dense_room->bias = numbers(out, LM_BF16, 1, 0);
    return (lm_weight){NULL, dense_room, 0};
}

static lm_norm random_norm(int64_t size)
{
    return (lm_norm){numbers(size, LM_BF16, 1, 0), one_in(2) ? numbers(size, LM_BF16, 1, 0) : NULL, 1e-5f, one_in(2)};
}

/* The linears and norms of a layer: merged or separate queries, keys and values, with or without a gate. */
static lm_layer random_layer(const lm_model *m)
{
    static lm_packed packed_room[7];
    static lm_dense dense_room[7];
    const int64_t queries = m->heads * m->size, keys = m->kv_heads * m->size;
    const int split = !m->interleaved && one_in(2);
    lm_layer layer = {.ln_1 = random_norm(m->embd), .ln_2 = random_norm(m->embd)};
    layer.q = random_weight(m->embd, queries + (split ? 0 : 2 * keys), packed_room, dense_room);
    if (split) {
        layer.k = random_weight(m->embd, keys, packed_room + 1, dense_room + 1);
        layer.v = random_weight(m->embd, keys, packed_room + 2, dense_room + 2);
    }
    if (split && one_in(2)) {
        layer.q_norm = random_norm(m->size);
        layer.k_norm = random_norm(m->size);
    }
    layer.attn_proj = random_weight(queries, m->embd, packed_room + 3, dense_room + 3);
    if (one_in(2))
        layer.gate = random_weight(m->embd, m->inner, packed_room + 4, dense_room + 4);
    layer.up = random_weight(m->embd, m->inner, packed_room + 5, dense_room + 5);
    layer.mlp_proj = random_weight(m->inner, m->embd, packed_room + 6, dense_room + 6);
    return layer;
}

/* Of random dimensions and settings, without its layers and its tables. */
static lm_model random_model(void)
{
    const int64_t kv_heads = between(1, 3), heads = kv_heads * between(1, 3), size = 16 * between(1, 3);
    lm_model m = {.layers = between(0, 2), .embd = one_in(2) ? heads * size : 16 * between(1, 9), .heads = heads, .kv_heads = kv_heads,
                  .size = size, .inner = between(1, 9) * (one_in(2) ? 32 : 10), .vocab = between(1, 100),
                  .rotary = one_in(3) ? 0 : 16 * between(1, size / 16), .interleaved = heads == kv_heads && one_in(2),
                  .activation = (int32_t)between(LM_GELU, LM_SILU), .scaling = 0.25f, .embedding_scale = normal(),
                  .residual_scale = normal(), .head_scale = normal(), .wte_type = (int16_t)between(1, 2),
                  .wpe_type = (int16_t)between(1, 2)};
    return m;
}

static void step(void)
{
    what = "lm_forward";
    enum { LAYERS = 2, SLOTS = 3 };
    static lm_packed packed_room;
    static lm_dense dense_room;
    lm_model m = random_model();
    const int64_t vocab = m.vocab;
    const int64_t count = between(1, SLOTS), many = one_in(4) ? 40 : 12;
    lm_feed feeds[SLOTS];
    int64_t rows = 0, wanted = 0, most = 0;
    for (int64_t f = 0; f < count; f++) {
        feeds[f] = (lm_feed){f, one_in(3) ? between(240, 300) : between(0, 40), between(1, many), 0};
        feeds[f].wanted = between(0, feeds[f].rows);
        rows += feeds[f].rows;
        wanted += feeds[f].wanted;
        most = feeds[f].length + feeds[f].rows > most ? feeds[f].length + feeds[f].rows : most;
    }
    m.capacity = most + (one_in(2) ? 0 : between(0, 9));
    const int64_t stored = count * m.kv_heads * m.capacity * m.size;
    const size_t cache = (size_t)stored * 2;
    lm_layer layers[LAYERS];
    uint16_t *keys[LAYERS], *values[LAYERS];
    const lm_layer layer = random_layer(&m);
    for (int i = 0; i < LAYERS; i++) {
        keys[i] = numbers(stored, LM_BF16, 1, 0);
        values[i] = numbers(stored, LM_BF16, 1, 0);
        layers[i] = layer;
        layers[i].ln_1 = random_norm(m.embd);
    }
    m.ln_f = random_norm(m.embd);
    m.head = random_weight(m.embd, vocab, &packed_room, &dense_room);
    m.wte = numbers(vocab * m.embd, m.wte_type, 0.2f, 0);
    m.wpe = one_in(2) ? numbers(most * m.embd, m.wpe_type, 0.2f, 0) : NULL;
    m.cosines = m.rotary ? numbers(most * m.rotary / 2, LM_F32, 1, 0) : NULL;
    m.sines = m.rotary ? numbers(most * m.rotary / 2, LM_F32, 1, 0) : NULL;
    int64_t *ids = exactly((size_t)rows * sizeof *ids, sizeof *ids);
    for (int64_t r = 0; r < rows; r++)
        ids[r] = one_in(2) ? vocab - 1 : between(0, vocab - 1);
    for (int i = 0; lm_isa_at(i); i++) {
        if (!use_isa(i))
            continue;
        float *logits[2];
        for (int turn = 0; turn < 2; turn++) {
            lm_set_threads(turn ? (int)between(2, 4) : 1, NULL);
            lm_layer *fresh = exactly((size_t)m.layers * sizeof *fresh, sizeof(void *));
            for (int64_t l = 0; l < m.layers; l++) {
                fresh[l] = layers[l];
                fresh[l].keys = exactly(cache, 2), fresh[l].values = exactly(cache, 2);
                memcpy(fresh[l].keys, keys[l], cache);
                memcpy(fresh[l].values, values[l], cache);
            }
            m.layer = fresh;
            logits[turn] = exactly((size_t)(wanted * vocab) * 4, 4);
            if (!turn) {
                lm_forward(&m, feeds, count, ids, logits[turn], exactly(lm_forward_workspace(&m, feeds, count), 1));
                continue;
            }
            const int64_t *from = ids; /* each sequence alone */
            float *to = logits[turn];
            for (int64_t f = 0; f < count; f++, from += feeds[f - 1].rows, to += feeds[f - 1].wanted * vocab)
                lm_forward(&m, feeds + f, 1, from, to, exactly(lm_forward_workspace(&m, feeds + f, 1), 1));
        }
        expect_same("threads and company", logits[0], logits[1], wanted * vocab, LM_F32);
    }
}

/* ---- the converter -------------------------------------------------------------------------------------------- */

/* A matrix in row-major or column-major order, with random strides. */
static const void *matrix(int64_t rows, int64_t columns, int type, int64_t *row, int64_t *column)
{
    const int turned = one_in(2);
    const int64_t stride = (turned ? rows : columns) + between(0, 5);
    *row = turned ? 1 : stride, *column = turned ? stride : 1;
    return numbers((rows - 1) * *row + (columns - 1) * *column + 1, type, 1, one_in(10));
}

static void gemm(void)
{
    what = "lm_gemm_run";
    const int64_t m = between(1, 70), n = between(1, 90), k = one_in(8) ? between(500, 1100) : between(1, 60);
    lm_gemm job = {.m = m, .n = n, .k = k, .c_row = n + between(0, 4), .alpha = normal(), .a_type = one_in(2) ? LM_F32 : LM_BF16,
                   .b_type = one_in(2) ? LM_F32 : LM_BF16, .upper = one_in(2), .bf16 = one_in(2)};
    job.a = matrix(m, k, job.a_type, &job.a_row, &job.a_column);
    job.b = matrix(k, n, job.b_type, &job.b_row, &job.b_column);
    const int64_t count = (m - 1) * job.c_row + n;
    for (int i = 0; lm_isa_at(i); i++) {
        if (!use_isa(i))
            continue;
        float *c[2];
        for (int turn = 0; turn < 2; turn++) {
            lm_set_threads(turn ? (int)between(2, 4) : 1, NULL);
            job.c = c[turn] = exactly((size_t)count * 4, 4);
            memset(job.c, 0, (size_t)count * 4);
            lm_gemm_run(&job, exactly(lm_gemm_workspace(), 1));
        }
        expect_same("threads", c[0], c[1], count, LM_F32);
    }
}

static void layout(void)
{
    what = "lm_mirror, lm_permute";
    const int64_t n = between(1, 150), row = n + between(0, 5);
    float *values = numbers((n - 1) * row + n, LM_F32, 1, 0);
    int64_t *order = exactly((size_t)n * sizeof *order, sizeof *order);
    for (int64_t i = 0; i < n; i++)
        order[i] = i;
    for (int64_t i = n - 1; i > 0; i--) {
        const int64_t j = between(0, i), kept = order[i];
        order[i] = order[j], order[j] = kept;
    }
    lm_set_threads((int)between(1, 4), NULL);
    lm_mirror(values, n, row, 0.5f);
    lm_permute(values, n, row, order, exactly((size_t)n * 4, 4));
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < i; j++)
            if (memcmp(values + i * row + j, values + j * row + i, 4))
                differ("the two halves");
}

static void rounding(void)
{
    what = "lm_round_run";
    const int64_t width = ONE_OF(16, 32, 64), groups = between(1, 256 / width > 3 ? 3 : 256 / width), n = width * groups;
    const int64_t out = between(1, 150), row = out + between(0, 5), bits = ONE_OF(2, 3, 4, 8);
    const int wild = one_in(6);
    lm_round job = {.columns = n, .width = width, .out = out, .error_row = row, .residual_row = row, .r_row = n + 1, .codes_row = row,
                    .grid_row = row, .ranges = {1.0f, 0.9f, 0.8f}, .ranges_count = 3, .maxq = (1 << bits) - 1, .sym = one_in(2),
                    .search = (int32_t)between(0, 2)};
    job.passes = job.search == 2 ? (int32_t)between(0, 2) : 0;
    const int64_t count = (n - 1) * row + out, grids = (groups - 1) * row + out;
    const float *error = numbers(count, LM_F32, 1, wild), *residual = numbers(count, LM_F32, 0.1f, wild);
    float *r = numbers((n - 1) * (n + 1) + n, LM_F32, 0.1f, wild && one_in(2));
    for (int64_t i = 0; i < n; i++)
        r[i * (n + 1) + i] = 0.5f + (float)between(0, 100) * 0.01f;
    job.r = r;
    for (int i = 0; lm_isa_at(i); i++) {
        if (!use_isa(i))
            continue;
        uint8_t *codes[2];
        for (int turn = 0; turn < 2; turn++) {
            lm_set_threads(turn ? (int)between(2, 4) : 1, NULL);
            job.error = exactly((size_t)count * 4, 4), job.residual = exactly((size_t)count * 4, 4);
            memcpy(job.error, error, (size_t)count * 4);
            memcpy(job.residual, residual, (size_t)count * 4);
            job.codes = codes[turn] = exactly((size_t)count, 1);
            memset(job.codes, 0, (size_t)count);
            job.scales = exactly((size_t)grids * 4, 4), job.zeros = exactly((size_t)grids * 4, 4);
            for (int64_t g = 0; g < grids; g++)
                job.scales[g] = 0.01f, job.zeros[g] = (float)(job.maxq / 2);
            lm_round_run(&job, exactly(lm_round_workspace(), 1));
        }
        for (int64_t j = 0; j < n; j++)
            for (int64_t o = 0; o < out; o++)
                if (codes[0][j * row + o] > job.maxq)
                    differ("an integer and its bits");
        if (memcmp(codes[0], codes[1], (size_t)count))
            differ("threads");
    }
}

static void training(void)
{
    what = "lm_train_run";
    const int64_t width = ONE_OF(30, 32, 64, 160), groups = between(1, 6), n = width * groups, out = 16 * between(1, 9);
    const size_t weights = (size_t)(n * out), grids = (size_t)(groups * out);
    const int type = one_in(2) ? LM_BF16 : LM_F32, wild = one_in(6), maxq = (1 << ONE_OF(2, 3, 4, 6)) - 1;
    lm_train job = {.inputs = n, .width = width, .out = out, .maxq = maxq, .slope_type = type, .most = 2, .rate = 0.3f,
                    .keep = one_in(2) ? 0 : 0.9f, .slope = numbers((int64_t)weights, type, 1, wild),
                    .scales = numbers((int64_t)grids, LM_F32, 0.1f, 0)};
    uint8_t *zeros = exactly(grids, 1);
    int8_t *z = exactly(weights, 1);
    int16_t *fraction = exactly(weights * 2, 2);
    float *squares = exactly((size_t)(n + out) * 4, 4), *first = NULL;
    for (size_t i = 0; i < grids; i++)
        zeros[i] = (uint8_t)between(0, maxq);
    for (size_t i = 0; i < weights; i++) {
        z[i] = (int8_t)(between(0, maxq) - zeros[i / (size_t)(width * out) * (size_t)out + i % (size_t)out]);
        fraction[i] = (int16_t)between(-32768, 32767);
    }
    for (int64_t i = 0; i < n + out; i++)
        squares[i] = (float)between(0, 100) * 0.01f;
    job.zeros = zeros;
    for (int i = 0; lm_isa_at(i); i++) {
        if (!use_isa(i))
            continue;
        for (int turn = 0; turn < 2; turn++) {
            lm_set_threads(turn ? (int)between(2, 4) : 1, NULL);
            job.z = exactly(weights, 1), job.fraction = exactly(weights * 2, 2), job.scale_slope = exactly(grids * 4, 4);
            job.rows = exactly((size_t)n * 4, 4), job.columns = exactly((size_t)out * 4, 4);
            memcpy(job.z, z, weights);
            memcpy(job.fraction, fraction, weights * 2);
            memcpy(job.rows, squares, (size_t)n * 4);
            memcpy(job.columns, squares + n, (size_t)out * 4);
            lm_train_run(&job, exactly(lm_train_workspace(&job), 1));
            float *all = exactly((2 * weights + grids + (size_t)(n + out)) * 4, 4), *next = all;
            for (size_t w = 0; w < weights; w++) {
                const int code = job.z[w] + zeros[w / (size_t)(width * out) * (size_t)out + w % (size_t)out];
                if (code < 0 || code > maxq)
                    differ("an integer and its bits");
                *next++ = job.z[w], *next++ = job.fraction[w];
            }
            memcpy(next, job.scale_slope, grids * 4), next += grids;
            memcpy(next, job.rows, (size_t)n * 4), next += n;
            memcpy(next, job.columns, (size_t)out * 4);
            if (!first)
                first = all;
            else if (memcmp(first, all, wild ? 2 * weights * 4 : (2 * weights + grids + (size_t)(n + out)) * 4))
                differ("threads or instruction sets");
        }
    }
}

static void reading(void)
{
    what = "lm_read";
    const size_t bytes = (size_t)(one_in(4) ? between(1 << 20, (1 << 20) + 5000) : between(0, 3000));
    const unsigned char *memory = any_bits(bytes, 1);
    unsigned char sum[8] = {0};
    for (size_t i = 0; i < bytes; i++) /* the last word may be partial */
        sum[i % 8] ^= memory[i];
    lm_set_threads((int)between(1, 4), NULL);
    const uint64_t got = lm_read(memory, bytes);
    if (memcmp(&got, sum, 8))
        differ("the words and their exclusive or");
}

int main(int count, char **arguments)
{
    static void (*const kinds[])(void) = {packed, packed, packed, dense, attention, step, gemm, layout, rounding,
                                         training, reading};
    static const char *const names[] = {"", "", "packed", "dense", "attention", "step", "gemm", "layout", "rounding",
                                         "training", "reading"};
    if (count < 3)
        return 2;
    const uint64_t seed = strtoull(arguments[1], NULL, 10);
    const long rounds = strtol(arguments[2], NULL, 10);
    for (size_t kind = 0; kind < sizeof kinds / sizeof *kinds; kind++) {
        for (long round = 0; round < rounds; round++) {
            state = seed * 1000003 + kind * 1009 + (uint64_t)round * 7919;
            kinds[kind]();
            forget();
        }
        if (*names[kind])
            printf("%s\n", names[kind]);
    }
    for (int i = 0; lm_isa_at(i); i++)
        if (use_isa(i))
            printf("with %s\n", lm_isa_at(i));
    return 0;
}
