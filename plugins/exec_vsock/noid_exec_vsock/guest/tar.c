// The tar format as we write it (POSIX pax, GNU sparse 1.0) and as others may send it. No input or output.
#include "tar.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

// Where the fields of a header block are.
struct field {
    size_t at, length;
};
static const struct field NAME = {0, 100}, MODE = {100, 8}, UID = {108, 8}, GID = {116, 8}, SIZE = {124, 12},
                          MTIME = {136, 12}, CHECKSUM = {148, 8}, LINK = {157, 100}, MAGIC = {257, 6},
                          PREFIX = {345, 155};
enum { TYPE_AT = 156, VERSION_AT = 263 };

// --- reading -----------------------------------------------------------------------------------------------------

// Octal as POSIX has it, or GNU's big-endian binary with the top bit set. Negative binary numbers are refused.
static bool read_number(const uint8_t *block, struct field field, uint64_t *value) {
    const uint8_t *at = block + field.at, *end = at + field.length;
    uint64_t number = 0;
    if (*at & 0x80) {
        if (*at & 0x7f) return false;
        for (at++; at < end; at++) {
            if (number >> 55) return false;
            number = number << 8 | *at;
        }
        *value = number;
        return true;
    }
    while (at < end && *at == ' ') at++;
    for (; at < end && *at >= '0' && *at <= '7'; at++) number = number << 3 | (uint64_t)(*at - '0'); // 12 digits: fits
    *value = number;
    return at == end || *at == 0 || *at == ' ';
}

static size_t copy_field(const uint8_t *block, struct field field, char *into) {
    size_t length = strnlen((const char *)block + field.at, field.length);
    memcpy(into, block + field.at, length);
    into[length] = 0;
    return length;
}

enum tar_kind tar_read_header(const uint8_t block[TAR_BLOCK], struct tar_entry *entry) {
    uint32_t sum = 8 * ' ';
    bool zero = true;
    for (size_t i = 0; i < TAR_BLOCK; i++) {
        zero = zero && !block[i];
        if (i < CHECKSUM.at || i >= CHECKSUM.at + CHECKSUM.length) sum += block[i];
    }
    if (zero) return TAR_IS_ZERO;
    memset(entry, 0, sizeof *entry);
    uint64_t said, mode, mtime;
    if (!read_number(block, CHECKSUM, &said) || said != sum || !read_number(block, MODE, &mode) ||
        !read_number(block, UID, &entry->uid) || !read_number(block, GID, &entry->gid) ||
        !read_number(block, SIZE, &entry->size) || !read_number(block, MTIME, &mtime) || mtime > INT64_MAX)
        return TAR_IS_BAD;
    entry->mode = (uint32_t)(mode & 07777);
    entry->mtime = (int64_t)mtime;
    entry->type = block[TYPE_AT] ? (char)block[TYPE_AT] : TAR_FILE;
    size_t length = 0;
    if (!memcmp(block + MAGIC.at, "ustar", 6) && block[PREFIX.at]) { // GNU's magic differs, and it has other fields here
        length = copy_field(block, PREFIX, entry->path);
        entry->path[length++] = '/';
    }
    copy_field(block, NAME, entry->path + length);
    copy_field(block, LINK, entry->link);
    if (entry->type == '7') entry->type = TAR_FILE; // "contiguous"
    if (entry->type != TAR_FILE && entry->type >= TAR_HARD_LINK && entry->type <= TAR_DIRECTORY + 1)
        entry->size = 0; // some writers give links and directories the size of what they stand for
    return TAR_IS_ENTRY;
}

bool tar_read_decimal(const char *text, size_t length, uint64_t *value) {
    uint64_t number = 0;
    if (!length || length > 19) return false;
    for (size_t i = 0; i < length; i++) {
        if (text[i] < '0' || text[i] > '9') return false;
        number = number * 10 + (uint64_t)(text[i] - '0');
    }
    *value = number;
    return number <= INT64_MAX;
}

// Seconds with a fraction, which may be negative: rounded down, as the kernel counts.
static bool read_time(const char *text, size_t length, int64_t *seconds, uint32_t *nanos) {
    bool negative = length && *text == '-';
    if (negative) text++, length--;
    const char *dot = memchr(text, '.', length);
    uint64_t whole;
    if (!tar_read_decimal(text, dot ? (size_t)(dot - text) : length, &whole)) return false;
    uint32_t fraction = 0, weight = 100000000;
    for (const char *at = dot ? dot + 1 : text + length; at < text + length; at++, weight /= 10) {
        if (*at < '0' || *at > '9') return false;
        fraction += weight * (uint32_t)(*at - '0');
    }
    *seconds = negative ? -(int64_t)whole - (fraction != 0) : (int64_t)whole;
    *nanos = negative && fraction ? 1000000000 - fraction : fraction;
    return true;
}

