/* What callbacks do that is hard to survive: they unregister themselves, another, each other; they never
 * return; they are released by two sides at once. */
#include <pthread.h>

#include "notifier_holder.h"

static void change(struct umm_space *space, uint64_t start, uint64_t end)
{
	struct umm_notify_range range;
	CHECK_OK(umm_notify_start(
	        &range, space, start, end, UMM_SOURCE_USER, UMM_REASON_UNMAP, UMM_NOTIFY_BLOCKABLE));
	umm_notify_end(&range, 0);
}

static void wait_until(_Atomic uint32_t *word, uint32_t value)
{
	uint64_t began = umm_now_ns();
	while (atomic_load(word) != value) {
		CHECK(umm_now_ns() - began < 100 * holder_second);
		nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
	}
}

static struct umm_subscriber *of_class(bool sleeping, const struct umm_notifier_ops *ops)
{
	return sleeping ? holder_sleeping(ops, 60 * holder_second, 0) : holder_direct(ops);
}

static void destroy(struct umm_subscriber *subscriber)
{
	int err;
	uint64_t began = umm_now_ns();
	/* Its thread may be about to return from the callback that unregistered the last subscription. */
	while ((err = umm_subscriber_destroy(subscriber)) == -EBUSY) {
		CHECK(umm_now_ns() - began < 100 * holder_second);
		nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
	}
	CHECK_OK(err);
}

/* -- unregistering from within -------------------------------------------------------------- */

struct unregistering {
	struct umm_subscription *subscription;
	struct unregistering *victim;
	_Atomic uint32_t *meeting; /* both are in their callback before either unregisters */
	_Atomic uint32_t calls, releases, returned;
	_Atomic int result;
};

static int unregister_victim(void *context, const struct umm_notify_event *event)
{
	struct unregistering *self = context;
	(void)event;
	atomic_fetch_add(&self->calls, 1);
	if (!self->victim)
		return 0;
	if (self->meeting) {
		atomic_fetch_add(self->meeting, 1);
		wait_until(self->meeting, 2);
	}
	atomic_store(&self->result, umm_unsubscribe(self->victim->subscription));
	atomic_fetch_add(&self->returned, 1);
	return 0;
}

static void unregister_released(void *context, const struct umm_notify_event *event)
{
	struct unregistering *self = context;
	(void)event;
	CHECK_EQUAL(atomic_fetch_add(&self->releases, 1), 0);
}

static const struct umm_notifier_ops unregister_ops = {
        .release = unregister_released,
        .invalidate_range_start = unregister_victim,
};

static void own(bool sleeping)
{
	struct umm_subscriber *subscriber = of_class(sleeping, &unregister_ops);
	struct unregistering self = {.result = 1};
	self.victim = &self;
	CHECK_OK(umm_subscribe(umm_space_self(), subscriber, 0, 100, &self, &self.subscription));
	change(umm_space_self(), 0, 1);
	wait_until(&self.returned, 1);
	change(umm_space_self(), 0, 1);
	CHECK_EQUAL(self.result, 0);
	CHECK_EQUAL(self.calls, 1);
	CHECK_EQUAL(self.releases, 1);
	destroy(subscriber);
}

/* Of the same subscriber, or of one of the other class. */
static void anothers(bool sleeping, bool others)
{
	struct umm_subscriber *subscriber = of_class(sleeping, &unregister_ops);
	struct umm_subscriber *second = others ? of_class(!sleeping, &unregister_ops) : subscriber;
	struct unregistering victim = {0}, self = {.victim = &victim, .result = 1};
	CHECK_OK(umm_subscribe(umm_space_self(), subscriber, 0, 100, &self, &self.subscription));
	CHECK_OK(umm_subscribe(umm_space_self(), second, 50, 100, &victim, &victim.subscription));
	change(umm_space_self(), 50, 60);
	wait_until(&self.returned, 1);
	uint32_t calls = victim.calls;
	CHECK_EQUAL(self.result, 0);
	CHECK_EQUAL(victim.releases, 1);
	self.victim = NULL;
	change(umm_space_self(), 50, 60);
	CHECK_EQUAL(self.calls, 2);
	CHECK_EQUAL(victim.calls, calls);
	CHECK_OK(umm_unsubscribe(self.subscription));
	destroy(subscriber);
	if (others)
		destroy(second);
}

