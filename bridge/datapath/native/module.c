/* `bridge.datapath._native`: the functions of `usual`, with `core.c` behind them.
 *
 * What Python objects hold (`cells.Queue`, `Channel`, `Resident`) is turned into the structures of
 * the core once, and kept in their attribute `native`: a capsule that also holds the buffers, so
 * that nothing goes away under the core. Whoever replaces one of the arrays or views sets `native`
 * to None again. `native` False: the core cannot take this one, and all of it goes the general way.
 */
#include "module.h"

#include <string.h>

enum { FIXED_BUFFERS = 16 };

const char dp_queue_kind[] = "bridge.Queue";
const char dp_channel_kind[] = "bridge.Channel";
const char dp_resident_kind[] = "bridge.Resident";

static PyObject *name_native, *name_cells, *name_output, *name_views, *name_queues, *name_touched;
static PyObject *pure_publish;

static void drop(struct holder *holder)
{
    for (Py_ssize_t index = 0; index < holder->buffer_count; index++)
        PyBuffer_Release(&holder->buffers[index]);
    Py_XDECREF(holder->open_blocks);
    Py_XDECREF(holder->may_open);
    Py_XDECREF(holder->store);
    PyMem_Free(holder->regions);
    PyMem_Free(holder);
}

static void drop_capsule(PyObject *capsule)
{
    drop(PyCapsule_GetPointer(capsule, PyCapsule_GetName(capsule)));
}

static struct holder *new_holder(Py_ssize_t buffers)
{
    struct holder *holder =
        PyMem_Calloc(1, sizeof *holder + (size_t)buffers * sizeof holder->buffers[0]);

    if (!holder)
        PyErr_NoMemory();
    return holder;
}

/* Hold the buffer of `object`, which must have at least `least` bytes; NULL and an exception (a
 * BufferError if it is too short) otherwise. Steals the reference, which may be NULL. */
static Py_buffer *hold(struct holder *holder, PyObject *object, uint64_t least, int flags)
{
    Py_buffer *view = &holder->buffers[holder->buffer_count];
    int failed;

    if (!object)
        return NULL;
    failed = PyObject_GetBuffer(object, view, flags);
    Py_DECREF(object);
    if (failed)
        return NULL;
    holder->buffer_count++;
    if ((uint64_t)view->len < least) {
        PyErr_SetString(PyExc_BufferError, "too short for what it is");
        return NULL;
    }
    return view;
}

static void *hold_attribute(struct holder *holder, PyObject *object, const char *name,
                            uint64_t least, int flags)
{
    Py_buffer *view = hold(holder, PyObject_GetAttrString(object, name), least, flags);

    return view ? view->buf : NULL;
}

static int number_of(PyObject *object, const char *name, uint64_t *number)
{
    PyObject *value = PyObject_GetAttrString(object, name);

    if (!value)
        return -1;
    *number = PyLong_AsUnsignedLongLong(value);
    Py_DECREF(value);
    return PyErr_Occurred() ? -1 : 0;
}

/* The same buffers that the Python functions use, with the regions that are in `views`. */
static int fill_regions(struct holder *holder, PyObject *regions, PyObject *views)
{
    struct dp_queue *queue = &holder->is.queue;
    Py_ssize_t count = PyList_Size(views);
    Py_buffer table;

    if (count < 0 || PyObject_GetBuffer(regions, &table, PyBUF_SIMPLE) < 0)
        return -1;
    holder->regions = PyMem_Calloc((size_t)count + 1, sizeof holder->regions[0]);
    if (!holder->regions || table.len != 16 * count || count > UINT16_MAX) {
        PyErr_SetString(PyExc_BufferError, "regions and views do not fit together");
        PyBuffer_Release(&table);
        return -1;
    }
    for (Py_ssize_t index = 0; index < count; index++) {
        struct dp_region *region = &holder->regions[index];
        PyObject *item = PyList_GetItem(views, index);
        Py_buffer *view;

        memcpy(&region->guest_address, (char *)table.buf + 16 * index, 8);
        memcpy(&region->size_bytes, (char *)table.buf + 16 * index + 8, 8);
        Py_XINCREF(item);
        view = hold(holder, item, region->size_bytes, PyBUF_WRITABLE);
        if (!view) {
            PyBuffer_Release(&table);
            return -1;
        }
        region->at = view->buf;
    }
    PyBuffer_Release(&table);
    queue->regions = holder->regions;
    queue->region_count = (uint32_t)count;
    return 0;
}

