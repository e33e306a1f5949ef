// Each item of the receipt is tried whatever became of the others: a clone with an old clock is better than one with an
// old clock and an old hostname. All of it without a fork: under emulation a shell costs more than everything here.
#include "identity.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/random.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "files.h"
#include "hooks.h"
#include "network.h"
#include "protocol.h"

enum { ENTROPY_BYTES_MIN = 32, ENTROPY_BYTES_MAX = 256, HOSTS_BYTES_MAX = 64 * 1024 };

static const char boot_id_path[] = "/proc/sys/kernel/random/boot_id";

struct wake {
    char hostname[65];
    char machine_id[33];
    char reason[32];
    uint64_t unix_ns, generation;
    uint32_t hooks_ms, flags;
    struct text entropy;
    struct network_request network;
};

static bool parse(const uint8_t *body, size_t length, struct wake *wake) {
    struct reader reader = read_body(body, length);
    memset(wake, 0, sizeof *wake);
    wake->unix_ns = read_u64(&reader);
    wake->generation = read_u64(&reader);
    struct text hostname = read_text(&reader), machine_id = read_text(&reader);
    wake->entropy = read_text(&reader);
    wake->network.wanted = read_u8(&reader) != 0;
    struct text mac = read_text(&reader), address = read_text(&reader), gateway = read_text(&reader);
    struct text dns = read_text(&reader), reason = read_text(&reader);
    wake->hooks_ms = read_u32(&reader);
    wake->flags = read_u32(&reader);
    struct network_request *network = &wake->network;
    return read_whole(&reader) && text_copy(hostname, wake->hostname, sizeof wake->hostname) &&
           text_copy(machine_id, wake->machine_id, sizeof wake->machine_id) &&
           wake->entropy.length >= ENTROPY_BYTES_MIN && wake->entropy.length <= ENTROPY_BYTES_MAX &&
           text_copy(mac, network->mac, sizeof network->mac) &&
           text_copy(address, network->address, sizeof network->address) &&
           text_copy(gateway, network->gateway, sizeof network->gateway) &&
           text_copy(dns, network->dns, sizeof network->dns) && text_copy(reason, wake->reason, sizeof wake->reason);
}

// --- items ----------------------------------------------------------------------------------------------------------

struct item {
    const char *name;
    char before[80], after[80], detail[200];
    int error; // 0: done
};

static void finish(struct writer *receipt, const struct item *item) {
    bool impossible = item->error == EROFS || item->error == ENOSYS || item->error == EOPNOTSUPP;
    write_text(receipt, item->name);
    write_u8(receipt, item->error == 0 ? ITEM_DONE : impossible ? ITEM_NOT_POSSIBLE : ITEM_FAILED);
    write_text(receipt, item->before);
    write_text(receipt, item->after);
    char detail[300];
    if (item->error && item->detail[0])
        snprintf(detail, sizeof detail, "%s: %s", item->detail, strerror(item->error));
    else snprintf(detail, sizeof detail, "%s", item->error ? strerror(item->error) : item->detail);
    write_text(receipt, detail);
}

static void format_now(char *text, size_t capacity) {
    struct timespec now;
    struct tm utc;
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &utc);
    char seconds[32];
    strftime(seconds, sizeof seconds, "%Y-%m-%dT%H:%M:%S", &utc);
    snprintf(text, capacity, "%s.%03ldZ", seconds, now.tv_nsec / 1000000);
}

static void set_clock(const struct wake *wake, struct item *item) {
    format_now(item->before, sizeof item->before);
    struct timespec now = {.tv_sec = (time_t)(wake->unix_ns / 1000000000u),
                           .tv_nsec = (long)(wake->unix_ns % 1000000000u)};
    if (clock_settime(CLOCK_REALTIME, &now)) item->error = errno;
    format_now(item->after, sizeof item->after);
}

// What the generator gives now: of siblings the same before, and different afterwards.
static void draw(char *text, size_t capacity) {
    uint8_t b[8];
    if (getrandom(b, sizeof b, GRND_NONBLOCK) != (ssize_t)sizeof b) return;
    snprintf(text, capacity, "%02x%02x%02x%02x%02x%02x%02x%02x", b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]);
}

// Credits the host's entropy and makes the generator use it at once: a clone that only mixed it in would still give the
// bytes of its siblings until the next scheduled reseed.
static void seed_randomness(const struct wake *wake, struct item *item) {
    draw(item->before, sizeof item->before);
    struct {
        int entropy_count;
        int size;
        uint8_t data[ENTROPY_BYTES_MAX];
    } pool = {.entropy_count = (int)wake->entropy.length * 8, .size = (int)wake->entropy.length};
    memcpy(pool.data, wake->entropy.data, wake->entropy.length);
    int fd = open("/dev/urandom", O_RDWR | O_CLOEXEC);
    if (fd < 0) {
        item->error = errno;
        snprintf(item->detail, sizeof item->detail, "/dev/urandom");
    } else if (ioctl(fd, RNDADDENTROPY, &pool)) {
        item->error = errno;
        snprintf(item->detail, sizeof item->detail, "RNDADDENTROPY");
    } else if (ioctl(fd, RNDRESEEDCRNG)) {
        item->error = errno;
        snprintf(item->detail, sizeof item->detail, "RNDRESEEDCRNG");
    } else {
        snprintf(item->detail, sizeof item->detail, "%zu bytes credited, generator reseeded", wake->entropy.length);
    }
    if (fd >= 0) close(fd);
    explicit_bzero(&pool, sizeof pool);
    draw(item->after, sizeof item->after);
}

