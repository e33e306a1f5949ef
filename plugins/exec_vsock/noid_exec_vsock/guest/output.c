// Output: from the pipes into the log, from the log to the host, and whose turn it is.
//
// Whose output goes next is decided as in fq_codel (RFC 8290): a process that was quiet and has something to say goes
// into the list of fresh ones, which is served first; having been served once it joins the steady ones, which take
// turns. So one byte of an answer never waits for more than a chunk of each other process that woke before it.
//
// While a host is attached a pipe is only read to send, so nothing unsent is ever overwritten and whoever does not
// give credit stops its process. Processes nobody is attached to are in a third list, which needs no host: they are
// read so that they never block, and the oldest bytes give way.
#include <errno.h>
#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "outbox.h"
#include "table.h"

enum {
    BUSY_READ_BYTES = 16 * 1024,
    BUSY_PIPE_BYTES = 256 * 1024,
    TERMINAL_BYTES_MAX = 128 * 1024, // more than a terminal can hold back
    UNHEARD_SERVINGS = 16,
};

struct list {
    int head, tail;
};
static struct list fresh = {-1, -1}, steady = {-1, -1}, unheard = {-1, -1};
static bool starved; // somebody was not read because there was no memory for its log
static int64_t retry_at_ms;

static void enqueue(struct list *list, struct process *process) {
    int slot = (int)(process - table);
    process->queue = QUEUE_WAITING;
    process->next = -1;
    if (list->tail >= 0) table[list->tail].next = slot;
    else list->head = slot;
    list->tail = slot;
}

static struct process *dequeue(struct list *list) {
    if (list->head < 0) return NULL;
    struct process *process = &table[list->head];
    list->head = process->next;
    if (list->head < 0) list->tail = -1;
    process->queue = QUEUE_IDLE;
    return process;
}

void output_ready(struct process *process) {
    if (process->queue == QUEUE_WAITING) return; // in whichever list: who takes it out looks
    enqueue(process->attached ? &fresh : &unheard, process);
}

void on_output_event(struct process *process, unsigned which, uint32_t events) {
    struct source *source = &process->output[which];
    if (source->fd < 0) return;
    if (!process->output[!which].ready) process->turn = which; // the first to have something is read first
    source->ready = true;
    source->hung_up = source->hung_up || events & (EPOLLHUP | EPOLLERR);
    output_ready(process);
}

static bool may_read(const struct process *process, const struct source *source) {
    return source->fd >= 0 && source->ready && (source->left == 0 || !process->attached || process->credit > 0);
}

static struct source *next_source(struct process *process) {
    for (unsigned i = 0; i < 2; i++) {
        unsigned which = (process->turn + i) % 2;
        if (!may_read(process, &process->output[which])) continue;
        process->turn = which + 1;
        return &process->output[which];
    }
    return NULL;
}

static void source_over(struct process *process, struct source *source) {
    close_fd(&source->fd);
    source->ready = false;
    source->left = 0;
    settle(process);
}

// A pipe whose writer fills it faster than we come round becomes larger: fewer and longer turns for both.
static void enlarge(struct source *source) {
    source->enlarged = true;
    if (fcntl(source->fd, F_SETPIPE_SZ, BUSY_PIPE_BYTES) < 0) errno = 0; // no pipe, or too many large ones: fine too
}

// Reads one piece of what the process wrote into its log, or out of the way. False if there is no memory for it.
static bool read_source(struct process *process, struct source *source) {
    static uint8_t unwanted[STREAM_CHUNK_BYTES];
    uint8_t *where = unwanted;
    size_t limit = STREAM_CHUNK_BYTES;
    bool wanted = source->left > 0;
    if (wanted) {
        if (limit > source->left) limit = source->left;
        if (process->attached && limit > process->credit) limit = process->credit;
        limit = log_room(&process->log, limit, &where);
        if (limit == 0) return false;
    }
    ssize_t n = read(source->fd, where, limit);
    if (n < 0 && errno == EINTR) return true;
    if (n < 0 && errno == EAGAIN) {
        source->ready = false;
        if (process->state == PROCESS_ENDED && wanted) { // a terminal's: a pipe's rest is counted
            source->left = 0;
            settle(process);
        }
        return true;
    }
    if (n < 0 && process->tty && process->state != PROCESS_ENDED) {
        // EIO: nobody has the terminal open just now. It may be opened again, and closing our end would end its
        // session with a HUP: a program that closes its files before it exits would seem to have been killed.
        source->ready = false;
        return true;
    }
    if (n <= 0) {
        source_over(process, source);
        return true;
    }
    if ((size_t)n < limit && !source->hung_up && !process->tty) source->ready = false; // pipe(7): it is empty
    if (!wanted) return true;
    log_append(&process->log, source == &process->output[1], (size_t)n);
    if ((size_t)n == limit && n >= BUSY_READ_BYTES && !source->enlarged) enlarge(source);
    if (process->state == PROCESS_ENDED) {
        source->left -= (size_t)n;
        if (source->left == 0) settle(process);
    }
    return true;
}