static int fill_queue(struct holder *holder, PyObject *object, PyObject *views)
{
    struct dp_queue *queue = &holder->is.queue;
    PyObject *regions;
    Py_buffer *tracked;
    uint64_t size;
    int failed;

    queue->cells =
        hold_attribute(holder, object, "cells", 8 * DP_QUEUE_CELLS, PyBUF_WRITABLE);
    if (!queue->cells)
        return -1;
    size = queue->cells[DP_SIZE];
    if (!size || size > 1 << 15) {
        PyErr_SetString(PyExc_BufferError, "no ring is so long");
        return -1;
    }
    queue->size = (uint32_t)size;
    queue->descriptors = hold_attribute(holder, object, "descriptors", 16 * size, PyBUF_SIMPLE);
    if (!queue->descriptors)
        return -1;
    queue->avail = hold_attribute(holder, object, "avail", 6 + 2 * size, PyBUF_SIMPLE);
    if (!queue->avail)
        return -1;
    queue->used = hold_attribute(holder, object, "used", 6 + 8 * size, PyBUF_WRITABLE);
    if (!queue->used)
        return -1;
    queue->rows = hold_attribute(holder, object, "rows", sizeof(struct dp_row) * size,
                                 PyBUF_WRITABLE);
    if (!queue->rows)
        return -1;
    queue->cookies = hold_attribute(holder, object, "cookies", 8 * size, PyBUF_WRITABLE);
    if (!queue->cookies)
        return -1;
    queue->segments =
        hold_attribute(holder, object, "segments",
                       sizeof(struct dp_segment) * DP_MAX_SEGMENTS * size, PyBUF_WRITABLE);
    if (!queue->segments)
        return -1;
    queue->pushed = hold_attribute(holder, object, "pushed", 2 * size, PyBUF_WRITABLE);
    if (!queue->pushed)
        return -1;
    tracked = hold(holder, PyObject_GetAttrString(object, "tracked"), 0, PyBUF_SIMPLE);
    if (!tracked)
        return -1;
    if (tracked->len) {
        if ((uint64_t)tracked->len < 16 + 16 * size || tracked->readonly) {
            PyErr_SetString(PyExc_BufferError, "an in-flight region that is too short");
            return -1;
        }
        queue->tracked = tracked->buf;
    }
    regions = PyObject_GetAttrString(object, "regions");
    if (!regions)
        return -1;
    failed = fill_regions(holder, regions, views);
    Py_DECREF(regions);
    if (failed)
        return -1;
    if (!dp_queue_is_sound(queue)) {
        PyErr_SetString(PyExc_BufferError, "a ring that is not aligned");
        return -1;
    }
    return 0;
}

struct holder *dp_make_queue(PyObject *object)
{
    PyObject *views = PyObject_GetAttr(object, name_views);
    Py_ssize_t count = views ? PyList_Size(views) : -1;
    struct holder *holder = count < 0 ? NULL : new_holder(FIXED_BUFFERS + count);

    if (holder && fill_queue(holder, object, views) < 0) {
        drop(holder);
        holder = NULL;
    }
    Py_XDECREF(views);
    return holder;
}

/* `Channel.spans`: none, if this channel is alone. */
static int hold_spans(struct holder *holder, PyObject *object, struct dp_channel *channel)
{
    PyObject *spans = PyObject_GetAttrString(object, "spans");
    Py_buffer *view;

    if (!spans || spans == Py_None) {
        Py_XDECREF(spans);
        return spans ? 0 : -1;
    }
    view = hold(holder, spans, 8 * DP_SPANS_CELLS, PyBUF_WRITABLE);
    channel->spans = view ? view->buf : NULL;
    return view ? 0 : -1;
}

struct holder *dp_make_channel(PyObject *object)
{
    struct holder *holder = new_holder(FIXED_BUFFERS);
    struct dp_channel *channel;
    Py_buffer *staging;
    uint64_t number, structured;

