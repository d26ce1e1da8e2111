/* A team of threads that run the same function (threads.c). */
#ifndef LOWMEM_THREADS_H
#define LOWMEM_THREADS_H

#include "lowmem.h"

typedef struct lm_team lm_team;
typedef void (*lm_body)(void *context, lm_team *team);

/* Run body on every thread at once; the caller is one of them. Only one caller at a time. */
void lm_run(lm_body body, void *context);
/* Wait until every thread of the team has arrived. */
void lm_barrier(lm_team *team);
int lm_rank(const lm_team *team);
int lm_size(const lm_team *team);
/* The next piece of work: 0, 1, 2 …, each given to one thread. Every thread calls this until the result is >= count. All
 * threads must then meet in lm_barrier, which restarts the numbering at 0. */
int64_t lm_next(lm_team *team);

/* This thread's share of `count` items: first..last-1. */
static inline void lm_share(const lm_team *team, int64_t count, int64_t *first, int64_t *last)
{
    *first = count * lm_rank(team) / lm_size(team);
    *last = count * (lm_rank(team) + 1) / lm_size(team);
}

#endif
