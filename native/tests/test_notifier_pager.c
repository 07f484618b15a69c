/* What subscribers are told when the pager, or the user behind its back, takes memory of a region away. */
#include <sys/wait.h>

#include "kernel/pagemap.h"
#include "notifier/notifier.h"
#include "tests/pager_fixture.h"

enum { UNITS = 64, MOST = 512 };
static const uint64_t second = 1000000000;

/* Looks into pagemap in every callback: is the range there? */
struct witness {
	struct fixture *f;
	struct umm_subscriber *subscriber;
	struct umm_subscription *subscription;
	struct umm_notify_event seen[MOST];
	uint64_t present[MOST]; /* pages of the range that are there, at that moment */
	_Atomic unsigned n;
	int pagemap;
	/* What invalidate_range_start does besides. */
	pthread_mutex_t *needs;
	_Atomic bool block;
	bool calls_pager, moves;
	_Atomic uint64_t moved_to;
	int refused_evict, refused_close;
};

static uint64_t pages_there(int pagemap, uint64_t start, uint64_t end)
{
	uint64_t page = page_size(), n = 0;
	for (uint64_t at = start; at < end; at += page) {
		uint64_t entry = 0;
		CHECK_OK(umm_pagemap_read(pagemap, at, 1, page, &entry));
		n += (entry & (UMM_PAGEMAP_PRESENT | UMM_PAGEMAP_SWAP)) != 0;
	}
	return n;
}

static void note(struct witness *witness, const struct umm_notify_event *event)
{
	unsigned n = atomic_load(&witness->n);
	CHECK(n < MOST);
	witness->seen[n] = *event;
	/* Of the whole process only where the region is. */
	bool whole = event->end - event->start > UNITS * witness->f->size;
	witness->present[n] = whole ? 0 : pages_there(witness->pagemap, event->start, event->end);
	atomic_store(&witness->n, n + 1);
}

static void on_event(void *context, const struct umm_notify_event *event)
{
	note(context, event);
}

