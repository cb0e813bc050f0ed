/* The usual case of a turn, compiled: see `usual` (the specification) and `cells` (the state).
 *
 * Plain C99 without Python. The functions work on rows, cells and views of memory that the caller
 * owns and keeps; they allocate nothing, keep nothing, log nothing and call nothing of the
 * system's. What is not usual is left where it is, untouched, and told of.
 *
 * What a guest or a server may have written is read once, into a local, before it is looked at
 * (`fetch`). Every range is checked by `within`, which cannot wrap.
 */
#ifndef NBD_BRIDGE_CORE_H
#define NBD_BRIDGE_CORE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

/* Of the layout below and of `cells`: another number whenever either changes. */
#define DP_ABI 13

/* Cells of a `Queue`, in the order of `cells`. */
enum {
    DP_SIZE,
    DP_NEXT_AVAIL,
    DP_NEXT_USED,
    DP_PUBLISHED,
    DP_IN_FLIGHT,
    DP_SIGNAL_ANYWAY,
    DP_EVENT_IDX,
    DP_INDIRECT,
    DP_NUMBER,
    DP_NAME,
    DP_COUNTER,
    DP_LAST_HEAD,
    DP_PUSHED,
    DP_TOUCHED,
    DP_STOPPED,
    DP_QUEUE_CELLS
};

/* Why a look at the available ring ended: `cells.STOPPED`. */
enum {
    DP_STOP_RING = 1,
    DP_STOP_FORM,
    DP_STOP_RANGE,
    DP_STOP_MISS,
    DP_STOP_WRITE,
    DP_STOP_ROOM,
    DP_STOP_ROUTE,
    DP_STOP_FLUSH,
    DP_STOPS
};

/* Cells of a disk. */
enum {
    DP_CAPACITY_BYTES,
    DP_BLOCK_MASK,
    DP_MAY_WRITE,
    DP_CAN_FLUSH,
    DP_READ_BYTES,
    DP_WRITTEN_BYTES,
    DP_DISK_CELLS
};

/* Cells of a `Route`. */
enum {
    DP_MAX_READ_BYTES,
    DP_MAX_WRITE_BYTES,
    DP_SIZE_BYTES,
    DP_ALIGN_MASK,
    DP_WHOLE_READ_BYTES,
    DP_WHOLE_WRITE_BYTES,
    DP_ROW_SEGMENTS,
    DP_ROUTE_CELLS
};

/* Cells of `Rows`. */
enum {
    DP_SEQUENCE,
    DP_MERGED,
    DP_ALONE,
    DP_ROWS_CELLS
};

/* Cells of a `Channel`. */
enum {
    DP_UNFLUSHED,
    DP_LONG_READS,
    DP_ROWS,
    DP_SEGMENTS,
    DP_DIRECT,
    DP_DIRECT_LEFT,
    DP_LARGE_BYTES,
    DP_MAY_FLUSH,
    DP_NOT_ROWS,
    DP_ARMED,
    DP_SEEN,
    DP_BEFORE,
    DP_FLUSH_ROW,
    DP_FLUSH_COVERS,
    DP_FLUSH_SEEN,
    DP_FLUSH_ARMED,
    DP_FLUSH_BEGAN_NS,
    DP_FLUSH_TOOK_NS,
    DP_FLUSHES,
    DP_FLUSHED,
    DP_COVERED,
    DP_CHANNEL_CELLS
};

/* Cells of a `Resident`. */
enum {
    DP_DIRTY_SLOTS,
    DP_DIRTY_BLOCKS,
    DP_CHANGES,
    DP_RING_HEAD,
    DP_RING_TAIL,
    DP_RING_GOAL,
    DP_HARD_SLOTS,
    DP_FLUSH_SLOTS,
    DP_BACKGROUND_SLOTS,
    DP_RESIDENT_CELLS
};