static void *change_one(void *start)
{
	change(umm_space_self(), *(uint64_t *)start, *(uint64_t *)start + 1);
	return NULL;
}

static void each_other(bool sleeping, bool other_sleeping)
{
	_Atomic uint32_t meeting = 0;
	struct unregistering pair[2] = {{.result = 1}, {.result = 1}};
	struct umm_subscriber *subscribers[2];
	uint64_t starts[2] = {0, 1000};
	pthread_t threads[2];
	for (int i = 0; i < 2; i++) {
		subscribers[i] = of_class(i ? other_sleeping : sleeping, &unregister_ops);
		pair[i].victim = &pair[1 - i];
		pair[i].meeting = &meeting;
		CHECK_OK(umm_subscribe(umm_space_self(), subscribers[i], starts[i], starts[i] + 1, &pair[i],
		        &pair[i].subscription));
	}
	for (int i = 0; i < 2; i++)
		CHECK_OK(-pthread_create(&threads[i], NULL, change_one, &starts[i]));
	for (int i = 0; i < 2; i++) {
		CHECK_OK(-pthread_join(threads[i], NULL));
		wait_until(&pair[i].returned, 1);
	}
	/* One of the two cannot be waited for; the other can, for the first has given up. */
	CHECK_EQUAL(pair[0].result + pair[1].result, -EDEADLK);
	CHECK(pair[0].result == 0 || pair[1].result == 0);
	change(umm_space_self(), 0, 2000);
	for (int i = 0; i < 2; i++) {
		CHECK_EQUAL(pair[i].calls, 1);
		CHECK_EQUAL(pair[i].releases, 1);
		destroy(subscribers[i]);
	}
	CHECK_EQUAL(umm_space_subscriptions(umm_space_self()), 0);
}

/* -- never returning ------------------------------------------------------------------------ */

struct blocking {
	_Atomic uint32_t inside, free;
};

static int block(void *context, const struct umm_notify_event *event)
{
	struct blocking *blocking = context;
	(void)event;
	atomic_store(&blocking->inside, 1);
	while (!atomic_load(&blocking->free))
		nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
	return 0;
}

static const struct umm_notifier_ops blocking_ops = {.invalidate_range_start = block};

static void take_report(const char *name)
{
	struct umm_notify_report report;
	uint64_t began = umm_now_ns();
	while (!umm_notify_take_report(&report)) {
		CHECK(umm_now_ns() - began < 100 * holder_second);
		nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
	}
	CHECK(strcmp(report.name, name) == 0);
	CHECK(report.waited_ns > 0);
	CHECK_EQUAL(umm_notify_take_report(&report), 0);
}

/* A sleeping callback that blocks is reported once, by name, and the others go on. */
static void blocks_for_ever(void)
{
	enum { CHANGES = 50 };
	struct blocking blocking = {0};
	struct holder direct_one = {0}, sleeping_one = {0};
	struct umm_subscriber *stuck, *direct = holder_direct(&holder_ops);
	struct umm_subscriber *sleeping = holder_sleeping(&holder_ops, 60 * holder_second, 0);
	struct umm_subscription *subscription;
	struct umm_subscriber_options options = {.name = "stuck one",
	        .ops = &blocking_ops,
	        .sleeping = true,
	        .limit_ns = holder_second / 100,
	        .queue = 8};
	CHECK_OK(umm_subscriber_create(&options, &stuck));
	CHECK_OK(umm_subscribe(umm_space_self(), stuck, 0, 100, &blocking, &subscription));
	holder_subscribe(&direct_one, umm_space_self(), direct, 0, 100);
	holder_subscribe(&sleeping_one, umm_space_self(), sleeping, 0, 100);
	for (int i = 0; i < CHANGES; i++)
		change(umm_space_self(), 0, 1);
	CHECK(blocking.inside);
	take_report("stuck one");
	CHECK_EQUAL(direct_one.starts, CHANGES);
	CHECK_EQUAL(sleeping_one.starts, CHANGES);
	struct umm_subscriber_stats stats;
	umm_subscriber_stats(stuck, &stats);
	CHECK_EQUAL(stats.late, CHANGES);
	CHECK(stats.busy_ns > 0);
	CHECK(stats.lost > 0);
	holder_settle(sleeping);
	holder_check_balance(&direct_one);
	holder_check_balance(&sleeping_one);
	holder_unsubscribe(&direct_one);
	holder_unsubscribe(&sleeping_one);
	atomic_store(&blocking.free, 1);
	CHECK_OK(umm_unsubscribe(subscription));
	CHECK_OK(umm_subscriber_destroy(stuck));
	CHECK_OK(umm_subscriber_destroy(sleeping));
	CHECK_OK(umm_subscriber_destroy(direct));
}

