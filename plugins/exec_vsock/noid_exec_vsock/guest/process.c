// The life of processes: who is told what of them, how they are ended, when their slots are free again.
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/sysinfo.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "outbox.h"
#include "start.h"
#include "table.h"
#include "terminal.h"
#include "wire.h"

enum { ENDED_UNHEARD_MAX = 64 };

struct process table[PROCESSES_MAX];
unsigned high_water;
int epoll_fd;
bool owns_machine;
bool answers_waiting;

static unsigned killers; // processes with a `kill_at_ms`
static uint64_t ended;   // how many have, ever
static bool trim_due;    // one more has ended unheard

int64_t now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

void close_fd(int *fd) {
    if (*fd >= 0) close(*fd); // also leaves epoll: nobody else holds this file
    *fd = -1;
}

void processes_init(int epoll, bool owns) {
    epoll_fd = epoll;
    owns_machine = owns;
    struct sysinfo machine;
    logs_init(sysinfo(&machine) ? 0 : (size_t)machine.totalram * machine.mem_unit / 8);
    // Four files for each process. The children get back what we were given: a soft limit over 1024 breaks select(2).
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files)) return;
    start_file_limit = files;
    files.rlim_cur = files.rlim_max < FILES_MAX ? files.rlim_max : FILES_MAX;
    setrlimit(RLIMIT_NOFILE, &files); // without it, fewer processes: each START says so
}

struct process *find(uint32_t id) {
    for (unsigned i = 0; i < high_water; i++)
        if (table[i].state != PROCESS_FREE && !table[i].gone && table[i].id == id) return &table[i];
    return NULL;
}

unsigned processes_alive(void) {
    unsigned alive = 0;
    for (unsigned i = 0; i < high_water; i++)
        alive += table[i].state == PROCESS_STARTING || table[i].state == PROCESS_RUNNING;
    return alive;
}

bool watch(int fd, uint32_t events, enum event_kind kind, const struct process *process) {
    struct epoll_event event = {.events = events | EPOLLET,
                                .data.u64 = event_word(kind, (unsigned)(process - table))};
    return epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event) == 0;
}

void answer_error(uint32_t id, const char *what) {
    uint8_t body[600];
    struct writer writer = {.data = body, .capacity = sizeof body};
    write_text(&writer, what);
    outbox_answer(MSG_ERROR, id, body, writer.length);
}

// --- what the host is told ------------------------------------------------------------------------------------------

bool log_complete(const struct process *process) {
    return process->state == PROCESS_ENDED && process->output[0].left == 0 && process->output[1].left == 0;
}

static void free_if_over(struct process *process) {
    if (process->state != PROCESS_ENDED || !process->gone || process->release_owed || process->kill_at_ms) return;
    if (process->output[0].fd >= 0 || process->output[1].fd >= 0) return;
    process->state = PROCESS_FREE;
}

static void answer_exit(struct process *process) {
    uint8_t body[40];
    struct writer writer = {.data = body, .capacity = sizeof body};
    write_end(&writer, process);
    outbox_answer(MSG_EXIT, process->id, body, writer.length);
    process->told = true;
}

void settle(struct process *process) {
    for (;;) {
        bool exit_due = process->attached && !process->told && log_complete(process) && log_unsent(&process->log) == 0;
        bool credit_due = stdin_credit_due(process);
        bool release_due = process->release_owed && process->state == PROCESS_ENDED;
        if (!exit_due && !credit_due && !release_due && !process->stdin_broken) break;
        if (!outbox_has_room()) {
            answers_waiting = true;
            return;
        }
        if (process->stdin_broken) {
            process->stdin_broken = false;
            outbox_answer(MSG_STDIN_CLOSED, process->id, NULL, 0);
        } else if (credit_due) {
            stdin_grant(process);
        } else if (exit_due) {
            answer_exit(process);
        } else {
            process->release_owed = false;
            outbox_answer(MSG_RELEASED, process->id, NULL, 0);
        }
    }
    if (process->state == PROCESS_ENDED && !process->attached && !process->gone) trim_due = true;
    free_if_over(process);
}

