/* What an instruction set provides: one structure of functions for each room. isa.c has the table.
 *
 * To add an instruction set: write a file in each room where it has kernels of its own, and add a row to the table. The
 * row names another set's functions where the new set has none.
 */
#ifndef LOWMEM_ISA_H
#define LOWMEM_ISA_H

#include "attention/kernels.h"
#include "gemm/kernels.h"
#include "linear/kernels.h"
#include "step/kernels.h"

/* See lm_read; `bytes` of one thread. */
typedef uint64_t lm_reader(const char *from, size_t bytes);
extern lm_reader lm_read_portable;
#if defined(__x86_64__)
extern lm_reader lm_read_avx2, lm_read_avx512;
#endif

typedef struct {
    const char *name;
    int (*supported)(void);
    const lm_linear_kernels *linear;
    const lm_attention_kernels *attention;
    const lm_gemm_kernels *gemm, *gemm_bf16; /* of float32 factors; of factors that may be rounded to bfloat16 */
    lm_round_slab *round;
    const lm_train_kernels *train;
    const lm_elementwise_kernels *elementwise;
    lm_reader *read;
} lm_isa;

/* The selected instruction set. */
const lm_isa *lm_isa_selected(void);

#endif
