// Files into and out of the guest: two builtins that run as the user whose files they are. PROTOCOL.md has the text.
#ifndef NOID_TRANSFER_H
#define NOID_TRANSFER_H

// copy-out look|sum|file|tar PATH [OFFSET LENGTH]
int copy_out(int argc, char **argv);

// copy-in file PATH OFFSET SIZE MODE MTIME_NS SHA256, copy-in tar DIRECTORY FLAGS
int copy_in(int argc, char **argv);

enum {
    TRANSFER_DONE = 0,
    TRANSFER_PARTIAL = 1, // some things were left out, each with a message
    TRANSFER_FAILED = 2,  // the last line on standard output says why
};

#endif
