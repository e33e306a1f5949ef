// A process' standard input: the host sends what it has credit for, and what the pipe does not take is held.
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "outbox.h"
#include "table.h"
#include "terminal.h"
#include "wire.h"

// Windows come out of one budget, so that many processes that do not read cannot make the agent large. A single one is
// as wide as what the host sends while it waits for its turn: with 64 KiB a file came in a quarter slower.
enum { STDIN_BUDGET = 1024 * 1024, STDIN_WINDOW_MAX = 256 * 1024, STDIN_WINDOW_MIN = 4 * 1024, EOF_KEYS_MAX = 2 };

static uint32_t granted;

static uint32_t window_for_one_more(void) {
    uint32_t left = granted < STDIN_BUDGET ? STDIN_BUDGET - granted : 0;
    uint32_t window = left / 4;
    return window > STDIN_WINDOW_MAX ? STDIN_WINDOW_MAX : window < STDIN_WINDOW_MIN ? STDIN_WINDOW_MIN : window;
}

void stdin_open(struct process *process, int fd) {
    process->stdin_fd = fd;
    if (fd < 0) return;
    process->stdin_window = process->stdin_owed = window_for_one_more();
    granted += process->stdin_window;
}

// Another host: it has been granted nothing, and what is held is not its own.
void stdin_attach(struct process *process) {
    process->stdin_credit = 0;
    process->stdin_owed = process->stdin_window - (process->held_end - process->held_start);
}

static void drop_held(struct process *process) {
    free(process->held);
    process->held = NULL;
    process->held_start = process->held_end = 0;
}

void stdin_close(struct process *process) {
    // A terminal's end of it is a second number for the file output comes from: closing alone would not leave epoll.
    if (process->tty && process->stdin_fd >= 0) epoll_ctl(epoll_fd, EPOLL_CTL_DEL, process->stdin_fd, NULL);
    close_fd(&process->stdin_fd);
    drop_held(process);
    granted -= process->stdin_window;
    process->stdin_window = process->stdin_owed = 0;
}

static void break_stdin(struct process *process) {
    stdin_close(process);
    if (process->attached) process->stdin_broken = answers_waiting = true;
}

// Writes what it can. Returns the number of bytes, or -1 when the process has closed its stdin.
static ssize_t write_some(int fd, const uint8_t *data, size_t length) {
    for (;;) {
        ssize_t n = write(fd, data, length);
        if (n >= 0) return n;
        if (errno == EAGAIN) return 0;
        if (errno != EINTR) return -1;
    }
}

bool stdin_credit_due(const struct process *process) {
    return process->stdin_fd >= 0 && process->attached && !process->start_owed && !process->stdin_eof &&
           process->stdin_owed > 0 && process->stdin_owed >= process->stdin_window / 2;
}

void stdin_grant(struct process *process) {
    uint8_t body[5];
    struct writer writer = {.data = body, .capacity = sizeof body};
    write_u8(&writer, STREAM_STDIN);
    write_u32(&writer, process->stdin_owed);
    process->stdin_credit += process->stdin_owed;
    process->stdin_owed = 0;
    outbox_answer(MSG_CREDIT, process->id, body, writer.length);
}

static void written(struct process *process, size_t length) {
    process->stdin_owed += (uint32_t)length;
    if (process->stdin_owed > process->stdin_window) process->stdin_owed = process->stdin_window; // keys for the end
    if (stdin_credit_due(process)) answers_waiting = true;
}

static void flush_held(struct process *process) {
    if (process->stdin_fd < 0) return;
    while (process->held_start < process->held_end) {
        ssize_t n = write_some(process->stdin_fd, process->held + process->held_start,
                               process->held_end - process->held_start);
        if (n < 0) {
            break_stdin(process);
            return;
        }
        if (n == 0) return;
        process->held_start += (uint32_t)n;
        written(process, (size_t)n);
    }
    drop_held(process);
    if (process->stdin_eof) stdin_close(process);
}

void on_stdin_event(struct process *process, uint32_t events) {
    if (events & EPOLLERR && process->stdin_fd >= 0) break_stdin(process); // nobody can read it any more
    flush_held(process);
    settle(process);
}

// Credit is returned only for what has left `held`, so what comes always fits once the front is cut off.
static void hold(struct process *process, const uint8_t *data, size_t length) {
    if (!process->held) process->held = malloc(process->stdin_window + EOF_KEYS_MAX);
    if (!process->held) {
        answer_error(process->id, "no memory for stdin; it was closed");
        break_stdin(process);
        return;
    }
    memmove(process->held, process->held + process->held_start, process->held_end - process->held_start);
    process->held_end -= process->held_start;
    process->held_start = 0;
    memcpy(process->held + process->held_end, data, length);
    process->held_end += (uint32_t)length;
}

void process_stdin(uint32_t id, const uint8_t *data, size_t length) {
    struct process *process = find(id);
    if (!process || process->stdin_fd < 0 || process->stdin_eof || length == 0) return; // crossed with its end
    if (length > process->stdin_credit) {
        answer_error(id, "more stdin than was granted; it was dropped");
        return;
    }
    process->stdin_credit -= (uint32_t)length;
    process->stdin_taken += length;
    process->typed_last = data[length - 1];
    if (!process->held) {
        ssize_t n = write_some(process->stdin_fd, data, length);
        if (n < 0) {
            break_stdin(process);
            return;
        }
        written(process, (size_t)n);
        data += n;
        length -= (size_t)n;
    }
    if (length) hold(process, data, length);
}

void process_stdin_eof(uint32_t id) {
    struct process *process = find(id);
    if (!process || process->stdin_fd < 0 || process->stdin_eof) return;
    process->stdin_eof = true;
    if (process->tty) {
        uint8_t keys[EOF_KEYS_MAX];
        size_t n = terminal_eof(process->stdin_fd, process->typed_last, keys);
        if (n) hold(process, keys, n);
    }
    flush_held(process);
}
