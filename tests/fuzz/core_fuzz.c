/* The compiled core under a fuzzer, alone: every area that it is given is an allocation of its own,
 * so that AddressSanitizer sees each byte read or written outside of it.
 *
 * The input is a program: which chains the guest makes, what it pokes where, what the server
 * answers, which function is called. In every other program whole turns are called instead, with a
 * server at the other end of a socket. With clang, libFuzzer writes the programs: `./run fuzz core`.
 * How it is built stands in `core.py` beside this file.
 *
 * With -DOWN_DRIVER it runs on its own: `core_fuzz ROUNDS SEED FILE...` runs the files, then so
 * many programs made of random numbers. With -DDP_TEST_FETCHES, for the core as well, whatever is
 * read of a guest's changes at that moment, as a guest may have it: to be read once. With
 * -DFUZZ_PLANTED used rings are shorter than the core is told, which has to be found.
 */
#include "turns.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#ifdef FUZZ_PLANTED
enum { MISSING_BYTES = 8 };
#else
enum { MISSING_BYTES = 0 };
#endif

enum { QUEUES = 2, REGIONS = 3, SLOTS = 6, BUCKETS = 8, GRANULE_SHIFT = 12, BLOCK_SHIFT = 9 };
enum { STAGING_BYTES = 0x14000, DISK_BYTES = 1 << 17, COMMANDS = 64, DP_DISK_MAX = 0x18000 };

struct input {
    const uint8_t *at;
    size_t left;
};

struct world {
    struct dp_queue queues[QUEUES];
    struct dp_region regions[REGIONS];
    struct dp_channel channel, other; /* `other`: of whole turns over two connections */
    struct dp_resident cache;
    uint64_t *spans;
    uint64_t disk[DP_DISK_CELLS], route[DP_ROUTE_CELLS], rows[DP_ROWS_CELLS];
    uint64_t until; /* the sector where the last chain ends */
    uint32_t last_type;
    struct dp_command *commands; /* of the last call: exactly as many as there is room for */
    uint8_t sent[COMMANDS][DP_COMMAND_BYTES];
    uint32_t sent_count;
    uint64_t staged;
    uint16_t *open;
    int calls;
    bool whole; /* long reads, too */
    bool turns; /* whole turns */
    int ours[2], theirs[2], epoll_fd;
    struct dp_output output; /* of the last turn, for the first of them */
    uint64_t start[2], end[2]; /* in the staging buffers, between turns */
    uint8_t *outgoing;   /* of the server, `staged` bytes */
};

static uint64_t take(struct input *input, size_t n_bytes)
{
    uint64_t value = 0;

    while (n_bytes-- && input->left) {
        value = value << 8 | *input->at++;
        input->left--;
    }
    return value;
}

#ifdef DP_TEST_FETCHES
void dp_fetched(void *from, size_t n_bytes)
{
    static uint64_t state;
    uint8_t *at = from;

    for (; n_bytes--; at++) {
        state = state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
        if (state >> 40 & 1) /* every other byte */
            *at = (uint8_t)(state >> 56);
    }
}
#endif

static void *room(size_t n_bytes)
{
    void *found = calloc(1, n_bytes ? n_bytes : 1);

    if (!found)
        abort();
    return found;
}

static int open_blocks(void *owner, uint32_t slot, uint32_t bits)
{
    struct world *world = owner;
    int result = ++world->calls % 4 - 1;

    if (slot >= SLOTS)
        abort();
    if (result > 0)
        world->open[slot] = (uint16_t)(world->open[slot] | bits);
    return result > 0 ? 1 : result;
}

static int store(void *owner, uint64_t offset, uint64_t length, const struct iovec *data,
                 uint32_t count)
{
    struct world *world = owner;
    volatile uint8_t sum = 0;

    for (uint32_t index = 0; index < count; index++) {
        const uint8_t *at = data[index].iov_base;

        for (size_t byte = 0; byte < data[index].iov_len; byte++)
            sum = (uint8_t)(sum + at[byte]);
        length -= data[index].iov_len;
    }
    if (length || offset > DISK_BYTES)
        abort();
    return ++world->calls % 3 - 1;
}

