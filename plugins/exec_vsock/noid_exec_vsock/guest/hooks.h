// What the image wants done after a wake: its own programs, and new SSH host keys. One at a time, all of it bounded.
#ifndef NOID_HOOKS_H
#define NOID_HOOKS_H

#include <stdbool.h>
#include <stdint.h>

#include "wire.h"

struct hooks_request {
    const char *reason; // create, restore, clone, boot: NOID_REASON
    const char *vm;     // NOID_VM
    uint64_t generation;
    bool other;        // another machine than before: its host keys are somebody else's
    uint32_t limit_ms; // for all of them together; 0: none is run
};

// Where processes' events are waited for. Once.
void hooks_init(int epoll_fd);

// Begins with the first one. Where an image has none this is two failing look-ups, and no fork. Only after the one
// before has ended.
void hooks_begin(const struct hooks_request *request);

// True from `hooks_begin` until the last one has ended or was given up.
bool hooks_running(void);

// Output or the end of the one that runs.
void hooks_event(bool output);

// Ends what is over its time. Milliseconds until it must be called: -1 for never.
void hooks_tick(void);
int hooks_timeout_ms(void);

// Writes an item of the receipt for each, with how it ended and the end of what it said. Returns how many.
unsigned hooks_report(struct writer *receipt);

#endif
