/* What compiled turns send: see `turns.c`.
 *
 * What the socket does not take at once stays, and is sent as the socket takes more, while answers
 * are received. Only between two calls of `dp_turns` does the caller have it: then it is what the
 * general path would have left there, and may be sent by that as well. (With several connections it
 * always is: what comes next is for another one.)
 */
#include "turns.h"

#include <endian.h>
#include <errno.h>
#include <string.h>
#include <sys/socket.h>

/* Gather the commands for one system call: headers that follow one another are one piece. */
static void gather(struct dp_turns *turns)
{
    struct dp_output *output = &turns->output;
    struct iovec *pieces = output->pieces;
    uint8_t *header = turns->headers;
    uint32_t count = 0, commands = 0;
    uint64_t cookie;

    for (uint32_t index = 0; index < turns->command_count; index++) {
        struct dp_command *command = &turns->commands[index];

        if (command->header_bytes) {
            memcpy(header, command->header, DP_COMMAND_BYTES);
            memcpy(&cookie, header + 8, 8);
            if (count && !turns->commands[index - 1].payload_bytes)
                pieces[count - 1].iov_len += DP_COMMAND_BYTES;
            else
                pieces[count++] = (struct iovec){header, DP_COMMAND_BYTES};
            header += DP_COMMAND_BYTES;
            output->commands[commands++].sequence = dp_sequence_of(be64toh(cookie));
            output->commands[commands - 1].n_bytes = 0;
        }
        for (uint32_t at = 0; at < command->segment_count; at++) {
            const struct dp_segment *segment = &dp_payload(command)[at];

            pieces[count++] = (struct iovec){
                command->queue->regions[segment->region].at + segment->at, segment->length};
        }
        /* Without a header it is a part of the command before. */
        output->commands[commands - 1].n_bytes +=
            (uint64_t)command->header_bytes + command->payload_bytes;
    }
    output->piece = output->command = 0;
    output->piece_count = count;
    output->command_count = commands;
    output->sent_bytes = 0;
    output->is_callers = false;
}

/* The socket took so much. */
static void advance(struct dp_output *output, uint64_t n_bytes)
{
    uint64_t left = n_bytes;

    output->sent_bytes += n_bytes;
    while (left && output->piece < output->piece_count) {
        struct iovec *piece = &output->pieces[output->piece];
        uint64_t part = left < piece->iov_len ? left : piece->iov_len;

        piece->iov_base = (uint8_t *)piece->iov_base + part;
        piece->iov_len -= part;
        left -= part;
        output->piece += !piece->iov_len;
    }
    while (n_bytes && output->command < output->command_count) {
        struct dp_unsent *command = &output->commands[output->command];
        uint64_t part = n_bytes < command->n_bytes ? n_bytes : command->n_bytes;

        command->n_bytes -= part;
        n_bytes -= part;
        output->command += !command->n_bytes;
    }
}

static int failed(struct dp_turns *turns)
{
    turns->wire->error = errno;
    turns->wire->flags |= DP_FAILED;
    return DP_UNSENT | DP_FAILED;
}

/* Have the epoll tell when the socket takes more, exactly while something is unsent. */
static int watch(struct dp_turns *turns)
{
    bool sending = dp_is_sending(turns);
    struct epoll_event event = {.events = EPOLLIN | (sending ? EPOLLOUT : 0),
                                .data.fd = turns->wire->socket_fd};

    if (sending && turns->wire_count > 1)
        return DP_UNSENT;
    if (sending == turns->output.is_watched)
        return 0;
    if (epoll_ctl(turns->epoll_fd, EPOLL_CTL_MOD, turns->wire->socket_fd, &event) < 0)
        return failed(turns);
    turns->output.is_watched = sending;
    return 0;
}

static int send_pieces(struct dp_turns *turns)
{
    struct dp_output *output = &turns->output;
    struct msghdr message = {.msg_iov = output->pieces + output->piece,
                             .msg_iovlen = output->piece_count - output->piece};
    ssize_t sent = sendmsg(turns->wire->socket_fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);

    if (sent < 0 && errno != EAGAIN && errno != EINTR)
        return failed(turns);
    advance(output, sent < 0 ? 0 : (uint64_t)sent);
    turns->wire->channel->unsent_from =
        dp_is_sending(turns) ? output->commands[output->command].sequence : 0;
    return watch(turns);
}

int dp_send_taken(struct dp_turns *turns)
{
    if (!turns->command_count)
        return 0;
    gather(turns);
    return send_pieces(turns);
}

int dp_send_more(struct dp_turns *turns)
{
    uint64_t before = turns->output.sent_bytes;
    int flags = send_pieces(turns);

    turns->output.late_bytes += turns->output.sent_bytes - before;
    return flags;
}
