/* Who is told: subscribers, their subscriptions, and the calls in flight that the end of one waits for. */
#include <errno.h>
#include <linux/futex.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "notifier/internal.h"
#include "notifier/moment.h"
#include "notifier/rcu.h"

static const uint64_t settle_ns = 1000000000;
static const long nap_ns = 50000;

/* Threads that wait in umm_unsubscribe, for finding those that wait for each other. */
struct wait {
	const struct umm_subscription *target;
	const struct frame *frames;
	struct wait *next;
};
static pthread_mutex_t waits_lock = PTHREAD_MUTEX_INITIALIZER;
static struct wait *waits;

void unsubscribe_after_fork(void)
{
	pthread_mutex_init(&waits_lock, NULL);
	waits = NULL;
}

/* -- calls in flight ------------------------------------------------------------------------ */

static void futex_wake(_Atomic uint32_t *word)
{
	syscall(SYS_futex, word, FUTEX_WAKE | FUTEX_PRIVATE_FLAG, INT32_MAX, NULL, NULL, 0);
}

static void free_orphan(struct umm_subscription *subscription)
{
	struct umm_subscriber *subscriber = subscription->subscriber;
	free(subscription);
	atomic_fetch_sub(&subscriber->orphans, 1);
}

void call_leave_slow(struct umm_subscription *subscription, uint32_t old)
{
	/* Only the address is used: with the last call the memory may be gone, or another's. */
	if (old & CALLS_WAITED)
		futex_wake(&subscription->calls);
	if ((old & CALLS_ORPHAN) && (old & CALLS_MASK) == 1 && !(old & CALLS_HELD))
		free_orphan(subscription);
}

/* The end of umm_subscribe. Not one of the calls that umm_unsubscribe waits for: in a callback, that would
 * wait for umm_subscribe, which waits for the change that the callback belongs to. */
static void let_go(struct umm_subscription *subscription)
{
	uint32_t old = atomic_fetch_and(&subscription->calls, ~(uint32_t)CALLS_HELD);
	if ((old & CALLS_ORPHAN) && !(old & CALLS_MASK))
		free_orphan(subscription);
}

static uint32_t count_frames(const struct frame *frame, const struct umm_subscription *subscription)
{
	uint32_t n = 0;
	for (; frame; frame = frame->previous)
		n += frame->subscription == subscription;
	return n;
}

bool in_callback_of(const struct umm_subscription *subscription)
{
	return count_frames(umm_thread.frames, subscription) != 0;
}

bool in_callback_of_subscriber(const struct umm_subscriber *subscriber)
{
	for (const struct frame *frame = umm_thread.frames; frame; frame = frame->previous)
		if (frame->subscription->subscriber == subscriber)
			return true;
	return false;
}

bool umm_notify_in_callback(void)
{
	return umm_thread.frames != NULL;
}

int call_here(struct umm_subscription *subscription, const struct umm_notify_event *event)
{
	struct umm_subscriber *subscriber = subscription->subscriber;
	struct frame frame = {subscription, umm_thread.frames};
	bool watched = !subscriber->sleeping && subscriber->limit_ns;
	umm_thread.frames = &frame;
	if (watched)
		atomic_fetch_add_explicit(&subscriber->begun, 1, memory_order_relaxed);
	umm_notify_moment(UMM_MOMENT_CALLING, subscription);
	int result = call_ops(subscription, event);
	if (watched)
		atomic_fetch_add_explicit(&subscriber->ended, 1, memory_order_relaxed);
	umm_thread.frames = frame.previous;
	return result;
}

/* -- subscribers ---------------------------------------------------------------------------- */

static void *delivery_main(void *argument)
{
	struct umm_subscriber *subscriber = argument;
	struct umm_notify_event event;
	struct umm_subscription *subscription;
	while (umm_subscriber_next(subscriber, UINT64_MAX, &event, &subscription) == 0)
		umm_subscriber_done(subscriber, call_ops(subscription, &event));
	return NULL;
}

static int start_thread(struct umm_subscriber *subscriber)
{
	sigset_t all, saved;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &saved);
	int err = pthread_create(&subscriber->thread, NULL, delivery_main, subscriber);
	pthread_sigmask(SIG_SETMASK, &saved, NULL);
	subscriber->has_thread = !err;
	if (!err)
		pthread_setname_np(subscriber->thread, "umm-notify");
	return -err;
}

