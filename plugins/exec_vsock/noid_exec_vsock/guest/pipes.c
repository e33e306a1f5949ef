// Standard input and output of a transfer: exact amounts, and files moved without copying them through this process.
#include "pipes.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { PIPE_BYTES = 1 << 20, SMALL_FILE = 16 * 1024 };

static uint8_t buffer[64 * 1024];
static size_t held;

static uint8_t copying[64 * 1024];
static volatile sig_atomic_t ended;

static void note_end(int signo) {
    (void)signo;
    ended = 1;
}

void pipes_prepare(void) {
    fcntl(0, F_SETPIPE_SZ, PIPE_BYTES); // refused: it stays at 64 KiB and is slower
    fcntl(1, F_SETPIPE_SZ, PIPE_BYTES);
    struct sigaction action = {.sa_handler = note_end}; // no SA_RESTART: what waits shall return
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGHUP, &action, NULL);
    signal(SIGPIPE, SIG_IGN);
}

static bool interrupted(void) {
    if (errno != EINTR) return false;
    if (!ended) return true;
    errno = ECANCELED;
    return false;
}

bool take(void *into, size_t length) {
    for (uint8_t *at = into; length;) {
        if (ended) return errno = ECANCELED, false;
        ssize_t got = read(0, at, length);
        if (got > 0) at += got, length -= (size_t)got;
        else if (got == 0) return errno = ENODATA, false;
        else if (!interrupted()) return false;
    }
    return true;
}

bool drop(uint64_t length) {
    while (length) {
        size_t piece = length < sizeof copying ? (size_t)length : sizeof copying;
        if (!take(copying, piece)) return false;
        length -= piece;
    }
    return true;
}

bool take_nothing_more(void) {
    for (;;) {
        if (ended) return errno = ECANCELED, false;
        ssize_t got = read(0, copying, sizeof copying);
        if (got == 0) return true;
        if (got < 0 && !interrupted()) return false;
    }
}

static bool write_all(int fd, const uint8_t *data, size_t length) {
    while (length) {
        ssize_t sent = write(fd, data, length);
        if (sent >= 0) data += sent, length -= (size_t)sent;
        else if (!interrupted()) return false;
    }
    return true;
}

bool give_now(void) {
    size_t length = held;
    held = 0;
    return write_all(1, buffer, length);
}

bool give(const void *data, size_t length) {
    if (length > sizeof buffer - held && !give_now()) return false;
    if (length > sizeof buffer) return write_all(1, data, length);
    memcpy(buffer + held, data, length);
    held += length;
    return true;
}

bool give_line(const char *format, ...) {
    char line[1024];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line - 1, format, arguments);
    va_end(arguments);
    if (length < 0) return false;
    if ((size_t)length > sizeof line - 2) length = sizeof line - 2;
    for (int i = 0; i < length; i++)
        if (line[i] == '\n') line[i] = '?'; // a name may hold one, a line may not
    line[length++] = '\n';
    return give(line, (size_t)length) && give_now();
}

// Without splice, where a file system has none.
static ssize_t copy_piece(int from, int to, size_t length, bool *to_failed) {
    ssize_t got = read(from, copying, length < sizeof copying ? length : sizeof copying);
    *to_failed = got > 0 && !write_all(to, copying, (size_t)got);
    return *to_failed ? -1 : got;
}

bool take_file(int fd, uint64_t length, uint64_t *moved, bool *to_file) {
    bool can_splice = length > SMALL_FILE;
    *to_file = false;
    while (length) {
        if (ended) return errno = ECANCELED, false;
        size_t piece = length < PIPE_BYTES ? (size_t)length : PIPE_BYTES;
        ssize_t got = can_splice ? splice(0, NULL, fd, NULL, piece, 0) : copy_piece(0, fd, piece, to_file);
        if (got > 0) {
            length -= (uint64_t)got;
            *moved += (uint64_t)got;
        } else if (got == 0) {
            return errno = ENODATA, false;
        } else if (can_splice && errno == EINVAL) {
            can_splice = false;
        } else if (!interrupted()) {
            *to_file = *to_file || (can_splice && errno != ECANCELED);
            return false;
        }
    }
    return true;
}

bool give_file(int fd, uint64_t length, uint64_t *moved, int *trouble) {
    *moved = 0;
    *trouble = 0;
    bool can_splice = length > SMALL_FILE;
    if (can_splice && !give_now()) return false;
    while (*moved < length) {
        if (ended) return errno = ECANCELED, false;
        uint64_t left = length - *moved;
        size_t piece = left < PIPE_BYTES ? (size_t)left : PIPE_BYTES;
        ssize_t got;
        if (can_splice) {
            got = splice(fd, NULL, 1, NULL, piece, 0);
        } else {
            got = read(fd, copying, piece < sizeof copying ? piece : sizeof copying);
            if (got > 0 && !give(copying, (size_t)got)) return false;
        }
        if (got > 0) {
            *moved += (uint64_t)got;
        } else if (got == 0) {
            return true;
        } else if (can_splice && errno == EINVAL) {
            can_splice = false;
        } else if (can_splice && errno == EPIPE) {
            return false;
        } else if (!interrupted()) {
            if (ended) return false;
            *trouble = errno;
            return true;
        }
    }
    return true;
}