static int on_start(void *context, const struct umm_notify_event *event)
{
	struct witness *witness = context;
	note(witness, event);
	if (witness->needs && event->reason == UMM_REASON_EVICT) {
		pthread_mutex_lock(witness->needs);
		pthread_mutex_unlock(witness->needs);
	}
	while (atomic_load(&witness->block))
		sleep_ms(1);
	if (witness->calls_pager) {
		witness->refused_evict = umm_region_evict(witness->f->region, 0, witness->f->size);
		witness->refused_close = umm_region_close(witness->f->region);
	}
	if (witness->moves && event->reason == UMM_REASON_EVICT) {
		witness->moves = false;
		uint64_t len = event->end - event->start;
		void *to = mmap(NULL, len, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		CHECK(to != MAP_FAILED);
		CHECK(mremap((void *)event->start, len, len, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to);
		atomic_store(&witness->moved_to, (uintptr_t)to);
	}
	return 0;
}

static const struct umm_notifier_ops ops = {
        .invalidate_range_start = on_start,
        .invalidate_range_end = on_event,
        .invalidate_page = on_event,
        .change = on_event,
};

static void watch(struct witness *witness, struct fixture *f, struct umm_subscriber_options options)
{
	*witness = (struct witness){.f = f, .pagemap = umm_pagemap_open(0)};
	CHECK(witness->pagemap >= 0);
	options.name = "witness";
	options.ops = &ops;
	uint64_t start = (uintptr_t)f->memory;
	CHECK_OK(umm_subscriber_create(&options, &witness->subscriber));
	CHECK_OK(umm_subscribe(umm_space_self(), witness->subscriber, start, start + f->size, witness,
	        &witness->subscription));
}

static void unwatch(struct witness *witness)
{
	CHECK_OK(umm_unsubscribe(witness->subscription));
	CHECK_OK(umm_subscriber_destroy(witness->subscriber));
	close(witness->pagemap);
}

static void open_region(struct fixture *f, struct umm_pager_options options)
{
	fixture_open(f, options, UNITS * page_size(), page_size(), UMM_STORE_WRITEBACK);
	CHECK_OK(umm_region_advise(f->region, UMM_REGION_RANDOM));
}

static void eviction_is_told_before_and_after(bool no_move, bool sleeping)
{
	struct fixture f;
	struct witness w;
	open_region(&f, (struct umm_pager_options){.no_move = no_move});
	CHECK_OK(umm_region_populate(f.region, 0, f.size));
	watch(&w, &f,
	        (struct umm_subscriber_options){
	                .sleeping = sleeping, .limit_ns = sleeping ? 100 * second : 0});
	uint64_t page = page_size(), base = (uintptr_t)f.memory;
	/* A hole makes two runs of what leaves. */
	CHECK_OK(umm_region_evict(f.region, 10 * page, page));
	CHECK_OK(umm_region_evict(f.region, 0, 20 * page));
	CHECK_EQUAL(pages_there(w.pagemap, base, base + f.size), UNITS - 20);
	while (atomic_load(&w.n) < 6)
		sleep_ms(1);
	uint64_t starts[] = {10, 0, 11}, ends[] = {11, 10, 20}, ids[3];
	for (int i = 0; i < 3; i++) {
		/* All starts of a batch come before all of its ends. */
		int start = i == 0 ? 0 : i + 1, end = i == 0 ? 1 : i + 3;
		CHECK_EQUAL(w.seen[start].kind, UMM_NOTIFY_START);
		CHECK_EQUAL(w.seen[start].start, base + starts[i] * page);
		CHECK_EQUAL(w.seen[start].end, base + ends[i] * page);
		CHECK_EQUAL(w.seen[start].source, UMM_SOURCE_PAGER);
		CHECK_EQUAL(w.seen[start].reason, UMM_REASON_EVICT);
		CHECK_EQUAL(w.seen[start].promise, UMM_PROMISE_ORDERED);
		CHECK_EQUAL(w.present[start], ends[i] - starts[i]);
		CHECK_EQUAL(w.seen[end].kind, UMM_NOTIFY_END);
		CHECK_EQUAL(w.seen[end].id, w.seen[start].id);
		CHECK_EQUAL(w.present[end], 0);
		ids[i] = w.seen[start].id;
	}
	CHECK(ids[0] < ids[1] && ids[1] < ids[2]);
	CHECK_EQUAL(w.n, 6); /* our own MADV_DONTNEED is not told as the user's */
	check_words(f.memory, 0, f.size, 0);
	unwatch(&w);
	fixture_close(&f);
}

static void budgets_evict_beside_a_sleeping_subscriber(void)
{
	struct fixture f;
	struct witness w;
	uint64_t page = page_size(), size = 2048 * page;
	fixture_open(
	        &f, (struct umm_pager_options){.budget_bytes = size / 4}, size, page, UMM_STORE_WRITEBACK);
	struct umm_subscriber_options options = {
	        .name = "queue", .sleeping = true, .pull = true, .limit_ns = 100 * second};
	struct umm_subscriber *subscriber;
	struct umm_subscription *subscription, *told;
	struct umm_notify_event event;
	CHECK_OK(umm_subscriber_create(&options, &subscriber));
	CHECK_OK(umm_subscribe(umm_space_self(), subscriber, (uintptr_t)f.memory, (uintptr_t)f.memory + size,
	        &w, &subscription));
	uint64_t starts = 0, ends = 0;
	for (uint64_t round = 1; round <= 2; round++)
		for (uint64_t at = 0; at < size; at += page) {
			for (uint64_t word = at; word < at + page; word += 8)
				store_word(f.memory, word, word_at(word, round));
			while (umm_subscriber_next(subscriber, 0, &event, &told) == 0) {
				CHECK(told == subscription && umm_subscription_context(told) == &w);
				starts += event.kind == UMM_NOTIFY_START;
				ends += event.kind == UMM_NOTIFY_END;
				umm_subscriber_done(subscriber, 0);
			}
		}
	CHECK(starts > 0);
	check_words(f.memory, size - size / 8, size, 2);
	CHECK_OK(umm_unsubscribe(subscription));
	CHECK_OK(umm_subscriber_destroy(subscriber));
	check_words(f.memory, 0, size, 2);
	fixture_close(&f);
}

static void who_keeps_is_not_evicted(void)
{
	struct fixture f;
	struct witness w;
	open_region(&f, (struct umm_pager_options){0});
	CHECK_OK(umm_region_populate(f.region, 0, f.size));
	watch(&w, &f,
	        (struct umm_subscriber_options){
	                .sleeping = true, .limit_ns = second / 50, .late = UMM_LATE_KEEP});
	umm_notify_set_reporter(umm_notify_keep_reports, NULL);
	atomic_store(&w.block, true);
	uint64_t base = (uintptr_t)f.memory;
	CHECK_EQUAL(umm_region_evict(f.region, 0, f.size), -EBUSY);
	CHECK_EQUAL(pages_there(w.pagemap, base, base + f.size), UNITS);
	atomic_store(&w.block, false);
	while (atomic_load(&w.n) < 2)
		sleep_ms(1);
	CHECK_EQUAL(w.seen[1].error, -EBUSY);
	CHECK_OK(umm_region_evict(f.region, 0, f.size));
	CHECK_EQUAL(pages_there(w.pagemap, base, base + f.size), 0);
	unwatch(&w);
	struct umm_notify_report report;
	CHECK_EQUAL(umm_notify_take_report(&report), 1);
	CHECK_EQUAL(strcmp(report.name, "witness"), 0);
	umm_notify_set_reporter(NULL, NULL);
	fixture_close(&f);
}

static void what_the_user_does_is_told_as_the_kernel_tells_it(void)
{
	struct fixture f;
	struct witness w;
	open_region(&f, (struct umm_pager_options){0});
	CHECK_OK(umm_region_populate(f.region, 0, f.size));
	watch(&w, &f, (struct umm_subscriber_options){0});
	uint64_t page = page_size(), base = (uintptr_t)f.memory, seq;
	CHECK_OK(umm_read_begin(w.subscription, second, &seq));
	CHECK(!umm_read_retry(w.subscription, seq));
	CHECK(madvise((void *)(base + page), 3 * page, MADV_DONTNEED) == 0);
	CHECK(umm_read_retry(w.subscription, seq));
	CHECK_EQUAL(w.n, 2);
	CHECK_EQUAL(w.seen[0].source, UMM_SOURCE_KERNEL);
	CHECK_EQUAL(w.seen[0].reason, UMM_REASON_REMOVE);
	CHECK_EQUAL(w.seen[0].promise, UMM_PROMISE_BEFORE);
	CHECK_EQUAL(w.seen[0].start, base + page);
	CHECK_EQUAL(w.seen[0].end, base + 4 * page);
	CHECK_EQUAL(w.seen[1].kind, UMM_NOTIFY_END);
	CHECK_OK(umm_read_begin(w.subscription, second, &seq));
	CHECK(munmap((void *)(base + 60 * page), 4 * page) == 0);
	CHECK(umm_read_retry(w.subscription, seq));
	CHECK_EQUAL(w.n, 4);
	CHECK_EQUAL(w.seen[2].reason, UMM_REASON_UNMAP);
	CHECK_EQUAL(w.seen[2].promise, UMM_PROMISE_AFTER);
	CHECK_EQUAL(w.seen[2].start, base + 60 * page);
	void *to = mmap(NULL, 8 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK_OK(umm_read_begin(w.subscription, second, &seq));
	CHECK(mremap((void *)(base + 20 * page), 8 * page, 8 * page, MREMAP_MAYMOVE | MREMAP_FIXED, to) ==
	        to);
	CHECK(umm_read_retry(w.subscription, seq));
	CHECK(w.n >= 6);
	CHECK_EQUAL(w.seen[4].reason, UMM_REASON_MOVE);
	CHECK_EQUAL(w.seen[4].to, (uintptr_t)to);
	unwatch(&w);
	fixture_close(&f);
}

static void closing_is_told_before_the_memory_goes(void)
{
	struct fixture f;
	struct witness w;
	open_region(&f, (struct umm_pager_options){0});
	CHECK_OK(umm_region_populate(f.region, 0, f.size));
	watch(&w, &f, (struct umm_subscriber_options){0});
	fixture_close(&f);
	CHECK_EQUAL(w.n, 2);
	CHECK_EQUAL(w.seen[0].reason, UMM_REASON_UNMAP);
	CHECK_EQUAL(w.seen[0].promise, UMM_PROMISE_ORDERED);
	CHECK_EQUAL(w.present[0], UNITS);
	CHECK_EQUAL(w.present[1], 0);
	unwatch(&w);
}

static void a_lost_page_is_told(void)
{
	struct fixture f;
	struct witness w;
	struct gated_store *store;
	uint64_t page = page_size();
	gated_open(&f, (struct umm_pager_options){0}, UNITS * page, page, UMM_STORE_PRIVATE, &store);
	CHECK_OK(umm_region_advise(f.region, UMM_REGION_RANDOM));
	watch(&w, &f, (struct umm_subscriber_options){0});
	atomic_store(&store->fetch_error, -EIO);
	CHECK_OK(umm_guard_enter());
	CHECK_EQUAL(f.memory[5 * page], UMM_FILL_BYTE);
	struct umm_lost lost;
	CHECK_EQUAL(umm_guard_leave(&lost), 0);
	CHECK_EQUAL(lost.units, 1);
	/* The unit is lost; then the guard's fill goes. */
	CHECK(w.n >= 3);
	CHECK_EQUAL(w.seen[0].kind, UMM_NOTIFY_PAGE);
	CHECK_EQUAL(w.seen[0].reason, UMM_REASON_POISON);
	CHECK_EQUAL(w.seen[0].start, (uintptr_t)f.memory + 5 * page);
	CHECK_EQUAL(w.seen[0].end, (uintptr_t)f.memory + 6 * page);
	unsigned starts = 0, ends = 0;
	for (unsigned i = 1; i < w.n; i++) {
		CHECK_EQUAL(w.seen[i].reason, UMM_REASON_POISON);
		starts += w.seen[i].kind == UMM_NOTIFY_START;
		ends += w.seen[i].kind == UMM_NOTIFY_END;
	}
	CHECK(starts == 1 && ends == 1);
	unwatch(&w);
	fixture_close(&f);
}

#ifndef __SANITIZE_THREAD__
struct eviction {
	struct fixture *f;
	int result;
};

static void *evict_all(void *argument)
{
	struct eviction *eviction = argument;
	eviction->result = umm_region_evict(eviction->f->region, 0, eviction->f->size);
	return NULL;
}

/* The evictor waits for a callback that needs a lock (Python's) which the forking thread holds. */
static void a_fork_does_not_wait_for_callbacks(void)
{
	struct fixture f;
	struct witness w;
	static pthread_mutex_t gil = PTHREAD_MUTEX_INITIALIZER;
	open_region(&f, (struct umm_pager_options){0});
	CHECK_OK(umm_region_populate(f.region, 0, f.size));
	watch(&w, &f, (struct umm_subscriber_options){.sleeping = true, .limit_ns = UINT64_MAX});
	w.needs = &gil;
	pthread_mutex_lock(&gil);
	struct eviction eviction = {.f = &f};
	pthread_t thread;
	CHECK_EQUAL(pthread_create(&thread, NULL, evict_all, &eviction), 0);
	while (atomic_load(&w.n) < 1)
		sleep_ms(1);
	pid_t child = fork();
	CHECK(child >= 0);
	if (!child)
		_exit(load(f.memory, 8) == word_at(8, 0) ? 0 : 1);
	pthread_mutex_unlock(&gil);
	int status;
	CHECK(waitpid(child, &status, 0) == child);
	CHECK_EQUAL(status, 0);
	pthread_join(thread, NULL);
	CHECK_OK(eviction.result);
	uint64_t base = (uintptr_t)f.memory;
	CHECK_EQUAL(pages_there(w.pagemap, base, base + f.size), 0);
	unwatch(&w);
	check_words(f.memory, 0, f.size, 0);
	fixture_close(&f);
}

#endif

static void callbacks_cannot_call_the_pager(bool sleeping)
{
	struct fixture f;
	struct witness w;
	open_region(&f, (struct umm_pager_options){0});
	CHECK_OK(umm_region_populate(f.region, 0, f.size));
	watch(&w, &f,
	        (struct umm_subscriber_options){
	                .sleeping = sleeping, .limit_ns = sleeping ? 100 * second : 0});
	w.calls_pager = true;
	CHECK_OK(umm_region_evict(f.region, 0, f.size));
	CHECK_EQUAL(w.refused_evict, -EDEADLK);
	CHECK_EQUAL(w.refused_close, -EDEADLK);
	w.calls_pager = false;
	unwatch(&w);
	fixture_close(&f);
}

/* Announced as one address, mapped as another by the time that it would be moved out: it stays. */
static void moved_between_telling_and_doing(bool no_move)
{
	struct fixture f;
	struct witness w;
	open_region(&f, (struct umm_pager_options){.no_move = no_move});
	CHECK_OK(umm_region_populate(f.region, 0, f.size));
	watch(&w, &f, (struct umm_subscriber_options){.sleeping = true, .limit_ns = 100 * second});
	w.moves = true;
	uint64_t page = page_size();
	CHECK_OK(umm_region_evict(f.region, 8 * page, 8 * page));
	uint64_t to = atomic_load(&w.moved_to);
	CHECK(to != 0);
	CHECK_EQUAL(pages_there(w.pagemap, to, to + 8 * page), 8);
	for (uint64_t at = 0; at < 8 * page; at += 8)
		CHECK_EQUAL(load((volatile uint8_t *)to, at), word_at(8 * page + at, 0));
	CHECK_OK(umm_region_evict(f.region, 8 * page, 8 * page));
	CHECK_EQUAL(pages_there(w.pagemap, to, to + 8 * page), 0);
	unwatch(&w);
	fixture_close(&f);
}

int main(void)
{
	RUN(eviction_is_told_before_and_after(false, false));
	RUN(eviction_is_told_before_and_after(true, false));
	RUN(eviction_is_told_before_and_after(false, true));
	RUN(budgets_evict_beside_a_sleeping_subscriber());
	RUN(who_keeps_is_not_evicted());
	RUN(what_the_user_does_is_told_as_the_kernel_tells_it());
	RUN(closing_is_told_before_the_memory_goes());
	RUN(a_lost_page_is_told());
#ifndef __SANITIZE_THREAD__ /* it allows no threads in a forked child, and the pager starts its own */
	RUN(a_fork_does_not_wait_for_callbacks());
#endif
	RUN(callbacks_cannot_call_the_pager(false));
	RUN(callbacks_cannot_call_the_pager(true));
	RUN(moved_between_telling_and_doing(false));
	RUN(moved_between_telling_and_doing(true));
	return 0;
}
