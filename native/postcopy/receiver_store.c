/* The store of the destination's region: a fault becomes a request on the urgent connection.
 *
 * Called by fault handlers, so under the rules in store.h: no malloc, no stdio, no waiting for the socket. */
#include <errno.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

#include "common/clock.h"
#include "postcopy/receiver_internal.h"

static void queue_request(struct umm_receiver *receiver, uint64_t first, uint64_t count)
{
	for (uint64_t page = first; page < first + count; page++)
		(void)umm_bitmap_test_and_set(receiver->unsent, page);
	atomic_store(&receiver->any_unsent, true);
	(void)eventfd_write(receiver->wakefd, 1);
}

/* Under request_lock. False when the socket takes no more: then nothing of the request was lost. */
static bool send_request(struct umm_receiver *receiver, uint64_t first, uint32_t count)
{
	struct umm_frame frame = {
	        .type = UMM_FRAME_REQUEST,
	        .first = first,
	        .count = count,
	        .payload_check = umm_frame_payload_check(NULL, 0),
	};
	uint8_t bytes[UMM_FRAME_HEADER];
	umm_frame_encode(&frame, bytes);
	ssize_t sent = send(receiver->urgent.fd, bytes, sizeof bytes, MSG_NOSIGNAL | MSG_DONTWAIT);
	if (sent < 0)
		/* A broken connection is the receiving threads' to find; they fail every missing page. */
		return errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR;
	atomic_fetch_add_explicit(&receiver->requests, 1, memory_order_relaxed);
	uint64_t now = umm_now_ns();
	for (uint64_t page = first; page < first + count; page++)
		__atomic_store_n(&receiver->sent_at[page], now, __ATOMIC_RELAXED);
	if (sent < UMM_FRAME_HEADER) {
		receiver->tail_len = UMM_FRAME_HEADER - (unsigned)sent;
		memcpy(receiver->tail, bytes + sent, receiver->tail_len);
		atomic_store(&receiver->any_unsent, true);
		(void)eventfd_write(receiver->wakefd, 1);
	}
	return true;
}

static int store_request(struct umm_store *store, struct umm_region *region, uint64_t offset, uint64_t len)
{
	(void)region;
	struct umm_receiver *receiver = ((struct umm_receiver_store *)store)->receiver;
	uint64_t first = offset / receiver->page_size,
	         count = (len + receiver->page_size - 1) / receiver->page_size;
	if (atomic_load(&receiver->leaving))
		return -EIO;
	uint64_t now = umm_now_ns();
	for (uint64_t page = first; page < first + count; page++) {
		uint64_t never = 0;
		(void)__atomic_compare_exchange_n(
		        &receiver->asked_at[page], &never, now, 0, __ATOMIC_RELEASE, __ATOMIC_RELAXED);
	}
	pthread_mutex_lock(&receiver->request_lock);
	while (count) {
		uint32_t n = count < receiver->max_pages ? (uint32_t)count : receiver->max_pages;
		if (atomic_load(&receiver->any_unsent) || !send_request(receiver, first, n)) {
			queue_request(receiver, first, count);
			break;
		}
		first += n;
		count -= n;
	}
	pthread_mutex_unlock(&receiver->request_lock);
	return 0;
}

void umm_receiver_send_queued(struct umm_receiver *receiver)
{
	pthread_mutex_lock(&receiver->request_lock);
	while (receiver->tail_len) {
		ssize_t sent = send(
		        receiver->urgent.fd, receiver->tail, receiver->tail_len, MSG_NOSIGNAL | MSG_DONTWAIT);
		if (sent <= 0)
			break;
		receiver->tail_len -= (unsigned)sent;
		memmove(receiver->tail, receiver->tail + sent, receiver->tail_len);
	}
	uint64_t page = 0;
	while (!receiver->tail_len &&
	        (page = umm_bitmap_next(receiver->unsent, receiver->pages, page, true)) < receiver->pages) {
		umm_bitmap_clear(receiver->unsent, page);
		if (!send_request(receiver, page, 1)) {
			(void)umm_bitmap_test_and_set(receiver->unsent, page);
			break;
		}
	}
	if (!receiver->tail_len && page >= receiver->pages)
		atomic_store(&receiver->any_unsent, false);
	pthread_mutex_unlock(&receiver->request_lock);
}

/* The connection does not belong to a forked child: two processes would read one stream. */
static int store_after_fork(struct umm_store *store)
{
	(void)store;
	return -EOPNOTSUPP;
}

/* Part of the receiver, which outlives the region. */
static void store_destroy(struct umm_store *store)
{
	(void)store;
}

static const struct umm_store_ops store_ops = {
        .name = "postcopy",
        .request = store_request,
        .after_fork = store_after_fork,
        .destroy = store_destroy,
};

void umm_receiver_store_init(struct umm_receiver *receiver)
{
	receiver->store.receiver = receiver;
	umm_store_init(
	        &receiver->store.store, &store_ops, UMM_STORE_PRIVATE, receiver->pages * receiver->page_size);
}
