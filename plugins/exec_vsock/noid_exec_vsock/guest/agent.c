// The main loop: one epoll, edge-triggered throughout.
//
// Edges are not an optimisation. A virtio-serial port reports POLLHUP, which cannot be masked, for as long as no host
// is connected: level-triggered, an idle guest would spin. An edge comes once, and again when the host is back. The
// same holds for output pipes that are not read for want of credit. So every fd is read or written until EAGAIN, or
// remembered in a list that says it is still ready.
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

#include "builtin.h"
#include "channel.h"
#include "hooks.h"
#include "identity.h"
#include "outbox.h"
#include "power.h"
#include "process.h"
#include "protocol.h"
#include "say.h"
#include "wire.h"

enum { INPUT_BYTES = 64 * 1024, EVENTS_MAX = 64, SERVINGS_PER_ROUND = 16, ACK_FLUSH_MS = 500 };

static const struct agent_options *options;
static struct channel channel;
static int epoll_fd;
static bool readable, writable;
static struct decoder decoder;
static uint8_t input[INPUT_BYTES];
static size_t input_start, input_end;

// A wake that waits for the image's hooks. What must not overtake its receipt stays in the decoder, and all behind it.
static struct {
    bool owed;
    uint32_t epoch, id;
} receipt;
static bool holding;
static struct frame held;

static void watch_channel(int fd, enum event_kind kind, uint32_t events) {
    struct epoll_event event = {.events = events | EPOLLET, .data.u64 = event_word(kind, 0)};
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event)) {
        say("epoll_ctl: %s", strerror(errno));
        exit(1);
    }
}

static void answer_text(uint8_t type, uint32_t id, const char *text) {
    uint8_t body[600];
    struct writer writer = {.data = body, .capacity = sizeof body};
    write_text(&writer, text);
    outbox_answer(type, id, body, writer.length);
}

static void on_sync(uint32_t epoch, uint32_t id) {
    if (epoch != outbox_epoch) processes_unhear();
    outbox_drop();
    outbox_epoch = epoch;
    uint8_t body[2048];
    struct writer writer = {.data = body, .capacity = sizeof body};
    struct timespec up;
    struct utsname system;
    char boot_id[64], builtins[256];
    clock_gettime(CLOCK_BOOTTIME, &up);
    uname(&system);
    identity_boot_id(boot_id, sizeof boot_id);
    write_u16(&writer, PROTOCOL_VERSION);
    write_u8(&writer, options->no_root ? STATE_NO_ROOT : STATE_READY);
    write_u8(&writer, options->minimal_init);
    write_u32(&writer, (uint32_t)getpid());
    write_u64(&writer, (uint64_t)up.tv_sec * 1000000000u + (uint64_t)up.tv_nsec);
    write_u32(&writer, PROCESSES_MAX);
    write_u32(&writer, processes_alive());
    write_u32(&writer, options->starts);
    write_text(&writer, boot_id);
    write_text(&writer, system.release);
    write_text(&writer, options->no_root ? options->no_root : "");
    builtin_names(builtins, sizeof builtins);
    write_text(&writer, builtins);
    outbox_answer(MSG_HELLO, id, body, writer.length);
}

static void on_credit(const struct frame *frame) {
    struct reader reader = read_body(frame->body, frame->length);
    uint8_t stream = read_u8(&reader);
    uint32_t bytes = read_u32(&reader);
    if (read_whole(&reader)) process_credit(frame->id, stream, bytes);
    else answer_text(MSG_ERROR, frame->id, "malformed CREDIT");
}

// Grace of END and RELEASE, in milliseconds.
static bool read_grace(const struct frame *frame, uint32_t *grace_ms) {
    struct reader reader = read_body(frame->body, frame->length);
    *grace_ms = read_u32(&reader);
    if (!read_whole(&reader)) answer_text(MSG_ERROR, frame->id, "malformed END or RELEASE");
    return read_whole(&reader);
}

static void on_resize(const struct frame *frame) {
    struct reader reader = read_body(frame->body, frame->length);
    uint16_t columns = read_u16(&reader), rows = read_u16(&reader);
    if (read_whole(&reader)) process_resize(frame->id, columns, rows);
    else answer_text(MSG_ERROR, frame->id, "malformed RESIZE");
}

static void on_attach(const struct frame *frame) {
    struct reader reader = read_body(frame->body, frame->length);
    uint64_t from = read_u64(&reader);
    uint32_t credit = read_u32(&reader);
    if (read_whole(&reader)) process_attach(frame->id, from, credit);
    else answer_text(MSG_ERROR, frame->id, "malformed ATTACH");
}

