// The builtin connect: one TCP connection from inside the guest, relayed both ways until both have ended.
//
// Whoever is connected to must never take a broken tunnel for an orderly end: it could believe that half an upload is
// all of it. So the end of what is sent is a mark in standard input, not its end, and the socket is one that is reset
// by whatever ends this process, until both directions have ended in order.
#include "connect.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

// A pipe holds all the input that the agent grants: it would have to keep, and move, what a smaller one does not take.
enum { BUFFER_BYTES = 64 * 1024, HEADER_BYTES = 4, PIPE_BYTES = 256 * 1024 };

struct buffer {
    uint8_t bytes[BUFFER_BYTES];
    size_t start, end;
};

static struct buffer to_send, to_give; // apart from what has initial values, which would put them into the program
static int connection;

// Standard input: records of a length, little-endian in 32 bits, and that many bytes. A length of 0 is the end.
static struct {
    struct buffer *held;
    uint32_t left; // of the record that is being sent
    bool open, blocked;
    int broken; // why nobody takes what is sent any more
} up = {.held = &to_send, .open = true};

static struct {
    struct buffer *held;
    uint64_t bytes;
    bool open, blocked;
} down = {.held = &to_give, .open = true};

static int fail(int error, const char *what) {
    dprintf(2, "error %d %s: %s\n", error, what, strerror(error));
    return CONNECT_FAILED;
}

// --- connecting ----------------------------------------------------------------------------------------------------

struct target {
    struct sockaddr_storage address;
    socklen_t length;
};

static bool parse_target(const char *host, uint16_t port, struct target *target) {
    memset(target, 0, sizeof *target);
    struct sockaddr_in *four = (struct sockaddr_in *)&target->address;
    struct sockaddr_in6 *six = (struct sockaddr_in6 *)&target->address;
    if (inet_pton(AF_INET, host, &four->sin_addr) == 1) {
        four->sin_family = AF_INET;
        four->sin_port = htons(port);
        target->length = sizeof *four;
    } else if (inet_pton(AF_INET6, host, &six->sin6_addr) == 1) {
        six->sin6_family = AF_INET6;
        six->sin6_port = htons(port);
        target->length = sizeof *six;
    } else {
        return false;
    }
    return true;
}

static bool reset_at_end(bool wanted) {
    struct linger linger = {.l_onoff = wanted, .l_linger = 0};
    return setsockopt(connection, SOL_SOCKET, SO_LINGER, &linger, sizeof linger) == 0;
}

// 0, or what went wrong.
static int connect_to(const struct target *target) {
    int yes = 1;
    connection = socket(target->address.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connection < 0) return errno;
    setsockopt(connection, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes); // refused: it is slower
    if (reset_at_end(true) && connect(connection, (const struct sockaddr *)&target->address, target->length) == 0 &&
        fcntl(connection, F_SETFL, O_NONBLOCK) == 0)
        return 0;
    int error = errno;
    close(connection);
    return error;
}

// "localhost" is both loopback addresses. Where neither takes the connection, the first says why.
static int connect_host(const char *host, uint16_t port) {
    struct target target;
    bool local = !strcmp(host, "localhost");
    if (!parse_target(local ? "127.0.0.1" : host, port, &target)) return EINVAL;
    int error = connect_to(&target);
    if (!error || !local) return error;
    return parse_target("::1", port, &target) && connect_to(&target) == 0 ? 0 : error;
}

// --- relaying ------------------------------------------------------------------------------------------------------

// What a call on a descriptor that does not block came to.
enum outcome { MOVED, BLOCKED, ENDED, BROKEN };

static enum outcome outcome_of(ssize_t n) {
    if (n > 0) return MOVED;
    if (n == 0) return ENDED;
    return errno == EAGAIN ? BLOCKED : errno == EINTR ? MOVED : BROKEN;
}

static enum outcome fill(int fd, struct buffer *buffer) {
    ssize_t n = read(fd, buffer->bytes + buffer->end, sizeof buffer->bytes - buffer->end);
    if (n > 0) buffer->end += (size_t)n;
    return outcome_of(n);
}

static enum outcome drain(int fd, struct buffer *buffer, size_t length, size_t *gone) {
    ssize_t n = write(fd, buffer->bytes + buffer->start, length);
    *gone = n > 0 ? (size_t)n : 0;
    buffer->start += *gone;
    return n == 0 ? BLOCKED : outcome_of(n);
}

static size_t held_bytes(const struct buffer *buffer) { return buffer->end - buffer->start; }

static void close_up(int broken) {
    up.open = up.blocked = false;
    up.broken = broken;
    close(0); // the host is told that nobody reads it any more
}

