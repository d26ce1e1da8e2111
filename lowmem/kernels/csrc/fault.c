/* Report a page of a mapped file that cannot be read (SIGBUS) in one line, instead of crashing; fault_windows.c has the
 * same for Windows. */
#if !defined(_WIN32)
#define _POSIX_C_SOURCE 200809L /* sigaction */
#include <signal.h>
#include <string.h>
#include <termios.h>
#include <unistd.h>

#include "lowmem.h"

static struct {
    char line[4096];
    size_t length;
    int exit_code, has_terminal;
    struct termios terminal; /* its original state; a line editor may have switched the echo off since */
    struct sigaction before;
} report;

/* Uses only functions that POSIX allows in a signal handler. */
static void report_and_exit(int number, siginfo_t *about, void *context)
{
    (void)context;
    if (about->si_code <= 0) { /* sent by a process: the default action follows when the handler returns */
        signal(number, SIG_DFL);
        raise(number);
        return;
    }
    if (report.has_terminal) {
        signal(SIGTTOU, SIG_IGN);
        tcsetattr(STDIN_FILENO, TCSANOW, &report.terminal);
    }
    for (size_t done = 0; done < report.length;) {
        const ssize_t written = write(STDERR_FILENO, report.line + done, report.length - done);
        if (written <= 0)
            break;
        done += (size_t)written;
    }
    _exit(report.exit_code);
}

int lm_tell_bus_errors(const char *line, int exit_code)
{
    if (!line)
        return sigaction(SIGBUS, &report.before, NULL);
    report.length = strnlen(line, sizeof report.line);
    memcpy(report.line, line, report.length);
    report.exit_code = exit_code;
    report.has_terminal = tcgetattr(STDIN_FILENO, &report.terminal) == 0;
    struct sigaction action = {.sa_sigaction = report_and_exit, .sa_flags = SA_SIGINFO};
    sigemptyset(&action.sa_mask);
    return sigaction(SIGBUS, &action, &report.before);
}

#endif
