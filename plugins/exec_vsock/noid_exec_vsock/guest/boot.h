// The first program of a guest: from the initramfs to the image's own init, leaving the agent running beside it.
#ifndef NOID_BOOT_H
#define NOID_BOOT_H

#include <stdbool.h>

// Runs as pid 1 of an initramfs. Does not return.
_Noreturn void boot(void);

// Becomes the init of an image that has none: reaps, keeps the agent, if it is to start one, and a shell on ttyS0,
// powers off on the button. No return.
_Noreturn void minimal_init(bool with_agent);

// Loads what is needed to reach the root and the host. A module that is missing or built in is no error.
void load_modules(void);

// The value of `key=` on the kernel command line in `value`, or `fallback`. The last one wins.
void kernel_argument(const char *key, char *value, int capacity, const char *fallback);
int kernel_flag(const char *word);

#endif
