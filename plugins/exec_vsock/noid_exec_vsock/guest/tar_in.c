// Reads a tar stream from standard input into a directory.
//
// Whoever wrote the stream is not trusted: names stay below the directory (tree.c), links are never followed, devices
// are never made, and what is kept in memory is bounded. One bad entry is left out and told; a stream that is no tar,
// and a file system that is full, end everything.
#include "tar_in.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "pipes.h"
#include "tar.h"
#include "tree.h"

static struct tar_in_result *result;
static struct tar_entry entry;
static struct tar_extension extension;
static char temporary[64];

static bool stop(int error, const char *format, ...) __attribute__((format(printf, 2, 3)));

static bool stop(int error, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(result->problem, sizeof result->problem, format, arguments);
    va_end(arguments);
    result->error = error;
    return false;
}

static bool stream_ended(void) {
    if (errno == ENODATA) return stop(EBADMSG, "the stream ended in the middle of the archive");
    return stop(errno, "reading the stream: %s", strerror(errno));
}

// Leaves the entry out. Always true unless the trouble is everybody's.
static bool leave_out(int error, const char *why) {
    if (error == ENOSPC || error == EDQUOT || error == EIO || error == EROFS)
        return stop(error, "%s: %s", entry.path, why);
    result->partial = true;
    dprintf(2, "%.300s: %s\n", entry.path, why);
    return true;
}

static bool leave_out_errno(void) {
    int error = errno;
    return leave_out(error, error == ELOOP ? "a link is in its way, and links are not followed" : strerror(error));
}

static struct attributes attributes_of(void) {
    return (struct attributes){.known = true,
                               .mode = entry.mode,
                               .uid = (uid_t)entry.uid,
                               .gid = (gid_t)entry.gid,
                               .mtime = entry.mtime,
                               .nanos = entry.nanos};
}

// --- sparse files ------------------------------------------------------------------------------------------------

static bool take_map_number(uint64_t *left, uint64_t *used, uint64_t *value) {
    char digits[20];
    size_t length = 0;
    for (;; length++) {
        char byte;
        if (!*left) return stop(EBADMSG, "%s: a sparse file's map is longer than the file", entry.path);
        if (!take(&byte, 1)) return stream_ended();
        --*left, ++*used;
        if (byte == '\n') break;
        if (length == sizeof digits) return stop(EBADMSG, "%s: nonsense in a sparse file's map", entry.path);
        digits[length] = byte;
    }
    if (!tar_read_decimal(digits, length, value))
        return stop(EBADMSG, "%s: nonsense in a sparse file's map", entry.path);
    return true;
}

// Reads the map and the data behind it. A file that cannot be written is still read, so that the stream stays in step.
static bool take_sparse(int fd, int *error) {
    uint64_t left = entry.size, used = 0, count, end = 0;
    bool to_file;
    if (!take_map_number(&left, &used, &count)) return false;
    if (count > TAR_SEGMENTS_MAX) return stop(EBADMSG, "%s: a sparse file of %llu pieces", entry.path,
                                              (unsigned long long)count);
    uint64_t *map = malloc((size_t)count * 2 * sizeof *map + 1);
    if (!map) return stop(ENOMEM, "%s: %s", entry.path, strerror(ENOMEM));
    bool ok = true;
    for (size_t i = 0; ok && i < 2 * count; i++) ok = take_map_number(&left, &used, &map[i]);
    size_t padding = tar_padding(used);
    if (ok && padding > left) ok = stop(EBADMSG, "%s: a sparse file without its data", entry.path);
    if (ok && !drop(padding)) ok = stream_ended();
    left -= ok ? padding : 0;
    for (size_t i = 0; ok && i < count; i++) {
        uint64_t at = map[2 * i], length = map[2 * i + 1];
        if (at < end || length > left || at > entry.real_size || length > entry.real_size - at) {
            ok = stop(EBADMSG, "%s: a sparse file's map that does not fit the file", entry.path);
            break;
        }
        end = at + length;
        left -= length;
        if (!*error && lseek(fd, (off_t)at, SEEK_SET) < 0) *error = errno;
        uint64_t before = result->bytes;
        if (!*error && !take_file(fd, length, &result->bytes, &to_file)) {
            if (!to_file) ok = stream_ended();
            *error = errno;
        }
        if (ok && *error && !drop(length - (result->bytes - before))) ok = stream_ended();
    }
    free(map);
    if (ok && left) ok = stop(EBADMSG, "%s: a sparse file with too much data", entry.path);
    if (ok && !*error && ftruncate(fd, (off_t)entry.real_size)) *error = errno;
    return ok && (drop(tar_padding(entry.size)) || stream_ended());
}

