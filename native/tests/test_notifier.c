/* The notifier's core: who is told what, in which order, and when it stops. */
#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "common/clock.h"
#include "notifier/notifier.h"

enum { MAX_SEEN = 256 };

struct recorder {
	struct umm_notify_event seen[MAX_SEEN];
	_Atomic unsigned n;
	int answer;         /* of invalidate_range_start */
	unsigned sleep_us;  /* in it */
	_Atomic bool block; /* in it, until cleared */
	int young;
	struct umm_subscription *subscription, *other;
	bool unsubscribe_in_start;
};

static void record(struct recorder *recorder, const struct umm_notify_event *event)
{
	/* One at a time: by one thread, or in turns. */
	unsigned n = atomic_load(&recorder->n);
	CHECK(n < MAX_SEEN);
	recorder->seen[n] = *event;
	atomic_store(&recorder->n, n + 1);
}

static void on_release(void *context, const struct umm_notify_event *event)
{
	record(context, event);
}

static int on_start(void *context, const struct umm_notify_event *event)
{
	struct recorder *recorder = context;
	record(recorder, event);
	if (recorder->sleep_us)
		usleep(recorder->sleep_us);
	while (atomic_load(&recorder->block))
		usleep(1000);
	if (recorder->unsubscribe_in_start)
		CHECK(umm_unsubscribe(recorder->subscription) == 0);
	return event->flags & UMM_NOTIFY_BLOCKABLE ? 0 : recorder->answer;
}

static void on_event(void *context, const struct umm_notify_event *event)
{
	record(context, event);
}

static int on_age(void *context, const struct umm_notify_event *event)
{
	struct recorder *recorder = context;
	record(recorder, event);
	int young = recorder->young;
	recorder->young = 0;
	return young;
}

static const struct umm_notifier_ops ops = {
        .release = on_release,
        .invalidate_range_start = on_start,
        .invalidate_range_end = on_event,
        .invalidate_page = on_event,
        .change = on_event,
        .age = on_age,
};

static struct umm_subscriber *direct(void)
{
	struct umm_subscriber *subscriber;
	struct umm_subscriber_options options = {.name = "direct", .ops = &ops};
	CHECK(umm_subscriber_create(&options, &subscriber) == 0);
	return subscriber;
}

static struct umm_subscriber *sleeping(uint64_t limit_ns, int late, uint32_t queue)
{
	struct umm_subscriber *subscriber;
	struct umm_subscriber_options options = {.name = "sleeper",
	        .ops = &ops,
	        .sleeping = true,
	        .limit_ns = limit_ns,
	        .late = late,
	        .queue = queue};
	CHECK(umm_subscriber_create(&options, &subscriber) == 0);
	return subscriber;
}

static const uint64_t second = 1000000000;

static int start(struct umm_notify_range *range, uint64_t from, uint64_t to, uint32_t flags)
{
	return umm_notify_start(range, umm_space_self(), from, to, UMM_SOURCE_USER, UMM_REASON_UNMAP, flags);
}

static void change(uint64_t from, uint64_t to)
{
	struct umm_notify_range range;
	CHECK(start(&range, from, to, UMM_NOTIFY_BLOCKABLE) == 0);
	umm_notify_end(&range, 0);
}

static void wait_for(struct recorder *recorder, unsigned n)
{
	uint64_t began = umm_now_ns();
	while (atomic_load(&recorder->n) < n) {
		CHECK(umm_now_ns() - began < 20 * second);
		usleep(500);
	}
}

static void pairs_reach_who_they_touch(void)
{
	struct recorder a = {0}, b = {0};
	struct umm_subscriber *subscriber = direct();
	CHECK(umm_subscribe(umm_space_self(), subscriber, 0x1000, 0x3000, &a, &a.subscription) == 0);
	CHECK(umm_subscribe(umm_space_self(), subscriber, 0, UINT64_MAX, &b, &b.subscription) == 0);
	change(0x3000, 0x4000);
	CHECK(a.n == 0 && b.n == 2);
	change(0x2fff, 0x3000);
	CHECK(a.n == 2 && b.n == 4);
	CHECK(a.seen[0].kind == UMM_NOTIFY_START && a.seen[1].kind == UMM_NOTIFY_END);
	CHECK(a.seen[0].id == a.seen[1].id && a.seen[0].id == b.seen[2].id);
	CHECK(umm_unsubscribe(a.subscription) == 0);
	CHECK(a.n == 3 && a.seen[2].kind == UMM_NOTIFY_RELEASE && a.seen[2].reason == UMM_REASON_UNREGISTER);
	change(0, UINT64_MAX);
	CHECK(a.n == 3 && b.n == 6);
	CHECK(umm_subscriber_destroy(subscriber) == -EBUSY);
	CHECK(umm_unsubscribe(b.subscription) == 0);
	CHECK(umm_subscriber_destroy(subscriber) == 0);
	CHECK(umm_space_subscriptions(umm_space_self()) == 0);
}

