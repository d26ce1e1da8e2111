/* Report a page of a mapped file that cannot be read (an in-page error) in one line, instead of crashing. */
#if defined(_WIN32)
#include <string.h>

#include "lowmem.h"
#include "system.h"

static struct {
    char line[4096];
    size_t length;
    int exit_code, has_console;
    DWORD mode; /* the console's original one; a line editor may have switched the echo off since */
    void *handler;
} report;

static LONG CALLBACK report_and_exit(EXCEPTION_POINTERS *about)
{
    if (about->ExceptionRecord->ExceptionCode != (DWORD)EXCEPTION_IN_PAGE_ERROR)
        return EXCEPTION_CONTINUE_SEARCH;
    if (report.has_console)
        SetConsoleMode(GetStdHandle(STD_INPUT_HANDLE), report.mode);
    DWORD written;
    WriteFile(GetStdHandle(STD_ERROR_HANDLE), report.line, (DWORD)report.length, &written, NULL);
    TerminateProcess(GetCurrentProcess(), (UINT)report.exit_code);
    return EXCEPTION_CONTINUE_SEARCH;
}

int lm_tell_bus_errors(const char *line, int exit_code)
{
    if (report.handler)
        RemoveVectoredExceptionHandler(report.handler);
    report.handler = NULL;
    if (!line)
        return 0;
    report.length = strnlen(line, sizeof report.line);
    memcpy(report.line, line, report.length);
    report.exit_code = exit_code;
    report.has_console = GetConsoleMode(GetStdHandle(STD_INPUT_HANDLE), &report.mode) != 0;
    report.handler = AddVectoredExceptionHandler(1, report_and_exit);
    return report.handler ? 0 : -1;
}

#endif
