// The process table.
//
//     FREE -> STARTING -> RUNNING -> ENDED -> FREE
//
// STARTING lasts until the child has become its program (its status pipe closes) or has failed to. ENDED lasts until
// the host was told and nobody holds the output pipes any more: a daemon left behind by a shell keeps writing into
// them, is not to be killed by SIGPIPE, and has nobody who wants to read it.
//
// Whose output goes next is decided as in fq_codel (RFC 8290): a stream that was quiet and has something to say goes
// into the list of fresh streams, which is served first; having been served once it joins the steady ones, which take
// turns. So one byte of an answer never waits for more than a chunk of each other stream that woke before it.
#include "process.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "outbox.h"
#include "protocol.h"
#include "start.h"
#include "users.h"

enum stream_state { STREAM_IDLE, STREAM_QUEUED, STREAM_STALLED };

struct stream {
    int fd; // -1 when closed
    enum stream_state state;
    bool discard;    // nobody wants it: read and throw away, so that the writer neither blocks nor dies
    uint64_t offset; // bytes delivered
    uint64_t credit; // bytes the host is ready for
    uint64_t left;   // bytes to deliver before EXIT; everything, while the process runs
    int next;        // in its list
};

enum process_state { PROCESS_FREE, PROCESS_STARTING, PROCESS_RUNNING, PROCESS_ENDED };

struct process {
    enum process_state state;
    bool orphan;       // the host of an earlier conversation started it, or released it: nobody is told anything
    bool failed;       // FAILED was sent: the child that ends now never was the program
    bool released;     // RELEASED is owed
    bool told;         // EXIT was sent, or nobody is to be told
    bool status_due;   // the status pipe has news that found no room in the outbox
    bool stdin_broken; // STDIN_CLOSED is owed
    bool stdin_eof;    // close stdin when what is held has been written
    uint32_t id;
    pid_t pid;
    int pidfd, status_fd, stdin_fd;
    uint32_t stdin_window, stdin_credit, stdin_owed;
    uint8_t *held; // stdin the pipe did not take; allocated only then, `stdin_window` bytes
    uint32_t held_start, held_end;
    struct stream output[2];
    int64_t kill_at_ms; // 0 for never
    int wait_status;
    struct rusage usage;
};

static struct process table[PROCESSES_MAX];
static unsigned high_water; // slots ever used
static int epoll_fd;
static bool owns_machine;
static bool answers_waiting; // some process has news and the outbox had no room
static unsigned killers;     // processes with a `kill_at_ms`

// Windows for stdin come out of one budget, so that many processes that do not read cannot make the agent large.
enum { STDIN_BUDGET = 256 * 1024, STDIN_WINDOW_MAX = 64 * 1024, STDIN_WINDOW_MIN = 4 * 1024 };
static uint32_t stdin_granted;

struct list {
    int head, tail;
};
static struct list fresh = {-1, -1}, steady = {-1, -1};

static uint8_t *assembly; // of a START that comes in parts; mapped only meanwhile
static size_t assembly_length;
static uint32_t assembly_id;

static int64_t now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static struct stream *stream_at(int index) { return &table[index / 2].output[index % 2]; }

static void enqueue(struct list *list, int index) {
    struct stream *stream = stream_at(index);
    stream->state = STREAM_QUEUED;
    stream->next = -1;
    if (list->tail >= 0) stream_at(list->tail)->next = index;
    else list->head = index;
    list->tail = index;
}

static int dequeue(struct list *list) {
    int index = list->head;
    if (index >= 0) {
        list->head = stream_at(index)->next;
        if (list->head < 0) list->tail = -1;
    }
    return index;
}

static void close_fd(int *fd) {
    if (*fd >= 0) close(*fd); // also leaves epoll: nobody else holds this file
    *fd = -1;
}

void processes_init(int epoll, bool owns) {
    epoll_fd = epoll;
    owns_machine = owns;
    // Four files for each process. The children get back what we were given: a soft limit over 1024 breaks select(2).
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files)) return;
    start_file_limit = files;
    files.rlim_cur = files.rlim_max < FILES_MAX ? files.rlim_max : FILES_MAX;
    setrlimit(RLIMIT_NOFILE, &files); // without it, fewer processes: each START says so
}

static struct process *find(uint32_t id) {
    for (unsigned i = 0; i < high_water; i++)
        if (table[i].state != PROCESS_FREE && !table[i].orphan && table[i].id == id) return &table[i];
    return NULL;
}

