/* A migration between two ends in one process, under writes; and one whose connections break. */
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "common/clock.h"
#include "notifier/notifier.h"
#include "postcopy/protocol.h"
#include "postcopy/receiver.h"
#include "postcopy/sender.h"
#include "tests/check.h"

enum { PAGES = 500, IDLE_MS = 20000, ROUNDS = 10, READERS = 4 };

static size_t page_size;

struct move {
	uint8_t *memory;
	struct umm_sender *sender;
	struct umm_receiver *receiver;
	int theirs[2];
	_Atomic bool stop_writing;
	uint64_t rate;
	int served;
};

static void *write_main(void *context)
{
	struct move *move = context;
	/* Written while the sender copies it, which is the point: relaxed stores, so that no tool calls it a
	 * race between the writers; the sender's copy is one by design (the page is sent again). */
	for (unsigned i = 1; !atomic_load(&move->stop_writing); i = i * 1103515245u + 12345u)
		__atomic_store_n(
		        &move->memory[(size_t)(i >> 8) % (PAGES * page_size)], (uint8_t)i, __ATOMIC_RELAXED);
	return NULL;
}

static void *connect_main(void *context)
{
	struct move *move = context;
	CHECK(umm_receiver_connect(move->receiver, move->theirs[0], UINT64_MAX) == 0);
	CHECK(umm_receiver_connect(move->receiver, move->theirs[1], UINT64_MAX) == 0);
	const char *state;
	uint32_t len;
	CHECK(umm_receiver_precopy(move->receiver, &state, &len) == 0);
	CHECK(len == 5 && memcmp(state, "state", 5) == 0);
	return NULL;
}

static void *serve_main(void *context)
{
	struct move *move = context;
	move->served = umm_sender_serve(move->sender, move->rate);
	return NULL;
}

/* Who has an outside reference to the memory of both ends: each is told once, before and after. */
struct watch {
	struct move *move;
	uint64_t start, end; /* what it is about */
	unsigned starts, ends, changes;
	int error;
	uint32_t phase_before, phase_after; /* of the source, in start and end */
};

static uint32_t source_phase(const struct watch *watch)
{
	struct umm_sender_stats stats;
	umm_sender_stats(watch->move->sender, &stats);
	return stats.phase;
}

static void check_event(const struct watch *watch, const struct umm_notify_event *event, int reason)
{
	CHECK(event->source == UMM_SOURCE_POSTCOPY && event->reason == reason);
	CHECK(event->promise == UMM_PROMISE_ORDERED);
	CHECK(event->start == watch->start && event->end == watch->end);
}

static int on_start(void *context, const struct umm_notify_event *event)
{
	struct watch *watch = context;
	check_event(watch, event, UMM_REASON_SWITCH);
	CHECK_EQUAL(watch->starts++, watch->ends);
	watch->phase_before = source_phase(watch);
	return 0;
}

static void on_end(void *context, const struct umm_notify_event *event)
{
	struct watch *watch = context;
	check_event(watch, event, UMM_REASON_SWITCH);
	CHECK_EQUAL(++watch->ends, watch->starts);
	watch->error = event->error;
	watch->phase_after = source_phase(watch);
}

static void on_change(void *context, const struct umm_notify_event *event)
{
	struct watch *watch = context;
	check_event(watch, event, UMM_REASON_BACKING);
	CHECK_EQUAL(watch->ends, 1);
	watch->changes++;
}

static const struct umm_notifier_ops watch_ops = {
        .invalidate_range_start = on_start,
        .invalidate_range_end = on_end,
        .change = on_change,
};

struct watcher {
	struct watch watch;
	struct umm_subscriber *subscriber;
	struct umm_subscription *subscription;
};

static void watcher_init(struct watcher *watcher, struct move *move, uint64_t start)
{
	*watcher =
	        (struct watcher){.watch = {.move = move, .start = start, .end = start + PAGES * page_size}};
	const struct umm_subscriber_options options = {.name = "watch", .ops = &watch_ops};
	CHECK_OK(umm_subscriber_create(&options, &watcher->subscriber));
	CHECK_OK(umm_subscribe(umm_space_self(), watcher->subscriber, start, watcher->watch.end,
	        &watcher->watch, &watcher->subscription));
}

