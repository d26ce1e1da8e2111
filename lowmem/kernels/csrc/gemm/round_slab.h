/* One slab of a column block. Each instruction set's file includes this after defining TARGET, its function attribute;
 * LANES, the floats in a vector; FMA(a, b, c), a * b + c of vectors; and NAME, the function's name. */
#include "kernels.h"
#include "types.h"
#include "vectors.h"

enum { VECTORS = LM_SLAB / LANES, PART = VECTORS < 4 ? VECTORS : 4, PARTS = VECTORS / PART };

/* A part of a slab's outputs: as many as stay in registers while a sum runs down the rows. */
typedef struct {
    vec v[PART];
} wide;

#define EACH _Pragma("GCC unroll 4") for (int v = 0; v < PART; v++)

INLINE wide wide_of(float x)
{
    wide w;
    EACH w.v[v] = all_of(x);
    return w;
}

INLINE wide get(const float *row)
{
    wide w;
    EACH memcpy(&w.v[v], row + v * LANES, sizeof(vec));
    return w;
}

INLINE void put(float *row, const wide *w)
{
    EACH memcpy(row + v * LANES, &w->v[v], sizeof(vec));
}

INLINE vec onto_grid(vec x, vec low, vec high)
{
    const vec one = all_of(1.0f);
    return smaller(larger(rounded(smaller(larger(x, low - one), high + one)), low), high);
}

/* The nearest float16 scale, neither 0 nor infinite. */
INLINE vec storable(vec x)
{
    const ivec sign = (ivec)x & (int32_t)0x80000000;
    vec size = (vec)((ivec)x & 0x7fffffff);
    size = smaller(larger(size, all_of(6.103515625e-05f)), all_of(65504.0f));
    const ivec bits = (ivec)size;
    return (vec)(((bits + 0xfff + ((bits >> 13) & 1)) & ~0x1fff) | sign);
}

/* sum plus the rows, which are LM_SLAB floats apart, times the factors. */
INLINE wide gathered(wide sum, const float *factors, const float *rows, int64_t count)
{
    wide odd = wide_of(0);
    int64_t i = 0;
    for (; i + 1 < count; i += 2, rows += 2 * LM_SLAB) {
        const vec x = all_of(factors[i]), y = all_of(factors[i + 1]);
        const wide a = get(rows), b = get(rows + LM_SLAB);
        EACH sum.v[v] = FMA(x, a.v[v], sum.v[v]);
        EACH odd.v[v] = FMA(y, b.v[v], odd.v[v]);
    }
    if (i < count) {
        const vec x = all_of(factors[i]);
        const wide a = get(rows);
        EACH sum.v[v] = FMA(x, a.v[v], sum.v[v]);
    }
    EACH sum.v[v] += odd.v[v];
    return sum;
}

/* A grid for each output, and the error of the integers rounded to it. */
typedef struct {
    wide scale, zero, low, high; /* low, high: limits of the integers less the zero-point */
    wide loss;                   /* |V|^2 */
    wide fitted;                 /* the best scale for the integers */
} grid;

/* A group of columns, for one part of the slab. Matrices have LM_SLAB floats a row. */
typedef struct {
    const float *turned, *r, *metric; /* the group's corner of R^T, of R, and its own R R^T */
    int64_t width, turned_row, r_row;
    const float *target;       /* T */
    float *z, *other_z;        /* integers less the zero-point: the best ones, and others that are tried */
    float *reached;            /* R^T z */
    float *error, *residual;   /* W, replaced by W - Q; replaced by V */
} group;

/* Round the group by GPTQ to this grid: the integers into z. */
INLINE void round_group(const group *g, grid *c, float *z)
{
    wide inverse, loss = wide_of(0), slope = wide_of(0), curve = wide_of(0);
    EACH inverse.v[v] = all_of(1.0f) / c->scale.v[v];
    for (int64_t j = 0; j < g->width; j++) {
        const float *factors = g->turned + j * g->turned_row;
        const vec pivot = all_of(factors[j]), over = all_of(1.0f / factors[j]);
        const wide before = gathered(wide_of(0), factors, z, j), t = get(g->target + j * LM_SLAB);
        wide here;
        EACH {
            const vec wanted = t.v[v] * inverse.v[v];
            here.v[v] = onto_grid((wanted - before.v[v]) * over, c->low.v[v], c->high.v[v]);
            const vec reached = FMA(pivot, here.v[v], before.v[v]), missed = wanted - reached;
            loss.v[v] = FMA(missed, missed, loss.v[v]);
            slope.v[v] = FMA(reached, wanted, slope.v[v]);
            curve.v[v] = FMA(reached, reached, curve.v[v]);
        }
        put(z + j * LM_SLAB, &here);
    }
    EACH {
        const vec s = c->scale.v[v];
        c->loss.v[v] = loss.v[v] * s * s;
        c->fitted.v[v] = storable(pick(curve.v[v] > all_of(0), s * slope.v[v] / curve.v[v], s));
    }
}