unsigned processes_alive(void) {
    unsigned alive = 0;
    for (unsigned i = 0; i < high_water; i++)
        alive += table[i].state == PROCESS_STARTING || table[i].state == PROCESS_RUNNING;
    return alive;
}

static bool watch(int fd, uint32_t events, enum event_kind kind, const struct process *process) {
    struct epoll_event event = {.events = events | EPOLLET,
                                .data.u64 = event_word(kind, (unsigned)(process - table))};
    return epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event) == 0;
}

static void answer_error(uint32_t id, const char *what) {
    uint8_t body[600];
    struct writer writer = {.data = body, .capacity = sizeof body};
    write_text(&writer, what);
    outbox_answer(MSG_ERROR, id, body, writer.length);
}

static void answer_failed(uint32_t id, int reason, int error, const char *what) {
    uint8_t body[600];
    struct writer writer = {.data = body, .capacity = sizeof body};
    write_u8(&writer, (uint8_t)reason);
    write_u32(&writer, (uint32_t)error);
    write_text(&writer, what);
    outbox_answer(MSG_FAILED, id, body, writer.length);
}

// --- stdin ----------------------------------------------------------------------------------------------------------

static void drop_held(struct process *process) {
    free(process->held);
    process->held = NULL;
    process->held_start = process->held_end = 0;
}

static void close_stdin(struct process *process) {
    close_fd(&process->stdin_fd);
    drop_held(process);
    stdin_granted -= process->stdin_window;
    process->stdin_window = 0;
}

static void break_stdin(struct process *process) {
    close_stdin(process);
    if (!process->orphan) process->stdin_broken = answers_waiting = true;
}

// Writes what it can. Returns the number of bytes, or -1 when the process has closed its stdin.
static ssize_t write_some(int fd, const uint8_t *data, size_t length) {
    for (;;) {
        ssize_t n = write(fd, data, length);
        if (n >= 0) return n;
        if (errno == EAGAIN) return 0;
        if (errno != EINTR) return -1;
    }
}

static void stdin_written(struct process *process, size_t length) {
    process->stdin_owed += (uint32_t)length;
    if (process->stdin_owed >= process->stdin_window / 2) answers_waiting = true;
}

static void flush_stdin(struct process *process) {
    if (process->stdin_fd < 0) return;
    while (process->held_start < process->held_end) {
        ssize_t n = write_some(process->stdin_fd, process->held + process->held_start,
                               process->held_end - process->held_start);
        if (n < 0) {
            break_stdin(process);
            return;
        }
        if (n == 0) return;
        process->held_start += (uint32_t)n;
        stdin_written(process, (size_t)n);
    }
    drop_held(process);
    if (process->stdin_eof) close_stdin(process);
}

void process_stdin(uint32_t id, const uint8_t *data, size_t length) {
    struct process *process = find(id);
    if (!process || process->stdin_fd < 0 || process->stdin_eof) return; // crossed with its end
    if (length > process->stdin_credit) {
        answer_error(id, "more stdin than was granted; it was dropped");
        return;
    }
    process->stdin_credit -= (uint32_t)length;
    if (!process->held) {
        ssize_t n = write_some(process->stdin_fd, data, length);
        if (n < 0) {
            break_stdin(process);
            return;
        }
        stdin_written(process, (size_t)n);
        data += n;
        length -= (size_t)n;
        if (length == 0) return;
        process->held = malloc(process->stdin_window);
        if (!process->held) {
            answer_error(id, "no memory for stdin; it was closed");
            break_stdin(process);
            return;
        }
    }
    // Credit is returned only for what has left `held`, so what comes always fits once the front is cut off.
    memmove(process->held, process->held + process->held_start, process->held_end - process->held_start);
    process->held_end -= process->held_start;
    process->held_start = 0;
    memcpy(process->held + process->held_end, data, length);
    process->held_end += (uint32_t)length;
}

void process_refuse(uint32_t id, const char *why) { answer_failed(id, FAILED_NO_ROOT, ENODEV, why); }

void process_stdin_eof(uint32_t id) {
    struct process *process = find(id);
    if (!process || process->stdin_fd < 0) return;
    process->stdin_eof = true;
    if (!process->held) close_stdin(process);
}

// --- the end of a process -------------------------------------------------------------------------------------------

