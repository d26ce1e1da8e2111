/* The loops around a tile: what is packed when, and which thread does it. Goto and van de Geijn's scheme ("Anatomy
 * of high-performance matrix multiplication", 2008): a slice of b, packed by all threads, stays in the shared cache; a
 * block of a in each core's own; a tile of c in registers. */
#include "gemm.h"

#include <string.h>

enum { WORDS = 512, A_BYTES = 384 << 10, B_COLUMNS = 4096 };

typedef struct {
    lm_gemm job;
    const lm_tiles *tiles;
    char *b, *a; /* packed: the slice of b; a block of a for each thread */
} task;

static const lm_tiles *chosen;

static int has(const lm_tiles *tiles)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (tiles == &lm_tiles_bf16)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
    if (tiles == &lm_tiles_avx512)
        return __builtin_cpu_supports("avx512f");
    if (tiles == &lm_tiles_avx2)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return tiles == &lm_tiles_portable;
}

/* By name: the float32 tiles; the bfloat16 ones belong to "AVX-512 BF16" alone. */
static const struct {
    const char *name;
    const lm_tiles *exact, *rounded;
} all[] = {
#if defined(__x86_64__)
    {"AVX-512 BF16", &lm_tiles_avx512, &lm_tiles_bf16},
    {"AVX-512", &lm_tiles_avx512, &lm_tiles_avx512},
    {"AVX2", &lm_tiles_avx2, &lm_tiles_avx2},
#endif
    {"portable C", &lm_tiles_portable, &lm_tiles_portable}};

enum { COUNT = sizeof all / sizeof *all };

static int choice(void)
{
    int i = 0;
    while (i < COUNT - 1 && (chosen ? all[i].rounded != chosen : !has(all[i].rounded)))
        i++;
    return i;
}

const char *lm_gemm_name(void) { return all[choice()].name; }

int lm_gemm_use(const char *name)
{
    for (int i = 0; i < COUNT; i++)
        if (!strcmp(all[i].name, name) && has(all[i].rounded)) {
            chosen = all[i].rounded;
            return 1;
        }
    return 0;
}

size_t lm_gemm_workspace(void)
{
    return 64 + (size_t)lm_threads() * A_BYTES + (size_t)(B_COLUMNS + 64) * WORDS * 4;
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static const char *at(const void *base, int type, int64_t values)
{
    return (const char *)base + values * (type == LM_F32 ? 4 : 2);
}

static void pack_b(const task *t, int64_t column, int64_t columns, int64_t k, int64_t values, char *into)
{
    const lm_gemm *g = &t->job;
    lm_panel panel = {.words = t->tiles->pairs ? (values + 1) / 2 : values, .k = values,
                      .source = at(g->b, g->b_type, k * g->b_row + column * g->b_column),
                      .row = g->b_column, .column = g->b_row, .type = g->b_type,
                      .rows = (int32_t)columns, .width = t->tiles->columns};
    t->tiles->pack(&panel, into);
}

static void pack_a(const task *t, int64_t row, int64_t rows, int64_t k, int64_t values, char *into)
{
    const lm_gemm *g = &t->job;
    const int height = t->tiles->rows;
    const int64_t words = t->tiles->pairs ? (values + 1) / 2 : values;
    for (int64_t r = 0; r < rows; r += height, into += words * height * 4) {
        lm_panel panel = {.words = words, .k = values,
                          .source = at(g->a, g->a_type, (row + r) * g->a_row + k * g->a_column),
                          .row = g->a_row, .column = g->a_column, .type = g->a_type,
                          .rows = (int32_t)least(height, rows - r), .width = height};
        t->tiles->pack(&panel, into);
    }
}

/* A tile that hangs over an edge, or over the diagonal of an upper triangle. */
static void part_of_tile(const task *t, int64_t words, const char *a, const char *b, int64_t row, int64_t column,
                         int64_t rows, int64_t columns)
{
    const lm_gemm *g = &t->job;
    float whole[LM_TILE_MOST] = {0};
    t->tiles->tile(words, a, b, whole, t->tiles->columns, g->alpha);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = g->upper && row + i > column ? row + i - column : 0; j < columns; j++)
            g->c[(row + i) * g->c_row + column + j] += whole[i * t->tiles->columns + j];
}

