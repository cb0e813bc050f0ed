/* `_native.new_turns` and `_native.turns`: see `compiled.py`, which is the one caller. */
#include "module.h"
#include "turns.h"

#include <errno.h>
#include <string.h>

enum { RINGS_MAX = 256 };

static const char TURNS[] = "bridge.Turns";

struct state {
    struct dp_turns turns;
    struct dp_ring rings[RINGS_MAX];
    /* While it runs: */
    PyObject *ring_objects;
    PyObject *unsent; /* what the caller has left to be sent, in pieces */
    Py_buffer pieces[DP_PIECES];
    uint32_t piece_count;
    PyObject *wrote; /* to be called before the first write */
    bool runs;
};

/* Everything that one call holds. */
struct held {
    PyObject *keeps[RINGS_MAX + DP_WIRES];
    uint32_t count;
    Py_buffer disk, route, rows;
    bool has_disk, has_route, has_rows;
};

static void drop_turns(PyObject *capsule)
{
    PyMem_Free(PyCapsule_GetPointer(capsule, TURNS));
}

PyObject *dp_new_turns(PyObject *module, PyObject *poll_ns)
{
    uint64_t poll_max_ns = PyLong_AsUnsignedLongLong(poll_ns);
    struct state *state = PyErr_Occurred() ? NULL : PyMem_Calloc(1, sizeof *state);
    PyObject *capsule;

    (void)module;
    if (!state)
        return PyErr_Occurred() ? NULL : PyErr_NoMemory();
    state->turns.poll_ns = poll_max_ns / 4;
    state->turns.long_poll_ns = poll_max_ns;
    state->turns.poll_max_ns = poll_max_ns;
    capsule = PyCapsule_New(state, TURNS, drop_turns);
    if (!capsule)
        PyMem_Free(state);
    return capsule;
}

static int wait_for_events(void *owner, struct epoll_event *events)
{
    struct state *state = owner;
    int count;

    Py_BEGIN_ALLOW_THREADS
    count = epoll_wait(state->turns.epoll_fd, events, DP_EVENTS, 1);
    Py_END_ALLOW_THREADS
    if (count >= 0 || errno == EINTR)
        return count < 0 ? 0 : count;
    PyErr_SetFromErrno(PyExc_OSError);
    return -1;
}

static int call_driver(void *owner, uint32_t ring)
{
    struct state *state = owner;
    /* After a callback that failed nothing is called: see `open_blocks`. */
    PyObject *entry =
        PyErr_Occurred() ? NULL : PyTuple_GetItem(state->ring_objects, (Py_ssize_t)ring);
    PyObject *call = entry ? PyTuple_GetItem(entry, 2) : NULL;
    PyObject *result = call ? PyObject_CallNoArgs(call) : NULL;

    Py_XDECREF(result);
    return result ? 0 : -1;
}

static int begin_to_write(void *owner)
{
    struct state *state = owner;
    PyObject *result = PyErr_Occurred() ? NULL : PyObject_CallNoArgs(state->wrote);

    Py_XDECREF(result);
    return result ? 0 : -1;
}

/* 1: all is held; 0: the core cannot take one of them; -1: an exception. */
static int hold_rings(struct state *state, struct held *held, PyObject *rings)
{
    Py_ssize_t count = PyTuple_Size(rings);

    if (count < 0 || count > RINGS_MAX) {
        if (count >= 0)
            PyErr_SetString(PyExc_ValueError, "too many rings");
        return -1;
    }
    for (Py_ssize_t index = 0; index < count; index++) {
        PyObject *entry = PyTuple_GetItem(rings, index);
        PyObject *queue = entry ? PyTuple_GetItem(entry, 0) : NULL;
        PyObject *kick = queue ? PyTuple_GetItem(entry, 1) : NULL;
        long kick_fd = kick ? PyLong_AsLong(kick) : -1;
        struct holder *holder;
        uint64_t adjacent;

        if (PyErr_Occurred())
            return -1;
        holder = dp_native_of(queue, dp_queue_kind, dp_make_queue, &held->keeps[held->count++]);
        if (!holder)
            return PyErr_Occurred() ? -1 : 0;
        adjacent = state->rings[index].queue == &holder->is.queue ? state->rings[index].adjacent : 0;
        state->rings[index] = (struct dp_ring){&holder->is.queue, (int)kick_fd, 0, adjacent};
    }
    state->turns.rings = state->rings;
    state->turns.ring_count = (uint32_t)count;
    state->ring_objects = rings;
    return count > 0;
}

/* The pieces that are unsent, a list, and which commands they are of: the `commands` that an
 * earlier call had for them. As `hold_rings`. */
