/* The table of instruction sets, and which one is selected. */
#include "isa.h"

#include <string.h>
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "x86.h"

static int always(void) { return 1; }

#if defined(__aarch64__)
/* Whether the system reports a feature: Linux as a bit of an auxiliary value (asm/hwcap.h), macOS by name. */
static int reports(unsigned long type, int bit, const char *name)
{
#if defined(__linux__)
    (void)name;
    return getauxval(type) >> bit & 1;
#elif defined(__APPLE__)
    (void)type, (void)bit;
    int value = 0;
    size_t size = sizeof value;
    return !sysctlbyname(name, &value, &size, NULL, 0) && value;
#else
    (void)type, (void)bit, (void)name;
    return 0;
#endif
}

enum { HWCAP = 16, HWCAP2 = 26 }; /* AT_HWCAP and AT_HWCAP2 of elf.h */

static int has_dotprod(void) { return reports(HWCAP, 20, "hw.optional.arm.FEAT_DotProd"); }

static int has_i8mm(void) { return has_dotprod() && reports(HWCAP2, 13, "hw.optional.arm.FEAT_I8MM"); }
#endif

/* Best first. */
static const lm_isa table[] = {
#if defined(__x86_64__)
    {"AVX-512 BF16", lm_has_bf16, &lm_linear_avx512, &lm_attention_bf16, &lm_gemm_avx512, &lm_gemm_avx512_bf16,
     lm_round_avx512, &lm_train_avx512, &lm_elementwise_avx2, lm_read_avx512},
    {"AVX-512 VNNI", lm_has_vnni, &lm_linear_avx512, &lm_attention_avx2, &lm_gemm_avx512, &lm_gemm_avx512,
     lm_round_avx512, &lm_train_avx512, &lm_elementwise_avx2, lm_read_avx512},
    {"AVX-512", lm_has_avx512, &lm_linear_avx2, &lm_attention_avx2, &lm_gemm_avx512, &lm_gemm_avx512,
     lm_round_avx512, &lm_train_avx512, &lm_elementwise_avx2, lm_read_avx512},
    {"AVX2", lm_has_avx2, &lm_linear_avx2, &lm_attention_avx2, &lm_gemm_avx2, &lm_gemm_avx2,
     lm_round_avx2, &lm_train_avx2, &lm_elementwise_avx2, lm_read_avx2},
#elif defined(__aarch64__)
    /* Compilers make NEON of portable C where it has vectors and no fused operations. */
    {"NEON i8mm", has_i8mm, &lm_linear_neon_i8mm, &lm_attention_neon, &lm_gemm_neon, &lm_gemm_neon,
     lm_round_neon, &lm_train_portable, &lm_elementwise_portable, lm_read_portable},
    {"NEON dotprod", has_dotprod, &lm_linear_neon_dotprod, &lm_attention_neon, &lm_gemm_neon, &lm_gemm_neon,
     lm_round_neon, &lm_train_portable, &lm_elementwise_portable, lm_read_portable},
    {"NEON", always, &lm_linear_neon, &lm_attention_neon, &lm_gemm_neon, &lm_gemm_neon,
     lm_round_neon, &lm_train_portable, &lm_elementwise_portable, lm_read_portable},
#endif
    {"portable C", always, &lm_linear_portable, &lm_attention_portable, &lm_gemm_portable, &lm_gemm_portable,
     lm_round_portable, &lm_train_portable, &lm_elementwise_portable, lm_read_portable},
};

enum { COUNT = sizeof table / sizeof table[0] };

static const lm_isa *selected;

const lm_isa *lm_isa_selected(void)
{
    for (int i = 0; !selected && i < COUNT; i++)
        if (table[i].supported())
            selected = &table[i];
    return selected;
}

const char *lm_isa_name(void) { return lm_isa_selected()->name; }

const char *lm_isa_at(int index) { return index < COUNT ? table[index].name : NULL; }

int lm_use_isa(const char *name)
{
    for (int i = 0; i < COUNT; i++)
        if (!strcmp(table[i].name, name) && table[i].supported()) {
            selected = &table[i];
            return 1;
        }
    return 0;
}

int lm_contract(void) { return LM_CONTRACT; }
