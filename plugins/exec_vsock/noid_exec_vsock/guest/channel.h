// The byte stream to the host: a virtio-serial port, a vsock listener, or (natively, for tests) a unix listener.
#ifndef NOID_CHANNEL_H
#define NOID_CHANNEL_H

#include <stdbool.h>

struct channel {
    int listener; // -1 for a port, which is always open
    int fd;       // -1 while nobody is connected to a listener
};

// Waits until the host has given us a port named `agent.0` or a vsock. Does not return before.
void channel_open_guest(struct channel *channel);

// Listens at `path`, which must not exist. False, having said why, if that fails.
bool channel_open_socket(struct channel *channel, const char *path);

// Takes a new connection, if there is one, in place of the old one. True if there was.
bool channel_accept(struct channel *channel);

// Ends the connection of a listener. A port stays open: the host's end may come back any time.
void channel_hang_up(struct channel *channel);

#endif