    if (!holder)
        return NULL;
    channel = &holder->is.channel;
    channel->cells =
        hold_attribute(holder, object, "cells", 8 * DP_CHANNEL_CELLS, PyBUF_WRITABLE);
    staging = channel->cells
                  ? hold(holder, PyObject_GetAttrString(object, "staging"), 16, PyBUF_WRITABLE)
                  : NULL;
    if (!staging || number_of(object, "number", &number) < 0 ||
        number_of(object, "structured", &structured) < 0) {
        drop(holder);
        return NULL;
    }
    channel->staging = staging->buf;
    channel->staging_bytes = (uint64_t)staging->len;
    channel->number = (uint32_t)number;
    channel->structured = structured != 0;
    if (hold_spans(holder, object, channel) < 0) {
        drop(holder);
        return NULL;
    }
    return holder;
}

/* See dp_resident.open_blocks. An exception ends the batch and is raised after it. (The next ring
 * of a turn asks here all the same: nothing is called while there is an exception.) */
static int open_blocks(void *owner, uint32_t slot, uint32_t bits)
{
    struct holder *holder = owner;
    PyObject *result =
        PyErr_Occurred() ? NULL : PyObject_CallFunction(holder->open_blocks, "II", slot, bits);
    int opened = result ? PyObject_IsTrue(result) : -1;

    Py_XDECREF(result);
    return opened;
}

/* See dp_resident.may_open. */
static int may_open(void *owner)
{
    struct holder *holder = owner;
    PyObject *result = PyErr_Occurred() ? NULL : PyObject_CallNoArgs(holder->may_open);
    int may = result ? PyObject_IsTrue(result) : -1;

    Py_XDECREF(result);
    return may;
}

/* See dp_resident.store. The views are of memory that is held by the queue, for this call only. */
static int store(void *owner, uint64_t offset, uint64_t length, const struct iovec *data,
                 uint32_t count)
{
    struct holder *holder = owner;
    PyObject *views = PyErr_Occurred() ? NULL : PyList_New(0), *result = NULL;
    int failed = views ? 0 : -1, stored;

    for (uint32_t index = 0; !failed && index < count; index++)
        failed = dp_append(views, PyMemoryView_FromMemory(data[index].iov_base,
                                                          (Py_ssize_t)data[index].iov_len,
                                                          PyBUF_READ));
    if (!failed)
        result = PyObject_CallFunction(holder->store, "KKO", (unsigned long long)offset,
                                       (unsigned long long)length, views);
    stored = result ? PyObject_IsTrue(result) : -1;
    Py_XDECREF(result);
    Py_XDECREF(views);
    return stored;
}

/* What is changed where clean blocks become dirty. */
static int hold_states(struct holder *holder, PyObject *object, struct dp_resident *cache)
{
    Py_buffer *view;

    cache->state = hold_attribute(holder, object, "state", 8 * cache->slots, PyBUF_WRITABLE);
    if (!cache->state)
        return -1;
    cache->sent = hold_attribute(holder, object, "sent", 2 * cache->slots, PyBUF_WRITABLE);
    if (!cache->sent)
        return -1;
    cache->covered = hold_attribute(holder, object, "covered", 2 * cache->slots, PyBUF_WRITABLE);
    if (!cache->covered)
        return -1;
    cache->queued = hold_attribute(holder, object, "queued", cache->slots, PyBUF_WRITABLE);
    if (!cache->queued)
        return -1;
    cache->cells =
        hold_attribute(holder, object, "cells", 8 * DP_RESIDENT_CELLS, PyBUF_WRITABLE);
    if (!cache->cells)
        return -1;
    view = hold(holder, PyObject_GetAttrString(object, "ring"), 4, PyBUF_WRITABLE);
    if (!view)
        return -1;
    cache->ring = view->buf;
    cache->ring_slots = (uint64_t)view->len / 4;
    if ((uintptr_t)cache->state & 7) {
        PyErr_SetString(PyExc_BufferError, "states that are not aligned");
        return -1;
    }
    return 0;
}