enum {
    DP_HEAD_BITS = 10,
    DP_QUEUE_BITS = 8,
    DP_NAME_BITS = DP_HEAD_BITS + DP_QUEUE_BITS,
    DP_MAX_HEADS = 1 << DP_HEAD_BITS,
    DP_MAX_QUEUES = 1 << DP_QUEUE_BITS,
    DP_MAX_SEGMENTS = 128,
    DP_MAX_ROW_SEGMENTS = 1 << 16,
    DP_BATCH_PIECES = 4096,
    DP_SMALL_BYTES = 64 << 10,
    DP_WHOLE_BYTES = 2 << 20,
    DP_TURN_BYTES = 8 << 20,
    DP_LONG_BYTES = 32 << 10,
    DP_MERGED_BYTES = 128 << 10,
    DP_LARGE_IN_FLIGHT_BYTES = 64 << 20,
    DP_COMMAND_BYTES = 28,
    DP_SPAN_CELLS = 3,
    DP_MAX_SPANS = 256,
    DP_SPANS_CELLS = 1 + DP_SPAN_CELLS * DP_MAX_SPANS
};

/* See `cells.sequence_of`. */
static inline uint64_t dp_sequence_of(uint64_t cookie)
{
    return (cookie & ~(UINT64_C(1) << 63)) >> DP_NAME_BITS;
}

/* A row: `cells.ROW`. */
struct dp_row {
    uint64_t offset;
    uint64_t data_at;
    uint64_t status_at;
    uint32_t length;
    uint32_t channel;
    uint16_t data_region;
    uint16_t status_region;
    uint16_t segments;
    uint8_t op;
    uint8_t unused;
    uint32_t command_bytes; /* 0: the command is that of another row */
    uint16_t following;     /* 1 + the head of the next row of the same command, or 0 */
    uint16_t unused_too;
};

/* A piece of a request's data: `cells.SEGMENT`. */
struct dp_segment {
    uint64_t at; /* in its region */
    uint32_t length;
    uint16_t region;
    uint16_t unused;
};

struct dp_region {
    uint64_t guest_address;
    uint64_t size_bytes;
    uint8_t *at;
};

/* A split virtqueue. `dp_queue_is_sound` says what must hold. */
struct dp_queue {
    uint64_t *cells;
    uint32_t size;              /* entries, a power of two */
    const uint8_t *descriptors; /* 16 bytes each */
    uint16_t *avail;            /* 3 + size */
    uint16_t *used;             /* 3 + 4 * size */
    const struct dp_region *regions;
    uint32_t region_count; /* at least 1 */
    uint8_t *rows;         /* size of struct dp_row each */
    uint64_t *cookies;     /* size */
    struct dp_segment *segments; /* size of DP_MAX_SEGMENTS each */
    uint8_t *tracked;      /* this queue's part of an in-flight region; NULL: there is none */
    uint16_t *pushed;      /* size */
};

struct dp_channel {
    uint64_t *cells;
    uint8_t *staging;
    uint64_t staging_bytes;
    uint32_t number;
    bool structured;
    /* The number of the first command that was not sent to its end: an answer to that one, or to a
     * later one, is not usual. 0: all was sent. Of compiled turns only. */
    uint64_t unsent_from;
    uint64_t *spans; /* `cells.Channel.spans`, DP_SPANS_CELLS; NULL: this channel is alone */
};

/* What a cache has at hand. */
struct dp_resident {
    unsigned granule_shift;
    unsigned block_shift;
    uint64_t bucket_mask;
    const uint32_t *head; /* bucket_mask + 1 */
    const uint32_t *granule_of;
    const uint16_t *ready;
    uint16_t *open;
    uint8_t *touched;
    uint64_t *state; /* in the cache file */
    uint16_t *sent;
    uint16_t *covered;
    uint8_t *queued;
    uint64_t slots; /* of the eight arrays before */
    uint64_t *cells;
    uint32_t *ring; /* ring_slots */
    uint64_t ring_slots; /* at least 1 */
    uint8_t *data;
    uint64_t data_bytes;
    const uint8_t *up;
    uint32_t up_bytes;
    /* Make blocks open: 1, or 0: not now, or -1: stop here. NULL: never. */
    int (*open_blocks)(void *owner, uint32_t slot, uint32_t bits);
    /* Whether that may be done here, where all is plain, until anything is called: likewise. NULL:
     * it may not. `asked`: and it said `opens`. */
    int (*may_open)(void *owner);
    bool asked, opens;
    /* Store a write whose blocks are not there: as `open_blocks`. */
    int (*store)(void *owner, uint64_t offset, uint64_t length, const struct iovec *data,
                 uint32_t count);
    void *owner;
};

