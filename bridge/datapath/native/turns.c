/* Turns of the loop as long as everything is usual: wait, receive, answer, take, send, publish.
 *
 * It does what `loop.Loop` does with the functions of `core.c`, and ends as soon as there is
 * anything else to do: another descriptor, a chain or reply that is not usual, a socket that stays
 * full. It never blocks but in `wait`, and ends after `until_ns`.
 *
 * A turn in which something was not usual is left as it is, for the caller to go on with and to
 * end: what was pushed in it is not published. For whatever is in a ring was put there by a driver
 * that knew nothing of this turn's answers; if it is a flush that fails, that must not count as
 * telling of them (see `durability`). So nothing is published while there is a chain to be taken;
 * and as a driver may put one there just before a publication, that one counts as `shown` only when
 * every ring was looked at once more.
 */
#include "turns.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

enum {
    RECEIVES_PER_TURN = 8,
    STAGING_LONG_BYTES = 16 << 10, /* while long reads are in flight: see transmission.py */
    SHARE = 8,                     /* commands that go to one of several connections at once */
    DEEP = 16,                     /* with so many in flight, waiting gathers a batch */
    BUSY_BYTES = 1 << 20,          /* with more of large requests, the servers have enough to do */
    LONG_WRITE_BYTES = 256 << 10,  /* each, on average: it takes longer than to poll is worth */
    LONG_TURN_NS = 5000000,        /* as in loop.py */
    NEXT_NS = 2000,                /* until then a driver amid adjacent requests makes another */
    ADJACENT_NS = 40000            /* to wait for all of them */
};

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static struct dp_queue *queue_of(void *owner, unsigned number)
{
    struct dp_turns *turns = owner;

    for (uint32_t index = 0; index < turns->ring_count; index++)
        if (turns->rings[index].queue->cells[DP_NUMBER] == number)
            return turns->rings[index].queue;
    return NULL;
}

/* What was touched is published at the end of this turn anyway. */
static void untouch(struct dp_turns *turns, const struct dp_answered *answered)
{
    for (uint32_t index = 0; index < answered->touched_count; index++) {
        struct dp_queue *queue = queue_of(turns, answered->touched[index]);

        if (queue)
            queue->cells[DP_TOUCHED] = 0;
    }
}

static int take_answers(struct dp_turns *turns, struct dp_wire *wire)
{
    struct dp_answered answered;
    uint64_t *cells = wire->channel->cells, flushed = cells[DP_FLUSHED];

    dp_answers(wire->channel, queue_of, turns, true, wire->start, wire->end, &answered);
    wire->start = answered.start;
    if (cells[DP_FLUSHED] != flushed)
        cells[DP_FLUSH_TOOK_NS] = now_ns() - cells[DP_FLUSH_BEGAN_NS];
    untouch(turns, &answered);
    return wire->end - wire->start >= 16 && !answered.waits ? DP_REPLY : 0;
}

static int not_received(struct dp_wire *wire, ssize_t got, bool *drained)
{
    *drained = true;
    if (!got)
        return DP_ENDED;
    if (errno == EAGAIN || errno == EINTR)
        return 0;
    wire->error = errno;
    return DP_FAILED;
}

/* The same amid a long payload: into the guest's memory, and what comes after it. */
static int receive_direct(struct dp_turns *turns, struct dp_wire *wire, bool *drained)
{
    struct dp_channel *channel = wire->channel;
    uint64_t left = channel->cells[DP_DIRECT_LEFT], direct;
    struct iovec places[DP_MAX_SEGMENTS + 1];
    uint32_t count = dp_direct(channel, queue_of, turns, places);
    struct msghdr message = {.msg_iov = places, .msg_iovlen = count + 1};
    struct dp_answered answered;
    ssize_t got;

    if (!count || channel->staging_bytes < STAGING_LONG_BYTES)
        return DP_REPLY;
    places[count] = (struct iovec){channel->staging, STAGING_LONG_BYTES};
    got = recvmsg(wire->socket_fd, &message, MSG_DONTWAIT);
    if (got <= 0)
        return not_received(wire, got, drained);
    *drained = (uint64_t)got < left + STAGING_LONG_BYTES;
    wire->received_bytes += (uint64_t)got;
    direct = (uint64_t)got < left ? (uint64_t)got : left;
    dp_direct_received(channel, queue_of, turns, direct, &answered);
    untouch(turns, &answered);
    wire->start = 0;
    wire->end = (uint64_t)got - direct;
    return take_answers(turns, wire);
}