/* Told once, and of so many changes of the backing. */
static void watcher_deinit(struct watcher *watcher, unsigned changes)
{
	CHECK_OK(umm_unsubscribe(watcher->subscription));
	CHECK_OK(umm_subscriber_destroy(watcher->subscriber));
	CHECK_EQUAL(watcher->watch.starts, 1);
	CHECK_EQUAL(watcher->watch.ends, 1);
	CHECK_EQUAL(watcher->watch.changes, changes);
}

/* Both ends, with their two connections. */
static void begin_connected(struct move *move, pthread_t *receiving, void *(*receive_main)(void *))
{
	move->memory =
	        mmap(NULL, PAGES * page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(move->memory != MAP_FAILED);
	(void)madvise(move->memory, PAGES * page_size, MADV_NOHUGEPAGE);
	for (size_t i = 0; i < PAGES / 2 * page_size; i++)
		move->memory[i] = (uint8_t)(i * 31 >> 4);
	int error = umm_sender_create(
	        (uint64_t)(uintptr_t)move->memory, PAGES * page_size, IDLE_MS, &move->sender);
	if (error == -EOPNOTSUPP || error == -EPERM) {
		fprintf(stderr, "lacks: asynchronous write protection, or the right to a userfaultfd\n");
		exit(77);
	}
	CHECK(error == 0);
	CHECK(umm_receiver_create(IDLE_MS, &move->receiver) == 0);
	int pairs[2][2];
	for (int i = 0; i < 2; i++) {
		CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pairs[i]) == 0);
		move->theirs[i] = pairs[i][1];
	}
	CHECK(pthread_create(receiving, NULL, receive_main, move) == 0);
	CHECK(umm_sender_accept(move->sender, pairs[0][0]) == 0);
	CHECK(umm_sender_accept(move->sender, pairs[1][0]) == 0);
}

/* Up to the switch, with a writer at work until then. */
static void begin(struct move *move)
{
	pthread_t receiving, writing;
	begin_connected(move, &receiving, connect_main);
	CHECK(pthread_create(&writing, NULL, write_main, move) == 0);
	for (int i = 0; i < ROUNDS; i++)
		CHECK(umm_sender_round(move->sender) == 0);
	atomic_store(&move->stop_writing, true);
	pthread_join(writing, NULL);
	/* the writer may have had no turn since the last round */
	for (size_t page = 0; page < PAGES; page += 3)
		move->memory[page * page_size] ^= 1;
	struct watcher source, destination;
	watcher_init(&source, move, (uintptr_t)move->memory);
	CHECK(umm_sender_switch(move->sender, umm_now_ns(), "state", 5) == 0);
	CHECK_EQUAL(source.watch.error, 0);
	CHECK_EQUAL(source.watch.phase_before, UMM_PHASE_PRECOPY);
	CHECK_EQUAL(source.watch.phase_after, UMM_PHASE_POSTCOPY);
	watcher_deinit(&source, 0);
	pthread_join(receiving, NULL);
	watcher_init(&destination, move, umm_receiver_address(move->receiver));
	CHECK(umm_receiver_enter(move->receiver) == 0);
	CHECK_EQUAL(destination.watch.error, 0);
	watcher_deinit(&destination, 1);
}

static void end(struct move *move)
{
	umm_receiver_destroy(move->receiver);
	umm_sender_destroy(move->sender);
	munmap(move->memory, PAGES * page_size);
}

struct reader {
	struct move *move;
	unsigned seed;
};

/* Each page in an order of the thread's own, while they arrive. */
static void *read_main(void *context)
{
	struct reader *reader = context;
	const uint8_t *arrived = (const uint8_t *)(uintptr_t)umm_receiver_address(reader->move->receiver);
	for (unsigned i = 0; i < PAGES; i++) {
		size_t page = (i * 7919u + reader->seed * 131u) % PAGES;
		CHECK(memcmp(arrived + page * page_size, reader->move->memory + page * page_size,
		              page_size) == 0);
	}
	return NULL;
}