static bool copy_name(const char *value, size_t length, char *into) {
    if (!length || length >= TAR_PATH_MAX || memchr(value, 0, length)) return false;
    memcpy(into, value, length);
    into[length] = 0;
    return true;
}

static bool take_record(const char *key, size_t key_length, const char *value, size_t length,
                        struct tar_extension *ext) {
    uint64_t number = 0;
#define KEY(text) (key_length == sizeof(text) - 1 && !memcmp(key, text, sizeof(text) - 1))
    if (KEY("path") || KEY("GNU.sparse.name")) {
        if (ext->has_path && KEY("path")) return true; // the other one is the real name
        return ext->has_path = copy_name(value, length, ext->path);
    }
    if (KEY("linkpath")) return ext->has_link = copy_name(value, length, ext->link);
    if (KEY("size")) return ext->has_size = tar_read_decimal(value, length, &ext->size);
    if (KEY("uid")) return ext->has_uid = tar_read_decimal(value, length, &ext->uid);
    if (KEY("gid")) return ext->has_gid = tar_read_decimal(value, length, &ext->gid);
    if (KEY("mtime")) return ext->has_mtime = read_time(value, length, &ext->mtime, &ext->nanos);
    if (KEY("GNU.sparse.realsize") || KEY("GNU.sparse.size"))
        return ext->has_real_size = tar_read_decimal(value, length, &ext->real_size);
    if (KEY("GNU.sparse.major")) {
        if (!tar_read_decimal(value, length, &number)) return false;
        ext->sparse_major = number > 9 ? 9 : (unsigned)number;
    } else if (KEY("GNU.sparse.minor")) {
        if (!tar_read_decimal(value, length, &number)) return false;
        ext->sparse_minor = number > 9 ? 9 : (unsigned)number;
    } else if (KEY("GNU.sparse.map") || KEY("GNU.sparse.offset")) {
        ext->sparse_major = 9; // GNU's versions 0.x, which nobody writes any more: refused by `tar_extend`
    }
#undef KEY
    return true;
}

bool tar_read_pax(const uint8_t *records, size_t length, struct tar_extension *extension) {
    const char *at = (const char *)records, *end = at + length;
    while (at < end) {
        const char *space = memchr(at, ' ', (size_t)(end - at));
        uint64_t size;
        if (!space || !tar_read_decimal(at, (size_t)(space - at), &size) || size > (uint64_t)(end - at)) return false;
        const char *next = at + size, *key = space + 1;
        if (next < key + 2 || next[-1] != '\n') return false;
        const char *equals = memchr(key, '=', (size_t)(next - 1 - key));
        if (!equals || equals == key) return false;
        if (!take_record(key, (size_t)(equals - key), equals + 1, (size_t)(next - 1 - equals - 1), extension))
            return false;
        at = next;
    }
    return true;
}

bool tar_extend(struct tar_entry *entry, const struct tar_extension *ext) {
    if (ext->has_path) memcpy(entry->path, ext->path, sizeof entry->path);
    size_t length = strlen(entry->path);
    if (entry->type == TAR_FILE && length && entry->path[length - 1] == '/') { // before POSIX; not of a name cut short
        entry->type = TAR_DIRECTORY;
        entry->size = 0;
    }
    if (ext->has_link) memcpy(entry->link, ext->link, sizeof entry->link);
    if (ext->has_size && entry->type == TAR_FILE) entry->size = ext->size;
    if (ext->has_uid) entry->uid = ext->uid;
    if (ext->has_gid) entry->gid = ext->gid;
    if (ext->has_mtime) entry->mtime = ext->mtime, entry->nanos = ext->nanos;
    if (!ext->sparse_major) return true;
    entry->sparse = true;
    entry->real_size = ext->real_size;
    return ext->sparse_major == 1 && ext->sparse_minor == 0 && ext->has_real_size && entry->type == TAR_FILE;
}

// --- writing -----------------------------------------------------------------------------------------------------

static void put_octal(uint8_t *block, struct field field, uint64_t value) {
    for (size_t i = field.length - 1; i-- > 0; value >>= 3) block[field.at + i] = (uint8_t)('0' + (value & 7));
}

static bool fits_octal(uint64_t value, struct field field) { return value >> 3 * (field.length - 1) == 0; }

static void put_name(uint8_t *block, struct field field, const char *name) {
    memcpy(block + field.at, name, strnlen(name, field.length));
}

