// What waits to be written to the host: answers first, then at most one chunk of process output.
//
// A chunk is only put in when nothing else waits, so an answer waits for one chunk at most, however much output there
// is. Memory is static and bounded: who has no room for its answer stops reading questions.
#ifndef NOID_OUTBOX_H
#define NOID_OUTBOX_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { ANSWER_BYTES_MAX = 12 * 1024 };

// The conversation frames belong to; 0 before the first SYNC.
extern uint32_t outbox_epoch;

// Room for one more answer of any size. Check it before doing what must be answered.
bool outbox_has_room(void);
bool outbox_is_empty(void);

// Queues an answer. The caller has seen `outbox_has_room`; an answer that does not fit is a bug and ends the agent.
void outbox_answer(uint8_t type, uint32_t id, const uint8_t *body, size_t length);

// Queues a chunk of output, as much as fits a frame. Only while the outbox is empty.
void outbox_chunk(uint8_t type, uint32_t id, uint64_t offset, const uint8_t *data, size_t length);

// Forgets everything, also the rest of a frame half sent: the receiver resynchronises.
void outbox_drop(void);

enum outbox_result { OUTBOX_EMPTY, OUTBOX_BLOCKED, OUTBOX_BROKEN };
enum outbox_result outbox_flush(int fd);

#endif