/* Rows row.. of c and the columns first..last-1 of the packed slice, which begins at column `slice`. */
static void block(const task *t, int64_t words, const char *a, int64_t row, int64_t rows, int64_t slice, int64_t first,
                  int64_t last)
{
    const lm_gemm *g = &t->job;
    const int height = t->tiles->rows, width = t->tiles->columns;
    for (int64_t j = first; j < last; j += width) {
        const char *b = t->b + (j - slice) / width * words * width * 4;
        const int64_t columns = least(width, last - j);
        for (int64_t i = 0; i < rows; i += height) {
            const int64_t top = row + i, here = least(height, rows - i);
            if (g->upper && top > j + columns - 1)
                break;
            if (here == height && columns == width && !(g->upper && top + here - 1 > j))
                t->tiles->tile(words, a + i * words * 4, b, g->c + top * g->c_row + j, g->c_row, g->alpha);
            else
                part_of_tile(t, words, a + i * words * 4, b, top, j, here, columns);
        }
    }
}

static void work(void *context, lm_team *team)
{
    const task *t = context;
    const lm_gemm *g = &t->job;
    const int height = t->tiles->rows, width = t->tiles->columns;
    const int64_t per_word = t->tiles->pairs ? 2 : 1;
    const int64_t rows_at_once = A_BYTES / (WORDS * 4) / height * height;
    char *a = t->a + (size_t)lm_rank(team) * A_BYTES;
    for (int64_t slice = 0; slice < g->n; slice += B_COLUMNS) {
        const int64_t end = least(slice + B_COLUMNS, g->n), panels = (end - slice + width - 1) / width;
        const int64_t rows = g->upper ? least(g->m, end) : g->m;
        const int64_t blocks = (rows + rows_at_once - 1) / rows_at_once;
        /* Few blocks of rows are cut by columns too, so that no thread waits long for the last. */
        const int64_t wanted = 6 * lm_size(team), cuts = blocks >= wanted ? 1 : least(panels, (wanted + blocks - 1) / blocks);
        const int64_t panels_a_cut = (panels + cuts - 1) / cuts;
        for (int64_t k = 0; k < g->k; k += WORDS * per_word) {
            const int64_t values = least(WORDS * per_word, g->k - k), words = (values + per_word - 1) / per_word;
            for (int64_t p; (p = lm_next(team)) < panels;) {
                const int64_t column = slice + p * width;
                pack_b(t, column, least(width, end - column), k, values, t->b + p * words * width * 4);
            }
            lm_barrier(team);
            for (int64_t piece; (piece = lm_next(team)) < blocks * cuts;) {
                const int64_t row = piece / cuts * rows_at_once, here = least(rows_at_once, rows - row);
                const int64_t first = slice + piece % cuts * panels_a_cut * width;
                const int64_t last = least(end, first + panels_a_cut * width);
                if (first >= last || (g->upper && row > last - 1))
                    continue;
                pack_a(t, row, here, k, values, a);
                block(t, words, a, row, here, slice, first, last);
            }
            lm_barrier(team);
        }
    }
}

void lm_gemm_run(const lm_gemm *job, void *workspace)
{
    char *aligned = (char *)(((uintptr_t)workspace + 63) & ~(uintptr_t)63);
    const int i = choice();
    task t = {.job = *job, .tiles = job->bf16 ? all[i].rounded : all[i].exact,
              .a = aligned, .b = aligned + (size_t)lm_threads() * A_BYTES};
    if (job->m > 0 && job->n > 0)
        lm_run(work, &t);
}