// --- entries -----------------------------------------------------------------------------------------------------

static bool skip_data(void) { return drop(entry.size) && drop(tar_padding(entry.size)) ? true : stream_ended(); }

// Files, links and symlinks are made under a name of our own and then renamed over whatever has theirs.
static bool publish(int directory, const char *last) {
    if (renameat(directory, temporary, directory, last)) {
        int error = errno;
        unlinkat(directory, temporary, 0);
        errno = error;
        return leave_out_errno();
    }
    unlinkat(directory, temporary, 0); // it is still there if both were names of one file
    result->entries++;
    return true;
}

static bool take_data(int fd, int *error) {
    bool to_file;
    uint64_t before = result->bytes;
    if (entry.sparse) return take_sparse(fd, error);
    if (!*error && !take_file(fd, entry.size, &result->bytes, &to_file)) {
        if (!to_file) return stream_ended();
        *error = errno;
    }
    uint64_t left = entry.size - (result->bytes - before);
    return drop(left) && drop(tar_padding(entry.size)) ? true : stream_ended();
}

static bool make_file(void) {
    const char *last;
    int directory = tree_enter(entry.path, &last), error = 0;
    int fd = directory < 0 ? -1 : openat(directory, temporary, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd < 0) return leave_out_errno() && skip_data();
    bool ok = take_data(fd, &error);
    struct attributes attributes = attributes_of();
    if (ok && !error && !tree_dress(fd, &attributes)) error = errno;
    if (close(fd) && !error) error = errno;
    if (!ok || error) {
        unlinkat(directory, temporary, 0);
        return ok && leave_out(error, strerror(error));
    }
    return publish(directory, last);
}

static bool make_symlink(void) {
    const char *last;
    int directory = tree_enter(entry.path, &last);
    if (directory < 0 || symlinkat(entry.link, directory, temporary)) return leave_out_errno();
    struct attributes attributes = attributes_of();
    struct timespec times[2] = {{.tv_nsec = UTIME_OMIT},
                                {.tv_sec = (time_t)attributes.mtime, .tv_nsec = attributes.nanos}};
    // Neither matters enough to lose the link: its owner and time say nothing about what it points to.
    int refused = tree_owners() ? fchownat(directory, temporary, attributes.uid, attributes.gid, AT_SYMLINK_NOFOLLOW) : 0;
    if (utimensat(directory, temporary, times, AT_SYMLINK_NOFOLLOW) || refused) result->partial |= refused != 0;
    return publish(directory, last);
}

static bool make_hard_link(void) {
    const char *last, *other_last, *problem = tree_check(entry.link);
    if (problem) return leave_out(0, "a hard link to something outside the tree");
    int directory = tree_enter(entry.path, &last);
    if (directory < 0) return leave_out_errno();
    int other = tree_find(entry.link, &other_last);
    if (other < 0) return leave_out_errno();
    bool made = linkat(other, other_last, directory, temporary, 0) == 0;
    int error = errno;
    close(other);
    errno = error;
    return made ? publish(directory, last) : leave_out_errno();
}

static bool make_directory(void) {
    struct attributes attributes = attributes_of();
    if (!tree_enter_directory(entry.path, &attributes)) return leave_out_errno();
    result->entries++;
    return true;
}