/* Receive once, and take the usual replies; the flags. `*drained`: there is no more for now. */
static int receive_once(struct dp_turns *turns, struct dp_wire *wire, bool *drained)
{
    struct dp_channel *channel = wire->channel;
    uint64_t room;
    ssize_t got;

    if (channel->cells[DP_DIRECT_LEFT])
        return receive_direct(turns, wire, drained);
    if (wire->start) {
        memmove(channel->staging, channel->staging + wire->start, wire->end - wire->start);
        wire->end -= wire->start;
        wire->start = 0;
    }
    room = channel->staging_bytes - wire->end;
    if (channel->cells[DP_LONG_READS] && room > STAGING_LONG_BYTES)
        room = STAGING_LONG_BYTES;
    if (!room)
        return DP_REPLY;
    got = recv(wire->socket_fd, channel->staging + wire->end, room, MSG_DONTWAIT);
    if (got <= 0)
        return not_received(wire, got, drained);
    *drained = (uint64_t)got < room;
    wire->end += (uint64_t)got;
    wire->received_bytes += (uint64_t)got;
    return take_answers(turns, wire);
}

static int receive(struct dp_turns *turns, struct dp_wire *wire)
{
    bool drained = false;
    int flags = 0;

    for (int calls = 0; calls < RECEIVES_PER_TURN && !flags && !drained; calls++)
        flags = receive_once(turns, wire, &drained);
    wire->flags |= flags;
    return flags;
}

static int handle_events(struct dp_turns *turns, int count)
{
    int flags = 0;

    turns->is_writable = false;
    for (int index = 0; index < count; index++) {
        const struct epoll_event *event = &turns->events[index];
        bool known = false;

        for (uint32_t at = 0; at < turns->wire_count && !known; at++)
            if (event->data.fd == turns->wires[at].socket_fd) {
                known = !(event->events & ~(uint32_t)(EPOLLIN | EPOLLOUT));
                turns->is_writable |= (event->events & EPOLLOUT) != 0;
                if (!known)
                    flags |= DP_SOCKET;
                else if (event->events & EPOLLIN)
                    flags |= receive(turns, &turns->wires[at]);
                break;
            }
        for (uint32_t ring = 0; ring < turns->ring_count && !known; ring++)
            known = event->data.fd == turns->rings[ring].kick_fd;
        if (!known && turns->other_count < DP_EVENTS) {
            turns->others[turns->other_count++] = *event;
            flags |= DP_OTHERS;
        }
    }
    turns->worked |= count > 0;
    return flags;
}

/* What the connections have answered. */
static uint64_t unflushed(const struct dp_turns *turns)
{
    uint64_t sum = 0;

    for (uint32_t index = 0; index < turns->wire_count; index++)
        sum += turns->wires[index].channel->cells[DP_UNFLUSHED];
    return sum;
}

/* The one connection that there is, or NULL: only then are there flushes here. */
static struct dp_channel *alone(const struct dp_turns *turns)
{
    return turns->wire_count == 1 ? turns->wires[0].channel : NULL;
}

/* Where the next commands go: as `Route.least_busy`. */
static struct dp_wire *least_busy(struct dp_turns *turns)
{
    struct dp_wire *least = NULL;

    for (uint32_t index = 0; index < turns->wire_count; index++) {
        struct dp_wire *wire = &turns->wires[index];

        if (!least || wire->channel->cells[DP_ROWS] < least->channel->cells[DP_ROWS])
            least = wire;
    }
    return least;
}

static bool is_long_over(const struct dp_turns *turns)
{
    uint64_t now = now_ns();

    return now > turns->until_ns && now - turns->until_ns > LONG_TURN_NS;
}

/* So many more commands are to be sent: how many pieces that is. */
static uint32_t pieces_of(struct dp_turns *turns, uint32_t count)
{
    uint32_t pieces = count;

    for (; count; count--)
        pieces += turns->commands[turns->command_count++].segment_count;
    return pieces;
}

/* Only what one look at a ring finds becomes one command. A driver that was told of many answers
 * makes its next requests one by one: while it goes on like that, wait for as many as there were. */
