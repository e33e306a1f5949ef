// rtnetlink(7) by hand: link down if its MAC changes, addresses flushed and set, link up, default route, resolv.conf.
#include "network.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <unistd.h>

#include "files.h"

struct request {
    struct nlmsghdr header;
    union {
        struct ifinfomsg link;
        struct ifaddrmsg address;
        struct rtmsg route;
    } body;
    uint8_t attributes[64];
};

// The kernel answers at once; the bound is for a kernel that does not, in front of which nobody must hang.
static int open_netlink(void) {
    int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
    struct timeval limit = {.tv_sec = 2};
    if (fd >= 0) setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    return fd;
}

static void add_attribute(struct request *request, unsigned short type, const void *data, unsigned short length) {
    struct rtattr attribute = {.rta_type = type, .rta_len = (unsigned short)RTA_LENGTH(length)};
    uint8_t *end = (uint8_t *)request + NLMSG_ALIGN(request->header.nlmsg_len);
    memcpy(end, &attribute, sizeof attribute);
    memcpy(end + RTA_LENGTH(0), data, length);
    request->header.nlmsg_len = (uint32_t)(NLMSG_ALIGN(request->header.nlmsg_len) + RTA_ALIGN(attribute.rta_len));
}

// Sends one request and waits for its acknowledgement. Returns 0 or an error number.
static int ask(int fd, struct request *request) {
    request->header.nlmsg_flags |= NLM_F_REQUEST | NLM_F_ACK;
    if (send(fd, request, request->header.nlmsg_len, 0) < 0) return errno;
    union {
        struct nlmsghdr header;
        uint8_t bytes[1024];
    } reply;
    ssize_t n = recv(fd, &reply, sizeof reply, 0);
    if (n < 0) return errno == EAGAIN ? ETIMEDOUT : errno;
    if (n < (ssize_t)(NLMSG_HDRLEN + sizeof(struct nlmsgerr)) || reply.header.nlmsg_type != NLMSG_ERROR) return EPROTO;
    struct nlmsgerr error;
    memcpy(&error, NLMSG_DATA(&reply.header), sizeof error);
    return -error.error;
}

static struct request new_request(unsigned short type, unsigned short flags, size_t body) {
    return (struct request){
        .header = {.nlmsg_len = (uint32_t)NLMSG_LENGTH(body), .nlmsg_type = type, .nlmsg_flags = flags}};
}

static int set_link(int fd, int index, bool up, const uint8_t *mac) {
    struct request request = new_request(RTM_NEWLINK, 0, sizeof(struct ifinfomsg));
    request.body.link = (struct ifinfomsg){.ifi_index = index, .ifi_change = IFF_UP, .ifi_flags = up ? IFF_UP : 0};
    if (mac) add_attribute(&request, IFLA_ADDRESS, mac, 6);
    return ask(fd, &request);
}

static int set_address(int fd, int index, bool add, struct in_addr address, unsigned prefix) {
    struct request request = new_request(add ? RTM_NEWADDR : RTM_DELADDR, add ? NLM_F_CREATE | NLM_F_REPLACE : 0,
                                         sizeof(struct ifaddrmsg));
    request.body.address =
        (struct ifaddrmsg){.ifa_family = AF_INET, .ifa_prefixlen = (uint8_t)prefix, .ifa_index = (unsigned)index};
    add_attribute(&request, IFA_LOCAL, &address, sizeof address);
    add_attribute(&request, IFA_ADDRESS, &address, sizeof address);
    if (add && prefix < 31) {
        struct in_addr broadcast = {.s_addr = address.s_addr | htonl(0xffffffffu >> prefix)};
        add_attribute(&request, IFA_BROADCAST, &broadcast, sizeof broadcast);
    }
    return ask(fd, &request);
}

static int set_default_route(int fd, int index, struct in_addr gateway) {
    struct request request = new_request(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, sizeof(struct rtmsg));
    request.body.route = (struct rtmsg){.rtm_family = AF_INET,
                                        .rtm_table = RT_TABLE_MAIN,
                                        .rtm_protocol = RTPROT_STATIC,
                                        .rtm_scope = RT_SCOPE_UNIVERSE,
                                        .rtm_type = RTN_UNICAST};
    add_attribute(&request, RTA_GATEWAY, &gateway, sizeof gateway);
    add_attribute(&request, RTA_OIF, &index, sizeof index);
    return ask(fd, &request);
}

// The address and prefix a card has now, by ioctl: netlink would need a dump for what is one number. False: none.
static bool current_address(const char *name, struct in_addr *address, unsigned *prefix) {
    struct ifreq request = {0};
    snprintf(request.ifr_name, sizeof request.ifr_name, "%s", name);
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    bool found = fd >= 0 && ioctl(fd, SIOCGIFADDR, &request) == 0;
    if (found) {
        struct sockaddr_in in;
        memcpy(&in, &request.ifr_addr, sizeof in);
        *address = in.sin_addr;
        found = ioctl(fd, SIOCGIFNETMASK, &request) == 0;
        memcpy(&in, &request.ifr_netmask, sizeof in);
        *prefix = (unsigned)__builtin_popcount(in.sin_addr.s_addr);
    }
    if (fd >= 0) close(fd);
    return found;
}

static void format_address(const char *name, char *text, size_t capacity) {
    struct in_addr address;
    unsigned prefix;
    char number[INET_ADDRSTRLEN];
    if (current_address(name, &address, &prefix) && inet_ntop(AF_INET, &address, number, sizeof number))
        snprintf(text, capacity, "%s %s/%u", name, number, prefix);
    else snprintf(text, capacity, "%s", name);
}

