// Mutates frames and message bodies and feeds them to the agent's parsers, under sanitizers. argv: seed, rounds.
// Every input lies in a block of exactly its size, so that reading one byte too far is seen.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "identity.h"
#include "start.h"
#include "tar.h"
#include "wire.h"

static uint64_t state;

static uint32_t random_below(uint32_t limit) { // splitmix64
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (uint32_t)((z ^ (z >> 31)) % limit);
}

#define CHECK(claim)                                                                                                  \
    do {                                                                                                              \
        if (!(claim)) {                                                                                               \
            fprintf(stderr, "not true: %s (line %d, state %llx)\n", #claim, __LINE__, (unsigned long long)state);     \
            exit(1);                                                                                                  \
        }                                                                                                             \
    } while (0)

static const uint8_t awkward[] = {0x7e, 0x7d, 0x5e, 0x5d, 0x00, 0xff, 0x7f, 0x80};

static uint8_t random_byte(void) {
    return random_below(3) ? awkward[random_below(sizeof awkward)] : (uint8_t)random_below(256);
}

static size_t mutate(uint8_t *data, size_t length, size_t capacity) {
    for (uint32_t edits = random_below(4); edits; edits--) {
        switch (random_below(4)) {
        case 0:
            if (length) data[random_below((uint32_t)length)] = random_byte();
            break;
        case 1: length = length ? random_below((uint32_t)length) : 0; break;
        case 2:
            if (length < capacity) data[length++] = random_byte();
            break;
        default:
            if (length >= 4) memset(data + random_below((uint32_t)length - 3), random_below(2) ? 0xff : 0, 4);
        }
    }
    return length;
}

static uint8_t *exact_copy(const uint8_t *data, size_t length) {
    uint8_t *copy = malloc(length ? length : 1);
    if (length) memcpy(copy, data, length);
    return copy;
}

// Feeds in random pieces; returns how many frames came out, the last one in `*last` (its body is only valid until then).
static int feed(struct decoder *decoder, const uint8_t *data, size_t length, struct frame *last) {
    int frames = 0;
    for (size_t at = 0; at < length;) {
        size_t piece = 1 + random_below((uint32_t)(length - at));
        uint8_t *copy = exact_copy(data + at, piece);
        for (size_t taken = 0; taken < piece;) {
            bool complete;
            size_t n = decoder_feed(decoder, copy + taken, piece - taken, last, &complete);
            CHECK(n > 0 && n <= piece - taken);
            CHECK(!complete || last->length <= BODY_BYTES_MAX);
            taken += n;
            frames += complete;
        }
        free(copy);
        at += piece;
    }
    return frames;
}

// The sum at the end of an encoded frame is what RFC 1950 says, byte by byte.
static void check_sum(const uint8_t *wire, size_t size) {
    static uint8_t raw[RAW_BYTES_MAX + 64];
    size_t length = 0;
    for (size_t i = 1; i + 1 < size; i++) raw[length++] = wire[i] == 0x7d ? wire[++i] ^ 0x20 : wire[i];
    uint32_t a = 1, b = 0;
    for (size_t i = 0; i + TRAILER_BYTES < length; i++) {
        a = (a + raw[i]) % 65521;
        b = (b + a) % 65521;
    }
    const uint8_t *sum = raw + length - TRAILER_BYTES;
    CHECK((sum[0] | sum[1] << 8) == (int)a && (sum[2] | sum[3] << 8) == (int)b);
}

static void fuzz_frames(void) {
    static struct decoder decoder; // keeps what earlier rounds left in it
    static uint8_t body[BODY_BYTES_MAX + 64], wire[ENCODED_BYTES_MAX(BODY_BYTES_MAX + 64)];
    struct frame frame;
    size_t length = random_below(100) ? random_below(200) : BODY_BYTES_MAX - 32 + random_below(96);
    if (random_below(4)) for (size_t i = 0; i < length; i++) body[i] = random_byte();
    else memset(body, 0xff, length); // the most a sum can grow by
    size_t head = random_below(9) < length ? random_below(9) : 0;
    if (head > length) head = 0;
    size_t size = frame_encode(wire, 7, 1, 2, body, head, body + head, length - head);
    CHECK(size <= ENCODED_BYTES_MAX(length));
    check_sum(wire, size);
    size_t damaged = mutate(wire, size, sizeof wire);
    feed(&decoder, wire, damaged, &frame);
    size = frame_encode(wire, 9, 3, 4, body, head, body + head, length - head);
    int frames = feed(&decoder, wire, size, &frame);
    if (length > BODY_BYTES_MAX) return;
    CHECK(frames >= 1); // whatever came before
    CHECK(frame.type == 9 && frame.epoch == 3 && frame.id == 4 && frame.length == length);
    CHECK(length == 0 || !memcmp(frame.body, body, length));
}

static void put_text(struct writer *writer, size_t length) {
    char text[300];
    for (size_t i = 0; i < length; i++) text[i] = (char)('a' + random_below(26));
    text[length] = 0;
    write_text(writer, text);
}

static void fuzz_start(void) {
    uint8_t body[4096];
    struct writer writer = {.data = body, .capacity = sizeof body};
    for (int i = 0; i < 4; i++) write_u32(&writer, random_below(1000));
    for (int i = 0; i < 2; i++) put_text(&writer, random_below(80));
    put_text(&writer, random_below(80));
    for (int list = 0; list < 2; list++) {
        uint32_t count = random_below(5);
        write_u32(&writer, random_below(20) ? count : 0xffffffffu);
        while (count--) put_text(&writer, random_below(50));
    }
    size_t length = mutate(body, writer.length, sizeof body);
    uint8_t *copy = exact_copy(body, length);
    static struct start_request request;
    if (start_parse(copy, length, &request)) {
        CHECK(request.argument_count >= 1 && request.text_bytes <= length);
        struct reader reader = request.arguments; // as the child will read them
        for (uint32_t i = 0; i < request.argument_count; i++) read_text(&reader);
        CHECK(!reader.bad);
    }
    free(copy);
}

static void fuzz_wake(void) {
    uint8_t body[4096], receipt[8192];
    struct writer writer = {.data = body, .capacity = sizeof body};
    write_u64(&writer, random_below(1u << 31));
    write_u64(&writer, 1);
    put_text(&writer, random_below(70));
    put_text(&writer, random_below(40));
    put_text(&writer, random_below(280));
    write_u8(&writer, (uint8_t)random_below(2));
    for (int i = 0; i < 5; i++) put_text(&writer, random_below(40));
    write_u32(&writer, random_below(2) * 1000);
    write_u32(&writer, random_below(4));
    size_t length = mutate(body, writer.length, sizeof body);
    uint8_t *copy = exact_copy(body, length);
    struct writer answer = {.data = receipt, .capacity = sizeof receipt};
    if (identity_wake(copy, length, false)) {
        identity_receipt(&answer);
        CHECK(!answer.full && answer.length > 2);
    }
    free(copy);
}

static size_t random_name(char *name, size_t capacity) {
    size_t length = random_below(8) ? 1 + random_below(150) : 1 + random_below((uint32_t)capacity - 1);
    for (size_t i = 0; i < length; i++) name[i] = "ab/."[random_below(4)];
    name[length - 1] = 'c'; // not a slash, which would make a file a directory
    name[length] = 0;
    return length;
}

// Headers as we write them come back as they were; damaged ones are refused or give names that end.
static void fuzz_tar(void) {
    static const char types[] = {TAR_FILE, TAR_HARD_LINK, TAR_SYMLINK, TAR_DIRECTORY};
    static struct tar_entry written, read;
    static struct tar_extension extension;
    static uint8_t headers[TAR_HEADERS_MAX];
    memset(&written, 0, sizeof written);
    written.type = types[random_below(sizeof types)];
    size_t length = random_name(written.path, sizeof written.path);
    if (written.type == TAR_HARD_LINK || written.type == TAR_SYMLINK) random_name(written.link, sizeof written.link);
    written.mode = random_below(010000);
    written.uid = random_below(2) ? 0 : (uint64_t)random_below(UINT32_MAX) << random_below(31);
    written.size = written.type == TAR_FILE ? (uint64_t)random_below(UINT32_MAX) << random_below(31) : 0;
    written.mtime = (int64_t)random_below(UINT32_MAX) - random_below(1u << 30);
    written.nanos = random_below(2) ? 0 : random_below(1000000000);
    size_t size = tar_write_headers(&written, headers);
    CHECK(size <= sizeof headers && size % TAR_BLOCK == 0 && size >= TAR_BLOCK);

    bool damaged = random_below(2);
    if (damaged) mutate(headers, size, size);
    memset(&extension, 0, sizeof extension);
    for (size_t at = 0; at + TAR_BLOCK <= size;) {
        uint8_t *block = exact_copy(headers + at, TAR_BLOCK);
        enum tar_kind kind = tar_read_header(block, &read);
        free(block);
        at += TAR_BLOCK;
        CHECK(damaged || kind == TAR_IS_ENTRY);
        if (kind != TAR_IS_ENTRY) break;
        CHECK(memchr(read.path, 0, sizeof read.path) && memchr(read.link, 0, sizeof read.link));
        if (read.type == TAR_PAX) {
            size_t records = read.size < size - at ? (size_t)read.size : size - at;
            uint8_t *copy = exact_copy(headers + at, records);
            bool fine = tar_read_pax(copy, records, &extension);
            free(copy);
            CHECK(damaged || fine);
            at += records + tar_padding(records);
            continue;
        }
        bool fine = tar_extend(&read, &extension);
        CHECK(memchr(read.path, 0, sizeof read.path) && memchr(read.link, 0, sizeof read.link));
        if (damaged) continue;
        CHECK(fine && strlen(read.path) == length && !strcmp(read.path, written.path));
        CHECK(read.type == written.type);
        CHECK(!strcmp(read.link, written.link) && read.size == written.size && read.uid == written.uid);
        CHECK(read.mtime == written.mtime && read.nanos == written.nanos && read.mode == written.mode);
    }
}

int main(int argc, char **argv) {
    CHECK(argc == 3);
    state = strtoull(argv[1], NULL, 10);
    for (unsigned long long rounds = strtoull(argv[2], NULL, 10); rounds; rounds--) {
        fuzz_frames();
        fuzz_start();
        fuzz_wake();
        fuzz_tar();
    }
    return 0;
}
