/* The registration cache: what it keeps, and exactly what it drops. */
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "kernel/madvise.h"
#include "kernel/mapping.h"
#include "notifier/cache.h"
#include "notifier/calls.h"
#include "notifier/notifier.h"

enum { PAGES = 16, MANY = 1024 };
static const uint64_t second_ns = 1000000000, short_ns = 30000000;
static uint64_t page;

/* -- a device that counts; in shared memory, so that it outlives children that exit --------- */

struct device {
	_Atomic uint32_t next;
	_Atomic uint8_t registered[MANY], deregistered[MANY];
	_Atomic uint32_t n_registered, n_deregistered;
	_Atomic unsigned sleep_us;
	_Atomic int refuse;
	_Atomic uint32_t changes; /* so many registrations meet a change of their memory */
};
static struct device *device;

static int enroll(void *context, uint64_t address, uint64_t length, void **registration)
{
	CHECK(context == device && address % page == 0 && length % page == 0 && length > 0);
	if (atomic_load(&device->refuse))
		return atomic_load(&device->refuse);
	usleep(atomic_load(&device->sleep_us));
	if (atomic_load(&device->changes)) {
		atomic_fetch_sub(&device->changes, 1);
		CHECK_OK(umm_mm_madvise(address, length, UMM_MADV_DONTNEED));
	}
	uint32_t id = atomic_fetch_add(&device->next, 1);
	CHECK(id < MANY);
	atomic_store(&device->registered[id], 1);
	atomic_fetch_add(&device->n_registered, 1);
	*registration = (void *)(uintptr_t)id;
	return 0;
}

static void deregister(void *context, void *registration)
{
	CHECK(context == device);
	uint32_t id = (uint32_t)(uintptr_t)registration;
	CHECK(atomic_load(&device->registered[id]) == 1);
	CHECK_EQUAL(atomic_fetch_add(&device->deregistered[id], 1), 0); /* once */
	atomic_fetch_add(&device->n_deregistered, 1);
}

static const struct umm_cache_ops ops = {enroll, deregister};

static struct umm_cache *cache_of(uint32_t entries, uint64_t bytes, uint64_t limit_ns, int follow)
{
	struct umm_cache *cache;
	const struct umm_cache_options options = {
	        .ops = &ops,
	        .context = device,
	        .entries_max = entries,
	        .bytes_max = bytes,
	        .limit_ns = limit_ns,
	        .follow = follow,
	};
	int err = umm_cache_create(&options, &cache);
	if (err == -EPERM || err == -ENOSYS || err == -EOPNOTSUPP) {
		fprintf(stderr, "lacks: a userfaultfd with write protection and events (%s)\n",
		        strerror(-err));
		exit(TEST_SKIPPED);
	}
	CHECK_OK(err);
	memset((void *)device, 0, sizeof(*device));
	return cache;
}

static uint8_t *map_pages(uint64_t pages, int flags)
{
	uint8_t *memory = mmap(NULL, pages * page, PROT_READ | PROT_WRITE, flags | MAP_ANONYMOUS, -1, 0);
	CHECK(memory != MAP_FAILED);
	return memory;
}

static struct umm_cache_handle get(struct umm_cache *cache, const uint8_t *at, uint64_t length)
{
	struct umm_cache_handle handle;
	CHECK_OK(umm_cache_get(cache, (uintptr_t)at, length, &handle));
	CHECK(handle.address <= (uintptr_t)at && handle.address + handle.length >= (uintptr_t)at + length);
	return handle;
}

/* True: it was there. */
static bool hits(struct umm_cache *cache, const uint8_t *at, uint64_t length)
{
	struct umm_cache_handle handle = get(cache, at, length);
	bool hit = handle.hit;
	CHECK(atomic_load(&device->deregistered[(uintptr_t)handle.registration]) == 0);
	CHECK_OK(umm_cache_put(cache, &handle));
	return hit;
}

static struct umm_cache_stats stats_of(struct umm_cache *cache)
{
	struct umm_cache_stats stats;
	umm_cache_stats(cache, &stats);
	return stats;
}

static void finish(struct umm_cache *cache)
{
	CHECK_OK(umm_cache_destroy(cache));
	CHECK_EQUAL(atomic_load(&device->n_registered), atomic_load(&device->n_deregistered));
}

/* -- lookups -------------------------------------------------------------------------------- */