// The card with the lowest index that is a device and no loopback. 0: there is none.
static int first_card(char *name) {
    int best = 0;
    DIR *directory = opendir("/sys/class/net");
    struct dirent *entry;
    while (directory && (entry = readdir(directory))) {
        char path[300];
        snprintf(path, sizeof path, "/sys/class/net/%.200s/device", entry->d_name);
        if (entry->d_name[0] == '.' || access(path, F_OK)) continue;
        int index = (int)if_nametoindex(entry->d_name);
        if (index > 0 && (!best || index < best)) {
            best = index;
            snprintf(name, IF_NAMESIZE, "%.15s", entry->d_name);
        }
    }
    if (directory) closedir(directory);
    return best;
}

static bool parse_mac(const char *text, uint8_t mac[6]) {
    unsigned v[6];
    if (sscanf(text, "%2x:%2x:%2x:%2x:%2x:%2x", &v[0], &v[1], &v[2], &v[3], &v[4], &v[5]) != 6) return false;
    for (int i = 0; i < 6; i++) mac[i] = (uint8_t)v[i];
    return true;
}

static bool parse_address(const char *text, struct in_addr *address, unsigned *prefix) {
    char number[INET_ADDRSTRLEN];
    const char *slash = strchr(text, '/');
    if (!slash || (size_t)(slash - text) >= sizeof number) return false;
    snprintf(number, sizeof number, "%.*s", (int)(slash - text), text);
    char *end;
    unsigned long bits = strtoul(slash + 1, &end, 10);
    *prefix = (unsigned)bits;
    return slash[1] >= '0' && slash[1] <= '9' && !*end && bits >= 1 && bits <= 32 &&
           inet_pton(AF_INET, number, address) == 1;
}

// Only where nothing useful is there: a missing, empty or dangling resolv.conf. What an image configured stays.
static int write_resolv_conf(const char *dns) {
    struct stat status;
    if (stat("/etc/resolv.conf", &status) == 0 && status.st_size > 0) return 0;
    char line[40];
    int length = snprintf(line, sizeof line, "nameserver %s\n", dns);
    return replace_file("/etc/resolv.conf", 0644, line, (size_t)length) ? errno : 0;
}

static int mac_differs(const char *name, const uint8_t mac[6]) {
    struct ifreq request = {0};
    snprintf(request.ifr_name, sizeof request.ifr_name, "%s", name);
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    int differs = fd < 0 || ioctl(fd, SIOCGIFHWADDR, &request) || memcmp(request.ifr_hwaddr.sa_data, mac, 6) != 0;
    if (fd >= 0) close(fd);
    return differs;
}

static int configure_card(int fd, int index, const char *name, const struct network_request *request,
                          const char **detail) {
    struct in_addr address, gateway, old;
    unsigned prefix, old_prefix;
    uint8_t mac[6];
    *detail = "the lease";
    if (!parse_address(request->address, &address, &prefix)) return EINVAL;
    if (request->gateway[0] && inet_pton(AF_INET, request->gateway, &gateway) != 1) return EINVAL;
    if (request->mac[0] && !parse_mac(request->mac, mac)) return EINVAL;
    int error = 0;
    *detail = "set the MAC address";
    if (request->mac[0] && mac_differs(name, mac)) {
        error = set_link(fd, index, false, NULL);
        if (!error) error = set_link(fd, index, false, mac);
        if (error) return error;
    }
    *detail = "remove the old address";
    // Removing a primary address removes its secondaries too, so this ends; the bound is for kernels told otherwise.
    for (int i = 0; i < 8 && !error && current_address(name, &old, &old_prefix); i++) {
        if (old.s_addr == address.s_addr && old_prefix == prefix) break;
        error = set_address(fd, index, false, old, old_prefix);
    }
    if (error) return error;
    *detail = "bring the link up";
    if ((error = set_link(fd, index, true, NULL))) return error;
    *detail = "set the address";
    if ((error = set_address(fd, index, true, address, prefix))) return error;
    *detail = "set the default route";
    if (request->gateway[0] && (error = set_default_route(fd, index, gateway))) return error;
    *detail = "write /etc/resolv.conf";
    if (request->dns[0] && (error = write_resolv_conf(request->dns))) return error;
    *detail = "";
    return 0;
}

// Whether the card is up with just this address and, where one is asked for, this MAC.
static bool is_configured(const char *name, const struct network_request *request) {
    struct in_addr wanted, found;
    unsigned wanted_prefix, found_prefix;
    uint8_t mac[6];
    struct ifreq flags = {0};
    snprintf(flags.ifr_name, sizeof flags.ifr_name, "%s", name);
    if (!parse_address(request->address, &wanted, &wanted_prefix) || !current_address(name, &found, &found_prefix) ||
        found.s_addr != wanted.s_addr || found_prefix != wanted_prefix)
        return false;
    if (request->mac[0] && (!parse_mac(request->mac, mac) || mac_differs(name, mac))) return false;
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    bool up = fd >= 0 && ioctl(fd, SIOCGIFFLAGS, &flags) == 0 && (flags.ifr_flags & IFF_UP);
    if (fd >= 0) close(fd);
    return up;
}

int network_configure(const struct network_request *request, char *before, char *after, size_t capacity,
                      const char **detail) {
    static char name[IF_NAMESIZE]; // the card of the wake before, which is in the memory of every clone
    *detail = "as it was";
    if (name[0] && is_configured(name, request)) {
        format_address(name, before, capacity);
        memcpy(after, before, capacity);
        return 0;
    }
    *detail = "the guest has no network card";
    int index = first_card(name);
    if (!index) return EOPNOTSUPP;
    format_address(name, before, capacity);
    *detail = "netlink";
    int fd = open_netlink();
    if (fd < 0) return errno;
    int error = configure_card(fd, index, name, request, detail);
    close(fd);
    format_address(name, after, capacity);
    return error;
}