static void make_queue(struct world *world, unsigned number, struct input *input)
{
    struct dp_queue *queue = &world->queues[number];
    uint64_t setup = take(input, 2);
    uint32_t size = 1u << setup % 7;

    queue->cells = room(8 * DP_QUEUE_CELLS);
    queue->size = size;
    queue->descriptors = room(16 * size);
    queue->avail = room(6 + 2 * size);
    queue->used = room(6 + 8 * size - MISSING_BYTES);
    queue->regions = world->regions;
    queue->region_count = REGIONS;
    queue->rows = room(sizeof(struct dp_row) * size);
    queue->cookies = room(8 * size);
    queue->segments = room(sizeof(struct dp_segment) * DP_MAX_SEGMENTS * size);
    queue->pushed = room(2 * size);
    queue->tracked = setup & 0x100 ? room(16 + 16 * size) : NULL;
    queue->cells[DP_SIZE] = size;
    queue->cells[DP_NUMBER] = number;
    queue->cells[DP_NAME] = UINT64_C(1) << 63 | number << DP_HEAD_BITS;
    queue->cells[DP_EVENT_IDX] = setup >> 9 & 1;
    queue->cells[DP_INDIRECT] = setup >> 10 & 1;
    queue->cells[DP_NEXT_AVAIL] = queue->avail[1] = (uint16_t)(setup & 0x800 ? 0xFFFE : 0);
    if (!dp_queue_is_sound(queue))
        abort();
}

static void connect_server(struct world *world)
{
    struct epoll_event event = {.events = EPOLLIN};
    int ends[2];

    world->epoll_fd = epoll_create1(0);
    for (int index = 0; index < 2; index++) {
        if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, ends) < 0)
            abort();
        world->ours[index] = ends[0];
        world->theirs[index] = ends[1];
        event.data.fd = ends[0];
        if (epoll_ctl(world->epoll_fd, EPOLL_CTL_ADD, ends[0], &event) < 0)
            abort();
    }
}

static void make_channel(struct dp_channel *channel, uint32_t number, bool structured)
{
    channel->cells = room(8 * DP_CHANNEL_CELLS);
    channel->staging = room(STAGING_BYTES);
    channel->staging_bytes = STAGING_BYTES;
    channel->number = number;
    channel->structured = structured;
}

static void make_world(struct world *world, struct input *input)
{
    static const uint8_t up[4] = {1, 2, 3, 3};
    static const uint64_t sizes[REGIONS] = {0x20000, 0x3001, 0x230};
    static const uint64_t addresses[REGIONS] = {0x100000, UINT64_MAX - 0x3000, 0x200};
    uint32_t *head, *granule_of;
    uint16_t *ready;
    uint64_t setup;

    memset(world, 0, sizeof *world);
    for (int index = 0; index < REGIONS; index++)
        world->regions[index] =
            (struct dp_region){addresses[index], sizes[index], room(sizes[index])};
    for (unsigned number = 0; number < QUEUES; number++)
        make_queue(world, number, input);
    setup = take(input, 1);
    make_channel(&world->channel, 1, setup & 1);
    make_channel(&world->other, 2, setup & 1);
    world->spans = room(8 * DP_SPANS_CELLS);
    if (setup & 8)
        world->channel.spans = world->other.spans = world->spans;
    world->whole = setup & 2;
    world->turns = setup & 4;
    world->outgoing = room(STAGING_BYTES);
    if (world->turns)
        connect_server(world);
    head = room(4 * BUCKETS);
    granule_of = room(4 * SLOTS);
    ready = room(2 * SLOTS);
    world->open = room(2 * SLOTS);
    for (uint32_t slot = 1; slot < SLOTS; slot++) {
        granule_of[slot] = slot;
        head[slot & (BUCKETS - 1)] = slot;
        ready[slot] = 0xFF;
        world->open[slot] = 0x0F;
    }
    head[0] = (uint32_t)take(input, 1); /* stale, or no slot at all */
    world->cache = (struct dp_resident){
        .granule_shift = GRANULE_SHIFT,
        .block_shift = BLOCK_SHIFT,
        .bucket_mask = BUCKETS - 1,
        .head = head,
        .granule_of = granule_of,
        .ready = ready,
        .open = world->open,
        .touched = room(SLOTS),
        .slots = SLOTS,
        .data = room(SLOTS << GRANULE_SHIFT),
        .data_bytes = SLOTS << GRANULE_SHIFT,
        .up = up,
        .up_bytes = sizeof up,
        .open_blocks = open_blocks,
        .store = store,
        .owner = world,
    };
    world->disk[DP_CAPACITY_BYTES] = DISK_BYTES;
    world->disk[DP_BLOCK_MASK] = 511;
    world->disk[DP_MAY_WRITE] = world->disk[DP_CAN_FLUSH] = 1;
    world->route[DP_MAX_READ_BYTES] = world->route[DP_MAX_WRITE_BYTES] = DP_SMALL_BYTES;
    world->route[DP_WHOLE_READ_BYTES] = world->route[DP_WHOLE_WRITE_BYTES] = DP_DISK_MAX;
    world->route[DP_SIZE_BYTES] = DISK_BYTES;
    world->route[DP_ROW_SEGMENTS] = DP_MAX_ROW_SEGMENTS;
    world->rows[DP_SEQUENCE] = 1;
}