static void test_lookups(void)
{
	struct umm_cache *cache = cache_of(8, 0, second_ns, UMM_CACHE_FOLLOW_CALLS);
	uint8_t *memory = map_pages(PAGES, MAP_PRIVATE);
	CHECK(!hits(cache, memory + 2 * page + 10, page)); /* two pages */
	CHECK(hits(cache, memory + 2 * page, 2 * page));
	CHECK(hits(cache, memory + 3 * page, 1));
	CHECK(!hits(cache, memory + 3 * page, page + 1)); /* overlaps: stays apart */
	CHECK(hits(cache, memory + 2 * page, 2 * page));
	CHECK(hits(cache, memory + 4 * page, 1));
	CHECK_EQUAL(stats_of(cache).entries, 2);
	CHECK_EQUAL(stats_of(cache).bytes, 4 * page);
	CHECK(!hits(cache, memory + 2 * page, 4 * page)); /* covers both */
	CHECK_EQUAL(stats_of(cache).entries, 1);
	CHECK_EQUAL(stats_of(cache).retired, 2);
	CHECK(hits(cache, memory + 2 * page, 4 * page));
	CHECK(!hits(cache, memory + 1 * page, 5 * page)); /* the same end, and then the same start */
	CHECK(!hits(cache, memory + 1 * page, 6 * page));
	CHECK_EQUAL(stats_of(cache).entries, 1);
	struct umm_cache_handle handle;
	CHECK_EQUAL(umm_cache_get(cache, (uintptr_t)memory, 0, &handle), -EINVAL);
	CHECK_EQUAL(umm_cache_get(cache, UINT64_MAX - page, 2 * page, &handle), -EINVAL);
	atomic_store(&device->refuse, -EIO);
	CHECK_EQUAL(umm_cache_get(cache, (uintptr_t)memory, page, &handle), -EIO);
	atomic_store(&device->refuse, 0);
	CHECK_EQUAL(stats_of(cache).in_use, 0);
	handle = get(cache, memory, page);
	CHECK_EQUAL(umm_cache_destroy(cache), -EBUSY);
	CHECK_OK(umm_cache_put(cache, &handle));
	CHECK_EQUAL(umm_cache_put(cache, &handle), -EINVAL);
	finish(cache);
	munmap(memory, PAGES * page);
}

static void test_limits(void)
{
	struct umm_cache *cache = cache_of(3, 0, second_ns, UMM_CACHE_FOLLOW_CALLS);
	uint8_t *memory = map_pages(PAGES, MAP_PRIVATE);
	for (int i = 0; i < 3; i++)
		CHECK(!hits(cache, memory + i * page, page));
	CHECK(hits(cache, memory, page)); /* now page 1 is the oldest */
	CHECK(!hits(cache, memory + 3 * page, page));
	CHECK(hits(cache, memory, page));
	CHECK(hits(cache, memory + 2 * page, page));
	struct umm_cache_handle handles[4];
	for (int i = 0; i < 4; i++)
		handles[i] = get(cache, memory + (8 + i) * page, page);
	CHECK(handles[2].entry && !handles[3].entry); /* all are in use: not kept */
	CHECK_EQUAL(stats_of(cache).uncached, 1);
	for (int i = 0; i < 4; i++)
		CHECK_OK(umm_cache_put(cache, &handles[i]));
	CHECK(!hits(cache, memory + 11 * page, page));
	umm_cache_trim(cache);
	CHECK_EQUAL(stats_of(cache).entries, 0);
	finish(cache);

	cache = cache_of(8, 4 * page, second_ns, UMM_CACHE_FOLLOW_CALLS);
	CHECK(!hits(cache, memory, 2 * page));
	CHECK(!hits(cache, memory + 2 * page, 2 * page));
	CHECK(!hits(cache, memory + 4 * page, page));
	CHECK_EQUAL(stats_of(cache).evicted, 1);
	CHECK_EQUAL(stats_of(cache).bytes, 3 * page);
	finish(cache);
	munmap(memory, PAGES * page);
}

static void *get_the_same(void *argument)
{
	struct umm_cache *cache = argument;
	uint8_t *at = (uint8_t *)(uintptr_t)(page * 16);
	CHECK(!hits(cache, at, page) || stats_of(cache).registered == 1);
	return NULL;
}

static void test_two_who_ask_at_once_register_once(void)
{
	struct umm_cache *cache = cache_of(8, 0, second_ns, UMM_CACHE_FOLLOW_CALLS);
	atomic_store(&device->sleep_us, 20000);
	pthread_t threads[4];
	for (int i = 0; i < 4; i++)
		CHECK(pthread_create(&threads[i], NULL, get_the_same, cache) == 0);
	for (int i = 0; i < 4; i++)
		pthread_join(threads[i], NULL);
	CHECK_EQUAL(stats_of(cache).registered, 1);
	CHECK_EQUAL(stats_of(cache).hits, 3);
	finish(cache);
}

