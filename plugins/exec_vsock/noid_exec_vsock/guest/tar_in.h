// Reads a tar stream from standard input into a directory.
#ifndef NOID_TAR_IN_H
#define NOID_TAR_IN_H

#include <stdbool.h>
#include <stdint.h>

struct tar_in_result {
    uint64_t bytes, entries;
    bool partial; // something was left out, each with a line on standard error
    char problem[512]; // why it ended early; then false was returned
    int error;
};

// Takes *fd*. True once the archive's end was read. A file appears whole under its name or not at all.
bool tar_in(int fd, bool owners, struct tar_in_result *result);

#endif
