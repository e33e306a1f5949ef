// Standard input and output of a transfer: exact amounts, and files moved without copying them through this process.
#ifndef NOID_PIPES_H
#define NOID_PIPES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// Enlarges both pipes and makes TERM end what waits here: reads fail, so that callers clean up. Call first.
void pipes_prepare(void);

// Each returns false when the other side is gone or TERM came, with errno.
bool take(void *into, size_t length);
bool take_nothing_more(void); // waits for the end of the input, dropping what comes before it
bool drop(uint64_t length);
bool give(const void *data, size_t length); // buffered
bool give_now(void);
bool give_line(const char *format, ...) __attribute__((format(printf, 1, 2))); // and `give_now`

// Moves *length* bytes of input into *fd* at its position. On failure *to_file* says whether it was the file's fault;
// *moved* counts on.
bool take_file(int fd, uint64_t length, uint64_t *moved, bool *to_file);

// Moves up to *length* bytes from *fd* at its position to the output; *moved* says how many there were before the
// file ended, or could not be read (then errno is in *trouble*). False only if the output is gone.
bool give_file(int fd, uint64_t length, uint64_t *moved, int *trouble);

#endif