static int hold_unsent(struct state *state, PyObject *unsent, PyObject *commands)
{
    struct dp_output *output = &state->turns.output;
    Py_ssize_t count = PyList_Size(unsent), size = 0;
    uint64_t n_bytes = 0;
    char *from;

    if (count < 0 || PyBytes_AsStringAndSize(commands, &from, &size) < 0)
        return -1;
    if (!count != !size)
        return 0; /* They are not of an earlier call. */
    if (count > DP_PIECES || size % (Py_ssize_t)sizeof output->commands[0] ||
        size > (Py_ssize_t)sizeof output->commands)
        return 0;
    memcpy(output->commands, from, (size_t)size);
    output->command_count = (uint32_t)((size_t)size / sizeof output->commands[0]);
    for (uint32_t index = 0; index < output->command_count; index++)
        n_bytes += output->commands[index].n_bytes;
    for (Py_ssize_t index = 0; index < count; index++) {
        Py_buffer *piece = &state->pieces[state->piece_count];

        if (PyObject_GetBuffer(PyList_GetItem(unsent, index), piece, PyBUF_SIMPLE) < 0)
            return -1;
        output->pieces[state->piece_count++] = (struct iovec){piece->buf, (size_t)piece->len};
        n_bytes -= (uint64_t)piece->len;
    }
    output->piece_count = state->piece_count;
    output->is_callers = output->is_watched = count > 0;
    state->unsent = unsent;
    return !n_bytes;
}

static void forget_output(struct dp_output *output)
{
    output->piece = output->piece_count = output->command = output->command_count = 0;
    output->sent_bytes = output->late_bytes = 0;
    output->is_callers = output->is_watched = false;
}

/* Each of `places` is (channel, descriptor, start, end, unsent, commands). As `hold_rings`. */
static int hold_wires(struct state *state, struct held *held, PyObject *places)
{
    struct dp_turns *turns = &state->turns;
    Py_ssize_t count = PyTuple_Size(places);

    if (count < 1 || count > DP_WIRES)
        return count < 0 ? -1 : 0;
    for (Py_ssize_t index = 0; index < count; index++) {
        struct dp_wire *wire = &turns->wires[index];
        unsigned long long start, end;
        struct holder *holder;
        PyObject *channel, *unsent, *commands;
        int fd, ready;

        if (!PyArg_ParseTuple(PyTuple_GetItem(places, index), "OiKKOO", &channel, &fd, &start, &end,
                              &unsent, &commands))
            return -1;
        if (count > 1 && PyList_Size(unsent))
            return 0;
        ready = hold_unsent(state, unsent, commands);
        if (ready <= 0)
            return ready;
        holder =
            dp_native_of(channel, dp_channel_kind, dp_make_channel, &held->keeps[held->count++]);
        if (!holder)
            return PyErr_Occurred() ? -1 : 0;
        *wire = (struct dp_wire){&holder->is.channel, fd, start, end, 0, 0, 0};
        if (start > end || end > wire->channel->staging_bytes)
            return 0;
    }
    turns->wire_count = (uint32_t)count;
    turns->wire = &turns->wires[0];
    return 1;
}

/* `side` is (route, rows, connections), or (resident,). As `hold_rings`. */
static int hold_side(struct state *state, struct held *held, PyObject *side)
{
    struct dp_turns *turns = &state->turns;
    PyObject *route, *rows, *places;
    struct holder *holder;

    turns->wire_count = 0;
    turns->wire = NULL;
    turns->cache = NULL;
    forget_output(&turns->output);
    if (PyTuple_Size(side) == 1) {
        holder = dp_native_of(PyTuple_GetItem(side, 0), dp_resident_kind, dp_make_resident,
                              &held->keeps[held->count++]);
        turns->cache = holder ? &holder->is.resident : NULL;
        return holder ? 1 : PyErr_Occurred() ? -1 : 0;
    }
    if (!PyArg_ParseTuple(side, "OOO!", &route, &rows, &PyTuple_Type, &places))
        return -1;
    if (dp_borrow_cells(route, &held->route, 8 * DP_ROUTE_CELLS) < 0)
        return -1;
    held->has_route = true;
    if (dp_borrow_cells(rows, &held->rows, 8 * DP_ROWS_CELLS) < 0)
        return -1;
    held->has_rows = true;
    turns->route = held->route.buf;
    turns->rows = held->rows.buf;
    return hold_wires(state, held, places);
}

static void let_go(struct state *state, struct held *held)
{
    while (state->piece_count)
        PyBuffer_Release(&state->pieces[--state->piece_count]);
    for (uint32_t index = 0; index < held->count; index++)
        Py_XDECREF(held->keeps[index]);
    if (held->has_disk)
        PyBuffer_Release(&held->disk);
    if (held->has_route)
        PyBuffer_Release(&held->route);
    if (held->has_rows)
        PyBuffer_Release(&held->rows);
}

