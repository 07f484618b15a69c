#include "notifier/io_uring_internal.h"

#include <errno.h>
#include <time.h>

static void wait_until(struct umm_notify_io_uring *buffers, uint64_t deadline_ns)
{
	struct timespec until = {
	        .tv_sec = (time_t)(deadline_ns / 1000000000u),
	        .tv_nsec = (long)(deadline_ns % 1000000000u),
	};
	pthread_cond_timedwait(&buffers->changed, &buffers->lock, &until);
}

void io_slot_empty(struct io_slot *slot)
{
	/* Fails only where the ring is gone, and with it the pins. */
	umm_io_uring_update_slot(slot->owner->ring_fd, number_of(slot), 0, 0);
	slot->state = SLOT_EMPTY;
	slot->seq_known = false;
}

/* Drops the lock while it pins. With `reader`, `seq` is of umm_read_begin. 0: live; -EAGAIN: the memory
 * changed meanwhile; else the kernel's refusal. */
static int fill(struct io_slot *slot, bool reader, uint64_t seq)
{
	struct umm_notify_io_uring *buffers = slot->owner;
	slot->state = SLOT_REGISTERING;
	slot->stale = false;
	pthread_mutex_unlock(&buffers->lock);
	int err = umm_io_uring_update_slot(buffers->ring_fd, number_of(slot), slot->address, slot->length);
	pthread_mutex_lock(&buffers->lock);
	bool stale = slot->stale || slot->ended || (reader && umm_read_retry(slot->subscription, seq));
	if (stale) {
		io_slot_empty(slot);
		buffers->stats.repeated++;
		err = -EAGAIN;
	} else {
		slot->state = err ? SLOT_EMPTY : SLOT_LIVE;
		slot->seq_known = reader && !err;
		slot->seq = seq;
		slot->error = err;
		buffers->stats.registered += !err;
	}
	pthread_cond_broadcast(&buffers->changed);
	return err;
}

/* Have all events that began been delivered? Then the state of the slots tells of all of them. */
static bool is_delivered(struct umm_notify_io_uring *buffers)
{
	struct umm_subscriber_stats stats;
	umm_subscriber_stats(buffers->subscriber, &stats);
	return !stats.queued && !stats.busy_ns;
}

/* One step towards a live slot whose seq is known. -EAGAIN: look again. */
static int settle_step(struct io_slot *slot, uint64_t deadline_ns)
{
	struct umm_notify_io_uring *buffers = slot->owner;
	if (slot->ended)
		return -ESRCH;
	uint64_t now = umm_now_ns();
	if (now >= deadline_ns)
		return -ETIMEDOUT;
	if (slot->state == SLOT_REGISTERING || slot->changes) {
		wait_until(buffers, deadline_ns);
		return -EAGAIN;
	}
	uint64_t seq;
	pthread_mutex_unlock(&buffers->lock);
	int err = umm_read_begin(slot->subscription, deadline_ns - now, &seq);
	bool delivered = !err && is_delivered(buffers);
	if (!err && !delivered)
		nanosleep(&(struct timespec){.tv_nsec = 20000}, NULL);
	pthread_mutex_lock(&buffers->lock);
	if (err)
		return err;
	if (!delivered || slot->state == SLOT_REGISTERING || slot->changes)
		return -EAGAIN;
	if (slot->state == SLOT_LIVE) {
		/* It outlived what happened since: a fork, say. */
		slot->seq = seq;
		slot->seq_known = true;
		return -EAGAIN;
	}
	return fill(slot, true, seq);
}

int io_slot_settle(struct io_slot *slot, uint64_t deadline_ns)
{
	int err = 0;
	slot->users++;
	while (!err || err == -EAGAIN) {
		if (slot->state == SLOT_LIVE && !slot->changes && slot->seq_known &&
		        !umm_read_retry(slot->subscription, slot->seq)) {
			err = 0;
			break;
		}
		err = settle_step(slot, deadline_ns);
	}
	slot->users--;
	return err;
}

/* -- callbacks: one thread, the subscriber's ------------------------------------------------ */

static void drop(struct io_slot *slot)
{
	slot->generation++;
	if (slot->state == SLOT_REGISTERING) {
		/* Not waited for: it may be waiting for a page of this very range. It sees this, and undoes.
		 */
		slot->stale = true;
	} else if (slot->state == SLOT_LIVE) {
		io_slot_empty(slot);
		slot->owner->stats.emptied++;
	}
}

/* New requests find no buffer; those in flight have the old pages until they are done. */
static void await_requests(struct io_slot *slot)
{
	struct umm_notify_io_uring *buffers = slot->owner;
	/* Longer than the change waits: so an eviction is given up, instead of copying pages in use. */
	uint64_t deadline_ns = deadline_of(2 * buffers->limit_ns);
	while (slot->requests && umm_now_ns() < deadline_ns)
		wait_until(buffers, deadline_ns);
	buffers->stats.kept_pinned += slot->requests != 0;
}

static int on_start(void *context, const struct umm_notify_event *event)
{
	struct io_slot *slot = context;
	if (event->reason == UMM_REASON_FORK)
		return 0;
	pthread_mutex_lock(&slot->owner->lock);
	slot->changes++;
	drop(slot);
	if (event->promise == UMM_PROMISE_ORDERED && slot->owner->limit_ns)
		await_requests(slot);
	pthread_mutex_unlock(&slot->owner->lock);
	return 0;
}

static void on_end(void *context, const struct umm_notify_event *event)
{
	struct io_slot *slot = context;
	struct umm_notify_io_uring *buffers = slot->owner;
	if (event->reason == UMM_REASON_FORK)
		return;
	pthread_mutex_lock(&buffers->lock);
	slot->changes--;
	/* Told before the memory changes, or late: the pages are not to be pinned now. Evicted: pinning would
	 * bring them back at once. */
	bool at_end = event->promise == UMM_PROMISE_ORDERED && event->reason != UMM_REASON_EVICT &&
	              event->reason != UMM_REASON_LOST && !buffers->at_use;
	if (at_end && !slot->changes && slot->state == SLOT_EMPTY && !slot->ended)
		fill(slot, false, 0);
	pthread_cond_broadcast(&buffers->changed);
	pthread_mutex_unlock(&buffers->lock);
}

/* The pages were replaced before this was told. */
static void on_replaced(void *context, const struct umm_notify_event *event)
{
	struct io_slot *slot = context;
	pthread_mutex_lock(&slot->owner->lock);
	drop(slot);
	bool at_end = event->reason != UMM_REASON_EVICT && !slot->owner->at_use;
	if (at_end && !slot->changes && slot->state == SLOT_EMPTY && !slot->ended)
		fill(slot, false, 0);
	pthread_mutex_unlock(&slot->owner->lock);
}

static void on_release(void *context, const struct umm_notify_event *event)
{
	struct io_slot *slot = context;
	if (event->reason == UMM_REASON_UNREGISTER)
		return; /* by us: see take_out() */
	pthread_mutex_lock(&slot->owner->lock);
	slot->ended = true;
	drop(slot);
	pthread_cond_broadcast(&slot->owner->changed);
	pthread_mutex_unlock(&slot->owner->lock);
}

const struct umm_notifier_ops io_slot_ops = {
        .release = on_release,
        .invalidate_range_start = on_start,
        .invalidate_range_end = on_end,
        .invalidate_page = on_replaced,
        .change = on_replaced,
};
