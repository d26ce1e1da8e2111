/* Which instruction set computes: the best that the CPU has, or the one that was asked for. */
#include <string.h>

#include "lowmem.h"

static const lm_isa *chosen;

static int has(const lm_isa *isa)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (isa == &lm_avx512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") &&
               __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("gfni") &&
               __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (isa == &lm_avx2)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
    return isa == &lm_portable;
}

static const lm_isa *const all[] = {
#if defined(__x86_64__)
    &lm_avx512, &lm_avx2,
#endif
    &lm_portable};

enum { COUNT = sizeof all / sizeof all[0] };

const lm_isa *lm_best_isa(void)
{
    for (int i = 0; !chosen && i < COUNT; i++)
        if (has(all[i]))
            chosen = all[i];
    return chosen;
}

const char *lm_isa_name(void) { return lm_best_isa()->name; }

int lm_use_isa(const char *name)
{
    for (int i = 0; i < COUNT; i++)
        if (!strcmp(all[i]->name, name) && has(all[i])) {
            chosen = all[i];
            return 1;
        }
    return 0;
}

int lm_contract(void) { return LM_CONTRACT; }

int32_t lm_kernel_group(int32_t group)
{
    if (group <= 256)
        return group;
    for (int32_t width = 256; width > 32; width /= 2)
        if (group % width == 0)
            return width;
    return 32;
}