static PyObject *others_of(const struct dp_turns *turns)
{
    PyObject *list = PyList_New(0);

    for (uint32_t index = 0; list && index < turns->other_count; index++) {
        const struct epoll_event *event = &turns->others[index];

        if (dp_append(list, Py_BuildValue("iI", event->data.fd, event->events)) < 0)
            Py_CLEAR(list);
    }
    return list;
}

/* The views of the ring whose command it is. */
static PyObject *views_of(const struct state *state, const struct dp_command *command)
{
    for (uint32_t index = 0; index < state->turns.ring_count; index++)
        if (state->rings[index].queue == command->queue)
            return PyObject_GetAttrString(
                PyTuple_GetItem(PyTuple_GetItem(state->ring_objects, (Py_ssize_t)index), 0),
                "views");
    PyErr_SetString(PyExc_AssertionError, "a command of no ring");
    return NULL;
}

static int add_unsent(const struct state *state, const struct dp_command *command, uint64_t skip,
                      PyObject *list)
{
    uint64_t header_bytes = command->header_bytes;
    PyObject *views;
    int failed;

    if (skip < header_bytes) {
        if (dp_append(list, PyBytes_FromStringAndSize((const char *)command->header + skip,
                                                      (Py_ssize_t)(header_bytes - skip))) < 0)
            return -1;
        skip = header_bytes;
    }
    if (!command->payload_bytes)
        return 0;
    views = views_of(state, command);
    failed = views ? dp_append_payload(list, views, command, skip - header_bytes) : -1;
    Py_XDECREF(views);
    return failed;
}

/* Add what is left of a piece. */
static int add_rest(PyObject *list, PyObject *piece, uint64_t skip)
{
    PyObject *view = PyMemoryView_FromObject(piece);
    PyObject *from = view ? PyLong_FromUnsignedLongLong(skip) : NULL;
    PyObject *slice = from ? PySlice_New(from, NULL, NULL) : NULL;
    PyObject *rest = slice ? PyObject_GetItem(view, slice) : NULL;

    Py_XDECREF(slice);
    Py_XDECREF(from);
    Py_XDECREF(view);
    return dp_append(list, rest);
}

/* What the socket did not take of what the caller had left. */
static PyObject *rest_of(const struct state *state)
{
    const struct dp_output *output = &state->turns.output;
    PyObject *list = PyList_New(0);

    for (uint32_t index = output->piece; list && index < output->piece_count; index++) {
        PyObject *piece = PyList_GetItem(state->unsent, (Py_ssize_t)index);
        uint64_t sent = (uint64_t)state->pieces[index].len - output->pieces[index].iov_len;

        if ((sent ? add_rest(list, piece, sent) : PyList_Append(list, piece)) < 0)
            Py_CLEAR(list);
    }
    return list;
}

/* What the socket did not take, in pieces. */
static PyObject *pieces_of(const struct state *state)
{
    const struct dp_turns *turns = &state->turns;
    uint64_t skip = turns->output.sent_bytes;
    PyObject *list;

    if (!dp_is_sending(turns))
        return PyList_New(0);
    if (turns->output.is_callers)
        return rest_of(state);
    list = PyList_New(0);
    for (uint32_t index = 0; list && index < turns->command_count; index++) {
        const struct dp_command *command = &turns->commands[index];
        uint64_t bytes = (uint64_t)command->header_bytes + command->payload_bytes;

        if (skip >= bytes) {
            skip -= bytes;
            continue;
        }
        if (add_unsent(state, command, skip, list) < 0)
            Py_CLEAR(list);
        skip = 0;
    }
    return list;
}

/* Which commands that is: for a later call, which may go on with it; empty: it is left. */
static PyObject *commands_of(const struct dp_output *output, int flags)
{
    uint32_t count = flags & DP_UNSENT ? 0 : output->command_count - output->command;

    return PyBytes_FromStringAndSize((const char *)(output->commands + output->command),
                                     (Py_ssize_t)(count * sizeof output->commands[0]));
}

static PyObject *taken_of(const struct dp_turns *turns)
{
    PyObject *tuple = PyTuple_New((Py_ssize_t)turns->ring_count);

    for (uint32_t index = 0; tuple && index < turns->ring_count; index++) {
        PyObject *taken = PyLong_FromUnsignedLong(turns->rings[index].taken);

        if (!taken || PyTuple_SetItem(tuple, (Py_ssize_t)index, taken) < 0)
            Py_CLEAR(tuple);
    }
    return tuple;
}

