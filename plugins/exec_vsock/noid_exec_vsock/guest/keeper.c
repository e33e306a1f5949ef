// The agent's parent: pid 1 where that is ours, else a process of its own beside the image's init.
#include "keeper.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "say.h"

// The host learns from its VMM that the agent has closed its end of the port. QEMU says so once a second at most, and
// the latest only: were the port opened again within that second, nobody would hear that the conversation is over.
enum { OPTIONS_MAX = 4, PAUSE_MS = 1500 };

static char *const *agent_options;
static unsigned starts;
static pid_t agent = -1;
static long long due_ms; // when to start the next one, 0 for never

static long long now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000LL + now.tv_nsec / 1000000;
}

// systemd leaves processes alone at shutdown whose argv[0] begins with '@' (systemd.io/ROOT_STORAGE_DAEMONS).
static char agent_name[] = "@noid-agent";

static _Noreturn void become(char *const argv[]) {
    int null = open("/dev/null", O_RDWR);
    for (int fd = 0; null >= 0 && fd < 3; fd++) dup2(null, fd);
    if (null > 2) close(null);
    execv("/proc/self/exe", argv);
    say("the agent cannot be started: %s; this guest can only be reached by its console", strerror(errno));
    _exit(1);
}

pid_t keeper_start(char *const options[]) {
    static char number[16];
    char *argv[4 + OPTIONS_MAX + 1] = {agent_name, "--agent", "--starts", number};
    agent_options = options;
    for (int i = 0; options && options[i] && i < OPTIONS_MAX; i++) argv[4 + i] = options[i];
    snprintf(number, sizeof number, "%u", ++starts);
    due_ms = 0;
    agent = fork();
    if (agent == 0) {
        setsid();
        sigset_t none;
        sigemptyset(&none);
        sigprocmask(SIG_SETMASK, &none, NULL);
        become(argv);
    }
    if (agent < 0) {
        say("the agent cannot be started: %s", strerror(errno));
        due_ms = now_ms() + PAUSE_MS;
    }
    return agent;
}

void keeper_reaped(pid_t pid) {
    if (pid != agent) return;
    agent = -1;
    say("the agent has died; starting another. What it knew of running processes is lost");
    due_ms = now_ms() + PAUSE_MS;
}

int keeper_timeout_ms(void) {
    if (!due_ms) return -1;
    long long left = due_ms - now_ms();
    return left < 0 ? 0 : (int)left;
}

void keeper_tick(void) {
    if (due_ms && now_ms() >= due_ms) keeper_start(agent_options);
}

_Noreturn void keeper_run(char *const options[]) {
    if (getpid() != 1) signal(SIGTERM, SIG_IGN); // as the agent: an image's init may end everything too early
    signal(SIGHUP, SIG_IGN);
    keeper_start(options);
    for (;;) {
        int left_ms = keeper_timeout_ms();
        if (left_ms >= 0) {
            struct timespec pause = {.tv_sec = left_ms / 1000, .tv_nsec = left_ms % 1000 * 1000000};
            nanosleep(&pause, NULL);
            keeper_tick();
            continue;
        }
        pid_t pid = waitpid(-1, NULL, 0);
        if (pid > 0) keeper_reaped(pid);
    }
}

_Noreturn void keeper_become(void) {
    char *argv[] = {agent_name, "--keep", NULL};
    become(argv);
}