/* Where `other` has the smaller error, copy it and g->other_z over `best` and g->z. */
INLINE void keep_better(const group *g, grid *best, const grid *other)
{
    ivec better[PART];
    EACH better[v] = other->loss.v[v] < best->loss.v[v];
    EACH {
        best->scale.v[v] = pick(better[v], other->scale.v[v], best->scale.v[v]);
        best->zero.v[v] = pick(better[v], other->zero.v[v], best->zero.v[v]);
        best->low.v[v] = pick(better[v], other->low.v[v], best->low.v[v]);
        best->high.v[v] = pick(better[v], other->high.v[v], best->high.v[v]);
        best->fitted.v[v] = pick(better[v], other->fitted.v[v], best->fitted.v[v]);
        best->loss.v[v] = pick(better[v], other->loss.v[v], best->loss.v[v]);
    }
    for (int64_t j = 0; j < g->width; j++) {
        const wide a = get(g->other_z + j * LM_SLAB), b = get(g->z + j * LM_SLAB);
        wide chosen;
        EACH chosen.v[v] = pick(better[v], a.v[v], b.v[v]);
        put(g->z + j * LM_SLAB, &chosen);
    }
}

/* The grid that covers `range` times the weights' range from low to high. */
INLINE grid grid_of(const lm_round *job, const wide *low, const wide *high, float range)
{
    grid c;
    const float maxq = (float)job->maxq, half = (float)((job->maxq + 1) / 2);
    EACH {
        vec full, zero = all_of(half);
        if (job->sym) { /* the side that reaches further becomes the negative one, which has one more level */
            const ivec down = -low->v[v] >= high->v[v];
            full = pick(down, -low->v[v], -high->v[v]) / all_of(half);
        } else {
            full = (high->v[v] - low->v[v]) / all_of(maxq);
        }
        c.scale.v[v] = storable(full * all_of(range));
        if (!job->sym) {
            zero = -(low->v[v] * all_of(range)) / c.scale.v[v];
            zero = onto_grid(zero, all_of(1.0f), all_of(maxq));
        }
        c.zero.v[v] = zero;
        c.low.v[v] = -zero;
        c.high.v[v] = all_of(maxq) - zero;
        c.loss.v[v] = all_of(__builtin_inff());
        c.fitted.v[v] = c.scale.v[v];
    }
    return c;
}

/* The compensated weights, given the columns before the group, into g->other_z, and their range. */
INLINE void compensate(const group *g, wide *low, wide *high)
{
    *low = *high = wide_of(0);
    for (int64_t j = 0; j < g->width; j++) {
        const float *factors = g->turned + j * g->turned_row;
        const wide before = gathered(wide_of(0), factors, g->other_z, j), t = get(g->target + j * LM_SLAB);
        const vec over = all_of(1.0f / factors[j]);
        wide here;
        EACH {
            here.v[v] = (t.v[v] - before.v[v]) * over;
            low->v[v] = smaller(low->v[v], here.v[v]);
            high->v[v] = larger(high->v[v], here.v[v]);
        }
        put(g->other_z + j * LM_SLAB, &here);
    }
}

/* The grid with the smallest error of each weight by itself, squared and times R[j, j]^2; g->other_z: the compensated
 * weights. For the integers of a range the best scale is a / b, which reduces the error by a^2 / b. */
INLINE grid by_weights(const lm_round *job, const group *g, const wide *low, const wide *high)
{
    grid best = grid_of(job, low, high, 1.0f);
    wide most = wide_of(-1.0f);
    for (int32_t n = 0; n < job->ranges_count; n++) {
        grid c = grid_of(job, low, high, job->ranges[n]);
        wide a = wide_of(0), b = wide_of(0), inverse;
        EACH inverse.v[v] = all_of(1.0f) / c.scale.v[v];
        for (int64_t j = 0; j < g->width; j++) {
            const float pivot = g->turned[j * g->turned_row + j];
            const vec weight = all_of(pivot * pivot);
            const wide x = get(g->other_z + j * LM_SLAB);
            EACH {
                const vec z = onto_grid(x.v[v] * inverse.v[v], c.low.v[v], c.high.v[v]);
                a.v[v] = FMA(weight * x.v[v], z, a.v[v]);
                b.v[v] = FMA(weight * z, z, b.v[v]);
            }
        }
        EACH {
            const ivec some = b.v[v] > all_of(0);
            const vec gain = pick(some, a.v[v] * a.v[v] / b.v[v], all_of(0)), fitted = a.v[v] / b.v[v];
            const ivec better = gain > most.v[v];
            most.v[v] = pick(better, gain, most.v[v]);
            best.scale.v[v] = pick(better, storable(pick(some, fitted, c.scale.v[v])), best.scale.v[v]);
            best.zero.v[v] = pick(better, c.zero.v[v], best.zero.v[v]);
            best.low.v[v] = pick(better, c.low.v[v], best.low.v[v]);
            best.high.v[v] = pick(better, c.high.v[v], best.high.v[v]);
        }
    }
    return best;
}

