// Puts a root together with overlayfs. In the upper file system: `upper` with what was written, `work` for the kernel.
#include "layers.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#define BASE "/layers/base"
#define TOP "/layers/top"

static const char *made(const char *path) {
    mkdir("/layers", 0700);
    mkdir(path, 0700);
    return path;
}

const char *layers_base(void) { return made(BASE); }
const char *layers_top(void) { return made(TOP); }

const char *layers_top_options(const char *device) {
    const char *name = strrchr(device, '/');
    char path[300], most[32] = "0";
    snprintf(path, sizeof path, "/sys/class/block/%s/queue/discard_max_bytes", name ? name + 1 : device);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd >= 0 ? read(fd, most, sizeof most - 1) : 0;
    if (fd >= 0) close(fd);
    return n > 0 && most[0] != '0' ? "noinit_itable,discard" : "noinit_itable";
}

// The root directory is the upper one's, so it gets owner and mode of the image's; at one instant, whatever happens.
static int make_upper(void) {
    struct stat root;
    if (!access(TOP "/upper", F_OK)) return 0;
    if (stat(BASE, &root) || (mkdir(TOP "/upper.new", 0700) && errno != EEXIST)) return -1;
    if (chown(TOP "/upper.new", root.st_uid, root.st_gid) || chmod(TOP "/upper.new", root.st_mode & 07777)) return -1;
    return rename(TOP "/upper.new", TOP "/upper");
}

int layers_mount(const char *target, unsigned long flags, char *reason, size_t capacity) {
    if (make_upper() || (mkdir(TOP "/work", 0700) && errno != EEXIST)) {
        snprintf(reason, capacity, "cannot prepare the disk that is written: %s", strerror(errno));
        return -1;
    }
    // Directories of the image can be renamed, hard links stay together, inode numbers stay what they are: as on one
    // disk. Kernels before 4.17 know less of it.
    static const char *const options[] = {
        "lowerdir=" BASE ",upperdir=" TOP "/upper,workdir=" TOP "/work,redirect_dir=on,index=on,xino=on",
        "lowerdir=" BASE ",upperdir=" TOP "/upper,workdir=" TOP "/work",
    };
    for (int i = 0; i < 2; i++) {
        if (!mount("overlay", target, "overlay", flags, options[i])) return 0;
        if (errno != EINVAL) break;
    }
    if (errno == ENODEV)
        snprintf(reason, capacity,
                 "this image has no overlayfs, which a disk in layers needs. Build or import the image again with a "
                 "kernel that has it, its modules too, or set storage = \"copy\" in server.toml [backends]");
    else
        snprintf(reason, capacity, "cannot put the two layers of the disk together: %s", strerror(errno));
    return -1;
}
