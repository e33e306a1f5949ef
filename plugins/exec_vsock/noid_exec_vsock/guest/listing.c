// Finding processes again: LIST, and ATTACH and DETACH.
#include <errno.h>
#include <string.h>
#include <sys/wait.h>

#include "outbox.h"
#include "start.h"
#include "table.h"
#include "wire.h"

// A LIST is answered as far as there is room, and goes on later: labels alone can be megabytes.
static bool listing;
static uint32_t list_id, listed;
static unsigned next_slot;

void listing_drop(void) { listing = false; }

static uint8_t flags_of(const struct process *process) {
    unsigned flags = 0;
    if (!log_complete(process)) flags |= PROCESS_IS_RUNNING;
    if (process->tty) flags |= PROCESS_HAS_TTY;
    if (process->stdin_fd >= 0 && !process->stdin_eof) flags |= PROCESS_HAS_STDIN;
    if (process->attached) flags |= PROCESS_IS_ATTACHED;
    return (uint8_t)flags;
}

void write_end(struct writer *writer, const struct process *process) {
    int status = process->wait_status;
    write_u8(writer, WIFSIGNALED(status));
    write_u8(writer, (uint8_t)(WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status)));
    const struct timeval *user = &process->usage.ru_utime, *system = &process->usage.ru_stime;
    write_u64(writer, (uint64_t)user->tv_sec * 1000000 + (uint64_t)user->tv_usec);
    write_u64(writer, (uint64_t)system->tv_sec * 1000000 + (uint64_t)system->tv_usec);
    write_u64(writer, (uint64_t)process->usage.ru_maxrss);
}

static void answer_process(const struct process *process) {
    uint8_t body[ANSWER_BYTES_MAX];
    struct writer writer = {.data = body, .capacity = sizeof body};
    write_u32(&writer, process->id);
    write_u32(&writer, (uint32_t)process->pid);
    write_u8(&writer, flags_of(process));
    write_u64(&writer, process->log.start);
    write_u64(&writer, process->log.end);
    write_end(&writer, process);
    write_u64(&writer, process->started_unix_ns);
    write_u32(&writer, process->label_length);
    if (process->label_length) memcpy(body + writer.length, process->label, process->label_length);
    outbox_answer(MSG_PROCESS, list_id, body, writer.length + process->label_length);
}

void listing_tick(void) {
    while (listing && outbox_has_room()) {
        while (next_slot < high_water && (table[next_slot].state == PROCESS_FREE || table[next_slot].gone)) next_slot++;
        if (next_slot < high_water) {
            answer_process(&table[next_slot++]);
            listed++;
            continue;
        }
        uint8_t body[4];
        struct writer writer = {.data = body, .capacity = sizeof body};
        write_u32(&writer, listed);
        outbox_answer(MSG_LISTED, list_id, body, writer.length);
        listing = false;
    }
    if (listing) answers_waiting = true;
}

void process_list(uint32_t id) {
    if (listing) {
        answer_error(id, "another LIST is not answered yet");
        return;
    }
    listing = true;
    list_id = id;
    listed = next_slot = 0;
    listing_tick();
}

void process_attach(uint32_t id, uint64_t from, uint32_t credit) {
    struct process *process = find(id);
    if (!process || !log_seek(&process->log, from)) {
        if (process) answer_failed(id, FAILED_INVALID, EINVAL, "it has not written that much");
        else answer_failed(id, FAILED_NO_PROCESS, ESRCH, "no such process");
        return;
    }
    process->attached = true;
    process->start_owed = process->told = process->stdin_broken = false;
    process->credit = credit;
    stdin_attach(process);
    uint8_t body[40];
    struct writer writer = {.data = body, .capacity = sizeof body};
    write_u64(&writer, process->log.sent);
    write_u64(&writer, process->log.end);
    write_u64(&writer, process->stdin_taken);
    write_u32(&writer, (uint32_t)process->pid);
    write_u8(&writer, flags_of(process));
    outbox_answer(MSG_ATTACHED, id, body, writer.length);
    answers_waiting = true; // its EXIT, or credit for its stdin
    output_ready(process);
}

void process_detach(uint32_t id) {
    struct process *process = find(id);
    if (process) process_unheard(process);
    outbox_answer(MSG_DETACHED, id, NULL, 0);
}
