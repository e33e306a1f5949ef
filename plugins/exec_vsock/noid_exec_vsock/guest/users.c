// Reads passwd(5) and group(5) line by line; a line that is too long or broken is skipped, as by everybody else.
#include "users.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// Splits `line` at colons in place. Returns the number of fields.
static int split(char *line, char *fields[], int max) {
    int n = 0;
    line[strcspn(line, "\n")] = 0;
    for (char *field = line; field && n < max;) {
        char *colon = strchr(field, ':');
        if (colon) *colon++ = 0;
        fields[n++] = field;
        field = colon;
    }
    return n;
}

static bool number(const char *text, unsigned *value) {
    if (*text < '0' || *text > '9') return false;
    char *end;
    errno = 0;
    unsigned long long n = strtoull(text, &end, 10);
    if (*end || errno || n >= 0xffffffffULL) return false; // (uid_t)-1 means "leave it" to the kernel
    *value = (unsigned)n;
    return true;
}

// Reads a whole line; the rest of one that does not fit is thrown away and the line not reported.
static bool next_line(FILE *file, char *line, size_t capacity) {
    while (fgets(line, (int)capacity, file)) {
        if (strchr(line, '\n') || feof(file)) return true;
        int c;
        while ((c = getc(file)) != EOF && c != '\n') continue;
    }
    return false;
}

static bool find_in_passwd(const char *name_or_uid, struct user *user) {
    FILE *file = fopen("/etc/passwd", "re");
    if (!file) return false;
    unsigned wanted = 0, uid, gid;
    bool numeric = number(name_or_uid, &wanted), found = false;
    char line[1024], *fields[7];
    while (!found && next_line(file, line, sizeof line)) {
        if (split(line, fields, 7) < 7 || !number(fields[2], &uid) || !number(fields[3], &gid)) continue;
        if (strcmp(fields[0], name_or_uid) && !(numeric && uid == wanted)) continue;
        if (strlen(fields[0]) >= sizeof user->name) continue;
        found = true;
        user->uid = uid;
        user->gid = gid;
        snprintf(user->name, sizeof user->name, "%s", fields[0]);
        snprintf(user->home, sizeof user->home, "%s", fields[5][0] ? fields[5] : "/");
        snprintf(user->shell, sizeof user->shell, "%s", fields[6][0] ? fields[6] : "/bin/sh");
    }
    fclose(file);
    return found;
}

static bool lists(char *members, const char *name) {
    for (char *member = strtok(members, ","); member; member = strtok(NULL, ","))
        if (!strcmp(member, name)) return true;
    return false;
}

static void find_groups(struct user *user) {
    user->groups[0] = user->gid;
    user->group_count = 1;
    FILE *file = fopen("/etc/group", "re");
    if (!file) return;
    char line[4096], *fields[4];
    unsigned gid;
    while (user->group_count < GROUPS_MAX && next_line(file, line, sizeof line))
        if (split(line, fields, 4) == 4 && number(fields[2], &gid) && gid != user->gid && lists(fields[3], user->name))
            user->groups[user->group_count++] = gid;
    fclose(file);
}

bool find_user(const char *name_or_uid, struct user *user) {
    memset(user, 0, sizeof *user);
    if (find_in_passwd(name_or_uid, user)) {
        find_groups(user);
        return true;
    }
    unsigned uid;
    bool is_root = !strcmp(name_or_uid, "root"); // images without /etc/passwd have a root all the same
    if (!is_root && !number(name_or_uid, &uid)) return false;
    user->uid = user->gid = is_root ? 0 : uid;
    if (user->uid == 0) snprintf(user->name, sizeof user->name, "root");
    snprintf(user->home, sizeof user->home, "%s", is_root ? "/root" : "/");
    snprintf(user->shell, sizeof user->shell, "/bin/sh");
    user->groups[0] = user->gid;
    user->group_count = 1;
    return true;
}
