// Frame codec: stuffing, CRC-32 (zlib's), a decoder that may be cut anywhere, and little-endian bodies.
#include "wire.h"

#include <string.h>

enum { FLAG = 0x7e, ESCAPE = 0x7d, ESCAPED_FLAG = 0x5e, ESCAPED_ESCAPE = 0x5d };

// Slicing by eight: under emulation a byte-wise CRC costs more than everything else on the way of a byte.
static uint32_t crc_table[8][256];

void wire_init(void) {
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t crc = i;
        for (int bit = 0; bit < 8; bit++) crc = (crc & 1) ? 0xedb88320u ^ (crc >> 1) : crc >> 1;
        crc_table[0][i] = crc;
    }
    for (uint32_t i = 0; i < 256; i++)
        for (int k = 1; k < 8; k++)
            crc_table[k][i] = crc_table[0][crc_table[k - 1][i] & 0xff] ^ (crc_table[k - 1][i] >> 8);
}

static uint32_t get32(const uint8_t *p) {
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static void put32(uint8_t *p, uint32_t value) {
    for (int i = 0; i < 4; i++) p[i] = (uint8_t)(value >> (8 * i));
}

static uint32_t crc_update(uint32_t crc, const uint8_t *p, size_t n) {
    for (; n >= 8; n -= 8, p += 8) {
        uint32_t a = get32(p) ^ crc, b = get32(p + 4);
        crc = crc_table[7][a & 0xff] ^ crc_table[6][(a >> 8) & 0xff] ^ crc_table[5][(a >> 16) & 0xff] ^
              crc_table[4][a >> 24] ^ crc_table[3][b & 0xff] ^ crc_table[2][(b >> 8) & 0xff] ^
              crc_table[1][(b >> 16) & 0xff] ^ crc_table[0][b >> 24];
    }
    for (; n; n--, p++) crc = crc_table[0][(crc ^ *p) & 0xff] ^ (crc >> 8);
    return crc;
}

// True if one of the eight bytes is zero (Hacker's Delight 6-1; may also be true for a 1 above a zero byte: harmless).
static bool has_zero_byte(uint64_t word) {
    return ((word - 0x0101010101010101u) & ~word & 0x8080808080808080u) != 0;
}

// How many bytes at the front of `p` are neither flag nor escape.
static size_t plain_run(const uint8_t *p, size_t n) {
    size_t run = 0;
    for (; run + 8 <= n; run += 8) {
        uint64_t word;
        memcpy(&word, p + run, 8);
        if (has_zero_byte(word ^ 0x7e7e7e7e7e7e7e7eu) || has_zero_byte(word ^ 0x7d7d7d7d7d7d7d7du)) break;
    }
    while (run < n && p[run] != FLAG && p[run] != ESCAPE) run++;
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
    if (~crc_update(~0u, decoder->raw, covered) != get32(decoder->raw + covered)) return false;
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

static size_t stuff(uint8_t *out, const uint8_t *p, size_t n) {
    size_t size = 0, i = 0;
    while (i < n) {
        size_t run = plain_run(p + i, n - i);
        memcpy(out + size, p + i, run);
        size += run;
        i += run;
        if (i < n) {
            out[size++] = ESCAPE;
            out[size++] = p[i++] ^ 0x20;
        }
    }
    return size;
}

size_t frame_encode(uint8_t *out, uint8_t type, uint32_t epoch, uint32_t id, const uint8_t *head, size_t head_length,
                    const uint8_t *body, size_t length) {
    uint8_t header[HEADER_BYTES], trailer[TRAILER_BYTES];
    header[0] = type;
    put32(header + 1, epoch);
    put32(header + 5, id);
    uint32_t crc = crc_update(~0u, header, sizeof header);
    if (head_length) crc = crc_update(crc, head, head_length);
    if (length) crc = crc_update(crc, body, length);
    put32(trailer, ~crc);
    size_t size = 0;
    out[size++] = FLAG;
    size += stuff(out + size, header, sizeof header);
    if (head_length) size += stuff(out + size, head, head_length);
    if (length) size += stuff(out + size, body, length);
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
