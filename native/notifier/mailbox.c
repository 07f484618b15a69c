/* Putting letters: the side that changes memory. */
#include "notifier/mailbox.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "common/clock.h"
#include "common/lock.h"
#include "notifier/internal.h"

int mailbox_init(struct mailbox *box, uint32_t capacity)
{
	memset(box, 0, sizeof(*box));
	box->fd = -1;
	box->capacity = capacity;
	box->pairs_capacity = capacity / 2;
	box->letters = calloc(capacity, sizeof(*box->letters));
	box->pairs = calloc(box->pairs_capacity, sizeof(*box->pairs));
	pthread_mutex_init(&box->lock, NULL);
	pthread_condattr_t attributes;
	pthread_condattr_init(&attributes);
	pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
	pthread_cond_init(&box->arrived, &attributes);
	pthread_cond_init(&box->answered, &attributes);
	pthread_condattr_destroy(&attributes);
	return box->letters && box->pairs ? 0 : -ENOMEM;
}

void mailbox_deinit(struct mailbox *box)
{
	/* Not the condition variables: in a forked child, destroying one waits for the parent's waiters. */
	free(box->letters);
	free(box->pairs);
	if (box->fd >= 0)
		close(box->fd);
}

void mailbox_lock(struct mailbox *box, sigset_t *saved)
{
	block_signals(saved);
	pthread_mutex_lock(&box->lock);
}

void mailbox_unlock(struct mailbox *box, const sigset_t *saved)
{
	pthread_mutex_unlock(&box->lock);
	restore_signals(saved);
}

static void ring(struct mailbox *box)
{
	uint64_t one = 1;
	pthread_cond_signal(&box->arrived);
	if (box->fd >= 0 && write(box->fd, &one, sizeof(one)) < 0)
		return; /* the counter is at its end: it is readable */
}

static bool take_pair(struct mailbox *box, uint64_t id, const struct umm_subscription *subscription)
{
	/* Ends come in the order of their starts, mostly: each search begins where the last one ended. */
	for (uint32_t i = 0; i < box->n_pairs; i++) {
		uint32_t at = (box->pair_hint + i) % box->n_pairs;
		if (box->pairs[at].id != id || box->pairs[at].subscription != subscription)
			continue;
		box->pairs[at] = box->pairs[--box->n_pairs];
		box->pair_hint = at + 1;
		return true;
	}
	return false;
}

void mailbox_lose(struct mailbox *box, struct umm_subscription *subscription, uint64_t start, uint64_t end)
{
	if (!subscription->in_lost) {
		subscription->in_lost = true;
		subscription->lost_start = start;
		subscription->lost_end = end;
		subscription->next_lost = box->lost;
		box->lost = subscription;
		call_enter(subscription);
		ring(box);
		return;
	}
	if (start < subscription->lost_start)
		subscription->lost_start = start;
	if (end > subscription->lost_end)
		subscription->lost_end = end;
}

static void put_locked(struct umm_subscription *subscription, const struct umm_notify_event *event)
{
	struct umm_subscriber *subscriber = subscription->subscriber;
	struct mailbox *box = &subscriber->mailbox;
	if (box->closed || atomic_load(&subscription->dead))
		return;
	uint64_t used = box->tail - box->head + box->n_pairs;
	bool start = event->kind == UMM_NOTIFY_START;
	if (event->kind == UMM_NOTIFY_END) {
		if (!take_pair(box, event->id, subscription))
			return;
	} else if (used + (start ? 2 : 1) > box->capacity || (start && box->n_pairs == box->pairs_capacity)) {
		mailbox_lose(box, subscription, event->start, event->end);
		atomic_fetch_add(&subscriber->lost, 1);
		return;
	}
	if (start)
		box->pairs[box->n_pairs++] = (struct open_pair){event->id, subscription};
	box->letters[box->tail++ % box->capacity] = (struct letter){*event, subscription};
	call_enter(subscription);
	ring(box);
}

void mailbox_put(struct umm_subscription *subscription, const struct umm_notify_event *event)
{
	struct mailbox *box = &subscription->subscriber->mailbox;
	sigset_t saved;
	mailbox_lock(box, &saved);
	put_locked(subscription, event);
	mailbox_unlock(box, &saved);
}

void mailbox_put_release(struct umm_subscription *subscription, const struct umm_notify_event *event)
{
	struct mailbox *box = &subscription->subscriber->mailbox;
	sigset_t saved;
	mailbox_lock(box, &saved);
	if (!atomic_exchange(&subscription->released, true)) {
		box->release_event = *event;
		subscription->in_release = true;
		subscription->next_release = box->releases;
		box->releases = subscription;
		call_enter(subscription);
		ring(box);
	}
	mailbox_unlock(box, &saved);
}

static bool unlink_release(struct mailbox *box, struct umm_subscription *subscription)
{
	if (!subscription->in_release)
		return false;
	subscription->in_release = false;
	for (struct umm_subscription **link = &box->releases; *link; link = &(*link)->next_release)
		if (*link == subscription) {
			*link = subscription->next_release;
			break;
		}
	return true;
}

bool mailbox_claim_release(struct umm_subscription *subscription)
{
	struct mailbox *box = &subscription->subscriber->mailbox;
	sigset_t saved;
	mailbox_lock(box, &saved);
	bool first = !atomic_exchange(&subscription->released, true);
	bool taken = !first && unlink_release(box, subscription);
	mailbox_unlock(box, &saved);
	if (taken)
		call_leave(subscription);
	return first || taken;
}