void forget(struct process *process) {
    process->gone = true;
    process->attached = process->start_owed = process->stdin_broken = false;
    free(process->label);
    process->label = NULL;
    process->label_length = 0;
    if (process->stdin_fd >= 0) stdin_close(process);
    output_drop(process);
}

// Of those that ended with nobody attached the latest are kept: somebody may yet come and ask.
static struct process *oldest_unheard(unsigned *count) {
    struct process *oldest = NULL;
    *count = 0;
    for (unsigned i = 0; i < high_water; i++) {
        struct process *process = &table[i];
        if (process->state != PROCESS_ENDED || process->attached || process->gone) continue;
        ++*count;
        if (!oldest || process->ended_as < oldest->ended_as) oldest = process;
    }
    return oldest;
}

static void trim(void) {
    unsigned count;
    for (struct process *oldest; (oldest = oldest_unheard(&count)) && count > ENDED_UNHEARD_MAX;) {
        forget(oldest);
        free_if_over(oldest);
    }
}

static struct process *unused_slot(void) {
    for (unsigned i = 0; i < high_water; i++)
        if (table[i].state == PROCESS_FREE && table[i].queue != QUEUE_WAITING) return &table[i];
    return high_water < PROCESSES_MAX ? &table[high_water++] : NULL;
}

struct process *free_slot(void) {
    unsigned count;
    struct process *slot = unused_slot(), *oldest;
    // Released ones may only have to be found to have closed their pipes.
    for (int i = 0; !slot && processes_unheard() && i < PROCESSES_MAX; i++) {
        processes_serve_unheard();
        slot = unused_slot();
    }
    while (!slot && (oldest = oldest_unheard(&count))) {
        forget(oldest);
        free_if_over(oldest);
        slot = unused_slot();
    }
    return slot;
}

// --- the end of a process -------------------------------------------------------------------------------------------

static void set_kill_at(struct process *process, int64_t at_ms) {
    killers += (at_ms != 0) - (process->kill_at_ms != 0);
    process->kill_at_ms = at_ms;
}

void reap(struct process *process) {
    pid_t pid = wait4(process->pid, &process->wait_status, WNOHANG, &process->usage);
    if (pid == 0) return;
    if (pid < 0) process->wait_status = 0; // cannot happen: nobody else waits for our children
    process->state = PROCESS_ENDED;
    process->ended_as = ++ended;
    // Members of its group pin the group's number; without any, the grace is over. (Later, the number could only be
    // another's if all members had ended *and* the kernel had gone through all pids, within the grace.)
    if (process->kill_at_ms && kill(-process->pid, 0) && errno == ESRCH) set_kill_at(process, 0);
    close_fd(&process->pidfd);
    if (process->stdin_fd >= 0) stdin_close(process);
    output_ends(process);
    settle(process);
}

void kill_group(const struct process *process, int signo) {
    // Before the child's setsid there is no group yet; then the child is all there is.
    if (kill(-process->pid, signo) && errno == ESRCH && process->state != PROCESS_ENDED) kill(process->pid, signo);
}

void process_signal(uint32_t id, uint8_t signo) {
    struct process *process = find(id);
    if (!process || process->state == PROCESS_ENDED) return;
    if (signo < 1 || signo > 64) answer_error(id, "no such signal");
    else kill_group(process, signo);
}

// A shell on a terminal gives its jobs groups of their own.
static void kill_all(const struct process *process, int signo) {
    pid_t foreground = process->tty && process->output[0].fd >= 0 ? terminal_foreground(process->output[0].fd) : 0;
    if (foreground && foreground != process->pid) kill(-foreground, signo);
    kill_group(process, signo);
}

static void end_process(struct process *process, uint32_t grace_ms) {
    if (process->state == PROCESS_ENDED) return;
    if (grace_ms > GRACE_MS_MAX) grace_ms = GRACE_MS_MAX;
    int64_t at_ms = now_ms() + grace_ms;
    if (!process->kill_at_ms || at_ms < process->kill_at_ms) set_kill_at(process, at_ms);
    if (grace_ms == 0) {
        kill_all(process, SIGKILL);
        return;
    }
    kill_all(process, SIGTERM);
    if (process->tty) kill_all(process, SIGHUP); // interactive shells ignore TERM
    kill_all(process, SIGCONT);                  // a stopped process cannot see its TERM
}

