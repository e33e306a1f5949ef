// Turns a START message into a running child.
#ifndef NOID_START_H
#define NOID_START_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/resource.h>
#include <sys/types.h>

#include "users.h"
#include "wire.h"

struct start_request {
    uint32_t flags;
    uint32_t credit;
    uint32_t log_bytes;
    uint16_t columns, rows;
    struct text label; // inside the message
    char user[64];
    char cwd[4096];
    uint32_t argument_count;
    struct reader arguments; // `argument_count` texts, checked
    uint32_t environment_count;
    struct reader environment; // `environment_count` texts, checked
    size_t text_bytes;         // of all of them
};

// Parses and checks. False if the message is malformed.
bool start_parse(const uint8_t *body, size_t length, struct start_request *request);

// What the child reports through the status pipe when it cannot become what was asked for. Nothing: it did.
struct start_failure {
    int32_t reason; // FAILED_...
    int32_t error;
};

enum { FAILED_INVALID = 1, FAILED_RESOURCES = 2, FAILED_NO_ROOT = 3, FAILED_NO_PROCESS = 4 };

// The limit of open files children get; the agent's own is higher.
extern struct rlimit start_file_limit;

// The cgroup of the processes that were asked for; hooks have one each.
extern const char start_cgroup[];

// As fork(), for a child that calls `start_apart` with the same arguments. The agent has one thread: nothing of the C
// library has to be told.
pid_t start_fork(bool owns_machine, const char *cgroup);

// In any such child: leaves the agent's session, signals, limits, precedence and, in a guest, its cgroup for `cgroup`,
// a directory below /sys/fs/cgroup.
void start_apart(bool owns_machine, const char *cgroup);

// In the child, after fork: becomes the program. A program that is missing or may not run ends the child as a shell
// would, with 127 or 126 and a line on standard error. Pipes are already at 0, 1 and 2.
_Noreturn void start_child(const struct start_request *request, const struct user *user, bool owns_machine,
                           int status_fd);

#endif