void mailbox_purge(struct umm_subscription *subscription)
{
	struct mailbox *box = &subscription->subscriber->mailbox;
	uint32_t calls = 0;
	sigset_t saved;
	mailbox_lock(box, &saved);
	for (uint64_t i = box->head; i != box->tail; i++) {
		struct letter *letter = &box->letters[i % box->capacity];
		if (letter->subscription != subscription)
			continue;
		letter->subscription = NULL;
		calls++;
	}
	for (uint32_t i = 0; i < box->n_pairs;)
		if (box->pairs[i].subscription == subscription)
			box->pairs[i] = box->pairs[--box->n_pairs];
		else
			i++;
	if (subscription->in_lost) {
		for (struct umm_subscription **link = &box->lost; *link; link = &(*link)->next_lost)
			if (*link == subscription) {
				*link = subscription->next_lost;
				break;
			}
		subscription->in_lost = false;
		calls++;
	}
	/* Its LOST start was given, the end is not given any more. */
	if (box->lost_end_due == subscription) {
		box->lost_end_due = NULL;
		calls++;
	}
	calls += unlink_release(box, subscription);
	pthread_cond_broadcast(&box->answered);
	mailbox_unlock(box, &saved);
	while (calls--)
		call_leave(subscription);
}

/* -- waiting -------------------------------------------------------------------------------- */

static struct timespec until(uint64_t ns)
{
	return (struct timespec){(time_t)(ns / 1000000000), (long)(ns % 1000000000)};
}

/* The change goes on without the answer: what the subscriber will still be told comes after it. */
static void overtake(struct mailbox *box, struct umm_subscription *subscription, uint64_t id)
{
	for (uint64_t i = box->head; i != box->tail; i++) {
		struct letter *letter = &box->letters[i % box->capacity];
		if (letter->subscription == subscription && letter->event.id == id)
			letter->event.promise = UMM_PROMISE_AFTER;
	}
	if (box->busy && box->current.subscription == subscription && box->current.event.id == id)
		box->overtaken = true;
}

struct late {
	bool report;
	struct umm_notify_event event;
	uint64_t waited_ns;
};

static int wait_locked(struct mailbox *box, struct umm_subscription *subscription,
        const struct umm_notify_event *event, struct late *late)
{
	/* So often a voluntary change looks whether a fork began. */
	static const uint64_t slice_ns = 2000000;
	const struct umm_subscriber *subscriber = subscription->subscriber;
	uint64_t ticket = box->tail, began = umm_now_ns(), deadline = began + subscriber->limit_ns;
	bool voluntary = event->flags & UMM_NOTIFY_VOLUNTARY;
	if (deadline < began)
		deadline = UINT64_MAX;
	for (;;) {
		bool released = event->kind == UMM_NOTIFY_RELEASE && subscription->release_delivered;
		bool answered = event->kind != UMM_NOTIFY_RELEASE && box->done >= ticket;
		if (released || answered || box->closed || atomic_load(&subscription->dead))
			return 0;
		if (voluntary && atomic_load(&umm_forking))
			return -EAGAIN;
		uint64_t now = umm_now_ns();
		if (now >= deadline || (box->busy && box->reported)) {
			if (box->busy && !box->reported) {
				box->reported = true;
				*late = (struct late){true, box->current.event, now - box->busy_since};
			}
			return -ETIMEDOUT;
		}
		uint64_t slice = voluntary && deadline - now > slice_ns ? now + slice_ns : deadline;
		struct timespec at = until(slice);
		pthread_cond_timedwait(&box->answered, &box->lock, &at);
	}
}

static int wait_for_answer(struct umm_subscription *subscription, const struct umm_notify_event *event)
{
	struct umm_subscriber *subscriber = subscription->subscriber;
	struct mailbox *box = &subscriber->mailbox;
	struct late late = {0};
	sigset_t saved;
	mailbox_lock(box, &saved);
	int err = wait_locked(box, subscription, event, &late);
	bool keep = subscriber->late == UMM_LATE_KEEP && event->flags & UMM_NOTIFY_VOLUNTARY;
	if (err == -ETIMEDOUT && !keep)
		overtake(box, subscription, event->id);
	mailbox_unlock(box, &saved);
	if (err == -ETIMEDOUT)
		atomic_fetch_add(&subscriber->late_count, 1);
	if (late.report)
		report_late(subscriber->name, &late.event, late.waited_ns);
	return err == -ETIMEDOUT && keep ? -EBUSY : err;
}

int mailbox_wait(struct umm_subscription *subscription, const struct umm_notify_event *event)
{
	int err = wait_for_answer(subscription, event);
	return err == -ETIMEDOUT ? 0 : err;
}

void mailbox_wait_release(struct umm_subscription *subscription, const struct umm_notify_event *event)
{
	wait_for_answer(subscription, event);
}

void mailbox_stats(struct mailbox *box, struct umm_subscriber_stats *ret)
{
	sigset_t saved;
	mailbox_lock(box, &saved);
	/* What was lost is to be told, too: with 0 and not busy, whoever looks knows that all was delivered.
	 */
	ret->queued = box->tail - box->head + (box->lost != NULL) + (box->lost_end_due != NULL);
	/* Never 0 while busy: the clock may not have moved on, nor on every CPU alike. */
	uint64_t now = umm_now_ns();
	ret->busy_ns = !box->busy ? 0 : now > box->busy_since ? now - box->busy_since : 1;
	mailbox_unlock(box, &saved);
}
