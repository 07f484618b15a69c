/* Telling the subscriptions of a range: no lock, no memory allocated, one subscription at a time. */
#include <errno.h>
#include <string.h>

#include "notifier/internal.h"
#include "notifier/moment.h"
#include "notifier/rcu.h"

static const uint64_t all_births = UINT64_MAX;
static const uint64_t one_begun = 1ull << SEQ_ACTIVE_BITS;

_Thread_local struct thread_state umm_thread __attribute__((tls_model("initial-exec")));

unsigned thread_slot_take(void)
{
	static _Atomic uint32_t next;
	umm_thread.slot = atomic_fetch_add(&next, 1) % (PHASE_SLOTS * 1024) + 1;
	return umm_thread.slot;
}

/* The next subscription of the range, with a call in flight counted; NULL at the end. */
static struct umm_subscription *visit(
        struct umm_space *space, uint64_t start, uint64_t end, uint64_t version, struct cursor *cursor)
{
	for (;;) {
		void *reader = umm_rcu_read_lock(thread_slot());
		struct tree *tree = atomic_load_explicit(&space->tree, memory_order_acquire);
		struct umm_subscription *found = tree ? tree_next(tree, start, end, version, cursor) : NULL;
		if (found) {
			*cursor = (struct cursor){found->start, found->birth};
			umm_notify_moment(UMM_MOMENT_FOUND, found);
			call_enter(found);
		}
		umm_rcu_read_unlock(reader);
		if (!found || !atomic_load(&found->dead))
			return found;
		call_leave(found);
	}
}

static uint64_t version_now(struct umm_space *space)
{
	void *reader = umm_rcu_read_lock(thread_slot());
	struct tree *tree = atomic_load_explicit(&space->tree, memory_order_acquire);
	uint64_t version = tree ? tree->version : 0;
	umm_rcu_read_unlock(reader);
	return version;
}

int call_ops(struct umm_subscription *subscription, const struct umm_notify_event *event)
{
	const struct umm_notifier_ops *ops = &subscription->subscriber->ops;
	void *context = subscription->context;
	int result = 0;
	atomic_fetch_add_explicit(&subscription->subscriber->counts[event->kind], 1, memory_order_relaxed);
	switch (event->kind) {
	case UMM_NOTIFY_START:
		result = ops->invalidate_range_start ? ops->invalidate_range_start(context, event) : 0;
		break;
	case UMM_NOTIFY_END:
		if (ops->invalidate_range_end)
			ops->invalidate_range_end(context, event);
		break;
	case UMM_NOTIFY_PAGE:
		if (ops->invalidate_page)
			ops->invalidate_page(context, event);
		break;
	case UMM_NOTIFY_CHANGE:
		if (ops->change)
			ops->change(context, event);
		break;
	case UMM_NOTIFY_AGE:
		result = ops->age ? ops->age(context, event) : 0;
		break;
	case UMM_NOTIFY_RELEASE:
		if (ops->release)
			ops->release(context, event);
		break;
	default:
		break;
	}
	return result;
}

static bool has_left(const struct umm_subscription *subscription)
{
	return atomic_load_explicit(&subscription->released, memory_order_acquire);
}

/* In the thread itself, or into the queue. -EAGAIN: it would have to be waited for. */
static int tell(struct umm_subscription *subscription, const struct umm_notify_event *event, bool can_fail)
{
	struct umm_subscriber *subscriber = subscription->subscriber;
	if (has_left(subscription))
		return 0;
	if (subscriber->sleeping) {
		if (can_fail && subscriber->limit_ns && !in_callback_of_subscriber(subscriber)) {
			atomic_fetch_add_explicit(&subscriber->again, 1, memory_order_relaxed);
			return -EAGAIN;
		}
		mailbox_put(subscription, event);
		return 0;
	}
	int result = call_here(subscription, event);
	if (event->kind == UMM_NOTIFY_START && result == -EAGAIN)
		atomic_fetch_add_explicit(&subscriber->again, 1, memory_order_relaxed);
	return result;
}

