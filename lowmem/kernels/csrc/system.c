/* Threads and neighbouring libraries, for POSIX systems and for Windows. */
#define _GNU_SOURCE /* dladdr */
#include "system.h"

#include <stdlib.h>

typedef struct {
    void (*body)(int);
    int number;
} task;

static void run_task(void *argument)
{
    const task own = *(task *)argument;
    free(argument);
    own.body(own.number);
}

static task *new_task(void (*body)(int), int number)
{
    task *made = malloc(sizeof *made);
    if (made)
        *made = (task){body, number};
    return made;
}

#if defined(_WIN32)

static DWORD WINAPI thread(void *argument)
{
    run_task(argument);
    return 0;
}

int lm_start_thread(void (*body)(int number), int number)
{
    task *made = new_task(body, number);
    HANDLE handle = made ? CreateThread(NULL, 0, thread, made, 0, NULL) : NULL;
    if (!handle) {
        free(made);
        return 0;
    }
    CloseHandle(handle); /* the thread goes on */
    return 1;
}

void lm_in_forked_children(void (*forget)(void)) { (void)forget; }

void *lm_neighbour(void *address, const char *name)
{
    const DWORD flags = GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS | GET_MODULE_HANDLE_EX_FLAG_UNCHANGED_REFCOUNT;
    HMODULE library;
    if (!GetModuleHandleExA(flags, (const char *)address, &library))
        return NULL;
    FARPROC symbol = GetProcAddress(library, name);
    void *found = NULL;
    __builtin_memcpy(&found, &symbol, sizeof found);
    return found;
}

#else

#include <dlfcn.h>
#include <signal.h>

static void *thread(void *argument)
{
    run_task(argument);
    return NULL;
}

int lm_start_thread(void (*body)(int number), int number)
{
    task *made = new_task(body, number);
    if (!made)
        return 0;
    sigset_t all, old;
    sigfillset(&all); /* the program's own threads handle signals */
    pthread_sigmask(SIG_SETMASK, &all, &old);
    pthread_t handle;
    const int refused = pthread_create(&handle, NULL, thread, made);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (refused) {
        free(made);
        return 0;
    }
    pthread_detach(handle);
    return 1;
}

void lm_in_forked_children(void (*forget)(void)) { pthread_atfork(NULL, NULL, forget); }

void *lm_neighbour(void *address, const char *name)
{
    Dl_info info;
    if (!dladdr(address, &info) || !info.dli_fname)
        return NULL;
    void *library = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    if (!library)
        return NULL;
    void *symbol = dlsym(library, name);
    dlclose(library); /* the library stays loaded: torch has it open */
    return symbol;
}

#endif
