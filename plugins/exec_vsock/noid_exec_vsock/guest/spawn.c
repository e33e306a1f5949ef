// The beginning of a process: START, its pipes or terminal, the child, and whether it became its program.
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "outbox.h"
#include "start.h"
#include "table.h"
#include "terminal.h"
#include "users.h"
#include "wire.h"

static uint8_t *assembly; // of a START that comes in parts; mapped only meanwhile
static size_t assembly_length;
static uint32_t assembly_id;

void answer_failed(uint32_t id, int reason, int error, const char *what) {
    uint8_t body[600];
    struct writer writer = {.data = body, .capacity = sizeof body};
    write_u8(&writer, (uint8_t)reason);
    write_u32(&writer, (uint32_t)error);
    write_text(&writer, what);
    outbox_answer(MSG_FAILED, id, body, writer.length);
}

void process_refuse(uint32_t id, const char *why) { answer_failed(id, FAILED_NO_ROOT, ENODEV, why); }

// What the child keeps in [0..2], what we keep behind it. On a terminal all three are one, and so are ours.
struct ends {
    int child[3];
    int ours[3];
    int status[2];
};

static void close_ends(struct ends *ends) {
    for (int i = 0; i < 3; i++) {
        close_fd(&ends->child[i]);
        close_fd(&ends->ours[i]);
    }
    close_fd(&ends->status[0]);
    close_fd(&ends->status[1]);
}

static bool open_pipes(struct ends *ends, bool with_stdin) {
    int pair[2];
    for (int i = 0; i < 3; i++) {
        if (i == 0 && !with_stdin) {
            ends->child[0] = open("/dev/null", O_RDONLY | O_CLOEXEC);
            if (ends->child[0] < 0) return false;
            continue;
        }
        if (pipe2(pair, O_CLOEXEC)) return false;
        ends->child[i] = pair[i == 0 ? 0 : 1];
        ends->ours[i] = pair[i == 0 ? 1 : 0];
        if (fcntl(ends->ours[i], F_SETFL, O_NONBLOCK)) return false;
    }
    return true;
}

static bool open_terminal(struct ends *ends, const struct start_request *request, const struct user *user) {
    if (!terminal_open(user->uid, request->columns, request->rows, &ends->ours[1], &ends->child[0])) return false;
    for (int i = 1; i < 3; i++) {
        ends->child[i] = fcntl(ends->child[0], F_DUPFD_CLOEXEC, 3);
        if (ends->child[i] < 0) return false;
    }
    if (!(request->flags & START_WITH_STDIN)) return true;
    ends->ours[0] = fcntl(ends->ours[1], F_DUPFD_CLOEXEC, 3); // a number of its own, so that it can be watched apart
    return ends->ours[0] >= 0;
}

static bool open_ends(struct ends *ends, const struct start_request *request, const struct user *user) {
    *ends = (struct ends){{-1, -1, -1}, {-1, -1, -1}, {-1, -1}};
    if (pipe2(ends->status, O_CLOEXEC) || fcntl(ends->status[0], F_SETFL, O_NONBLOCK)) return false;
    if (request->flags & START_TTY) return open_terminal(ends, request, user);
    return open_pipes(ends, request->flags & START_WITH_STDIN);
}

static _Noreturn void run_child(struct ends *ends, const struct start_request *request, const struct user *user) {
    // The agent keeps 0, 1 and 2 open on something, so none of the pipes is at those numbers.
    for (int i = 0; i < 3; i++)
        if (dup2(ends->child[i], i) < 0) _exit(126);
    start_child(request, user, owns_machine, ends->status[1]);
}

static bool user_allowed(const struct start_request *request, struct user *user) {
    char self[16];
    snprintf(self, sizeof self, "%u", (unsigned)geteuid());
    if (!find_user(request->user[0] ? request->user : geteuid() == 0 ? "root" : self, user)) return false;
    return geteuid() == 0 || user->uid == geteuid();
}

static uint64_t unix_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void enter(struct process *process, uint32_t id, const struct start_request *request, const struct ends *ends) {
    *process = (struct process){.state = PROCESS_STARTING,
                                .attached = true,
                                .start_owed = true,
                                .tty = request->flags & START_TTY,
                                .builtin = request->flags & START_BUILTIN,
                                .id = id,
                                .status_fd = ends->status[0],
                                .started_unix_ns = unix_ns(),
                                .credit = request->credit};
    for (int i = 0; i < 2; i++) {
        int fd = ends->ours[1 + i];
        process->output[i] = (struct source){.fd = fd, .left = fd < 0 ? 0 : UINT64_MAX};
    }
    log_init(&process->log, request->log_bytes);
    stdin_open(process, ends->ours[0]); // granted with STARTED
    process->label = request->label.length ? malloc(request->label.length) : NULL;
    if (!process->label) return; // no memory for it: it is for whoever lists, not for us
    memcpy(process->label, request->label.data, request->label.length);
    process->label_length = (uint32_t)request->label.length;
}

