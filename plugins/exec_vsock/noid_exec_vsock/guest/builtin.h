// Programs compiled into the agent: what the host needs in a guest must not depend on what its image brings.
#ifndef NOID_BUILTIN_H
#define NOID_BUILTIN_H

#include <stddef.h>

// Runs the builtin named argv[0] in this process: a child that has become the user it is to run as, in its working
// directory, with the pipes at 0, 1 and 2. Returns its exit code; 127, after a line on standard error, if there is none.
int builtin_run(int argc, char **argv);

// Writes the names of all builtins, separated by spaces.
void builtin_names(char *names, size_t capacity);

#endif