static int fill_resident(struct holder *holder, PyObject *object)
{
    struct dp_resident *cache = &holder->is.resident;
    uint64_t granule_shift, block_shift, bucket_mask;
    Py_buffer *view;

    if (number_of(object, "granule_shift", &granule_shift) < 0 ||
        number_of(object, "block_shift", &block_shift) < 0 ||
        number_of(object, "bucket_mask", &bucket_mask) < 0)
        return -1;
    if (granule_shift > 30 || block_shift > granule_shift || granule_shift - block_shift > 4 ||
        bucket_mask > UINT32_MAX || bucket_mask & (bucket_mask + 1)) {
        PyErr_SetString(PyExc_BufferError, "a cache of another kind");
        return -1;
    }
    cache->granule_shift = (unsigned)granule_shift;
    cache->block_shift = (unsigned)block_shift;
    cache->bucket_mask = bucket_mask;
    cache->head = hold_attribute(holder, object, "head", 4 * (bucket_mask + 1), PyBUF_SIMPLE);
    if (!cache->head)
        return -1;
    view = hold(holder, PyObject_GetAttrString(object, "granule_of"), 4, PyBUF_SIMPLE);
    if (!view)
        return -1;
    cache->granule_of = view->buf;
    cache->slots = (uint64_t)view->len / 4;
    cache->ready = hold_attribute(holder, object, "ready", 2 * cache->slots, PyBUF_SIMPLE);
    if (!cache->ready)
        return -1;
    cache->open = hold_attribute(holder, object, "open", 2 * cache->slots, PyBUF_WRITABLE);
    if (!cache->open)
        return -1;
    cache->touched = hold_attribute(holder, object, "touched", cache->slots, PyBUF_WRITABLE);
    if (!cache->touched)
        return -1;
    view = hold(holder, PyObject_GetAttrString(object, "data"), 0, PyBUF_WRITABLE);
    if (!view)
        return -1;
    cache->data = view->buf;
    cache->data_bytes = (uint64_t)view->len;
    view = hold(holder, PyObject_GetAttrString(object, "up"), 1, PyBUF_SIMPLE);
    if (!view)
        return -1;
    cache->up = view->buf;
    cache->up_bytes = (uint32_t)view->len;
    if (hold_states(holder, object, cache) < 0)
        return -1;
    holder->open_blocks = PyObject_GetAttrString(object, "open_blocks");
    holder->may_open = holder->open_blocks ? PyObject_GetAttrString(object, "may_open") : NULL;
    holder->store = holder->may_open ? PyObject_GetAttrString(object, "store") : NULL;
    cache->open_blocks = open_blocks;
    cache->may_open = may_open;
    cache->store = store;
    cache->owner = holder;
    return holder->store ? 0 : -1;
}

struct holder *dp_make_resident(PyObject *object)
{
    struct holder *holder = new_holder(FIXED_BUFFERS);

    if (holder && fill_resident(holder, object) < 0) {
        drop(holder);
        holder = NULL;
    }
    return holder;
}

/* What is behind `object.native`, made now if it is None. NULL with an exception, or without one:
 * the core cannot take it. `*keeps` is a reference to be given back. */
struct holder *dp_native_of(PyObject *object, const char *kind,
                            struct holder *(*make)(PyObject *), PyObject **keeps)
{
    PyObject *native = PyObject_GetAttr(object, name_native);
    struct holder *holder = NULL;

    *keeps = native;
    if (!native || native == Py_False)
        return NULL;
    if (native != Py_None)
        return PyCapsule_GetPointer(native, kind);
    Py_DECREF(native);
    *keeps = NULL;
    holder = make(object);
    if (holder) {
        native = PyCapsule_New(holder, kind, drop_capsule);
        if (!native)
            drop(holder);
    } else if (PyErr_ExceptionMatches(PyExc_BufferError)) {
        PyErr_Clear();
        native = Py_False;
        Py_INCREF(native);
    } else {
        native = NULL;
    }
    if (!native)
        return NULL;
    *keeps = native;
    return PyObject_SetAttr(object, name_native, native) < 0 ? NULL : holder;
}

