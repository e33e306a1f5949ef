// An orderly shutdown where the init offers one, else sync and reboot(2).
#include "power.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <unistd.h>

#include "protocol.h"
#include "say.h"

// systemd.1: SIGRTMIN+4 is poweroff.target, +5 reboot.target, with glibc's SIGRTMIN, which is not musl's.
enum { GLIBC_SIGRTMIN = 34, SYSTEMD_POWEROFF = GLIBC_SIGRTMIN + 4, SYSTEMD_REBOOT = GLIBC_SIGRTMIN + 5 };

// Processes started for the host ignore TERM at will; without this they hold up an orderly shutdown for a minute.
static void kill_started_processes(void) {
    int fd = open("/sys/fs/cgroup/noid/cgroup.kill", O_WRONLY | O_CLOEXEC);
    if (fd < 0) return; // no cgroup2, or older than Linux 5.14
    ssize_t written = write(fd, "1", 1);
    (void)written;
    close(fd);
}

void power_change(uint8_t how, enum power_by by) {
    int reboots = how == POWER_REBOOT;
    kill_started_processes();
    sync(); // first of all: whatever comes next may be cut short by the host
    if (by == POWER_BY_OURS && kill(1, reboots ? SIGTERM : SIGUSR2) == 0) return;
    if (by == POWER_BY_IMAGE && access("/run/systemd/system", F_OK) == 0 &&
        kill(1, reboots ? SYSTEMD_REBOOT : SYSTEMD_POWEROFF) == 0)
        return;
    // No root, or an init whose language we do not speak: file systems are consistent after sync and remount.
    if (by != POWER_BY_NOBODY && mount(NULL, "/", NULL, MS_REMOUNT | MS_RDONLY, NULL)) sync();
    reboot(reboots ? RB_AUTOBOOT : RB_POWER_OFF);
    say("reboot(2): %s", strerror(errno));
}