static void give_receipt(void) {
    if (!receipt.owed || hooks_running() || !outbox_has_room()) return;
    receipt.owed = false;
    if (receipt.epoch != outbox_epoch) return; // who asked is gone
    uint8_t body[ANSWER_BYTES_MAX];
    struct writer writer = {.data = body, .capacity = sizeof body};
    identity_receipt(&writer);
    outbox_answer(MSG_RECEIPT, receipt.id, body, writer.length);
}

static void on_wake(const struct frame *frame) {
    if (!identity_wake(frame->body, frame->length, options->owns_machine && !options->no_root)) {
        answer_text(MSG_ERROR, frame->id, "malformed WAKE");
        return;
    }
    receipt.owed = true;
    receipt.epoch = frame->epoch;
    receipt.id = frame->id;
    give_receipt();
}

// Writes the acknowledgement out, whatever it takes, but not for ever: the host may have stopped listening.
static void flush_acknowledgement(void) {
    for (int waited = 0; outbox_flush(channel.fd) == OUTBOX_BLOCKED && waited < ACK_FLUSH_MS; waited += 10) {
        struct pollfd wait = {.fd = channel.fd, .events = POLLOUT};
        poll(&wait, 1, 10);
    }
}

static void on_power(const struct frame *frame) {
    uint8_t how = frame->length == 1 ? frame->body[0] : 0xff;
    if (how != POWER_OFF && how != POWER_REBOOT) {
        answer_text(MSG_ERROR, frame->id, "malformed POWER");
        return;
    }
    outbox_answer(MSG_POWERING, frame->id, NULL, 0);
    flush_acknowledgement();
    if (!options->owns_machine) exit(0);
    power_change(how, options->no_root ? POWER_BY_NOBODY : options->minimal_init ? POWER_BY_OURS : POWER_BY_IMAGE);
}

static void on_frame(const struct frame *frame) {
    if (frame->type == MSG_SYNC) {
        if (frame->epoch) on_sync(frame->epoch, frame->id);
        return;
    }
    if (!outbox_epoch || frame->epoch != outbox_epoch) return; // another conversation's
    if (receipt.owed && (frame->type == MSG_START || frame->type == MSG_WAKE)) {
        holding = true;
        held = *frame;
        return;
    }
    uint32_t grace_ms;
    switch (frame->type) {
    case MSG_PING: outbox_answer(MSG_PONG, frame->id, frame->body, frame->length > 64 ? 64 : frame->length); break;
    case MSG_START_PART:
        if (!options->no_root) process_start_part(frame->id, frame->body, frame->length);
        break;
    case MSG_START:
        if (options->no_root) process_refuse(frame->id, options->no_root);
        else process_start(frame->id, frame->body, frame->length);
        break;
    case MSG_STDIN: process_stdin(frame->id, frame->body, frame->length); break;
    case MSG_STDIN_EOF: process_stdin_eof(frame->id); break;
    case MSG_CREDIT: on_credit(frame); break;
    case MSG_SIGNAL:
        if (frame->length == 1) process_signal(frame->id, frame->body[0]);
        else answer_text(MSG_ERROR, frame->id, "malformed SIGNAL");
        break;
    case MSG_END:
        if (read_grace(frame, &grace_ms)) process_end(frame->id, grace_ms);
        break;
    case MSG_RELEASE:
        if (read_grace(frame, &grace_ms)) process_release(frame->id, grace_ms);
        break;
    case MSG_LIST: process_list(frame->id); break;
    case MSG_ATTACH: on_attach(frame); break;
    case MSG_DETACH: process_detach(frame->id); break;
    case MSG_RESIZE: on_resize(frame); break;
    case MSG_WAKE: on_wake(frame); break;
    case MSG_POWER: on_power(frame); break;
    default: answer_text(MSG_ERROR, frame->id, "unknown message type");
    }
}

// The host is gone for now. What was half said is forgotten; processes go on, and their logs keep what they say.
static void on_disconnect(void) {
    processes_unhear();
    decoder_reset(&decoder);
    holding = false;
    input_start = input_end = 0;
    readable = writable = false;
    if (channel.listener >= 0) outbox_drop(); // a port's bytes are kept: the same host may only have been restarted
    channel_hang_up(&channel);
}