/* R^T z into g->reached, and the scale fitted to the integers if that reduces the error. */
INLINE void refit(const group *g, grid *c)
{
    wide slope = wide_of(0), curve = wide_of(0);
    for (int64_t j = 0; j < g->width; j++) {
        const wide sum = gathered(wide_of(0), g->turned + j * g->turned_row, g->z, j + 1), t = get(g->target + j * LM_SLAB);
        EACH {
            slope.v[v] = FMA(sum.v[v], t.v[v], slope.v[v]);
            curve.v[v] = FMA(sum.v[v], sum.v[v], curve.v[v]);
        }
        put(g->reached + j * LM_SLAB, &sum);
    }
    EACH { /* |T - s z|^2 = |T|^2 - 2 s slope + s^2 curve */
        const vec s = c->scale.v[v];
        const vec fitted = storable(pick(curve.v[v] > all_of(0), slope.v[v] / curve.v[v], s));
        const vec now = s * (s * curve.v[v] - slope.v[v] - slope.v[v]);
        const vec then = fitted * (fitted * curve.v[v] - slope.v[v] - slope.v[v]);
        c->scale.v[v] = pick(then < now, fitted, s);
    }
}

/* Coordinate descent: round each integer again, given the others of its group. Overwrites reached and other_z. */
INLINE void descend(const group *g, const grid *c)
{
    float *v_rows = g->reached, *moved = g->other_z;
    for (int64_t j = 0; j < g->width; j++) { /* R^T z -> V */
        wide row = get(v_rows + j * LM_SLAB);
        const wide t = get(g->target + j * LM_SLAB);
        EACH row.v[v] = t.v[v] - c->scale.v[v] * row.v[v];
        put(v_rows + j * LM_SLAB, &row);
    }
    wide inverse;
    EACH inverse.v[v] = all_of(1.0f) / c->scale.v[v];
    for (int64_t j = 0; j < g->width; j++) {
        const float *metric = g->metric + j * g->width;
        wide pull = gathered(wide_of(0), g->r + j * g->r_row + j, v_rows + j * LM_SLAB, g->width - j);
        const wide taken = gathered(wide_of(0), metric, moved, j), old = get(g->z + j * LM_SLAB);
        const vec over = all_of(1.0f / metric[j]);
        wide here, change;
        EACH {
            pull.v[v] -= taken.v[v];
            here.v[v] = onto_grid(FMA(pull.v[v] * over, inverse.v[v], old.v[v]), c->low.v[v], c->high.v[v]);
            change.v[v] = (here.v[v] - old.v[v]) * c->scale.v[v];
        }
        put(g->z + j * LM_SLAB, &here);
        put(moved + j * LM_SLAB, &change);
    }
}

/* Round one group of one part of the slab: its grid and integers, V and W - Q. */
TARGET static void one_group(const lm_round *job, const group *g, grid *given)
{
    grid best = *given;
    if (job->search) {
        wide low, high;
        compensate(g, &low, &high);
        if (job->search == 1) {
            best = by_weights(job, g, &low, &high);
        } else {
            best = grid_of(job, &low, &high, 1.0f);
            const wide none = wide_of(0); /* remains if no grid has a finite error */
            for (int64_t j = 0; j < g->width; j++)
                put(g->z + j * LM_SLAB, &none);
            for (int32_t n = 0; n < job->ranges_count; n++) {
                grid c = grid_of(job, &low, &high, job->ranges[n]);
                round_group(g, &c, g->other_z);
                keep_better(g, &best, &c);
            }
            grid c = best;
            c.scale = best.fitted;
            round_group(g, &c, g->other_z);
            keep_better(g, &best, &c);
        }
    }
    if (job->search != 2) {
        round_group(g, &best, g->z);
    } else {
        refit(g, &best);
        for (int32_t pass = 0; pass < job->passes; pass++) {
            descend(g, &best);
            refit(g, &best);
        }
    }
    for (int64_t j = 0; j < g->width; j++) {
        const wide sum = gathered(wide_of(0), g->turned + j * g->turned_row, g->z, j + 1), t = get(g->target + j * LM_SLAB);
        const wide w = get(g->error + j * LM_SLAB), integers = get(g->z + j * LM_SLAB);
        wide left, missed;
        EACH {
            left.v[v] = t.v[v] - best.scale.v[v] * sum.v[v];
            missed.v[v] = w.v[v] - best.scale.v[v] * integers.v[v];
        }
        put(g->residual + j * LM_SLAB, &left);
        put(g->error + j * LM_SLAB, &missed);
    }
    *given = best;
}

