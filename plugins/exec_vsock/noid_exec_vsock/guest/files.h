// Small files of the guest's identity: read, replaced, or changed in place.
#ifndef NOID_FILES_H
#define NOID_FILES_H

#include <stddef.h>
#include <sys/types.h>

// Reads the first line; empty if there is none.
void read_line(const char *path, char *line, size_t capacity);

// Replaces a file so that a reader sees the old or the new one. In place where rename cannot: over a bind mount. 0, or
// -1 and errno.
int replace_file(const char *path, mode_t mode, const char *data, size_t length);

// Makes the content of an existing file `data`, without a new inode: what costs a clone most is what it does for the
// first time, and creating, renaming and unlinking are long ways through a file system. In every state between the file
// holds the old lines, or the new ones and empty ones. Falls back to `replace_file`, for links too. 0, or -1 and errno.
int update_file(const char *path, mode_t mode, const char *data, size_t length);

#endif