static void end_world(struct world *world)
{
    for (int index = 0; index < REGIONS; index++)
        free(world->regions[index].at);
    for (int number = 0; number < QUEUES; number++) {
        struct dp_queue *queue = &world->queues[number];

        free(queue->cells);
        free((void *)queue->descriptors);
        free(queue->avail);
        free(queue->used);
        free(queue->rows);
        free(queue->cookies);
        free(queue->segments);
        free(queue->pushed);
        free(queue->tracked);
    }
    free(world->channel.cells);
    free(world->channel.staging);
    free(world->other.cells);
    free(world->other.staging);
    free(world->spans);
    free((void *)world->cache.head);
    free((void *)world->cache.granule_of);
    free((void *)world->cache.ready);
    free(world->open);
    free(world->cache.touched);
    free(world->cache.data);
    free(world->outgoing);
    if (world->turns) {
        for (int index = 0; index < 2; index++) {
            close(world->ours[index]);
            close(world->theirs[index]);
        }
        close(world->epoll_fd);
    }
}

static void put_descriptor(uint8_t *to, uint64_t address, uint32_t length, uint16_t flags,
                           uint16_t next)
{
    memcpy(to, &address, 8);
    memcpy(to + 8, &length, 4);
    memcpy(to + 12, &flags, 2);
    memcpy(to + 14, &next, 2);
}

enum { LINKS_MAX = DP_MAX_SEGMENTS + 4 };

/* The descriptors of data of `length` bytes from `data` on, in `count` segments, some of which are
 * elsewhere. */
static void put_data(uint8_t *table, uint64_t data, uint32_t length, uint32_t count, uint16_t flags,
                     uint64_t what)
{
    for (uint32_t index = 0; index < count; index++) {
        uint32_t part = index + 1 < count ? length / count : length - length / count * (count - 1);
        uint64_t elsewhere = UINT64_MAX - 0x3000 + 61 * index;

        put_descriptor(table + 16 * index, what >> index % 32 & 7 ? data : elsewhere, part, flags, 0);
        data += part;
    }
}

/* How many segments the data of a chain has. */
static uint32_t segments_of(uint64_t what, struct input *input)
{
    static const uint32_t most[4] = {1, 4, 64, LINKS_MAX - 2};
    uint32_t limit = most[what >> 14 & 3];

    if (limit == 1)
        return 1;
    return limit < 100 ? 1 + (uint32_t)take(input, 1) % limit : limit - (uint32_t)take(input, 1) % 6;
}

