// A TCP connection of the guest as a builtin: its bytes are standard input and output. PROTOCOL.md has the text.
#ifndef NOID_CONNECT_H
#define NOID_CONNECT_H

// connect HOST PORT
int connect_out(int argc, char **argv);

enum {
    CONNECT_DONE = 0,   // both directions have ended in order
    CONNECT_FAILED = 2, // the last line on standard error says why
};

#endif
