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
	CHECK_OK(umm_watch_destroy(watch));
	return 0;
}
