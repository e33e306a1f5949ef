// Kernel modules: every file of /noid/modules in name order, else the ones we need by way of modules.dep.
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "boot.h"
#include "say.h"

enum { COMPRESSED_FILE = 4 }; // MODULE_INIT_COMPRESSED_FILE: the kernel unpacks .xz, .zst and .gz itself

// What reaches the disk, the host, the network and the power button; built in or absent on many kernels.
static const char *const wanted[] = {
    "virtio_mmio", "virtio_pci", "virtio_blk", "ext4",         "virtio_console", "virtio_rng",
    "virtio_net",  "vsock",      "vmw_vsock_virtio_transport", "virtio_balloon", "button",
    "evdev",       "af_packet",  "overlay",
};

static void load_module(const char *path) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        if (errno != ENOENT) say("cannot read module %s: %s", path, strerror(errno));
        return;
    }
    const char *suffix = strrchr(path, '.');
    int flags = suffix && strcmp(suffix, ".ko") ? COMPRESSED_FILE : 0;
    // ENODEV: the hardware it drives is not there. EEXIST: built in or loaded.
    if (syscall(SYS_finit_module, fd, "", flags) && errno != EEXIST && errno != ENODEV)
        say("cannot load module %s: %s", path, strerror(errno));
    close(fd);
}

static int by_name(const struct dirent **a, const struct dirent **b) { return strcmp((*a)->d_name, (*b)->d_name); }

static int is_module(const struct dirent *entry) { return strstr(entry->d_name, ".ko") != NULL; }

static int load_directory(const char *directory) {
    struct dirent **entries;
    int n = scandir(directory, &entries, is_module, by_name);
    if (n < 0) return -1;
    for (int i = 0; i < n; i++) {
        char path[512];
        if (snprintf(path, sizeof path, "%s/%s", directory, entries[i]->d_name) < (int)sizeof path) load_module(path);
        free(entries[i]);
    }
    free(entries);
    return 0;
}

// True if the file `path` (up to `length`) is the module `name`: `-` and `_` are one, suffixes do not count.
static int names_module(const char *path, size_t length, const char *name) {
    size_t start = length;
    while (start > 0 && path[start - 1] != '/') start--;
    size_t i = 0;
    for (; name[i] && start + i < length; i++)
        if (path[start + i] != name[i] && !(path[start + i] == '-' && name[i] == '_')) return 0;
    return !name[i] && length - start - i >= 3 && !strncmp(path + start + i, ".ko", 3);
}

// `line` is "module: dependency dependency ...", dependencies listed nearest first, so they are loaded from the end.
static void load_line(const char *base, char *line) {
    char *colon = strchr(line, ':'), *words[64];
    int n = 0;
    *colon = 0;
    words[n++] = line;
    for (char *word = strtok(colon + 1, " \t"); word && n < 64; word = strtok(NULL, " \t")) words[n++] = word;
    while (n--) {
        char path[512];
        if (snprintf(path, sizeof path, "%s/%s", base, words[n]) < (int)sizeof path) load_module(path);
    }
}

static void load_from_dependencies(const char *base) {
    char path[512];
    snprintf(path, sizeof path, "%s/modules.dep", base);
    FILE *file = fopen(path, "re");
    if (!file) return; // a kernel with everything built in
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        rewind(file);
        char *line = NULL;
        size_t capacity = 0;
        while (getline(&line, &capacity, file) > 0) {
            line[strcspn(line, "\n")] = 0;
            char *colon = strchr(line, ':');
            if (colon && names_module(line, (size_t)(colon - line), wanted[i])) {
                load_line(base, line);
                break;
            }
        }
        free(line);
    }
    fclose(file);
}

void load_modules(void) {
    if (load_directory("/noid/modules") == 0) return;
    struct utsname kernel;
    uname(&kernel);
    char base[256];
    snprintf(base, sizeof base, "/lib/modules/%s", kernel.release);
    load_from_dependencies(base);
}
