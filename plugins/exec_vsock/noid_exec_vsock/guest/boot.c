// Initramfs init: mounts, modules, the root file system, the agent in the background, then the image's own init.
#include "boot.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "keeper.h"
#include "layers.h"
#include "say.h"

enum { ROOT_WAIT_SECS = 10 };

static char command_line[4096];

static void read_command_line(void) {
    int fd = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
    ssize_t n = fd >= 0 ? read(fd, command_line, sizeof command_line - 1) : 0;
    if (fd >= 0) close(fd);
    command_line[n > 0 ? n : 0] = 0;
}

// Calls for each word of the command line; the kernel splits at white space and honours double quotes, so do we.
static const char *next_word(const char *p, const char **end) {
    while (*p == ' ' || *p == '\n' || *p == '\t') p++;
    const char *start = p;
    for (int quoted = 0; *p && (quoted || (*p != ' ' && *p != '\n' && *p != '\t')); p++)
        if (*p == '"') quoted = !quoted;
    *end = p;
    return p > start ? start : NULL;
}

void kernel_argument(const char *key, char *value, int capacity, const char *fallback) {
    snprintf(value, (size_t)capacity, "%s", fallback);
    size_t length = strlen(key);
    const char *end, *word = command_line;
    while ((word = next_word(word, &end))) {
        if ((size_t)(end - word) > length && !strncmp(word, key, length) && word[length] == '=')
            snprintf(value, (size_t)capacity, "%.*s", (int)(end - word - (long)length - 1), word + length + 1);
        word = end;
    }
}

int kernel_flag(const char *flag) {
    const char *end, *word = command_line;
    int found = 0;
    while ((word = next_word(word, &end))) {
        if ((size_t)(end - word) == strlen(flag) && !strncmp(word, flag, strlen(flag))) found = 1;
        word = end;
    }
    return found;
}

// Frees the memory of files the initramfs no longer needs. Best effort: what stays only costs memory.
static void forget_tree(const char *path) {
    DIR *directory = opendir(path);
    if (!directory) return;
    struct dirent *entry;
    while ((entry = readdir(directory))) {
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")) continue;
        char child[1024];
        if (snprintf(child, sizeof child, "%s/%s", path, entry->d_name) >= (int)sizeof child) continue;
        if (unlink(child) && (errno == EISDIR || errno == EPERM)) forget_tree(child);
    }
    closedir(directory);
    rmdir(path);
}

