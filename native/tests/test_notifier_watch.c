/* The kernel's events of memory that is watched, whoever changes it. */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kernel/madvise.h"
#include "kernel/mapping.h"
#include "kernel/pagemap.h"
#include "kernel/userfaultfd.h"
#include "notifier/calls.h"
#include "notifier/watch.h"
#include "notifier/watched.h"
#include "tests/notifier_record.h"
#include "tests/pager_fixture.h"

static uint64_t page;
static struct umm_watch *watch;

static uint64_t map_filled(uint64_t pages)
{
	uint64_t at = 0;
	CHECK_OK(umm_map(
	        0, pages * page, PROT_READ | PROT_WRITE, UMM_MAP_PRIVATE | UMM_MAP_ANONYMOUS, -1, 0, &at));
	memset((void *)(uintptr_t)at, 0x42, pages * page);
	return at;
}

/* The post comes a moment after the caller goes on. */
static void wait_for(struct record *record, int n)
{
	while (record_count(record) < n)
		sched_yield();
	CHECK_EQUAL(record_count(record), n);
}

static void check_event(
        struct record *r, int i, uint64_t start, uint64_t end, uint64_t to, int reason, int promise)
{
	for (int kind = UMM_NOTIFY_START; kind <= UMM_NOTIFY_END; kind++) {
		struct umm_notify_event *event = &r->events[i + kind];
		CHECK_EQUAL(event->kind, kind);
		CHECK_EQUAL(event->source, UMM_SOURCE_KERNEL);
		CHECK_EQUAL(event->reason, reason);
		CHECK_EQUAL(event->promise, promise);
		CHECK_EQUAL(event->start, start);
		CHECK_EQUAL(event->end, end);
		CHECK_EQUAL(event->to, to);
	}
}

static uint64_t watched_bytes(void)
{
	struct umm_watch_stats stats;
	umm_watch_stats(watch, &stats);
	return stats.bytes;
}

/* Does the kernel have it registered? */
static bool is_registered(uint64_t at)
{
	int pagemap = umm_pagemap_open(0);
	struct umm_page_region region;
	struct umm_pagemap_scan scan = {.start = at,
	        .end = at + page,
	        .vec = (uintptr_t)&region,
	        .vec_len = 1,
	        .category_mask = UMM_PAGE_IS_WPALLOWED,
	        .return_mask = UMM_PAGE_IS_WPALLOWED};
	CHECK(pagemap >= 0);
	int n = umm_pagemap_scan(pagemap, &scan);
	close(pagemap);
	CHECK(n >= 0 || n == -ENOTTY);
	return n == 1;
}

static void raw_calls_are_seen(void)
{
	struct record r;
	uint64_t at = map_filled(9), there;
	record_open(&r, at, at + 8 * page, true);
	CHECK_OK(umm_watch_add(watch, at, at + 8 * page));
	CHECK(syscall(SYS_madvise, at + page, 2 * page, MADV_DONTNEED) == 0);
	wait_for(&r, 2);
	check_event(&r, 0, at + page, at + 3 * page, 0, UMM_REASON_REMOVE, UMM_PROMISE_BEFORE);
	/* nothing faults, nothing is protected */
	memset((void *)(uintptr_t)at, 0x42, 8 * page);
	CHECK(syscall(SYS_munmap, at + 4 * page, 5 * page) == 0);
	wait_for(&r, 4);
	check_event(&r, 2, at + 4 * page, at + 9 * page, 0, UMM_REASON_UNMAP, UMM_PROMISE_AFTER);
	CHECK(!r.mapped[2]);
	CHECK_OK(umm_remap(at, page, 2 * page, UMM_MREMAP_MAYMOVE, 0, &there));
	CHECK(there != at);
	wait_for(&r, 8);
	check_event(&r, 4, at, at + page, there, UMM_REASON_MOVE, UMM_PROMISE_AFTER);
	check_event(&r, 6, at, at + page, 0, UMM_REASON_UNMAP, UMM_PROMISE_AFTER);
	record_close(&r);
	/* still watched where it went */
	record_open(&r, there, there + 2 * page, true);
	CHECK(syscall(SYS_munmap, there, 2 * page) == 0);
	wait_for(&r, 2);
	check_event(&r, 0, there, there + 2 * page, 0, UMM_REASON_UNMAP, UMM_PROMISE_AFTER);
	record_close(&r);
	CHECK_OK(umm_watch_remove(watch, at, at + 8 * page));
	CHECK_EQUAL(watched_bytes(), 0);
	CHECK_OK(umm_unmap(at, 4 * page));
}

static void *free_main(void *memory)
{
	free(memory);
	return NULL;
}