/* A chain that is usual, unless `odd` says where it is not. */
static void add_chain(struct world *world, struct dp_queue *queue, struct input *input)
{
    static const uint64_t edges[] = {0, 0x100000, 0x11FFFF, 0x120000, UINT64_MAX,
                                     UINT64_MAX - 0x3000, 0x200, 0x42F};
    uint64_t what = take(input, 4), sector = take(input, 1), odd = take(input, 1);
    uint16_t index = (uint16_t)(queue->avail[1]), head = (uint16_t)(what % queue->size);
    uint32_t length = 512u << (what >> 8) % 9, type = what >> 12 & 1;
    uint64_t data = 0x108000 + (what >> 16) % 0x7000;
    uint8_t table[16 * LINKS_MAX], *main = world->regions[0].at;
    uint8_t *descriptors = (void *)queue->descriptors;
    uint64_t header_at = 0x1000 + 16 * (index & 63), table_at = 0x2000 + 64 * (index & 63);
    uint32_t links = 2 + segments_of(what, input);
    int indirect = what >> 13 & 1;

    if (odd & 0x40)
        sector = sector << 55 | sector;
    if ((odd & 3) == 3) { /* where the last one ended */
        sector = world->until;
        type = world->last_type;
    }
    world->until = sector + length / 512;
    world->last_type = type;
    if ((what >> 24 & 7) == 7) { /* a flush */
        type = 4;
        links = 2;
    }
    if (links > 3)
        table_at = 0x5000 + 0x880 * (index & 3);
    memcpy(main + header_at, &type, 4);
    memcpy(main + header_at + 8, &sector, 8);
    put_descriptor(table, 0x100000 + header_at, 16, 1, 0);
    if (links > 2)
        put_data(table + 16, data, length, links - 2, type ? 1 : 3, links > 3 ? what : UINT64_MAX);
    put_descriptor(table + 16 * (links - 1), 0x100000 + 0x4000 + (index & 255), 1, 2, 0);
    for (uint32_t link = 0; link + 1 < links; link++) {
        uint16_t next = (uint16_t)(indirect ? link + 1 : (head + link + 1) % queue->size);

        memcpy(table + 16 * link + 14, &next, 2);
    }
    if (odd & 0x80) {
        uint8_t *broken = table + 16 * (odd % links);
        uint64_t address = edges[take(input, 1) % 8] + take(input, 1) - take(input, 1);
        uint32_t n_bytes = (uint32_t)take(input, 4);

        if (odd & 0x08)
            memcpy(broken, &address, 8);
        if (odd & 0x10)
            memcpy(broken + 8, &n_bytes, 4);
        if (odd & 0x20)
            broken[12 + n_bytes % 4] = (uint8_t)(n_bytes >> 8);
    }
    if (indirect) {
        memcpy(main + table_at, table, 16 * links);
        put_descriptor(descriptors + 16 * head, 0x100000 + table_at, 16 * links, 4, 0);
    } else {
        for (uint32_t link = 0; link < links; link++)
            memcpy(descriptors + 16 * ((head + link) % queue->size), table + 16 * link, 16);
    }
    queue->avail[2 + (index & (queue->size - 1))] = (uint16_t)(odd & 4 ? what : head);
    queue->avail[1]++;
}

/* All of a payload may be read, and is as long as it says; how many pieces it has. */
static uint32_t read_payload(const struct dp_command *command)
{
    const struct dp_segment *segments = dp_payload(command);
    volatile uint8_t sum = 0;
    uint64_t left = command->payload_bytes;

    for (uint32_t index = 0; index < command->segment_count; index++) {
        const uint8_t *at = command->queue->regions[segments[index].region].at + segments[index].at;

        for (uint32_t byte = 0; byte < segments[index].length; byte++)
            sum = (uint8_t)(sum + at[byte]);
        left -= segments[index].length;
    }
    if (left)
        abort();
    return command->segment_count;
}

/* What is known before a look at the rings. */
static void look_at_flushes(struct world *world)
{
    uint64_t *cells = world->channel.cells, known = world->rows[DP_SEQUENCE];

    cells[DP_MAY_FLUSH] = (known & 7) != 0;
    cells[DP_NOT_ROWS] = known >> 3 & 1;
    cells[DP_ARMED] = known >> 4 & 1;
    cells[DP_SEEN] = known;
    cells[DP_FLUSHES] = cells[DP_FLUSHED] = 0;
}

static uint32_t length_of(const uint8_t *header)
{
    uint32_t length;

    memcpy(&length, header + 24, 4);
    return __builtin_bswap32(length);
}

static uint64_t merged_count; /* in all programs */

