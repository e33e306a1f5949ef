// The programs of /etc/noid/restore.d, in the order of their names, and before them the new SSH host keys.
//
// The agent waits for them in its main loop, so it answers meanwhile. What a hook starts ends with it: a cgroup of its
// own finds what has left its process group, and holds a fork bomb. A hook that wants something to go on asks the
// guest's service manager for it.
#include "hooks.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "process.h"
#include "protocol.h"
#include "say.h"
#include "start.h"

enum {
    HOOKS_MAX = 12,
    NAME_BYTES_MAX = 56,
    TAIL_BYTES = 400,
    OUTPUT_BYTES_PER_EVENT = 64 * 1024,
    TASKS_MAX = 128, // of one hook
    DYING_MS = 1000, // how long a killed one may take to be gone
};

static const char hooks_directory[] = "/etc/noid/restore.d";
static const char keys_flag[] = "/etc/noid/ssh-host-keys";
static const char keys_name[] = "ssh-host-keys";

// New keys first and beside the old ones, so that a failure leaves sshd with keys. HUP makes sshd read them.
static const char keys_script[] =
    "set -eu; umask 077; fresh=/etc/ssh/.noid-fresh\n"
    "prints() { for k in /etc/ssh/ssh_host_*_key.pub; do\n"
    "  [ ! -f \"$k\" ] || ssh-keygen -lf \"$k\" | { read -r _ print _; printf ' %s' \"$print\"; }; done; }\n"
    "echo \"before$(prints)\"\n"
    "rm -rf $fresh; mkdir -p $fresh/etc/ssh; types=$(cat /etc/noid/ssh-host-keys)\n"
    "if [ -z \"$types\" ]; then ssh-keygen -q -A -f $fresh; fi\n"
    "for t in $types; do ssh-keygen -q -t \"$t\" -N '' -f $fresh/etc/ssh/ssh_host_${t}_key; done\n"
    "chmod 644 $fresh/etc/ssh/*.pub; rm -f /etc/ssh/ssh_host_*_key /etc/ssh/ssh_host_*_key.pub\n"
    "mv $fresh/etc/ssh/* /etc/ssh/; rm -rf $fresh\n"
    "pid=$(cat /run/sshd.pid 2>/dev/null || :)\n"
    "if [ -n \"$pid\" ] && [ \"$(cat /proc/$pid/comm)\" = sshd ]; then kill -HUP $pid; fi\n"
    "echo \"after$(prints)\"\n";

struct hook {
    char name[NAME_BYTES_MAX + 1]; // empty: the host keys
    bool done;
    char how[40]; // it ended
    char tail[TAIL_BYTES];
    unsigned tail_length;
};

static struct hook hooks[HOOKS_MAX + 1];
static unsigned count, current;
static bool too_many, running;
static char variables[3][96]; // what every hook is told
static int64_t deadline_ms, started_ms;
static pid_t pid;
static int pidfd = -1, output_fd = -1, epoll_fd = -1;
static bool killed;
static pid_t abandoned[HOOKS_MAX + 1]; // killed, and still there when we went on

static int64_t now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

void hooks_init(int epoll) { epoll_fd = epoll; }

bool hooks_running(void) { return running; }

// --- finding them ---------------------------------------------------------------------------------------------------

static void add(const char *name) {
    // The first ones by name are kept, however many there are.
    unsigned first = count && !hooks[0].name[0] ? 1 : 0, at = count;
    while (at > first && strcmp(hooks[at - 1].name, name) > 0) at--;
    if (count - first == HOOKS_MAX) {
        too_many = true;
        if (at == count) return;
        count--;
    }
    memmove(&hooks[at + 1], &hooks[at], (count - at) * sizeof *hooks);
    hooks[at] = (struct hook){0};
    snprintf(hooks[at].name, sizeof hooks[at].name, "%s", name);
    count++;
}