/* -- changes -------------------------------------------------------------------------------- */

static void forget(uint8_t *at, bool told)
{
	CHECK_OK((told ? umm_mm_madvise : umm_madvise)((uintptr_t)at, page, UMM_MADV_DONTNEED));
}

static void unmap(uint8_t *at, bool told)
{
	CHECK_OK((told ? umm_mm_munmap : umm_unmap)((uintptr_t)at, page));
	CHECK(mmap(at, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1,
	              0) == at);
}

static void move(uint8_t *at, bool told)
{
	uint8_t *to = map_pages(1, MAP_PRIVATE);
	uint64_t moved;
	CHECK_OK((told ? umm_mm_mremap : umm_remap)(
	        (uintptr_t)at, page, page, UMM_MREMAP_MAYMOVE | UMM_MREMAP_FIXED, (uintptr_t)to, &moved));
	munmap(to, page);
	CHECK(mmap(at, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1,
	              0) == at);
}

static void test_exactly_what_changed_is_dropped(int follow)
{
	bool told = follow == UMM_CACHE_FOLLOW_CALLS;
	void (*const changes[])(uint8_t *, bool) = {forget, unmap, move};
	for (unsigned i = 0; i < 3; i++) {
		struct umm_cache *cache = cache_of(8, 0, second_ns, follow);
		uint8_t *memory = map_pages(PAGES, MAP_PRIVATE);
		memset(memory, 1, PAGES * page);
		uint64_t at[] = {1, 3, 4, 8}, length[] = {2, 1, 2, 1};
		for (int k = 0; k < 4; k++)
			CHECK(!hits(cache, memory + at[k] * page, length[k] * page));
		changes[i](memory + 4 * page, told);
		if (told) /* before the call returned */
			CHECK_EQUAL(atomic_load(&device->n_deregistered), 1);
		CHECK(hits(cache, memory + page, 2 * page));
		CHECK(hits(cache, memory + 3 * page, page));
		CHECK(hits(cache, memory + 8 * page, page));
		CHECK(!hits(cache, memory + 4 * page, 2 * page));
		CHECK(hits(cache, memory + 4 * page, 2 * page));
		CHECK_EQUAL(stats_of(cache).invalidated, 1);
		finish(cache);
		munmap(memory, PAGES * page);
	}
}

struct changer {
	uint8_t *at;
	_Atomic bool done;
};

static void *change_in_thread(void *argument)
{
	struct changer *changer = argument;
	forget(changer->at, true);
	atomic_store(&changer->done, true);
	return NULL;
}

static void test_a_change_waits_for_the_users(bool too_long)
{
	struct umm_cache *cache =
	        cache_of(8, 0, too_long ? short_ns : 60 * second_ns, UMM_CACHE_FOLLOW_CALLS);
	struct changer changer = {.at = map_pages(PAGES, MAP_PRIVATE)};
	struct umm_cache_handle handle = get(cache, changer.at, page), second = get(cache, changer.at, page);
	pthread_t thread;
	CHECK(pthread_create(&thread, NULL, change_in_thread, &changer) == 0);
	while (stats_of(cache).invalidated == 0)
		usleep(100);
	CHECK_OK(umm_cache_put(cache, &second));
	if (too_long) {
		pthread_join(thread, NULL);
		/* It happened, and the registration lives until its user is through. */
		CHECK_EQUAL(atomic_load(&device->n_deregistered), 0);
		CHECK(!hits(cache, changer.at, page));
		/* Not for ever: when the change went on before the callback began, that did not wait at all.
		 */
		for (int i = 0; i < 1000 && stats_of(cache).overtaken == 0; i++)
			usleep(1000);
		CHECK_OK(umm_cache_put(cache, &handle));
		while (atomic_load(&device->n_deregistered) == 0)
			usleep(100);
	} else {
		usleep(10000);
		CHECK(!atomic_load(&changer.done));
		CHECK_OK(umm_cache_put(cache, &handle));
		pthread_join(thread, NULL);
		CHECK_EQUAL(stats_of(cache).overtaken, 0);
	}
	CHECK_EQUAL(atomic_load(&device->n_deregistered), 1);
	finish(cache);
	munmap(changer.at, PAGES * page);
}