int umm_subscriber_create(const struct umm_subscriber_options *options, struct umm_subscriber **ret)
{
	enum { QUEUE = 1024, QUEUE_LEAST = 8, QUEUE_MOST = 1 << 24 };
	if (options->pull ? !options->sleeping : !options->ops)
		return -EINVAL;
	if (options->late != UMM_LATE_GO_ON && options->late != UMM_LATE_KEEP)
		return -EINVAL;
	if (options->queue && (options->queue < QUEUE_LEAST || options->queue > QUEUE_MOST))
		return -EINVAL;
	struct umm_subscriber *subscriber = calloc(1, sizeof(*subscriber));
	if (!subscriber)
		return -ENOMEM;
	strncpy(subscriber->name, options->name && options->name[0] ? options->name : "unnamed",
	        UMM_NOTIFY_NAME_MAX);
	if (options->ops)
		subscriber->ops = *options->ops;
	subscriber->sleeping = options->sleeping;
	subscriber->pull = options->pull;
	subscriber->late = options->late;
	subscriber->limit_ns = options->limit_ns;
	subscriber->epoch = atomic_load(&umm_fork_epoch);
	int err = 0;
	if (subscriber->sleeping) {
		err = mailbox_init(&subscriber->mailbox, options->queue ? options->queue : QUEUE);
		if (!err && !subscriber->pull)
			err = start_thread(subscriber);
		if (err)
			mailbox_deinit(&subscriber->mailbox);
	} else if (subscriber->limit_ns) {
		err = watch_direct(subscriber);
	}
	if (err) {
		free(subscriber);
		return err;
	}
	*ret = subscriber;
	return 0;
}

int umm_subscriber_destroy(struct umm_subscriber *subscriber)
{
	bool forked = subscriber->epoch != atomic_load(&umm_fork_epoch);
	if (!forked) {
		if (in_callback_of_subscriber(subscriber))
			return -EDEADLK;
		if (atomic_load(&subscriber->n))
			return -EBUSY;
		while (atomic_load(&subscriber->orphans))
			nanosleep(&(struct timespec){.tv_nsec = nap_ns}, NULL);
		if (subscriber->sleeping)
			umm_subscriber_close(subscriber);
		else if (subscriber->limit_ns)
			unwatch_direct(subscriber);
		if (subscriber->has_thread)
			pthread_join(subscriber->thread, NULL);
	}
	if (subscriber->sleeping)
		mailbox_deinit(&subscriber->mailbox);
	free(subscriber);
	return 0;
}

const char *umm_subscriber_name(const struct umm_subscriber *subscriber)
{
	return subscriber->name;
}

void umm_subscriber_failed(struct umm_subscriber *subscriber)
{
	atomic_fetch_add(&subscriber->failed, 1);
}

/* -- subscriptions -------------------------------------------------------------------------- */

int umm_subscribe(struct umm_space *space, struct umm_subscriber *subscriber, uint64_t start, uint64_t end,
        void *context, struct umm_subscription **ret)
{
	if (start >= end)
		return -EINVAL;
	uint32_t epoch = atomic_load(&umm_fork_epoch);
	if (subscriber->epoch != epoch || space->epoch != epoch)
		return -ESHUTDOWN;
	struct umm_subscription *subscription = calloc(1, sizeof(*subscription));
	if (!subscription)
		return -ENOMEM;
	subscription->subscriber = subscriber;
	subscription->space = space;
	subscription->context = context;
	subscription->start = start;
	subscription->end = end;
	subscription->epoch = epoch;
	/* Until the changes under way have ended, it does not know of them. */
	atomic_store_explicit(&subscription->unsettled, true, memory_order_relaxed);
	/* A callback may unsubscribe it before this is over: it is not freed until then. */
	atomic_store_explicit(&subscription->calls, CALLS_HELD, memory_order_relaxed);
	pthread_mutex_lock(&space->lock);
	int err = atomic_load(&space->released) ? -ESRCH : 0;
	if (!err) {
		subscription->birth = ++space->births;
		*ret = subscription; /* before it is published, and a callback can look for it */
		err = tree_insert(space, subscription);
	}
	if (!err) {
		space->n++;
		atomic_fetch_add(&subscriber->n, 1);
	}
	pthread_mutex_unlock(&space->lock);
	if (err) {
		free(subscription);
		return err;
	}
	/* Within a change of its own the thread would wait for itself. */
	if (!umm_thread.frames && !umm_thread.open && phases_drain(&space->changes, settle_ns) == 0)
		atomic_store(&subscription->unsettled, false);
	let_go(subscription);
	return 0;
}

bool claim_release(struct umm_subscription *subscription)
{
	if (subscription->subscriber->sleeping)
		return mailbox_claim_release(subscription);
	return !atomic_exchange(&subscription->released, true);
}

int umm_subscription_claim_release(struct umm_subscription *subscription)
{
	bool ours = subscription->epoch == atomic_load(&umm_fork_epoch) && claim_release(subscription);
	/* The call that the caller makes now. */
	if (ours && subscription->subscriber->pull)
		atomic_fetch_add(&subscription->subscriber->counts[UMM_NOTIFY_RELEASE], 1);
	return ours;
}

static bool waits_in_a_circle(const struct umm_subscription *target, unsigned depth)
{
	enum { DEPTH = 64 };
	for (const struct wait *wait = waits; wait && depth < DEPTH; wait = wait->next)
		if (count_frames(wait->frames, target) && (count_frames(umm_thread.frames, wait->target) ||
		                                                  waits_in_a_circle(wait->target, depth + 1)))
			return true;
	return false;
}

