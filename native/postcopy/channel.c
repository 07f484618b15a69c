#include "postcopy/channel.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "common/clock.h"

enum { READ_AHEAD = 128 << 10 };
enum { ERROR_NONE, ERROR_BEING_WRITTEN, ERROR_SET };

int umm_channel_init(struct umm_channel *channel, int fd, int stopfd, unsigned idle_ms)
{
	*channel = (struct umm_channel){.fd = fd, .stopfd = stopfd, .idle_ms = idle_ms};
	pthread_mutex_init(&channel->send_lock, NULL);
	int flags = fcntl(fd, F_GETFL);
	if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0) {
		int error = -errno;
		umm_channel_deinit(channel);
		return error;
	}
	/* A request is 32 bytes: it must not wait for more. Fails on Unix sockets, which do not wait anyway.
	 */
	int one = 1;
	(void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	channel->in = malloc(READ_AHEAD);
	if (!channel->in) {
		umm_channel_deinit(channel);
		return -ENOMEM;
	}
	return 0;
}

void umm_channel_deinit(struct umm_channel *channel)
{
	pthread_mutex_destroy(&channel->send_lock);
	free(channel->in);
	channel->in = NULL;
	if (channel->fd >= 0)
		close(channel->fd);
	channel->fd = -1;
}

int umm_channel_fail(struct umm_channel *channel, int error, const char *format, ...)
{
	int none = ERROR_NONE, set = ERROR_SET;
	/* The first one counts, but the peer's own words explain more than a broken pipe. */
	if (atomic_compare_exchange_strong(&channel->error_state, &none, ERROR_BEING_WRITTEN) ||
	        (error == -EREMOTEIO &&
	                atomic_compare_exchange_strong(&channel->error_state, &set, ERROR_BEING_WRITTEN))) {
		va_list args;
		va_start(args, format);
		vsnprintf(channel->error, sizeof channel->error, format, args);
		va_end(args);
		atomic_store(&channel->error_state, ERROR_SET);
	}
	return error;
}

const char *umm_channel_error(const struct umm_channel *channel)
{
	return atomic_load(&channel->error_state) == ERROR_SET ? channel->error : "";
}

static const char *peer(const struct umm_channel *channel)
{
	return channel->protocol.side == UMM_SIDE_SOURCE ? "the destination" : "the source";
}

static const char *phase(const struct umm_channel *channel)
{
	return umm_phase_name(channel->protocol.phase);
}

static int lost(struct umm_channel *channel, int error)
{
	return umm_channel_fail(channel, -ECONNRESET, "%s closed the %s connection in phase %s%s%s",
	        peer(channel), channel->protocol.connection == UMM_CONNECTION_URGENT ? "urgent" : "data",
	        phase(channel), error ? ": " : "", error ? strerror(error) : "");
}

/* 0 when `events` are there, -ETIMEDOUT, -ECANCELED. */
static int await(struct umm_channel *channel, short events, int timeout_ms)
{
	struct pollfd fds[2] = {
	        {.fd = channel->fd, .events = events}, {.fd = channel->stopfd, .events = POLLIN}};
	for (;;) {
		if (channel->deadline_ns) {
			uint64_t now = umm_now_ns();
			uint64_t left_ms =
			        now < channel->deadline_ns ? (channel->deadline_ns - now) / 1000000 : 0;
			if (left_ms < (uint64_t)timeout_ms)
				timeout_ms = (int)left_ms;
		}
		int n = poll(fds, 2, timeout_ms);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return umm_channel_fail(channel, -errno, "poll: %s", strerror(errno));
		if (fds[1].revents)
			return umm_channel_fail(channel, -ECANCELED, "stopped");
		if (n == 0)
			return umm_channel_fail(channel, -ETIMEDOUT,
			        "%s moved nothing for %u ms on the %s connection in phase %s", peer(channel),
			        channel->idle_ms,
			        channel->protocol.connection == UMM_CONNECTION_URGENT ? "urgent" : "data",
			        phase(channel));
		return 0;
	}
}

int umm_channel_wait(struct umm_channel *channel, int timeout_ms, int wakefd)
{
	if (channel->in_start < channel->in_end)
		return 1;
	struct pollfd fds[3] = {{.fd = channel->fd, .events = POLLIN},
	        {.fd = channel->stopfd, .events = POLLIN}, {.fd = wakefd, .events = POLLIN}};
	int n = poll(fds, 3, timeout_ms);
	if (n < 0)
		return errno == EINTR ? 0 : umm_channel_fail(channel, -errno, "poll: %s", strerror(errno));
	if (fds[1].revents)
		return umm_channel_fail(channel, -ECANCELED, "stopped");
	return fds[0].revents != 0;
}

static int send_pieces(struct umm_channel *channel, struct iovec *pieces, int n)
{
	while (n > 0) {
		struct msghdr message = {.msg_iov = pieces, .msg_iovlen = (size_t)n};
		ssize_t sent = sendmsg(channel->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
		if (sent < 0 && errno == EINTR)
			continue;
		if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
			int error = await(channel, POLLOUT, (int)channel->idle_ms);
			if (error)
				return error;
			continue;
		}
		if (sent < 0)
			return lost(channel, errno);
		atomic_fetch_add_explicit(&channel->bytes_out, (uint64_t)sent, memory_order_relaxed);
		while (n > 0 && (size_t)sent >= pieces->iov_len) {
			sent -= (ssize_t)pieces->iov_len;
			pieces++;
			n--;
		}
		if (n > 0) {
			pieces->iov_base = (char *)pieces->iov_base + sent;
			pieces->iov_len -= (size_t)sent;
		}
	}
	return 0;
}