/* How long the flushes took. */
static PyObject *times_of(const struct dp_turns *turns)
{
    PyObject *tuple = PyTuple_New((Py_ssize_t)turns->flushed);

    for (uint32_t index = 0; tuple && index < turns->flushed; index++) {
        PyObject *took = PyLong_FromUnsignedLongLong(turns->flush_ns[index]);

        if (!took || PyTuple_SetItem(tuple, (Py_ssize_t)index, took) < 0)
            Py_CLEAR(tuple);
    }
    return tuple;
}

/* See `cells.Unsent`. */
static PyObject *unsent_of(const struct state *state, const struct dp_wire *wire, int flags)
{
    const struct dp_output *output = &state->turns.output;
    PyObject *pieces, *commands;

    if (wire != state->turns.wire)
        return Py_BuildValue("[]yK", "", 0ULL);
    pieces = pieces_of(state);
    commands = pieces ? commands_of(output, flags) : NULL;
    if (!commands) {
        Py_XDECREF(pieces);
        return NULL;
    }
    return Py_BuildValue("NNK", pieces, commands, (unsigned long long)output->late_bytes);
}

/* What is left of the connections: see `compiled.py`. */
static PyObject *places_of(const struct state *state, int flags)
{
    const struct dp_turns *turns = &state->turns;
    PyObject *tuple = PyTuple_New((Py_ssize_t)turns->wire_count);

    for (uint32_t index = 0; tuple && index < turns->wire_count; index++) {
        const struct dp_wire *wire = &turns->wires[index];
        PyObject *unsent = unsent_of(state, wire, flags), *place = NULL;

        if (unsent)
            place = Py_BuildValue("KKKiiN", (unsigned long long)wire->start,
                                  (unsigned long long)wire->end,
                                  (unsigned long long)wire->received_bytes, wire->flags, wire->error,
                                  unsent);
        if (!place || PyTuple_SetItem(tuple, (Py_ssize_t)index, place) < 0)
            Py_CLEAR(tuple);
    }
    return tuple;
}

static PyObject *result_of(const struct state *state, int flags)
{
    const struct dp_turns *turns = &state->turns;
    PyObject *others = NULL, *places = NULL, *taken = taken_of(turns), *result = NULL;
    PyObject *times = times_of(turns);

    if (taken && times && (others = others_of(turns)) && (places = places_of(state, flags)))
        result = Py_BuildValue("iOIIIOOiKiIOii", flags, taken, turns->reads, turns->writes,
                               turns->naps, others, places, (int)turns->looked,
                               (unsigned long long)turns->shown, (int)turns->worked,
                               turns->flushes, times, (int)turns->durable,
                               (int)turns->flush_is_new);
    Py_XDECREF(times);
    Py_XDECREF(taken);
    Py_XDECREF(others);
    Py_XDECREF(places);
    return result;
}

static PyObject *run(struct state *state, PyObject *const *args, struct held *held)
{
    struct dp_turns *turns = &state->turns;
    int ready, flags;

    turns->epoll_fd = (int)PyLong_AsLong(args[1]);
    turns->may_write = Py_IsNone(args[4]);
    state->wrote = args[4];
    turns->until_ns = PyLong_AsUnsignedLongLong(args[6]);
    turns->worked = PyObject_IsTrue(args[7]) > 0;
    turns->is_crowded = PyObject_IsTrue(args[8]) > 0;
    if (PyErr_Occurred() || dp_borrow(args[3], &held->disk, 8 * DP_DISK_CELLS) < 0)
        return NULL;
    held->has_disk = true;
    turns->disk = held->disk.buf;
    ready = hold_rings(state, held, args[2]);
    ready = ready > 0 ? hold_side(state, held, args[5]) : ready;
    if (ready <= 0)
        return ready < 0 ? NULL : Py_NewRef(Py_None);
    turns->wait = wait_for_events;
    turns->call = call_driver;
    turns->begin_to_write = begin_to_write;
    turns->owner = state;
    flags = dp_turns(turns);
    return PyErr_Occurred() ? NULL : result_of(state, flags);
}

/* turns(state, epoll_fd, rings, disk, wrote, side, until_ns, worked, crowded) */
PyObject *dp_run_turns(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    struct held held = {0};
    struct state *state;
    PyObject *result;

    (void)module;
    if (dp_check_count(count, 9) < 0)
        return NULL;
    state = PyCapsule_GetPointer(args[0], TURNS);
    if (!state)
        return NULL;
    if (state->runs) {
        PyErr_SetString(PyExc_RuntimeError, "turns within turns");
        return NULL;
    }
    state->runs = true;
    result = run(state, args, &held);
    state->runs = false;
    state->ring_objects = state->unsent = state->wrote = NULL;
    let_go(state, &held);
    return result;
}
