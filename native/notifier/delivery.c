/* Taking letters: the threads of sleeping subscribers, ours or the caller's (pull mode). */
#include <errno.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "common/clock.h"
#include "common/lock.h"
#include "notifier/internal.h"

static struct umm_notify_event lost_event(const struct umm_subscription *subscription, int kind)
{
	uint64_t generation = umm_space_generation(subscription->space);
	return (struct umm_notify_event){
	        .start = subscription->lost_start,
	        .end = subscription->lost_end,
	        .id = generation,
	        .generation = generation,
	        .kind = (uint8_t)kind,
	        .source = UMM_SOURCE_LIBRARY,
	        .reason = UMM_REASON_LOST,
	        .promise = UMM_PROMISE_AFTER,
	        .flags = UMM_NOTIFY_BLOCKABLE,
	        .pid = subscription->space->pid,
	};
}

/* True when box->current is the next event to deliver; it comes with a call in flight. */
static bool take_next(struct mailbox *box)
{
	struct letter *current = &box->current;
	if (box->lost_end_due) {
		current->subscription = box->lost_end_due;
		box->lost_end_due = NULL;
		current->event = box->lost_event;
		current->event.kind = UMM_NOTIFY_END;
		box->current_is_letter = false;
		return true;
	}
	while (box->head != box->tail) {
		*current = box->letters[box->head++ % box->capacity];
		box->current_is_letter = true;
		if (current->subscription)
			return true;
		box->done++; /* taken back */
		pthread_cond_broadcast(&box->answered);
	}
	box->current_is_letter = false;
	if (box->lost) {
		current->subscription = box->lost;
		box->lost = current->subscription->next_lost;
		current->subscription->in_lost = false;
		current->event = box->lost_event = lost_event(current->subscription, UMM_NOTIFY_START);
		return true;
	}
	if (box->releases) {
		current->subscription = box->releases;
		box->releases = current->subscription->next_release;
		current->subscription->in_release = false;
		current->event = box->release_event;
		return true;
	}
	return false;
}

static int next_locked(struct mailbox *box, uint64_t timeout_ns)
{
	uint64_t began = umm_now_ns(), deadline = began + timeout_ns;
	struct timespec at = {(time_t)(deadline / 1000000000), (long)(deadline % 1000000000)};
	bool late = false;
	for (;;) {
		if (box->closed)
			return -ESHUTDOWN;
		/* One at a time: answers come in the order of the letters. */
		if (!box->busy && take_next(box))
			return 0;
		uint64_t count;
		if (!box->busy && box->fd >= 0 && read(box->fd, &count, sizeof(count)) < 0 && errno != EAGAIN)
			return -errno;
		if (late)
			return -ETIMEDOUT;
		if (deadline < began)
			pthread_cond_wait(&box->arrived, &box->lock);
		else
			late = pthread_cond_timedwait(&box->arrived, &box->lock, &at) == ETIMEDOUT;
	}
}

int umm_subscriber_next(struct umm_subscriber *subscriber, uint64_t timeout_ns,
        struct umm_notify_event *event, struct umm_subscription **subscription)
{
	struct mailbox *box = &subscriber->mailbox;
	if (!subscriber->sleeping)
		return -EINVAL;
	if (subscriber->epoch != atomic_load(&umm_fork_epoch))
		return -ESHUTDOWN;
	sigset_t saved;
	mailbox_lock(box, &saved);
	int err = next_locked(box, timeout_ns);
	struct letter letter = {0};
	if (!err) {
		box->busy = true;
		box->busy_since = umm_now_ns();
		box->reported = box->overtaken = false;
		box->frame = (struct frame){box->current.subscription, umm_thread.frames};
		umm_thread.frames = &box->frame;
		letter = box->current;
	}
	mailbox_unlock(box, &saved);
	if (!err) {
		/* Not under the lock: it may be memory that faults. */
		*event = letter.event;
		*subscription = letter.subscription;
		/* Otherwise call_ops counts. */
		if (subscriber->pull)
			atomic_fetch_add_explicit(&subscriber->counts[event->kind], 1, memory_order_relaxed);
	}
	return err;
}

void umm_subscriber_done(struct umm_subscriber *subscriber, int result)
{
	struct mailbox *box = &subscriber->mailbox;
	if (!subscriber->sleeping || subscriber->epoch != atomic_load(&umm_fork_epoch))
		return;
	sigset_t saved;
	mailbox_lock(box, &saved);
	if (!box->busy) {
		mailbox_unlock(box, &saved);
		return;
	}
	struct umm_subscription *subscription = box->current.subscription;
	const struct umm_notify_event *event = &box->current.event;
	bool dead = atomic_load(&subscription->dead), keep_call = false;
	if (event->kind == UMM_NOTIFY_AGE && result > 0)
		atomic_store(&subscription->young, 1);
	if (event->kind == UMM_NOTIFY_RELEASE)
		subscription->release_delivered = true;
	if (box->current_is_letter)
		box->done++;
	if (box->overtaken && !dead)
		mailbox_lose(box, subscription, event->start, event->end);
	if (event->reason == UMM_REASON_LOST && event->kind == UMM_NOTIFY_START && !dead) {
		box->lost_end_due = subscription; /* with the call in flight */
		keep_call = true;
	}
	box->busy = false;
	box->current.subscription = NULL;
	umm_thread.frames = box->frame.previous;
	pthread_cond_broadcast(&box->answered);
	pthread_cond_signal(&box->arrived);
	mailbox_unlock(box, &saved);
	if (!keep_call)
		call_leave(subscription);
}

void umm_subscriber_close(struct umm_subscriber *subscriber)
{
	struct mailbox *box = &subscriber->mailbox;
	if (!subscriber->sleeping || subscriber->epoch != atomic_load(&umm_fork_epoch))
		return;
	sigset_t saved;
	mailbox_lock(box, &saved);
	box->closed = true;
	pthread_cond_broadcast(&box->arrived);
	pthread_cond_broadcast(&box->answered);
	mailbox_unlock(box, &saved);
}

int umm_subscriber_fd(struct umm_subscriber *subscriber)
{
	struct mailbox *box = &subscriber->mailbox;
	if (!subscriber->sleeping)
		return -EINVAL;
	if (subscriber->epoch != atomic_load(&umm_fork_epoch))
		return -ESHUTDOWN;
	sigset_t saved;
	mailbox_lock(box, &saved);
	if (box->fd < 0) {
		box->fd = eventfd(
		        box->head != box->tail || box->lost || box->releases, EFD_CLOEXEC | EFD_NONBLOCK);
		if (box->fd < 0)
			box->fd = -errno;
	}
	int fd = box->fd;
	if (fd < 0)
		box->fd = -1;
	mailbox_unlock(box, &saved);
	return fd;
}
