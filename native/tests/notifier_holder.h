/* A subscriber that keeps count of what it is told and sees at once when something cannot be right, for the
 * tests in which many do everything at the same time. */
#ifndef UMM_TESTS_NOTIFIER_HOLDER_H
#define UMM_TESTS_NOTIFIER_HOLDER_H

#include <errno.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>
#include <unistd.h>

#include "check.h"
#include "common/clock.h"
#include "notifier/notifier.h"

static const uint64_t holder_second = 1000000000;

/* The context of a subscription. */
struct holder {
	_Atomic uint64_t starts, ends; /* starts that were answered with 0 */
	_Atomic uint64_t open;         /* the ids of the open ones, scrambled and added up */
	_Atomic uint32_t others, releases, lost, inside;
	_Atomic bool gone;       /* umm_unsubscribe has returned */
	_Atomic uint32_t refuse; /* one start out of so many that may be is answered with -EAGAIN; 0: none */
	struct umm_subscription *subscription;
};

static inline uint64_t holder_random(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

static inline uint64_t holder_scramble(uint64_t id)
{
	id *= 0x9e3779b97f4a7c15;
	return id ^ id >> 29;
}

static inline struct holder *holder_enter(void *context)
{
	struct holder *holder = context;
	atomic_fetch_add(&holder->inside, 1);
	CHECK(!atomic_load(&holder->gone));
	return holder;
}

static inline void holder_leave(struct holder *holder)
{
	CHECK(!atomic_load(&holder->gone));
	atomic_fetch_sub(&holder->inside, 1);
}

static inline int holder_start(void *context, const struct umm_notify_event *event)
{
	struct holder *holder = holder_enter(context);
	uint32_t refuse = atomic_load(&holder->refuse);
	int answer = 0;
	if (refuse && !(event->flags & UMM_NOTIFY_BLOCKABLE) && event->id % refuse == 0) {
		answer = -EAGAIN;
	} else {
		atomic_fetch_add(&holder->open, holder_scramble(event->id));
		atomic_fetch_add(&holder->starts, 1);
		atomic_fetch_add(&holder->lost, event->reason == UMM_REASON_LOST);
	}
	holder_leave(holder);
	return answer;
}

static inline void holder_end(void *context, const struct umm_notify_event *event)
{
	struct holder *holder = holder_enter(context);
	atomic_fetch_sub(&holder->open, holder_scramble(event->id));
	uint64_t ends = atomic_fetch_add(&holder->ends, 1) + 1;
	CHECK(ends <= atomic_load(&holder->starts));
	holder_leave(holder);
}

static inline void holder_other(void *context, const struct umm_notify_event *event)
{
	struct holder *holder = holder_enter(context);
	CHECK(event->kind == UMM_NOTIFY_PAGE || event->kind == UMM_NOTIFY_CHANGE);
	atomic_fetch_add(&holder->others, 1);
	holder_leave(holder);
}

static inline int holder_age(void *context, const struct umm_notify_event *event)
{
	struct holder *holder = holder_enter(context);
	CHECK(event->kind == UMM_NOTIFY_AGE);
	uint32_t others = atomic_fetch_add(&holder->others, 1);
	holder_leave(holder);
	return others & 1;
}

static inline void holder_release(void *context, const struct umm_notify_event *event)
{
	struct holder *holder = holder_enter(context);
	CHECK(event->kind == UMM_NOTIFY_RELEASE);
	CHECK_EQUAL(atomic_fetch_add(&holder->releases, 1), 0);
	holder_leave(holder);
}

static const struct umm_notifier_ops holder_ops = {
        .release = holder_release,
        .invalidate_range_start = holder_start,
        .invalidate_range_end = holder_end,
        .invalidate_page = holder_other,
        .change = holder_other,
        .age = holder_age,
};

static inline struct umm_subscriber *holder_direct(const struct umm_notifier_ops *ops)
{
	struct umm_subscriber *subscriber;
	struct umm_subscriber_options options = {.name = "direct", .ops = ops};
	CHECK_OK(umm_subscriber_create(&options, &subscriber));
	return subscriber;
}

static inline struct umm_subscriber *holder_sleeping(
        const struct umm_notifier_ops *ops, uint64_t limit_ns, uint32_t queue)
{
	struct umm_subscriber *subscriber;
	struct umm_subscriber_options options = {
	        .name = "sleeping", .ops = ops, .sleeping = true, .limit_ns = limit_ns, .queue = queue};
	CHECK_OK(umm_subscriber_create(&options, &subscriber));
	return subscriber;
}

static inline void holder_subscribe(struct holder *holder, struct umm_space *space,
        struct umm_subscriber *subscriber, uint64_t start, uint64_t end)
{
	CHECK_OK(umm_subscribe(space, subscriber, start, end, holder, &holder->subscription));
}

static inline void holder_unsubscribe(struct holder *holder)
{
	CHECK_OK(umm_unsubscribe(holder->subscription));
	atomic_store(&holder->gone, true);
	CHECK_EQUAL(holder->inside, 0);
	CHECK_EQUAL(holder->releases, 1);
}

/* A subscriber's thread has answered everything. */
static inline void holder_settle(struct umm_subscriber *subscriber)
{
	struct umm_subscriber_stats stats;
	uint64_t began = umm_now_ns();
	for (unsigned idle = 0; idle < 3; idle = stats.queued || stats.busy_ns ? 0 : idle + 1) {
		CHECK(umm_now_ns() - began < 100 * holder_second);
		nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
		umm_subscriber_stats(subscriber, &stats);
	}
}

static inline void holder_check_balance(struct holder *holder)
{
	CHECK_EQUAL(holder->starts, holder->ends);
	CHECK_EQUAL(holder->open, 0);
	CHECK_EQUAL(holder->inside, 0);
}

#endif