/* No call of the program's own, and none that a preloaded library would catch. */
static void free_is_seen(void)
{
	struct record r;
	pthread_t thread;
	uint64_t size = UINT64_C(64) << 20;
	void *memory = malloc(size);
	CHECK(memory);
	memset(memory, 1, size);
	uint64_t at = ((uintptr_t)memory + page) & ~(page - 1);
	CHECK_OK(umm_watch_add(watch, at, at + 2 * page));
	record_open(&r, at, at + 2 * page, false);
	CHECK(pthread_create(&thread, NULL, free_main, memory) == 0);
	pthread_join(thread, NULL);
#ifdef __SANITIZE_ADDRESS__
	/* its free() keeps the memory for a while */
	CHECK(syscall(SYS_munmap, at, 2 * page) == 0);
	record_close(&r);
	CHECK(syscall(SYS_mmap, at, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED,
	              -1, 0) == (long)at);
#elif defined(__SANITIZE_THREAD__)
	while (!record_count(&r))
		sched_yield();
	record_close(&r);
#else
	wait_for(&r, 2);
	CHECK_EQUAL(r.events[0].reason, UMM_REASON_UNMAP);
	CHECK(r.events[0].start <= at && r.events[0].end >= at + 2 * page);
	record_close(&r);
#endif
	CHECK_OK(umm_watch_remove(watch, at, at + 2 * page));
}

static void kinds_of_memory(void)
{
	uint64_t shared, file, reading;
	uint8_t *own = (uint8_t *)map_filled(2);
	CHECK_EQUAL(umm_watch_add(watch, (uintptr_t)own + 1, (uintptr_t)own + page), -EINVAL);
	CHECK_EQUAL(umm_watch_add(watch, (uintptr_t)own, (uintptr_t)own), -EINVAL);
	CHECK_EQUAL(umm_watch_add(watch, (uintptr_t)own + page, (uintptr_t)own), -EINVAL);
	CHECK_EQUAL(umm_watch_remove(watch, (uintptr_t)own, (uintptr_t)own + page), -ENOENT);
	CHECK_OK(umm_unmap((uintptr_t)own, page));
	CHECK_EQUAL(umm_watch_add(watch, (uintptr_t)own, (uintptr_t)own + page), -ENOMEM);
	/* another userfaultfd's */
	int uffd = umm_uffd_open(UMM_UFFD_SOURCE_ANY, 0, NULL);
	CHECK(uffd >= 0);
	CHECK_OK(umm_uffd_api(uffd, 0, NULL, NULL));
	CHECK_OK(umm_uffd_register(uffd, (uintptr_t)own + page, page, UMM_UFFD_MODE_MISSING, NULL));
	CHECK_EQUAL(umm_watch_add(watch, (uintptr_t)own + page, (uintptr_t)own + 2 * page), -EBUSY);
	close(uffd);
	CHECK_OK(umm_watch_add(watch, (uintptr_t)own + page, (uintptr_t)own + 2 * page));
	CHECK_OK(umm_watch_remove(watch, (uintptr_t)own + page, (uintptr_t)own + 2 * page));
	CHECK_OK(umm_unmap((uintptr_t)own + page, page));
	/* a memfd, and a file of a file system: taken, or said not to be */
	int fd = umm_memfd_create("test", UMM_MFD_CLOEXEC);
	FILE *other = tmpfile();
	CHECK(fd >= 0 && other && ftruncate(fd, (off_t)page) == 0 &&
	        ftruncate(fileno(other), (off_t)page) == 0);
	CHECK_OK(umm_map(0, page, PROT_READ | PROT_WRITE, UMM_MAP_SHARED, fd, 0, &shared));
	CHECK_OK(umm_map(0, page, PROT_READ | PROT_WRITE, UMM_MAP_PRIVATE, fileno(other), 0, &file));
	uint64_t places[] = {shared, file};
	for (int i = 0; i < 2; i++) {
		struct record r;
		int error = umm_watch_add(watch, places[i], places[i] + page);
		CHECK(error == 0 || error == -EOPNOTSUPP);
		record_open(&r, places[i], places[i] + page, false);
		*(volatile char *)(uintptr_t)places[i] = 1;
		CHECK(syscall(SYS_munmap, places[i], page) == 0);
		if (!error) {
			wait_for(&r, 2);
			CHECK_OK(umm_watch_remove(watch, places[i], places[i] + page));
		}
		record_close(&r);
	}
	/* a shared mapping for reading alone of a descriptor for reading alone */
	char name[64];
	snprintf(name, sizeof(name), "/proc/self/fd/%d", fd);
	int read_only = open(name, O_RDONLY | O_CLOEXEC);
	CHECK(read_only >= 0);
	CHECK_OK(umm_map(0, page, PROT_READ, UMM_MAP_SHARED, read_only, 0, &reading));
	CHECK_EQUAL(umm_watch_add(watch, reading, reading + page), -EOPNOTSUPP);
	CHECK_OK(umm_unmap(reading, page));
	close(read_only);
	close(fd);
	fclose(other);
	CHECK_EQUAL(watched_bytes(), 0);
}

