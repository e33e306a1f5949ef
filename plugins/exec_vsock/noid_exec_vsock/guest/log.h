// What a process has written, numbered from 0, as much of the latest as its ring holds. Pure memory, no I/O.
//
// Bytes of stdout and stderr are one log, in the order they were read. Which stream a byte came from is kept beside the
// ring as runs. A ring is allocated when output comes, and doubles until it has its limit or all rings together have
// what they may; from then on the oldest bytes give way.
#ifndef NOID_LOG_H
#define NOID_LOG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct log {
    uint8_t *bytes; // of `capacity`; the byte with offset n lies at n % capacity
    size_t capacity, limit;
    uint64_t start, end; // offsets of the oldest byte kept and of the next to come
    uint64_t *runs;      // first offset << 1 | is_stderr; run number n lies at n % runs_capacity
    size_t runs_capacity;
    uint64_t first_run, end_run; // numbers
    uint64_t sent, sent_run;     // where the host's reader is
};

// `all_bytes`: what all rings together may have; below 16 KiB each, nobody counts.
void logs_init(size_t all_bytes);

void log_init(struct log *log, uint32_t limit); // brought into what is allowed; 0 for the default
void log_free(struct log *log);

// Where the next bytes may be written, and how many, at most `wanted`. 0: there is no memory at all just now.
size_t log_room(struct log *log, size_t wanted, uint8_t **where);

// `n` bytes were written there. The oldest give way.
void log_append(struct log *log, bool is_stderr, size_t n);

// Sets the reader to `offset`, or to the oldest byte kept if that is later. False: there is no such byte yet.
bool log_seek(struct log *log, uint64_t offset);

static inline uint64_t log_unsent(const struct log *log) { return log->end - log->sent; }

// The next piece for the reader, of one stream, at most `limit` bytes; and past it.
size_t log_next(struct log *log, size_t limit, const uint8_t **data, bool *is_stderr);
void log_advance(struct log *log, size_t n);

#endif