static bool is_waited_for(const struct umm_subscription *subscription)
{
	const struct umm_subscriber *subscriber = subscription->subscriber;
	/* Its own callback changes memory: it would wait for itself. */
	return subscriber->sleeping && subscriber->limit_ns && !in_callback_of_subscriber(subscriber);
}

/* Waits for the sleeping subscribers of the range that were told. */
static int await_answers(struct umm_space *space, const struct umm_notify_event *event, uint64_t version)
{
	struct cursor cursor = {0};
	struct umm_subscription *subscription;
	int err = 0;
	while (!err && (subscription = visit(space, event->start, event->end, version, &cursor))) {
		if (is_waited_for(subscription))
			err = mailbox_wait(subscription, event);
		call_leave(subscription);
	}
	return err;
}

/* -- start and end -------------------------------------------------------------------------- */

static void end_one(struct umm_subscription *subscription, const struct umm_notify_event *event)
{
	atomic_fetch_sub(&subscription->seq, 1);
	tell(subscription, event, false);
}

/* To those who were told the start: as old as the tree that it began with, and up to `last` in order. */
static void tell_end(struct umm_notify_range *range, const struct cursor *last)
{
	struct cursor cursor = {0};
	struct umm_subscription *subscription;
	while ((subscription =
	                visit(range->space, range->event.start, range->event.end, range->version, &cursor))) {
		bool past = last && (cursor.start > last->start ||
		                            (cursor.start == last->start && cursor.birth >= last->birth));
		if (!past)
			end_one(subscription, &range->event);
		call_leave(subscription);
		if (past)
			break;
	}
}

static void undo(struct umm_notify_range *range, int error, const struct cursor *last)
{
	range->event.kind = UMM_NOTIFY_END;
	range->event.error = error;
	tell_end(range, last);
}

static int start_slowly(struct umm_notify_range *range, bool no_wait)
{
	struct umm_notify_event *event = &range->event;
	struct umm_space *space = range->space;
	struct cursor cursor = {0};
	struct umm_subscription *subscription;
	bool blockable = event->flags & UMM_NOTIFY_BLOCKABLE, waits = false;
	range->version = version_now(space);
	event->id = event->generation = atomic_fetch_add(&space->generation, 1) + 1;
	while ((subscription = visit(space, event->start, event->end, range->version, &cursor))) {
		atomic_fetch_add(&subscription->seq, one_begun + 1);
		int result = tell(subscription, event, !blockable && !no_wait);
		bool refused = result == -EAGAIN && !blockable;
		waits |= is_waited_for(subscription);
		if (refused)
			atomic_fetch_sub(&subscription->seq, 1);
		call_leave(subscription);
		if (refused) {
			undo(range, -EAGAIN, &cursor);
			return -EAGAIN;
		}
	}
	if (!waits || no_wait)
		return 0;
	int err = await_answers(space, event, range->version);
	if (err)
		undo(range, err, NULL);
	return err;
}

static bool is_ours(const struct umm_space *space)
{
	return space->epoch == atomic_load_explicit(&umm_fork_epoch, memory_order_relaxed);
}

static void leave_changes(struct umm_notify_range *range)
{
	umm_thread.open--;
	phases_leave(range->counter);
}

int umm_notify_start(struct umm_notify_range *range, struct umm_space *space, uint64_t start, uint64_t end,
        int source, int reason, uint32_t flags)
{
	range->space = space;
	range->version = 0;
	range->epoch = space->epoch;
	umm_thread.open++;
	range->counter = phases_enter(&space->changes, thread_slot());
	range->event = (struct umm_notify_event){
	        .start = start,
	        .end = end,
	        .flags = flags & (UMM_NOTIFY_BLOCKABLE | UMM_NOTIFY_VOLUNTARY),
	        .kind = UMM_NOTIFY_START,
	        .source = (uint8_t)source,
	        .reason = (uint8_t)reason,
	        .promise = UMM_PROMISE_ORDERED,
	        .pid = space->pid,
	};
	if (!atomic_load(&space->tree) || start >= end || !is_ours(space))
		return 0;
	int err = start_slowly(range, flags & UMM_NOTIFY_NO_WAIT);
	if (err)
		leave_changes(range);
	return err;
}

