// One linear buffer: frames are encoded to its end and written from its front.
#include "outbox.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "say.h"
#include "wire.h"

enum { CAPACITY = ENCODED_BYTES_MAX(BODY_BYTES_MAX) + 2 * ENCODED_BYTES_MAX(ANSWER_BYTES_MAX) };

uint32_t outbox_epoch = 0;

static uint8_t buffer[CAPACITY];
static size_t start, end;

static void make_room(size_t needed) {
    if (CAPACITY - end >= needed) return;
    memmove(buffer, buffer + start, end - start);
    end -= start;
    start = 0;
    if (CAPACITY - end >= needed) return;
    say("bug: an answer of up to %zu bytes was queued without asking for room", needed);
    abort();
}

bool outbox_has_room(void) { return CAPACITY - (end - start) >= ENCODED_BYTES_MAX(ANSWER_BYTES_MAX); }

bool outbox_is_empty(void) { return start == end; }

void outbox_answer(uint8_t type, uint32_t id, const uint8_t *body, size_t length) {
    make_room(ENCODED_BYTES_MAX(length));
    end += frame_encode(buffer + end, type, outbox_epoch, id, NULL, 0, body, length);
}

void outbox_chunk(uint8_t type, uint32_t id, uint64_t offset, const uint8_t *data, size_t length) {
    uint8_t head[8];
    struct writer writer = {.data = head, .capacity = sizeof head};
    write_u64(&writer, offset);
    make_room(ENCODED_BYTES_MAX(sizeof head + length));
    end += frame_encode(buffer + end, type, outbox_epoch, id, head, sizeof head, data, length);
}

void outbox_drop(void) { start = end = 0; }

enum outbox_result outbox_flush(int fd) {
    while (start < end) {
        ssize_t n = write(fd, buffer + start, end - start);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && errno == EAGAIN) return OUTBOX_BLOCKED;
        if (n <= 0) return OUTBOX_BROKEN;
        start += (size_t)n;
    }
    start = end = 0;
    return OUTBOX_EMPTY;
}
