// The builtin copy-in: writes a file that appears whole or not at all, or everything in a tar stream.
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "pipes.h"
#include "sha256.h"
#include "tar.h"
#include "tar_in.h"
#include "transfer.h"

static const char suffix[] = ".noid-part";

static int refuse(const char *what, int error) {
    give_line("error %d %s: %s", error, what, strerror(error));
    return TRANSFER_FAILED;
}

// --- one file ----------------------------------------------------------------------------------------------------

struct target {
    char path[PATH_MAX]; // of the file itself, links resolved
    char part[PATH_MAX + sizeof suffix];
    bool exists;
    struct stat status;
};

// A link that is there is written through, as cp does. Directories and devices are refused.
static int find_target(const char *path, struct target *target) {
    target->exists = stat(path, &target->status) == 0;
    if (!target->exists && errno != ENOENT) return errno;
    if (target->exists && S_ISDIR(target->status.st_mode)) return EISDIR;
    if (target->exists && !S_ISREG(target->status.st_mode)) return ENODEV;
    if (strlen(path) >= sizeof target->path) return ENAMETOOLONG;
    if (target->exists && !realpath(path, target->path)) return errno;
    if (!target->exists) strcpy(target->path, path);
    snprintf(target->part, sizeof target->part, "%s%s", target->path, suffix);
    return 0;
}

// Begins anew, or goes on where an earlier transfer broke off.
static int open_part(const struct target *target, uint64_t offset) {
    struct stat status;
    if (!offset) {
        if (unlink(target->part) && errno != ENOENT) return -1;
        return open(target->part, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    }
    int fd = open(target->part, O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0) return -1;
    int error = fstat(fd, &status) ? errno : !S_ISREG(status.st_mode) || (uint64_t)status.st_size < offset ? ESTALE : 0;
    if (!error && (ftruncate(fd, (off_t)offset) || lseek(fd, (off_t)offset, SEEK_SET) < 0)) error = errno;
    if (!error) return fd;
    close(fd);
    errno = error;
    return -1;
}

static bool is_what_was_sent(int fd, const char *wanted) {
    static uint8_t piece[64 * 1024];
    struct sha256 sum;
    char hex[65];
    sha256_begin(&sum);
    if (lseek(fd, 0, SEEK_SET)) return false;
    for (ssize_t got; (got = read(fd, piece, sizeof piece)) != 0;) {
        if (got < 0) return false;
        sha256_add(&sum, piece, (size_t)got);
    }
    sha256_end(&sum, hex);
    return !strcmp(hex, wanted);
}

static int dress(int fd, const struct target *target, const char *mode, const char *mtime) {
    if (target->exists && geteuid() == 0 && fchown(fd, target->status.st_uid, target->status.st_gid)) return errno;
    mode_t bits = target->exists ? target->status.st_mode & 07777 : 0644;
    if (strcmp(mode, "-")) bits = (mode_t)strtoul(mode, NULL, 8) & 07777;
    if (fchmod(fd, bits)) return errno;
    if (!strcmp(mtime, "-")) return 0;
    long long nanos = strtoll(mtime, NULL, 10), seconds = nanos / 1000000000;
    nanos %= 1000000000;
    if (nanos < 0) seconds--, nanos += 1000000000;
    struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}, {.tv_sec = (time_t)seconds, .tv_nsec = (long)nanos}};
    return futimens(fd, times) ? errno : 0;
}

// The data is followed by one byte, "c": the host has seen all of it and it is what was meant. Until then, whatever
// ends us leaves the part, from which a later transfer can go on.
static int copy_file_in(char **argv) {
    static struct target target;
    const char *path = argv[2], *mode = argv[5], *mtime = argv[6], *sum = argv[7];
    uint64_t offset, size, moved = 0;
    bool to_file;
    if (!tar_read_decimal(argv[3], strlen(argv[3]), &offset) || !tar_read_decimal(argv[4], strlen(argv[4]), &size) ||
        offset > size)
        return refuse(path, EINVAL);
    int error = find_target(path, &target);
    if (error) return refuse(path, error);
    int fd = open_part(&target, offset);
    if (fd < 0) return refuse(target.part, errno);
    if (!give_line("ready")) return TRANSFER_FAILED;
    if (!take_file(fd, size - offset, &moved, &to_file)) {
        error = errno;
        give_line("error %d %s: %s. %llu bytes of %llu are in it", error, target.part,
                  to_file ? strerror(error) : "the transfer broke off", (unsigned long long)(offset + moved),
                  (unsigned long long)size);
        return TRANSFER_FAILED;
    }
    char commit = 0;
    if (!take(&commit, 1) || commit != 'c') return refuse(target.part, ECANCELED);
    if (offset && !is_what_was_sent(fd, sum)) {
        give_line("error %d %s: what an earlier transfer left does not fit: the sum of the whole is another", EBADMSG,
                  target.part);
        return TRANSFER_FAILED;
    }
    error = dress(fd, &target, mode, mtime);
    if (!error && rename(target.part, target.path)) error = errno;
    if (error) return refuse(target.path, error);
    give_line("done %llu 1", (unsigned long long)size);
    return TRANSFER_DONE;
}

// --- a tree ------------------------------------------------------------------------------------------------------

static int copy_tree_in(char **argv) {
    const char *path = argv[2];
    static struct tar_in_result result;
    if (mkdir(path, 0755) && errno != EEXIST) return refuse(path, errno);
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return refuse(path, errno);
    if (!give_line("ready")) return TRANSFER_FAILED;
    if (!tar_in(fd, !strcmp(argv[3], "owners"), &result)) {
        give_line("error %d %s. %llu entries with %llu bytes were written before", result.error, result.problem,
                  (unsigned long long)result.entries, (unsigned long long)result.bytes);
        return TRANSFER_FAILED;
    }
    give_line("done %llu %llu", (unsigned long long)result.bytes, (unsigned long long)result.entries);
    return result.partial ? TRANSFER_PARTIAL : TRANSFER_DONE;
}

int copy_in(int argc, char **argv) {
    pipes_prepare();
    if (argc == 8 && !strcmp(argv[1], "file")) return copy_file_in(argv);
    if (argc == 4 && !strcmp(argv[1], "tar")) return copy_tree_in(argv);
    return refuse("copy-in", EINVAL);
}