static void free_if_over(struct process *process) {
    if (process->state != PROCESS_ENDED || !process->told || process->released || process->kill_at_ms) return;
    if (process->output[0].fd >= 0 || process->output[1].fd >= 0) return;
    process->state = PROCESS_FREE;
}

static bool delivered(const struct stream *stream) { return stream->fd < 0 || stream->left == 0; }

static void answer_exit(struct process *process) {
    uint8_t body[40];
    struct writer writer = {.data = body, .capacity = sizeof body};
    int status = process->wait_status;
    write_u8(&writer, WIFSIGNALED(status));
    write_u8(&writer, (uint8_t)(WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status)));
    const struct timeval *user = &process->usage.ru_utime, *system = &process->usage.ru_stime;
    write_u64(&writer, (uint64_t)user->tv_sec * 1000000 + (uint64_t)user->tv_usec);
    write_u64(&writer, (uint64_t)system->tv_sec * 1000000 + (uint64_t)system->tv_usec);
    write_u64(&writer, (uint64_t)process->usage.ru_maxrss);
    outbox_answer(MSG_EXIT, process->id, body, writer.length);
}

// Tells the host what it has to know about this process, as far as there is room, and frees what is over.
static void settle(struct process *process) {
    bool all_delivered = delivered(&process->output[0]) && delivered(&process->output[1]);
    for (;;) {
        bool exit_due = process->state == PROCESS_ENDED && !process->told && !process->orphan && all_delivered;
        bool credit_due = process->stdin_fd >= 0 && !process->orphan && process->stdin_owed > 0 &&
                          process->stdin_owed >= process->stdin_window / 2;
        if (!exit_due && !credit_due && !process->released && !process->stdin_broken) break;
        if (!outbox_has_room()) {
            answers_waiting = true;
            return;
        }
        if (process->stdin_broken) {
            process->stdin_broken = false;
            outbox_answer(MSG_STDIN_CLOSED, process->id, NULL, 0);
        } else if (credit_due) {
            uint8_t body[5];
            struct writer writer = {.data = body, .capacity = sizeof body};
            write_u8(&writer, STREAM_STDIN);
            write_u32(&writer, process->stdin_owed);
            process->stdin_credit += process->stdin_owed;
            process->stdin_owed = 0;
            outbox_answer(MSG_CREDIT, process->id, body, writer.length);
        } else if (process->released && process->state == PROCESS_ENDED) {
            process->released = false;
            process->orphan = true;
            outbox_answer(MSG_RELEASED, process->id, NULL, 0);
        } else if (exit_due) {
            answer_exit(process);
            process->told = process->orphan = true;
        } else {
            break; // released and not yet ended
        }
    }
    free_if_over(process);
}

static void discard_output(struct process *process) {
    for (int which = 0; which < 2; which++) {
        struct stream *stream = &process->output[which];
        stream->discard = true;
        stream->left = 0;
        if (stream->fd >= 0 && stream->state == STREAM_STALLED)
            enqueue(&steady, (int)(process - table) * 2 + which);
    }
}

static void set_kill_at(struct process *process, int64_t at_ms) {
    killers += (at_ms != 0) - (process->kill_at_ms != 0);
    process->kill_at_ms = at_ms;
}

static void reap(struct process *process) {
    pid_t pid = wait4(process->pid, &process->wait_status, WNOHANG, &process->usage);
    if (pid == 0) return;
    if (pid < 0) process->wait_status = 0; // cannot happen: nobody else waits for our children
    process->state = PROCESS_ENDED;
    // Members of its group pin the group's number; without any, the grace is over. (Later, the number could only be
    // another's if all members had ended *and* the kernel had gone through all pids, within the grace.)
    if (process->kill_at_ms && kill(-process->pid, 0) && errno == ESRCH) set_kill_at(process, 0);
    close_fd(&process->pidfd);
    if (process->stdin_fd >= 0) close_stdin(process);
    for (int which = 0; which < 2; which++) {
        struct stream *stream = &process->output[which];
        if (stream->fd < 0 || stream->discard) continue;
        // What the process itself wrote is in the pipe now. What comes later is from children it left behind.
        int unread = 0;
        if (ioctl(stream->fd, FIONREAD, &unread)) unread = 0;
        stream->left = (uint64_t)unread;
        if (unread == 0) stream->discard = true;
    }
    if (process->failed || process->orphan) process->told = true;
    settle(process);
}

