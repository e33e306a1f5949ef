// Users as /etc/passwd and /etc/group of the guest's root name them. No NSS: a static program has none.
#ifndef NOID_USERS_H
#define NOID_USERS_H

#include <stdbool.h>
#include <sys/types.h>

enum { GROUPS_MAX = 64 };

struct user {
    uid_t uid;
    gid_t gid;
    char name[64];
    char home[256];
    char shell[256];
    gid_t groups[GROUPS_MAX];
    int group_count;
};

// Looks up a name or a decimal uid. A uid without an entry is a user without a name, home "/" and a group of the same
// number. False if there is no such user.
bool find_user(const char *name_or_uid, struct user *user);

#endif
