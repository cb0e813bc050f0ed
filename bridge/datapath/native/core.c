#include "core.h"

#include <endian.h>
#include <string.h>

enum { NEXT = 1, WRITE = 2, INDIRECT = 4 };
enum { IN = 0, OUT = 1, FLUSH = 2 };
enum { VIRTIO_FLUSH = 4, NBD_FLUSH = 3 };
enum { HEADER_BYTES = 16, SECTOR_SHIFT = 9, AVAIL_NO_INTERRUPT = 1, USED_NO_NOTIFY = 1 };
enum { SIMPLE_REPLY_BYTES = 16, DATA_CHUNK_BYTES = 28 };

#define ROW_COOKIE (UINT64_C(1) << 63)
#define NAME_MASK ((UINT64_C(1) << DP_NAME_BITS) - 1)
#define REQUEST_MAGIC UINT32_C(0x25609513)
#define SIMPLE_MAGIC UINT32_C(0x67446698)
#define CHUNK_MAGIC UINT32_C(0x668E33EF)
#define DONE_AND_OFFSET_DATA UINT32_C(0x10001)

_Static_assert(sizeof(struct dp_row) == 48, "a row is as in cells.ROW");

struct descriptor {
    uint64_t address;
    uint32_t length;
    uint16_t flags;
    uint16_t next;
};

_Static_assert(sizeof(struct descriptor) == 16, "virtio 1.3, 2.7.5");

_Static_assert(sizeof(struct dp_segment) == 16, "a segment is as in cells.SEGMENT");

enum { MAX_LINKS = DP_MAX_SEGMENTS + 2, MAX_PLACES = 64 };
enum { BLOCKS_MASK = 0xFFFF, DIRTY_SHIFT = 16 }; /* of a slot's state */

/* A usual chain, checked: what is in it is in guest memory. */
struct chain {
    uint64_t sector;
    uint64_t status_at;
    uint64_t length;
    uint32_t type; /* IN, OUT, or FLUSH, of which nothing but the status means anything */
    uint16_t status_region;
    uint16_t count; /* of segments: at least 1, but for a FLUSH */
    struct dp_segment segments[DP_MAX_SEGMENTS];
};

/* Where the data of a hit is in that of the cache, granule by granule. */
struct place {
    uint64_t at;
    uint64_t length;
    uint32_t slot;
};

/* The one check of bounds: `length` bytes from `at` on are among the first `size`. */
static inline bool within(uint64_t at, uint64_t length, uint64_t size)
{
    return length <= size && at <= size - length;
}

/* Copy what somebody else may be changing. What is copied is looked at afterwards, not what it was
 * copied from: the fence keeps the compiler from reading it again. */
static inline void fetch(void *to, const void *from, size_t n_bytes)
{
    memcpy(to, from, n_bytes);
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    DP_FETCHED(from, n_bytes);
}

static inline uint16_t load_16(const uint16_t *from)
{
    return __atomic_load_n(from, __ATOMIC_ACQUIRE);
}

/* A store that is seen after all stores before it: also by a process that finds what this one left
 * behind. */
static inline void store_16(uint16_t *to, uint16_t value)
{
    __atomic_store_n(to, value, __ATOMIC_RELEASE);
    DP_STORED();
}

static inline void store_64(uint64_t *to, uint64_t value)
{
    __atomic_store_n(to, value, __ATOMIC_RELEASE);
    DP_STORED();
}

static inline void store_8(uint8_t *to, uint8_t value)
{
    __atomic_store_n(to, value, __ATOMIC_RELEASE);
    DP_STORED();
}

/* Of a guest's memory to or from ours. They overlap only where a guest has seen to it. */
static inline void copy(uint8_t *to, const uint8_t *from, uint32_t n_bytes)
{
    memmove(to, from, n_bytes);
    DP_STORED();
}

static inline uint32_t big_32(const uint8_t *from)
{
    uint32_t value;
    memcpy(&value, from, 4);
    return be32toh(value);
}

static inline uint64_t big_64(const uint8_t *from)
{
    uint64_t value;
    memcpy(&value, from, 8);
    return be64toh(value);
}

bool dp_queue_is_sound(const struct dp_queue *queue)
{
    uint32_t size = queue->size;

    return size && size <= 1u << 15 && !(size & (size - 1)) && queue->cells[DP_SIZE] == size &&
           queue->region_count && queue->region_count <= UINT16_MAX &&
           !((uintptr_t)queue->avail & 1) && !((uintptr_t)queue->used & 3) &&
           !((uintptr_t)queue->tracked & 7) && !((uintptr_t)queue->segments & 7);
}

/* The in-flight region (vhost-user, "Inflight I/O tracking"): 16 bytes of header, with the head of
 * the last batch at 12 and the used index at 14; entries of 16 bytes from 16 on: in flight at 0,
 * the next of the batch at 6, the counter at 8. */

static inline void note_popped(const struct dp_queue *queue, uint32_t head, uint64_t counter)
{
    uint8_t *entry = queue->tracked + 16 + 16 * (size_t)head;

    __atomic_store_n((uint64_t *)(void *)(entry + 8), counter, __ATOMIC_RELEASE);
    DP_STORED();
    store_8(entry, 1);
    /* Nothing is done for the chain before it is noted. */
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
}

static inline void note_pushed(const struct dp_queue *queue, uint32_t head, uint64_t *last_head)
{
    store_16((uint16_t *)(void *)(queue->tracked + 22 + 16 * (size_t)head), (uint16_t)*last_head);
    store_16((uint16_t *)(void *)(queue->tracked + 12), (uint16_t)head);
    *last_head = head;
}

static inline void put_element(const struct dp_queue *queue, uint64_t used, uint32_t head,
                               uint32_t length)
{
    uint32_t *element =
        (uint32_t *)(void *)(queue->used + 2) + 2 * (size_t)(used & (queue->size - 1));

    __atomic_store_n(element, head, __ATOMIC_RELAXED);
    DP_STORED();
    __atomic_store_n(element + 1, length, __ATOMIC_RELAXED);
    DP_STORED();
}

