// SHA-256 (FIPS 180-4), for files that arrived in several pieces.
#ifndef NOID_SHA256_H
#define NOID_SHA256_H

#include <stddef.h>
#include <stdint.h>

struct sha256 {
    uint32_t state[8];
    uint64_t length;
    uint8_t block[64];
};

void sha256_begin(struct sha256 *sum);
void sha256_add(struct sha256 *sum, const void *data, size_t length);

// Ends the sum and writes it as 64 hex digits and a NUL.
void sha256_end(struct sha256 *sum, char hex[65]);

#endif