static void stop_waiting(struct wait *wait)
{
	pthread_mutex_lock(&waits_lock);
	for (struct wait **link = &waits; *link; link = &(*link)->next)
		if (*link == wait) {
			*link = wait->next;
			break;
		}
	pthread_mutex_unlock(&waits_lock);
}

/* Until only the calls of this thread's own frames are in flight. -EDEADLK: a thread that is in one waits for
 * a call that this thread is in. */
static int wait_for_calls(struct umm_subscription *subscription, uint32_t own)
{
	uint32_t word = atomic_load(&subscription->calls);
	if ((word & CALLS_MASK) == own)
		return 0;
	struct wait wait = {subscription, umm_thread.frames, NULL};
	pthread_mutex_lock(&waits_lock);
	bool circle = waits_in_a_circle(subscription, 0);
	if (!circle) {
		wait.next = waits;
		waits = &wait;
	}
	pthread_mutex_unlock(&waits_lock);
	if (circle)
		return -EDEADLK;
	for (;;) {
		word = atomic_fetch_or(&subscription->calls, CALLS_WAITED) | CALLS_WAITED;
		if ((word & CALLS_MASK) == own)
			break;
		syscall(SYS_futex, &subscription->calls, FUTEX_WAIT | FUTEX_PRIVATE_FLAG, word, NULL, NULL,
		        0);
	}
	stop_waiting(&wait);
	return 0;
}

static void release_here(struct umm_subscription *subscription)
{
	struct umm_notify_event event = {
	        .start = subscription->start,
	        .end = subscription->end,
	        .generation = umm_space_generation(subscription->space),
	        .flags = UMM_NOTIFY_BLOCKABLE,
	        .kind = UMM_NOTIFY_RELEASE,
	        .source = UMM_SOURCE_LIBRARY,
	        .reason = UMM_REASON_UNREGISTER,
	        .promise = UMM_PROMISE_ORDERED,
	        .pid = subscription->space->pid,
	};
	call_enter(subscription);
	call_here(subscription, &event);
	call_leave(subscription);
}

int umm_unsubscribe(struct umm_subscription *subscription)
{
	struct umm_subscriber *subscriber = subscription->subscriber;
	struct umm_space *space = subscription->space;
	if (subscription->epoch != atomic_load(&umm_fork_epoch)) {
		/* The parent's: nobody here has ever called it. */
		atomic_fetch_sub(&subscriber->n, 1);
		free(subscription);
		return 0;
	}
	if (!subscriber->pull && claim_release(subscription))
		release_here(subscription);
	pthread_mutex_lock(&space->lock);
	bool removed = tree_remove(space, subscription) == 0;
	space->n--;
	struct node *garbage = space->garbage;
	struct tree *trees = space->tree_garbage;
	space->garbage = NULL;
	space->tree_garbage = NULL;
	space->n_garbage = 0;
	pthread_mutex_unlock(&space->lock);
	umm_notify_moment(UMM_MOMENT_REMOVED, subscription);
	atomic_store(&subscription->dead, true);
	if (subscriber->sleeping)
		mailbox_purge(subscription);
	umm_rcu_synchronize();
	tree_free_garbage(garbage, trees);
	umm_notify_moment(UMM_MOMENT_GRACE, subscription);
	uint32_t own = count_frames(umm_thread.frames, subscription);
	int err = wait_for_calls(subscription, own);
	if (removed) {
		/* If any are left, the last of its calls frees it; until then the subscriber stays. */
		atomic_fetch_add(&subscriber->orphans, 1);
		uint32_t old = atomic_fetch_or(&subscription->calls, CALLS_ORPHAN);
		removed = !(old & (CALLS_MASK | CALLS_HELD));
		if (removed)
			atomic_fetch_sub(&subscriber->orphans, 1);
	}
	/* No memory for a tree without it: it stays there, dead, and is never freed. */
	if (removed)
		free(subscription);
	atomic_fetch_sub(&subscriber->n, 1);
	return err;
}

void umm_subscription_range(const struct umm_subscription *subscription, uint64_t *start, uint64_t *end)
{
	*start = subscription->start;
	*end = subscription->end;
}

void *umm_subscription_context(const struct umm_subscription *subscription)
{
	return subscription->context;
}

void umm_subscriber_stats(struct umm_subscriber *subscriber, struct umm_subscriber_stats *ret)
{
	memset(ret, 0, sizeof(*ret));
	for (int kind = 0; kind < UMM_NOTIFY_KINDS; kind++)
		ret->calls[kind] = atomic_load(&subscriber->counts[kind]);
	ret->again = atomic_load(&subscriber->again);
	ret->late = atomic_load(&subscriber->late_count);
	ret->lost = atomic_load(&subscriber->lost);
	ret->failed = atomic_load(&subscriber->failed);
	/* In a child the lock may be held by a thread that is not there. */
	if (subscriber->sleeping && subscriber->epoch == atomic_load(&umm_fork_epoch))
		mailbox_stats(&subscriber->mailbox, ret);
}