static void test_memory_that_changes_while_it_is_registered(void)
{
	struct umm_cache *cache = cache_of(8, 0, second_ns, UMM_CACHE_FOLLOW_CALLS);
	uint8_t *memory = map_pages(1, MAP_PRIVATE);
	atomic_store(&device->changes, 3);
	CHECK(!hits(cache, memory, page));
	CHECK_EQUAL(stats_of(cache).repeated, 3);
	CHECK(hits(cache, memory, page));
	umm_cache_trim(cache);
	/* It never comes to rest: what it is now, for one use. */
	atomic_store(&device->changes, 100);
	CHECK(!hits(cache, memory, page));
	CHECK_EQUAL(stats_of(cache).uncached, 1);
	CHECK_EQUAL(stats_of(cache).entries, 0);
	finish(cache);
	munmap(memory, page);
}

/* -- fork and exit -------------------------------------------------------------------------- */

__attribute__((unused)) static void test_fork(int follow)
{
	struct umm_cache *cache = cache_of(8, 0, second_ns, follow);
	uint8_t *own = map_pages(1, MAP_PRIVATE), *shared = map_pages(1, MAP_SHARED);
	uint8_t *kept = map_pages(1, MAP_PRIVATE);
	int status;
	CHECK(madvise(kept, page, MADV_DONTFORK) == 0);
	CHECK(!hits(cache, own, page) && !hits(cache, shared, page) && !hits(cache, kept, page));
	struct umm_cache_handle held = get(cache, shared, page);
	pid_t child = fork();
	CHECK(child >= 0);
	if (!child) {
		CHECK_EQUAL(stats_of(cache).entries, 0);
		CHECK_OK(umm_cache_put(cache, &held)); /* the parent's: nothing */
		CHECK(!hits(cache, own, page));        /* works on, with registrations of its own */
		CHECK(hits(cache, own, page));
		CHECK(!hits(cache, shared, page));
		forget(own, follow == UMM_CACHE_FOLLOW_CALLS);
		CHECK(!hits(cache, own, page));
		CHECK_OK(umm_cache_destroy(cache));
		_exit(0);
	}
	CHECK(waitpid(child, &status, 0) == child);
	CHECK_EQUAL(status, 0);
	CHECK_EQUAL(atomic_load(&device->n_registered), 3 + 3);
	CHECK(hits(cache, shared, page) && hits(cache, kept, page));
	CHECK(!hits(cache, own, page));
	CHECK_EQUAL(atomic_load(&device->n_deregistered), 1 + 3);
	CHECK_OK(umm_cache_put(cache, &held));
	finish(cache);
	munmap(own, page);
	munmap(shared, page);
	munmap(kept, page);
}

static void test_exit(void)
{
	static struct umm_cache *cache; /* not leaked */
	int status;
	fflush(NULL);
	pid_t child = fork();
	CHECK(child >= 0);
	if (!child) {
		cache = cache_of(8, 0, second_ns, UMM_CACHE_FOLLOW_CALLS);
		uint8_t *memory = map_pages(PAGES, MAP_PRIVATE);
		for (int i = 0; i < 4; i++)
			CHECK(!hits(cache, memory + i * page, page));
		struct umm_cache_handle held = get(cache, memory, page);
		CHECK(held.hit);
		exit(0);
	}
	CHECK(waitpid(child, &status, 0) == child);
	CHECK_EQUAL(status, 0);
	CHECK_EQUAL(atomic_load(&device->n_registered), 4);
	CHECK_EQUAL(atomic_load(&device->n_deregistered), 4);
}

int main(void)
{
	page = (uint64_t)sysconf(_SC_PAGESIZE);
	umm_notify_set_reporter(umm_notify_keep_reports, NULL); /* one is late on purpose */
	device = mmap(NULL, sizeof(*device), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(device != MAP_FAILED);
	test_lookups();
	test_limits();
	test_two_who_ask_at_once_register_once();
	test_exactly_what_changed_is_dropped(UMM_CACHE_FOLLOW_CALLS);
	test_exactly_what_changed_is_dropped(UMM_CACHE_FOLLOW_KERNEL);
	test_a_change_waits_for_the_users(false);
	test_a_change_waits_for_the_users(true);
	test_memory_that_changes_while_it_is_registered();
#ifndef __SANITIZE_THREAD__ /* which does not let the child of a process with threads start one */
	test_fork(UMM_CACHE_FOLLOW_CALLS);
	test_fork(UMM_CACHE_FOLLOW_KERNEL);
#endif
	test_exit();
	return 0;
}
