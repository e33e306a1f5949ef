// Keeps an agent running: whoever is its parent starts it again when it has died. What it knew of processes is lost.
#ifndef NOID_KEEPER_H
#define NOID_KEEPER_H

#include <sys/types.h>

// Starts an agent with those options, NULL for none, in a session of its own. Returns its pid, or -1 having said why.
// From the second one on HELLO says how many there were.
pid_t keeper_start(char *const options[]);

// The child with this pid has ended: if it was the agent, another follows in a moment.
void keeper_reaped(pid_t pid);

// Milliseconds until `keeper_tick` must be called, because the next agent is to be started; or -1.
int keeper_timeout_ms(void);
void keeper_tick(void);

// Starts an agent and keeps it, reaping whatever else ends. As pid 1, or as a process of its own.
_Noreturn void keeper_run(char *const options[]);

// Becomes a small process that only does that, under a name that systemd leaves alone at shutdown.
_Noreturn void keeper_become(void);

#endif
