// Finds the way to the host. A port's name is in sysfs; the device node comes from devtmpfs.
#include "channel.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/vm_sockets.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "say.h"

static const char port_name[] = "agent.0";
enum { VSOCK_PORT = 5005, LOOK_EVERY_MS = 2, PATIENT_AFTER_MS = 30 * 1000, LOOK_RARELY_MS = 1000 };

static int open_port(void) {
    static const char class[] = "/sys/class/virtio-ports";
    DIR *directory = opendir(class);
    if (!directory) return -1;
    int port = -1;
    struct dirent *entry;
    while (port < 0 && (entry = readdir(directory))) {
        if (entry->d_name[0] == '.') continue;
        char path[300], name[64] = "";
        snprintf(path, sizeof path, "%s/%.200s/name", class, entry->d_name);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0) continue;
        ssize_t n = read(fd, name, sizeof name - 1);
        close(fd);
        name[n > 0 ? n : 0] = 0;
        name[strcspn(name, "\n")] = 0;
        if (strcmp(name, port_name)) continue;
        snprintf(path, sizeof path, "/dev/%.200s", entry->d_name);
        port = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
    }
    closedir(directory);
    return port;
}

static int listen_vsock(void) {
    int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) return -1;
    // The module alone gives a socket family; only a transport gives us an address.
    int device = open("/dev/vsock", O_RDONLY | O_CLOEXEC);
    unsigned cid = VMADDR_CID_ANY;
    bool reachable = device >= 0 && ioctl(device, IOCTL_VM_SOCKETS_GET_LOCAL_CID, &cid) == 0 && cid != VMADDR_CID_ANY;
    if (device >= 0) close(device);
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_port = VSOCK_PORT, .svm_cid = VMADDR_CID_ANY};
    if (reachable && bind(fd, (struct sockaddr *)&address, sizeof address) == 0 && listen(fd, 4) == 0) return fd;
    close(fd);
    return -1;
}

void channel_open_guest(struct channel *channel) {
    *channel = (struct channel){.listener = -1, .fd = -1};
    for (long waited_ms = 0;;) {
        channel->fd = open_port();
        if (channel->fd >= 0) return;
        channel->listener = listen_vsock();
        if (channel->listener >= 0) return;
        if (waited_ms == PATIENT_AFTER_MS)
            say("no virtio-serial port %s and no vsock after %ld s; looking on", port_name, waited_ms / 1000);
        long pause_ms = waited_ms < PATIENT_AFTER_MS ? LOOK_EVERY_MS : LOOK_RARELY_MS;
        struct timespec pause = {.tv_sec = pause_ms / 1000, .tv_nsec = pause_ms % 1000 * 1000000};
        nanosleep(&pause, NULL);
        waited_ms += pause_ms;
    }
}

bool channel_open_socket(struct channel *channel, const char *path) {
    *channel = (struct channel){.listener = -1, .fd = -1};
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path) {
        say("socket path %s is too long", path);
        return false;
    }
    memcpy(address.sun_path, path, strlen(path) + 1);
    channel->listener = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (channel->listener < 0 || bind(channel->listener, (struct sockaddr *)&address, sizeof address) ||
        listen(channel->listener, 4)) {
        say("cannot listen at %s: %s", path, strerror(errno));
        return false;
    }
    return true;
}

bool channel_accept(struct channel *channel) {
    int fd = accept4(channel->listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0) return false;
    channel_hang_up(channel);
    channel->fd = fd;
    return true;
}

void channel_hang_up(struct channel *channel) {
    if (channel->listener < 0) return;
    if (channel->fd >= 0) close(channel->fd);
    channel->fd = -1;
}