void umm_notify_end(struct umm_notify_range *range, int error)
{
	if (range->epoch != range->space->epoch || !is_ours(range->space)) {
		/* It began in the parent. */
		umm_thread.open--;
		return;
	}
	if (range->version) {
		range->event.kind = UMM_NOTIFY_END;
		range->event.error = error;
		range->event.generation = atomic_load(&range->space->generation);
		tell_end(range, NULL);
	}
	leave_changes(range);
}

/* -- one call each -------------------------------------------------------------------------- */

static struct umm_notify_event single(struct umm_space *space, uint64_t start, uint64_t end, int kind,
        int source, int reason, uint32_t flags)
{
	uint64_t id = atomic_fetch_add(&space->generation, 1) + 1;
	return (struct umm_notify_event){
	        .start = start,
	        .end = end,
	        .id = id,
	        .generation = id,
	        .flags = flags,
	        .kind = (uint8_t)kind,
	        .source = (uint8_t)source,
	        .reason = (uint8_t)reason,
	        .promise = UMM_PROMISE_ORDERED,
	        .pid = space->pid,
	};
}

static void tell_once(struct umm_space *space, uint64_t start, uint64_t end, int kind, int source, int reason,
        uint32_t flags)
{
	if (!is_ours(space))
		return;
	umm_thread.open++;
	_Atomic uint64_t *counter = phases_enter(&space->changes, thread_slot());
	if (atomic_load(&space->tree) && start < end) {
		struct umm_notify_event event = single(space, start, end, kind, source, reason, flags);
		uint64_t version = version_now(space);
		struct cursor cursor = {0};
		struct umm_subscription *subscription;
		bool waits = false;
		while ((subscription = visit(space, start, end, version, &cursor))) {
			atomic_fetch_add(&subscription->seq, one_begun);
			tell(subscription, &event, false);
			waits |= is_waited_for(subscription);
			call_leave(subscription);
		}
		if (waits && (flags & UMM_NOTIFY_BLOCKABLE))
			await_answers(space, &event, version);
	}
	phases_leave(counter);
	umm_thread.open--;
}

void umm_notify_page(
        struct umm_space *space, uint64_t start, uint64_t end, int source, int reason, uint32_t flags)
{
	tell_once(space, start, end, UMM_NOTIFY_PAGE, source, reason, flags & UMM_NOTIFY_BLOCKABLE);
}

void umm_notify_change(
        struct umm_space *space, uint64_t start, uint64_t end, int source, int reason, uint32_t flags)
{
	tell_once(space, start, end, UMM_NOTIFY_CHANGE, source, reason, flags & UMM_NOTIFY_BLOCKABLE);
}

/* One at a time: each takes the young bits of all. */
static pthread_mutex_t age_lock = PTHREAD_MUTEX_INITIALIZER;

void walk_after_fork(void)
{
	pthread_mutex_init(&age_lock, NULL);
}

int umm_notify_age(struct umm_space *space, uint64_t start, uint64_t end, int source, uint64_t *answered)
{
	uint64_t asked = 0;
	int young = 0;
	if (answered)
		*answered = 0;
	if (!is_ours(space) || !atomic_load(&space->tree) || start >= end)
		return 0;
	bool alone = !umm_thread.frames;
	if (alone)
		pthread_mutex_lock(&age_lock);
	struct umm_notify_event event =
	        single(space, start, end, UMM_NOTIFY_AGE, source, UMM_REASON_OTHER, UMM_NOTIFY_BLOCKABLE);
	uint64_t version = version_now(space);
	struct cursor cursor = {0};
	struct umm_subscription *subscription;
	while ((subscription = visit(space, start, end, version, &cursor))) {
		if (subscription->subscriber->sleeping)
			mailbox_put(subscription, &event);
		else if (!has_left(subscription)) {
			young |= call_here(subscription, &event) > 0;
			asked++;
		}
		call_leave(subscription);
	}
	cursor = (struct cursor){0};
	while ((subscription = visit(space, start, end, version, &cursor))) {
		if (subscription->subscriber->sleeping && !has_left(subscription)) {
			if (is_waited_for(subscription))
				asked += mailbox_wait(subscription, &event) == 0;
			young |= (int)atomic_exchange(&subscription->young, 0);
		}
		call_leave(subscription);
	}
	if (alone)
		pthread_mutex_unlock(&age_lock);
	if (answered)
		*answered = asked;
	return young;
}

