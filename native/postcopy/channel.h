/* One connection of a migration: whole frames over a stream socket, with a deadline on every wait.
 *
 * One thread reads; several may send. After an error the stream is out of step and nobody reads on; the
 * error leaves a sentence in `error`. idle_ms starts anew with every byte that moves, deadline_ns does not
 * (a peer that drips a byte now and then ends the handshake all the same). */
#ifndef UMM_POSTCOPY_CHANNEL_H
#define UMM_POSTCOPY_CHANNEL_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

#include "postcopy/protocol.h"

struct umm_channel {
	int fd;     /* non-blocking; owned */
	int stopfd; /* eventfd of the owner: readable when all waits are to end; not owned */
	unsigned idle_ms;
	uint64_t deadline_ns; /* on the monotonic clock; 0: none */
	pthread_mutex_t send_lock;
	struct umm_protocol protocol;
	uint8_t *in; /* read ahead */
	uint32_t in_start, in_end;
	_Atomic uint64_t bytes_in, bytes_out;
	_Atomic int error_state;
	char error[256]; /* what went wrong, for people; see umm_channel_error */
};

/* Takes `fd` over (also when it fails). -ENOMEM, -errno of fcntl(2). */
int umm_channel_init(struct umm_channel *channel, int fd, int stopfd, unsigned idle_ms);
void umm_channel_deinit(struct umm_channel *channel);
/* Remembers the first error in words and returns `error`. */
int umm_channel_fail(struct umm_channel *channel, int error, const char *format, ...)
        __attribute__((format(printf, 3, 4)));

/* The first error in words, "" when there was none. */
const char *umm_channel_error(const struct umm_channel *channel);

/* Send a frame whose payload is in at most two pieces; fills length and payload_check of `frame`. */
int umm_channel_send(struct umm_channel *channel, struct umm_frame *frame, const void *payload, uint32_t len,
        const void *more, uint32_t more_len);
/* Bytes that are frames already. */
int umm_channel_send_raw(struct umm_channel *channel, const void *bytes, uint64_t len);
/* Tell the peer why; the outcome does not matter. */
void umm_channel_send_error(struct umm_channel *channel, int error, const char *text);

/* Wait for a frame's header; it may come now, and its length is checked. An ERROR of the peer is read and
 * returned as -EREMOTEIO. -ETIMEDOUT, -ECONNRESET (also: end of stream), -ECANCELED (stopped), -EPROTO... */
int umm_channel_receive(struct umm_channel *channel, struct umm_frame *ret);
/* Read payload bytes, all of them; check them against payload_check. */
int umm_channel_read(struct umm_channel *channel, void *to, uint64_t len);
int umm_channel_read_checked(struct umm_channel *channel, const struct umm_frame *frame, void *to);
/* 1 when bytes are there, 0 after `timeout_ms` without any, -errno. wakefd (or -1) ends the wait with 0. */
int umm_channel_wait(struct umm_channel *channel, int timeout_ms, int wakefd);

#endif
