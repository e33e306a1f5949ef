// The agent: answers the host on the channel for as long as the machine runs.
#ifndef NOID_AGENT_H
#define NOID_AGENT_H

#include <stdbool.h>

struct agent_options {
    bool owns_machine;       // we run in a guest, as root: identity, cgroup and power are ours to change
    bool minimal_init;       // pid 1 is our own: it powers off on SIGTERM
    unsigned starts;         // how often an agent was started since the machine booted, this one included
    const char *no_root;     // why there is no root file system; NULL when there is one
    const char *socket_path; // listen here instead of on the guest's devices
};

_Noreturn void agent_run(const struct agent_options *options);

#endif