// Puts `127.0.1.1 name` into /etc/hosts, in place of the line that was there. Debian's way to resolve the own name.
static int rewrite_hosts(const char *hostname) {
    static char old[HOSTS_BYTES_MAX], new[HOSTS_BYTES_MAX + 128];
    int fd = open("/etc/hosts", O_RDONLY | O_CLOEXEC);
    ssize_t n = fd >= 0 ? read(fd, old, sizeof old - 1) : 0;
    if (fd >= 0) close(fd);
    if (n < 0) return -1;
    if (n == (ssize_t)sizeof old - 1) {
        errno = EFBIG;
        return -1;
    }
    old[n] = 0;
    size_t length = 0;
    bool placed = false;
    if (n == 0) length += (size_t)sprintf(new, "127.0.0.1\tlocalhost\n::1\tlocalhost\n");
    for (const char *line = old; *line;) {
        size_t size = strcspn(line, "\n");
        size += line[size] == '\n';
        if (!strncmp(line, "127.0.1.1", 9) && strchr(" \t", line[9])) {
            if (!placed) length += (size_t)sprintf(new + length, "127.0.1.1\t%s\n", hostname);
            placed = true;
        } else {
            memcpy(new + length, line, size);
            length += size;
        }
        line += size;
    }
    if (!placed) {
        if (length && new[length - 1] != '\n') new[length++] = '\n';
        length += (size_t)sprintf(new + length, "127.0.1.1\t%s\n", hostname);
    }
    return update_file("/etc/hosts", 0644, new, length);
}

static void set_hostname(const struct wake *wake, struct item *item) {
    if (gethostname(item->before, sizeof item->before)) item->before[0] = 0;
    char line[70];
    int length = snprintf(line, sizeof line, "%s\n", wake->hostname);
    if (sethostname(wake->hostname, strlen(wake->hostname))) {
        item->error = errno;
        snprintf(item->detail, sizeof item->detail, "sethostname");
    } else if (update_file("/etc/hostname", 0644, line, (size_t)length)) {
        item->error = errno;
        snprintf(item->detail, sizeof item->detail, "the kernel's name is set, /etc/hostname is not");
    } else if (rewrite_hosts(wake->hostname)) {
        item->error = errno;
        snprintf(item->detail, sizeof item->detail, "the name is set, its line in /etc/hosts is not");
    }
    if (gethostname(item->after, sizeof item->after)) item->after[0] = 0;
}

// True if the guest was another machine until now.
static bool set_machine_id(const struct wake *wake, struct item *item) {
    static const char path[] = "/etc/machine-id", dbus[] = "/var/lib/dbus/machine-id";
    read_line(path, item->before, sizeof item->before);
    char line[40];
    int length = snprintf(line, sizeof line, "%s\n", wake->machine_id);
    struct stat status;
    if (update_file(path, 0444, line, (size_t)length)) {
        item->error = errno;
        snprintf(item->detail, sizeof item->detail, "%s", path);
    } else if (lstat(dbus, &status) == 0 && S_ISREG(status.st_mode) &&
               update_file(dbus, 0444, line, (size_t)length)) {
        // systemd takes a blank /etc/machine-id from here: an old one would come back with the next boot.
        item->error = errno;
        snprintf(item->detail, sizeof item->detail, "%s", dbus);
    }
    read_line(path, item->after, sizeof item->after);
    return strcmp(item->before, wake->machine_id) != 0;
}

void identity_boot_id(char *text, size_t capacity) { read_line(boot_id_path, text, capacity); }

static void make_uuid(char *text) {
    uint8_t b[16];
    if (getrandom(b, sizeof b, 0) != (ssize_t)sizeof b) memset(b, 0, sizeof b); // cannot fail once seeded
    b[6] = (uint8_t)((b[6] & 0x0f) | 0x40);
    b[8] = (uint8_t)((b[8] & 0x3f) | 0x80);
    for (int i = 0; i < 16; i++) {
        if (i == 4 || i == 6 || i == 8 || i == 10) *text++ = '-';
        text += sprintf(text, "%02x", b[i]);
    }
}