static void await_adjacent(const struct dp_turns *turns, const struct dp_ring *ring)
{
    const struct dp_queue *queue = ring->queue;
    uint16_t taken = (uint16_t)queue->cells[DP_NEXT_AVAIL], seen = taken, available;
    uint64_t now, began, until;

    if (turns->is_crowded || !turns->poll_max_ns)
        return;
    now = began = now_ns();
    until = began + NEXT_NS;
    while (queue->cells[DP_IN_FLIGHT] + (uint16_t)(seen - taken) < ring->adjacent &&
           now < until && now - began < ADJACENT_NS) {
        available = __atomic_load_n(&queue->avail[1], __ATOMIC_RELAXED);
        now = now_ns();
        if (available != seen)
            until = now + NEXT_NS;
        seen = available;
    }
}

/* `merged` of those taken last from `ring` were adjacent. */
static void note_adjacent(struct dp_ring *ring, uint64_t merged)
{
    uint64_t in_flight = ring->queue->cells[DP_IN_FLIGHT];

    if (!merged || in_flight < ring->adjacent)
        ring->adjacent -= (ring->adjacent + 7) / 8;
    else
        ring->adjacent = in_flight;
}

/* Take what `ring` has, up to a chain that is not usual. */
static void take_of(struct dp_turns *turns, struct dp_ring *ring, uint32_t room, uint32_t *pieces)
{
    struct dp_queue *queue = ring->queue;
    struct dp_taken taken;

    queue->cells[DP_STOPPED] = 0;
    if (turns->cache) {
        taken = dp_take_hits(queue, turns->disk, turns->cache, turns->may_write);
        turns->cut_short |= taken.is_full;
    } else {
        uint64_t merged = turns->rows[DP_MERGED];

        if (ring->adjacent)
            await_adjacent(turns, ring);
        taken = dp_take_commands(queue, turns->disk, turns->route, turns->wire->channel,
                                 turns->rows, turns->may_write, true,
                                 turns->commands + turns->command_count,
                                 room - turns->command_count, *pieces);
        note_adjacent(ring, turns->rows[DP_MERGED] - merged);
        *pieces -= pieces_of(turns, taken.reads + taken.writes + taken.flushes);
        turns->is_full |= taken.is_full;
        if (taken.flushes) {
            turns->wire->channel->cells[DP_FLUSH_BEGAN_NS] = now_ns();
            turns->flush_is_new = true;
        }
        if (taken.writes)
            turns->durable = false;
    }
    ring->taken += taken.reads + taken.writes + taken.flushes;
    turns->reads += taken.reads;
    turns->writes += taken.writes;
    turns->flushes += taken.flushes;
    turns->worked |= taken.reads + taken.writes + taken.flushes > 0;
}

/* It stopped at the first write since all was durable, which may go on once that is known. */
static inline bool begins_to_write(const struct dp_turns *turns, const struct dp_queue *queue)
{
    return queue->cells[DP_STOPPED] == DP_STOP_WRITE && !turns->may_write &&
           turns->disk[DP_MAY_WRITE] && (turns->cache || turns->route[DP_WHOLE_WRITE_BYTES]);
}

/* Take what the rings have. (What is sent is bounded by the socket. What is copied is not: in a
 * long turn the rings after this one are the first next time.) With several connections this is
 * asked again and again, for a few commands for one of them. */
static int take(struct dp_turns *turns)
{
    uint32_t pieces = DP_PIECES, room = turns->wire_count > 1 ? SHARE : DP_COMMANDS;
    int flags = 0;

    turns->command_count = 0;
    turns->wire = least_busy(turns);
    turns->is_full = false;
    turns->cut_short = false;
    turns->first_ring++;
    for (uint32_t index = 0; index < turns->ring_count; index++) {
        struct dp_ring *ring = &turns->rings[(turns->first_ring + index) % turns->ring_count];
        struct dp_queue *queue = ring->queue;

        if (__atomic_load_n(&queue->avail[1], __ATOMIC_RELAXED) ==
            (uint16_t)queue->cells[DP_NEXT_AVAIL])
            continue;
        take_of(turns, ring, room, &pieces);
        if (begins_to_write(turns, queue)) {
            if (turns->begin_to_write(turns->owner) < 0)
                return flags | DP_CHAIN | DP_RAISED;
            turns->may_write = true;
            take_of(turns, ring, room, &pieces);
        }
        if (queue->cells[DP_STOPPED])
            flags |= DP_CHAIN;
        if (turns->cache && is_long_over(turns)) {
            turns->first_ring += index;
            turns->cut_short = true;
            break;
        }
    }
    return flags;
}