/* A buffer for the length of one call. */
int dp_borrow(PyObject *object, Py_buffer *view, Py_ssize_t least)
{
    if (PyObject_GetBuffer(object, view, PyBUF_WRITABLE) < 0)
        return -1;
    if (view->len < least) {
        PyBuffer_Release(view);
        PyErr_SetString(PyExc_BufferError, "too few cells");
        return -1;
    }
    return 0;
}

int dp_borrow_cells(PyObject *object, Py_buffer *view, Py_ssize_t least)
{
    PyObject *cells = PyObject_GetAttr(object, name_cells);
    int failed = cells ? dp_borrow(cells, view, least) : -1;

    Py_XDECREF(cells);
    return failed;
}

int dp_check_count(Py_ssize_t given, Py_ssize_t wanted)
{
    if (given == wanted)
        return 0;
    PyErr_Format(PyExc_TypeError, "%zd arguments wanted, not %zd", wanted, given);
    return -1;
}

/* Everything of this queue goes the general way. */
static PyObject *stopped(PyObject *queue)
{
    Py_buffer cells;

    if (PyErr_Occurred() || dp_borrow_cells(queue, &cells, 8 * DP_QUEUE_CELLS) < 0)
        return NULL;
    ((uint64_t *)cells.buf)[DP_STOPPED] = DP_STOP_RING;
    PyBuffer_Release(&cells);
    return Py_BuildValue("ii", 0, 0);
}

static PyObject *take_hits(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    PyObject *keeps_queue = NULL, *keeps_cache = NULL, *result = NULL;
    struct holder *queue, *cache = NULL;
    struct dp_taken taken;
    Py_buffer disk;

    (void)module;
    if (dp_check_count(count, 3) < 0)
        return NULL;
    queue = dp_native_of(args[0], dp_queue_kind, dp_make_queue, &keeps_queue);
    if (queue)
        cache = dp_native_of(args[2], dp_resident_kind, dp_make_resident, &keeps_cache);
    if (!queue || !cache) {
        result = stopped(args[0]);
    } else if (dp_borrow(args[1], &disk, 8 * DP_DISK_CELLS) == 0) {
        dp_ask_again(&cache->is.resident);
        taken = dp_take_hits(&queue->is.queue, disk.buf, &cache->is.resident, true);
        PyBuffer_Release(&disk);
        if (!PyErr_Occurred())
            result = Py_BuildValue("II", taken.reads, taken.writes);
    }
    Py_XDECREF(keeps_queue);
    Py_XDECREF(keeps_cache);
    return result;
}

/* Add `object`, a new reference or NULL, to `list`. */
int dp_append(PyObject *list, PyObject *object)
{
    int failed = object ? PyList_Append(list, object) : -1;

    Py_XDECREF(object);
    return failed;
}

/* A segment without its first bytes, as a part of one of `views`. */
static PyObject *slice_of(PyObject *views, const struct dp_segment *segment, uint64_t skip)
{
    PyObject *view = PyList_GetItem(views, segment->region);
    PyObject *from = PyLong_FromUnsignedLongLong(segment->at + skip);
    PyObject *to = PyLong_FromUnsignedLongLong(segment->at + segment->length);
    PyObject *slice = from && to ? PySlice_New(from, to, NULL) : NULL;
    PyObject *result = view && slice ? PyObject_GetItem(view, slice) : NULL;

    Py_XDECREF(from);
    Py_XDECREF(to);
    Py_XDECREF(slice);
    return result;
}

int dp_append_payload(PyObject *list, PyObject *views, const struct dp_command *command,
                      uint64_t skip)
{
    for (uint32_t index = 0; index < command->segment_count; index++) {
        const struct dp_segment *segment = &dp_payload(command)[index];

        if (skip >= segment->length) {
            skip -= segment->length;
            continue;
        }
        if (dp_append(list, slice_of(views, segment, skip)) < 0)
            return -1;
        skip = 0;
    }
    return 0;
}

static int put_out(PyObject *queue, PyObject *channel, const struct dp_command *commands,
                   struct dp_taken taken)
{
    PyObject *output = PyObject_GetAttr(channel, name_output);
    PyObject *views = PyObject_GetAttr(queue, name_views);
    PyObject *held = PyObject_GetAttrString(channel, "held");
    uint32_t count = taken.reads + taken.writes + taken.flushes;
    int failed = output && views && held ? 0 : -1;