static void on_exit_event(struct process *process) {
    if (process->state == PROCESS_RUNNING) reap(process);
}

static void kill_group(const struct process *process, int signo) {
    // Before the child's setsid there is no group yet; then the child is all there is.
    if (kill(-process->pid, signo) && errno == ESRCH) kill(process->pid, signo);
}

void process_signal(uint32_t id, uint8_t signo) {
    struct process *process = find(id);
    if (!process || process->state == PROCESS_ENDED) return;
    if (signo < 1 || signo > 64) answer_error(id, "no such signal");
    else kill_group(process, signo);
}

void process_release(uint32_t id, uint32_t grace_ms) {
    struct process *process = find(id);
    if (!process) {
        outbox_answer(MSG_RELEASED, id, NULL, 0); // ended before: its EXIT and the RELEASE crossed
        return;
    }
    if (process->released) return;
    process->released = process->told = true;
    discard_output(process);
    if (process->stdin_fd >= 0) close_stdin(process);
    process->stdin_broken = false;
    if (process->state != PROCESS_ENDED) {
        if (grace_ms > GRACE_MS_MAX) grace_ms = GRACE_MS_MAX;
        kill_group(process, grace_ms ? SIGTERM : SIGKILL);
        if (grace_ms) kill_group(process, SIGCONT); // a stopped process cannot see its TERM
        set_kill_at(process, now_ms() + grace_ms);
    }
    settle(process);
}

static void on_status_event(struct process *process);

void processes_tick(void) {
    if (answers_waiting) {
        answers_waiting = false;
        for (unsigned i = 0; i < high_water; i++) {
            if (table[i].state == PROCESS_FREE) continue;
            if (table[i].status_due) on_status_event(&table[i]);
            settle(&table[i]);
        }
    }
    if (!killers) return;
    int64_t now = now_ms();
    for (unsigned i = 0; i < high_water; i++) {
        struct process *process = &table[i];
        if (process->state == PROCESS_FREE || !process->kill_at_ms || process->kill_at_ms > now) continue;
        set_kill_at(process, 0);
        if (process->state == PROCESS_ENDED) kill(-process->pid, SIGKILL); // what it left behind in its group
        else kill_group(process, SIGKILL);                                // its pidfd will tell
        free_if_over(process);
    }
}

int processes_timeout_ms(void) {
    int64_t nearest = INT64_MAX;
    if (!killers) return -1;
    for (unsigned i = 0; i < high_water; i++)
        if (table[i].state != PROCESS_FREE && table[i].kill_at_ms && table[i].kill_at_ms < nearest)
            nearest = table[i].kill_at_ms;
    int64_t left = nearest - now_ms();
    return left < 0 ? 0 : left > GRACE_MS_MAX ? GRACE_MS_MAX : (int)left;
}

void processes_orphan(void) {
    for (unsigned i = 0; i < high_water; i++) {
        struct process *process = &table[i];
        if (process->state == PROCESS_FREE) continue;
        process->orphan = process->told = true;
        process->released = process->stdin_broken = false;
        discard_output(process);
        free_if_over(process);
    }
    if (assembly) munmap(assembly, START_BYTES_MAX);
    assembly = NULL;
    answers_waiting = false;
}

// --- output ---------------------------------------------------------------------------------------------------------

bool processes_have_output(void) { return fresh.head >= 0 || steady.head >= 0 || answers_waiting; }

bool processes_serve(void) {
    static uint8_t chunk[STREAM_CHUNK_BYTES];
    int index = dequeue(&fresh);
    if (index < 0) index = dequeue(&steady);
    if (index < 0) return false;
    struct stream *stream = stream_at(index);
    struct process *process = &table[index / 2];
    stream->state = STREAM_IDLE;
    if (stream->fd < 0) return true;
    uint64_t limit = sizeof chunk;
    if (!stream->discard) {
        if (stream->credit == 0) {
            stream->state = STREAM_STALLED;
            return true;
        }
        if (limit > stream->credit) limit = stream->credit;
        if (limit > stream->left) limit = stream->left;
    }
    ssize_t n = read(stream->fd, chunk, limit);
    if (n < 0 && errno == EAGAIN) return true;
    if (n < 0 && errno == EINTR) {
        enqueue(&steady, index);
        return true;
    }
    if (n <= 0) {
        close_fd(&stream->fd);
        settle(process);
        return true;
    }
    if (!stream->discard) {
        outbox_chunk(index % 2 ? MSG_STDERR : MSG_STDOUT, process->id, stream->offset, chunk, (size_t)n);
        stream->offset += (uint64_t)n;
        stream->credit -= (uint64_t)n;
        if (process->state == PROCESS_ENDED) {
            stream->left -= (uint64_t)n;
            if (stream->left == 0) {
                stream->discard = true;
                settle(process);
            }
        }
    }
    enqueue(&steady, index); // there may be more; if not, the next read says so
    return true;
}