/* Send what is unsent; and when nothing is, serve the rings. Until then what is in them waits: for
 * the same socket, whose server does not read. */
static int serve(struct dp_turns *turns)
{
    int flags = 0;

    if (dp_is_sending(turns)) {
        flags = turns->is_writable ? dp_send_more(turns) : 0;
        if (flags || dp_is_sending(turns)) {
            turns->is_full = false;
            turns->cut_short = true;
            return flags;
        }
    }
    /* With more than fits, again: nothing that can be taken is left before a publication. */
    do {
        flags |= take(turns);
        flags |= turns->wire ? dp_send_taken(turns) : 0;
    } while (!flags && turns->is_full && !dp_is_sending(turns));
    return flags;
}

static int publish(struct dp_turns *turns)
{
    int flags = 0;

    for (uint32_t index = 0; index < turns->ring_count; index++)
        if (dp_publish(turns->rings[index].queue) && turns->call(turns->owner, index) < 0)
            flags |= DP_RAISED;
    return flags;
}

static bool arm(struct dp_turns *turns)
{
    bool more = false;

    for (uint32_t index = 0; index < turns->ring_count; index++)
        more |= dp_arm(turns->rings[index].queue);
    return more;
}

static void disarm(struct dp_turns *turns)
{
    for (uint32_t index = 0; index < turns->ring_count; index++)
        dp_disarm(turns->rings[index].queue);
}

static inline bool awaits_payload(const struct dp_turns *turns)
{
    for (uint32_t index = 0; index < turns->wire_count; index++)
        if (turns->wires[index].channel->cells[DP_LONG_READS])
            return true;
    return false;
}

/* Nobody waits for what would be seen a little sooner: the socket is full; or others want the
 * processor, and the servers have enough to do, or what they do takes longer than polling does. The
 * last is so of large writes, and of what their guest does when they are answered. */
static bool is_busy(struct dp_turns *turns)
{
    uint64_t large = 0, rows = 0, reads = 0;

    for (uint32_t index = 0; index < turns->wire_count; index++) {
        const uint64_t *cells = turns->wires[index].channel->cells;

        large += cells[DP_LARGE_BYTES];
        rows += cells[DP_ROWS];
        reads += cells[DP_LONG_READS];
    }
    if (rows)
        turns->writes_are_long = !reads && large / rows >= LONG_WRITE_BYTES;
    return dp_is_sending(turns) ||
           (turns->is_crowded && (turns->writes_are_long || large > BUSY_BYTES));
}

/* How long to poll now. Long between the pieces of a long payload, as in `loop.Loop.linger`: not to
 * poll there costs a quarter of the throughput of a server that is near. Not while a batch gathers.
 * (Not to poll while others want the processor was tried: waking up costs more than that, and comes
 * later.) */
static uint64_t window_ns(struct dp_turns *turns)
{
    uint64_t in_flight = 0;

    if (is_busy(turns))
        return 0;
    if (awaits_payload(turns))
        return turns->long_poll_ns;
    for (uint32_t index = 0; index < turns->ring_count; index++) {
        const struct dp_ring *ring = &turns->rings[index];
        uint64_t now = ring->queue->cells[DP_IN_FLIGHT];

        /* (Those of one command are all answered at once.) */
        in_flight += now > ring->adjacent ? now : ring->adjacent;
    }
    return in_flight < DEEP ? turns->poll_ns : 0;
}

/* Wait in the epoll; how many events, -1: it failed. How long that took decides how long to poll
 * (see `loop.Loop._nap`). */
static int nap(struct dp_turns *turns)
{
    uint64_t began = now_ns(), least = turns->poll_max_ns / 32;
    uint64_t *poll_ns = awaits_payload(turns) ? &turns->long_poll_ns : &turns->poll_ns;
    int count = turns->wait(turns->owner, turns->events);

    turns->naps++;
    disarm(turns);
    if (is_busy(turns))
        return count;
    if (now_ns() - began < turns->poll_max_ns) {
        *poll_ns = 2 * *poll_ns + least;
        if (*poll_ns > turns->poll_max_ns)
            *poll_ns = turns->poll_max_ns;
    } else {
        *poll_ns = *poll_ns > least ? *poll_ns / 2 : 0;
    }
    return count;
}