static void find_hooks(bool keys) {
    count = 0;
    too_many = false;
    if (keys && access(keys_flag, F_OK) == 0) hooks[count++] = (struct hook){0};
    DIR *directory = opendir(hooks_directory);
    struct dirent *entry;
    while (directory && (entry = readdir(directory))) {
        if (entry->d_name[0] == '.') continue;
        if (strlen(entry->d_name) > NAME_BYTES_MAX) too_many = true;
        else add(entry->d_name);
    }
    if (directory) closedir(directory);
}

// --- one ------------------------------------------------------------------------------------------------------------

static void cgroup_path(char *path, size_t capacity, unsigned index, const char *file) {
    snprintf(path, capacity, "/sys/fs/cgroup/noid-hook-%u%s%s", index, file[0] ? "/" : "", file);
}

static bool write_cgroup(unsigned index, const char *file, const char *value) {
    char path[80];
    cgroup_path(path, sizeof path, index, file);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    bool written = fd >= 0 && write(fd, value, strlen(value)) > 0;
    if (fd >= 0) close(fd);
    return written;
}

// Without cgroup2, or its pids controller, a hook is held by its process group alone.
static void make_cgroup(unsigned index) {
    char path[80], number[16];
    cgroup_path(path, sizeof path, index, "");
    if (access("/sys/fs/cgroup/cgroup.procs", F_OK) || (mkdir(path, 0755) && errno != EEXIST)) return;
    snprintf(number, sizeof number, "%d", TASKS_MAX);
    if (write_cgroup(index, "pids.max", number)) return;
    int fd = open("/sys/fs/cgroup/cgroup.subtree_control", O_WRONLY | O_CLOEXEC);
    if (fd >= 0 && write(fd, "+pids", 5) == 5) write_cgroup(index, "pids.max", number);
    if (fd >= 0) close(fd);
}

static void kill_everything(unsigned index) {
    kill(-pid, SIGKILL);
    kill(pid, SIGKILL); // it may not have a group of its own yet
    write_cgroup(index, "cgroup.kill", "1");
}

// Removes the cgroups of hooks that are gone for good; the others' go at the next wake.
static void remove_cgroups(void) {
    char path[80];
    for (unsigned i = 0; i <= HOOKS_MAX; i++) {
        cgroup_path(path, sizeof path, i, "");
        rmdir(path);
    }
}

static void reap_abandoned(void) {
    for (unsigned i = 0; i <= HOOKS_MAX; i++)
        if (abandoned[i] > 0 && waitpid(abandoned[i], NULL, WNOHANG) != 0) abandoned[i] = 0;
}

static _Noreturn void run_child(const struct hook *hook, const char *path, const char *cgroup, int output) {
    int null = open("/dev/null", O_RDONLY | O_CLOEXEC);
    dup2(null, STDIN_FILENO);
    dup2(output, STDOUT_FILENO);
    dup2(output, STDERR_FILENO);
    start_apart(true, cgroup);
    if (chdir("/")) _exit(126);
    char *environment[] = {"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                           "HOME=/root",
                           "LANG=C.UTF-8",
                           variables[0],
                           variables[1],
                           variables[2],
                           NULL};
    char *program[] = {(char *)path, NULL}, *keys[] = {"sh", "-c", (char *)keys_script, NULL};
    if (hook->name[0]) execve(path, program, environment);
    else execve("/bin/sh", keys, environment);
    dprintf(STDERR_FILENO, "cannot run: %s", strerror(errno));
    _exit(126);
}

static bool watch(int fd, enum event_kind kind) {
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = event_word(kind, 0)}; // level: read in turns
    return epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event) == 0;
}

static void close_fd(int *fd) {
    if (*fd >= 0) close(*fd);
    *fd = -1;
}

static void refuse(struct hook *hook, const char *why) {
    hook->tail_length = (unsigned)snprintf(hook->tail, sizeof hook->tail, "%s", why);
    snprintf(hook->how, sizeof hook->how, "not run");
}