static inline int region_of(const struct dp_queue *queue, uint64_t address, uint64_t length,
                            uint64_t *at)
{
    for (uint32_t number = 0; number < queue->region_count; number++) {
        const struct dp_region *region = &queue->regions[number];

        if (address >= region->guest_address &&
            within(address - region->guest_address, length, region->size_bytes)) {
            *at = address - region->guest_address;
            return (int)number;
        }
    }
    return -1;
}

static inline uint8_t *in_region(const struct dp_queue *queue, uint32_t number, uint64_t at)
{
    return queue->regions[number].at + at;
}

/* Copy the descriptors of the chain at `head`, which is below the size: how many, or 0: it is not
 * usual. A chain without an end is longer than there is room for. */
static uint32_t links_of(const struct dp_queue *queue, uint32_t head,
                         struct descriptor links[MAX_LINKS])
{
    uint32_t count = 1;
    uint64_t at;
    int region;

    fetch(&links[0], queue->descriptors + 16 * (size_t)head, 16);
    if (links[0].flags == INDIRECT) {
        uint32_t n_bytes = links[0].length;

        count = n_bytes / 16;
        if (n_bytes % 16 || !count || count > MAX_LINKS || !queue->cells[DP_INDIRECT])
            return 0;
        region = region_of(queue, links[0].address, n_bytes, &at);
        if (region < 0)
            return 0;
        fetch(links, in_region(queue, (uint32_t)region, at), n_bytes);
        for (uint32_t index = 0; index + 1 < count; index++)
            if (links[index].next != index + 1)
                return 0;
        return count;
    }
    for (; links[count - 1].flags & NEXT; count++) {
        if (count == MAX_LINKS || links[count - 1].next >= queue->size)
            return 0;
        fetch(&links[count], queue->descriptors + 16 * (size_t)links[count - 1].next, 16);
    }
    return count;
}

static bool find_segment(const struct dp_queue *queue, const struct descriptor *link,
                         struct dp_segment *segment)
{
    int region = region_of(queue, link->address, link->length, &segment->at);

    segment->region = (uint16_t)region;
    segment->length = link->length;
    segment->unused = 0;
    return region >= 0 && link->length;
}

/* See `usual.usual_chain`. */
static bool usual_chain(const struct dp_queue *queue, uint32_t head, struct chain *chain)
{
    struct descriptor links[MAX_LINKS];
    uint32_t count = links_of(queue, head, links);
    const struct descriptor *last = &links[count ? count - 1 : 0];
    struct {
        uint32_t type;
        uint32_t unused;
        uint64_t sector;
    } header;
    uint16_t way;
    uint64_t at;
    int region;

    if (count < 2 || links[0].flags != NEXT || links[0].length != HEADER_BYTES ||
        last->flags != WRITE || last->length != 1)
        return false;
    region = region_of(queue, links[0].address, HEADER_BYTES, &at);
    if (region < 0)
        return false;
    fetch(&header, in_region(queue, (uint32_t)region, at), HEADER_BYTES);
    region = region_of(queue, last->address, 1, &chain->status_at);
    if (region < 0)
        return false;
    chain->status_region = (uint16_t)region;
    chain->type = le32toh(header.type);
    chain->sector = le64toh(header.sector);
    chain->length = 0;
    chain->count = (uint16_t)(count - 2);
    if (!chain->count) {
        if (chain->type != VIRTIO_FLUSH)
            return false;
        chain->type = FLUSH;
        chain->sector = 0;
        return true;
    }
    if (chain->type != IN && chain->type != OUT)
        return false;
    way = chain->type == OUT ? NEXT : NEXT | WRITE;
    for (uint32_t index = 0; index < chain->count; index++) {
        if (links[1 + index].flags != way ||
            !find_segment(queue, &links[1 + index], &chain->segments[index]))
            return false;
        chain->length += links[1 + index].length;
    }
    return true;
}

/* See `usual.available`. */
static uint32_t available(const struct dp_queue *queue)
{
    uint64_t *state = queue->cells;
    uint16_t count = (uint16_t)(load_16(&queue->avail[1]) - state[DP_NEXT_AVAIL]);
    uint16_t unseen = (uint16_t)(state[DP_NEXT_USED] - state[DP_PUBLISHED]);

    if (!within(state[DP_IN_FLIGHT], (uint64_t)count + unseen, queue->size)) {
        state[DP_STOPPED] = DP_STOP_RING;
        return 0;
    }
    return count;
}

static inline uint32_t head_at(const struct dp_queue *queue, uint64_t index)
{
    const uint16_t *at = &queue->avail[2 + (index & (queue->size - 1))];
    uint32_t head = __atomic_load_n(at, __ATOMIC_RELAXED);

    DP_FETCHED(at, sizeof *at);
    return head;
}

/* Whether `length` bytes from `sector` on are blocks of the first `capacity_bytes`. */
static inline bool on_disk(uint64_t sector, uint64_t length, uint64_t capacity_bytes,
                           uint64_t block_mask)
{
    return sector <= capacity_bytes >> SECTOR_SHIFT &&
           within(sector << SECTOR_SHIFT, length, capacity_bytes) &&
           !((sector << SECTOR_SHIFT | length) & block_mask);
}

/* The state of a slot: its valid blocks, its dirty ones, and a check (cache/file/layout.py). */
static inline uint64_t state_word(uint32_t granule, uint32_t low)
{
    uint64_t check = (low ^ granule * UINT64_C(0x9E3779B1)) * 0x85EBCA6B >> 7;

    return low | check << 32;
}

/* See `Writes.open_blocks`, whose blocks `bits` of `slot` are, and `Blocks.write_open`: false if
 * that is more than to change what is flat, and nothing was changed. */
