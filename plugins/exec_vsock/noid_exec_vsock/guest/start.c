// The child's side of a start: identity, directory, environment, and exec with a shell's exit codes.
#include "start.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "builtin.h"
#include "protocol.h"

const char start_cgroup[] = "/sys/fs/cgroup/noid";
struct rlimit start_file_limit = {.rlim_cur = 1024, .rlim_max = 4096};

static bool skip_texts(struct reader *reader, uint32_t count, size_t *bytes) {
    for (uint32_t i = 0; i < count && !reader->bad; i++) {
        struct text text = read_text(reader);
        if (text.length && memchr(text.data, 0, text.length)) return false;
        *bytes += text.length + 1;
    }
    return !reader->bad;
}

bool start_parse(const uint8_t *body, size_t length, struct start_request *request) {
    struct reader reader = read_body(body, length);
    memset(request, 0, sizeof *request);
    request->flags = read_u32(&reader);
    request->credit = read_u32(&reader);
    request->log_bytes = read_u32(&reader);
    request->columns = read_u16(&reader);
    request->rows = read_u16(&reader);
    request->label = read_text(&reader);
    struct text user = read_text(&reader), cwd = read_text(&reader);
    if (reader.bad || request->label.length > LABEL_BYTES_MAX || !text_copy(user, request->user, sizeof request->user) ||
        !text_copy(cwd, request->cwd, sizeof request->cwd))
        return false;
    request->argument_count = read_u32(&reader);
    request->arguments = reader;
    if (request->argument_count == 0 || !skip_texts(&reader, request->argument_count, &request->text_bytes))
        return false;
    request->environment_count = read_u32(&reader);
    request->environment = reader;
    return skip_texts(&reader, request->environment_count, &request->text_bytes) && read_whole(&reader);
}

static _Noreturn void fail(int status_fd, int reason, int error) {
    struct start_failure failure = {.reason = reason, .error = error};
    ssize_t written = write(status_fd, &failure, sizeof failure);
    (void)written; // the agent is gone; so are we
    _exit(126);
}

static bool begun_in_cgroup;

// A cgroup of our own, so that systemd neither counts these processes as its own nor waits for them at shutdown.
// It is looked for at every start because an init may mount /sys/fs/cgroup after the agent has begun.
static int open_cgroup(const char *cgroup) {
    int fd = open(cgroup, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0 && access("/sys/fs/cgroup/cgroup.procs", F_OK) == 0 && mkdir(cgroup, 0755) == 0)
        fd = open(cgroup, O_PATH | O_DIRECTORY | O_CLOEXEC);
    return fd; // none: no cgroup2 here (yet), the process stays beside the agent
}

// Who moves into a cgroup waits for all processors to have passed a quiet state, 8 to 15 ms in a guest that was idle.
// A child that begins in it (Linux 5.7) waits for nothing.
pid_t start_fork(bool owns_machine, const char *cgroup) {
    int fd = owns_machine ? open_cgroup(cgroup) : -1;
    begun_in_cgroup = fd >= 0;
    if (fd < 0) return fork();
    struct clone_args arguments = {.flags = CLONE_INTO_CGROUP, .exit_signal = SIGCHLD, .cgroup = (uint64_t)fd};
    pid_t pid = (pid_t)syscall(SYS_clone3, &arguments, sizeof arguments);
    int error = errno;
    if (pid != 0) close(fd);
    if (pid >= 0) return pid;
    begun_in_cgroup = false;
    errno = error;
    return error == EAGAIN || error == ENOMEM ? -1 : fork(); // an old kernel, or a cgroup that takes nobody
}

static void enter_cgroup(const char *cgroup) {
    char processes[128];
    snprintf(processes, sizeof processes, "%s/cgroup.procs", cgroup);
    int fd = begun_in_cgroup ? -1 : open(processes, O_WRONLY | O_CLOEXEC);
    if (fd < 0) return;
    ssize_t written = write(fd, "0", 1);
    (void)written;
    close(fd);
}

static void take_part_in_oom(void) {
    int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    if (fd < 0) return;
    ssize_t written = write(fd, "0", 1); // the agent's own -1000 must not be inherited
    (void)written;
    close(fd);
}

static void become(const struct user *user, int status_fd) {
    if (geteuid() != 0) return; // an agent that is not root runs everything as itself; `process_start` has checked
    if (setgroups((size_t)user->group_count, user->groups) || setresgid(user->gid, user->gid, user->gid) ||
        setresuid(user->uid, user->uid, user->uid))
        fail(status_fd, FAILED_RESOURCES, errno);
}