static void put_block(uint8_t *block, const struct tar_entry *entry, char type, const char *name, uint64_t size) {
    memset(block, 0, TAR_BLOCK);
    put_name(block, NAME, name);
    put_octal(block, MODE, entry->mode & 07777);
    put_octal(block, UID, fits_octal(entry->uid, UID) ? entry->uid : 0);
    put_octal(block, GID, fits_octal(entry->gid, GID) ? entry->gid : 0);
    put_octal(block, SIZE, fits_octal(size, SIZE) ? size : 0);
    put_octal(block, MTIME, entry->mtime >= 0 && fits_octal((uint64_t)entry->mtime, MTIME) ? (uint64_t)entry->mtime : 0);
    block[TYPE_AT] = (uint8_t)type;
    put_name(block, LINK, entry->link);
    memcpy(block + MAGIC.at, "ustar", 6);
    memcpy(block + VERSION_AT, "00", 2);
    uint32_t sum = 8 * ' ';
    for (size_t i = 0; i < TAR_BLOCK; i++) sum += block[i];
    put_octal(block, (struct field){CHECKSUM.at, CHECKSUM.length - 1}, sum);
    block[CHECKSUM.at + 7] = ' ';
}

// A record's length counts itself.
static size_t put_record(uint8_t *into, const char *key, const char *value) {
    size_t rest = strlen(key) + strlen(value) + 3, length = rest + 1, digits = 1;
    for (size_t bound = 10; length >= bound; bound *= 10) length = rest + ++digits;
    int head = sprintf((char *)into, "%zu %s=", length, key);
    memcpy(into + head, value, strlen(value));
    into[length - 1] = '\n';
    return length;
}

static bool is_ascii(const char *text) {
    for (; *text; text++)
        if (*text & 0x80) return false;
    return true;
}

size_t tar_write_headers(const struct tar_entry *entry, uint8_t *into) {
    uint8_t *records = into + TAR_BLOCK;
    size_t length = 0;
    char number[64];
#define RECORD(key, value) (length += put_record(records + length, key, value))
#define NUMBER(key, value) (snprintf(number, sizeof number, "%" PRIu64, value), RECORD(key, number))
    bool long_path = entry->sparse || strlen(entry->path) > NAME.length;
    bool long_link = strlen(entry->link) > LINK.length;
    if ((long_path && !is_ascii(entry->path)) || (long_link && !is_ascii(entry->link)))
        RECORD("hdrcharset", "BINARY"); // names are bytes, not characters
    if (entry->sparse) {
        RECORD("GNU.sparse.major", "1");
        RECORD("GNU.sparse.minor", "0");
        RECORD("GNU.sparse.name", entry->path);
        NUMBER("GNU.sparse.realsize", entry->real_size);
    } else if (long_path) RECORD("path", entry->path);
    if (long_link) RECORD("linkpath", entry->link);
    if (!fits_octal(entry->size, SIZE)) NUMBER("size", entry->size);
    if (!fits_octal(entry->uid, UID)) NUMBER("uid", entry->uid);
    if (!fits_octal(entry->gid, GID)) NUMBER("gid", entry->gid);
    if (entry->nanos || entry->mtime < 0 || !fits_octal((uint64_t)entry->mtime, MTIME)) {
        // Before 1970, whole seconds are rounded down and the fraction counts up: -1.25 s is -2 s and 0.75.
        bool borrow = entry->mtime < 0 && entry->nanos;
        int64_t seconds = borrow ? entry->mtime + 1 : entry->mtime;
        snprintf(number, sizeof number, "%s%" PRIu64 ".%09u", entry->mtime < 0 ? "-" : "",
                 seconds < 0 ? -(uint64_t)seconds : (uint64_t)seconds, borrow ? 1000000000 - entry->nanos : entry->nanos);
        RECORD("mtime", number);
    }
#undef NUMBER
#undef RECORD
    size_t total = 0;
    if (length) {
        put_block(into, &(struct tar_entry){.mode = 0644}, TAR_PAX, "././@PaxHeader", length);
        memset(records + length, 0, tar_padding(length));
        total = TAR_BLOCK + length + tar_padding(length);
    }
    put_block(into + total, entry, entry->type, entry->sparse ? "GNUSparseFile.0" : entry->path, entry->size);
    return total + TAR_BLOCK;
}

size_t tar_write_comment(const char *comment, uint8_t *into) {
    size_t length = put_record(into + TAR_BLOCK, "comment", comment);
    put_block(into, &(struct tar_entry){.mode = 0644}, TAR_PAX_GLOBAL, "pax_global_header", length);
    memset(into + TAR_BLOCK + length, 0, tar_padding(length));
    return TAR_BLOCK + length + tar_padding(length);
}
