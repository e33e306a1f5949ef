// Writes a directory, or one file, as a tar stream to standard output.
//
// Memory is bounded: one open directory and 8 KiB for each level, one sparse map, and a table of hard links; files whose
// other names no longer fit the table are written twice, which loses the link and no data.
#include "tar_out.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "pipes.h"
#include "tar.h"

enum { DEPTH_MAX = 256, DIRENTS_BYTES = 8192, LINKS_MAX = 16384, LINK_BYTES_MAX = 4 << 20 };

struct link {
    dev_t device;
    ino_t inode;
    char *path;
};

struct segment {
    uint64_t at, length;
};

static struct walk {
    char path[TAR_PATH_MAX];
    size_t length;
    int depth;
    dev_t device; // of the directory we are in
    bool *partial;
    struct link *links; // open addressing; NULL until the first file with several names
    size_t link_bytes, link_count;
    struct tar_entry entry;
    uint8_t headers[TAR_HEADERS_MAX];
    uint8_t zeros[64 * 1024];
} walk;

static bool leave_out(const char *why) {
    char text[TAR_PATH_MAX + 256];
    *walk.partial = true;
    snprintf(text, sizeof text, "noid: %s: %s", walk.path, why);
    return give(walk.headers, tar_write_comment(text, walk.headers));
}

static bool put_headers(void) { return give(walk.headers, tar_write_headers(&walk.entry, walk.headers)); }

static bool put_zeros(uint64_t length) {
    for (uint64_t piece; length; length -= piece) {
        piece = length < sizeof walk.zeros ? length : sizeof walk.zeros;
        if (!give(walk.zeros, (size_t)piece)) return false;
    }
    return true;
}

static void begin_entry(char type, const struct stat *status, const char *suffix) {
    struct tar_entry *entry = &walk.entry;
    entry->type = type;
    snprintf(entry->path, sizeof entry->path, "%s%s", walk.path, suffix);
    entry->link[0] = 0;
    entry->mode = status->st_mode & 07777;
    entry->uid = status->st_uid;
    entry->gid = status->st_gid;
    entry->mtime = status->st_mtim.tv_sec;
    entry->nanos = (uint32_t)status->st_mtim.tv_nsec;
    entry->size = 0;
    entry->sparse = false;
}

// --- hard links --------------------------------------------------------------------------------------------------

// Returns the name under which this file was written already, or NULL; then it is remembered under its name now.
static const char *earlier_name(const struct stat *status) {
    if (status->st_nlink < 2) return NULL;
    if (!walk.links && !(walk.links = calloc(2 * LINKS_MAX, sizeof *walk.links))) return NULL;
    size_t slot = (size_t)((status->st_ino * 0x9e3779b97f4a7c15u) >> 40) % (2 * LINKS_MAX);
    for (; walk.links[slot].path; slot = (slot + 1) % (2 * LINKS_MAX))
        if (walk.links[slot].inode == status->st_ino && walk.links[slot].device == status->st_dev)
            return walk.links[slot].path;
    if (walk.link_count == LINKS_MAX || walk.link_bytes + walk.length + 1 > LINK_BYTES_MAX) return NULL;
    char *path = strdup(walk.path);
    if (!path) return NULL;
    walk.links[slot] = (struct link){.device = status->st_dev, .inode = status->st_ino, .path = path};
    walk.link_bytes += walk.length + 1;
    walk.link_count++;
    return NULL;
}

// --- files -------------------------------------------------------------------------------------------------------