static bool open_plain(struct dp_resident *cache, uint32_t slot, uint16_t bits)
{
    uint64_t *cells = cache->cells, dirty_slots = cells[DP_DIRTY_SLOTS];
    uint64_t tail = cells[DP_RING_TAIL], rests = cells[DP_RING_HEAD];
    uint32_t was = (uint32_t)cache->state[slot];
    uint32_t low = was | (was & bits) << DIRTY_SHIFT;

    if (was <= BLOCKS_MASK) {
        if (dirty_slots >= cells[DP_HARD_SLOTS])
            return false;
        dirty_slots += low != was;
    }
    if (!cache->queued[slot]) {
        if (rests > tail || tail - rests >= cache->ring_slots)
            return false;
        if (rests < cells[DP_RING_GOAL])
            rests = cells[DP_RING_GOAL];
        if (dirty_slots > cells[DP_FLUSH_SLOTS] || tail + 1 > rests + cells[DP_BACKGROUND_SLOTS])
            return false;
    }
    if (low != was) {
        store_64(&cache->state[slot], state_word(cache->granule_of[slot], low));
        /* A block calls itself dirty before anything is done to its data. */
        __atomic_signal_fence(__ATOMIC_SEQ_CST);
        cells[DP_DIRTY_BLOCKS] += (uint32_t)__builtin_popcount(low ^ was);
        cells[DP_DIRTY_SLOTS] = dirty_slots;
    }
    if (cache->sent[slot] & bits) {
        cache->sent[slot] &= (uint16_t)~bits;
        cache->covered[slot] &= (uint16_t)~bits;
    }
    cache->open[slot] |= bits;
    cells[DP_CHANGES]++;
    if (!cache->queued[slot]) {
        cache->queued[slot] = 1;
        cache->ring[tail % cache->ring_slots] = slot;
        cells[DP_RING_TAIL] = tail + 1;
    }
    return true;
}

/* Make blocks open that are ready: 1, or 0: not now, or -1: nothing can be done any more. */
static int open_blocks(struct dp_resident *cache, uint32_t slot, uint16_t bits)
{
    if (!cache->open_blocks)
        return 0;
    if (cache->may_open && !cache->asked) {
        int may = cache->may_open(cache->owner);

        if (may < 0)
            return may;
        cache->asked = true;
        cache->opens = may;
    }
    if (cache->asked && cache->opens && open_plain(cache, slot, bits))
        return 1;
    dp_ask_again(cache);
    return cache->open_blocks(cache->owner, slot, bits);
}

/* The part of a request that is in one granule, of at most `length` bytes: whether it is a hit, -1:
 * nothing can be any more. A write's blocks are open then. */
static int place_of(struct dp_resident *cache, uint32_t type, uint64_t offset, uint64_t length,
                    struct place *place)
{
    uint64_t granule_bytes = UINT64_C(1) << cache->granule_shift;
    uint64_t within_granule = offset & (granule_bytes - 1), granule = offset >> cache->granule_shift;
    uint32_t slot = __atomic_load_n(&cache->head[granule & cache->bucket_mask], __ATOMIC_RELAXED);
    uint64_t last, bits;

    if (slot >= cache->slots || cache->granule_of[slot] != granule ||
        cache->touched[slot] >= cache->up_bytes)
        return 0;
    if (length > granule_bytes - within_granule)
        length = granule_bytes - within_granule;
    last = (within_granule + length + (UINT64_C(1) << cache->block_shift) - 1) >> cache->block_shift;
    bits = (UINT64_C(1) << last) - (UINT64_C(1) << (within_granule >> cache->block_shift));
    place->slot = slot;
    place->at = ((uint64_t)slot << cache->granule_shift) + within_granule;
    place->length = length;
    if (!within(place->at, length, cache->data_bytes))
        return 0;
    if (type == IN)
        return !(bits & ~(uint64_t)cache->ready[slot]);
    if (!(bits & ~(uint64_t)cache->open[slot]))
        return 1;
    if (bits & ~(uint64_t)cache->ready[slot])
        return 0;
    return open_blocks(cache, slot, (uint16_t)bits);
}

/* Where `chain` is in the cache: in how many places; 0: it is no hit. */
static uint32_t places_of(const struct chain *chain, struct dp_resident *cache,
                          struct place places[MAX_PLACES])
{
    uint64_t offset = chain->sector << SECTOR_SHIFT, left = chain->length;
    uint32_t count = 0;

    for (; left; count++) {
        if (count == MAX_PLACES ||
            place_of(cache, chain->type, offset, left, &places[count]) <= 0)
            return 0;
        offset += places[count].length;
        left -= places[count].length;
    }
    for (uint32_t index = 0; index < count; index++) {
        uint8_t *touched = &cache->touched[places[index].slot];

        *touched = cache->up[*touched];
    }
    return count;
}

/* Copy the data of `chain` from or to its places, which are as long together. */
static void copy_hit(const struct dp_queue *queue, const struct dp_resident *cache,
                     const struct chain *chain, const struct place *place)
{
    uint64_t done = 0; /* of the place */

    for (uint32_t index = 0; index < chain->count; index++) {
        const struct dp_segment *segment = &chain->segments[index];
        uint8_t *data = in_region(queue, segment->region, segment->at);
        uint32_t left = segment->length;

        while (left) {
            uint8_t *here = cache->data + place->at + done;
            uint32_t part =
                left < place->length - done ? left : (uint32_t)(place->length - done);

            if (chain->type == IN)
                copy(data, here, part);
            else
                copy(here, data, part);
            data += part;
            left -= part;
            done += part;
            if (done == place->length) {
                place++;
                done = 0;
            }
        }
    }
}

/* Have a write stored whose blocks are not at hand. */
static bool store(const struct dp_queue *queue, struct dp_resident *cache,
                  const struct chain *chain)
{
    struct iovec data[DP_MAX_SEGMENTS];

    if (!cache->store)
        return false;
    for (uint32_t index = 0; index < chain->count; index++) {
        const struct dp_segment *segment = &chain->segments[index];

        data[index] =
            (struct iovec){in_region(queue, segment->region, segment->at), segment->length};
    }
    dp_ask_again(cache);
    return cache->store(cache->owner, chain->sector << SECTOR_SHIFT, chain->length, data,
                        chain->count) > 0;
}

/* The chain at `head`, and where it is in the cache, in `*count` places, or, in none, a write that
 * has been stored; or why it cannot be served there. */
