/* What an x86-64 processor supports, by its cpuid instruction and the registers that the system saves. The compilers'
 * __builtin_cpu_supports needs a run-time library, and that of zig reports nothing.
 *
 * Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, CPUID, and volume 1, chapter 13 (XCR0).
 */
#ifndef LOWMEM_X86_H
#define LOWMEM_X86_H
#if defined(__x86_64__)

#include <cpuid.h>

enum { LM_EAX, LM_EBX, LM_ECX, LM_EDX };

/* Bit `bit` of a register that cpuid fills. */
static inline int lm_cpuid(unsigned leaf, unsigned part, int where, int bit)
{
    unsigned found[4] = {0};
    return __get_cpuid_count(leaf, part, &found[0], &found[1], &found[2], &found[3]) && found[where] >> bit & 1;
}

/* Whether the system saves these registers of XCR0 (1 << 1: XMM, 2: YMM, 5 to 7: masks and ZMM). */
static inline int lm_registers_saved(unsigned wanted)
{
    if (!lm_cpuid(1, 0, LM_ECX, 27)) /* OSXSAVE */
        return 0;
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & wanted) == wanted;
}

static inline int lm_has_avx2(void)
{
    return lm_registers_saved(0x06) && lm_cpuid(1, 0, LM_ECX, 28) && lm_cpuid(7, 0, LM_EBX, 5) /* AVX, AVX2 */
           && lm_cpuid(1, 0, LM_ECX, 12) && lm_cpuid(1, 0, LM_ECX, 29);                        /* FMA, F16C */
}

static inline int lm_has_avx512(void)
{
    return lm_has_avx2() && lm_registers_saved(0xe6) && lm_cpuid(7, 0, LM_EBX, 16) /* F */
           && lm_cpuid(7, 0, LM_EBX, 30) && lm_cpuid(7, 0, LM_EBX, 31)            /* BW, VL */
           && lm_cpuid(7, 0, LM_EBX, 17);                                         /* DQ */
}

static inline int lm_has_vnni(void) /* Ice Lake, Zen 4 and later */
{
    return lm_has_avx512() && lm_cpuid(7, 0, LM_ECX, 11)              /* VNNI */
           && lm_cpuid(7, 0, LM_ECX, 1) && lm_cpuid(7, 0, LM_ECX, 6) /* VBMI, VBMI2 */
           && lm_cpuid(7, 0, LM_ECX, 8);                             /* GFNI */
}

static inline int lm_has_bf16(void) { return lm_has_vnni() && lm_cpuid(7, 1, LM_EAX, 5); }

#endif
#endif