static void who_comes_in_the_middle_gets_no_end(void)
{
	struct recorder early = {0}, late = {0};
	struct umm_subscriber *subscriber = direct();
	CHECK(umm_subscribe(umm_space_self(), subscriber, 0, 100, &early, &early.subscription) == 0);
	struct umm_notify_range range, inner;
	CHECK(start(&range, 0, 10, UMM_NOTIFY_BLOCKABLE) == 0);
	CHECK(umm_subscribe(umm_space_self(), subscriber, 0, 100, &late, &late.subscription) == 0);
	uint64_t seq;
	CHECK(umm_read_begin(late.subscription, second / 100, &seq) == -ETIMEDOUT);
	CHECK(start(&inner, 5, 6, UMM_NOTIFY_BLOCKABLE) == 0);
	umm_notify_end(&inner, -ENOMEM);
	CHECK(late.n == 2 && late.seen[1].error == -ENOMEM);
	umm_notify_end(&range, 0);
	CHECK(early.n == 4 && late.n == 2);
	CHECK(umm_read_begin(late.subscription, second, &seq) == 0);
	CHECK(!umm_read_retry(late.subscription, seq));
	CHECK(umm_unsubscribe(early.subscription) == 0);
	CHECK(umm_unsubscribe(late.subscription) == 0);
	CHECK(umm_subscriber_destroy(subscriber) == 0);
}

static void again_undoes(void)
{
	struct recorder first = {0}, second_one = {.answer = -EAGAIN}, third = {0};
	struct umm_subscriber *subscriber = direct();
	CHECK(umm_subscribe(umm_space_self(), subscriber, 0, 100, &first, &first.subscription) == 0);
	CHECK(umm_subscribe(umm_space_self(), subscriber, 1, 100, &second_one, &second_one.subscription) ==
	        0);
	CHECK(umm_subscribe(umm_space_self(), subscriber, 2, 100, &third, &third.subscription) == 0);
	struct umm_notify_range range;
	CHECK(start(&range, 0, 100, 0) == -EAGAIN);
	CHECK(first.n == 2 && first.seen[1].kind == UMM_NOTIFY_END && first.seen[1].error == -EAGAIN);
	CHECK(second_one.n == 1 && third.n == 0);
	uint64_t seq;
	CHECK(umm_read_begin(second_one.subscription, second / 100, &seq) == 0);
	CHECK(start(&range, 0, 100, UMM_NOTIFY_BLOCKABLE) == 0);
	umm_notify_end(&range, 0);
	CHECK(first.n == 4 && second_one.n == 3 && third.n == 2);
	CHECK(umm_unsubscribe(first.subscription) == 0);
	CHECK(umm_unsubscribe(second_one.subscription) == 0);
	CHECK(umm_unsubscribe(third.subscription) == 0);
	struct umm_subscriber_stats stats;
	umm_subscriber_stats(subscriber, &stats);
	CHECK(stats.again == 1 && stats.calls[UMM_NOTIFY_START] == 5 && stats.calls[UMM_NOTIFY_END] == 4);
	CHECK(umm_subscriber_destroy(subscriber) == 0);
}

static void sleeping_ones_are_waited_for(void)
{
	struct recorder slow = {.sleep_us = 30000};
	struct umm_subscriber *subscriber = sleeping(10 * second, UMM_LATE_GO_ON, 0);
	CHECK(umm_subscribe(umm_space_self(), subscriber, 0, 100, &slow, &slow.subscription) == 0);
	struct umm_notify_range range;
	CHECK(start(&range, 0, 100, 0) == -EAGAIN);
	CHECK(slow.n == 0);
	uint64_t began = umm_now_ns();
	CHECK(start(&range, 0, 100, UMM_NOTIFY_BLOCKABLE) == 0);
	CHECK(slow.n == 1 && umm_now_ns() - began >= 30000000);
	umm_notify_end(&range, 0);
	wait_for(&slow, 2);
	slow.young = 1;
	uint64_t answered;
	CHECK(umm_notify_age(umm_space_self(), 0, 100, UMM_SOURCE_USER, &answered) == 1 && answered == 1);
	CHECK(umm_notify_age(umm_space_self(), 0, 100, UMM_SOURCE_USER, &answered) == 0 && answered == 1);
	umm_notify_page(umm_space_self(), 5, 6, UMM_SOURCE_USER, UMM_REASON_POISON, UMM_NOTIFY_BLOCKABLE);
	umm_notify_change(umm_space_self(), 5, 6, UMM_SOURCE_USER, UMM_REASON_BACKING, UMM_NOTIFY_BLOCKABLE);
	CHECK(slow.n == 6 && slow.seen[4].kind == UMM_NOTIFY_PAGE && slow.seen[5].kind == UMM_NOTIFY_CHANGE);
	umm_notify_post(umm_space_self(), 5, 6, 0, UMM_SOURCE_KERNEL, UMM_REASON_UNMAP, UMM_PROMISE_AFTER);
	wait_for(&slow, 8);
	CHECK(slow.seen[7].kind == UMM_NOTIFY_END && slow.seen[7].promise == UMM_PROMISE_AFTER);
	CHECK(umm_unsubscribe(slow.subscription) == 0);
	CHECK(slow.n == 9 && slow.seen[8].kind == UMM_NOTIFY_RELEASE);
	CHECK(umm_subscriber_destroy(subscriber) == 0);
}