static uint64_t hit_at(const struct dp_queue *queue, uint32_t head, const uint64_t *disk,
                       struct dp_resident *cache, bool may_write, struct chain *chain,
                       struct place places[MAX_PLACES], uint32_t *count)
{
    if (head >= queue->size || (queue->tracked && queue->cells[DP_PUSHED] >= queue->size))
        return DP_STOP_RING;
    if (!usual_chain(queue, head, chain) || chain->type == FLUSH)
        return DP_STOP_FORM;
    if (chain->length > DP_WHOLE_BYTES ||
        !on_disk(chain->sector, chain->length, disk[DP_CAPACITY_BYTES], disk[DP_BLOCK_MASK]))
        return DP_STOP_RANGE;
    if (chain->type == OUT && !(disk[DP_MAY_WRITE] && may_write))
        return DP_STOP_WRITE;
    *count = places_of(chain, cache, places);
    if (*count || (chain->type == OUT && store(queue, cache, chain)))
        return 0;
    return DP_STOP_MISS;
}

static inline void count_taken(struct dp_taken *taken, uint64_t *disk, const struct chain *chain)
{
    if (chain->type == FLUSH) {
        taken->flushes++;
    } else if (chain->type == IN) {
        taken->reads++;
        disk[DP_READ_BYTES] += chain->length;
    } else {
        taken->writes++;
        disk[DP_WRITTEN_BYTES] += chain->length;
    }
}

struct dp_taken dp_take_hits(struct dp_queue *queue, uint64_t *disk, struct dp_resident *cache,
                             bool may_write)
{
    struct dp_taken taken = {0};
    uint64_t *state = queue->cells;
    uint64_t first = state[DP_NEXT_AVAIL], used = state[DP_NEXT_USED], copied = 0;
    uint32_t count = available(queue), served = 0, place_count;
    struct place places[MAX_PLACES];
    struct chain chain;

    for (; served < count && copied < DP_TURN_BYTES; served++, used++) {
        uint32_t head = head_at(queue, first + served);
        uint64_t stop =
            hit_at(queue, head, disk, cache, may_write, &chain, places, &place_count);

        if (stop) {
            state[DP_STOPPED] = stop;
            break;
        }
        if (queue->tracked)
            note_popped(queue, head, state[DP_COUNTER]++);
        if (place_count)
            copy_hit(queue, cache, &chain, places);
        copied += chain.length;
        put_element(queue, used, head, chain.type == IN ? (uint32_t)chain.length + 1 : 1);
        count_taken(&taken, disk, &chain);
        store_8(in_region(queue, chain.status_region, chain.status_at), 0);
        if (queue->tracked) {
            note_pushed(queue, head, &state[DP_LAST_HEAD]);
            queue->pushed[state[DP_PUSHED]++] = (uint16_t)head;
        }
    }
    taken.is_full = served < count && !state[DP_STOPPED];
    state[DP_NEXT_AVAIL] = (uint16_t)(first + served);
    state[DP_NEXT_USED] = (uint16_t)used;
    return taken;
}

static void put_command(uint8_t *to, uint32_t type, uint64_t cookie, uint64_t offset,
                        uint32_t length)
{
    uint32_t magic = htobe32(REQUEST_MAGIC), kind = htobe32(type), n_bytes = htobe32(length);

    cookie = htobe64(cookie);
    offset = htobe64(offset);
    memcpy(to, &magic, 4);
    memcpy(to + 4, &kind, 4); /* flags 0 */
    memcpy(to + 8, &cookie, 8);
    memcpy(to + 16, &offset, 8);
    memcpy(to + 24, &n_bytes, 4);
}

static inline uint64_t least(uint64_t one, uint64_t other)
{
    return one < other ? one : other;
}

/* What commands may be. */
struct limits {
    uint64_t capacity_bytes;
    uint64_t block_mask;
    uint64_t max_bytes[2]; /* of IN and OUT; 0: none at all */
    uint64_t merged_bytes[2];
    bool may_write, can_flush;
};

static struct limits limits_of(const uint64_t *disk, const uint64_t *route, bool may_write,
                               bool whole)
{
    return (struct limits){
        least(disk[DP_CAPACITY_BYTES], route[DP_SIZE_BYTES]),
        disk[DP_BLOCK_MASK] | route[DP_ALIGN_MASK],
        {
            whole ? route[DP_WHOLE_READ_BYTES] : least(route[DP_MAX_READ_BYTES], DP_LONG_BYTES - 1),
            !disk[DP_MAY_WRITE] ? 0
            : whole             ? route[DP_WHOLE_WRITE_BYTES]
                                : least(route[DP_MAX_WRITE_BYTES], DP_SMALL_BYTES),
        },
        {
            least(route[DP_WHOLE_READ_BYTES], DP_MERGED_BYTES),
            least(route[DP_WHOLE_WRITE_BYTES], DP_MERGED_BYTES),
        },
        may_write,
        disk[DP_CAN_FLUSH] != 0,
    };
}

static inline bool is_long_read(uint32_t type, uint64_t length)
{
    return type == IN && length >= DP_LONG_BYTES;
}

/* It counts for LARGE_BYTES: only with `whole` there are such rows. */
static inline bool is_large(uint32_t type, uint64_t length)
{
    return type == IN ? length >= DP_LONG_BYTES : length > DP_SMALL_BYTES;
}

/* The chain at `head`; or why no command can be made of it. */
static uint64_t command_at(const struct dp_queue *queue, uint32_t head,
                           const struct limits *limits, const uint64_t *cells,
                           struct chain *chain)
{
    if (head >= queue->size || queue->cookies[head])
        return DP_STOP_RING;
    if (!usual_chain(queue, head, chain))
        return DP_STOP_FORM;
    if (chain->type == FLUSH) {
        if (!limits->can_flush)
            return DP_STOP_FORM;
        return cells[DP_MAY_FLUSH] && !cells[DP_FLUSH_ROW] ? 0 : DP_STOP_FLUSH;
    }
    if (chain->type == OUT && !limits->max_bytes[OUT])
        return DP_STOP_WRITE;
    if (chain->length > limits->max_bytes[chain->type] ||
        !on_disk(chain->sector, chain->length, limits->capacity_bytes, limits->block_mask))
        return DP_STOP_RANGE;
    return chain->type == OUT && !limits->may_write ? DP_STOP_WRITE : 0;
}

