/* Starts and ends come in pairs whatever happens, reach exactly those whom the range touches, and no reader
 * believes in a moment that a change passed through. */
#include <pthread.h>
#include <stdlib.h>

#include "notifier_holder.h"

static int start(struct umm_notify_range *range, uint64_t from, uint64_t to, uint32_t flags)
{
	return umm_notify_start(range, umm_space_self(), from, to, UMM_SOURCE_USER, UMM_REASON_REMOVE, flags);
}

static void change(uint64_t from, uint64_t to, int error)
{
	struct umm_notify_range range;
	CHECK_OK(start(&range, from, to, UMM_NOTIFY_BLOCKABLE));
	umm_notify_end(&range, error);
}

/* -- who would have to wait, one of many ----------------------------------------------------- */

enum { MANY = 40 };

static void those_told_before_are_told_the_end(void)
{
	struct umm_subscriber *direct = holder_direct(&holder_ops);
	struct umm_subscriber *posted = holder_sleeping(&holder_ops, 0, 0);
	struct umm_subscriber *waited = holder_sleeping(&holder_ops, 60 * holder_second, 0);
	uint64_t random = 42, refused = 0, made = 0;
	struct holder holders[MANY] = {0};
	for (uint64_t i = 0; i < MANY; i++)
		holder_subscribe(&holders[i], umm_space_self(), i % 4 ? direct : posted, i, i + MANY);
	for (int round = 0; round < 400; round++) {
		struct umm_notify_range range;
		uint64_t from = holder_random(&random) % MANY, who = holder_random(&random) % MANY;
		/* The one that refuses; from half of the rounds on one that always has to be waited for, too.
		 */
		holders[who].refuse = who % 4 && round % 3 ? 1 : 0;
		if (round == 200) {
			CHECK_OK(umm_unsubscribe(holders[MANY - 1].subscription));
			memset(&holders[MANY - 1], 0, sizeof(holders[MANY - 1]));
			holder_subscribe(&holders[MANY - 1], umm_space_self(), waited, MANY - 1, MANY + 1);
		}
		int err = start(&range, from, from + 1 + holder_random(&random) % MANY, 0);
		CHECK(!err || err == -EAGAIN);
		refused += err != 0;
		made += !err;
		if (!err)
			umm_notify_end(&range, round % 2 ? -EINTR : 0);
		holders[who].refuse = 0;
		for (int i = 0; i < MANY; i++)
			if (i % 4 && i != MANY - 1)
				holder_check_balance(&holders[i]);
	}
	CHECK(refused && made);
	holder_settle(posted);
	holder_settle(waited);
	for (int i = 0; i < MANY; i++) {
		holder_check_balance(&holders[i]);
		holder_unsubscribe(&holders[i]);
	}
	CHECK_OK(umm_subscriber_destroy(direct));
	CHECK_OK(umm_subscriber_destroy(posted));
	CHECK_OK(umm_subscriber_destroy(waited));
}

/* -- subscriptions that come and go within a change ------------------------------------------- */

static void come_and_go_in_the_middle(bool sleeping)
{
	struct umm_subscriber *subscriber =
	        sleeping ? holder_sleeping(&holder_ops, 60 * holder_second, 0) : holder_direct(&holder_ops);
	struct holder stays = {0}, goes = {0}, comes = {0}, passes = {0};
	struct umm_notify_range outer, inner;
	holder_subscribe(&stays, umm_space_self(), subscriber, 0, 100);
	holder_subscribe(&goes, umm_space_self(), subscriber, 0, 100);
	CHECK_OK(start(&outer, 0, 50, UMM_NOTIFY_BLOCKABLE));
	holder_unsubscribe(&goes);
	holder_subscribe(&comes, umm_space_self(), subscriber, 0, 100);
	CHECK_OK(start(&inner, 10, 20, UMM_NOTIFY_BLOCKABLE));
	holder_subscribe(&passes, umm_space_self(), subscriber, 0, 100);
	holder_unsubscribe(&passes);
	umm_notify_end(&inner, -ENOMEM);
	umm_notify_end(&outer, 0);
	if (sleeping)
		holder_settle(subscriber);
	CHECK_EQUAL(goes.starts, 1);
	CHECK_EQUAL(goes.ends, 0);
	CHECK_EQUAL(passes.starts + passes.ends, 0);
	CHECK_EQUAL(comes.starts, 1);
	CHECK_EQUAL(stays.starts, 2);
	holder_check_balance(&comes);
	holder_check_balance(&stays);
	holder_unsubscribe(&comes);
	holder_unsubscribe(&stays);
	CHECK_OK(umm_subscriber_destroy(subscriber));
}

/* -- a full queue ---------------------------------------------------------------------------- */

