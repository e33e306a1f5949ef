// What the agent has to tell a person: the kernel log of a guest (and so its console), standard error elsewhere.
#ifndef NOID_SAY_H
#define NOID_SAY_H

#include <stdbool.h>

// Whether lines go to the kernel log (we are part of a guest) or to standard error.
extern bool say_to_kernel;

// One line, without a final newline, at most 400 bytes.
__attribute__((format(printf, 1, 2))) void say(const char *format, ...);

#endif