static void commands(struct world *world, struct dp_queue *queue, struct input *input)
{
    uint32_t space = (uint32_t)take(input, 1) % 65, pieces = 3 * space, used = 0;
    struct dp_command *out = room(space * sizeof *out);
    struct dp_taken taken;
    uint64_t merged = world->rows[DP_MERGED];
    uint32_t count, left = 0;

    if (!(space & 15))
        world->rows[DP_ALONE] = space >> 4;
    look_at_flushes(world);
    taken = dp_take_commands(queue, world->disk, world->route, &world->channel, world->rows,
                             true, world->whole, out, space, pieces);
    count = taken.reads + taken.writes + taken.flushes;
    if (count > space || taken.flushes > 1)
        abort();
    for (uint32_t index = 0; index < count; index++) {
        used += 1 + read_payload(&out[index]);
        if (out[index].header_bytes) {
            const uint8_t *header = out[index].header;

            if (left)
                abort();
            left = header[7] == 1 ? length_of(header) : 0;
            memcpy(world->sent[world->sent_count++ % COMMANDS], header, DP_COMMAND_BYTES);
        } else {
            merged++;
        }
        left -= out[index].payload_bytes;
    }
    if (used > pieces || left || merged != world->rows[DP_MERGED])
        abort();
    merged_count += merged;
    free(out);
}

/* A reply to one of the last commands, perhaps again, perhaps broken. */
static void reply(struct world *world, struct input *input)
{
    uint64_t which = take(input, 1), odd = take(input, 1);
    const uint8_t *command = world->sent[which % COMMANDS];
    uint8_t header[28] = {0x67, 0x44, 0x66, 0x98};
    uint32_t length = length_of(command), header_bytes = 16, payload;

    payload = command[7] ? 0 : length; /* 0: a READ */
    memcpy(header + 8, command + 8, 8);
    if (payload && world->channel.structured) {
        static const uint8_t chunk[8] = {0x66, 0x8E, 0x33, 0xEF, 0, 1, 0, 1};
        uint32_t stated = __builtin_bswap32(length + 8);

        memcpy(header, chunk, 8);
        memcpy(header + 16, &stated, 4);
        memcpy(header + 20, command + 16, 8);
        header_bytes = 28;
    }
    if (odd & 0x80)
        header[odd % 28] ^= (uint8_t)take(input, 1);
    if (world->staged + header_bytes + payload > STAGING_BYTES)
        return;
    memcpy(world->outgoing + world->staged, header, header_bytes);
    world->staged += header_bytes + payload;
}

static struct dp_queue *queue_of(void *owner, unsigned number)
{
    struct world *world = owner;

    return number < QUEUES ? &world->queues[number] : NULL;
}

/* Bytes of a payload come where they belong. */
static void receive_direct(struct world *world, struct input *input)
{
    struct dp_answered answered;
    uint64_t left = world->channel.cells[DP_DIRECT_LEFT], n_bytes = take(input, 2) * 4 + 1;
    struct iovec pieces[DP_MAX_SEGMENTS];
    uint32_t count = dp_direct(&world->channel, queue_of, world, pieces);
    uint64_t found = 0;

    if (!count)
        return;
    n_bytes = n_bytes < left ? n_bytes : left;
    for (uint32_t index = 0; index < count; index++) {
        memset(pieces[index].iov_base, 0x5A, pieces[index].iov_len);
        found += pieces[index].iov_len;
    }
    if (found != left)
        abort();
    dp_direct_received(&world->channel, queue_of, world, n_bytes, &answered);
    for (uint32_t index = 0; index < answered.touched_count; index++)
        world->queues[answered.touched[index]].cells[DP_TOUCHED] = 0;
}

static void answer(struct world *world, struct input *input)
{
    struct dp_answered answered;
    uint64_t cut = take(input, 1), end = world->staged;

    if (cut & 0x80 && end)
        end -= cut % end;
    if (world->channel.cells[DP_DIRECT_LEFT]) {
        receive_direct(world, input);
        return;
    }
    memcpy(world->channel.staging, world->outgoing, end);
    dp_answers(&world->channel, queue_of, world, world->whole, 0, end, &answered);
    if (answered.start > end || answered.touched_count > QUEUES)
        abort();
    memmove(world->outgoing, world->outgoing + answered.start,
            world->staged - answered.start);
    world->staged -= answered.start;
    if (cut & 0x40)
        world->staged = 0;
    for (uint32_t index = 0; index < answered.touched_count; index++)
        world->queues[answered.touched[index]].cells[DP_TOUCHED] = 0;
}