void process_credit(uint32_t id, uint8_t which, uint32_t bytes) {
    struct process *process = find(id);
    if (!process) return; // crossed with its end
    if (which != STREAM_STDOUT && which != STREAM_STDERR) {
        answer_error(id, "credit for a stream that has none");
        return;
    }
    struct stream *stream = &process->output[which - STREAM_STDOUT];
    stream->credit += bytes;
    if (stream->state == STREAM_STALLED && stream->fd >= 0)
        enqueue(&steady, (int)(process - table) * 2 + which - STREAM_STDOUT);
}

// --- the beginning of a process -------------------------------------------------------------------------------------

static struct process *free_slot(void) {
    for (unsigned i = 0; i < high_water; i++)
        if (table[i].state == PROCESS_FREE && table[i].output[0].state != STREAM_QUEUED &&
            table[i].output[1].state != STREAM_QUEUED)
            return &table[i];
    return high_water < PROCESSES_MAX ? &table[high_water++] : NULL;
}

static uint32_t stdin_window_for_one_more(void) {
    uint32_t left = stdin_granted < STDIN_BUDGET ? STDIN_BUDGET - stdin_granted : 0;
    uint32_t window = left / 4;
    return window > STDIN_WINDOW_MAX ? STDIN_WINDOW_MAX : window < STDIN_WINDOW_MIN ? STDIN_WINDOW_MIN : window;
}

// Pipes for one process: what the child keeps in [0..2], what we keep behind it.
struct pipes {
    int child[3];
    int ours[3];
    int status[2];
};

static void close_pipes(struct pipes *pipes) {
    for (int i = 0; i < 3; i++) {
        close_fd(&pipes->child[i]);
        close_fd(&pipes->ours[i]);
    }
    close_fd(&pipes->status[0]);
    close_fd(&pipes->status[1]);
}

static bool open_pipes(struct pipes *pipes, bool with_stdin) {
    *pipes = (struct pipes){{-1, -1, -1}, {-1, -1, -1}, {-1, -1}};
    int pair[2];
    if (pipe2(pipes->status, O_CLOEXEC)) return false;
    for (int i = 0; i < 3; i++) {
        if (i == 0 && !with_stdin) {
            pipes->child[0] = open("/dev/null", O_RDONLY | O_CLOEXEC);
            if (pipes->child[0] < 0) return false;
            continue;
        }
        if (pipe2(pair, O_CLOEXEC)) return false;
        pipes->child[i] = pair[i == 0 ? 0 : 1];
        pipes->ours[i] = pair[i == 0 ? 1 : 0];
        if (fcntl(pipes->ours[i], F_SETFL, O_NONBLOCK)) return false;
    }
    return fcntl(pipes->status[0], F_SETFL, O_NONBLOCK) == 0;
}

static _Noreturn void run_child(struct pipes *pipes, const struct start_request *request, const struct user *user) {
    // The agent keeps 0, 1 and 2 open on something, so none of the pipes is at those numbers.
    for (int i = 0; i < 3; i++)
        if (dup2(pipes->child[i], i) < 0) _exit(126);
    start_child(request, user, owns_machine, pipes->status[1]);
}

