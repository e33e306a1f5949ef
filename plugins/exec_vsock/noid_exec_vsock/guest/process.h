// The processes the host asked for: what the agent's loop tells those who look after them.
#ifndef NOID_PROCESS_H
#define NOID_PROCESS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// What an epoll event is about; the slot in the table is the other half of the word.
enum event_kind { EVENT_CHANNEL, EVENT_LISTENER, EVENT_STATUS, EVENT_EXIT, EVENT_STDIN, EVENT_STDOUT, EVENT_STDERR,
                  EVENT_HOOK_EXIT, EVENT_HOOK_OUTPUT };

static inline uint64_t event_word(enum event_kind kind, unsigned slot) { return (uint64_t)kind << 32 | slot; }

// `owns_machine`: we are the agent of a guest, not a guest of some host; processes get a cgroup of their own.
void processes_init(int epoll_fd, bool owns_machine);

// The host has gone, or begins anew: nobody is attached to anything, and nothing half said counts any more.
void processes_unhear(void);

void process_event(enum event_kind kind, unsigned slot, uint32_t epoll_events);

// The host's messages. Each needs room in the outbox for one answer.
void process_start_part(uint32_t id, const uint8_t *body, size_t length);
void process_start(uint32_t id, const uint8_t *body, size_t length);
void process_refuse(uint32_t id, const char *why); // answers a START that cannot be
void process_stdin(uint32_t id, const uint8_t *data, size_t length);
void process_stdin_eof(uint32_t id);
void process_credit(uint32_t id, uint8_t stream, uint32_t bytes);
void process_signal(uint32_t id, uint8_t signo);
void process_end(uint32_t id, uint32_t grace_ms);
void process_release(uint32_t id, uint32_t grace_ms);
void process_resize(uint32_t id, uint16_t columns, uint16_t rows); // 0: the serial console
void process_list(uint32_t id);
void process_attach(uint32_t id, uint64_t from, uint32_t credit);
void process_detach(uint32_t id);

// Moves one chunk towards the outbox, which must be empty. False when nothing is ready.
bool processes_serve(void);

// Reads what processes write that nobody is attached to; a little at a time, while `processes_unheard`.
void processes_serve_unheard(void);
bool processes_unheard(void);

// Queues answers that found no room before, kills what outlived its grace.
void processes_tick(void);

// True if `processes_serve` or `processes_tick` have something to do once the outbox drains.
bool processes_have_output(void);

// Milliseconds until `processes_tick` must be called, -1 for never.
int processes_timeout_ms(void);

unsigned processes_alive(void);

#endif
