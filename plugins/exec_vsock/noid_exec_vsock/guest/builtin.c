// The table of builtins.
#include "builtin.h"

#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "transfer.h"

static const struct builtin {
    const char *name;
    int (*run)(int argc, char **argv);
} builtins[] = {
    {"copy-out", copy_out},
    {"copy-in", copy_in},
    {NULL, NULL},
};

int builtin_run(int argc, char **argv) {
    for (const struct builtin *builtin = builtins; builtin->name; builtin++)
        if (!strcmp(builtin->name, argv[0])) return builtin->run(argc, argv);
    dprintf(2, "noid: the guest agent has no builtin '%s'\n", argv[0]);
    return 127;
}
