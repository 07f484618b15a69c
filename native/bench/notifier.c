#include "bench/notifier.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <unistd.h>

#include "common/clock.h"
#include "notifier/notifier.h"

static const uint64_t answer_limit_ns = 10000000000; /* of sleeping subscribers: they answer at once */
static const uint64_t somewhere = 1ull << 40;        /* nothing is read or written there */

static int count_start(void *context, const struct umm_notify_event *event)
{
	(void)event;
	if (context)
		++*(uint64_t *)context;
	return 0;
}

static void take_end(void *context, const struct umm_notify_event *event)
{
	(void)context;
	(void)event;
}

static const struct umm_notifier_ops counting_ops = {
        .invalidate_range_start = count_start,
        .invalidate_range_end = take_end,
};

/* Subscriptions of one subscriber. */
struct group {
	struct umm_subscriber *subscriber;
	struct umm_subscription **subscriptions;
	uint64_t n;
};

static int group_init(struct group *group, uint64_t capacity, bool sleeping)
{
	*group = (struct group){.subscriptions = calloc(capacity ? capacity : 1, sizeof(void *))};
	if (!group->subscriptions)
		return -ENOMEM;
	const struct umm_subscriber_options options = {
	        .name = "bench",
	        .ops = &counting_ops,
	        .sleeping = sleeping,
	        .limit_ns = sleeping ? answer_limit_ns : 0,
	};
	int err = umm_subscriber_create(&options, &group->subscriber);
	if (err)
		free(group->subscriptions);
	return err;
}

static void group_leave(struct group *group)
{
	while (group->n)
		umm_unsubscribe(group->subscriptions[--group->n]);
}

static void group_deinit(struct group *group)
{
	group_leave(group);
	umm_subscriber_destroy(group->subscriber);
	free(group->subscriptions);
}

static int group_join(struct group *group, uint64_t start, uint64_t end, void *context)
{
	int err = umm_subscribe(
	        umm_space_self(), group->subscriber, start, end, context, &group->subscriptions[group->n]);
	group->n += !err;
	return err;
}

static void pair(uint64_t start, uint64_t end)
{
	struct umm_notify_range range;
	if (umm_notify_start(&range, umm_space_self(), start, end, UMM_SOURCE_USER, UMM_REASON_OTHER,
	            UMM_NOTIFY_BLOCKABLE) == 0)
		umm_notify_end(&range, 0);
}

int umm_bench_notify_floor(int kind, uint64_t times, uint64_t *elapsed_ns)
{
	static _Atomic uint64_t counter;
	int (*volatile start)(void *, const struct umm_notify_event *) = count_start;
	void (*volatile end)(void *, const struct umm_notify_event *) = take_end;
	const struct umm_notify_event event = {.start = somewhere};
	uint64_t counted = 0, began = umm_now_ns();
	for (uint64_t i = 0; i < times; i++) {
		if (kind == UMM_NOTIFY_FLOOR_ATOMIC) {
			atomic_fetch_add(&counter, 1);
			atomic_fetch_sub(&counter, 1);
		} else {
			start(&counted, &event);
			end(&counted, &event);
		}
	}
	*elapsed_ns = umm_now_ns() - began;
	return 0;
}

int umm_bench_notify_pair(uint32_t subscribers, int sleeping, uint64_t times, uint64_t *elapsed_ns)
{
	struct group group;
	uint64_t length = (uint64_t)sysconf(_SC_PAGESIZE);
	int err = group_init(&group, subscribers, sleeping);
	if (err)
		return err;
	for (uint32_t i = 0; i < subscribers && !err; i++)
		err = group_join(&group, 0, UINT64_MAX, NULL);
	uint64_t began = umm_now_ns();
	for (uint64_t i = 0; i < times && !err; i++)
		pair(somewhere, somewhere + length);
	*elapsed_ns = umm_now_ns() - began;
	group_deinit(&group);
	return err;
}

int umm_bench_notify_intervals(uint32_t intervals, uint64_t times, uint64_t *elapsed_ns)
{
	if (!intervals)
		return -EINVAL;
	struct group group;
	uint64_t length = (uint64_t)sysconf(_SC_PAGESIZE), told = 0;
	uint32_t random = 1;
	int err = group_init(&group, intervals, false);
	if (err)
		return err;
	for (uint64_t i = 0; i < intervals && !err; i++)
		err = group_join(&group, somewhere + 2 * i * length, somewhere + (2 * i + 1) * length, &told);
	uint64_t began = umm_now_ns();
	for (uint64_t i = 0; i < times && !err; i++) {
		random = random * 1664525u + 1013904223u;
		uint64_t start = somewhere + 2 * ((uint64_t)random * intervals >> 32) * length;
		pair(start, start + length);
	}
	*elapsed_ns = umm_now_ns() - began;
	group_deinit(&group);
	return err ? err : told == times ? 0 : -EIO;
}

int umm_bench_notify_batch(uint64_t times, uint64_t *elapsed_ns)
{
	uint64_t began = umm_now_ns();
	for (uint64_t i = 0; i < times; i++) {
		struct umm_notify_entry entry;
		umm_notify_enter(umm_space_self(), &entry);
		umm_notify_leave(umm_space_self(), &entry);
	}
	*elapsed_ns = umm_now_ns() - began;
	return 0;
}

static void *invalidate_main(void *stop)
{
	uint64_t length = (uint64_t)sysconf(_SC_PAGESIZE);
	while (!atomic_load((_Atomic bool *)stop))
		pair(somewhere, somewhere + length);
	return NULL;
}

int umm_bench_notify_register(uint64_t times, int loaded, uint64_t *subscribe_ns, uint64_t *unsubscribe_ns)
{
	struct group group;
	uint64_t length = (uint64_t)sysconf(_SC_PAGESIZE);
	_Atomic bool stop = false;
	pthread_t thread;
	int err = group_init(&group, times, false);
	if (err)
		return err;
	if (loaded)
		err = -pthread_create(&thread, NULL, invalidate_main, &stop);
	if (!err) {
		uint64_t began = umm_now_ns();
		/* Some of them are told of what the other thread does. */
		for (uint64_t i = 0; i < times && !err; i++)
			err = group_join(
			        &group, somewhere + i % 16 * length, somewhere + (i % 16 + 1) * length, NULL);
		uint64_t joined = umm_now_ns();
		group_leave(&group);
		*unsubscribe_ns = umm_now_ns() - joined;
		*subscribe_ns = joined - began;
		atomic_store(&stop, true);
		if (loaded)
			pthread_join(thread, NULL);
	}
	group_deinit(&group);
	return err;
}

struct umm_bench_watcher {
	struct group group;
	uint64_t told;
};

int umm_bench_watcher_create(uint64_t start, uint64_t end, struct umm_bench_watcher **ret)
{
	struct umm_bench_watcher *watcher = calloc(1, sizeof(*watcher));
	if (!watcher)
		return -ENOMEM;
	int err = group_init(&watcher->group, 1, false);
	if (err) {
		free(watcher);
		return err;
	}
	err = group_join(&watcher->group, start, end, &watcher->told);
	if (err) {
		group_deinit(&watcher->group);
		free(watcher);
		return err;
	}
	*ret = watcher;
	return 0;
}

uint64_t umm_bench_watcher_destroy(struct umm_bench_watcher *watcher)
{
	group_deinit(&watcher->group);
	uint64_t told = watcher->told;
	free(watcher);
	return told;
}