static void late_ones_are_reported_and_overtaken(void)
{
	struct recorder stuck = {.block = true}, other = {0};
	umm_notify_set_reporter(umm_notify_keep_reports, NULL);
	struct umm_subscriber *subscriber = sleeping(second / 50, UMM_LATE_GO_ON, 0), *keeper;
	struct umm_subscriber *quick = direct();
	CHECK(umm_subscribe(umm_space_self(), subscriber, 0, 100, &stuck, &stuck.subscription) == 0);
	CHECK(umm_subscribe(umm_space_self(), quick, 0, 100, &other, &other.subscription) == 0);
	change(0, 50);
	CHECK(other.n == 2);
	struct umm_notify_report report;
	CHECK(umm_notify_take_report(&report) == 1 && strcmp(report.name, "sleeper") == 0);
	CHECK(umm_notify_take_report(&report) == 0);
	change(20, 30);
	CHECK(other.n == 4);
	atomic_store(&stuck.block, false);
	wait_for(&stuck, 6);
	CHECK(stuck.seen[0].promise == UMM_PROMISE_ORDERED && stuck.seen[2].promise == UMM_PROMISE_AFTER);
	CHECK(stuck.seen[4].reason == UMM_REASON_LOST && stuck.seen[4].start == 0 && stuck.seen[4].end == 50);
	CHECK(stuck.seen[5].kind == UMM_NOTIFY_END);
	CHECK(umm_unsubscribe(stuck.subscription) == 0);
	CHECK(umm_subscriber_destroy(subscriber) == 0);

	struct recorder kept = {.block = true};
	keeper = sleeping(second / 50, UMM_LATE_KEEP, 0);
	CHECK(umm_subscribe(umm_space_self(), keeper, 0, 100, &kept, &kept.subscription) == 0);
	struct umm_notify_range range;
	CHECK(start(&range, 0, 9, UMM_NOTIFY_BLOCKABLE | UMM_NOTIFY_VOLUNTARY) == -EBUSY);
	CHECK(other.n == 6 && other.seen[5].error == -EBUSY);
	atomic_store(&kept.block, false);
	wait_for(&kept, 2);
	CHECK(kept.seen[1].kind == UMM_NOTIFY_END && kept.seen[1].error == -EBUSY);
	CHECK(umm_unsubscribe(kept.subscription) == 0);
	CHECK(umm_unsubscribe(other.subscription) == 0);
	CHECK(umm_subscriber_destroy(keeper) == 0);
	CHECK(umm_subscriber_destroy(quick) == 0);
	CHECK(umm_notify_take_report(&report) == 1);
	umm_notify_set_reporter(NULL, NULL);
}

static void full_queues_say_lost(void)
{
	struct recorder slow = {.block = true};
	struct umm_subscriber *subscriber = sleeping(0, UMM_LATE_GO_ON, 8);
	CHECK(umm_subscribe(umm_space_self(), subscriber, 0, 1000, &slow, &slow.subscription) == 0);
	for (uint64_t i = 0; i < 100; i++)
		change(i, i + 1);
	struct umm_subscriber_stats stats;
	umm_subscriber_stats(subscriber, &stats);
	CHECK(stats.lost >= 90);
	atomic_store(&slow.block, false);
	unsigned told = (unsigned)(100 - stats.lost) * 2 + 2;
	wait_for(&slow, told);
	CHECK(slow.seen[told - 2].reason == UMM_REASON_LOST && slow.seen[told - 2].end == 100);
	unsigned starts = 0, ends = 0;
	for (unsigned i = 0; i < told; i++) {
		starts += slow.seen[i].kind == UMM_NOTIFY_START;
		ends += slow.seen[i].kind == UMM_NOTIFY_END;
	}
	CHECK(starts == ends);
	CHECK(umm_unsubscribe(slow.subscription) == 0);
	CHECK(umm_subscriber_destroy(subscriber) == 0);
}