static bool try_reading(struct process *process, struct source *source) {
    if (read_source(process, source)) return true;
    if (!starved) retry_at_ms = now_ms() + OUTPUT_RETRY_MS;
    starved = true;
    return false;
}

static void send_piece(struct process *process) {
    const uint8_t *data;
    bool is_stderr;
    size_t limit = process->credit < STREAM_CHUNK_BYTES ? process->credit : STREAM_CHUNK_BYTES;
    size_t n = limit ? log_next(&process->log, limit, &data, &is_stderr) : 0;
    if (n == 0) return;
    outbox_chunk(is_stderr ? MSG_STDERR : MSG_STDOUT, process->id, process->log.sent, data, n);
    log_advance(&process->log, n);
    process->credit -= n;
    if (process->state == PROCESS_ENDED) settle(process);
}

bool processes_serve(void) {
    struct process *process = dequeue(&fresh);
    if (!process) process = dequeue(&steady);
    if (!process) return false;
    if (process->state == PROCESS_FREE) return true;
    if (!process->attached) {
        enqueue(&unheard, process);
        return true;
    }
    if (log_unsent(&process->log) == 0) {
        struct source *source = next_source(process);
        if (!source) {
            bool ready = process->output[0].ready || process->output[1].ready;
            process->queue = ready ? QUEUE_STALLED : QUEUE_IDLE;
            return true;
        }
        if (!try_reading(process, source)) return true;
    }
    if (log_unsent(&process->log) > 0 && process->credit == 0) {
        process->queue = QUEUE_STALLED;
        return true;
    }
    send_piece(process);
    if (process->state != PROCESS_FREE && process->queue == QUEUE_IDLE)
        enqueue(&steady, process); // there may be more; if not, its next turn says so
    return true;
}

void processes_serve_unheard(void) {
    for (int i = 0; i < UNHEARD_SERVINGS; i++) {
        struct process *process = dequeue(&unheard);
        if (!process) return;
        if (process->state == PROCESS_FREE) continue;
        if (process->attached) {
            enqueue(&fresh, process);
            continue;
        }
        struct source *source = next_source(process);
        if (source && try_reading(process, source) && process->state != PROCESS_FREE &&
            process->queue == QUEUE_IDLE)
            enqueue(&unheard, process);
    }
}

bool processes_unheard(void) { return unheard.head >= 0; }

bool processes_have_output(void) { return fresh.head >= 0 || steady.head >= 0 || answers_waiting; }

bool output_starved(void) { return starved; }

void output_retry(void) {
    if (!starved || now_ms() < retry_at_ms) return;
    starved = false;
    for (unsigned i = 0; i < high_water; i++)
        if (table[i].state != PROCESS_FREE) output_ready(&table[i]);
}

void output_ends(struct process *process) {
    for (int which = 0; which < 2; which++) {
        struct source *source = &process->output[which];
        if (source->fd < 0) continue;
        source->ready = true; // for its end, at least
        if (source->left == 0) continue;
        // What the process itself wrote is in the pipe now. What comes later is from children it left behind. What a
        // terminal still holds the kernel does not count: it is read until there is no more.
        int unread = 0;
        if (ioctl(source->fd, FIONREAD, &unread)) unread = 0;
        source->left = process->tty ? TERMINAL_BYTES_MAX : (uint64_t)unread;
    }
    output_ready(process);
}

void output_drop(struct process *process) {
    process->output[0].left = process->output[1].left = 0;
    log_free(&process->log);
    if (process->output[0].fd >= 0 || process->output[1].fd >= 0) output_ready(process);
}

void process_credit(uint32_t id, uint8_t stream, uint32_t bytes) {
    struct process *process = find(id);
    if (!process || !process->attached) return; // crossed with its end
    if (stream != STREAM_OUTPUT) {
        answer_error(id, "credit for a stream that has none");
        return;
    }
    process->credit += bytes;
    if (process->queue != QUEUE_STALLED) return;
    enqueue(&steady, process);
}