/* Note `chain` in its row. `joins`: its command is that of another one. */
static void put_row(const struct dp_queue *queue, const struct dp_channel *channel, uint32_t head,
                    uint64_t cookie, const struct chain *chain, bool joins)
{
    struct dp_row row = {
        .offset = chain->sector << SECTOR_SHIFT,
        .status_at = chain->status_at,
        .length = (uint32_t)chain->length,
        .channel = channel->number,
        .status_region = chain->status_region,
        .segments = chain->count,
        .op = (uint8_t)chain->type,
        .command_bytes = joins ? 0 : (uint32_t)chain->length,
    };

    if (chain->count <= 1) {
        row.data_at = chain->count ? chain->segments[0].at : 0;
        row.data_region = chain->count ? chain->segments[0].region : 0;
    } else {
        memcpy(queue->segments + DP_MAX_SEGMENTS * (size_t)head, chain->segments,
               chain->count * sizeof chain->segments[0]);
    }
    queue->cookies[head] = cookie;
    memcpy(queue->rows + sizeof row * (size_t)head, &row, sizeof row);
}

static void fill_command(struct dp_command *command, const struct dp_queue *queue, uint32_t head,
                         uint64_t cookie, const struct chain *chain)
{
    put_command(command->header, chain->type == FLUSH ? NBD_FLUSH : chain->type, cookie,
                chain->sector << SECTOR_SHIFT, (uint32_t)chain->length);
    command->header_bytes = DP_COMMAND_BYTES;
    command->queue = queue;
    command->payload_bytes = chain->type == OUT ? (uint32_t)chain->length : 0;
    command->segment_count = chain->type == OUT ? chain->count : 0;
    if (chain->count)
        command->one = chain->segments[0];
    command->many = queue->segments + DP_MAX_SEGMENTS * (size_t)head;
}

/* The command that may be merged with what comes next. */
struct merging {
    struct dp_command *command; /* NULL: there is none */
    uint32_t type;
    uint64_t until, bytes, room_bytes;
    uint32_t leader, last; /* heads */
};

static inline bool may_join(const struct merging *merging, const struct chain *chain)
{
    return merging->command && chain->type == merging->type &&
           chain->sector << SECTOR_SHIFT == merging->until && chain->length < DP_LONG_BYTES &&
           chain->length <= merging->room_bytes;
}

/* `chain` is taken as a part of the command that is there, with `command` for its payload. */
static void join(struct merging *merging, const struct dp_queue *queue, uint32_t head,
                 const struct chain *chain, struct dp_command *command)
{
    uint16_t following = (uint16_t)(head + 1);
    uint32_t bytes, length;
    uint8_t *row = queue->rows + sizeof(struct dp_row) * (size_t)merging->last;

    memcpy(row + offsetof(struct dp_row, following), &following, sizeof following);
    merging->bytes += chain->length;
    merging->room_bytes -= chain->length;
    merging->until += chain->length;
    merging->last = head;
    bytes = (uint32_t)merging->bytes;
    row = queue->rows + sizeof(struct dp_row) * (size_t)merging->leader;
    memcpy(row + offsetof(struct dp_row, command_bytes), &bytes, sizeof bytes);
    length = htobe32(bytes);
    memcpy(merging->command->header + DP_COMMAND_BYTES - 4, &length, 4);
    command->header_bytes = 0;
}

/* `chain` is a command of its own, with which the next one may be merged. `*alone`: so many more
 * are not. */
static void begin_merging(struct merging *merging, const struct limits *limits, uint32_t head,
                          const struct chain *chain, struct dp_command *command, uint64_t *alone)
{
    bool may = chain->type != FLUSH && chain->length < DP_LONG_BYTES && !*alone &&
               chain->length < limits->merged_bytes[chain->type];

    if (chain->type != FLUSH && *alone)
        --*alone;
    merging->command = may ? command : NULL;
    if (!may)
        return;
    merging->type = chain->type;
    merging->until = (chain->sector << SECTOR_SHIFT) + chain->length;
    merging->bytes = chain->length;
    merging->room_bytes = limits->merged_bytes[chain->type] - chain->length;
    merging->leader = merging->last = head;
}

/* A flush is a row from here on, with `rows` before it. Whether the timer is armed then is as
 * `Disk.submit` decides it. */
static void note_flush(uint64_t *cells, uint64_t cookie, uint64_t rows)
{
    cells[DP_FLUSH_ROW] = cookie;
    cells[DP_FLUSH_COVERS] = cells[DP_UNFLUSHED];
    cells[DP_FLUSH_SEEN] = cells[DP_SEEN];
    cells[DP_FLUSH_ARMED] = cells[DP_ARMED];
    cells[DP_ARMED] = cells[DP_ARMED] && (cells[DP_NOT_ROWS] || rows);
    cells[DP_FLUSHES]++;
}

/* Why a write of these bytes may not be a row beside those that are; 0: it may. */
static uint64_t stop_of_span(const uint64_t *spans, uint64_t offset, uint64_t length)
{
    if (spans[0] >= DP_MAX_SPANS)
        return DP_STOP_ROOM;
    for (uint64_t index = 0; index < spans[0]; index++) {
        const uint64_t *span = &spans[1 + DP_SPAN_CELLS * index];

        if (offset < span[2] && span[1] < offset + length)
            return DP_STOP_WRITE;
    }
    return 0;
}

static void note_span(uint64_t *spans, uint64_t cookie, uint64_t offset, uint64_t length)
{
    uint64_t *span = &spans[1 + DP_SPAN_CELLS * spans[0]++];

    span[0] = cookie;
    span[1] = offset;
    span[2] = offset + length;
}

static void forget_span(uint64_t *spans, uint64_t cookie)
{
    uint64_t count = least(spans[0], DP_MAX_SPANS);

    for (uint64_t index = 0; index < count; index++) {
        uint64_t *span = &spans[1 + DP_SPAN_CELLS * index];

        if (span[0] != cookie)
            continue;
        memmove(span, &spans[1 + DP_SPAN_CELLS * (count - 1)], 8 * DP_SPAN_CELLS);
        spans[0] = count - 1;
        return;
    }
}