// Finds where the data of a sparse file is. What has more pieces than fit is one piece from there to its end. The last
// segment ends at the file's end, as GNU tar expects. 0 if the file is not sparse, or does not tell.
static size_t find_segments(int fd, const struct stat *status, struct segment **found) {
    uint64_t size = (uint64_t)status->st_size;
    if ((uint64_t)status->st_blocks * 512 >= size) return 0;
    struct segment *segments = malloc(TAR_SEGMENTS_MAX * sizeof *segments);
    if (!segments) return 0;
    size_t count = 0;
    off_t at = 0;
    while ((at = lseek(fd, at, SEEK_DATA)) >= 0 && (uint64_t)at < size) {
        off_t hole = count == TAR_SEGMENTS_MAX - 2 ? -1 : lseek(fd, at, SEEK_HOLE);
        uint64_t end = hole < 0 || (uint64_t)hole > size ? size : (uint64_t)hole;
        segments[count++] = (struct segment){.at = (uint64_t)at, .length = end - (uint64_t)at};
        if (end == size) break;
        at = (off_t)end;
    }
    if (!count || segments[count - 1].at + segments[count - 1].length < size)
        segments[count++] = (struct segment){.at = size, .length = 0};
    *found = segments;
    return count;
}

// Data of one piece; what the file no longer has is filled with zeros, because its size has been said.
static bool put_data(int fd, uint64_t length, const char **trouble) {
    uint64_t moved;
    int error;
    if (!give_file(fd, length, &moved, &error)) return false;
    if (moved == length) return true;
    *trouble = error ? strerror(error) : "it shrank while it was read; the rest is zeros";
    return put_zeros(length - moved);
}

static bool put_sparse(int fd, const struct stat *status, struct segment *segments, size_t count,
                       const char **trouble) {
    size_t room = 24 + count * 42;
    char *map = malloc(room + TAR_BLOCK);
    if (!map) return false;
    int length = sprintf(map, "%zu\n", count);
    uint64_t data = 0;
    for (size_t i = 0; i < count; i++) {
        length += sprintf(map + length, "%llu\n%llu\n", (unsigned long long)segments[i].at,
                          (unsigned long long)segments[i].length);
        data += segments[i].length;
    }
    size_t padding = tar_padding((uint64_t)length);
    memset(map + length, 0, padding);
    walk.entry.sparse = true;
    walk.entry.real_size = (uint64_t)status->st_size;
    walk.entry.size = (uint64_t)length + padding + data;
    bool ok = put_headers() && give(map, (size_t)length + padding);
    free(map);
    for (size_t i = 0; ok && i < count; i++) {
        if (segments[i].length && lseek(fd, (off_t)segments[i].at, SEEK_SET) < 0) *trouble = strerror(errno);
        ok = put_data(fd, segments[i].length, trouble);
    }
    return ok && put_zeros(tar_padding(data));
}

static bool put_file(int fd, const struct stat *status) {
    const char *trouble = NULL;
    struct segment *segments = NULL;
    begin_entry(TAR_FILE, status, "");
    size_t count = find_segments(fd, status, &segments);
    bool ok;
    if (count) {
        ok = put_sparse(fd, status, segments, count, &trouble);
    } else {
        walk.entry.size = (uint64_t)status->st_size;
        ok = lseek(fd, 0, SEEK_SET) == 0 && put_headers() && put_data(fd, walk.entry.size, &trouble) &&
             put_zeros(tar_padding(walk.entry.size));
    }
    free(segments);
    return ok && (!trouble || leave_out(trouble));
}

// --- directories -------------------------------------------------------------------------------------------------

static bool put_directory(int fd, const struct stat *status);

static bool put_link(int directory, const char *name, const struct stat *status) {
    begin_entry(TAR_SYMLINK, status, "");
    ssize_t length = readlinkat(directory, name, walk.entry.link, sizeof walk.entry.link);
    if (length < 0) return leave_out(strerror(errno));
    if ((size_t)length >= sizeof walk.entry.link) return leave_out("the link's target is too long");
    walk.entry.link[length] = 0;
    return put_headers();
}

// Walking into /proc would never end, and what is there are no files.
static bool is_made_up(int fd) {
    struct statfs system;
    if (fstatfs(fd, &system)) return false;
    switch ((unsigned long)system.f_type) {
    case 0x9fa0: // proc
    case 0x62656572: // sysfs
    case 0x63677270: // cgroup2
    case 0x27e0eb: // cgroup
    case 0x1cd1: // devpts
    case 0x64626720: // debugfs
    case 0x74726163: // tracefs
    case 0x73636673: // securityfs
    case 0x62656570: // configfs
    case 0xcafe4a11: // bpf
    case 0x6165676c: // pstore
    case 0xde5e81e4: // efivarfs
        return true;
    default:
        return false;
    }
}

