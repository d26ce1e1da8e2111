/* What differs between operating systems: threads, locks, and functions of other libraries. The inline functions are
 * POSIX threads' or Windows' own by other names; system.c has the rest.
 */
#ifndef LOWMEM_SYSTEM_H
#define LOWMEM_SYSTEM_H

#if defined(_WIN32)

#define WIN32_LEAN_AND_MEAN
#include <windows.h>

typedef SRWLOCK lm_lock;
typedef CONDITION_VARIABLE lm_condition;
#define LM_LOCK_FREE SRWLOCK_INIT
#define LM_CONDITION_QUIET CONDITION_VARIABLE_INIT

static inline void lm_lock_take(lm_lock *lock) { AcquireSRWLockExclusive(lock); }
static inline int lm_lock_try(lm_lock *lock) { return TryAcquireSRWLockExclusive(lock); }
static inline void lm_lock_release(lm_lock *lock) { ReleaseSRWLockExclusive(lock); }
static inline void lm_wait(lm_condition *condition, lm_lock *lock)
{
    SleepConditionVariableSRW(condition, lock, INFINITE, 0);
}
static inline void lm_wake_all(lm_condition *condition) { WakeAllConditionVariable(condition); }
static inline void lm_yield(void) { SwitchToThread(); }

#else

#include <pthread.h>
#include <sched.h>

typedef pthread_mutex_t lm_lock;
typedef pthread_cond_t lm_condition;
#define LM_LOCK_FREE PTHREAD_MUTEX_INITIALIZER
#define LM_CONDITION_QUIET PTHREAD_COND_INITIALIZER

static inline void lm_lock_take(lm_lock *lock) { pthread_mutex_lock(lock); }
static inline int lm_lock_try(lm_lock *lock) { return pthread_mutex_trylock(lock) == 0; }
static inline void lm_lock_release(lm_lock *lock) { pthread_mutex_unlock(lock); }
static inline void lm_wait(lm_condition *condition, lm_lock *lock) { pthread_cond_wait(condition, lock); }
static inline void lm_wake_all(lm_condition *condition) { pthread_cond_broadcast(condition); }
static inline void lm_yield(void) { sched_yield(); }

#endif

/* Start a thread that runs body(number) until the process ends; it handles no signals. Returns 0 if the system refuses. */
int lm_start_thread(void (*body)(int number), int number);
/* Have every forked child call `forget`; nothing where processes cannot fork. Call it once. */
void lm_in_forked_children(void (*forget)(void));
/* The function of this name in the library that contains `address`; NULL if there is none. */
void *lm_neighbour(void *address, const char *name);

#endif