// The kernel has no way to change its boot id, so a file is mounted over it. Fresh mounts of proc (other mount
// namespaces, ProtectProc=) still show the kernel's.
static void set_boot_id(struct item *item) {
    static const char file[] = "/run/noid/boot_id";
    identity_boot_id(item->before, sizeof item->before);
    char line[40];
    make_uuid(line);
    strcat(line, "\n");
    snprintf(item->detail, sizeof item->detail, "%s", file);
    // A clone of a clone finds our file there already: then it is enough to change what that says.
    struct stat ours, shown;
    bool mounted = stat(file, &ours) == 0 && stat(boot_id_path, &shown) == 0 && ours.st_dev == shown.st_dev &&
                   ours.st_ino == shown.st_ino;
    if (update_file(file, 0444, line, strlen(line))) {
        item->error = errno;
        return;
    }
    if (!mounted) {
        for (int i = 0; i < 16 && umount2(boot_id_path, MNT_DETACH) == 0; i++) continue;
        if (mount(file, boot_id_path, NULL, MS_BIND, NULL)) item->error = errno;
    }
    if (!item->error) snprintf(item->detail, sizeof item->detail, "mounted over the kernel's");
    identity_boot_id(item->after, sizeof item->after);
}

static void set_generation(const struct wake *wake, struct item *item) {
    static const char file[] = "/run/noid/generation";
    read_line(file, item->before, sizeof item->before);
    char line[32];
    int length = snprintf(line, sizeof line, "%llu\n", (unsigned long long)wake->generation);
    if (update_file(file, 0444, line, (size_t)length)) item->error = errno;
    read_line(file, item->after, sizeof item->after);
    snprintf(item->detail, sizeof item->detail, "%s", file);
}

static void set_network(const struct wake *wake, struct item *item) {
    const char *detail = "";
    item->error = network_configure(&wake->network, item->before, item->after, sizeof item->after, &detail);
    snprintf(item->detail, sizeof item->detail, "%s", detail);
}

// The kernel does this one by itself, as soon as it runs again; all there is to see is that it has the driver.
static void check_generation_device(struct item *item) {
    static const char *const places[] = {"/sys/bus/acpi/drivers/vmgenid/QEMUVGID:00",
                                         "/sys/bus/acpi/drivers/vmgenid/VMGENCTR:00",
                                         "/sys/bus/platform/drivers/vmgenid/QEMUVGID:00",
                                         "/sys/bus/platform/drivers/vmgenid/VMGENCTR:00"};
    for (unsigned i = 0; i < sizeof places / sizeof *places; i++) {
        if (access(places[i], F_OK)) continue;
        snprintf(item->detail, sizeof item->detail, "the kernel reseeds by itself when it changes");
        return;
    }
    item->error = EOPNOTSUPP;
    snprintf(item->detail, sizeof item->detail, "the guest's kernel has no driver for it");
}

enum { ITEMS_MAX = 8 };
static struct item items[ITEMS_MAX];
static unsigned item_count;

static struct item *new_item(const char *name) {
    items[item_count] = (struct item){.name = name};
    return &items[item_count++];
}

// In this order: the clock gets worse by waiting, and who sees the generation grow may rely on all that comes before.
// True if the guest was another machine until now.
static bool become(const struct wake *wake) {
    struct item *randomness = new_item("randomness");
    set_clock(wake, new_item("clock"));
    seed_randomness(wake, randomness);
    set_hostname(wake, new_item("hostname"));
    bool other = set_machine_id(wake, new_item("machine-id"));
    set_boot_id(new_item("boot-id"));
    if (wake->network.wanted) set_network(wake, new_item("network"));
    if (wake->flags & WAKE_HAS_GENERATION_DEVICE) check_generation_device(new_item("vm-generation-id"));
    set_generation(wake, new_item("generation"));
    return other;
}

static void refuse_all(const struct wake *wake) {
    static const char *const names[] = {"randomness", "clock", "hostname", "machine-id", "boot-id", "generation"};
    for (unsigned i = 0; i < sizeof names / sizeof *names; i++) new_item(names[i]);
    if (wake->network.wanted) new_item("network");
    for (unsigned i = 0; i < item_count; i++) {
        items[i].error = EOPNOTSUPP;
        snprintf(items[i].detail, sizeof items[i].detail, "the agent does not own this machine");
    }
}

bool identity_wake(const uint8_t *body, size_t length, bool owns_machine) {
    static struct wake wake;
    if (!parse(body, length, &wake)) return false;
    item_count = 0;
    bool other = false;
    if (owns_machine) {
        mkdir("/run", 0755);
        mkdir("/run/noid", 0755);
        other = become(&wake);
    } else {
        refuse_all(&wake);
    }
    hooks_begin(&(struct hooks_request){.reason = wake.reason,
                                        .vm = wake.hostname,
                                        .generation = wake.generation,
                                        .other = other,
                                        .limit_ms = owns_machine ? wake.hooks_ms : 0});
    explicit_bzero(&wake, sizeof wake);
    return true;
}

void identity_receipt(struct writer *receipt) {
    uint8_t *count = receipt->data + receipt->length;
    write_u16(receipt, 0);
    for (unsigned i = 0; i < item_count; i++) finish(receipt, &items[i]);
    count[0] = (uint8_t)(item_count + hooks_report(receipt));
}