// Takes apart what is held up to the next payload. False: there is none, more has to be read.
static bool next_payload(void) {
    struct buffer *held = up.held;
    while (up.left == 0) {
        const uint8_t *at = held->bytes + held->start;
        if (held_bytes(held) < HEADER_BYTES) return false;
        up.left = at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
        held->start += HEADER_BYTES;
        if (up.left) continue;
        int error = shutdown(connection, SHUT_WR) ? errno : 0;
        close_up(error);
        return false;
    }
    return held_bytes(held) > 0;
}

static void send_held(void) {
    while (up.open && !up.blocked && next_payload()) {
        size_t length = held_bytes(up.held) < up.left ? held_bytes(up.held) : up.left, gone;
        enum outcome outcome = drain(connection, up.held, length, &gone);
        up.left -= (uint32_t)gone;
        if (outcome == BROKEN) close_up(errno);
        up.blocked = outcome == BLOCKED;
    }
}

// Moves one buffer at most, so that the other direction gets its turn. False: standard input has ended without its
// mark, and nobody knows what should have followed.
static bool pump_up(void) {
    struct buffer *held = up.held;
    send_held();
    if (!up.open || up.blocked) return true;
    memmove(held->bytes, held->bytes + held->start, held_bytes(held)); // a part of a header at most
    held->end -= held->start;
    held->start = 0;
    enum outcome outcome = fill(0, held);
    if (outcome == ENDED || outcome == BROKEN) return false;
    send_held();
    return true;
}

static enum outcome give_held(void) {
    enum outcome outcome = MOVED;
    while (held_bytes(down.held) && outcome == MOVED) {
        size_t gone;
        outcome = drain(1, down.held, held_bytes(down.held), &gone);
        down.bytes += gone;
    }
    down.blocked = outcome == BLOCKED;
    return outcome;
}

// 0, or why the connection has broken. -1: nobody takes what it says. One buffer at most, as `pump_up`.
static int pump_down(void) {
    if (!down.open) return 0;
    enum outcome outcome = give_held();
    if (outcome != MOVED) return outcome == BLOCKED ? 0 : -1;
    down.held->start = down.held->end = 0;
    outcome = fill(connection, down.held);
    if (outcome == BROKEN) return errno;
    if (outcome == ENDED) {
        down.open = false;
        dprintf(2, "end %" PRIu64 "\n", down.bytes);
        close(1);
        return 0;
    }
    return give_held() == BROKEN ? -1 : 0;
}

// Waits for what stands in the way of either direction. The connection is also watched when nothing is wanted of it:
// that it breaks has to be said when it happens. What has hung up would be reported for ever, and does not block.
static void wait_for_either(void) {
    static bool hung_up;
    short wanted = (short)((up.blocked ? POLLOUT : 0) | (down.open && !down.blocked ? POLLIN : 0));
    struct pollfd fds[3] = {
        {.fd = up.open && !up.blocked ? 0 : -1, .events = POLLIN},
        {.fd = hung_up ? -1 : connection, .events = wanted},
        {.fd = down.blocked ? 1 : -1, .events = POLLOUT},
    };
    bool at_once = hung_up && down.open && !down.blocked;
    if (poll(fds, 3, at_once ? 0 : -1) < 0) return;
    hung_up = hung_up || fds[1].revents & (POLLERR | POLLHUP);
    if (hung_up || fds[1].revents & POLLOUT) up.blocked = false;
    if (fds[2].revents) down.blocked = false;
}

static int why_broken(void) {
    int error = 0;
    socklen_t length = sizeof error;
    if (getsockopt(connection, SOL_SOCKET, SO_ERROR, &error, &length)) error = errno;
    return error;
}

static int relay(void) {
    for (;;) {
        if (!pump_up()) return CONNECT_FAILED; // the host has left; the connection is reset as this process ends
        int error = pump_down();
        if (error < 0) return CONNECT_FAILED;
        if (!error && !down.open) error = up.broken ? up.broken : why_broken();
        if (error) return fail(error, "the connection broke");
        if (!up.open && !down.open) {
            reset_at_end(false);
            return CONNECT_DONE;
        }
        wait_for_either();
    }
}

int connect_out(int argc, char **argv) {
    char *rest;
    unsigned long port = argc == 3 ? strtoul(argv[2], &rest, 10) : 0;
    if (argc != 3 || *rest || port < 1 || port > 65535) return fail(EINVAL, "connect");
    signal(SIGPIPE, SIG_IGN);
    int error = connect_host(argv[1], (uint16_t)port);
    if (error) return fail(error, argv[1]);
    for (int fd = 0; fd < 2; fd++) {
        fcntl(fd, F_SETPIPE_SZ, PIPE_BYTES); // refused: it stays at 64 KiB and is slower
        if (fcntl(fd, F_SETFL, O_NONBLOCK)) return fail(errno, "connect");
    }
    dprintf(2, "connected\n");
    return relay();
}