static int nothing_comes(void *owner, struct epoll_event *events)
{
    (void)owner;
    (void)events;
    return 0;
}

static int nobody_called(void *owner, uint32_t ring)
{
    struct world *world = owner;

    return ring < QUEUES && ++world->calls % 64 ? 0 : -1;
}

static int nobody_armed(void *owner)
{
    struct world *world = owner;

    return ++world->calls % 16 ? 0 : -1;
}

/* The commands that the server has got by now. */
static void serve(struct world *world)
{
    static uint8_t got[1 << 20];

    for (int index = 0; index < 2; index++) {
        ssize_t size = read(world->theirs[index], got, sizeof got);

        for (ssize_t at = 0; at + DP_COMMAND_BYTES <= size;) {
            memcpy(world->sent[world->sent_count++ % COMMANDS], got + at, DP_COMMAND_BYTES);
            at += DP_COMMAND_BYTES + (got[at + 7] ? (ssize_t)length_of(got + at) : 0);
        }
    }
}

/* What is unsent is as much as its commands say. */
static void check_output(const struct dp_output *output)
{
    uint64_t n_bytes = 0;

    for (uint32_t index = output->piece; index < output->piece_count; index++)
        n_bytes += output->pieces[index].iov_len;
    for (uint32_t index = output->command; index < output->command_count; index++)
        n_bytes -= output->commands[index].n_bytes;
    if (n_bytes || output->is_watched != (output->command < output->command_count))
        abort();
}

/* Keep what is to be sent by the next turn that has one connection; with more it is dropped. */
static void keep_output(struct world *world, const struct dp_turns *turns, bool keep)
{
    struct epoll_event event = {.events = EPOLLIN, .data.fd = world->ours[0]};

    world->output = turns->output;
    if (keep || !turns->output.is_watched)
        return;
    memset(&world->output, 0, sizeof world->output);
    epoll_ctl(world->epoll_fd, EPOLL_CTL_MOD, world->ours[0], &event);
}

/* One turn, or a few; what else it leaves is dropped, as on a connection that is lost. */
static void turn(struct world *world, struct input *input)
{
    static struct dp_turns turns;
    struct dp_ring rings[QUEUES] = {{&world->queues[0], -1, 0, 0}, {&world->queues[1], -1, 0, 0}};
    uint64_t how = take(input, 1), size = world->staged;
    ssize_t sent;
    int flags;

    if (how & 0x80 && size)
        size -= how % size;
    sent = write(world->theirs[how >> 6 & 1], world->outgoing, size);
    if (sent > 0) {
        memmove(world->outgoing, world->outgoing + sent, world->staged - (uint64_t)sent);
        world->staged -= (uint64_t)sent;
    }
    memset(&turns, 0, offsetof(struct dp_turns, output));
    turns.epoll_fd = world->epoll_fd;
    turns.rings = rings;
    turns.ring_count = how & 1 ? 1 : QUEUES;
    turns.disk = world->disk;
    turns.may_write = how & 2;
    if (how & 0x0C) {
        look_at_flushes(world);
        turns.wires[0] = (struct dp_wire){&world->channel, world->ours[0], world->start[0],
                                          world->end[0], 0, 0, 0};
        turns.wires[1] = (struct dp_wire){&world->other, world->ours[1], world->start[1],
                                          world->end[1], 0, 0, 0};
        turns.wire_count = how & 0x20 ? 2 : 1;
        turns.wire = &turns.wires[0];
        turns.output = world->output;
        if (turns.wire_count > 1) {
            world->channel.cells[DP_MAY_FLUSH] = 0;
            keep_output(world, &turns, false);
            memset(&turns.output, 0, sizeof turns.output);
        }
        turns.route = world->route;
        turns.rows = world->rows;
    } else {
        turns.cache = &world->cache;
        memset(&turns.output, 0, sizeof turns.output);
    }
    turns.until_ns = how & 0x10 ? UINT64_MAX : 0;
    turns.wait = nothing_comes;
    turns.call = nobody_called;
    turns.begin_to_write = nobody_armed;
    turns.owner = world;
    flags = dp_turns(&turns);
    if (turns.flushed > DP_TIMES || world->channel.unsent_from)
        abort();
    if (turns.wire_count == 1) {
        if (!(flags & DP_FAILED))
            check_output(&turns.output);
        keep_output(world, &turns, !(flags & DP_FAILED));
    }
    for (uint32_t index = 0; index < turns.wire_count; index++) {
        const struct dp_wire *wire = &turns.wires[index];

        world->start[index] = wire->flags & DP_REPLY ? wire->end : wire->start;
        world->end[index] = wire->end;
        if (wire->flags & DP_REPLY)
            wire->channel->cells[DP_DIRECT_LEFT] = 0;
    }
    serve(world);
}

