// A directory that is written into, entered component by component so that nothing ever leads out of it.
#ifndef NOID_TREE_H
#define NOID_TREE_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

struct attributes {
    bool known;
    mode_t mode;
    uid_t uid;
    gid_t gid;
    int64_t mtime;
    uint32_t nanos;
};

// Takes *fd*, the directory that is its root. With *owners*, owners are set as well; that takes root.
void tree_begin(int fd, bool owners);

// Checks *path* and cuts it into components in place: no empty name, no "..", not absolute. Returns what is wrong, or
// NULL. "" and "." are the root itself.
const char *tree_check(char *path);

// Enters the directory that holds *path*'s last component, making what is missing, and says what that component is:
// "" for the root itself. -1 with errno if it cannot be entered; ELOOP if a link is in the way.
int tree_enter(const char *path, const char **last);

// Enters the directory *path* itself, making it if it is missing. Its attributes are set when it is left: what is put
// into it meanwhile would change its time, and may need permissions it will not have.
bool tree_enter_directory(const char *path, const struct attributes *attributes);

// Opens the directory that holds *path*'s last component, without making anything; the caller closes it.
int tree_find(const char *path, const char **last);

// Whether owners are set.
bool tree_owners(void);

// Sets owner, mode and time of *fd*. False with errno.
bool tree_dress(int fd, const struct attributes *attributes);

// Leaves all directories. False if attributes of some could not be set; each is told on standard error.
bool tree_end(void);

// Whether `tree_enter` could not set attributes of a directory it left; told on standard error.
extern bool tree_partial;

#endif