static bool is_program(const char *path) {
    struct stat status;
    if (stat(path, &status)) return false; // also a link that leads nowhere, or to itself
    errno = S_ISDIR(status.st_mode) ? EISDIR : EACCES;
    return S_ISREG(status.st_mode) && status.st_mode & 0111;
}

// True if it runs now.
static bool begin(struct hook *hook) {
    char path[128], cgroup[80];
    int pair[2];
    snprintf(path, sizeof path, "%s/%s", hooks_directory, hook->name);
    if (hook->name[0] && !is_program(path)) {
        refuse(hook, errno == EACCES ? "not an executable file" : strerror(errno));
        return false;
    }
    if (now_ms() >= deadline_ms) {
        refuse(hook, "the time for all hooks was over");
        return false;
    }
    make_cgroup(current);
    cgroup_path(cgroup, sizeof cgroup, current, "");
    pid = -1;
    if (pipe2(pair, O_CLOEXEC) == 0) {
        output_fd = pair[0];
        if (fcntl(output_fd, F_SETFL, O_NONBLOCK) == 0 && (pid = start_fork(true, cgroup)) == 0)
            run_child(hook, path, cgroup, pair[1]);
        int error = errno;
        close(pair[1]);
        errno = error;
    }
    if (pid > 0) pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
    if (pid > 0 && pidfd >= 0 && watch(pidfd, EVENT_HOOK_EXIT) && watch(output_fd, EVENT_HOOK_OUTPUT)) {
        started_ms = now_ms();
        killed = false;
        return true;
    }
    refuse(hook, strerror(errno));
    if (pid > 0) {
        kill_everything(current);
        waitpid(pid, NULL, 0);
    }
    close_fd(&pidfd);
    close_fd(&output_fd);
    return false;
}

static void advance(void) {
    for (; current < count; current++)
        if (begin(&hooks[current])) return;
    running = false;
    remove_cgroups();
}

// Reads what there is, at most a bounded amount, and keeps the end. False: there will be no more.
static bool take_output(struct hook *hook) {
    char chunk[4096];
    for (size_t taken = 0; taken < OUTPUT_BYTES_PER_EVENT;) {
        ssize_t n = read(output_fd, chunk, sizeof chunk);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && errno == EAGAIN) return true;
        if (n <= 0) return false;
        taken += (size_t)n;
        unsigned fresh = n > TAIL_BYTES ? TAIL_BYTES : (unsigned)n;
        unsigned old = hook->tail_length > TAIL_BYTES - fresh ? TAIL_BYTES - fresh : hook->tail_length;
        memmove(hook->tail, hook->tail + hook->tail_length - old, old);
        memcpy(hook->tail + old, chunk + n - fresh, fresh);
        hook->tail_length = old + fresh;
    }
    return true;
}

static void finish(struct hook *hook) {
    if (output_fd >= 0) take_output(hook);
    close_fd(&output_fd);
    close_fd(&pidfd);
    current++;
    advance();
}

static void ended(struct hook *hook) {
    int status;
    if (waitpid(pid, &status, WNOHANG) != pid) return;
    long long took = now_ms() - started_ms;
    if (killed) snprintf(hook->how, sizeof hook->how, "killed after %lld ms", took);
    else if (WIFEXITED(status)) snprintf(hook->how, sizeof hook->how, "exit %d", WEXITSTATUS(status));
    else snprintf(hook->how, sizeof hook->how, "signal %d", WTERMSIG(status));
    hook->done = !killed && WIFEXITED(status) && WEXITSTATUS(status) == 0;
    kill_everything(current); // what it left behind
    finish(hook);
}

void hooks_event(bool output) {
    if (!running || current >= count) return;
    struct hook *hook = &hooks[current];
    if (!output) ended(hook);
    else if (output_fd >= 0 && !take_output(hook)) close_fd(&output_fd);
}

