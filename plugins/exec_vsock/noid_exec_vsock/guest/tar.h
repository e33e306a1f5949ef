// The tar format as we write it (POSIX pax, GNU sparse 1.0) and as others may send it. No input or output.
#ifndef NOID_TAR_H
#define NOID_TAR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    TAR_BLOCK = 512,
    TAR_PATH_MAX = 4096,       // with its NUL, as the kernel counts
    TAR_EXTENSION_MAX = 65536, // of a pax header or a GNU long name: what we keep in memory of one
    TAR_SEGMENTS_MAX = 16384,  // of a sparse file
};

enum {
    TAR_FILE = '0',
    TAR_HARD_LINK = '1',
    TAR_SYMLINK = '2',
    TAR_DIRECTORY = '5',
    TAR_PAX = 'x',
    TAR_PAX_GLOBAL = 'g',
    TAR_GNU_NAME = 'L',
    TAR_GNU_LINK = 'K',
};

struct tar_entry {
    char type;
    char path[TAR_PATH_MAX];
    char link[TAR_PATH_MAX];
    uint32_t mode;
    uint64_t uid, gid;
    uint64_t size; // of what follows the header
    int64_t mtime;
    uint32_t nanos;
    bool sparse;        // what follows begins with a map
    uint64_t real_size; // of the file, if sparse
};

// What extension headers said of the entry that follows them.
struct tar_extension {
    bool has_path, has_link, has_size, has_uid, has_gid, has_mtime, has_real_size;
    char path[TAR_PATH_MAX];
    char link[TAR_PATH_MAX];
    uint64_t size, uid, gid, real_size;
    int64_t mtime;
    uint32_t nanos;
    unsigned sparse_major, sparse_minor;
};

enum tar_kind { TAR_IS_ENTRY, TAR_IS_ZERO, TAR_IS_BAD };

// Reads one header block. Names in it may be any bytes.
enum tar_kind tar_read_header(const uint8_t block[TAR_BLOCK], struct tar_entry *entry);

// Reads the records of a pax header. Unknown keywords are ignored. False if it is malformed, or a name too long.
bool tar_read_pax(const uint8_t *records, size_t length, struct tar_extension *extension);

// Applies what extension headers said. False if it makes no sense.
bool tar_extend(struct tar_entry *entry, const struct tar_extension *extension);

// A decimal number up to INT64_MAX. False if it is none.
bool tar_read_decimal(const char *text, size_t length, uint64_t *value);

// Writes the header blocks of *entry*, at most TAR_HEADERS_MAX bytes, and returns their length.
enum { TAR_HEADERS_MAX = 2 * TAR_BLOCK + 4 * TAR_PATH_MAX };
size_t tar_write_headers(const struct tar_entry *entry, uint8_t *into);

// Writes a global header with a comment, which readers other than ours ignore; returns its length.
size_t tar_write_comment(const char *comment, uint8_t *into);

// How many bytes fill the last block of *size* bytes.
static inline size_t tar_padding(uint64_t size) { return (size_t)(-size % TAR_BLOCK); }

#endif
