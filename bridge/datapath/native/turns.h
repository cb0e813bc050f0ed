/* Whole turns of the usual case: see `turns.c`. */
#ifndef NBD_BRIDGE_TURNS_H
#define NBD_BRIDGE_TURNS_H

#include "core.h"

#include <sys/epoll.h>

/* (The system takes 1024 pieces at once.) */
enum { DP_EVENTS = 64, DP_COMMANDS = 512, DP_PIECES = 1024, DP_TIMES = 64, DP_WIRES = 16 };

/* Why `dp_turns` has ended: any of these together, or 0: nothing came, and the rings are armed. */
enum {
    DP_BUDGET = 1,   /* time is up */
    DP_OTHERS = 2,   /* `others`: events of descriptors that are not known here */
    DP_CHAIN = 4,    /* a chain that is not usual, or no place for it */
    DP_REPLY = 8,    /* a reply that is not usual, from `start` on */
    DP_UNSENT = 16,  /* what is unsent is left to the caller, who goes on with it */
    DP_ENDED = 32,   /* the end of file */
    DP_FAILED = 64,  /* a socket failed, with `error` */
    DP_RAISED = 128, /* a callback failed */
    DP_SOCKET = 256  /* with OTHERS: the socket has more to tell than that it can be read */
};

/* With one of these the last turn has not ended: nothing of it is published. */
#define DP_INCOMPLETE (DP_CHAIN | DP_REPLY | DP_UNSENT | DP_ENDED | DP_FAILED)

struct dp_ring {
    struct dp_queue *queue;
    int kick_fd; /* -1: none */
    uint32_t taken;
    /* So many requests were in flight when some were adjacent; ever less since. */
    uint64_t adjacent;
};

/* A connection to the server. */
struct dp_wire {
    struct dp_channel *channel;
    int socket_fd;
    uint64_t start, end; /* what stands in the staging buffer */

    /* What came of it. */
    int flags; /* REPLY, ENDED and FAILED, where that is so of this one */
    int error;
    uint64_t received_bytes;
};

/* A command that was not sent to its end. */
struct dp_unsent {
    uint64_t sequence;
    uint64_t n_bytes;
};

/* What is being sent, in pieces: commands of this turn, or what the caller had left of earlier
 * ones. The socket took the pieces before `piece`, and the commands before `command`. */
struct dp_output {
    struct iovec pieces[DP_PIECES];
    struct dp_unsent commands[DP_COMMANDS];
    uint32_t piece, piece_count;
    uint32_t command, command_count;
    bool is_callers;
    bool is_watched;     /* the epoll tells when the socket takes more */
    uint64_t sent_bytes; /* of this */
    uint64_t late_bytes; /* in this call, after the socket had been full */
};

struct dp_turns {
    int epoll_fd;
    struct dp_ring *rings;
    uint32_t ring_count;
    uint32_t first_ring; /* another one in each turn */
    uint64_t *disk;
    bool may_write; /* it is known already that something is not durable */
    /* Make that known, before the first write is taken; -1: it failed. */
    int (*begin_to_write)(void *owner);

    /* Commands go to a server: the connections to it, if there are any. */
    struct dp_wire wires[DP_WIRES];
    uint32_t wire_count;
    const uint64_t *route;
    uint64_t *rows; /* the cells of `Rows` */

    /* Or there is a cache, or NULL. */
    const struct dp_resident *cache;

    /* Nanoseconds of CLOCK_MONOTONIC. */
    uint64_t until_ns;
    /* How long to poll after the last work, while long reads are in flight, and at most. */
    uint64_t poll_ns, long_poll_ns, poll_max_ns;
    bool writes_are_long; /* those that were in flight last */
    bool is_crowded;      /* others want the processor: see crowding.py */

    /* epoll_wait of up to a millisecond, with all that may run meanwhile; -1: it failed. */
    int (*wait)(void *owner, struct epoll_event *events);
    /* Call the driver of a ring; -1: it failed. */
    int (*call)(void *owner, uint32_t ring);
    void *owner;

    /* What came of it. */
    bool worked; /* also before: there was work since the last nap */
    uint32_t reads, writes, flushes, naps;
    /* Flushes that have succeeded in turns that have ended: how long each took. (There is at most
     * one in a turn.) */
    uint64_t flush_ns[DP_TIMES];
    uint32_t flushed;
    bool durable; /* all is, since the last of them, as far as `Disk` can know */
    bool flush_is_new; /* one was taken in the last turn */
    bool looked; /* every ring was looked at, and nothing was left there */
    bool cut_short; /* not every ring was looked at in this turn */
    uint64_t shown; /* what of UNFLUSHED was published before that was done last */
    struct epoll_event others[DP_EVENTS];
    uint32_t other_count;
    uint32_t command_count;
    bool is_full; /* there may be more commands than are sent at once */
    struct dp_wire *wire; /* `output` is sent there */
    struct dp_output output;
    bool is_writable; /* in this turn the socket takes more */

    /* Room. */
    struct epoll_event events[DP_EVENTS];
    struct dp_command commands[DP_COMMANDS];
    uint8_t headers[DP_COMMANDS * DP_COMMAND_BYTES];
};

int dp_turns(struct dp_turns *turns);

/* Something is still to be sent. (See `sends.c`.) */
static inline bool dp_is_sending(const struct dp_turns *turns)
{
    return turns->output.command < turns->output.command_count;
}

/* Send the commands that were taken, or what is unsent: as much as the socket takes. 0, or UNSENT,
 * perhaps with FAILED. */
int dp_send_taken(struct dp_turns *turns);
int dp_send_more(struct dp_turns *turns);

#endif