/* Every ring was looked at and nothing was left there: what is found from now on was made available
 * when `published` was out. */
static void looked(struct dp_turns *turns, uint64_t published)
{
    struct dp_channel *channel = alone(turns);

    turns->looked = true;
    turns->shown = published;
    if (channel) {
        uint64_t *cells = channel->cells;

        if (cells[DP_SEEN] < cells[DP_BEFORE] + published)
            cells[DP_SEEN] = cells[DP_BEFORE] + published;
    }
}

/* A turn has ended, with a flush that has succeeded perhaps. As `Disk` has it, another one that is
 * in flight by now may be for something that this one was too early for. */
static void count_flushed(struct dp_turns *turns)
{
    struct dp_channel *channel = alone(turns);
    uint64_t *cells;

    if (!channel || !channel->cells[DP_FLUSHED])
        return;
    cells = channel->cells;
    turns->flush_ns[turns->flushed++] = cells[DP_FLUSH_TOOK_NS];
    cells[DP_FLUSHED] = 0;
    turns->durable = !cells[DP_ARMED] && !cells[DP_FLUSH_ROW];
    if (turns->flushed >= DP_TIMES - 1)
        cells[DP_MAY_FLUSH] = 0; /* There may be one more in flight. */
}

/* Before the loop waits: ask the drivers for kicks. True: there is something to do. */
static bool is_woken(struct dp_turns *turns, uint64_t published)
{
    if (dp_is_sending(turns))
        return false; /* What they have now has to wait. */
    if (arm(turns)) {
        disarm(turns);
        return true;
    }
    looked(turns, published);
    return false;
}

static int have_turns(struct dp_turns *turns)
{
    bool had_work = turns->worked;
    uint64_t published = unflushed(turns);
    /* What was not usual has just been done elsewhere: something may follow it as well. */
    uint64_t now = now_ns(), idle_ns = had_work ? now + window_ns(turns) : 0;
    int count = 0;

    turns->reads = turns->writes = turns->flushes = turns->flushed = turns->naps = 0;
    turns->other_count = turns->command_count = 0;
    turns->durable = turns->flush_is_new = false;
    turns->output.late_bytes = 0;
    turns->shown = 0;
    turns->looked = false;
    if (dp_is_sending(turns))
        turns->wire->channel->unsent_from =
            turns->output.commands[turns->output.command].sequence;
    for (;;) {
        int flags;

        turns->worked = turns->flush_is_new = false;
        if (!count)
            count = epoll_wait(turns->epoll_fd, turns->events, DP_EVENTS, 0);
        flags = handle_events(turns, count > 0 ? count : 0);
        count = 0;
        /* The server may have closed: what it answered before is heard before a send fails. */
        if (flags & (DP_REPLY | DP_ENDED | DP_FAILED | DP_SOCKET))
            turns->cut_short = true;
        else
            flags |= serve(turns);
        if (!(flags & DP_INCOMPLETE)) {
            if (!turns->is_full && !turns->cut_short)
                looked(turns, published);
            flags |= publish(turns);
            published = unflushed(turns);
            count_flushed(turns);
        }
        now = now_ns();
        if (turns->worked) {
            had_work = true;
            idle_ns = now + window_ns(turns);
        }
        turns->worked = had_work;
        if (flags)
            return flags;
        if (now >= turns->until_ns)
            return DP_BUDGET;
        if (now < idle_ns)
            continue;
        if (is_woken(turns, published))
            continue;
        if (had_work) {
            turns->worked = had_work = false;
            count = nap(turns);
        }
        if (count < 0)
            return DP_RAISED;
        if (!count)
            /* A server that has not read anything for so long may not for longer. */
            return dp_is_sending(turns) ? DP_UNSENT : 0;
    }
}

int dp_turns(struct dp_turns *turns)
{
    int flags = have_turns(turns);

    for (uint32_t index = 0; index < turns->wire_count; index++)
        turns->wires[index].channel->unsent_from = 0; /* It is for `answers` within turns. */
    return flags;
}
