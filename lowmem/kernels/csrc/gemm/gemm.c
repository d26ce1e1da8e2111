/* The loops around a tile: what is packed when, and by which thread. The scheme is Goto and van de Geijn's ("Anatomy of
 * high-performance matrix multiplication", 2008): a slice of b, packed by all threads, stays in the shared cache; a block
 * of a in each core's own cache; a tile of c in registers. */
#include "isa.h"
#include "types.h"

enum { WORDS = 512, A_BYTES = 384 << 10, B_COLUMNS = 4096 };

typedef struct {
    lm_gemm job;
    const lm_gemm_kernels *kernels;
    char *b, *a; /* packed: the slice of b; a block of a for each thread */
} task;

/* One thread's place in the loops over slices of columns and over k. */
typedef struct {
    const task *t;
    char *a;                    /* this thread's block */
    int64_t slice, end;         /* columns of the slice */
    int64_t k, values, words;   /* values k.. of this pass, and their words */
} place;

/* A part of c. */
typedef struct {
    int64_t row, rows, column, columns;
} area;

const char *lm_gemm_name(void) { return lm_isa_selected()->gemm_bf16->name; }

size_t lm_gemm_workspace(void)
{
    return LM_ALIGNMENT + (size_t)lm_threads() * A_BYTES + (size_t)(B_COLUMNS + 64) * WORDS * 4;
}

static const char *at(const void *base, int type, int64_t values)
{
    return (const char *)base + (size_t)values * lm_width(type);
}

static void pack_b(const place *p, int64_t column, char *into)
{
    const lm_gemm *g = &p->t->job;
    const int width = p->t->kernels->columns;
    const lm_panel panel = {.words = p->words, .k = p->values,
                            .source = at(g->b, g->b_type, p->k * g->b_row + column * g->b_column),
                            .row = g->b_column, .column = g->b_row, .type = g->b_type,
                            .rows = (int32_t)lm_min(width, p->end - column), .width = width};
    p->t->kernels->pack(&panel, into);
}

static void pack_a(const place *p, int64_t row, int64_t rows)
{
    const lm_gemm *g = &p->t->job;
    const int height = p->t->kernels->rows;
    char *into = p->a;
    for (int64_t r = 0; r < rows; r += height, into += p->words * height * 4) {
        const lm_panel panel = {.words = p->words, .k = p->values,
                                .source = at(g->a, g->a_type, (row + r) * g->a_row + p->k * g->a_column),
                                .row = g->a_row, .column = g->a_column, .type = g->a_type,
                                .rows = (int32_t)lm_min(height, rows - r), .width = height};
        p->t->kernels->pack(&panel, into);
    }
}

/* A tile that crosses an edge of c, or the diagonal of an upper triangle. */
static void partial_tile(const place *p, const char *a, const char *b, area part)
{
    const lm_gemm *g = &p->t->job;
    const lm_gemm_kernels *kernels = p->t->kernels;
    float whole[LM_GEMM_TILE] = {0};
    kernels->tile(p->words, a, b, whole, kernels->columns, g->alpha);
    for (int64_t i = 0; i < part.rows; i++) {
        const int64_t diagonal = part.row + i - part.column;
        for (int64_t j = g->upper && diagonal > 0 ? diagonal : 0; j < part.columns; j++)
            g->c[(part.row + i) * g->c_row + part.column + j] += whole[i * kernels->columns + j];
    }
}

/* All tiles of the packed block of a: its rows of c and columns of the slice. */
static void block(const place *p, area part)
{
    const lm_gemm *g = &p->t->job;
    const lm_gemm_kernels *kernels = p->t->kernels;
    const int height = kernels->rows, width = kernels->columns;
    const int64_t last = part.column + part.columns;
    for (int64_t j = part.column; j < last; j += width) {
        const char *b = p->t->b + (j - p->slice) / width * p->words * width * 4;
        const int64_t columns = lm_min(width, last - j);
        for (int64_t i = 0; i < part.rows; i += height) {
            const area tile = {part.row + i, lm_min(height, part.rows - i), j, columns};
            const char *a = p->a + i * p->words * 4;
            if (g->upper && tile.row > j + columns - 1)
                break;
            if (tile.rows == height && columns == width && !(g->upper && tile.row + height - 1 > j))
                kernels->tile(p->words, a, b, g->c + tile.row * g->c_row + j, g->c_row, g->alpha);
            else
                partial_tile(p, a, b, tile);
        }
    }
}

static void work(void *context, lm_team *team)
{
    const task *t = context;
    const lm_gemm *g = &t->job;
    const int height = t->kernels->rows, width = t->kernels->columns;
    const int64_t per_word = t->kernels->pairs ? 2 : 1;
    const int64_t rows_at_once = A_BYTES / (WORDS * 4) / height * height;
    place p = {.t = t, .a = t->a + (size_t)lm_rank(team) * A_BYTES};
    for (p.slice = 0; p.slice < g->n; p.slice += B_COLUMNS) {
        p.end = lm_min(p.slice + B_COLUMNS, g->n);
        const int64_t panels = (p.end - p.slice + width - 1) / width;
        const int64_t rows = g->upper ? lm_min(g->m, p.end) : g->m;
        const int64_t blocks = (rows + rows_at_once - 1) / rows_at_once;
        /* Few blocks of rows are cut by columns too, so that no thread waits long for the last one. */
        const int64_t wanted = 6 * lm_size(team), cuts = blocks >= wanted ? 1 : lm_min(panels, (wanted + blocks - 1) / blocks);
        const int64_t cut_columns = (panels + cuts - 1) / cuts * width;
        for (p.k = 0; p.k < g->k; p.k += WORDS * per_word) {
            p.values = lm_min(WORDS * per_word, g->k - p.k), p.words = (p.values + per_word - 1) / per_word;
            for (int64_t i; (i = lm_next(team)) < panels;)
                pack_b(&p, p.slice + i * width, t->b + i * p.words * width * 4);
            lm_barrier(team);
            for (int64_t piece; (piece = lm_next(team)) < blocks * cuts;) {
                const int64_t row = piece / cuts * rows_at_once, first = p.slice + piece % cuts * cut_columns;
                const int64_t last = lm_min(p.end, first + cut_columns);
                if (first >= last || (g->upper && row > last - 1))
                    continue;
                const area part = {row, lm_min(rows_at_once, rows - row), first, last - first};
                pack_a(&p, part.row, part.rows);
                block(&p, part);
            }
            lm_barrier(team);
        }
    }
}

void lm_gemm_run(const lm_gemm *job, void *workspace)
{
    const lm_isa *isa = lm_isa_selected();
    char *aligned = lm_align(workspace);
    task t = {.job = *job, .kernels = job->bf16 ? isa->gemm_bf16 : isa->gemm,
              .a = aligned, .b = aligned + (size_t)lm_threads() * A_BYTES};
    if (job->m > 0 && job->n > 0)
        lm_run(work, &t);
}