void process_end(uint32_t id, uint32_t grace_ms) {
    struct process *process = find(id);
    if (process) end_process(process, grace_ms);
}

void process_release(uint32_t id, uint32_t grace_ms) {
    struct process *process = find(id);
    if (!process) {
        for (unsigned i = 0; i < high_water; i++)
            if (table[i].state != PROCESS_FREE && table[i].id == id && table[i].release_owed) return; // is under way
        outbox_answer(MSG_RELEASED, id, NULL, 0);
        return;
    }
    forget(process);
    process->release_owed = true;
    end_process(process, grace_ms);
    settle(process);
}

void process_resize(uint32_t id, uint16_t columns, uint16_t rows) {
    struct process *process = id ? find(id) : NULL;
    if (!id && owns_machine) console_resize(columns, rows);
    else if (process && process->tty && process->output[0].fd >= 0)
        terminal_resize(process->output[0].fd, columns, rows);
}

void process_unheard(struct process *process) {
    process->attached = process->start_owed = process->release_owed = process->stdin_broken = false;
    process->stdin_credit = 0;
    output_ready(process);
    settle(process);
}

enum { BUILTIN_GRACE_MS = 2000 };

void processes_unhear(void) {
    for (unsigned i = 0; i < high_water; i++) {
        if (table[i].state == PROCESS_FREE) continue;
        process_unheard(&table[i]);
        if (!table[i].builtin || table[i].gone) continue;
        forget(&table[i]);
        end_process(&table[i], BUILTIN_GRACE_MS);
        settle(&table[i]);
    }
    start_parts_drop();
    listing_drop();
    answers_waiting = true; // a start whose status found no room needs none any more
}

void processes_tick(void) {
    if (answers_waiting) {
        answers_waiting = false;
        for (unsigned i = 0; i < high_water; i++) {
            if (table[i].state == PROCESS_FREE) continue;
            if (table[i].status_due) on_status_event(&table[i]);
            settle(&table[i]);
        }
        listing_tick();
    }
    if (trim_due) {
        trim_due = false;
        trim();
    }
    output_retry();
    if (!killers) return;
    int64_t now = now_ms();
    for (unsigned i = 0; i < high_water; i++) {
        struct process *process = &table[i];
        if (process->state == PROCESS_FREE || !process->kill_at_ms || process->kill_at_ms > now) continue;
        set_kill_at(process, 0);
        kill_all(process, SIGKILL); // of one that has ended: what it left behind in its group
        free_if_over(process);
    }
}

int processes_timeout_ms(void) {
    if (!killers) return output_starved() ? OUTPUT_RETRY_MS : -1;
    int64_t nearest = INT64_MAX;
    for (unsigned i = 0; i < high_water; i++)
        if (table[i].state != PROCESS_FREE && table[i].kill_at_ms && table[i].kill_at_ms < nearest)
            nearest = table[i].kill_at_ms;
    int64_t left = nearest - now_ms();
    if (output_starved() && left > OUTPUT_RETRY_MS) return OUTPUT_RETRY_MS;
    return left < 0 ? 0 : left > GRACE_MS_MAX ? GRACE_MS_MAX : (int)left;
}

void process_event(enum event_kind kind, unsigned slot, uint32_t events) {
    // An event may be for an earlier user of the slot: every branch looks again before it acts.
    struct process *process = &table[slot];
    if (process->state == PROCESS_FREE) return;
    if (kind == EVENT_STATUS) on_status_event(process);
    else if (kind == EVENT_EXIT && process->state == PROCESS_RUNNING) reap(process);
    else if (kind == EVENT_STDIN) on_stdin_event(process, events);
    else if (kind == EVENT_STDOUT || kind == EVENT_STDERR) on_output_event(process, kind == EVENT_STDERR, events);
}