static void adds_are_counted(void)
{
	uint64_t at = map_filled(8);
	CHECK_OK(umm_watch_add(watch, at, at + 6 * page));
	CHECK_OK(umm_watch_add(watch, at + 2 * page, at + 8 * page));
	CHECK_EQUAL(watched_bytes(), 8 * page);
	bool visible = is_registered(at);
	CHECK_OK(umm_watch_remove(watch, at, at + 6 * page));
	CHECK_EQUAL(watched_bytes(), 6 * page);
	CHECK(!is_registered(at) && is_registered(at + 2 * page) == visible);
	CHECK_EQUAL(umm_watch_remove(watch, at, at + 6 * page), -ENOENT);
	CHECK_OK(umm_watch_remove(watch, at + 3 * page, at + 4 * page));
	CHECK(!is_registered(at + 3 * page) && is_registered(at + 4 * page) == visible);
	/* Gone, and mapped anew: what was added before has no claim on it. */
	CHECK(syscall(SYS_munmap, at + 4 * page, 4 * page) == 0);
	uint64_t again;
	CHECK_OK(umm_map(at + 4 * page, 4 * page, PROT_READ | PROT_WRITE,
	        UMM_MAP_PRIVATE | UMM_MAP_ANONYMOUS | UMM_MAP_FIXED_NOREPLACE, -1, 0, &again));
	while (umm_watch_changing(watch))
		sched_yield();
	CHECK_OK(umm_watch_add(watch, at + 6 * page, at + 8 * page));
	CHECK(!is_registered(at + 4 * page) && is_registered(at + 6 * page) == visible);
	CHECK_OK(umm_watch_remove(watch, at + 4 * page, at + 8 * page));
	CHECK(is_registered(at + 6 * page) == visible);
	CHECK_OK(umm_watch_remove(watch, at + 6 * page, at + 8 * page));
	CHECK(!is_registered(at + 6 * page));
	CHECK_OK(umm_watch_remove(watch, at + 2 * page, at + 3 * page));
	CHECK_EQUAL(watched_bytes(), 0);
	CHECK_OK(umm_unmap(at, 8 * page));
}

/* The bookkeeping against a count for each of 64 places. */
static void pieces_against_counts(void)
{
	enum { PLACES = 64, ROOM = 40 };
	struct watched_piece pieces[ROOM];
	struct watched watched = {.pieces = pieces, .room = ROOM};
	uint32_t count[PLACES] = {0}, seed = 1;
	bool gone[PLACES] = {false}, known[PLACES] = {false};
	int refused = 0;
	for (int round = 0; round < 20000; round++) {
		seed = seed * 1664525 + 1013904223;
		uint64_t start = seed >> 8 & 63, end = start + 1 + (seed >> 16) % (PLACES - start);
		int what = (int)(seed >> 28) % 3, error = 0, all = 1;
		for (uint64_t i = start; i < end; i++)
			all &= count[i] > 0;
		if (what == 0)
			error = watched_add(&watched, start, end);
		else if (what == 1)
			error = watched_remove(&watched, start, end);
		else
			watched_gone(&watched, start, end);
		CHECK(error == 0 || error == -ENOSPC || (error == -ENOENT && what == 1));
		CHECK((error == -ENOENT) == (what == 1 && !all));
		refused += error == -ENOSPC;
		for (uint64_t i = start; i < end && !error; i++) {
			if (what == 0) {
				count[i]++;
				gone[i] = false;
				known[i] = true;
			} else if (what == 1) {
				count[i]--;
			} else if (known[i]) {
				gone[i] = true;
			}
			known[i] = known[i] && (count[i] || !gone[i]);
		}
		uint64_t at = 0;
		if (round % 50 == 0)
			while (watched_unwanted(&watched, &at)) {
				for (uint64_t i = pieces[at].start; i < pieces[at].end; i++) {
					CHECK(known[i] && !count[i] && !gone[i]);
					known[i] = false;
				}
				watched_drop(&watched, at);
			}
		uint64_t last = 0;
		for (uint64_t i = 0; i < watched.n; i++) {
			CHECK(pieces[i].start < pieces[i].end && pieces[i].start >= last);
			for (uint64_t j = last; j < pieces[i].start; j++)
				CHECK(!known[j]);
			for (uint64_t j = pieces[i].start; j < pieces[i].end; j++)
				CHECK(known[j] && count[j] == pieces[i].count && gone[j] == pieces[i].gone);
			last = pieces[i].end;
		}
		for (uint64_t j = last; j < PLACES; j++)
			CHECK(!known[j]);
		CHECK(watched.n <= ROOM);
	}
	CHECK(refused > 0);
}