struct slow {
	struct holder holder;
	_Atomic bool block;
	uint64_t lost_start, lost_end;
};

static int slow_start(void *context, const struct umm_notify_event *event)
{
	struct slow *slow = context;
	while (atomic_load(&slow->block))
		nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
	if (event->reason == UMM_REASON_LOST) {
		slow->lost_start = event->start;
		slow->lost_end = event->end;
	}
	return holder_start(&slow->holder, event);
}

static void slow_end(void *context, const struct umm_notify_event *event)
{
	holder_end(&((struct slow *)context)->holder, event);
}

static void a_full_queue_loses_pairs_as_a_whole(void)
{
	static const struct umm_notifier_ops ops = {
	        .invalidate_range_start = slow_start, .invalidate_range_end = slow_end};
	enum { CHANGES = 500, QUEUE = 16, DEPTH = 20 };
	struct umm_subscriber *subscriber = holder_sleeping(&ops, 0, QUEUE);
	struct slow slow = {.block = true};
	struct umm_notify_range nest[DEPTH];
	struct umm_subscription *subscription;
	CHECK_OK(umm_subscribe(umm_space_self(), subscriber, 0, UINT64_MAX, &slow, &subscription));
	/* Deeper than the queue: each start that is told has room for its end. */
	for (int i = 0; i < DEPTH; i++)
		CHECK_OK(start(&nest[i], 1000, 1001, UMM_NOTIFY_BLOCKABLE));
	for (uint64_t i = 0; i < CHANGES; i++)
		change(2000 + i, 2001 + i, 0);
	for (int i = DEPTH - 1; i >= 0; i--)
		umm_notify_end(&nest[i], 0);
	struct umm_subscriber_stats stats;
	umm_subscriber_stats(subscriber, &stats);
	CHECK(stats.lost > CHANGES && stats.lost < CHANGES + DEPTH);
	atomic_store(&slow.block, false);
	holder_settle(subscriber);
	CHECK_EQUAL(slow.holder.lost, 1);
	CHECK_EQUAL(slow.holder.starts, CHANGES + DEPTH - stats.lost + 1);
	CHECK_EQUAL(slow.lost_start, 1000);
	CHECK_EQUAL(slow.lost_end, 2000 + CHANGES);
	holder_check_balance(&slow.holder);
	change(0, 1, 0); /* and then it is told as before */
	holder_settle(subscriber);
	CHECK_EQUAL(slow.holder.starts, CHANGES + DEPTH - stats.lost + 2);
	holder_check_balance(&slow.holder);
	CHECK_OK(umm_unsubscribe(subscription));
	CHECK_OK(umm_subscriber_destroy(subscriber));
}

/* -- ten thousand intervals against a list ---------------------------------------------------- */

enum { INTERVALS = 10000, SPACE = 1 << 20, LOOKS = 120 };

struct interval {
	uint64_t start, end;
	uint32_t starts, ends;
	struct umm_subscription *subscription;
};

static int interval_start(void *context, const struct umm_notify_event *event)
{
	struct interval *interval = context;
	(void)event;
	interval->starts++;
	return 0;
}

static void interval_end(void *context, const struct umm_notify_event *event)
{
	struct interval *interval = context;
	(void)event;
	interval->ends++;
}

static void compare(struct interval *intervals, uint64_t *random, uint64_t *found)
{
	for (int look = 0; look < LOOKS; look++) {
		uint64_t from = holder_random(random) % SPACE;
		uint64_t to = from + 1 +
		              holder_random(random) % (look % 3          ? 200
		                                              : look % 9 ? SPACE / 8
		                                                         : SPACE);
		for (int i = 0; i < INTERVALS; i++)
			intervals[i].starts = intervals[i].ends = 0;
		change(from, to, 0);
		for (int i = 0; i < INTERVALS; i++) {
			struct interval *one = &intervals[i];
			uint32_t expected = one->subscription && one->start < to && from < one->end;
			CHECK_EQUAL(one->starts, expected);
			CHECK_EQUAL(one->ends, expected);
			*found += expected;
		}
	}
}

