// The builtin copy-out: says what a path is, and gives a file's bytes, its sum, or a tar stream of all below it.
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "pipes.h"
#include "sha256.h"
#include "tar.h"
#include "tar_out.h"
#include "transfer.h"

static int refuse(const char *path, int error) {
    give_line("error %d %s: %s", error, path, strerror(error));
    return TRANSFER_FAILED;
}

static const char *kind_of(mode_t mode) { return S_ISREG(mode) ? "file" : S_ISDIR(mode) ? "directory" : "other"; }

// Since 1970, in nanoseconds. What 64 bits do not reach, before 1677 and after 2262, is the nearest they do.
static int64_t nanoseconds(const struct timespec *time) {
    int64_t nanos;
    if (__builtin_mul_overflow((int64_t)time->tv_sec, (int64_t)1000000000, &nanos) ||
        __builtin_add_overflow(nanos, (int64_t)time->tv_nsec, &nanos))
        return time->tv_sec < 0 ? INT64_MIN : INT64_MAX;
    return nanos;
}

// The first line: kind, size, allocated bytes, mode, mtime in nanoseconds, and what identifies this state of the file.
static bool put_head(const struct stat *status, const char *sum) {
    return give_line("%s %llu %llu %o %lld %llx-%llx-%llx-%lx-%llx %s", kind_of(status->st_mode),
                     (unsigned long long)status->st_size, (unsigned long long)status->st_blocks * 512,
                     status->st_mode & 07777, (long long)nanoseconds(&status->st_mtim),
                     (unsigned long long)status->st_dev, (unsigned long long)status->st_ino,
                     (unsigned long long)status->st_mtim.tv_sec, (unsigned long)status->st_mtim.tv_nsec,
                     (unsigned long long)status->st_size, sum);
}

static int give_sum(int fd, const char *path, const struct stat *status, uint64_t length) {
    static uint8_t piece[64 * 1024];
    struct sha256 sum;
    char hex[65];
    sha256_begin(&sum);
    while (length) {
        ssize_t got = read(fd, piece, length < sizeof piece ? (size_t)length : sizeof piece);
        if (got < 0) return refuse(path, errno);
        if (!got) break;
        sha256_add(&sum, piece, (size_t)got);
        length -= (uint64_t)got;
    }
    sha256_end(&sum, hex);
    return put_head(status, hex) ? TRANSFER_DONE : TRANSFER_FAILED;
}

static const char *last_name(char *path) {
    size_t length = strlen(path);
    while (length > 1 && path[length - 1] == '/') path[--length] = 0;
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

int copy_out(int argc, char **argv) {
    uint64_t offset = 0, length = INT64_MAX, moved;
    int trouble;
    pipes_prepare();
    if (argc != 5 || !tar_read_decimal(argv[3], strlen(argv[3]), &offset) ||
        !tar_read_decimal(argv[4], strlen(argv[4]), &length))
        return refuse("copy-out", EINVAL);
    const char *form = argv[1], *path = argv[2];
    struct stat status;
    if (!strcmp(form, "look"))
        return stat(path, &status)       ? refuse(path, errno)
               : put_head(&status, "-") ? TRANSFER_DONE
                                         : TRANSFER_FAILED;
    // Looked at before it is opened: opening a device can have effects.
    if (stat(path, &status)) return refuse(path, errno);
    if (!S_ISREG(status.st_mode) && !S_ISDIR(status.st_mode)) return refuse(path, ENODEV);
    int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC | O_NOCTTY);
    if (fd < 0 || fstat(fd, &status)) return refuse(path, errno);
    if (!strcmp(form, "tar")) {
        bool partial = false;
        const char *name = S_ISDIR(status.st_mode) ? "." : last_name(argv[2]);
        if (!put_head(&status, "-") || !tar_out(fd, name, &partial)) return TRANSFER_FAILED;
        return partial ? TRANSFER_PARTIAL : TRANSFER_DONE;
    }
    if (S_ISDIR(status.st_mode)) return refuse(path, EISDIR);
    if (!strcmp(form, "sum")) return give_sum(fd, path, &status, length);
    if (strcmp(form, "file")) return refuse(form, EINVAL);
    // Behind the end there is nothing, also where a file system cannot reach.
    if (offset < (uint64_t)status.st_size && lseek(fd, (off_t)offset, SEEK_SET) < 0) return refuse(path, errno);
    // Said before the data: its reader knows how much to expect, and what came short has failed.
    if (!put_head(&status, "-")) return TRANSFER_FAILED;
    uint64_t rest = offset < (uint64_t)status.st_size ? (uint64_t)status.st_size - offset : 0;
    bool ok = give_file(fd, length < rest ? length : rest, &moved, &trouble) && give_now();
    return ok && !trouble && moved == (length < rest ? length : rest) ? TRANSFER_DONE : TRANSFER_FAILED;
}