/* A request to be sent: the header of its command, and for a WRITE its payload, in the memory of
 * its queue. */
struct dp_command {
    uint8_t header[DP_COMMAND_BYTES];
    uint32_t header_bytes;  /* 0: it is a part of the command before */
    uint32_t payload_bytes; /* 0: none */
    uint32_t segment_count;
    struct dp_segment one;         /* if that is 1 */
    const struct dp_segment *many; /* else */
    const struct dp_queue *queue;
};

static inline const struct dp_segment *dp_payload(const struct dp_command *command)
{
    return command->segment_count == 1 ? &command->one : command->many;
}

static inline bool dp_is_flush(const struct dp_command *command)
{
    return command->header_bytes && command->header[7] == 3; /* NBD_CMD_FLUSH */
}

struct dp_taken {
    uint32_t reads;
    uint32_t writes;
    uint32_t flushes;
    bool is_full; /* there was no room for more: ask again */
};

struct dp_answered {
    uint64_t start;    /* where the first reply is that was not taken */
    bool waits;        /* it is only not all there yet */
    uint32_t touched_count;
    uint8_t touched[DP_MAX_QUEUES]; /* numbers of queues, from which nothing had been pushed */
};

/* The queue with that number, or NULL. */
typedef struct dp_queue *(*dp_queue_of)(void *owner, unsigned number);

/* Sizes and alignments fit together. (The cells and rows are the caller's own, and right.) */
bool dp_queue_is_sound(const struct dp_queue *queue);

/* What `may_open` has said is over: time has gone by, or something was called. */
static inline void dp_ask_again(struct dp_resident *cache)
{
    cache->asked = false;
}

/* See `usual.take_hits`. */
struct dp_taken dp_take_hits(struct dp_queue *queue, uint64_t *disk, struct dp_resident *cache,
                             bool may_write);

/* See `usual.take_commands`: at most `room` requests are put at `out`, with at most `pieces`
 * headers and segments of payload. `rows`: the cells of `Rows`. With less room than chains there is no STOPPED: the rest is to
 * be asked for again. `whole`: also large ones, up to WHOLE_READ_BYTES or WHOLE_WRITE_BYTES each
 * and DP_LARGE_IN_FLIGHT_BYTES together. */
struct dp_taken dp_take_commands(struct dp_queue *queue, uint64_t *disk,
                                 const uint64_t *route, struct dp_channel *channel,
                                 uint64_t *rows, bool may_write, bool whole,
                                 struct dp_command *out, uint32_t room, uint32_t pieces);

/* See `usual.answers`. `whole`: also long reads; of one whose payload is not all there the rest is
 * to be received at `dp_direct`, and nothing is left in the staging buffer. */
void dp_answers(struct dp_channel *channel, dp_queue_of queue_of, void *owner, bool whole,
                uint64_t start, uint64_t end, struct dp_answered *answered);

/* Where the next DIRECT_LEFT bytes of a payload go: how many pieces; 0: that is not known here. */
uint32_t dp_direct(struct dp_channel *channel, dp_queue_of queue_of, void *owner,
                   struct iovec pieces[DP_MAX_SEGMENTS]);

/* So many of them have come. */
void dp_direct_received(struct dp_channel *channel, dp_queue_of queue_of, void *owner,
                        uint64_t n_bytes, struct dp_answered *answered);

/* See `usual.publish`. */
bool dp_publish(struct dp_queue *queue);

/* See `SplitQueue.arm` and `disarm`. */
bool dp_arm(struct dp_queue *queue);
void dp_disarm(struct dp_queue *queue);

#ifdef DP_TEST_STORES
/* For tests: called after every store that outlives the process. */
void dp_stored(void);
#define DP_STORED() dp_stored()
#else
#define DP_STORED() ((void)0)
#endif

#ifdef DP_TEST_FETCHES
/* For tests: called after every read of what a guest wrote into its rings, tables and headers. */
void dp_fetched(void *from, size_t n_bytes);
#define DP_FETCHED(from, n_bytes) dp_fetched((void *)(uintptr_t)(from), n_bytes)
#else
#define DP_FETCHED(from, n_bytes) ((void)0)
#endif

#endif