static void every_found_set_is_the_same(void)
{
	static const struct umm_notifier_ops ops = {
	        .invalidate_range_start = interval_start, .invalidate_range_end = interval_end};
	struct umm_subscriber *subscriber = holder_direct(&ops);
	struct interval *intervals = calloc(INTERVALS, sizeof(*intervals));
	uint64_t random = 4711, found = 0;
	CHECK(intervals);
	for (int i = 0; i < INTERVALS; i++) {
		struct interval *one = &intervals[i];
		/* Many small ones, some large, some with the same start, some the same altogether. */
		one->start = i % 5 ? holder_random(&random) % SPACE : intervals[i / 2].start;
		one->end = one->start + 1 + holder_random(&random) % (i % 100 ? 300 : SPACE);
		if (i % 50 == 1)
			one->end = one->start + 1;
		if (i % 100 == 99)
			*one = (struct interval){
			        .start = intervals[i - 1].start, .end = intervals[i - 1].end};
		CHECK_OK(umm_subscribe(
		        umm_space_self(), subscriber, one->start, one->end, one, &one->subscription));
	}
	CHECK_EQUAL(umm_space_subscriptions(umm_space_self()), INTERVALS);
	compare(intervals, &random, &found);
	for (int i = 0; i < INTERVALS; i++)
		if (holder_random(&random) % 2) {
			CHECK_OK(umm_unsubscribe(intervals[i].subscription));
			intervals[i].subscription = NULL;
		}
	compare(intervals, &random, &found);
	CHECK(found > INTERVALS);
	for (int i = 0; i < INTERVALS; i++)
		if (intervals[i].subscription)
			CHECK_OK(umm_unsubscribe(intervals[i].subscription));
	CHECK_EQUAL(umm_space_subscriptions(umm_space_self()), 0);
	CHECK_OK(umm_subscriber_destroy(subscriber));
	free(intervals);
}

/* -- readers without a lock ------------------------------------------------------------------- */

enum { READERS = 3, ACCEPTED = 2000 };

static struct {
	_Atomic uint64_t left, right; /* the same, but within a change */
	_Atomic bool over;
	struct holder holder;
} pair;

static void *change_pair(void *argument)
{
	(void)argument;
	for (uint64_t value = 1; !atomic_load(&pair.over); value++) {
		struct umm_notify_range range;
		CHECK_OK(start(&range, 10, 20, UMM_NOTIFY_BLOCKABLE));
		atomic_store_explicit(&pair.left, value, memory_order_relaxed);
		if (value % 64 == 0)
			sched_yield();
		atomic_store_explicit(&pair.right, value, memory_order_relaxed);
		umm_notify_end(&range, 0);
		if (value % 16 == 0)
			nanosleep(&(struct timespec){.tv_nsec = 1000}, NULL);
	}
	return NULL;
}

static void *read_pair(void *rejected)
{
	struct umm_subscription *subscription = pair.holder.subscription;
	for (int accepted = 0; accepted < ACCEPTED;) {
		uint64_t seq;
		CHECK_OK(umm_read_begin(subscription, 100 * holder_second, &seq));
		uint64_t left = atomic_load_explicit(&pair.left, memory_order_relaxed);
		if (accepted % 2 == 0)
			sched_yield();
		uint64_t right = atomic_load_explicit(&pair.right, memory_order_relaxed);
		if (umm_read_retry(subscription, seq)) {
			++*(uint64_t *)rejected;
			continue;
		}
		CHECK_EQUAL(left, right);
		accepted++;
	}
	return NULL;
}

static void no_reader_believes_a_change(void)
{
	struct umm_subscriber *subscriber = holder_direct(&holder_ops);
	uint64_t rejected[READERS] = {0}, seq;
	pthread_t writer, readers[READERS];
	holder_subscribe(&pair.holder, umm_space_self(), subscriber, 0, 100);
	CHECK_OK(umm_read_begin(pair.holder.subscription, holder_second, &seq));
	CHECK(!umm_read_retry(pair.holder.subscription, seq));
	change(100, 200, 0); /* of another interval */
	CHECK(!umm_read_retry(pair.holder.subscription, seq));
	change(99, 200, 0);
	CHECK(umm_read_retry(pair.holder.subscription, seq));
	CHECK_OK(-pthread_create(&writer, NULL, change_pair, NULL));
	for (int i = 0; i < READERS; i++)
		CHECK_OK(-pthread_create(&readers[i], NULL, read_pair, &rejected[i]));
	for (int i = 0; i < READERS; i++)
		CHECK_OK(-pthread_join(readers[i], NULL));
	atomic_store(&pair.over, true);
	CHECK_OK(-pthread_join(writer, NULL));
	printf("rejected: %llu %llu %llu\n", (unsigned long long)rejected[0], (unsigned long long)rejected[1],
	        (unsigned long long)rejected[2]);
	holder_check_balance(&pair.holder);
	holder_unsubscribe(&pair.holder);
	CHECK_OK(umm_subscriber_destroy(subscriber));
}

int main(void)
{
	those_told_before_are_told_the_end();
	come_and_go_in_the_middle(false);
	come_and_go_in_the_middle(true);
	a_full_queue_loses_pairs_as_a_whole();
	every_found_set_is_the_same();
	no_reader_believes_a_change();
	return 0;
}
