/* A team of threads: torch's OpenMP threads where possible, else a pool of our own.
 *
 * Two pools of threads that spin while they wait would compete for the cores. The kernels therefore use the threads of
 * torch's operators, through the entry point that compilers call for `#pragma omp parallel`.
 */
#include "threads.h"

#include <stdatomic.h>

#include "system.h"

enum { MOST_THREADS = 512, SPINS = 4000, IDLE_SPINS = 20000 };

#define LINE __attribute__((aligned(64))) /* each counter in a cache line of its own */

/* What the threads of one lm_run share, on the caller's stack. */
typedef struct {
    lm_body body;
    void *context;
    atomic_int size;
    LINE atomic_int arrived;
    LINE atomic_uint phase;
    LINE atomic_llong next;
} shared;

struct lm_team {
    shared *all;
    int rank;
    unsigned phase; /* how many barriers this thread has passed */
};

typedef void (*gomp_parallel_t)(void (*)(void *), void *, unsigned, unsigned);
typedef int (*omp_number_t)(void);

static int wanted = 1;
static gomp_parallel_t gomp_parallel;
static omp_number_t omp_rank, omp_size;

static inline void pause_briefly(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Wait for a moment. After many turns, yield the core: the awaited thread may need it. */
static inline void wait_a_turn(int *spins)
{
    if (*spins < SPINS) {
        ++*spins;
        pause_briefly();
    } else {
        lm_yield();
    }
}

int lm_rank(const lm_team *team) { return team->rank; }

int lm_size(const lm_team *team) { return atomic_load_explicit(&team->all->size, memory_order_relaxed); }

int64_t lm_next(lm_team *team) { return atomic_fetch_add_explicit(&team->all->next, 1, memory_order_relaxed); }

void lm_barrier(lm_team *team)
{
    shared *all = team->all;
    unsigned phase = ++team->phase;
    if (atomic_fetch_add_explicit(&all->arrived, 1, memory_order_acq_rel) + 1 == lm_size(team)) {
        /* All threads have arrived, so no thread uses the counters: reset both before any thread leaves. */
        atomic_store_explicit(&all->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&all->next, 0, memory_order_relaxed);
        atomic_store_explicit(&all->phase, phase, memory_order_release);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&all->phase, memory_order_acquire) != phase;)
        wait_a_turn(&spins);
}

static void take_part(shared *all, int rank)
{
    lm_team team = {all, rank, 0};
    all->body(all->context, &team);
}

/* ---- OpenMP's threads ---------------------------------------------------------------------------------------- */

static void omp_body(void *data)
{
    shared *all = data;
    /* OpenMP may start fewer threads than requested, and only one inside another parallel region. Every thread
     * writes the same number before it reads it. */
    atomic_store_explicit(&all->size, omp_size(), memory_order_relaxed);
    take_part(all, omp_rank());
}

/* ---- the pool of our own -------------------------------------------------------------------------------------- */

static struct {
    lm_lock busy; /* held by the caller that uses the pool */
    lm_lock lock; /* guards `wake` */
    lm_condition wake;
    int started;
    shared *job;
    LINE atomic_ullong ticket; /* number of the job; the low 16 bits: how many threads take part */
    LINE atomic_int working;
} pool = {.busy = LM_LOCK_FREE, .lock = LM_LOCK_FREE, .wake = LM_CONDITION_QUIET};

static void pool_thread(int rank)
{
    unsigned long long seen = 0; /* jobs from before this thread started were for lower ranks */
    for (;;) {
        unsigned long long ticket = seen;
        for (int spins = 0; spins < IDLE_SPINS && ticket == seen; spins++) {
            pause_briefly();
            ticket = atomic_load_explicit(&pool.ticket, memory_order_acquire);
        }
        if (ticket == seen) {
            lm_lock_take(&pool.lock);
            while ((ticket = atomic_load_explicit(&pool.ticket, memory_order_acquire)) == seen)
                lm_wait(&pool.wake, &pool.lock);
            lm_lock_release(&pool.lock);
        }
        seen = ticket;
        if (rank < (int)(ticket & 0xffff)) { /* otherwise the job is for other threads, and may be over already */
            take_part(pool.job, rank);
            atomic_fetch_sub_explicit(&pool.working, 1, memory_order_release);
        }
    }
}

/* A forked child does not inherit its parent's threads. */
static void forget_threads(void)
{
    pool.busy = pool.lock = (lm_lock)LM_LOCK_FREE;
    pool.wake = (lm_condition)LM_CONDITION_QUIET;
    pool.started = 0;
    atomic_store(&pool.ticket, 0);
}

/* Grow the pool to `threads` - 1 threads beside the caller, who holds `busy`. Returns the size of the team, caller
 * included. */
static int start_threads(int threads)
{
    static int watches_forks;
    if (!watches_forks)
        lm_in_forked_children(forget_threads);
    watches_forks = 1;
    while (pool.started < threads - 1 && lm_start_thread(pool_thread, pool.started + 1))
        pool.started++;
    return pool.started + 1 < threads ? pool.started + 1 : threads;
}

static void run_on_pool(shared *job)
{
    int size = start_threads(atomic_load(&job->size));
    atomic_store(&job->size, size);
    pool.job = job;
    atomic_store_explicit(&pool.working, size - 1, memory_order_relaxed);
    unsigned long long number = (atomic_load_explicit(&pool.ticket, memory_order_relaxed) >> 16) + 1;
    lm_lock_take(&pool.lock);
    atomic_store_explicit(&pool.ticket, number << 16 | (unsigned)size, memory_order_release);
    lm_wake_all(&pool.wake);
    lm_lock_release(&pool.lock);
    take_part(job, 0);
    for (int spins = 0; atomic_load_explicit(&pool.working, memory_order_acquire);)
        wait_a_turn(&spins);
}

/* -------------------------------------------------------------------------------------------------------------- */

void lm_run(lm_body body, void *context)
{
    int size = wanted;
    shared all = {.body = body, .context = context, .size = size};
    if (size > 1 && gomp_parallel) {
        gomp_parallel(omp_body, &all, (unsigned)size, 0);
    } else if (size > 1 && lm_lock_try(&pool.busy)) {
        run_on_pool(&all);
        lm_lock_release(&pool.busy);
    } else {
        /* Also if another caller, or a body around this one, uses the pool: no result depends on the number of
         * threads. */
        atomic_store(&all.size, 1);
        take_part(&all, 0);
    }
}

static omp_number_t omp_number(void *parallel, const char *name)
{
    void *symbol = parallel ? lm_neighbour(parallel, name) : NULL;
    omp_number_t function = NULL;
    __builtin_memcpy(&function, &symbol, sizeof function);
    return function;
}

void lm_set_threads(int threads, void *parallel)
{
    wanted = threads < 1 ? 1 : threads > MOST_THREADS ? MOST_THREADS : threads;
    omp_rank = omp_number(parallel, "omp_get_thread_num");
    omp_size = omp_number(parallel, "omp_get_num_threads");
    gomp_parallel = NULL;
    if (omp_rank && omp_size)
        __builtin_memcpy(&gomp_parallel, &parallel, sizeof parallel);
}

int lm_threads(void) { return wanted; }
