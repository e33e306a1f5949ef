// The table of builtins.
#include "builtin.h"

#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "connect.h"
#include "transfer.h"

static const struct builtin {
    const char *name;
    int (*run)(int argc, char **argv);
} builtins[] = {
    {"copy-out", copy_out},
    {"copy-in", copy_in},
    {"connect", connect_out},
    {NULL, NULL},
};

void builtin_names(char *names, size_t capacity) {
    size_t length = 0;
    names[0] = 0;
    for (const struct builtin *builtin = builtins; builtin->name && length < capacity; builtin++)
        length += (size_t)snprintf(names + length, capacity - length, "%s%s", length ? " " : "", builtin->name);
}

int builtin_run(int argc, char **argv) {
    for (const struct builtin *builtin = builtins; builtin->name; builtin++)
        if (!strcmp(builtin->name, argv[0])) return builtin->run(argc, argv);
    dprintf(2, "noid: the guest agent has no builtin '%s'\n", argv[0]);
    return 127;
}