struct dp_taken dp_take_commands(struct dp_queue *queue, uint64_t *disk,
                                 const uint64_t *route, struct dp_channel *channel,
                                 uint64_t *rows, bool may_write, bool whole,
                                 struct dp_command *out, uint32_t room, uint32_t pieces)
{
    struct dp_taken taken = {0};
    struct limits limits = limits_of(disk, route, may_write, whole);
    uint64_t *state = queue->cells, *cells = channel->cells;
    uint64_t first = state[DP_NEXT_AVAIL];
    uint32_t count = available(queue), done = 0;
    struct merging merging = {0};
    struct chain chain;

    if (queue->size > DP_MAX_HEADS || state[DP_NUMBER] >= DP_MAX_QUEUES) {
        state[DP_STOPPED] = DP_STOP_RING;
        return taken;
    }
    for (; done < count && done < room; done++) {
        uint32_t head = head_at(queue, first + done), needed, several;
        uint64_t stop = command_at(queue, head, &limits, cells, &chain), cookie;
        bool large = !stop && is_large(chain.type, chain.length), joins;

        several = !stop && chain.count > 1 ? chain.count : 0;
        if ((large && !within(cells[DP_LARGE_BYTES], chain.length, DP_LARGE_IN_FLIGHT_BYTES)) ||
            !within(cells[DP_SEGMENTS], several, route[DP_ROW_SEGMENTS]))
            stop = stop ? stop : DP_STOP_ROOM;
        if (stop) {
            state[DP_STOPPED] = stop;
            break;
        }
        needed = 1 + (chain.type == OUT ? chain.count : 0);
        if (needed > pieces)
            break;
        if (channel->spans && chain.type == OUT)
            stop = stop_of_span(channel->spans, chain.sector << SECTOR_SHIFT, chain.length);
        if (stop) {
            state[DP_STOPPED] = stop;
            break;
        }
        pieces -= needed;
        cells[DP_SEGMENTS] += several;
        if (large)
            cells[DP_LARGE_BYTES] += chain.length;
        if (is_long_read(chain.type, chain.length))
            cells[DP_LONG_READS]++;
        cookie = state[DP_NAME] | rows[DP_SEQUENCE]++ << DP_NAME_BITS | head;
        if (queue->tracked)
            note_popped(queue, head, state[DP_COUNTER]++);
        joins = may_join(&merging, &chain);
        put_row(queue, channel, head, cookie, &chain, joins);
        if (channel->spans && chain.type == OUT)
            note_span(channel->spans, cookie, chain.sector << SECTOR_SHIFT, chain.length);
        fill_command(&out[done], queue, head, cookie, &chain);
        rows[DP_MERGED] += joins;
        if (joins)
            join(&merging, queue, head, &chain, &out[done]);
        else
            begin_merging(&merging, &limits, head, &chain, &out[done], &rows[DP_ALONE]);
        count_taken(&taken, disk, &chain);
        if (chain.type == FLUSH)
            note_flush(cells, cookie, cells[DP_ROWS] + done);
        else if (chain.type == OUT)
            cells[DP_ARMED] = 1;
    }
    taken.is_full = done < count && !state[DP_STOPPED];
    state[DP_NEXT_AVAIL] = (uint16_t)(first + done);
    state[DP_IN_FLIGHT] += done;
    cells[DP_ROWS] += done;
    return taken;
}

/* `count` chains of `queue` were pushed. */
static void pushed_some(struct dp_queue *queue, unsigned number, uint64_t count,
                        struct dp_answered *answered)
{
    uint64_t *state = queue->cells;

    state[DP_NEXT_USED] = (uint16_t)(state[DP_NEXT_USED] + count);
    state[DP_IN_FLIGHT] -= count;
    if (!state[DP_TOUCHED]) {
        state[DP_TOUCHED] = 1;
        answered->touched[answered->touched_count++] = (uint8_t)number;
    }
}

/* Where the data of a row is: its segments, for which `one` is room; NULL: they are not sound. */
static const struct dp_segment *segments_of(const struct dp_queue *queue, uint32_t head,
                                            const struct dp_row *row, struct dp_segment *one)
{
    const struct dp_segment *found = queue->segments + DP_MAX_SEGMENTS * (size_t)head;
    uint64_t length = 0;

    if (row->segments == 1) {
        *one = (struct dp_segment){row->data_at, row->length, row->data_region, 0};
        found = one;
    }
    if (row->segments > DP_MAX_SEGMENTS)
        return NULL;
    for (uint32_t index = 0; index < row->segments; index++) {
        if (found[index].region >= queue->region_count ||
            !within(found[index].at, found[index].length,
                    queue->regions[found[index].region].size_bytes))
            return NULL;
        length += found[index].length;
    }
    return length == row->length ? found : NULL;
}

/* A row that a reply is for. */
struct found {
    struct dp_row row;
    struct dp_segment one;
    const struct dp_segment *segments; /* `row.segments` of them */
};

/* The row with `cookie`; false: there is none, or it is not sound. */
static bool row_of(const struct dp_queue *queue, uint64_t cookie, const struct dp_channel *channel,
                   struct found *found)
{
    uint32_t head = (uint32_t)(cookie & (DP_MAX_HEADS - 1));
    struct dp_row *row = &found->row;

    if (head >= queue->size || queue->cookies[head] != cookie)
        return false;
    if (channel->unsent_from && dp_sequence_of(cookie) >= channel->unsent_from)
        return false;
    memcpy(row, queue->rows + sizeof *row * (size_t)head, sizeof *row);
    if (row->channel != channel->number || row->op > FLUSH ||
        (row->op == FLUSH && (channel->cells[DP_FLUSH_ROW] != cookie || row->length)) ||
        row->status_region >= queue->region_count ||
        !within(row->status_at, 1, queue->regions[row->status_region].size_bytes))
        return false;
    found->segments = segments_of(queue, head, row, &found->one);
    return found->segments;
}

