// One static program, three lives: initramfs init (as pid 1), guest agent, and agent on a unix socket for tests.
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "agent.h"
#include "boot.h"
#include "keeper.h"
#include "say.h"

int main(int argc, char **argv) {
    if (getpid() == 1 && !(argc > 1 && !strcmp(argv[1], "--socket"))) {
        say_to_kernel = true;
        boot();
    }
    if (argc == 2 && !strcmp(argv[1], "--keep")) {
        say_to_kernel = true;
        keeper_run(NULL);
    }
    struct agent_options options = {.starts = 1};
    for (int i = 1; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (!strcmp(argv[i], "--agent")) options.owns_machine = say_to_kernel = true;
        else if (!strcmp(argv[i], "--minimal-init")) options.minimal_init = true;
        else if (!strcmp(argv[i], "--no-root") && value) options.no_root = argv[++i];
        else if (!strcmp(argv[i], "--starts") && value) options.starts = (unsigned)strtoul(argv[++i], NULL, 10);
        else if (!strcmp(argv[i], "--socket") && value) options.socket_path = argv[++i];
        else argc = 0;
    }
    if (argc < 2 || options.owns_machine == (options.socket_path != NULL)) {
        fprintf(stderr,
                "usage: noid-agent --agent                in a guest: answer the host on virtio-serial or vsock\n"
                "       noid-agent --socket PATH          anywhere: answer on a unix socket, change no identity\n"
                "As pid 1 of an initramfs it boots the root file system named on the kernel command line.\n");
        return 2;
    }
    agent_run(&options);
}
