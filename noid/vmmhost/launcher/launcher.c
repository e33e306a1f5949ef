// Starts a VMM in a room of its own: `noid-launcher OPTION... -- PROGRAM ARGUMENT...`
//
// A process is given its limits, its namespaces, its root directory and its user between fork and exec. Python can do
// that only where it gives up vfork, which for a large agent costs more than everything here. So the agent starts this
// program, which does it and becomes the VMM: the process, its environment and its open files stay what they are.
//
// Options are obeyed in a fixed order, whatever their order on the command line:
//
//   --limit NUMBER:VALUE        setrlimit, both limits
//   --lonely                    a network namespace with nothing in it
//   --room SIZE_KIB             a mount namespace whose root is an empty file system in memory of that size
//   --read PATH                 PATH of the host is there, read-only; a symbolic link is made anew
//   --write PATH                PATH of the host is there
//   --device NAME:MAJOR:MINOR   /dev/NAME is there, for the user alone
//   --directory PATH            where the program works
//   --user UID:GID              who it is, without capabilities; --then instead: who it will become by itself
//   --then UID:GID              stays root with nothing but what it takes to open files and to become that user
//
// `noid-launcher --nothing` ends with status 0: what a trial of a room runs in it.
//
// In any case the process can gain no privileges from now on. Whatever fails ends it with status 125 and one line.

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <grp.h>
#include <linux/capability.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>

enum { FAILED = 125, STAGE_LONGEST = PATH_MAX };

// The new root is put together here: it is there on every Linux, and nothing that a VMM is to see lies below it.
static const char stage[] = "/proc";

static void fail(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));

static void fail(const char *format, ...)
{
    int error = errno;
    va_list arguments;
    va_start(arguments, format);
    fputs("noid-launcher: ", stderr);
    vfprintf(stderr, format, arguments);
    fprintf(stderr, ": %s\n", strerror(error));
    va_end(arguments);
    exit(FAILED);
}

static void wrong(const char *text, const char *why)
{
    fprintf(stderr, "noid-launcher: %s: %s\n", text, why);
    exit(FAILED);
}

// Reads `count` numbers separated by colons.
static void numbers(const char *text, unsigned long long *into, int count)
{
    const char *rest = text;
    for (int i = 0; i < count; i++) {
        char *end = NULL;
        errno = 0;
        into[i] = strtoull(rest, &end, 10);
        if (errno || end == rest || *end != (i + 1 < count ? ':' : '\0'))
            wrong(text, "not the numbers expected");
        rest = end + 1;
    }
}

static void limit(const char *text)
{
    unsigned long long pair[2];
    numbers(text, pair, 2);
    struct rlimit both = {.rlim_cur = pair[1], .rlim_max = pair[1]};
    struct rlimit now;
    if (getrlimit((int)pair[0], &now))
        fail("limit %s", text);
    if (both.rlim_max > now.rlim_max)  // more than this process may have anyway
        both.rlim_cur = both.rlim_max = now.rlim_max;
    if (setrlimit((int)pair[0], &both))
        fail("limit %s", text);
}

static void staged(char *into, const char *path)
{
    if (path[0] != '/' || snprintf(into, STAGE_LONGEST, "%s%s", stage, path) >= STAGE_LONGEST)
        wrong(path, "not an absolute path, or too long");
}

// Makes every directory above `path`, which is below the stage.
static void make_parents(char *path)
{
    for (char *slash = path + sizeof stage; (slash = strchr(slash, '/')); slash++) {
        *slash = '\0';
        if (mkdir(path, 0755) && errno != EEXIST)
            fail("making %s", path);
        *slash = '/';
    }
}

static void begin_room(const char *size)
{
    unsigned long long kib;
    char options[64];
    numbers(size, &kib, 1);
    snprintf(options, sizeof options, "mode=755,size=%lluk", kib);
    if (unshare(CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS))
        fail("making namespaces");
    if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL))
        fail("keeping mounts to ourselves");
    if (mount("noid", stage, "tmpfs", MS_NOSUID | MS_NOEXEC, options))
        fail("mounting a root");
}

static void show(const char *path, int writable)
{
    char place[STAGE_LONGEST];
    struct stat facts;
    staged(place, path);
    make_parents(place);
    if (lstat(path, &facts))
        fail("looking at %s", path);
    if (S_ISLNK(facts.st_mode)) {
        char target[PATH_MAX];
        ssize_t length = readlink(path, target, sizeof target - 1);
        if (length < 0)
            fail("reading %s", path);
        target[length] = '\0';
        if (symlink(target, place) && errno != EEXIST)
            fail("linking %s", path);
        return;
    }
    if (S_ISDIR(facts.st_mode)) {
        if (mkdir(place, 0755) && errno != EEXIST)
            fail("making %s", place);
    } else {
        int fd = open(place, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0444);
        if (fd < 0 && errno == EEXIST)  // in a directory that is there already
            return;
        if (fd < 0)
            fail("making %s", place);
        close(fd);
    }
    unsigned long flags = MS_NOSUID | MS_NODEV | (writable ? MS_NOEXEC : MS_RDONLY);
    if (mount(path, place, NULL, MS_BIND, NULL))
        fail("showing %s", path);
    if (mount(NULL, place, NULL, MS_REMOUNT | MS_BIND | flags, NULL))
        fail("protecting %s", path);
}