static bool make_entry(void) {
    const char *problem = tree_check(entry.path);
    if (!problem && !entry.path[0] && entry.type != TAR_DIRECTORY) problem = "no name";
    if (!problem && entry.real_size > INT64_MAX) problem = "no file can be that large";
    if (problem) return leave_out(0, problem) && skip_data();
    switch (entry.type) {
    case TAR_FILE: return make_file();
    case TAR_DIRECTORY: return skip_data() && make_directory();
    case TAR_SYMLINK: return skip_data() && make_symlink();
    case TAR_HARD_LINK: return skip_data() && make_hard_link();
    case '3':
    case '4': return leave_out(0, "a device") && skip_data();
    case '6': return leave_out(0, "a pipe") && skip_data();
    default: return leave_out(0, "an entry of a kind that is not known here") && skip_data();
    }
}

// --- the stream --------------------------------------------------------------------------------------------------

// What our own `copy-out` could not read travels as comments, so that it is told where the archive ends up.
static void pass_on_comment(const uint8_t *records, size_t length) {
    static const char mark[] = " comment=noid: ";
    const uint8_t *found = memmem(records, length, mark, sizeof mark - 1);
    if (!found) return;
    const char *text = (const char *)found + sizeof mark - 1;
    size_t rest = length - (size_t)(text - (const char *)records);
    result->partial = true;
    dprintf(2, "%.*s\n", (int)strcspn(text, "\n") < (int)rest ? (int)strcspn(text, "\n") : (int)rest, text);
}

static bool take_extension(void) {
    static uint8_t body[TAR_EXTENSION_MAX + 1];
    size_t length = (size_t)entry.size;
    if (entry.size > TAR_EXTENSION_MAX) return stop(EBADMSG, "a header of %llu bytes", (unsigned long long)entry.size);
    if (!take(body, length) || !drop(tar_padding(length))) return stream_ended();
    body[length] = 0;
    bool ok = true;
    if (entry.type == TAR_PAX) {
        ok = tar_read_pax(body, length, &extension);
    } else if (entry.type == TAR_PAX_GLOBAL) {
        pass_on_comment(body, length);
    } else {
        size_t name = strlen((const char *)body);
        bool path = entry.type == TAR_GNU_NAME;
        ok = name && name < TAR_PATH_MAX;
        if (ok) memcpy(path ? extension.path : extension.link, body, name + 1);
        *(path ? &extension.has_path : &extension.has_link) = ok;
    }
    return ok || stop(EBADMSG, "a header that makes no sense");
}

static bool take_archive(void) {
    uint8_t block[TAR_BLOCK];
    for (;;) {
        if (!take(block, sizeof block)) return stream_ended();
        enum tar_kind kind = tar_read_header(block, &entry);
        if (kind == TAR_IS_BAD) return stop(EBADMSG, "this is no tar archive");
        if (kind == TAR_IS_ZERO) return take_nothing_more() || stream_ended();
        if (entry.type == TAR_PAX || entry.type == TAR_PAX_GLOBAL || entry.type == TAR_GNU_NAME ||
            entry.type == TAR_GNU_LINK) {
            if (!take_extension()) return false;
            continue;
        }
        if (!tar_extend(&entry, &extension)) return stop(EBADMSG, "%s: a sparse file of a kind not known here", entry.path);
        memset(&extension, 0, sizeof extension);
        if (!make_entry()) return false;
    }
}

bool tar_in(int fd, bool owners, struct tar_in_result *into) {
    memset(into, 0, sizeof *into);
    memset(&extension, 0, sizeof extension);
    result = into;
    snprintf(temporary, sizeof temporary, ".%ld-%ld.noid-part", (long)getpid(), (long)time(NULL));
    tree_begin(fd, owners);
    bool whole = take_archive();
    if (!tree_end()) result->partial = true;
    return whole;
}