/* Nobody can take a direct one out of the thread it runs in, but who it is can be said. */
static void blocks_directly(void)
{
	static uint64_t start;
	struct blocking blocking = {0};
	struct umm_subscriber *stuck;
	struct umm_subscription *subscription;
	struct umm_subscriber_options options = {
	        .name = "direct and stuck", .ops = &blocking_ops, .limit_ns = holder_second / 100};
	pthread_t thread;
	CHECK_OK(umm_subscriber_create(&options, &stuck));
	CHECK_OK(umm_subscribe(umm_space_self(), stuck, 0, 100, &blocking, &subscription));
	CHECK_OK(-pthread_create(&thread, NULL, change_one, &start));
	take_report("direct and stuck");
	atomic_store(&blocking.free, 1);
	CHECK_OK(-pthread_join(thread, NULL));
	CHECK_OK(umm_unsubscribe(subscription));
	CHECK_OK(umm_subscriber_destroy(stuck));
}

/* -- release against unregister ------------------------------------------------------------- */

enum { RACES = 1000 };

struct race {
	struct umm_space *space;
	_Atomic uint32_t round, done;
};

static void *release_each(void *argument)
{
	struct race *race = argument;
	for (uint32_t i = 1; i <= RACES; i++) {
		while (atomic_load(&race->round) != i)
			sched_yield();
		umm_space_release(race->space, UMM_SOURCE_USER, UMM_REASON_EXIT, UMM_PROMISE_ORDERED);
		atomic_store(&race->done, i);
	}
	return NULL;
}

static void release_races_with_unregister(bool sleeping)
{
	struct race race = {0};
	struct umm_subscriber *subscriber = of_class(sleeping, &holder_ops);
	pthread_t thread;
	CHECK_OK(-pthread_create(&thread, NULL, release_each, &race));
	for (uint32_t i = 1; i <= RACES; i++) {
		struct holder first = {0}, second = {0};
		CHECK_OK(umm_space_create(1, &race.space));
		holder_subscribe(&first, race.space, subscriber, 0, 100);
		holder_subscribe(&second, race.space, subscriber, 50, 150);
		atomic_store(&race.round, i);
		for (uint32_t spin = i % 8 * 40; spin; spin--)
			atomic_load(&race.done);
		holder_unsubscribe(&first); /* looks that release was called once */
		holder_unsubscribe(&second);
		while (atomic_load(&race.done) != i)
			sched_yield();
		CHECK_OK(umm_space_destroy(race.space));
	}
	CHECK_OK(-pthread_join(thread, NULL));
	CHECK_OK(umm_subscriber_destroy(subscriber));
}

int main(void)
{
	umm_notify_set_reporter(umm_notify_keep_reports, NULL);
	for (int sleeping = 0; sleeping < 2; sleeping++) {
		own(sleeping);
		anothers(sleeping, false);
		anothers(sleeping, true);
		each_other(sleeping, sleeping);
		release_races_with_unregister(sleeping);
	}
	each_other(false, true);
	blocks_for_ever();
	blocks_directly();
	return 0;
}