static void make_device(char *text, uid_t uid, gid_t gid)
{
    char path[PATH_MAX], place[STAGE_LONGEST];
    unsigned long long pair[2];
    char *colon = strchr(text, ':');
    if (!colon || strstr(text, ".."))
        wrong(text, "not NAME:MAJOR:MINOR");
    numbers(colon + 1, pair, 2);
    snprintf(path, sizeof path, "/dev/%.*s", (int)(colon - text), text);
    staged(place, path);
    make_parents(place);
    if (mknod(place, S_IFCHR | 0600, makedev((unsigned)pair[0], (unsigned)pair[1])))
        fail("making the device %s", path);
    if (chown(place, uid, gid))
        fail("giving away the device %s", path);
}

static void enter_room(void)
{
    // Mounted over the same place twice, the old root lies on top of the new one and is taken away.
    if (chdir(stage) || syscall(SYS_pivot_root, ".", ".") || umount2(".", MNT_DETACH) || chdir("/"))
        fail("changing the root");
}

// Gives up for good every capability that is not in `kept`, a set of bits: no program that is started has it again.
static void bound(unsigned long long kept)
{
    for (int capability = 0; capability < 64; capability++)
        if (!(kept >> capability & 1) && prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) && errno != EINVAL)
            fail("giving up capability %d", capability);
}

// Has no capability from now on but those in `kept`.
static void reduce(unsigned long long kept)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct sets[2] = {
        {.effective = (unsigned)kept, .permitted = (unsigned)kept},
        {.effective = (unsigned)(kept >> 32), .permitted = (unsigned)(kept >> 32)},
    };
    if (syscall(SYS_capset, &header, sets))
        fail("giving up capabilities");
}

int main(int argc, char **argv)
{
    const char *room = NULL, *directory = NULL, *user = NULL, *then = NULL;
    int lonely = 0, program = 0;

    if (argc == 2 && !strcmp(argv[1], "--nothing"))
        return 0;

    for (int i = 1; i < argc && !program; i++) {
        if (!strcmp(argv[i], "--")) {
            program = i + 1;
        } else if (!strcmp(argv[i], "--lonely")) {
            lonely = 1;
        } else if (i + 1 == argc) {
            wrong(argv[i], "needs a value");
        } else {
            const char *option = argv[i], *value = argv[++i];
            if (!strcmp(option, "--limit"))
                limit(value);
            else if (!strcmp(option, "--room"))
                room = value;
            else if (!strcmp(option, "--directory"))
                directory = value;
            else if (!strcmp(option, "--user"))
                user = value;
            else if (!strcmp(option, "--then"))
                then = value;
            else if (strcmp(option, "--read") && strcmp(option, "--write") && strcmp(option, "--device"))
                wrong(option, "no such option");
        }
    }
    if (!program || program >= argc)
        wrong("--", "no program is given");
    if (user && then)
        wrong("--then", "not together with --user");

    unsigned long long ids[2] = {0, 0};
    if (user || then)
        numbers(user ? user : then, ids, 2);
    uid_t uid = (uid_t)ids[0];
    gid_t gid = (gid_t)ids[1];

    umask(0);
    if (lonely && unshare(CLONE_NEWNET))
        fail("making a network namespace");
    if (room) {
        begin_room(room);
        for (int i = 1; i < program - 1; i++) {
            if (!strcmp(argv[i], "--read"))
                show(argv[++i], 0);
            else if (!strcmp(argv[i], "--write"))
                show(argv[++i], 1);
            else if (!strcmp(argv[i], "--device"))
                i++, make_device(argv[i], uid, gid);
            else if (strcmp(argv[i], "--lonely"))
                i++;
        }
        enter_room();
    }
    if (directory && chdir(directory))
        fail("changing to %s", directory);
    if (user) {
        bound(0);  // which takes a capability that the change of user takes away
        if (setgroups(0, NULL) || setresgid(gid, gid, gid) || setresuid(uid, uid, uid))
            fail("becoming user %s", user);
        reduce(0);
    } else if (then) {
        const unsigned long long kept = 1ULL << CAP_DAC_OVERRIDE | 1ULL << CAP_SETUID | 1ULL << CAP_SETGID;
        if (setgroups(0, NULL))
            fail("giving up groups");
        bound(kept);
        reduce(kept);
    }
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        fail("giving up new privileges");
    umask(077);
    execv(argv[program], argv + program);
    fail("%s", argv[program]);
}