static void unsubscribe_in_a_callback(bool sleeps)
{
	struct recorder self = {.unsubscribe_in_start = true};
	struct umm_subscriber *subscriber = sleeps ? sleeping(10 * second, UMM_LATE_GO_ON, 0) : direct();
	CHECK(umm_subscribe(umm_space_self(), subscriber, 0, 100, &self, &self.subscription) == 0);
	change(0, 1);
	change(0, 1);
	CHECK(self.n == 2 && self.seen[1].kind == UMM_NOTIFY_RELEASE);
	int err;
	while ((err = umm_subscriber_destroy(subscriber)) == -EBUSY)
		usleep(1000); /* its thread is still in umm_unsubscribe */
	CHECK(err == 0);
}

static void release_comes_once(void)
{
	struct recorder a = {0}, b = {0}, c = {0};
	struct umm_space *space;
	struct umm_subscriber *subscriber = direct(), *sleeper = sleeping(10 * second, UMM_LATE_GO_ON, 0);
	CHECK(umm_space_create(1, &space) == 0);
	CHECK(umm_subscribe(space, subscriber, 0, 100, &a, &a.subscription) == 0);
	CHECK(umm_subscribe(space, sleeper, 0, 100, &b, &b.subscription) == 0);
	CHECK(umm_space_destroy(space) == -EBUSY);
	umm_space_release(space, UMM_SOURCE_PIDFD, UMM_REASON_EXIT, UMM_PROMISE_AFTER);
	umm_space_release(space, UMM_SOURCE_PIDFD, UMM_REASON_EXIT, UMM_PROMISE_AFTER);
	CHECK(a.n == 1 && b.n == 1 && b.seen[0].reason == UMM_REASON_EXIT && b.seen[0].pid == 1);
	CHECK(umm_subscribe(space, subscriber, 0, 100, &c, &c.subscription) == -ESRCH);
	uint64_t seq;
	CHECK(umm_read_begin(a.subscription, second, &seq) == -ESRCH);
	CHECK(umm_unsubscribe(a.subscription) == 0 && umm_unsubscribe(b.subscription) == 0);
	CHECK(a.n == 1 && b.n == 1);
	CHECK(umm_space_destroy(space) == 0);
	CHECK(umm_subscriber_destroy(subscriber) == 0 && umm_subscriber_destroy(sleeper) == 0);
}

static void a_child_starts_without(void)
{
	struct recorder a = {0}, b = {0};
	struct umm_subscriber *subscriber = direct(), *sleeper = sleeping(10 * second, UMM_LATE_GO_ON, 0);
	CHECK(umm_subscribe(umm_space_self(), subscriber, 0, 100, &a, &a.subscription) == 0);
	CHECK(umm_subscribe(umm_space_self(), sleeper, 0, 100, &b, &b.subscription) == 0);
	pid_t child = fork();
	CHECK(child >= 0);
	if (!child) {
		unsigned before = a.n;
		change(0, 100);
		CHECK(a.n == before && umm_space_subscriptions(umm_space_self()) == 0);
		CHECK(umm_unsubscribe(a.subscription) == 0 && umm_unsubscribe(b.subscription) == 0);
		CHECK(umm_subscriber_destroy(subscriber) == 0 && umm_subscriber_destroy(sleeper) == 0);
		struct recorder own = {0};
#ifdef __SANITIZE_THREAD__
		subscriber = direct(); /* it allows no threads after a fork */
#else
		subscriber = sleeping(10 * second, UMM_LATE_GO_ON, 0);
#endif
		CHECK(umm_subscribe(umm_space_self(), subscriber, 0, 100, &own, &own.subscription) == 0);
		struct umm_notify_range range;
		CHECK(start(&range, 0, 100, UMM_NOTIFY_BLOCKABLE) == 0);
		CHECK(own.n == 1);
		umm_notify_end(&range, 0);
		CHECK(umm_unsubscribe(own.subscription) == 0);
		CHECK(umm_subscriber_destroy(subscriber) == 0);
		_exit(0);
	}
	int status;
	CHECK(waitpid(child, &status, 0) == child && status == 0);
	wait_for(&b, 2);
	CHECK(a.n == 2 && a.seen[0].reason == UMM_REASON_FORK && b.seen[1].kind == UMM_NOTIFY_END);
	CHECK(umm_unsubscribe(a.subscription) == 0 && umm_unsubscribe(b.subscription) == 0);
	CHECK(umm_subscriber_destroy(subscriber) == 0 && umm_subscriber_destroy(sleeper) == 0);
}

int main(void)
{
	pairs_reach_who_they_touch();
	who_comes_in_the_middle_gets_no_end();
	again_undoes();
	sleeping_ones_are_waited_for();
	late_ones_are_reported_and_overtaken();
	full_queues_say_lost();
	unsubscribe_in_a_callback(false);
	unsubscribe_in_a_callback(true);
	release_comes_once();
	a_child_starts_without();
	return 0;
}