static void mount_early(void) {
    mkdir("/proc", 0755);
    mkdir("/sys", 0755);
    mkdir("/dev", 0755);
    mkdir("/root-of-image", 0755);
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    mount("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    mount("devtmpfs", "/dev", "devtmpfs", MS_NOSUID, "mode=0755");
    int console = open("/dev/console", O_RDWR);
    if (console >= 0) {
        for (int fd = 0; fd < 3; fd++) dup2(console, fd);
        if (console > 2) close(console);
    }
}

// Waits until the device node is there. By the clock: under emulation a short sleep may take many times its length.
static int wait_for(const char *device) {
    struct timespec now, end, pause = {.tv_nsec = 1000 * 1000};
    clock_gettime(CLOCK_MONOTONIC, &end);
    end.tv_sec += ROOT_WAIT_SECS;
    while (access(device, F_OK)) {
        clock_gettime(CLOCK_MONOTONIC, &now);
        if (now.tv_sec > end.tv_sec) return 0;
        nanosleep(&pause, NULL);
    }
    return 1;
}

// Mounts `device`, once it has appeared, at `target`. On failure says why in `reason` and returns -1.
static int mount_device(const char *device, const char *target, const char *type, unsigned long flags,
                        const char *options, char *reason, size_t capacity) {
    if (device[0] != '/') {
        snprintf(reason, capacity, "root=%s is not a device path such as /dev/vda", device);
        return -1;
    }
    if (!wait_for(device)) {
        snprintf(reason, capacity, "the root device %s did not appear within %d s (are its modules in the initrd?)",
                 device, ROOT_WAIT_SECS);
        return -1;
    }
    if (mount(device, target, type, flags, options)) {
        // A read-only ext4 whose journal was not written back refuses with EROFS.
        snprintf(reason, capacity, "cannot mount %s as %s: %s%s", device, type, strerror(errno),
                 errno == EROFS ? " (was it unmounted cleanly? e2fsck -p mends the file it was made from)" : "");
        return -1;
    }
    return 0;
}

// Mounts the root at /root-of-image. On failure says why in `reason` and returns -1.
static int mount_root(char *reason, size_t capacity) {
    char device[256], base[256], type[32], flags[256];
    kernel_argument("root", device, sizeof device, "/dev/vda");
    kernel_argument("noid.base", base, sizeof base, "");
    kernel_argument("rootfstype", type, sizeof type, "ext4");
    kernel_argument("rootflags", flags, sizeof flags, "");
    unsigned long readonly = kernel_flag("ro") ? MS_RDONLY : 0;
    if (base[0]) {
        if (mount_device(base, layers_base(), type, MS_RDONLY, flags, reason, capacity) ||
            mount_device(device, layers_top(), "ext4", 0, layers_top_options(device), reason, capacity) ||
            layers_mount("/root-of-image", readonly, reason, capacity))
            return -1;
    } else if (mount_device(device, "/root-of-image", type, readonly, flags, reason, capacity)) {
        return -1;
    }
    static const char *const moved[] = {"/dev", "/sys", "/proc"};
    for (int i = 0; i < 3; i++) {
        char target[64];
        snprintf(target, sizeof target, "/root-of-image%s", moved[i]);
        mkdir(target, 0755);
        if (mount(moved[i], target, NULL, MS_MOVE, NULL)) {
            snprintf(reason, capacity, "the root on %s has no directory %s and none can be made: %s", device, moved[i],
                     strerror(errno));
            return -1;
        }
    }
    return 0;
}

// Starts the agent's keeper where no init will take it for one of its own: own session, adopted by pid 1.
static void start_beside(void) {
    pid_t first = fork();
    if (first == 0) {
        setsid();
        if (fork() == 0) keeper_become();
        _exit(0);
    }
    if (first < 0) say("the agent cannot be started: %s", strerror(errno));
    if (first > 0) waitpid(first, NULL, 0);
}

// Nothing to run: say so on the console and to whoever asks, and wait to be told to power off.
static _Noreturn void stay_without_root(const char *reason) {
    say("no root file system: %s", reason);
    char *options[] = {"--no-root", (char *)reason, NULL};
    keeper_run(options);
}

static int runnable(const char *path) {
    struct stat status;
    return stat(path, &status) == 0 && S_ISREG(status.st_mode) && (status.st_mode & 0111);
}

_Noreturn void boot(void) {
    umask(022);
    mount_early();
    read_command_line();
    load_modules();
    char reason[400];
    if (mount_root(reason, sizeof reason)) stay_without_root(reason);
    forget_tree("/noid");
    forget_tree("/lib");
    if (chdir("/root-of-image") || mount(".", "/", NULL, MS_MOVE, NULL) || chroot(".") || chdir("/")) {
        snprintf(reason, sizeof reason, "cannot make the mounted root the root: %s", strerror(errno));
        stay_without_root(reason);
    }
    char chosen[256];
    kernel_argument("init", chosen, sizeof chosen, "");
    const char *const candidates[] = {chosen, "/sbin/init", "/lib/systemd/systemd", "/etc/init", "/bin/init"};
    const char *init = NULL;
    for (int i = 0; i < 5 && !init; i++)
        if (candidates[i][0] && runnable(candidates[i])) init = candidates[i];
    if (chosen[0] && init != chosen) say("init=%s is not a program in the image", chosen);
    if (init) {
        start_beside();
        execl(init, init, (char *)NULL);
        say("cannot run %s: %s; going on without an init", init, strerror(errno));
    }
    minimal_init(!init);
}
