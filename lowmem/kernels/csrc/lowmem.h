/* The C interface of lowmem's CPU kernels: C11, libc, and POSIX or Windows threads only.
 *
 * This header holds what all rooms share. Each room declares its own functions:
 *
 *   linear/linear.h        packed and dense linears
 *   attention/attention.h  attention over the KV cache
 *   step/step.h            a whole decode step
 *   gemm/gemm.h, round.h   matrix products and rounding for the converter
 *
 * isa.h describes what an instruction set provides; isa.c lists the instruction sets in one table.
 */
#ifndef LOWMEM_H
#define LOWMEM_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define LM_EXPORT __declspec(dllexport)
#else
#define LM_EXPORT __attribute__((visibility("default")))
#endif

/* The version of these headers. Raise it with every change of a structure, constant or exported function: Python refuses
 * a library that was compiled from other headers. It also refuses one that lacks a function or a width of weights, so it may
 * stay when one is added. */
enum { LM_CONTRACT = 8 };
LM_EXPORT int lm_contract(void);

/* Number types. */
enum { LM_F32 = 0, LM_F16 = 1, LM_BF16 = 2 };

/* Rows of numbers. Inside a row they are contiguous. */
typedef struct {
    void *values;
    int64_t rows;
    int64_t stride; /* values from one row to the next */
    int32_t type;   /* LM_F32, LM_F16 or LM_BF16 */
} lm_matrix;

/* ---- threads (threads.c) ------------------------------------------------------------------------------------- */

/* Set the number of threads. gomp_parallel: the address of GOMP_parallel in the OpenMP library that torch uses; the
 * kernels then run on torch's threads. NULL: the library starts threads of its own. */
LM_EXPORT void lm_set_threads(int threads, void *gomp_parallel);
LM_EXPORT int lm_threads(void);

/* ---- instruction sets (isa.c) -------------------------------------------------------------------------------- */

/* The name of the selected instruction set: the best one that this CPU supports, unless lm_use_isa selected another. */
LM_EXPORT const char *lm_isa_name(void);
/* Select an instruction set by name, for tests. Returns 0 if this CPU does not support it. */
LM_EXPORT int lm_use_isa(const char *name);
/* The name of instruction set `index` of the table, best first; NULL past the end. */
LM_EXPORT const char *lm_isa_at(int index);

/* ---- memory bandwidth (stream.c) ----------------------------------------------------------------------------- */

/* Read `bytes` once with all threads at full memory bandwidth. Returns the exclusive or of all 64-bit words. */
LM_EXPORT uint64_t lm_read(const void *memory, size_t bytes);

/* ---- truncated files (fault.c) ------------------------------------------------------------------------------- */

/* From now on, when a page of a mapped file cannot be read (SIGBUS; on Windows an in-page error): restore the terminal to
 * its present state, write `line` to standard error and exit with exit_code. NULL restores the previous handler. Returns 0, or -1 if the system
 * refuses. Not thread-safe. */
LM_EXPORT int lm_tell_bus_errors(const char *line, int exit_code);

#endif
