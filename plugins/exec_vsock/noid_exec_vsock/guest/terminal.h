// Terminals: a process' pseudo terminal, and the guest's serial console.
#ifndef NOID_TERMINAL_H
#define NOID_TERMINAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

// Opens a pseudo terminal of that size whose slave belongs to `owner`. False, with errno, if there is none.
bool terminal_open(uid_t owner, uint16_t columns, uint16_t rows, int *master, int *slave);

void terminal_resize(int fd, uint16_t columns, uint16_t rows); // what is no terminal stays as it is

// What to type for the end of input: nothing where a program has switched that off. Returns the number of bytes.
size_t terminal_eof(int master, uint8_t typed_last, uint8_t keys[2]);

// The group in the foreground, 0 for none.
pid_t terminal_foreground(int master);

// Tells the guest how large the terminal at the other end of its serial line is.
void console_resize(uint16_t columns, uint16_t rows);

#endif