/* -- seen by others ------------------------------------------------------------------------- */

static void post_one(struct umm_subscription *subscription, struct umm_notify_event *event)
{
	atomic_fetch_add(&subscription->seq, one_begun);
	event->kind = UMM_NOTIFY_START;
	if (tell(subscription, event, false) == -EAGAIN)
		return; /* it did not begin, so it does not end */
	event->kind = UMM_NOTIFY_END;
	tell(subscription, event, false);
}

void umm_notify_post(struct umm_space *space, uint64_t start, uint64_t end, uint64_t to, int source,
        int reason, int promise)
{
	if (!is_ours(space) || start >= end)
		return;
	umm_thread.open++;
	_Atomic uint64_t *counter = phases_enter(&space->changes, thread_slot());
	if (atomic_load(&space->tree)) {
		struct umm_notify_event event =
		        single(space, start, end, UMM_NOTIFY_START, source, reason, 0);
		event.to = to;
		event.promise = (uint8_t)promise;
		uint64_t version = version_now(space);
		struct cursor cursor = {0};
		struct umm_subscription *subscription;
		while ((subscription = visit(space, start, end, version, &cursor))) {
			post_one(subscription, &event);
			call_leave(subscription);
		}
	}
	phases_leave(counter);
	umm_thread.open--;
}

bool umm_notify_enter(struct umm_space *space, struct umm_notify_entry *entry)
{
	umm_thread.open++;
	entry->epoch = space->epoch;
	entry->counter = phases_enter(&space->changes, thread_slot());
	return atomic_load(&space->tree) != NULL;
}

void umm_notify_leave(struct umm_space *space, struct umm_notify_entry *entry)
{
	umm_thread.open--;
	if (entry->epoch == space->epoch)
		phases_leave(entry->counter);
}

void umm_notify_reading_begin(struct umm_space *space, struct umm_notify_reading *reading)
{
	reading->epoch = space->epoch;
	reading->counter = phases_enter(&space->changes, thread_slot());
	reading->counted = atomic_load(&space->tree) != NULL;
	if (reading->counted)
		atomic_fetch_add(&space->reading, 1);
}

void umm_notify_reading_end(struct umm_space *space, struct umm_notify_reading *reading)
{
	if (reading->epoch != space->epoch)
		return;
	if (reading->counted)
		atomic_fetch_sub(&space->reading, 1);
	phases_leave(reading->counter);
}

/* -- the end of an address space ------------------------------------------------------------ */

void umm_space_release(struct umm_space *space, int source, int reason, int promise)
{
	if (!is_ours(space))
		return;
	pthread_mutex_lock(&space->lock);
	bool first = !atomic_exchange(&space->released, true);
	pthread_mutex_unlock(&space->lock);
	if (!first)
		return;
	struct umm_notify_event event =
	        single(space, 0, UINT64_MAX, UMM_NOTIFY_RELEASE, source, reason, UMM_NOTIFY_BLOCKABLE);
	event.promise = (uint8_t)promise;
	struct cursor cursor = {0};
	struct umm_subscription *subscription;
	while ((subscription = visit(space, 0, UINT64_MAX, all_births, &cursor))) {
		if (subscription->subscriber->sleeping)
			mailbox_put_release(subscription, &event);
		else if (claim_release(subscription))
			call_here(subscription, &event);
		call_leave(subscription);
	}
	cursor = (struct cursor){0};
	while ((subscription = visit(space, 0, UINT64_MAX, all_births, &cursor))) {
		if (is_waited_for(subscription))
			mailbox_wait_release(subscription, &event);
		call_leave(subscription);
	}
}
