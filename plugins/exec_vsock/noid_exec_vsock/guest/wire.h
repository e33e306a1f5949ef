// Frames on a byte stream that has no beginning: `0x7e | stuff(type, epoch, id, body, adler32) | 0x7e`. Pure, no I/O.
#ifndef NOID_WIRE_H
#define NOID_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { BODY_BYTES_MAX = 65536, HEADER_BYTES = 9, TRAILER_BYTES = 4 };
enum { RAW_BYTES_MAX = HEADER_BYTES + BODY_BYTES_MAX + TRAILER_BYTES };

// The most bytes a frame with a body of `n` bytes can take on the wire: everything stuffed, two flags.
#define ENCODED_BYTES_MAX(n) (2 * ((size_t)(n) + HEADER_BYTES + TRAILER_BYTES) + 2)

struct frame {
    uint8_t type;
    uint32_t epoch;
    uint32_t id;
    const uint8_t *body; // inside the decoder: valid until it is fed again
    size_t length;
};

struct decoder {
    size_t length;
    bool escaped;
    bool spoilt; // what is being collected cannot become a frame; skip to the next flag
    uint8_t raw[RAW_BYTES_MAX];
};

// Forgets a half-read frame.
void decoder_reset(struct decoder *decoder);

// Takes bytes until a frame is complete or there are no more. Returns how many it took; `*complete` says whether
// `*frame` was filled. Damaged, overlong and foreign bytes are skipped in silence, as resynchronising demands.
size_t decoder_feed(struct decoder *decoder, const uint8_t *data, size_t length, struct frame *frame, bool *complete);

// Writes one frame to `out`, which has room for ENCODED_BYTES_MAX(head_length + length), and returns its size.
// The body is `head` followed by `body`.
size_t frame_encode(uint8_t *out, uint8_t type, uint32_t epoch, uint32_t id, const uint8_t *head, size_t head_length,
                    const uint8_t *body, size_t length);

// Reads a body from front to back. Reading past the end yields zeros and sets `bad`, which is checked once, at the end.
struct reader {
    const uint8_t *next;
    const uint8_t *end;
    bool bad;
};

struct text {
    const char *data; // not terminated
    size_t length;
};

struct reader read_body(const uint8_t *body, size_t length);
uint8_t read_u8(struct reader *reader);
uint16_t read_u16(struct reader *reader);
uint32_t read_u32(struct reader *reader);
uint64_t read_u64(struct reader *reader);
struct text read_text(struct reader *reader); // u32 length, bytes

// True if everything was there and nothing is left over.
bool read_whole(const struct reader *reader);

// Copies `text` with a final NUL. False if it does not fit or contains a NUL itself.
bool text_copy(struct text text, char *out, size_t capacity);

// Builds a body. What does not fit is left out, whole fields at a time, and sets `full`.
struct writer {
    uint8_t *data;
    size_t length;
    size_t capacity;
    bool full;
};

void write_u8(struct writer *writer, uint8_t value);
void write_u16(struct writer *writer, uint16_t value);
void write_u32(struct writer *writer, uint32_t value);
void write_u64(struct writer *writer, uint64_t value);
void write_text(struct writer *writer, const char *text); // cut after 512 bytes: texts are for people

#endif
