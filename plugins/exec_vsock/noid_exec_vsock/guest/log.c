// A byte ring that grows, and a smaller one of where the stream changes.
#include "log.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "protocol.h"

enum { RING_BYTES_FIRST = 4 * 1024, RING_BYTES_FREE = 16 * 1024, RUNS_FIRST = 16, RUN_PER_BYTES = 64 };

static size_t used, allowed; // bytes of all rings

void logs_init(size_t all_bytes) { allowed = all_bytes; }

void log_init(struct log *log, uint32_t limit) {
    if (limit == 0) limit = LOG_BYTES_DEFAULT;
    if (limit < LOG_BYTES_MIN) limit = LOG_BYTES_MIN;
    if (limit > LOG_BYTES_MAX) limit = LOG_BYTES_MAX;
    *log = (struct log){.limit = (limit + 4095u) & ~4095u};
}

void log_free(struct log *log) {
    if (log->bytes) munmap(log->bytes, log->capacity);
    free(log->runs);
    used -= log->capacity;
    log->bytes = NULL;
    log->runs = NULL;
    log->capacity = log->runs_capacity = 0;
    log->start = log->sent = log->end;
    log->first_run = log->sent_run = log->end_run;
}

static size_t least(size_t a, size_t b) { return a < b ? a : b; }

static bool grow_ring(struct log *log) {
    size_t capacity = least(log->capacity ? 2 * log->capacity : RING_BYTES_FIRST, log->limit);
    if (capacity <= log->capacity) return false;
    if (capacity > RING_BYTES_FREE && used + capacity - log->capacity > allowed) return false;
    uint8_t *bytes = mmap(NULL, capacity, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (bytes == MAP_FAILED) return false;
    for (uint64_t at = log->start; at < log->end;) {
        size_t from = at % log->capacity, to = at % capacity;
        size_t n = least(log->end - at, least(log->capacity - from, capacity - to));
        memcpy(bytes + to, log->bytes + from, n);
        at += n;
    }
    if (log->bytes) munmap(log->bytes, log->capacity);
    used += capacity - log->capacity;
    log->bytes = bytes;
    log->capacity = capacity;
    return true;
}

static bool grow_runs(struct log *log) {
    size_t most = log->limit / RUN_PER_BYTES;
    size_t capacity = least(log->runs_capacity ? 2 * log->runs_capacity : RUNS_FIRST, most);
    if (capacity <= log->runs_capacity) return false;
    uint64_t *runs = malloc(capacity * sizeof *runs);
    if (!runs) return false;
    for (uint64_t run = log->first_run; run < log->end_run; run++)
        runs[run % capacity] = log->runs[run % log->runs_capacity];
    free(log->runs);
    log->runs = runs;
    log->runs_capacity = capacity;
    return true;
}

size_t log_room(struct log *log, size_t wanted, uint8_t **where) {
    if (log->end_run - log->first_run == log->runs_capacity) grow_runs(log);
    if (log->end - log->start == log->capacity) grow_ring(log);
    if (!log->bytes || !log->runs) return 0;
    size_t at = log->end % log->capacity;
    size_t kept = log->end - log->start;
    *where = log->bytes + at;
    // Until the ring has its size, what is free is used up first: then it grows, and nothing gives way.
    size_t room = kept < log->capacity ? least(log->capacity - at, log->capacity - kept) : log->capacity - at;
    return least(room, wanted);
}

static uint64_t run_start(const struct log *log, uint64_t run) { return log->runs[run % log->runs_capacity] >> 1; }

static void drop_before(struct log *log, uint64_t start) {
    log->start = start;
    while (log->first_run + 1 < log->end_run && run_start(log, log->first_run + 1) <= start) log->first_run++;
    if (log->sent_run < log->first_run) log->sent_run = log->first_run;
    if (log->sent < start) log->sent = start;
}

void log_append(struct log *log, bool is_stderr, size_t n) {
    bool goes_on = log->end_run > log->first_run &&
                   (bool)(log->runs[(log->end_run - 1) % log->runs_capacity] & 1) == is_stderr;
    if (!goes_on) {
        if (log->end_run - log->first_run == log->runs_capacity) drop_before(log, run_start(log, log->first_run + 1));
        log->runs[log->end_run++ % log->runs_capacity] = log->end << 1 | is_stderr;
    }
    log->end += n;
    if (log->end - log->start > log->capacity) drop_before(log, log->end - log->capacity);
}

bool log_seek(struct log *log, uint64_t offset) {
    if (offset > log->end) return false;
    log->sent = offset > log->start ? offset : log->start;
    log->sent_run = log->first_run;
    return true;
}

size_t log_next(struct log *log, size_t limit, const uint8_t **data, bool *is_stderr) {
    if (log->sent == log->end) return 0;
    while (log->sent_run + 1 < log->end_run && run_start(log, log->sent_run + 1) <= log->sent) log->sent_run++;
    uint64_t run_end = log->sent_run + 1 < log->end_run ? run_start(log, log->sent_run + 1) : log->end;
    size_t at = log->sent % log->capacity;
    *data = log->bytes + at;
    *is_stderr = log->runs[log->sent_run % log->runs_capacity] & 1;
    return least(limit, least(run_end - log->sent, log->capacity - at));
}

void log_advance(struct log *log, size_t n) { log->sent += n; }