/* Copy the first `n_bytes` of a payload to where it belongs. */
static void scatter(const struct dp_queue *queue, const struct found *found, const uint8_t *from,
                    uint64_t n_bytes)
{
    for (uint32_t index = 0; n_bytes; index++) {
        const struct dp_segment *segment = &found->segments[index];
        uint32_t part = n_bytes < segment->length ? (uint32_t)n_bytes : segment->length;

        copy(in_region(queue, segment->region, segment->at), from, part);
        from += part;
        n_bytes -= part;
    }
}

/* The cookie of the row that follows another one in a command. */
static inline uint64_t cookie_after(uint64_t cookie, uint32_t following)
{
    uint64_t next = (cookie & ~(uint64_t)(DP_MAX_HEADS - 1)) + (UINT64_C(1) << DP_NAME_BITS);

    return next | ((following - 1) & (DP_MAX_HEADS - 1));
}

/* How many rows the command of the row at `first` is for; 0: it is that of another one, or they are
 * not sound. (Each has the number after that of the one before: this ends.) */
static uint32_t rows_of(const struct dp_queue *queue, uint64_t cookie,
                        const struct dp_channel *channel, const struct dp_row *first)
{
    uint64_t length = first->length;
    uint32_t count = 1, following = first->following;
    struct found next;

    while (following) {
        cookie = cookie_after(cookie, following);
        if (!row_of(queue, cookie, channel, &next) || next.row.op != first->op ||
            next.row.op == FLUSH || next.row.command_bytes || next.row.length >= DP_LONG_BYTES ||
            next.row.offset != first->offset + length)
            return 0;
        length += next.row.length;
        count++;
        following = next.row.following;
    }
    return length == first->command_bytes ? count : 0;
}

/* How many bytes of the reply at `at` come before its payload: 0 if it is not the usual answer. */
static uint64_t header_of(const struct dp_channel *channel, const struct dp_row *row,
                          const uint8_t *at, uint64_t here)
{
    bool structured = channel->structured && row->op == IN;

    if (!structured)
        return big_32(at) == SIMPLE_MAGIC && !big_32(at + 4) ? SIMPLE_REPLY_BYTES : 0;
    if (big_32(at) != CHUNK_MAGIC || big_32(at + 4) != DONE_AND_OFFSET_DATA)
        return 0;
    if (here >= DATA_CHUNK_BYTES && (big_32(at + 16) != (uint64_t)row->command_bytes + 8 ||
                                     big_64(at + 20) != row->offset))
        return 0;
    return DATA_CHUNK_BYTES;
}

/* The chain of a row has been answered; its element is the one `count` after the next. */
static void push_row(struct dp_queue *queue, const struct dp_channel *channel, uint64_t cookie,
                     const struct dp_row *row, uint64_t count)
{
    uint64_t *state = queue->cells;
    uint32_t head = (uint32_t)(cookie & (DP_MAX_HEADS - 1));

    queue->cookies[head] = 0;
    store_8(in_region(queue, row->status_region, row->status_at), 0);
    if (queue->tracked) {
        note_pushed(queue, head, &state[DP_LAST_HEAD]);
        queue->pushed[state[DP_PUSHED]++] = (uint16_t)head;
    }
    put_element(queue, state[DP_NEXT_USED] + count, head, row->op == IN ? row->length + 1 : 1);
    channel->cells[DP_ROWS]--;
    if (row->segments > 1)
        channel->cells[DP_SEGMENTS] -= least(channel->cells[DP_SEGMENTS], row->segments);
    if (row->op == OUT) {
        channel->cells[DP_UNFLUSHED]++;
        if (channel->spans)
            forget_span(channel->spans, cookie);
    }
    if (row->op == FLUSH) {
        channel->cells[DP_FLUSH_ROW] = 0;
        channel->cells[DP_FLUSHED]++;
        channel->cells[DP_COVERED] = channel->cells[DP_FLUSH_COVERS];
    }
    if (is_long_read(row->op, row->length))
        channel->cells[DP_LONG_READS]--;
    if (is_large(row->op, row->length))
        channel->cells[DP_LARGE_BYTES] -= least(channel->cells[DP_LARGE_BYTES], row->length);
}

/* After `count` chains that are pushed, but not counted yet, `more` may be. */
static inline bool may_push(const struct dp_queue *queue, uint64_t count, uint32_t more)
{
    return within(count, more, queue->cells[DP_IN_FLIGHT]) &&
           (!queue->tracked || within(queue->cells[DP_PUSHED], more, queue->size));
}

/* A command has been answered: `found` is its first row, and those that follow are sound. The
 * payload of a READ is at `payload`. How many chains that were. */
static uint64_t push_command(struct dp_queue *queue, const struct dp_channel *channel,
                             uint64_t cookie, struct found *found, const uint8_t *payload,
                             uint64_t count)
{
    uint64_t began = count;

    for (;;) {
        uint32_t following = found->row.following;

        if (found->row.op == IN) {
            scatter(queue, found, payload, found->row.length);
            payload += found->row.length;
        }
        push_row(queue, channel, cookie, &found->row, count++);
        if (!following)
            return count - began;
        cookie = cookie_after(cookie, following);
        if (!row_of(queue, cookie, channel, found))
            return count - began;
    }
}

/* Whether the rest of a payload is received where it belongs, with so much `missing`: as in
 * transmission.py. */
static inline bool goes_direct(const struct dp_channel *channel, const struct dp_row *row,
                               uint64_t missing)
{
    return channel->structured || missing >= DP_LONG_BYTES || row->length >= 2 * DP_LONG_BYTES;
}

/* The payload from `at` on, of which `here` bytes are there, goes on elsewhere. */
static void go_direct(struct dp_channel *channel, const struct dp_queue *queue, uint64_t cookie,
                      const struct found *found, const uint8_t *at, uint64_t here)
{
    scatter(queue, found, at, here);
    channel->cells[DP_DIRECT] = cookie;
    channel->cells[DP_DIRECT_LEFT] = found->row.length - here;
}