// Acts on what the host sent, as long as there is room for answers. At most one buffer, so that output gets its turn.
static void take_input(void) {
    if (input_start == input_end && readable) {
        ssize_t n = read(channel.fd, input, sizeof input);
        if (n > 0) {
            input_start = 0;
            input_end = (size_t)n;
        } else if (n < 0 && errno == EAGAIN) {
            readable = false;
        } else if (n == 0 || errno != EINTR) {
            on_disconnect();
        }
    }
    if (holding && !receipt.owed && outbox_has_room()) {
        holding = false;
        on_frame(&held);
    }
    while (input_start < input_end && outbox_has_room() && !holding) {
        struct frame frame;
        bool complete;
        input_start += decoder_feed(&decoder, input + input_start, input_end - input_start, &frame, &complete);
        if (complete) on_frame(&frame);
    }
}

static void give_output(void) {
    for (int i = 0; writable && i < SERVINGS_PER_ROUND; i++) {
        enum outbox_result result = outbox_flush(channel.fd);
        if (result == OUTBOX_BROKEN && channel.listener >= 0) on_disconnect();
        else if (result != OUTBOX_EMPTY) writable = false;
        else if (!processes_serve()) return;
    }
}

static bool has_work(void) {
    bool input_ready = holding ? !receipt.owed : input_start < input_end || readable;
    bool output_ready = !outbox_is_empty() || processes_have_output();
    if (processes_unheard()) return true;
    return channel.fd >= 0 && ((input_ready && outbox_has_room()) || (writable && output_ready));
}

static void on_events(const struct epoll_event *events, int n) {
    for (int i = 0; i < n; i++) {
        enum event_kind kind = (enum event_kind)(events[i].data.u64 >> 32);
        if (kind == EVENT_CHANNEL) {
            readable = writable = channel.fd >= 0; // reading and writing will tell
        } else if (kind == EVENT_LISTENER) {
            while (channel_accept(&channel)) {
                int fd = channel.fd;
                channel.fd = -1; // on_disconnect is about the connection before this one
                on_disconnect();
                channel.fd = fd;
                watch_channel(fd, EVENT_CHANNEL, EPOLLIN | EPOLLOUT);
                readable = writable = true;
            }
        } else if (kind == EVENT_HOOK_EXIT || kind == EVENT_HOOK_OUTPUT) {
            hooks_event(kind == EVENT_HOOK_OUTPUT);
        } else {
            process_event(kind, (unsigned)(events[i].data.u64 & 0xffffffff), events[i].events);
        }
    }
}

enum { AGENT_NICE = -15 };

static void prepare_process(void) {
    signal(SIGPIPE, SIG_IGN);
    signal(SIGHUP, SIG_IGN);
    if (!options->owns_machine) return;
    // An image's init may end everything at shutdown before it is done with us; our own waits for us to go.
    if (!options->minimal_init) signal(SIGTERM, SIG_IGN);
    int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    if (fd >= 0 && write(fd, "-1000", 5) < 0) say("cannot be spared by the OOM killer: %s", strerror(errno));
    if (fd >= 0) close(fd);
    // An answer is short and somebody waits for it: neither a busy guest nor what a wake sets in motion goes first.
    if (setpriority(PRIO_PROCESS, 0, AGENT_NICE)) say("cannot take precedence: %s", strerror(errno));
}

static int timeout_ms(void) {
    if (has_work()) return 0;
    int processes = processes_timeout_ms(), hooks = hooks_timeout_ms();
    return processes < 0 || (hooks >= 0 && hooks < processes) ? hooks : processes;
}

_Noreturn void agent_run(const struct agent_options *given) {
    options = given;
    prepare_process();
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    processes_init(epoll_fd, options->owns_machine);
    hooks_init(epoll_fd);
    if (options->socket_path) {
        if (!channel_open_socket(&channel, options->socket_path)) exit(1);
    } else {
        channel_open_guest(&channel);
    }
    if (channel.listener >= 0) watch_channel(channel.listener, EVENT_LISTENER, EPOLLIN);
    else watch_channel(channel.fd, EVENT_CHANNEL, EPOLLIN | EPOLLOUT);
    for (;;) {
        struct epoll_event events[EVENTS_MAX];
        int n = epoll_wait(epoll_fd, events, EVENTS_MAX, timeout_ms());
        if (n < 0 && errno != EINTR) {
            say("epoll_wait: %s", strerror(errno));
            exit(1);
        }
        on_events(events, n);
        hooks_tick();
        give_receipt();
        take_input();
        processes_tick();
        give_output();
        processes_serve_unheard();
    }
}
