// The process table, for the files that look after it. What the rest of the agent may ask for is in process.h.
//
//     FREE -> STARTING -> RUNNING -> ENDED -> FREE
//
// STARTING lasts until the child has become its program (its status pipe closes) or has failed to. ENDED lasts until
// the host has released it, or too many that ended unheard are newer, *and* nobody holds the output pipes any more: a
// daemon left behind by a shell keeps writing into them, is not to be killed by SIGPIPE, and has nobody who reads it.
#ifndef NOID_TABLE_H
#define NOID_TABLE_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/resource.h>
#include <sys/types.h>

#include "log.h"
#include "process.h"
#include "protocol.h"
#include "wire.h"

enum process_state { PROCESS_FREE, PROCESS_STARTING, PROCESS_RUNNING, PROCESS_ENDED };

// Whether and why output is not in a list of what goes next: nothing to do, or no credit.
enum queue_state { QUEUE_IDLE, QUEUE_WAITING, QUEUE_STALLED };

struct source {
    int fd;      // -1 when closed
    bool ready;  // reading may give something
    bool hung_up; // nobody writes any more: only reading until the end tells what there still is
    bool enlarged;
    uint64_t left; // bytes that belong into the log; everything, while the process runs
};

struct process {
    enum process_state state;
    bool attached;     // the host hears of it
    bool gone;         // released, failed or forgotten: only its slot is left
    bool start_owed;   // STARTED or FAILED is
    bool release_owed; // RELEASED is, once it has ended
    bool told;         // EXIT was sent since the host attached
    bool status_due;   // the status pipe has news that found no room in the outbox
    bool tty;
    bool builtin; // ends with its conversation: nobody can go on with half a copy
    uint32_t id;
    pid_t pid;
    int pidfd, status_fd;
    int64_t kill_at_ms; // 0 for never
    int wait_status;
    struct rusage usage;
    uint64_t ended_as; // the how manieth to end
    uint64_t started_unix_ns;
    char *label; // not terminated
    uint32_t label_length;

    int stdin_fd;
    bool stdin_broken; // STDIN_CLOSED is owed
    bool stdin_eof;    // close stdin when what is held has been written
    uint8_t typed_last;
    uint64_t stdin_taken; // bytes accepted in its life
    uint32_t stdin_window, stdin_credit, stdin_owed;
    uint8_t *held; // stdin the pipe did not take; allocated only then
    uint32_t held_start, held_end;

    struct source output[2];
    unsigned turn; // which of them is read next
    struct log log;
    uint64_t credit; // bytes the host is ready for
    enum queue_state queue;
    int next; // in its list
};

extern struct process table[PROCESSES_MAX];
extern unsigned high_water; // slots ever used
extern int epoll_fd;
extern bool owns_machine;
extern bool answers_waiting; // some process has news and the outbox had no room

// process.c
struct process *find(uint32_t id);
bool watch(int fd, uint32_t events, enum event_kind kind, const struct process *process);
void answer_error(uint32_t id, const char *what);
void close_fd(int *fd);
void settle(struct process *process); // says what the host has to know, as far as there is room; frees what is over
void forget(struct process *process); // drops its output, label and name; its slot follows when it can
void kill_group(const struct process *process, int signo);
void reap(struct process *process);
void process_unheard(struct process *process); // nobody is attached to it any more
int64_t now_ms(void);
bool log_complete(const struct process *process); // it has ended, and the log has all it wrote

// stdin.c
void stdin_open(struct process *process, int fd); // with a window, granted as soon as somebody is attached
void stdin_attach(struct process *process);
void stdin_close(struct process *process);
void on_stdin_event(struct process *process, uint32_t epoll_events);
bool stdin_credit_due(const struct process *process);
void stdin_grant(struct process *process); // answers CREDIT

// output.c
enum { OUTPUT_RETRY_MS = 100 };
bool output_starved(void); // somebody was not read because there was no memory for its log
void output_retry(void);   // then, once in a while
void output_ready(struct process *process); // there may be something to do for it
void output_ends(struct process *process);  // the process has ended: what it wrote is in its pipes
void output_drop(struct process *process);  // nobody wants it: read and throw away
void on_output_event(struct process *process, unsigned which, uint32_t epoll_events);

// spawn.c
void answer_failed(uint32_t id, int reason, int error, const char *what);
void on_status_event(struct process *process);
void start_parts_drop(void);
struct process *free_slot(void);

// listing.c
void listing_tick(void);
void listing_drop(void);
void write_end(struct writer *writer, const struct process *process); // how it ended and what it used

#endif