void dp_answers(struct dp_channel *channel, dp_queue_of queue_of, void *owner, bool whole,
                uint64_t start, uint64_t end, struct dp_answered *answered)
{
    struct dp_queue *queue = NULL;
    unsigned current = 0;
    uint64_t count = 0;
    struct found found;

    answered->waits = false;
    answered->touched_count = 0;
    if (end > channel->staging_bytes || start > end)
        end = start;
    while (end - start >= SIMPLE_REPLY_BYTES) {
        const uint8_t *reply = channel->staging + start;
        uint64_t cookie = big_64(reply + 8), header, payload;
        const struct dp_row *row = &found.row;
        uint32_t rows;
        unsigned number = (unsigned)((cookie & NAME_MASK) >> DP_HEAD_BITS);
        bool is_long;

        if (!(cookie & ROW_COOKIE))
            break;
        if (!queue || number != current) {
            if (queue && count)
                pushed_some(queue, current, count, answered);
            count = 0;
            current = number;
            queue = queue_of(owner, number);
            if (!queue)
                break;
        }
        if (!row_of(queue, cookie, channel, &found))
            break;
        rows = rows_of(queue, cookie, channel, row);
        if (!rows || !may_push(queue, count, rows))
            break;
        is_long = is_long_read(row->op, row->length);
        header = header_of(channel, row, reply, end - start);
        if (!header || (is_long && !whole))
            break;
        payload = row->op == IN ? row->command_bytes : 0;
        if (header + payload > end - start) {
            answered->waits = true;
            if (is_long && header <= end - start &&
                goes_direct(channel, row, payload - (end - start - header))) {
                go_direct(channel, queue, cookie, &found, reply + header, end - start - header);
                start = end;
            }
            break;
        }
        start += header + payload;
        count += push_command(queue, channel, cookie, &found, reply + header, count);
    }
    if (queue && count)
        pushed_some(queue, current, count, answered);
    answered->start = start;
}

/* The queue and the row of the payload that is being received. */
static struct dp_queue *direct_queue(struct dp_channel *channel, dp_queue_of queue_of, void *owner,
                                     struct found *found)
{
    uint64_t cookie = channel->cells[DP_DIRECT];
    struct dp_queue *queue = queue_of(owner, (unsigned)((cookie & NAME_MASK) >> DP_HEAD_BITS));

    if (!(cookie & ROW_COOKIE) || !queue || !row_of(queue, cookie, channel, found) ||
        found->row.op != IN || channel->cells[DP_DIRECT_LEFT] > found->row.length ||
        found->row.following || !found->row.command_bytes || !may_push(queue, 0, 1))
        return NULL;
    return queue;
}

uint32_t dp_direct(struct dp_channel *channel, dp_queue_of queue_of, void *owner,
                   struct iovec pieces[DP_MAX_SEGMENTS])
{
    struct found found;
    struct dp_queue *queue = direct_queue(channel, queue_of, owner, &found);
    uint32_t count = 0;
    uint64_t skip;

    if (!queue)
        return 0;
    skip = found.row.length - channel->cells[DP_DIRECT_LEFT];
    for (uint32_t index = 0; index < found.row.segments; index++) {
        const struct dp_segment *segment = &found.segments[index];

        if (skip >= segment->length) {
            skip -= segment->length;
            continue;
        }
        pieces[count++] = (struct iovec){in_region(queue, segment->region, segment->at) + skip,
                                         segment->length - skip};
        skip = 0;
    }
    return count;
}

void dp_direct_received(struct dp_channel *channel, dp_queue_of queue_of, void *owner,
                        uint64_t n_bytes, struct dp_answered *answered)
{
    uint64_t cookie = channel->cells[DP_DIRECT];
    struct found found;
    struct dp_queue *queue = direct_queue(channel, queue_of, owner, &found);

    answered->touched_count = 0;
    channel->cells[DP_DIRECT_LEFT] -= least(n_bytes, channel->cells[DP_DIRECT_LEFT]);
    if (!queue || channel->cells[DP_DIRECT_LEFT])
        return;
    channel->cells[DP_DIRECT] = 0;
    push_row(queue, channel, cookie, &found.row, 0);
    pushed_some(queue, (unsigned)((cookie & NAME_MASK) >> DP_HEAD_BITS), 1, answered);
}

bool dp_publish(struct dp_queue *queue)
{
    uint64_t *state = queue->cells;
    uint16_t old = (uint16_t)state[DP_PUBLISHED], new = (uint16_t)state[DP_NEXT_USED];
    bool wants_call;

    if (old == new)
        return false;
    state[DP_PUBLISHED] = new;
    store_16(&queue->used[1], new); /* the elements are in place before the index */
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* it is out before the driver's wish is read */
    if (state[DP_SIGNAL_ANYWAY]) {
        state[DP_SIGNAL_ANYWAY] = 0;
        wants_call = true;
    } else if (state[DP_EVENT_IDX]) {
        /* virtio 1.3, 2.7.7.2: when used_event is among the entries just published. */
        uint16_t used_event = load_16(&queue->avail[2 + (size_t)queue->size]);

        wants_call = (uint16_t)(new - used_event - 1) < (uint16_t)(new - old);
    } else {
        wants_call = !(load_16(&queue->avail[0]) & AVAIL_NO_INTERRUPT);
    }
    if (queue->tracked) {
        uint64_t pushed = least(state[DP_PUSHED], queue->size);

        for (uint64_t index = 0; index < pushed; index++) {
            uint32_t head = queue->pushed[index];

            if (head < queue->size)
                store_8(queue->tracked + 16 + 16 * (size_t)head, 0);
        }
        state[DP_PUSHED] = 0;
        store_16((uint16_t *)(void *)(queue->tracked + 14), new);
    }
    return wants_call;
}

bool dp_arm(struct dp_queue *queue)
{
    uint16_t next = (uint16_t)queue->cells[DP_NEXT_AVAIL];

    if (queue->cells[DP_EVENT_IDX])
        store_16(&queue->used[2 + 4 * (size_t)queue->size], next);
    else
        store_16(&queue->used[0], 0);
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* the wish is out before the index is read */
    return load_16(&queue->avail[1]) != next;
}

void dp_disarm(struct dp_queue *queue)
{
    store_16(&queue->used[0], queue->cells[DP_EVENT_IDX] ? 0 : USED_NO_NOTIFY);
}