static void poke(struct world *world, struct dp_queue *queue, struct input *input)
{
    uint64_t where = take(input, 3), value = take(input, 2);

    if (where & 0x800000)
        ((uint8_t *)queue->avail)[where % (6 + 2 * queue->size)] = (uint8_t)value;
    else if (where & 0x400000)
        ((uint8_t *)queue->descriptors)[where % (16 * queue->size)] = (uint8_t)value;
    else if (where & 0x200000 && queue->tracked)
        queue->tracked[where % (16 + 16 * queue->size)] = (uint8_t)value;
    else if (where & 0x100000)
        world->channel.staging[where % STAGING_BYTES] = (uint8_t)value;
    else
        world->regions[0].at[where % 0x20000] = (uint8_t)value;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = {data, size};
    struct world world;

    make_world(&world, &input);
    while (input.left) {
        uint64_t op = take(&input, 1);
        struct dp_queue *queue = &world.queues[op >> 4 & 1];

        if (world.turns && (op & 15) >= 6 && (op & 15) <= 12 && (op & 15) != 9 && (op & 15) != 10)
            op = 14;
        switch (op & 15) {
        case 0:
        case 1:
        case 2:
        case 3:
        case 4:
        case 5:
            add_chain(&world, queue, &input);
            break;
        case 6:
            dp_take_hits(queue, world.disk, &world.cache, op >> 5 & 1);
            break;
        case 7:
        case 8:
            commands(&world, queue, &input);
            break;
        case 9:
        case 10:
            reply(&world, &input);
            break;
        case 11:
            answer(&world, &input);
            break;
        case 12:
            dp_publish(queue);
            break;
        case 13:
            poke(&world, queue, &input);
            break;
        case 14:
            if (world.turns) {
                turn(&world, &input);
                break;
            }
            dp_arm(queue);
            dp_disarm(queue);
            break;
        default: /* what the general path does with what was left */
            queue->cells[DP_NEXT_AVAIL] = queue->avail[1];
        }
    }
    end_world(&world);
    return 0;
}

#ifdef OWN_DRIVER
static int run_file(const char *path)
{
    static uint8_t program[1 << 16];
    FILE *file = fopen(path, "rb");
    size_t size;

    if (!file)
        return perror(path), 1;
    size = fread(program, 1, sizeof program, file);
    fclose(file);
    return LLVMFuzzerTestOneInput(program, size);
}

int main(int argc, char **argv)
{
    uint64_t rounds = argc > 1 ? strtoull(argv[1], NULL, 0) : 1000;
    uint64_t state = argc > 2 ? strtoull(argv[2], NULL, 0) : 1;
    static uint8_t program[2048];

    for (int index = 3; index < argc; index++)
        if (run_file(argv[index]))
            return 1;
    while (rounds--) {
        for (size_t at = 0; at < sizeof program; at++) {
            state = state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
            program[at] = (uint8_t)(state >> 56);
        }
        LLVMFuzzerTestOneInput(program, sizeof program);
    }
    if (argc > 3 && !merged_count) { /* by none of the files, either */
        printf("nothing was merged\n");
        return 1;
    }
    printf("no fault found\n");
    return 0;
}
#endif
