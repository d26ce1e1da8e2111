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

enum { TRAIN_LANES = 16 }; /* sums of a row, so that every instruction set adds in the same order */

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

INLINE void measure_rows(const lm_train_shared *s, int64_t unit, int bf16)
{
    const lm_train *job = &s->job;
    const int64_t out = job->out, first = unit * s->unit, last = lm_min(first + s->unit, job->inputs);
    float *sums = s->sums + unit * out;
    memset(sums, 0, (size_t)out * sizeof(float));
    for (int64_t i = first; i < last; i++) {
        const float *scales = job->scales + i / job->width * out;
        float *scale_slope = job->scale_slope + i / job->width * out;
        if (i % job->width == 0)
            memset(scale_slope, 0, (size_t)out * sizeof(float));
        vec total[TRAIN_LANES / LANES];
        for (int v = 0; v < TRAIN_LANES / LANES; v++)
            total[v] = all_of(0);
        for (int64_t j = 0; j < out; j += TRAIN_LANES)
            for (int v = 0; v < TRAIN_LANES / LANES; v++) {
                const int64_t at = j + v * LANES;
                const vec slope = slope_at(job->slope, i * out + at, bf16), g = slope * floats_at(scales + at);
                const vec z = __builtin_convertvector(integers_at(job->z + i * out + at), vec);
                total[v] += g * g;
                put_floats(sums + at, floats_at(sums + at) + g * g);
                put_floats(scale_slope + at, floats_at(scale_slope + at) + slope * z);
            }
        float parts[TRAIN_LANES], sum = 0;
        memcpy(parts, total, sizeof parts);
        for (int v = 0; v < TRAIN_LANES; v++)
            sum += parts[v];
        job->rows[i] = job->keep * job->rows[i] + (1 - job->keep) * (sum / (float)out);
    }
}

INLINE void move_rows(const lm_train_shared *s, int64_t unit, int bf16)
{
    const lm_train *job = &s->job;
    const int64_t out = job->out, first = unit * s->unit, last = lm_min(first + s->unit, job->inputs);
    const vec most = all_of(job->most), rate = all_of(-65536.0f * job->rate);
    for (int64_t i = first; i < last; i++) {
        const float *scales = job->scales + i / job->width * out;
        const uint8_t *zeros = job->zeros + i / job->width * out;
        const vec row = all_of(s->row_factors[i]);
        for (int64_t j = 0; j < out; j += LANES) {
            const vec g = slope_at(job->slope, i * out + j, bf16) * floats_at(scales + j);
            const vec step = g * row * floats_at(s->column_factors + j);
            const vec moved = rounded(smaller(larger(step, -most), most) * rate);
            code_vec code;
            half_vec kept;
            memcpy(&code, zeros + j, sizeof code);
            memcpy(&kept, job->fraction + i * out + j, sizeof kept);
            const ivec zero = __builtin_convertvector(code, ivec);
            const ivec low = (-zero << 16) - 32768, high = ((job->maxq - zero) << 16) + 32767;
            ivec hidden = (integers_at(job->z + i * out + j) << 16) + __builtin_convertvector(kept, ivec);
            hidden += __builtin_convertvector(moved, ivec);
            hidden = (hidden & (hidden > low)) | (low & ~(hidden > low));
            hidden = (hidden & (hidden < high)) | (high & ~(hidden < high));
            const ivec z = (hidden + 32768) >> 16;
            const bytes_vec stored = __builtin_convertvector(z, bytes_vec);
            kept = __builtin_convertvector(hidden - (z << 16), half_vec);
            memcpy(job->z + i * out + j, &stored, sizeof stored);
            memcpy(job->fraction + i * out + j, &kept, sizeof kept);
        }
    }
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