static void start(uint32_t id, const uint8_t *body, size_t length) {
    static struct start_request request;
    static struct user user;
    char text[400];
    if (!start_parse(body, length, &request)) {
        answer_failed(id, FAILED_INVALID, EINVAL, "the START message is malformed");
        return;
    }
    if (find(id)) {
        answer_failed(id, FAILED_INVALID, EEXIST, "the id is in use");
        return;
    }
    if (!user_allowed(&request, &user)) {
        snprintf(text, sizeof text, "no user '%s' in the guest, or the agent may not become it", request.user);
        answer_failed(id, FAILED_INVALID, ENOENT, text);
        return;
    }
    struct process *process = free_slot();
    struct ends ends;
    if (!process) {
        snprintf(text, sizeof text, "%d processes run already or hold their output open", PROCESSES_MAX);
        answer_failed(id, FAILED_RESOURCES, EAGAIN, text);
        return;
    }
    pid_t pid = -1;
    int pidfd = -1;
    if (open_ends(&ends, &request, &user) && (pid = start_fork(owns_machine, start_cgroup)) == 0)
        run_child(&ends, &request, &user);
    if (pid > 0) pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
    if (pid < 0 || pidfd < 0) {
        snprintf(text, sizeof text, pid < 0 ? "cannot start a process: %s" : "pidfd_open: %s (needs Linux 5.3)",
                 strerror(errno));
        answer_failed(id, FAILED_RESOURCES, errno, text);
        if (pid > 0) {
            kill(pid, SIGKILL);
            waitpid(pid, NULL, 0);
        }
        close_ends(&ends);
        return;
    }
    for (int i = 0; i < 3; i++) close_fd(&ends.child[i]);
    close_fd(&ends.status[1]);
    enter(process, id, &request, &ends);
    process->pid = pid;
    process->pidfd = pidfd;
    // epoll_ctl can only fail here for want of memory; then the child is ended and the failure reported by its status.
    if (!watch(process->status_fd, EPOLLIN, EVENT_STATUS, process)) kill(pid, SIGKILL);
}

void process_start_part(uint32_t id, const uint8_t *body, size_t length) {
    if (assembly && assembly_id != id) assembly_length = 0;
    if (!assembly) {
        void *memory = mmap(NULL, START_BYTES_MAX, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) return; // the START that ends it will be malformed, and answered
        assembly = memory;
        assembly_length = 0;
    }
    assembly_id = id;
    if (length > START_BYTES_MAX - assembly_length) length = START_BYTES_MAX - assembly_length; // malformed, then
    memcpy(assembly + assembly_length, body, length);
    assembly_length += length;
}

void start_parts_drop(void) {
    if (assembly) munmap(assembly, START_BYTES_MAX);
    assembly = NULL;
}

void process_start(uint32_t id, const uint8_t *body, size_t length) {
    if (assembly && assembly_id == id) {
        process_start_part(id, body, length);
        body = assembly;
        length = assembly_length;
    }
    start(id, body, length);
    start_parts_drop();
}

static bool watch_all(const struct process *process) {
    static const enum event_kind kinds[2] = {EVENT_STDOUT, EVENT_STDERR};
    for (int i = 0; i < 2; i++)
        if (process->output[i].fd >= 0 && !watch(process->output[i].fd, EPOLLIN, kinds[i], process)) return false;
    return (process->stdin_fd < 0 || watch(process->stdin_fd, EPOLLOUT, EVENT_STDIN, process)) &&
           watch(process->pidfd, EPOLLIN, EVENT_EXIT, process);
}

// The status pipe says how `start_child` went: silence is success.
void on_status_event(struct process *process) {
    if (process->state != PROCESS_STARTING) return;
    process->status_due = process->start_owed && !outbox_has_room();
    if (process->status_due) {
        answers_waiting = true;
        return;
    }
    struct start_failure failure;
    ssize_t n = read(process->status_fd, &failure, sizeof failure);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
    close_fd(&process->status_fd);
    process->state = PROCESS_RUNNING;
    if (process->start_owed && n == (ssize_t)sizeof failure) {
        char text[400];
        snprintf(text, sizeof text, "%s: %s",
                 failure.reason == FAILED_INVALID ? "cannot enter the working directory" : "cannot start a process",
                 strerror(failure.error));
        answer_failed(process->id, failure.reason, failure.error, text);
        forget(process); // to who was not there to be told so, it is a process that ended with 126
    } else if (process->start_owed) {
        uint8_t body[8];
        struct writer writer = {.data = body, .capacity = sizeof body};
        write_u32(&writer, (uint32_t)process->pid);
        outbox_answer(MSG_STARTED, process->id, body, writer.length);
    }
    process->start_owed = false;
    if (!watch_all(process)) {
        kill_group(process, SIGKILL);
        waitid(P_PID, (id_t)process->pid, &(siginfo_t){0}, WEXITED | WNOWAIT);
        reap(process);
        return;
    }
    settle(process); // grants stdin
}
