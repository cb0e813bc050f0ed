/* What the two parts of the module share: see `module.c` and `turns_module.c`. */
#ifndef NBD_BRIDGE_MODULE_H
#define NBD_BRIDGE_MODULE_H

#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include "core.h"

/* A structure of the core, with the buffers that it points into. */
struct holder {
    union {
        struct dp_queue queue;
        struct dp_channel channel;
        struct dp_resident resident;
    } is;
    struct dp_region *regions;
    PyObject *open_blocks, *may_open, *store; /* of a Resident */
    Py_ssize_t buffer_count;
    Py_buffer buffers[]; /* those that are held */
};

extern const char dp_queue_kind[], dp_channel_kind[], dp_resident_kind[];

struct holder *dp_make_queue(PyObject *object);
struct holder *dp_make_channel(PyObject *object);
struct holder *dp_make_resident(PyObject *object);

/* What is behind `object.native`, made now if it is None. NULL with an exception, or without one:
 * the core cannot take it. `*keeps` is a reference to be given back. */
struct holder *dp_native_of(PyObject *object, const char *kind,
                            struct holder *(*make)(PyObject *), PyObject **keeps);

/* A writable buffer of at least so many bytes, of `object` or of its `cells`, for the length of one
 * call; -1: an exception. */
int dp_borrow(PyObject *object, Py_buffer *view, Py_ssize_t least);
int dp_borrow_cells(PyObject *object, Py_buffer *view, Py_ssize_t least);

int dp_check_count(Py_ssize_t given, Py_ssize_t wanted);

/* Add `object`, a new reference or NULL, to `list`. */
int dp_append(PyObject *list, PyObject *object);

/* Add the payload of `command` without its first bytes to `list`, as parts of `views`. */
int dp_append_payload(PyObject *list, PyObject *views, const struct dp_command *command,
                      uint64_t skip);

PyObject *dp_new_turns(PyObject *module, PyObject *poll_ns);
PyObject *dp_run_turns(PyObject *module, PyObject *const *args, Py_ssize_t count);

#endif