/* The grid that the job gives for the outputs first + at.. of group `number`; 1 and 0 past the last of `here` outputs. */
INLINE grid given_grid(const lm_round *job, int64_t number, int64_t first, int64_t here, int64_t at)
{
    float stored[2][LM_SLAB];
    grid c = {.loss = wide_of(0)};
    for (int64_t i = 0; i < LM_SLAB; i++) {
        stored[0][i] = i < here ? job->scales[number * job->grid_row + first + i] : 1.0f;
        stored[1][i] = i < here ? job->zeros[number * job->grid_row + first + i] : 0.0f;
    }
    c.scale = get(stored[0] + at);
    c.zero = get(stored[1] + at);
    EACH {
        c.low.v[v] = -c.zero.v[v];
        c.high.v[v] = all_of((float)job->maxq) - c.zero.v[v];
    }
    return c;
}

TARGET void NAME(const lm_round_shared *shared, float *buffers, int64_t first)
{
    const lm_round *job = &shared->job;
    const int64_t n = job->columns, here = job->out - first < LM_SLAB ? job->out - first : LM_SLAB;
    const size_t bytes = (size_t)here * sizeof(float);
    float *error = buffers, *residual = error + n * LM_SLAB, *z = residual + n * LM_SLAB;
    float *other_z = z + n * LM_SLAB, *reached = other_z + n * LM_SLAB, *target = reached + n * LM_SLAB;
    if (here < LM_SLAB)
        memset(buffers, 0, (size_t)(2 * n * LM_SLAB) * sizeof(float));
    for (int64_t j = 0; j < n; j++) {
        memcpy(error + j * LM_SLAB, job->error + j * job->error_row + first, bytes);
        memcpy(residual + j * LM_SLAB, job->residual + j * job->residual_row + first, bytes);
    }
    for (int64_t begin = 0, number = 0; begin < n; begin += job->width, number++) {
        group g = {.turned = shared->turned + begin * n + begin, .r = job->r + begin * job->r_row + begin,
                   .metric = shared->metric + begin * job->width, .width = job->width, .turned_row = n,
                   .r_row = job->r_row};
        float grids[2][LM_SLAB] = {{0}};
        for (int part = 0; part < PARTS; part++) {
            const int64_t at = part * PART * LANES, from = begin * LM_SLAB + at;
            for (int64_t j = begin; j < begin + job->width; j++) {
                /* The correction for the block's columns up to this one: W - Q of earlier groups, W of this group. */
                const wide sum = gathered(get(residual + j * LM_SLAB + at), shared->turned + j * n, error + at, j + 1);
                put(target + (j - begin) * LM_SLAB + at, &sum);
            }
            g.target = target + at, g.z = z + from, g.other_z = other_z + from, g.reached = reached + from;
            g.error = error + from, g.residual = residual + from;
            grid found = {.loss = wide_of(0)};
            if (!job->search)
                found = given_grid(job, number, first, here, at);
            one_group(job, &g, &found);
            put(grids[0] + at, &found.scale);
            put(grids[1] + at, &found.zero);
        }
        for (int64_t j = begin; j < begin + job->width; j++)
            for (int64_t i = 0; i < here; i++)
                job->codes[j * job->codes_row + first + i] = (uint8_t)(int32_t)(z[j * LM_SLAB + i] + grids[1][i]);
        if (job->search) {
            memcpy(job->scales + number * job->grid_row + first, grids[0], bytes);
            memcpy(job->zeros + number * job->grid_row + first, grids[1], bytes);
        }
    }
    for (int64_t j = 0; j < n; j++) {
        memcpy(job->error + j * job->error_row + first, error + j * LM_SLAB, bytes);
        memcpy(job->residual + j * job->residual_row + first, residual + j * LM_SLAB, bytes);
    }
}
