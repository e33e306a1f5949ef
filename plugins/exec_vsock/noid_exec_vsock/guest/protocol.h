// What both ends of the guest channel agree on: message types and limits. PROTOCOL.md says what they mean.
#ifndef NOID_PROTOCOL_H
#define NOID_PROTOCOL_H

#include <stdint.h>

enum { PROTOCOL_VERSION = 2 };

// Host to guest.
enum {
    MSG_SYNC = 0x01,
    MSG_PING = 0x02,
    MSG_START = 0x03,
    MSG_START_PART = 0x04,
    MSG_STDIN = 0x05,
    MSG_STDIN_EOF = 0x06,
    MSG_CREDIT = 0x07, // also guest to host, for stdin
    MSG_SIGNAL = 0x08,
    MSG_RELEASE = 0x09,
    MSG_WAKE = 0x0a,
    MSG_POWER = 0x0b,
    MSG_END = 0x0c,
    MSG_LIST = 0x0d,
    MSG_ATTACH = 0x0e,
    MSG_RESIZE = 0x0f,
    MSG_DETACH = 0x10,
};

// Guest to host.
enum {
    MSG_HELLO = 0x81,
    MSG_PONG = 0x82,
    MSG_STARTED = 0x83,
    MSG_FAILED = 0x84,
    MSG_STDOUT = 0x85,
    MSG_STDERR = 0x86,
    MSG_EXIT = 0x87,
    MSG_STDIN_CLOSED = 0x88,
    MSG_RELEASED = 0x89,
    MSG_RECEIPT = 0x8a,
    MSG_POWERING = 0x8b,
    MSG_PROCESS = 0x8c,
    MSG_LISTED = 0x8d,
    MSG_ATTACHED = 0x8e,
    MSG_ERROR = 0x8f,
    MSG_DETACHED = 0x90,
};

enum { STREAM_STDIN = 0, STREAM_OUTPUT = 1 };
enum { START_WITH_STDIN = 1, START_TTY = 2, START_BUILTIN = 4 };
enum { PROCESS_IS_RUNNING = 1, PROCESS_HAS_TTY = 2, PROCESS_HAS_STDIN = 4, PROCESS_IS_ATTACHED = 8 };
enum { WAKE_HAS_GENERATION_DEVICE = 1 };
enum { POWER_OFF = 0, POWER_REBOOT = 1 };
enum { ITEM_DONE = 0, ITEM_FAILED = 1, ITEM_NOT_POSSIBLE = 2 };
enum { STATE_READY = 0, STATE_NO_ROOT = 1 };

enum {
    PROCESSES_MAX = 512,
    FILES_MAX = 4 * PROCESSES_MAX + 64, // the agent's own
    START_BYTES_MAX = 1 << 20,
    // What the virtio-console driver takes in one write is 32 KiB: a frame with this much, a few bytes stuffed, fits.
    // Each write costs a notification and an interrupt, which under emulation is much more than its bytes.
    STREAM_CHUNK_BYTES = 32000,
    LOG_BYTES_DEFAULT = 1 << 20,
    LOG_BYTES_MIN = 4 * 1024,
    LOG_BYTES_MAX = 16 << 20,
    LABEL_BYTES_MAX = 8 * 1024,
    GRACE_MS_MAX = 60 * 1000,
    HOOKS_MS_MAX = 10 * 60 * 1000,
};

#endif