    for (uint32_t index = 0; !failed && index < count; index++) {
        const struct dp_command *command = &commands[index];

        if (command->header_bytes)
            failed = dp_append(dp_is_flush(command) ? held : output,
                               PyBytes_FromStringAndSize((const char *)command->header,
                                                         DP_COMMAND_BYTES));
        if (!failed)
            failed = dp_append_payload(output, views, command, 0);
    }
    if (!failed && taken.writes)
        failed = PyObject_SetAttrString(channel, "has_payload", Py_True);
    Py_XDECREF(output);
    Py_XDECREF(views);
    Py_XDECREF(held);
    return failed;
}

static PyObject *take_commands(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    static struct dp_command commands[DP_MAX_HEADS]; /* under the interpreter's lock */
    PyObject *keeps_queue = NULL, *keeps_channel = NULL, *result = NULL;
    struct holder *queue, *channel = NULL;
    struct dp_taken taken;
    Py_buffer disk, route, rows;

    (void)module;
    if (dp_check_count(count, 5) < 0)
        return NULL;
    queue = dp_native_of(args[0], dp_queue_kind, dp_make_queue, &keeps_queue);
    if (queue)
        channel = dp_native_of(args[3], dp_channel_kind, dp_make_channel, &keeps_channel);
    if (!queue || !channel) {
        result = stopped(args[0]);
    } else if (dp_borrow(args[1], &disk, 8 * DP_DISK_CELLS) == 0) {
        if (dp_borrow_cells(args[2], &route, 8 * DP_ROUTE_CELLS) == 0) {
            if (dp_borrow_cells(args[4], &rows, 8 * DP_ROWS_CELLS) == 0) {
                taken = dp_take_commands(&queue->is.queue, disk.buf, route.buf,
                                         &channel->is.channel, rows.buf, true, false, commands,
                                         DP_MAX_HEADS, DP_BATCH_PIECES);
                if (taken.is_full)
                    queue->is.queue.cells[DP_STOPPED] = DP_STOP_ROOM;
                PyBuffer_Release(&rows);
                if (put_out(args[0], args[3], commands, taken) == 0)
                    result = Py_BuildValue("II", taken.reads, taken.writes);
            }
            PyBuffer_Release(&route);
        }
        PyBuffer_Release(&disk);
    }
    Py_XDECREF(keeps_queue);
    Py_XDECREF(keeps_channel);
    return result;
}

/* The table of queues while replies are taken; each native is held. */
struct table {
    PyObject *queues; /* Rows.queues */
    PyObject *keeps[DP_MAX_QUEUES];
};

static struct dp_queue *queue_of(void *owner, unsigned number)
{
    struct table *table = owner;
    PyObject *queue = PyList_GetItem(table->queues, (Py_ssize_t)number);
    struct holder *holder;
    PyObject *keeps;

    if (!queue || queue == Py_None)
        return NULL;
    holder = dp_native_of(queue, dp_queue_kind, dp_make_queue, &keeps);
    Py_XDECREF(table->keeps[number]);
    table->keeps[number] = keeps;
    return holder ? &holder->is.queue : NULL;
}

static int note_touched(PyObject *rows, PyObject *queues, const struct dp_answered *answered)
{
    PyObject *touched = PyObject_GetAttr(rows, name_touched);
    int failed = touched ? 0 : -1;

    for (uint32_t index = 0; !failed && index < answered->touched_count; index++) {
        PyObject *queue = PyList_GetItem(queues, answered->touched[index]);

        failed = queue ? PyList_Append(touched, queue) : -1;
    }
    Py_XDECREF(touched);
    return failed;
}

