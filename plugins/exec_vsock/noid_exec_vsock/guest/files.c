// Small files of the guest's identity: read, replaced, or changed in place.
#include "files.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

void read_line(const char *path, char *line, size_t capacity) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd >= 0 ? read(fd, line, capacity - 1) : 0;
    if (fd >= 0) close(fd);
    line[n > 0 ? n : 0] = 0;
    line[strcspn(line, "\n")] = 0;
}

static int write_whole(const char *path, int flags, mode_t mode, const char *data, size_t length) {
    int fd = open(path, O_WRONLY | O_CLOEXEC | flags, mode);
    if (fd < 0) return -1;
    int failed = write(fd, data, length) != (ssize_t)length || fchmod(fd, mode);
    int error = errno;
    close(fd);
    errno = error;
    return failed ? -1 : 0;
}

int replace_file(const char *path, mode_t mode, const char *data, size_t length) {
    char fresh[128];
    snprintf(fresh, sizeof fresh, "%.100s.noid", path);
    unlink(fresh);
    if (write_whole(fresh, O_CREAT | O_EXCL, mode, data, length) == 0 && rename(fresh, path) == 0) return 0;
    int error = errno;
    unlink(fresh);
    errno = error;
    return error == EBUSY ? write_whole(path, O_TRUNC, mode, data, length) : -1;
}

int update_file(const char *path, mode_t mode, const char *data, size_t length) {
    char padded[512];
    struct stat status;
    int fd = open(path, O_WRONLY | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0) return replace_file(path, mode, data, length);
    size_t size = fstat(fd, &status) == 0 && S_ISREG(status.st_mode) ? (size_t)status.st_size : sizeof padded;
    bool in_place = length < sizeof padded && size < sizeof padded;
    if (in_place) {
        size_t whole = size > length ? size : length;
        memset(padded, '\n', whole);
        memcpy(padded, data, length);
        in_place = pwrite(fd, padded, whole, 0) == (ssize_t)whole;
        if (in_place && size > length) in_place = ftruncate(fd, (off_t)length) == 0;
    }
    close(fd);
    return in_place ? 0 : replace_file(path, mode, data, length);
}