static bool put_child(int directory, const char *name) {
    struct stat status;
    if (fstatat(directory, name, &status, AT_SYMLINK_NOFOLLOW))
        return errno == ENOENT || leave_out(strerror(errno)); // gone since we read its name
    if (!S_ISDIR(status.st_mode)) {
        const char *earlier = earlier_name(&status);
        if (earlier) {
            begin_entry(TAR_HARD_LINK, &status, "");
            snprintf(walk.entry.link, sizeof walk.entry.link, "%s", earlier);
            return put_headers();
        }
    }
    if (S_ISLNK(status.st_mode)) return put_link(directory, name, &status);
    if (!S_ISREG(status.st_mode) && !S_ISDIR(status.st_mode))
        return leave_out(S_ISSOCK(status.st_mode)   ? "a socket"
                         : S_ISFIFO(status.st_mode) ? "a pipe"
                                                    : "a device");
    int fd = openat(directory, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC | O_NOCTTY);
    if (fd < 0) return errno == ENOENT || leave_out(strerror(errno));
    struct stat opened;
    bool ok;
    if (fstat(fd, &opened) || (opened.st_mode & S_IFMT) != (status.st_mode & S_IFMT))
        ok = leave_out("it was replaced while it was read");
    else if (S_ISREG(opened.st_mode)) ok = put_file(fd, &opened);
    else if (opened.st_dev != walk.device && is_made_up(fd)) ok = leave_out("a file system the kernel makes up");
    else if (walk.depth == DEPTH_MAX) ok = leave_out("too many directories below each other");
    else ok = put_directory(fd, &opened);
    close(fd);
    return ok;
}

struct kernel_dirent {
    uint64_t inode;
    int64_t offset;
    uint16_t length;
    uint8_t type;
    char name[];
};

static bool put_directory(int fd, const struct stat *status) {
    begin_entry(TAR_DIRECTORY, status, "/");
    if (!put_headers()) return false;
    size_t parent = walk.length;
    dev_t parent_device = walk.device;
    bool top = parent == 1 && walk.path[0] == '.';
    uint8_t *entries = malloc(DIRENTS_BYTES);
    if (!entries) return leave_out(strerror(ENOMEM));
    walk.device = status->st_dev;
    walk.depth++;
    bool ok = true;
    long got = 0;
    while (ok && (got = syscall(SYS_getdents64, fd, entries, DIRENTS_BYTES)) > 0) {
        for (long at = 0; ok && at < got;) {
            const struct kernel_dirent *entry = (const void *)(entries + at);
            at += entry->length;
            if (!strcmp(entry->name, ".") || !strcmp(entry->name, "..")) continue;
            size_t begin = top ? 0 : parent, name = strlen(entry->name);
            if (begin + 1 + name + 1 >= sizeof walk.path) { // and one for a directory's last slash
                ok = leave_out("the paths below it are too long");
                break;
            }
            if (!top) walk.path[begin++] = '/';
            memcpy(walk.path + begin, entry->name, name + 1);
            walk.length = begin + name;
            ok = put_child(fd, entry->name);
            walk.length = parent;
            if (top) walk.path[0] = '.';
            walk.path[parent] = 0;
        }
    }
    int error = errno;
    free(entries);
    walk.depth--;
    walk.device = parent_device;
    return ok && (got >= 0 || leave_out(strerror(error)));
}

bool tar_out(int fd, const char *name, bool *partial) {
    struct stat status;
    static const uint8_t end[2 * TAR_BLOCK];
    walk.partial = partial;
    walk.length = (size_t)snprintf(walk.path, sizeof walk.path, "%s", name);
    bool ok = fstat(fd, &status) == 0 && walk.length < sizeof walk.path - 2;
    ok = ok && (S_ISDIR(status.st_mode) ? put_directory(fd, &status) : put_file(fd, &status));
    close(fd);
    return ok && give(end, sizeof end) && give_now();
}
