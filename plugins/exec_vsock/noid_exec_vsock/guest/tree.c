// A directory that is written into, entered component by component so that nothing ever leads out of it.
//
// Every component is opened by itself, relative to its parent's descriptor and without following links, and ".." is
// refused before: what openat2(RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS) does, on every kernel. The directories from the
// root to where we are stay open; archives list trees in order, so most entries open nothing.
#include "tree.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { DEPTH_MAX = 256, NAME_BYTES = 256 };

struct level {
    int fd;
    char name[NAME_BYTES];
    struct attributes attributes;
};

static struct level levels[DEPTH_MAX + 1];
static int depth; // of where we are; levels[0] is the root
static bool set_owners;
bool tree_partial;

void tree_begin(int fd, bool owners) {
    levels[0] = (struct level){.fd = fd};
    depth = 0;
    set_owners = owners && geteuid() == 0;
    tree_partial = false;
}

bool tree_owners(void) { return set_owners; }

bool tree_dress(int fd, const struct attributes *attributes) {
    struct timespec times[2] = {{.tv_nsec = UTIME_OMIT},
                                {.tv_sec = (time_t)attributes->mtime, .tv_nsec = attributes->nanos}};
    // The owner first: changing it clears set-user-id bits.
    if (set_owners && fchown(fd, attributes->uid, attributes->gid)) return false;
    if (fchmod(fd, attributes->mode)) return false;
    return futimens(fd, times) == 0;
}

static void leave_level(void) {
    struct level *level = &levels[depth];
    if (level->attributes.known && !tree_dress(level->fd, &level->attributes)) {
        tree_partial = true;
        dprintf(2, "%s: %s\n", depth ? level->name : ".", strerror(errno));
    }
    close(level->fd);
    level->fd = -1;
    depth--;
}

bool tree_end(void) {
    while (depth >= 0) leave_level();
    return !tree_partial;
}

const char *tree_check(char *path) {
    char *into = path;
    if (*path == '/') return "an absolute path";
    for (char *at = path; *at;) {
        size_t length = strcspn(at, "/");
        bool dots = length == 2 && at[0] == '.' && at[1] == '.';
        if (dots) return "a path that leads out of the tree";
        if (length >= NAME_BYTES) return "a name is too long";
        char *next = at + length + (at[length] == '/');
        if (length && !(length == 1 && *at == '.')) {
            if (into != path) *into++ = '/';
            memmove(into, at, length);
            into += length;
        }
        at = next;
    }
    *into = 0;
    return NULL;
}

static int open_below(int fd, const char *name) {
    int found = openat(fd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (found < 0 && errno == ENOTDIR) {
        struct stat status;
        if (!fstatat(fd, name, &status, AT_SYMLINK_NOFOLLOW)) errno = S_ISLNK(status.st_mode) ? ELOOP : ENOTDIR;
    }
    return found;
}

// Enters one level, making it if it is missing.
static bool enter_level(const char *name, size_t length) {
    if (depth == DEPTH_MAX) return errno = ENAMETOOLONG, false;
    struct level *level = &levels[depth + 1];
    memset(level, 0, sizeof *level);
    memcpy(level->name, name, length);
    level->fd = open_below(levels[depth].fd, level->name);
    if (level->fd < 0 && errno == ENOENT) {
        if (mkdirat(levels[depth].fd, level->name, 0755) && errno != EEXIST) return false;
        level->fd = open_below(levels[depth].fd, level->name);
    }
    if (level->fd < 0) return false;
    depth++;
    return true;
}

// Makes the first *length* bytes of *path*, a checked path, the place where we are.
static bool go_to(const char *path, size_t length) {
    int common = 0;
    size_t at = 0;
    while (at < length) {
        size_t name = strcspn(path + at, "/");
        if (common == depth || strlen(levels[common + 1].name) != name ||
            memcmp(levels[common + 1].name, path + at, name))
            break;
        common++;
        at += name + 1;
    }
    while (depth > common) leave_level();
    while (at < length) {
        size_t name = strcspn(path + at, "/");
        if (!enter_level(path + at, name)) return false;
        at += name + 1;
    }
    return true;
}

int tree_enter(const char *path, const char **last) {
    const char *slash = strrchr(path, '/');
    *last = slash ? slash + 1 : path;
    return go_to(path, slash ? (size_t)(slash - path) : 0) ? levels[depth].fd : -1;
}

bool tree_enter_directory(const char *path, const struct attributes *attributes) {
    if (!go_to(path, strlen(path))) return false;
    levels[depth].attributes = *attributes;
    return true;
}

int tree_find(const char *path, const char **last) {
    int fd = fcntl(levels[0].fd, F_DUPFD_CLOEXEC, 3);
    for (const char *slash; fd >= 0 && (slash = strchr(path, '/')); path = slash + 1) {
        char name[NAME_BYTES];
        memcpy(name, path, (size_t)(slash - path));
        name[slash - path] = 0;
        int below = open_below(fd, name);
        int error = errno;
        close(fd);
        errno = error;
        fd = below;
    }
    *last = path;
    return fd;
}
