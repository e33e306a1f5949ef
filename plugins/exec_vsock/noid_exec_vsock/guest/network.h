// Gives the guest's first network card its address, by netlink.
#ifndef NOID_NETWORK_H
#define NOID_NETWORK_H

#include <stdbool.h>
#include <stddef.h>

struct network_request {
    bool wanted;
    char mac[18];     // empty: leave it
    char address[32]; // IPv4 with prefix length, as 10.0.2.15/24
    char gateway[16]; // empty: no default route
    char dns[16];     // empty: leave resolv.conf
};

// Returns 0 or an error number, then with the step that failed in `*detail`. `before` and `after` are addresses.
int network_configure(const struct network_request *request, char *before, char *after, size_t capacity,
                      const char **detail);

#endif