static PyObject *answers(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    struct table table = {0};
    struct dp_answered answered;
    PyObject *keeps = NULL, *result = NULL;
    struct holder *channel;
    unsigned long long start, end;
    int failed;

    (void)module;
    if (dp_check_count(count, 4) < 0)
        return NULL;
    start = PyLong_AsUnsignedLongLong(args[2]);
    end = PyErr_Occurred() ? 0 : PyLong_AsUnsignedLongLong(args[3]);
    if (PyErr_Occurred())
        return NULL;
    channel = dp_native_of(args[0], dp_channel_kind, dp_make_channel, &keeps);
    table.queues = PyErr_Occurred() ? NULL : PyObject_GetAttr(args[1], name_queues);
    if (table.queues && channel) {
        PyObject *type, *value, *traceback;

        dp_answers(&channel->is.channel, queue_of, &table, false, start, end, &answered);
        /* Also if a queue could not be had: what was pushed before is to be published. */
        PyErr_Fetch(&type, &value, &traceback);
        failed = note_touched(args[1], table.queues, &answered);
        if (type)
            PyErr_Restore(type, value, traceback);
        else if (!failed)
            result = Py_BuildValue("KO", (unsigned long long)answered.start,
                                   answered.waits ? Py_True : Py_False);
    } else if (table.queues) {
        result = Py_BuildValue("KO", start, Py_False);
    }
    for (unsigned number = 0; number < DP_MAX_QUEUES; number++)
        Py_XDECREF(table.keeps[number]);
    Py_XDECREF(table.queues);
    Py_XDECREF(keeps);
    return result;
}

static PyObject *publish(PyObject *module, PyObject *queue)
{
    PyObject *keeps = NULL, *result = NULL;
    struct holder *holder = dp_native_of(queue, dp_queue_kind, dp_make_queue, &keeps);

    (void)module;
    if (holder)
        result = PyBool_FromLong(dp_publish(&holder->is.queue));
    else if (!PyErr_Occurred())
        result = PyObject_CallFunctionObjArgs(pure_publish, queue, NULL);
    Py_XDECREF(keeps);
    return result;
}

#ifdef DP_TEST_STORES
static PyObject *on_stored;

void dp_stored(void)
{
    PyObject *result = on_stored ? PyObject_CallNoArgs(on_stored) : NULL;

    Py_XDECREF(result);
}

/* Call `callback` after every store that outlives the process. */
static PyObject *on_store(PyObject *module, PyObject *callback)
{
    (void)module;
    Py_XDECREF(on_stored);
    on_stored = Py_NewRef(callback);
    return Py_NewRef(Py_None);
}
#endif

