/* Memory between two inaccessible pages, on POSIX systems and on Windows. */
#ifndef LOWMEM_PAGES_H
#define LOWMEM_PAGES_H

#include <stddef.h>
#include <stdlib.h>

#if defined(_WIN32)
#include <windows.h>

static size_t page_size(void)
{
    SYSTEM_INFO info;
    GetSystemInfo(&info);
    return info.dwPageSize;
}

/* `inside` bytes, a multiple of the page size, that begin a page after the result. The process ends if there are none. */
static char *guarded_pages(size_t inside)
{
    const size_t page = page_size();
    char *start = VirtualAlloc(NULL, inside + 2 * page, MEM_RESERVE, PAGE_NOACCESS);
    if (!start || (inside && !VirtualAlloc(start + page, inside, MEM_COMMIT, PAGE_READWRITE)))
        abort();
    return start;
}

static void free_pages(char *start, size_t inside)
{
    (void)inside;
    VirtualFree(start, 0, MEM_RELEASE);
}

#else
#include <sys/mman.h>
#include <unistd.h>

static size_t page_size(void) { return (size_t)sysconf(_SC_PAGESIZE); }

/* `inside` bytes, a multiple of the page size, that begin a page after the result. The process ends if there are none. */
static char *guarded_pages(size_t inside)
{
    const size_t page = page_size();
    char *start = mmap(NULL, inside + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED || (inside && mprotect(start + page, inside, PROT_READ | PROT_WRITE)))
        abort();
    return start;
}

static void free_pages(char *start, size_t inside) { munmap(start, inside + 2 * page_size()); }

#endif
#endif