static void a_child_has_no_watch(void)
{
	uint64_t at = map_filled(2);
	CHECK_OK(umm_watch_add(watch, at, at + 2 * page));
	fflush(NULL);
	pid_t pid = fork();
	CHECK(pid >= 0);
	if (pid == 0) {
		/* nobody reads, nobody waits */
		CHECK(syscall(SYS_munmap, at, page) == 0);
		CHECK_EQUAL(umm_watch_add(watch, at + page, at + 2 * page), -ESRCH);
		CHECK_EQUAL(umm_watch_changing(watch), -ESRCH);
		CHECK_OK(umm_watch_destroy(watch));
#ifndef __SANITIZE_THREAD__ /* which starts no thread in a child of a process that had some */
		struct umm_watch *own;
		CHECK_OK(umm_watch_create(umm_space_self(), &own));
		CHECK_OK(umm_watch_add(own, at + page, at + 2 * page));
		CHECK(syscall(SYS_munmap, at + page, page) == 0);
		CHECK_OK(umm_watch_destroy(own));
#endif
		_exit(0);
	}
	int status;
	CHECK(waitpid(pid, &status, 0) == pid && status == 0);
	struct record r;
	record_open(&r, at, at + 2 * page, false);
	CHECK(syscall(SYS_munmap, at, 2 * page) == 0);
	wait_for(&r, 2);
	record_close(&r);
	CHECK_OK(umm_watch_remove(watch, at, at + 2 * page));
}

/* A callback may take out of the watch what it is told of. */
static void remove_in_callback(void *context, const struct umm_notify_event *event)
{
	uint64_t *left = context;
	CHECK_OK(umm_watch_remove(watch, event->start, event->end));
	CHECK_EQUAL(umm_watch_destroy(watch), -EDEADLK);
	__atomic_fetch_sub(left, 1, __ATOMIC_SEQ_CST);
}

static void removed_by_a_callback(void)
{
	static const struct umm_notifier_ops ops = {.invalidate_range_end = remove_in_callback};
	struct umm_subscriber_options options = {.name = "remover", .ops = &ops};
	struct umm_subscriber *subscriber;
	struct umm_subscription *subscription;
	uint64_t at = map_filled(8), left = 8;
	for (uint64_t i = 0; i < 8; i++)
		CHECK_OK(umm_watch_add(watch, at + i * page, at + (i + 1) * page));
	CHECK_OK(umm_subscriber_create(&options, &subscriber));
	CHECK_OK(umm_subscribe(umm_space_self(), subscriber, at, at + 8 * page, &left, &subscription));
	for (uint64_t i = 0; i < 8; i++)
		CHECK(i % 2 ? syscall(SYS_munmap, at + i * page, page) == 0
		            : syscall(SYS_madvise, at + i * page, page, MADV_DONTNEED) == 0);
	while (__atomic_load_n(&left, __ATOMIC_SEQ_CST))
		sched_yield();
	CHECK_OK(umm_unsubscribe(subscription));
	CHECK_OK(umm_subscriber_destroy(subscriber));
	CHECK_EQUAL(watched_bytes(), 0);
	/* The thread of the watch unregisters what the callback could not. */
	while (is_registered(at))
		sched_yield();
	CHECK_OK(umm_unmap(at, 8 * page));
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
	for (;;) {
		*seed = *seed * 1664525 + 1013904223;
		uint64_t at = arena + (*seed >> 8) % SPOTS * page;
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
	/* A hole with walls: too small for a thread's stack. */
	arena_size = SPOTS * page;
	CHECK_OK(umm_map(
	        0, arena_size + 2 * page, PROT_NONE, UMM_MAP_PRIVATE | UMM_MAP_ANONYMOUS, -1, 0, &arena));
	arena += page;
	CHECK_OK(umm_unmap(arena, arena_size));
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
	RUN(pieces_against_counts());
	RUN(raw_calls_are_seen());
	RUN(free_is_seen());
	RUN(kinds_of_memory());
	RUN(adds_are_counted());
	RUN(a_child_has_no_watch());
	RUN(removed_by_a_callback());
	RUN(no_reader_believes_what_is_gone());
	RUN(addresses_change_hands());
	CHECK_OK(umm_watch_destroy(watch));
	return 0;
}
