// A root of two disks: an image that is only read, and over it a file system with what was written since.
#ifndef NOID_LAYERS_H
#define NOID_LAYERS_H

#include <stddef.h>

// Where the two are to be mounted, made if need be. Both stay there, in the initramfs, where nothing of the guest is.
const char *layers_base(void);
const char *layers_top(void);

// Options for mounting what is written, on `device`: what is deleted goes back to the host, if that can take it, and
// nothing is written only because it was never written.
const char *layers_top_options(const char *device);

// Mounts both as one at `target`. On failure says why in `reason` and returns -1.
int layers_mount(const char *target, unsigned long flags, char *reason, size_t capacity);

#endif