static void enter_directory(const struct start_request *request, const struct user *user, int status_fd) {
    if (chdir("/")) fail(status_fd, FAILED_INVALID, errno);
    if (request->cwd[0]) {
        if (chdir(request->cwd)) fail(status_fd, FAILED_INVALID, errno);
    } else if (user->home[0] && chdir(user->home)) {
        errno = 0; // a home that is not there is no reason not to run: stay in /
    }
}

static bool overridden(char *const *environment, const char *entry) {
    size_t name = (size_t)(strchr(entry, '=') - entry) + 1;
    for (; *environment; environment++)
        if (!strncmp(*environment, entry, name)) return true;
    return false;
}

static char **copy_texts(struct reader reader, uint32_t count, uint32_t spare, char **pool, int status_fd) {
    char **texts = calloc((size_t)count + spare + 1, sizeof *texts);
    if (!texts) fail(status_fd, FAILED_RESOURCES, ENOMEM);
    for (uint32_t i = 0; i < count; i++) {
        struct text text = read_text(&reader);
        texts[i] = *pool;
        if (text.length) memcpy(*pool, text.data, text.length);
        (*pool)[text.length] = 0;
        *pool += text.length + 1;
    }
    return texts;
}

// Without an exec nothing closes the agent's files: the other processes' pipes, which would never end, and the channel.
static void close_all_but_standard(void) {
    if (syscall(SYS_close_range, 3, ~0u, 0) == 0) return;
    for (int fd = 3; fd < FILES_MAX; fd++) close(fd); // before Linux 5.9
}

void start_apart(bool owns_machine, const char *cgroup) {
    setsid();
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    // What the agent, or who started it, ignores would stay ignored through exec: a program nobody can end with TERM.
    for (int signo = 1; signo < NSIG; signo++) signal(signo, SIG_DFL);
    umask(022);
    setrlimit(RLIMIT_NOFILE, &start_file_limit); // lowering never fails
    if (!owns_machine) return;
    enter_cgroup(cgroup);
    take_part_in_oom();
    setpriority(PRIO_PROCESS, 0, 0); // the agent's precedence must not be inherited
}

_Noreturn void start_child(const struct start_request *request, const struct user *user, bool owns_machine,
                           int status_fd) {
    start_apart(owns_machine, start_cgroup);
    if (request->flags & START_TTY) ioctl(STDIN_FILENO, TIOCSCTTY, 0);
    become(user, status_fd);
    enter_directory(request, user, status_fd);
    char *pool = malloc(request->text_bytes + 1);
    if (!pool) fail(status_fd, FAILED_RESOURCES, ENOMEM);
    char defaults[7][288];
    snprintf(defaults[0], sizeof *defaults, "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    snprintf(defaults[1], sizeof *defaults, "HOME=%s", user->home);
    snprintf(defaults[2], sizeof *defaults, "USER=%s", user->name);
    snprintf(defaults[3], sizeof *defaults, "LOGNAME=%s", user->name);
    snprintf(defaults[4], sizeof *defaults, "SHELL=%s", user->shell);
    snprintf(defaults[5], sizeof *defaults, "LANG=C.UTF-8");
    snprintf(defaults[6], sizeof *defaults, "TERM=xterm"); // last: only for who has a terminal
    char **arguments = copy_texts(request->arguments, request->argument_count, 0, &pool, status_fd);
    char **environment = copy_texts(request->environment, request->environment_count, 7, &pool, status_fd);
    uint32_t n = request->environment_count;
    for (int i = 0; i < (request->flags & START_TTY ? 7 : 6); i++)
        if (!overridden(environment, defaults[i])) environment[n++] = defaults[i];
    extern char **environ;
    environ = environment; // execvp searches the PATH the program will see
    if (request->flags & START_BUILTIN) {
        close_all_but_standard(); // the status pipe too: the host hears that it runs
        _exit(builtin_run((int)request->argument_count, arguments));
    }
    execvp(arguments[0], arguments);
    int error = errno;
    bool missing = error == ENOENT || error == ENOTDIR;
    dprintf(STDERR_FILENO, "noid: cannot run '%s': %s\n", arguments[0],
            missing && !strchr(arguments[0], '/') ? "command not found" : strerror(error));
    _exit(missing ? 127 : 126);
}
