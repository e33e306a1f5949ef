// Frame codec: stuffing, Adler-32, a decoder that may be cut anywhere, and little-endian bodies.
#include "wire.h"

#include <string.h>

enum { FLAG = 0x7e, ESCAPE = 0x7d, ESCAPED_FLAG = 0x5e, ESCAPED_ESCAPE = 0x5d };

static uint32_t get32(const uint8_t *p) {
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static void put32(uint8_t *p, uint32_t value) {
    for (int i = 0; i < 4; i++) p[i] = (uint8_t)(value >> (8 * i));
}

// Adler-32 (RFC 1950): a is 1 plus all bytes, b the sum of a after each byte, both modulo 65521. Eight bytes at a time in
// lanes of 16 bits: under emulation every table look-up of a CRC costs as much as a lane of eight.
enum { ADLER_MODULUS = 65521, LANE_WORDS = 23 }; // 23: 255 * (0 + 1 + ... + 22) still fits a lane

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the lanes' weights are those of little-endian words");

static const uint64_t EVEN_BYTES = 0x00ff00ff00ff00ffu;

// The sums of up to LANE_WORDS words: of their bytes, and of these sums before each word.
struct lanes {
    uint64_t even, odd, even_before, odd_before;
};

static inline uint64_t load_word(const uint8_t *p) {
    uint64_t word;
    memcpy(&word, p, sizeof word);
    return word;
}

static inline void lanes_add(struct lanes *lanes, uint64_t word) {
    lanes->even_before += lanes->even;
    lanes->odd_before += lanes->odd;
    lanes->even += word & EVEN_BYTES;
    lanes->odd += (word >> 8) & EVEN_BYTES;
}

static uint32_t adler_lanes(uint32_t sum, const struct lanes *lanes, size_t words) {
    uint32_t a = sum & 0xffff, b = sum >> 16;
    b += a * (uint32_t)(8 * words);
    for (unsigned lane = 0; lane < 4; lane++) {
        unsigned shift = 16 * lane;
        uint32_t e = (lanes->even >> shift) & 0xffff, o = (lanes->odd >> shift) & 0xffff;
        a += e + o;
        b += 8 * (uint32_t)(((lanes->even_before >> shift) & 0xffff) + ((lanes->odd_before >> shift) & 0xffff));
        b += e * (8 - 2 * lane) + o * (7 - 2 * lane);
    }
    return (b % ADLER_MODULUS) << 16 | a % ADLER_MODULUS;
}

static uint32_t adler_update(uint32_t sum, const uint8_t *p, size_t n) {
    while (n >= 8) {
        size_t words = n / 8 < LANE_WORDS ? n / 8 : LANE_WORDS;
        struct lanes lanes = {0};
        for (size_t i = 0; i < words; i++) lanes_add(&lanes, load_word(p + 8 * i));
        sum = adler_lanes(sum, &lanes, words);
        p += 8 * words;
        n -= 8 * words;
    }
    uint32_t a = sum & 0xffff, b = sum >> 16;
    for (; n; n--) b += a += *p++; // at most seven: no overflow
    return (b % ADLER_MODULUS) << 16 | a % ADLER_MODULUS;
}

static const uint64_t TOP_BITS = 0x8080808080808080u;

// Has the top bit of a byte set that is flag, escape or 7f; no other's. The other bits mean nothing.
static inline uint64_t marks(uint64_t word) {
    return ((word & 0x7f7f7f7f7f7f7f7fu) + 0x0303030303030303u) & ~word;
}

static inline bool is_special(uint8_t byte) { return byte == FLAG || byte == ESCAPE; }

// How many bytes at the front of `p` are neither flag nor escape.
static size_t plain_run(const uint8_t *p, size_t n) {
    size_t run = 0;
    while (run < n) {
        if (n - run >= 8 && !(marks(load_word(p + run)) & TOP_BITS)) {
            run += 8;
            continue;
        }
        for (size_t end = n - run < 8 ? n : run + 8; run < end; run++)
            if (is_special(p[run])) return run;
    }
    return run;
}

void decoder_reset(struct decoder *decoder) {
    decoder->length = 0;
    decoder->escaped = false;
    decoder->spoilt = false;
}

static bool decoder_finish(struct decoder *decoder, struct frame *frame) {
    size_t length = decoder->length;
    bool whole = !decoder->spoilt && !decoder->escaped && length >= HEADER_BYTES + TRAILER_BYTES;
    decoder_reset(decoder);
    if (!whole) return false;
    size_t covered = length - TRAILER_BYTES;
    if (adler_update(1, decoder->raw, covered) != get32(decoder->raw + covered)) return false;
    frame->type = decoder->raw[0];
    frame->epoch = get32(decoder->raw + 1);
    frame->id = get32(decoder->raw + 5);
    frame->body = decoder->raw + HEADER_BYTES;
    frame->length = covered - HEADER_BYTES;
    return true;
}

size_t decoder_feed(struct decoder *decoder, const uint8_t *data, size_t length, struct frame *frame, bool *complete) {
    *complete = false;
    size_t i = 0;
    while (i < length) {
        if (data[i] == FLAG) {
            i++;
            if (decoder_finish(decoder, frame)) {
                *complete = true;
                return i;
            }
        } else if (decoder->spoilt) {
            const uint8_t *flag = memchr(data + i, FLAG, length - i);
            i = flag ? (size_t)(flag - data) : length;
        } else if (decoder->escaped) {
            decoder->escaped = false;
            if ((data[i] != ESCAPED_FLAG && data[i] != ESCAPED_ESCAPE) || decoder->length == RAW_BYTES_MAX)
                decoder->spoilt = true;
            else
                decoder->raw[decoder->length++] = data[i] ^ 0x20;
            i++;
        } else if (data[i] == ESCAPE) {
            decoder->escaped = true;
            i++;
        } else {
            size_t run = plain_run(data + i, length - i);
            if (run > RAW_BYTES_MAX - decoder->length) {
                decoder->spoilt = true;
                continue;
            }
            memcpy(decoder->raw + decoder->length, data + i, run);
            decoder->length += run;
            i += run;
        }
    }
    return i;
}

static size_t stuff_bytes(uint8_t *out, const uint8_t *p, size_t n) {
    size_t size = 0;
    for (size_t i = 0; i < n; i++) {
        if (is_special(p[i])) out[size++] = ESCAPE;
        out[size++] = is_special(p[i]) ? p[i] ^ 0x20 : p[i];
    }
    return size;
}

// Not inline: what it needs would push the sums of `stuff_and_sum` out of the registers.
static __attribute__((noinline)) size_t stuff(uint8_t *out, const uint8_t *p, size_t n) {
    size_t size = 0;
    for (; n >= 8; n -= 8, p += 8) {
        uint64_t word = load_word(p);
        memcpy(out + size, &word, sizeof word);
        size += marks(word) & TOP_BITS ? stuff_bytes(out + size, p, 8) : 8;
    }
    return size + stuff_bytes(out + size, p, n);
}

// Stuffs and sums in one go: in an emulated guest it is each look at memory that costs.
static size_t stuff_and_sum(uint8_t *out, const uint8_t *p, size_t n, uint32_t *sum) {
    enum { WORDS = LANE_WORDS & ~3, BYTES = 8 * WORDS };
    size_t size = 0;
    for (; n >= BYTES; n -= BYTES, p += BYTES) {
        struct lanes lanes = {0};
        uint64_t marked = 0;
#pragma clang loop unroll_count(4)
        for (int i = 0; i < WORDS; i++) {
            uint64_t word = load_word(p + 8 * i);
            memcpy(out + size + 8 * i, &word, sizeof word);
            marked |= marks(word);
            lanes_add(&lanes, word);
        }
        *sum = adler_lanes(*sum, &lanes, WORDS);
        size += marked & TOP_BITS ? stuff(out + size, p, BYTES) : BYTES;
    }
    *sum = adler_update(*sum, p, n);
    return size + stuff(out + size, p, n);
}

size_t frame_encode(uint8_t *out, uint8_t type, uint32_t epoch, uint32_t id, const uint8_t *head, size_t head_length,
                    const uint8_t *body, size_t length) {
    uint8_t header[HEADER_BYTES], trailer[TRAILER_BYTES];
    header[0] = type;
    put32(header + 1, epoch);
    put32(header + 5, id);
    uint32_t sum = adler_update(1, header, sizeof header);
    size_t size = 0;
    out[size++] = FLAG;
    size += stuff(out + size, header, sizeof header);
    if (head_length) {
        sum = adler_update(sum, head, head_length);
        size += stuff(out + size, head, head_length);
    }
    if (length) size += stuff_and_sum(out + size, body, length, &sum);
    put32(trailer, sum);
    size += stuff(out + size, trailer, sizeof trailer);
    out[size++] = FLAG;
    return size;
}

struct reader read_body(const uint8_t *body, size_t length) {
    return (struct reader){.next = body, .end = body + length, .bad = false};
}

static const uint8_t *take(struct reader *reader, size_t n) {
    if (reader->bad || (size_t)(reader->end - reader->next) < n) {
        reader->bad = true;
        return NULL;
    }
    const uint8_t *p = reader->next;
    reader->next += n;
    return p;
}

uint8_t read_u8(struct reader *reader) {
    const uint8_t *p = take(reader, 1);
    return p ? *p : 0;
}

uint16_t read_u16(struct reader *reader) {
    const uint8_t *p = take(reader, 2);
    return p ? (uint16_t)(p[0] | p[1] << 8) : 0;
}

uint32_t read_u32(struct reader *reader) {
    const uint8_t *p = take(reader, 4);
    return p ? get32(p) : 0;
}

uint64_t read_u64(struct reader *reader) {
    const uint8_t *p = take(reader, 8);
    return p ? get32(p) | (uint64_t)get32(p + 4) << 32 : 0;
}

struct text read_text(struct reader *reader) {
    size_t length = read_u32(reader);
    const uint8_t *p = take(reader, length);
    return (struct text){.data = (const char *)p, .length = p ? length : 0};
}

bool read_whole(const struct reader *reader) { return !reader->bad && reader->next == reader->end; }

bool text_copy(struct text text, char *out, size_t capacity) {
    if (text.length >= capacity || (text.length && memchr(text.data, 0, text.length))) return false;
    if (text.length) memcpy(out, text.data, text.length);
    out[text.length] = 0;
    return true;
}

static uint8_t *room(struct writer *writer, size_t n) {
    if (writer->full || writer->capacity - writer->length < n) {
        writer->full = true;
        return NULL;
    }
    uint8_t *p = writer->data + writer->length;
    writer->length += n;
    return p;
}

void write_u8(struct writer *writer, uint8_t value) {
    uint8_t *p = room(writer, 1);
    if (p) *p = value;
}

void write_u16(struct writer *writer, uint16_t value) {
    uint8_t *p = room(writer, 2);
    if (!p) return;
    p[0] = (uint8_t)value;
    p[1] = (uint8_t)(value >> 8);
}

void write_u32(struct writer *writer, uint32_t value) {
    uint8_t *p = room(writer, 4);
    if (p) put32(p, value);
}

void write_u64(struct writer *writer, uint64_t value) {
    uint8_t *p = room(writer, 8);
    if (!p) return;
    put32(p, (uint32_t)value);
    put32(p + 4, (uint32_t)(value >> 32));
}

void write_text(struct writer *writer, const char *text) {
    size_t length = strnlen(text, 512);
    uint8_t *p = room(writer, 4 + length);
    if (!p) return;
    put32(p, (uint32_t)length);
    memcpy(p + 4, text, length);
}
