/* A step of training on some rows of a weight. Each instruction set's file includes this after defining TARGET and LANES, see
 * vectors.h, and TRAIN, the name of its functions. */
#include "kernels.h"
#include "types.h"
#include "vectors.h"

typedef int8_t bytes_vec __attribute__((vector_size(LANES)));
typedef int16_t half_vec __attribute__((vector_size(2 * LANES)));
typedef uint16_t word_vec __attribute__((vector_size(2 * LANES)));
typedef uint8_t code_vec __attribute__((vector_size(LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));

enum {
    TRAIN_LANES = 16, /* sums of a row, so that every instruction set adds in the same order */
    TRAIN_ROWS = 4    /* that are worked on together, if a group's rows are a multiple of them */
};

INLINE vec floats_at(const float *from)
{
    vec x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE vec slope_at(const void *slope, int64_t at, int bf16)
{
    if (!bf16)
        return floats_at((const float *)slope + at);
    word_vec half;
    memcpy(&half, (const uint16_t *)slope + at, sizeof half);
    return (vec)(__builtin_convertvector(half, uvec) << 16);
}

INLINE ivec integers_at(const int8_t *from)
{
    bytes_vec z;
    memcpy(&z, from, sizeof z);
    return __builtin_convertvector(z, ivec);
}

INLINE void put_floats(float *into, vec x) { memcpy(into, &x, sizeof x); }

/* Rows of one group from `first` on. Sums of columns are read and written once for all of them. */
INLINE void measure_some(const lm_train_shared *s, float *sums, int64_t first, int rows, int bf16)
{
    const lm_train *job = &s->job;
    const int64_t out = job->out;
    const float *scales = job->scales + first / job->width * out;
    float *scale_slope = job->scale_slope + first / job->width * out;
    vec total[TRAIN_ROWS][TRAIN_LANES / LANES];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < TRAIN_LANES / LANES; v++)
            total[r][v] = all_of(0);
    for (int64_t j = 0; j < out; j += TRAIN_LANES)
        for (int v = 0; v < TRAIN_LANES / LANES; v++) {
            const int64_t at = j + v * LANES;
            const vec scale = floats_at(scales + at);
            vec squares = floats_at(sums + at), products = floats_at(scale_slope + at);
            for (int r = 0; r < rows; r++) {
                const int64_t from = (first + r) * out + at;
                const vec slope = slope_at(job->slope, from, bf16), g = slope * scale;
                total[r][v] += g * g;
                squares += g * g;
                products += slope * __builtin_convertvector(integers_at(job->z + from), vec);
            }
            put_floats(sums + at, squares);
            put_floats(scale_slope + at, products);
        }
    for (int r = 0; r < rows; r++) {
        float parts[TRAIN_LANES], sum = 0, *mean = job->rows + first + r;
        memcpy(parts, total[r], sizeof parts);
        for (int v = 0; v < TRAIN_LANES; v++)
            sum += parts[v];
        *mean = job->keep * *mean + (1 - job->keep) * (sum / (float)out);
    }
}

INLINE void measure_rows(const lm_train_shared *s, int64_t unit, int bf16)
{
    const lm_train *job = &s->job;
    const int64_t first = unit * s->unit, last = lm_min(first + s->unit, job->inputs);
    float *sums = s->sums + unit * job->out;
    memset(sums, 0, (size_t)job->out * sizeof(float));
    memset(job->scale_slope + first / job->width * job->out, 0,
           (size_t)((last - first) / job->width * job->out) * sizeof(float));
    if (job->width % TRAIN_ROWS == 0)
        for (int64_t i = first; i < last; i += TRAIN_ROWS)
            measure_some(s, sums, i, TRAIN_ROWS, bf16);
    else
        for (int64_t i = first; i < last; i++)
            measure_some(s, sums, i, 1, bf16);
}

/* Rows of one group from `first` on. */
INLINE void move_some(const lm_train_shared *s, int64_t first, int rows, int bf16)
{
    const lm_train *job = &s->job;
    const int64_t out = job->out;
    const vec most = all_of(job->most), rate = all_of(-65536.0f * job->rate);
    const float *scales = job->scales + first / job->width * out;
    const uint8_t *zeros = job->zeros + first / job->width * out;
    for (int64_t j = 0; j < out; j += LANES) {
        const vec scale = floats_at(scales + j), column = floats_at(s->column_factors + j);
        code_vec code;
        memcpy(&code, zeros + j, sizeof code);
        const ivec zero = __builtin_convertvector(code, ivec);
        const ivec low = (-zero << 16) - 32768, high = ((job->maxq - zero) << 16) + 32767;
        for (int r = 0; r < rows; r++) {
            const int64_t at = (first + r) * out + j;
            const vec step = slope_at(job->slope, at, bf16) * scale * all_of(s->row_factors[first + r]) * column;
            const vec moved = rounded(smaller(larger(step, -most), most) * rate);
            half_vec kept;
            memcpy(&kept, job->fraction + at, sizeof kept);
            ivec hidden = (integers_at(job->z + at) << 16) + __builtin_convertvector(kept, ivec);
            hidden += __builtin_convertvector(moved, ivec);
            hidden = (hidden & (hidden > low)) | (low & ~(hidden > low));
            hidden = (hidden & (hidden < high)) | (high & ~(hidden < high));
            const ivec z = (hidden + 32768) >> 16;
            const bytes_vec stored = __builtin_convertvector(z, bytes_vec);
            kept = __builtin_convertvector(hidden - (z << 16), half_vec);
            memcpy(job->z + at, &stored, sizeof stored);
            memcpy(job->fraction + at, &kept, sizeof kept);
        }
    }
}

INLINE void move_rows(const lm_train_shared *s, int64_t unit, int bf16)
{
    const lm_train *job = &s->job;
    const int64_t first = unit * s->unit, last = lm_min(first + s->unit, job->inputs);
    if (job->width % TRAIN_ROWS == 0)
        for (int64_t i = first; i < last; i += TRAIN_ROWS)
            move_some(s, i, TRAIN_ROWS, bf16);
    else
        for (int64_t i = first; i < last; i++)
            move_some(s, i, 1, bf16);
}

TARGET static void measure(const lm_train_shared *s, int64_t unit)
{
    if (s->job.slope_type == LM_BF16)
        measure_rows(s, unit, 1);
    else
        measure_rows(s, unit, 0);
}

TARGET static void move(const lm_train_shared *s, int64_t unit)
{
    if (s->job.slope_type == LM_BF16)
        move_rows(s, unit, 1);
    else
        move_rows(s, unit, 0);
}

const lm_train_kernels TRAIN = {measure, move};