static bool user_allowed(const struct start_request *request, struct user *user) {
    char self[16];
    snprintf(self, sizeof self, "%u", (unsigned)geteuid());
    if (!find_user(request->user[0] ? request->user : geteuid() == 0 ? "root" : self, user)) return false;
    return geteuid() == 0 || user->uid == geteuid();
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
    struct pipes pipes;
    if (!process) {
        snprintf(text, sizeof text, "%d processes run already or hold their output open", PROCESSES_MAX);
        answer_failed(id, FAILED_RESOURCES, EAGAIN, text);
        return;
    }
    bool with_stdin = request.flags & START_WITH_STDIN;
    pid_t pid = -1;
    int pidfd = -1;
    if (open_pipes(&pipes, with_stdin) && (pid = fork()) == 0) run_child(&pipes, &request, &user);
    if (pid > 0) pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
    if (pid < 0 || pidfd < 0) {
        snprintf(text, sizeof text, pid < 0 ? "cannot start a process: %s" : "pidfd_open: %s (needs Linux 5.3)",
                 strerror(errno));
        answer_failed(id, FAILED_RESOURCES, errno, text);
        if (pid > 0) {
            kill(pid, SIGKILL);
            waitpid(pid, NULL, 0);
        }
        close_pipes(&pipes);
        return;
    }
    for (int i = 0; i < 3; i++) close_fd(&pipes.child[i]);
    close_fd(&pipes.status[1]);
    *process = (struct process){.state = PROCESS_STARTING,
                                .id = id,
                                .pid = pid,
                                .pidfd = pidfd,
                                .status_fd = pipes.status[0],
                                .stdin_fd = pipes.ours[0]};
    process->output[0] = (struct stream){.fd = pipes.ours[1], .left = UINT64_MAX, .credit = request.stdout_credit};
    process->output[1] = (struct stream){.fd = pipes.ours[2], .left = UINT64_MAX, .credit = request.stderr_credit};
    if (with_stdin) {
        process->stdin_window = process->stdin_owed = stdin_window_for_one_more(); // granted with STARTED
        stdin_granted += process->stdin_window;
    }
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

void process_start(uint32_t id, const uint8_t *body, size_t length) {
    if (!assembly) {
        start(id, body, length);
        return;
    }
    if (assembly_id == id) {
        process_start_part(id, body, length);
        body = assembly;
        length = assembly_length;
    }
    start(id, body, length);
    munmap(assembly, START_BYTES_MAX);
    assembly = NULL;
}

// The status pipe says how `start_child` went: silence is success.
static void on_status_event(struct process *process) {
    if (process->state != PROCESS_STARTING) return;
    process->status_due = !outbox_has_room();
    if (process->status_due) {
        answers_waiting = true;
        return;
    }
    struct start_failure failure;
    ssize_t n = read(process->status_fd, &failure, sizeof failure);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
    close_fd(&process->status_fd);
    process->state = PROCESS_RUNNING;
    if (process->released || process->orphan) {
        discard_output(process);
    } else if (n == (ssize_t)sizeof failure) {
        process->failed = process->orphan = true;
        discard_output(process);
        char text[400];
        snprintf(text, sizeof text, "%s: %s",
                 failure.reason == FAILED_INVALID ? "cannot enter the working directory" : "cannot start a process",
                 strerror(failure.error));
        answer_failed(process->id, failure.reason, failure.error, text);
    } else {
        uint8_t body[8];
        struct writer writer = {.data = body, .capacity = sizeof body};
        write_u32(&writer, (uint32_t)process->pid);
        outbox_answer(MSG_STARTED, process->id, body, writer.length);
    }
    bool watched = watch(process->output[0].fd, EPOLLIN, EVENT_STDOUT, process) &&
                   watch(process->output[1].fd, EPOLLIN, EVENT_STDERR, process) &&
                   (process->stdin_fd < 0 || watch(process->stdin_fd, EPOLLOUT, EVENT_STDIN, process)) &&
                   watch(process->pidfd, EPOLLIN, EVENT_EXIT, process);
    if (!watched) {
        kill_group(process, SIGKILL);
        waitid(P_PID, (id_t)process->pid, &(siginfo_t){0}, WEXITED | WNOWAIT);
        reap(process);
        return;
    }
    settle(process); // grants stdin
}

void process_event(enum event_kind kind, unsigned slot, uint32_t events) {
    // An event may be for an earlier user of the slot: every branch looks again before it acts.
    struct process *process = &table[slot];
    if (process->state == PROCESS_FREE) return;
    if (kind == EVENT_STATUS) {
        on_status_event(process);
    } else if (kind == EVENT_EXIT) {
        on_exit_event(process);
    } else if (kind == EVENT_STDIN) {
        if (events & EPOLLERR && process->stdin_fd >= 0) break_stdin(process); // nobody can read it any more
        flush_stdin(process);
        settle(process);
    } else {
        int which = kind == EVENT_STDERR;
        if (process->output[which].fd >= 0 && process->output[which].state == STREAM_IDLE)
            enqueue(&fresh, (int)slot * 2 + which);
    }
}
