/* What may be believed of watched memory while threads map and unmap it. */
#include <errno.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "kernel/mapping.h"
#include "notifier/watch.h"
#include "tests/notifier_record.h"
#include "tests/pager_fixture.h"

static uint64_t page;
static struct umm_watch *watch;

static uint64_t watched_bytes(void)
{
	struct umm_watch_stats stats;
	umm_watch_stats(watch, &stats);
	return stats.bytes;
}

/* -- what a reader may believe -------------------------------------------------------------- */

enum { THREADS = 8, ROUNDS = 200 };

/* One slot per thread: what is known about its memory, dropped by the callback. */
struct slot {
	uint64_t at;
	struct umm_subscription *subscription;
	_Atomic uint64_t known; /* the stamp of the memory, 0: nothing known */
};

static int drop_start(void *context, const struct umm_notify_event *event)
{
	(void)event;
	atomic_store(&((struct slot *)context)->known, 0);
	return 0;
}

static struct umm_subscriber *dropper;
static pthread_barrier_t warm, ready;

static uint64_t map_over(uint64_t at, uint64_t size, int protection)
{
	return (uint64_t)syscall(
	        SYS_mmap, at, size, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
}

static void *map_and_unmap(void *argument)
{
	struct slot *slot = argument;
	uint64_t size = 4 * page;
	/* What a thread's first walk maps for itself must not land in a slot. */
	umm_notify_post(umm_space_self(), 0, page, 0, UMM_SOURCE_USER, UMM_REASON_OTHER, UMM_PROMISE_AFTER);
	pthread_barrier_wait(&warm);
	pthread_barrier_wait(&ready);
	for (uint64_t round = 1; round <= ROUNDS / SLOWDOWN; round++) {
		uint64_t seq;
		CHECK(map_over(slot->at, size, PROT_READ | PROT_WRITE) == slot->at);
		CHECK_OK(umm_watch_add(watch, slot->at, slot->at + size));
		/* Mapped anew: what was known is known no more, although its post may be under way. */
		CHECK_OK(umm_read_begin(slot->subscription, UINT64_MAX, &seq));
		CHECK_EQUAL(atomic_load(&slot->known), 0);
		*(volatile uint64_t *)(uintptr_t)slot->at = round;
		atomic_store(&slot->known, round);
		CHECK(!umm_read_retry(slot->subscription, seq));
		CHECK_EQUAL(atomic_load(&slot->known), round);
		/* A hole would be filled with something of a sanitizer's. */
		if (SLOWDOWN > 1)
			CHECK(map_over(slot->at, size, PROT_NONE) == slot->at);
		else
			CHECK(syscall(SYS_munmap, slot->at, size) == 0);
		/* From here on nobody may believe in it. */
		uint64_t believed = atomic_load(&slot->known);
		CHECK(umm_read_retry(slot->subscription, seq) || believed == 0);
		CHECK_OK(umm_read_begin(slot->subscription, UINT64_MAX, &seq));
		CHECK_EQUAL(atomic_load(&slot->known), 0);
		CHECK_OK(umm_watch_remove(watch, slot->at, slot->at + size));
	}
	return NULL;
}

static void no_reader_believes_what_is_gone(void)
{
	static const struct umm_notifier_ops ops = {.invalidate_range_start = drop_start};
	struct umm_subscriber_options options = {.name = "dropper", .ops = &ops};
	static struct slot slots[THREADS];
	pthread_t threads[THREADS];
	uint64_t base;
	CHECK_OK(umm_subscriber_create(&options, &dropper));
	pthread_barrier_init(&warm, NULL, THREADS + 1);
	pthread_barrier_init(&ready, NULL, THREADS + 1);
	for (int i = 0; i < THREADS; i++)
		CHECK(pthread_create(&threads[i], NULL, map_and_unmap, &slots[i]) == 0);
	pthread_barrier_wait(&warm);
	CHECK_OK(
	        umm_map(0, THREADS * 8 * page, PROT_NONE, UMM_MAP_PRIVATE | UMM_MAP_ANONYMOUS, -1, 0, &base));
	for (int i = 0; i < THREADS; i++) {
		slots[i].at = base + (uint64_t)i * 8 * page;
		CHECK_OK(umm_subscribe(umm_space_self(), dropper, slots[i].at, slots[i].at + 4 * page,
		        &slots[i], &slots[i].subscription));
	}
	pthread_barrier_wait(&ready);
	for (int i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
	for (int i = 0; i < THREADS; i++)
		CHECK_OK(umm_unsubscribe(slots[i].subscription));
	CHECK_OK(umm_subscriber_destroy(dropper));
	CHECK_EQUAL(watched_bytes(), 0);
	CHECK_OK(umm_unmap(base, THREADS * 8 * page));
}

/* -- the same address in another thread's hands --------------------------------------------- */

/* Threads that take whatever address the kernel gives, mostly one that another thread's munmap has just left
 * without having returned. A table by address says what is known. */
enum { TABLE = 1 << 12, SPOTS = 64 };

static _Atomic uint64_t table[TABLE];
static uint64_t arena, arena_size;
static struct umm_subscription *arena_subscription;
static _Atomic uint64_t stamps, hits, unsure;

static int drop_pages(void *context, const struct umm_notify_event *event)
{
	(void)context;
	for (uint64_t at = event->start; at < event->end && at < arena + arena_size; at += page)
		if (at >= arena)
			atomic_store(&table[(at - arena) / page % TABLE], 0);
	return 0;
}

static uint64_t take_spot(uint32_t *seed)
{
	enum { TRIES = 1 << 24 };
	for (int i = 0;; i++) {
		CHECK(i < TRIES);
		*seed = *seed * 1664525 + 1013904223;
		uint64_t at = arena + (*seed >> 8) % SPOTS * 2 * page;
		long got = syscall(SYS_mmap, at, page, PROT_READ | PROT_WRITE,
		        MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
		if (got == (long)at)
			return at;
	}
}

static void *use_spots(void *argument)
{
	uint32_t seed = (uint32_t)(uintptr_t)argument;
	for (int round = 0; round < 4 * ROUNDS / SLOWDOWN; round++) {
		uint64_t at = take_spot(&seed), seq, *memory = (uint64_t *)(uintptr_t)at;
		_Atomic uint64_t *known = &table[(at - arena) / page % TABLE];
		CHECK_OK(umm_watch_add(watch, at, at + page));
		uint64_t stamp = atomic_fetch_add(&stamps, 1) + 1;
		__atomic_store_n(memory, stamp, __ATOMIC_RELAXED);
		for (int lookup = 0; lookup < 4; lookup++) {
			if (umm_watch_changing(watch)) {
				atomic_fetch_add(&unsure, 1);
				continue;
			}
			CHECK_OK(umm_read_begin(arena_subscription, UINT64_MAX, &seq));
			uint64_t found = atomic_load(known);
			/* Known about this page, in this mapping of it: or nothing is. */
			CHECK(found == 0 || found == stamp);
			if (found)
				atomic_fetch_add(&hits, 1);
			else
				atomic_store(known, stamp);
		}
		CHECK(syscall(SYS_munmap, at, page) == 0);
		CHECK_OK(umm_watch_remove(watch, at, at + page));
	}
	return NULL;
}

static void addresses_change_hands(void)
{
	static const struct umm_notifier_ops ops = {.invalidate_range_start = drop_pages};
	struct umm_subscriber_options options = {.name = "table", .ops = &ops};
	struct umm_subscriber *subscriber;
	pthread_t threads[THREADS];
	/* Holes of one page between walls: too small for a thread's stack, or for what a sanitizer maps. */
	arena_size = 2 * SPOTS * page;
	CHECK_OK(umm_map(
	        0, arena_size + 2 * page, PROT_NONE, UMM_MAP_PRIVATE | UMM_MAP_ANONYMOUS, -1, 0, &arena));
	arena += page;
	for (int i = 0; i < SPOTS; i++)
		CHECK_OK(umm_unmap(arena + (uint64_t)i * 2 * page, page));
	CHECK_OK(umm_subscriber_create(&options, &subscriber));
	CHECK_OK(umm_subscribe(
	        umm_space_self(), subscriber, arena, arena + arena_size, NULL, &arena_subscription));
	for (uintptr_t i = 0; i < THREADS; i++)
		CHECK(pthread_create(&threads[i], NULL, use_spots, (void *)(i + 1)) == 0);
	for (int i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
	CHECK_OK(umm_unsubscribe(arena_subscription));
	CHECK_OK(umm_subscriber_destroy(subscriber));
	CHECK_EQUAL(watched_bytes(), 0);
	CHECK_OK(umm_unmap(arena - page, arena_size + 2 * page));
	if (getenv("UMM_TEST_TIMES"))
		fprintf(stderr, "%llu lookups hit, %llu could not be sure\n",
		        (unsigned long long)atomic_load(&hits), (unsigned long long)atomic_load(&unsure));
}

int main(void)
{
	page = page_size();
	int error = umm_watch_create(umm_space_self(), &watch);
	if (error == -EOPNOTSUPP || error == -ENOSYS || error == -EPERM) {
		fprintf(stderr, "lacks: userfaultfd with write protection and events\n");
		return TEST_SKIPPED;
	}
	CHECK_OK(error);
	RUN(no_reader_believes_what_is_gone());
	RUN(addresses_change_hands());
	CHECK_OK(umm_watch_destroy(watch));
	return 0;
}