static PyMethodDef methods[] = {
#ifdef DP_TEST_STORES
    {"on_store", on_store, METH_O, NULL},
#endif
    {"take_hits", (PyCFunction)(void (*)(void))take_hits, METH_FASTCALL, NULL},
    {"take_commands", (PyCFunction)(void (*)(void))take_commands, METH_FASTCALL, NULL},
    {"answers", (PyCFunction)(void (*)(void))answers, METH_FASTCALL, NULL},
    {"publish", publish, METH_O, NULL},
    {"new_turns", dp_new_turns, METH_O, NULL},
    {"turns", (PyCFunction)(void (*)(void))dp_run_turns, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "bridge.datapath._native",
    .m_doc = "The usual case of a turn, compiled: see `usual` and `engine`.",
    .m_size = -1,
    .m_methods = methods,
};

/* Where everything is, so that the Python code can see that it means the same. */
#define PLACE(name)      \
    {                    \
        #name, DP_##name \
    }

static const struct {
    const char *name;
    int at;
} places[] = {
    PLACE(SIZE),           PLACE(NEXT_AVAIL),      PLACE(NEXT_USED),      PLACE(PUBLISHED),
    PLACE(IN_FLIGHT),      PLACE(SIGNAL_ANYWAY),   PLACE(EVENT_IDX),      PLACE(INDIRECT),
    PLACE(NUMBER),         PLACE(NAME),            PLACE(COUNTER),        PLACE(LAST_HEAD),
    PLACE(PUSHED),         PLACE(TOUCHED),         PLACE(STOPPED),        PLACE(QUEUE_CELLS),
    PLACE(CAPACITY_BYTES), PLACE(BLOCK_MASK),      PLACE(MAY_WRITE),      PLACE(DISK_CELLS),
    PLACE(CAN_FLUSH),      PLACE(MAY_FLUSH),       PLACE(NOT_ROWS),       PLACE(ARMED),
    PLACE(SEEN),           PLACE(BEFORE),          PLACE(FLUSH_ROW),      PLACE(FLUSH_COVERS),
    PLACE(FLUSH_SEEN),     PLACE(FLUSH_ARMED),     PLACE(FLUSH_BEGAN_NS), PLACE(FLUSH_TOOK_NS),
    PLACE(FLUSHES),        PLACE(FLUSHED),         PLACE(COVERED),
    PLACE(READ_BYTES),     PLACE(WRITTEN_BYTES),
    PLACE(MAX_READ_BYTES), PLACE(MAX_WRITE_BYTES), PLACE(SIZE_BYTES),     PLACE(ALIGN_MASK),
    PLACE(ROW_SEGMENTS),    PLACE(ROUTE_CELLS),     PLACE(UNFLUSHED),       PLACE(LONG_READS),     PLACE(ROWS),
    PLACE(CHANNEL_CELLS),  PLACE(HEAD_BITS),       PLACE(QUEUE_BITS),     PLACE(MAX_HEADS),
    PLACE(MAX_QUEUES),     PLACE(DIRECT),          PLACE(DIRECT_LEFT),    PLACE(LARGE_BYTES),
    PLACE(LONG_BYTES),     PLACE(WHOLE_READ_BYTES), PLACE(MAX_SEGMENTS),  PLACE(BATCH_PIECES),
    PLACE(SEGMENTS),       PLACE(MAX_ROW_SEGMENTS), PLACE(WHOLE_WRITE_BYTES),
    PLACE(STOP_RING),      PLACE(STOP_FORM),       PLACE(STOP_RANGE),     PLACE(STOP_MISS),
    PLACE(STOP_WRITE),     PLACE(STOP_ROOM),       PLACE(STOP_ROUTE),     PLACE(STOP_FLUSH),
    PLACE(STOPS),          PLACE(SPAN_CELLS),      PLACE(MAX_SPANS),      PLACE(SPANS_CELLS),
    PLACE(SEQUENCE),       PLACE(MERGED),          PLACE(ALONE),          PLACE(ROWS_CELLS),
    PLACE(MERGED_BYTES),   PLACE(DIRTY_SLOTS),     PLACE(DIRTY_BLOCKS),   PLACE(CHANGES),
    PLACE(RING_HEAD),      PLACE(RING_TAIL),       PLACE(RING_GOAL),      PLACE(HARD_SLOTS),
    PLACE(FLUSH_SLOTS),    PLACE(BACKGROUND_SLOTS), PLACE(RESIDENT_CELLS),
};

static int add_places(PyObject *module)
{
    PyObject *dict = PyDict_New();

    for (size_t index = 0; dict && index < sizeof places / sizeof places[0]; index++) {
        PyObject *at = PyLong_FromLong(places[index].at);

        if (!at || PyDict_SetItemString(dict, places[index].name, at) < 0)
            Py_CLEAR(dict);
        Py_XDECREF(at);
    }
    if (dict && PyModule_AddObjectRef(module, "PLACES", dict) < 0)
        Py_CLEAR(dict);
    Py_XDECREF(dict);
    return dict ? 0 : -1;
}

static int intern(PyObject **name, const char *text)
{
    *name = PyUnicode_InternFromString(text);
    return *name ? 0 : -1;
}

PyMODINIT_FUNC PyInit__native(void)
{
    PyObject *usual = PyImport_ImportModule("bridge.datapath.usual");
    PyObject *module = usual ? PyModule_Create(&definition) : NULL;

    pure_publish = usual ? PyObject_GetAttrString(usual, "publish") : NULL;
    Py_XDECREF(usual);
    if (!module || !pure_publish || intern(&name_native, "native") < 0 ||
        intern(&name_cells, "cells") < 0 || intern(&name_output, "output") < 0 ||
        intern(&name_views, "views") < 0 || intern(&name_queues, "queues") < 0 ||
        intern(&name_touched, "touched") < 0 ||
        PyModule_AddIntConstant(module, "ABI", DP_ABI) < 0 || add_places(module) < 0) {
        Py_XDECREF(module);
        return NULL;
    }
    return module;
}
