// The init of an image that brings none: mounts, reaps, keeps a shell on the serial console, shuts down in order.
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/input.h>
#include <net/if.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "boot.h"
#include "keeper.h"
#include "say.h"

enum { BUTTONS_MAX = 4, SHUTDOWN_GRACE_MS = 3000, RESPAWN_PAUSE_MS = 1000 };

static long long now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000LL + now.tv_nsec / 1000000;
}

static void mount_at(const char *source, const char *target, const char *type, unsigned long flags, const char *data) {
    mkdir(target, 0755);
    if (mount(source, target, type, flags, data) && errno != EBUSY)
        say("cannot mount %s at %s: %s", type, target, strerror(errno));
}

static void mount_rest(void) {
    mount_at("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "mode=0620,gid=5,ptmxmode=0666");
    mount_at("tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777");
    mount_at("tmpfs", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755,size=20%");
    mount_at("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777");
    mount_at("cgroup2", "/sys/fs/cgroup", "cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
}

static void set_hostname_from_file(void) {
    char name[64] = "";
    int fd = open("/etc/hostname", O_RDONLY | O_CLOEXEC);
    ssize_t n = fd >= 0 ? read(fd, name, sizeof name - 1) : 0;
    if (fd >= 0) close(fd);
    name[n > 0 ? n : 0] = 0;
    name[strcspn(name, " \t\n")] = 0;
    if (name[0]) sethostname(name, strlen(name));
}

static void loopback_up(void) {
    struct ifreq request = {.ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || ioctl(fd, SIOCSIFFLAGS, &request)) say("cannot bring up lo: %s", strerror(errno));
    if (fd >= 0) close(fd);
}

// Opens the input devices that have a power key. Returns how many.
static int open_buttons(struct pollfd *buttons) {
    int n = 0;
    DIR *directory = opendir("/dev/input");
    struct dirent *entry;
    while (directory && n < BUTTONS_MAX && (entry = readdir(directory))) {
        if (strncmp(entry->d_name, "event", 5)) continue;
        char path[300];
        snprintf(path, sizeof path, "/dev/input/%s", entry->d_name);
        int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
        unsigned char keys[KEY_MAX / 8 + 1] = {0};
        if (fd >= 0 && ioctl(fd, EVIOCGBIT(EV_KEY, sizeof keys), keys) >= 0 &&
            (keys[KEY_POWER / 8] >> (KEY_POWER % 8) & 1))
            buttons[n++] = (struct pollfd){.fd = fd, .events = POLLIN};
        else if (fd >= 0)
            close(fd);
    }
    if (directory) closedir(directory);
    return n;
}

static int button_pressed(int fd) {
    struct input_event event;
    int pressed = 0;
    while (read(fd, &event, sizeof event) == (ssize_t)sizeof event)
        if (event.type == EV_KEY && event.code == KEY_POWER && event.value == 1) pressed = 1;
    return pressed;
}

// A shell on the serial console, or -1 when there is no such console or no shell.
static pid_t start_shell(void) {
    if (access("/dev/ttyS0", R_OK | W_OK)) return -1;
    pid_t pid = fork();
    if (pid) return pid;
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    setsid();
    int tty = open("/dev/ttyS0", O_RDWR);
    if (tty < 0) _exit(1);
    ioctl(tty, TIOCSCTTY, 1);
    for (int fd = 0; fd < 3; fd++) dup2(tty, fd);
    if (tty > 2) close(tty);
    setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", 1);
    setenv("HOME", "/root", 1);
    setenv("TERM", "linux", 0);
    if (chdir("/root") && chdir("/")) _exit(1);
    execl("/bin/sh", "-sh", (char *)NULL);
    execl("/bin/busybox", "-sh", (char *)NULL);
    _exit(127);
}

static _Noreturn void shut_down(int how) {
    sigset_t child;
    sigemptyset(&child);
    sigaddset(&child, SIGCHLD);
    kill(-1, SIGTERM);
    kill(-1, SIGCONT);
    kill(-1, SIGHUP); // interactive shells ignore TERM
    long long deadline = now_ms() + SHUTDOWN_GRACE_MS;
    for (;;) {
        pid_t pid;
        while ((pid = waitpid(-1, NULL, WNOHANG)) > 0) continue;
        long long left = deadline - now_ms();
        if (pid < 0 || left <= 0) break;
        struct timespec timeout = {.tv_sec = left / 1000, .tv_nsec = left % 1000 * 1000000};
        sigtimedwait(&child, NULL, &timeout);
    }
    kill(-1, SIGKILL);
    while (waitpid(-1, NULL, WNOHANG) > 0) continue;
    sync();
    if (mount(NULL, "/", NULL, MS_REMOUNT | MS_RDONLY, NULL)) sync();
    reboot(how);
    say("reboot(2): %s", strerror(errno));
    for (;;) pause();
}

_Noreturn void minimal_init(bool with_agent) {
    sigset_t handled;
    sigemptyset(&handled);
    sigaddset(&handled, SIGCHLD);
    // What busybox' halt, poweroff and reboot send to init; SIGINT is Ctrl-Alt-Del.
    sigaddset(&handled, SIGUSR1);
    sigaddset(&handled, SIGUSR2);
    sigaddset(&handled, SIGTERM);
    sigaddset(&handled, SIGINT);
    sigprocmask(SIG_BLOCK, &handled, NULL);
    reboot(RB_DISABLE_CAD);
    mount_rest();
    set_hostname_from_file();
    loopback_up();
    struct pollfd watched[1 + BUTTONS_MAX];
    watched[0] = (struct pollfd){.fd = signalfd(-1, &handled, SFD_CLOEXEC | SFD_NONBLOCK), .events = POLLIN};
    int n = 1 + open_buttons(watched + 1);
    static char *options[] = {"--minimal-init", NULL};
    if (with_agent) keeper_start(options);
    pid_t shell = start_shell();
    long long shell_started = now_ms(), shell_due = 0;
    for (;;) {
        long long wait_ms = shell_due ? shell_due - now_ms() : -1;
        if (shell_due && wait_ms < 0) wait_ms = 0;
        int keeper_ms = keeper_timeout_ms();
        if (keeper_ms >= 0 && (wait_ms < 0 || keeper_ms < wait_ms)) wait_ms = keeper_ms;
        if (poll(watched, (nfds_t)n, (int)wait_ms) < 0 && errno != EINTR)
            say("init cannot poll: %s", strerror(errno));
        struct signalfd_siginfo info;
        while (read(watched[0].fd, &info, sizeof info) == (ssize_t)sizeof info) {
            if (info.ssi_signo == SIGUSR1 || info.ssi_signo == SIGUSR2) shut_down(RB_POWER_OFF);
            if (info.ssi_signo == SIGTERM || info.ssi_signo == SIGINT) shut_down(RB_AUTOBOOT);
        }
        for (int i = 1; i < n; i++)
            if (watched[i].revents && button_pressed(watched[i].fd)) shut_down(RB_POWER_OFF);
        pid_t pid;
        keeper_tick();
        while ((pid = waitpid(-1, NULL, WNOHANG)) > 0) {
            keeper_reaped(pid);
            if (pid == shell) {
                // A shell that dies at once must not become a loop that eats the machine.
                long long earliest = shell_started + RESPAWN_PAUSE_MS;
                shell_due = now_ms() > earliest ? now_ms() : earliest;
            }
        }
        if (shell_due && now_ms() >= shell_due) {
            shell = start_shell();
            shell_started = now_ms();
            shell_due = 0;
        }
    }
}
