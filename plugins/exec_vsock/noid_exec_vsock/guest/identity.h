// Makes a woken clone its own: clock, randomness, names, network address, and what the image itself wants done.
#ifndef NOID_IDENTITY_H
#define NOID_IDENTITY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "wire.h"

// Does what a WAKE message says, all but the image's hooks, which it sets going: see hooks.h. Without `owns_machine`
// nothing is changed and every item is "not possible". False if the message is malformed; then nothing was changed.
bool identity_wake(const uint8_t *body, size_t length, bool owns_machine);

// Writes the receipt of the last `identity_wake`, once its hooks have ended.
void identity_receipt(struct writer *receipt);

// The kernel's boot id, as programs here see it; empty if there is none.
void identity_boot_id(char *text, size_t capacity);

#endif
