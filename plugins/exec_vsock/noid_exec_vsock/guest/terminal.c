// Pseudo terminals without a C library's idea of where they are: the master is asked for its slave.
#include "terminal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <unistd.h>

#include "files.h"

#ifndef TIOCGPTPEER
#define TIOCGPTPEER _IO('T', 0x41) // Linux 4.13
#endif

bool terminal_open(uid_t owner, uint16_t columns, uint16_t rows, int *master, int *slave) {
    int unlock = 0;
    *master = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
    if (*master < 0) return false;
    *slave = ioctl(*master, TIOCSPTLCK, &unlock) ? -1 : ioctl(*master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
    // Who is not root owns it already.
    if (*slave < 0 || (geteuid() == 0 && fchown(*slave, owner, (gid_t)-1))) {
        int error = errno;
        close(*master);
        if (*slave >= 0) close(*slave);
        *master = *slave = -1;
        errno = error;
        return false;
    }
    terminal_resize(*master, columns, rows);
    return true;
}

void terminal_resize(int fd, uint16_t columns, uint16_t rows) {
    struct winsize size = {.ws_col = columns, .ws_row = rows};
    ioctl(fd, TIOCSWINSZ, &size);
}

size_t terminal_eof(int master, uint8_t typed_last, uint8_t keys[2]) {
    struct termios settings;
    if (tcgetattr(master, &settings) || settings.c_cc[VEOF] == _POSIX_VDISABLE) return 0;
    keys[0] = keys[1] = settings.c_cc[VEOF];
    // In the middle of a line the key only hands over what there is of it; typed again it is the end.
    bool in_a_line = settings.c_lflag & ICANON && typed_last && typed_last != '\n' && typed_last != '\r';
    return in_a_line ? 2 : 1;
}

pid_t terminal_foreground(int master) {
    pid_t group = 0;
    return ioctl(master, TIOCGPGRP, &group) == 0 && group > 0 ? group : 0;
}

void console_resize(uint16_t columns, uint16_t rows) {
    char active[128], path[160];
    read_line("/sys/class/tty/console/active", active, sizeof active);
    const char *last = strrchr(active, ' '); // the last one named on the kernel command line is /dev/console
    snprintf(path, sizeof path, "/dev/%s", last ? last + 1 : active);
    int fd = active[0] ? open(path, O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC) : -1;
    if (fd < 0) return;
    terminal_resize(fd, columns, rows);
    close(fd);
}