int umm_channel_send(struct umm_channel *channel, struct umm_frame *frame, const void *payload, uint32_t len,
        const void *more, uint32_t more_len)
{
	uint8_t header[UMM_FRAME_HEADER];
	frame->length = len + more_len;
	frame->payload_check = umm_frame_payload_check(payload, len);
	umm_frame_encode(frame, header);
	struct iovec pieces[3] = {{header, sizeof header}, {(void *)payload, len}, {(void *)more, more_len}};
	pthread_mutex_lock(&channel->send_lock);
	int error = send_pieces(channel, pieces, 3);
	pthread_mutex_unlock(&channel->send_lock);
	return error;
}

int umm_channel_send_raw(struct umm_channel *channel, const void *bytes, uint64_t len)
{
	struct iovec piece = {(void *)bytes, len};
	pthread_mutex_lock(&channel->send_lock);
	int error = send_pieces(channel, &piece, 1);
	pthread_mutex_unlock(&channel->send_lock);
	return error;
}

void umm_channel_send_error(struct umm_channel *channel, int error, const char *text)
{
	uint8_t bytes[UMM_FRAME_HEADER + UMM_FRAME_MAX_ERROR];
	size_t len = strnlen(text, UMM_FRAME_MAX_ERROR);
	struct umm_frame frame = {
	        .type = UMM_FRAME_ERROR,
	        .first = (uint64_t)(error < 0 ? -error : error),
	        .length = (uint32_t)len,
	        .payload_check = umm_frame_payload_check(text, (uint32_t)len),
	};
	umm_frame_encode(&frame, bytes);
	memcpy(bytes + UMM_FRAME_HEADER, text, len);
	/* One try: a peer that does not read, or a frame half sent, must not hold up the one who tells it. */
	if (pthread_mutex_trylock(&channel->send_lock) == 0) {
		(void)send(channel->fd, bytes, UMM_FRAME_HEADER + len, MSG_NOSIGNAL | MSG_DONTWAIT);
		pthread_mutex_unlock(&channel->send_lock);
	}
}

static int fill(struct umm_channel *channel, void *to, uint64_t room, uint64_t *got)
{
	for (;;) {
		ssize_t n = recv(channel->fd, to, room, MSG_DONTWAIT);
		if (n > 0) {
			atomic_fetch_add_explicit(&channel->bytes_in, (uint64_t)n, memory_order_relaxed);
			*got = (uint64_t)n;
			return 0;
		}
		if (n == 0)
			return lost(channel, 0);
		if (errno == EINTR)
			continue;
		if (errno != EAGAIN && errno != EWOULDBLOCK)
			return lost(channel, errno);
		int error = await(channel, POLLIN, (int)channel->idle_ms);
		if (error)
			return error;
	}
}

int umm_channel_read(struct umm_channel *channel, void *to, uint64_t len)
{
	uint8_t *out = to;
	while (len) {
		uint64_t have = channel->in_end - channel->in_start, got;
		if (have == 0) {
			/* what is larger than the read-ahead goes straight to its place */
			if (len >= READ_AHEAD) {
				int error = fill(channel, out, len, &got);
				if (error)
					return error;
				out += got;
				len -= got;
				continue;
			}
			int error = fill(channel, channel->in, READ_AHEAD, &got);
			if (error)
				return error;
			channel->in_start = 0;
			channel->in_end = (uint32_t)got;
			have = got;
		}
		uint64_t n = have < len ? have : len;
		memcpy(out, channel->in + channel->in_start, n);
		channel->in_start += (uint32_t)n;
		out += n;
		len -= n;
	}
	return 0;
}

int umm_channel_read_checked(struct umm_channel *channel, const struct umm_frame *frame, void *to)
{
	uint32_t len = umm_frame_checked_bytes(frame);
	int error = umm_channel_read(channel, to, len);
	if (error)
		return error;
	if (umm_frame_payload_check(to, len) != frame->payload_check)
		return umm_channel_fail(channel, -EBADMSG, "wrong checksum of a %s frame from %s",
		        umm_frame_name(frame->type), peer(channel));
	return 0;
}

static int read_error(struct umm_channel *channel, const struct umm_frame *frame)
{
	char text[UMM_FRAME_MAX_ERROR + 1];
	int error = umm_channel_read_checked(channel, frame, text);
	if (error)
		return error;
	for (uint32_t i = 0; i < frame->length; i++) {
		/* it ends up on a terminal */
		if ((unsigned char)text[i] < ' ' || text[i] == 0x7f)
			text[i] = '?';
	}
	text[frame->length] = 0;
	return umm_channel_fail(channel, -EREMOTEIO, "%s says: %s", peer(channel), text);
}

int umm_channel_receive(struct umm_channel *channel, struct umm_frame *ret)
{
	uint8_t header[UMM_FRAME_HEADER];
	int error = umm_channel_read(channel, header, sizeof header);
	if (error)
		return error;
	error = umm_frame_decode(header, ret);
	if (error)
		return umm_channel_fail(channel, error,
		        "what %s sent is no frame of this protocol (phase %s)", peer(channel),
		        phase(channel));
	error = umm_protocol_check(&channel->protocol, ret);
	if (error)
		return umm_channel_fail(channel, error,
		        "%s sent a %s frame (first %llu, count %u, %u bytes) that %s in phase %s",
		        peer(channel), umm_frame_name(ret->type), (unsigned long long)ret->first, ret->count,
		        ret->length, error == -EMSGSIZE ? "is too long" : "may not come", phase(channel));
	if (ret->type == UMM_FRAME_ERROR)
		return read_error(channel, ret);
	return 0;
}