void hooks_tick(void) {
    if (!running) return;
    int64_t now = now_ms();
    if (now < deadline_ms + (killed ? DYING_MS : 0)) return;
    if (!killed) {
        killed = true;
        kill_everything(current);
        return;
    }
    struct hook *hook = &hooks[current];
    snprintf(hook->how, sizeof hook->how, "killed after %lld ms, not gone", (long long)(now - started_ms));
    abandoned[current] = pid;
    finish(hook);
}

int hooks_timeout_ms(void) {
    if (!running) return -1;
    int64_t left = deadline_ms + (killed ? DYING_MS : 0) - now_ms();
    return left < 0 ? 0 : (int)left;
}

void hooks_begin(const struct hooks_request *request) {
    count = current = 0;
    too_many = false;
    if (!request->limit_ms) return;
    find_hooks(request->other);
    if (!count) return;
    reap_abandoned();
    remove_cgroups();
    deadline_ms = now_ms() + (request->limit_ms > HOOKS_MS_MAX ? HOOKS_MS_MAX : request->limit_ms);
    snprintf(variables[0], sizeof *variables, "NOID_GENERATION=%llu", (unsigned long long)request->generation);
    snprintf(variables[1], sizeof *variables, "NOID_REASON=%.40s", request->reason);
    snprintf(variables[2], sizeof *variables, "NOID_VM=%.80s", request->vm);
    running = true;
    advance();
}

// --- the receipt ----------------------------------------------------------------------------------------------------

// One line of printable text: what a hook says is read by people, through terminals and logs.
static void tail_text(const struct hook *hook, char *text) {
    unsigned length = hook->tail_length, from = 0;
    while (length && (hook->tail[length - 1] == '\n' || hook->tail[length - 1] == ' ')) length--;
    while (from < length && ((uint8_t)hook->tail[from] & 0xc0) == 0x80) from++; // the rest of a cut character
    for (; from < length; from++) {
        uint8_t c = (uint8_t)hook->tail[from];
        *text++ = c < ' ' || c == 0x7f ? (c == '\n' ? '|' : ' ') : (char)c;
    }
    *text = 0;
}

// The two lines the script of the host keys prints.
static void key_prints(const char *text, const char *word, char *out, size_t capacity) {
    const char *found = strstr(text, word);
    size_t length = found ? strcspn(found + strlen(word), "|") : 0;
    snprintf(out, capacity, "%.*s", (int)length, found ? found + strlen(word) : "");
}

unsigned hooks_report(struct writer *receipt) {
    char name[NAME_BYTES_MAX + 8], text[TAIL_BYTES + 1], before[200] = "", after[200];
    for (unsigned i = 0; i < count; i++) {
        const struct hook *hook = &hooks[i];
        tail_text(hook, text);
        snprintf(after, sizeof after, "%s", hook->how);
        snprintf(name, sizeof name, hook->name[0] ? "hook:%s" : "%s", hook->name[0] ? hook->name : keys_name);
        if (!hook->name[0]) {
            key_prints(text, "before ", before, sizeof before);
            if (hook->done) key_prints(text, "after ", after, sizeof after);
            if (hook->done) text[0] = 0;
        }
        write_text(receipt, name);
        write_u8(receipt, hook->done ? ITEM_DONE : ITEM_FAILED);
        write_text(receipt, hook->name[0] ? "" : before);
        write_text(receipt, after);
        write_text(receipt, text);
    }
    if (!too_many) return count;
    snprintf(text, sizeof text, "more than %d programs, or names over %d bytes: the rest did not run", HOOKS_MAX,
             NAME_BYTES_MAX);
    write_text(receipt, "hooks");
    write_u8(receipt, ITEM_FAILED);
    write_text(receipt, "");
    write_text(receipt, "");
    write_text(receipt, text);
    return count + 1;
}