static void test_every_byte(uint64_t rate)
{
	struct move move = {.rate = rate};
	begin(&move);
	pthread_t serving, readers[READERS];
	struct reader orders[READERS];
	CHECK(umm_receiver_running(move.receiver) == 0);
	CHECK(pthread_create(&serving, NULL, serve_main, &move) == 0);
	for (unsigned i = 0; i < READERS; i++) {
		orders[i] = (struct reader){&move, i};
		CHECK(pthread_create(&readers[i], NULL, read_main, &orders[i]) == 0);
	}
	for (unsigned i = 0; i < READERS; i++)
		pthread_join(readers[i], NULL);
	CHECK(umm_receiver_await_complete(move.receiver, IDLE_MS) == 0);
	pthread_join(serving, NULL);
	CHECK(move.served == 0);
	struct umm_receiver_stats stats;
	umm_receiver_stats(move.receiver, &stats);
	CHECK(stats.verified == PAGES && stats.mismatched == 0 && stats.lost_pages == 0);
	CHECK(stats.arrived_pages == stats.missing_pages);
	CHECK(stats.missing_pages >= (PAGES + 2) / 3);
	end(&move);
}

static void *connect_only_main(void *context)
{
	struct move *move = context;
	CHECK(umm_receiver_connect(move->receiver, move->theirs[0], UINT64_MAX) == 0);
	CHECK(umm_receiver_connect(move->receiver, move->theirs[1], UINT64_MAX) == 0);
	return NULL;
}

/* A switch that fails: the memory is the source's as before, which the end of the change says. */
static void test_failed_switch(void)
{
	struct move move = {0};
	struct watcher source;
	pthread_t connecting;
	begin_connected(&move, &connecting, connect_only_main);
	pthread_join(connecting, NULL);
	umm_receiver_destroy(move.receiver);
	watcher_init(&source, &move, (uintptr_t)move.memory);
	int error = umm_sender_switch(move.sender, umm_now_ns(), "state", 5);
	CHECK(error < 0);
	CHECK_EQUAL(source.watch.error, error);
	watcher_deinit(&source, 0);
	umm_sender_destroy(move.sender);
	munmap(move.memory, PAGES * page_size);
}

static void *lose_main(void *context)
{
	struct move *move = context;
	uint64_t lost = 0;
	const volatile uint8_t *arrived = (const uint8_t *)(uintptr_t)umm_receiver_address(move->receiver);
	CHECK(umm_receiver_guard_enter(move->receiver) == 0);
	for (size_t page = 0; page < PAGES; page++)
		(void)arrived[page * page_size];
	CHECK(umm_receiver_guard_leave(move->receiver, &lost) == 0);
	struct umm_receiver_stats stats;
	umm_receiver_stats(move->receiver, &stats);
	CHECK(lost > 0 && lost <= stats.lost_pages);
	return NULL;
}

/* The source goes away while a thread waits for a page. */
static void test_lost_source(void)
{
	struct move move = {0};
	begin(&move);
	pthread_t losing;
	CHECK(umm_receiver_running(move.receiver) == 0);
	CHECK(pthread_create(&losing, NULL, lose_main, &move) == 0);
	nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
	umm_sender_destroy(move.sender);
	pthread_join(losing, NULL);
	CHECK(umm_receiver_await_complete(move.receiver, IDLE_MS) == -ECONNRESET);
	CHECK(strstr(umm_receiver_error(move.receiver), "closed the"));
	umm_receiver_destroy(move.receiver);
	munmap(move.memory, PAGES * page_size);
}

/* Nothing hangs when the destination gives up while everybody is busy. */
static void test_stopped_destination(void)
{
	struct move move = {.rate = 1};
	begin(&move);
	pthread_t serving, losing;
	CHECK(umm_receiver_running(move.receiver) == 0);
	CHECK(pthread_create(&serving, NULL, serve_main, &move) == 0);
	nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
	umm_receiver_stop(move.receiver);
	CHECK(umm_receiver_await_complete(move.receiver, IDLE_MS) == -ECANCELED);
	CHECK(pthread_create(&losing, NULL, lose_main, &move) == 0);
	pthread_join(losing, NULL);
	umm_receiver_destroy(move.receiver);
	pthread_join(serving, NULL);
	CHECK(move.served == -ECONNRESET || move.served == -EREMOTEIO);
	umm_sender_destroy(move.sender);
	munmap(move.memory, PAGES * page_size);
}

int main(void)
{
	page_size = (size_t)sysconf(_SC_PAGESIZE);
	test_every_byte(0);
	test_every_byte(4 << 20);
	test_failed_switch();
	test_lost_source();
	test_stopped_destination();
	return 0;
}
