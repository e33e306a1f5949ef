// Writes one line to the kernel log, or to standard error where there is none to write to.
#include "say.h"

#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <unistd.h>

bool say_to_kernel = false;

void say(const char *format, ...) {
    char line[420];
    va_list arguments;
    va_start(arguments, format);
    int head = snprintf(line, sizeof line, "<3>noid: "); // an error: what `quiet` lets through to the console
    int body = vsnprintf(line + head, sizeof line - (size_t)head - 1, format, arguments);
    va_end(arguments);
    if (body < 0) return;
    size_t length = (size_t)head + (size_t)body;
    if (length > sizeof line - 2) length = sizeof line - 2;
    line[length++] = '\n';
    int fd = say_to_kernel ? open("/dev/kmsg", O_WRONLY | O_CLOEXEC) : -1;
    ssize_t written = fd >= 0 ? write(fd, line, length) : write(STDERR_FILENO, line + 3, length - 3);
    (void)written;  // there is nobody left to tell
    if (fd >= 0) close(fd);
}
