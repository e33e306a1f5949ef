// Writes a directory, or one file, as a tar stream to standard output.
#ifndef NOID_TAR_OUT_H
#define NOID_TAR_OUT_H

#include <stdbool.h>

// What *fd* is open on, called *name* in the archive: "./" for a directory whose contents are meant. Takes the
// descriptor. What cannot be read, and what is no file, directory or symlink, is left out with a comment in the stream
// and sets *partial*. False when the output is gone.
bool tar_out(int fd, const char *name, bool *partial);

#endif
