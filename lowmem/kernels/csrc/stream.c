/* Read memory at full bandwidth: the ceiling against which kernels are measured. */
#include <string.h>

#include "isa.h"

/* Prefetch distances in bytes: of every line, and of one line of each page, since a TLB miss takes longer than the read. */
enum { PIECE = 1 << 20, AHEAD = 4096, PAGE = 4096, PAGES_AHEAD = 16384 };

typedef uint64_t words __attribute__((vector_size(64), aligned(1), may_alias)); /* 512 bits, unaligned */

typedef struct {
    const char *memory;
    size_t bytes;
    uint64_t all; /* the result of all threads */
} job;

/* 256 bytes at a time into four sums; the tail word by word. */
static inline __attribute__((always_inline)) uint64_t read_piece(const char *from, size_t bytes)
{
    words a = {0}, b = {0}, c = {0}, d = {0};
    size_t i = 0;
    for (; i + 256 <= bytes; i += 256) {
        for (int line = 0; line < 256; line += 64)
            __builtin_prefetch(from + i + AHEAD + line); /* past the end it does nothing */
        if (i % PAGE == 0)
            __builtin_prefetch(from + i + PAGES_AHEAD);
        a ^= *(const words *)(from + i);
        b ^= *(const words *)(from + i + 64);
        c ^= *(const words *)(from + i + 128);
        d ^= *(const words *)(from + i + 192);
    }
    a ^= b ^ c ^ d;
    uint64_t sum = 0;
    for (int lane = 0; lane < 8; lane++)
        sum ^= a[lane];
    for (; i < bytes; i += 8) {
        uint64_t word = 0;
        memcpy(&word, from + i, bytes - i < 8 ? bytes - i : 8);
        sum ^= word;
    }
    return sum;
}

uint64_t lm_read_portable(const char *from, size_t bytes) { return read_piece(from, bytes); }

#if defined(__x86_64__)
__attribute__((target("avx2"))) uint64_t lm_read_avx2(const char *from, size_t bytes) { return read_piece(from, bytes); }

__attribute__((target("avx512f"))) uint64_t lm_read_avx512(const char *from, size_t bytes)
{
    return read_piece(from, bytes);
}
#endif

static void body(void *context, lm_team *team)
{
    job *j = context;
    lm_reader *read = lm_isa_selected()->read;
    uint64_t sum = 0;
    for (int64_t piece; (size_t)(piece = lm_next(team)) * PIECE < j->bytes;) {
        size_t start = (size_t)piece * PIECE;
        sum ^= read(j->memory + start, j->bytes - start < PIECE ? j->bytes - start : PIECE);
    }
    __atomic_fetch_xor(&j->all, sum, __ATOMIC_RELAXED);
}

uint64_t lm_read(const void *memory, size_t bytes)
{
    job j = {memory, bytes, 0};
    lm_run(body, &j);
    return j.all;
}
