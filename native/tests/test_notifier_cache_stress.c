/* Threads allocate, register, use and free at random. A registration is a fixed buffer of an io_uring, which
 * pins pages as a device does; a use writes from it, and every byte has to be what the memory holds now.
 *
 * Seconds: the argument, or UMM_STRESS_S, or a few. */
#include <malloc.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

#include "common/clock.h"
#include "fixed_buffers.h"
#include "kernel/madvise.h"
#include "kernel/mapping.h"
#include "notifier/cache.h"
#include "notifier/calls.h"
#include "notifier/notifier.h"

enum { THREADS = 8, BLOCKS = 6, SLOTS = 512, ENTRIES = 64, PAGES_MOST = 40, SECONDS = 3 };

struct block {
	uint8_t *memory;
	uint64_t length; /* of memory from mmap, whole pages */
	bool from_malloc;
};

struct stress {
	struct umm_cache *cache;
	struct umm_io_uring *ring;
	pthread_mutex_t ring_lock, slots_lock;
	bool used[SLOTS];
	uint64_t page, end_ns;
	bool raw;       /* half of the calls go past us */
	bool until_one; /* is wrong */
	_Atomic bool stop;
	_Atomic uint64_t stamp, uses, wrong, refused;
};

struct worker {
	struct stress *stress;
	pthread_t thread;
	uint64_t random;
	struct block blocks[BLOCKS];
	uint8_t *into;
	int file;
};

static uint64_t next(struct worker *worker, uint64_t below)
{
	worker->random ^= worker->random << 13;
	worker->random ^= worker->random >> 7;
	worker->random ^= worker->random << 17;
	return worker->random % below;
}

/* -- the device ----------------------------------------------------------------------------- */

static int enroll(void *context, uint64_t address, uint64_t length, void **registration)
{
	struct stress *stress = context;
	uint32_t slot = 0;
	pthread_mutex_lock(&stress->slots_lock);
	while (slot < SLOTS && stress->used[slot])
		slot++;
	CHECK(slot < SLOTS);
	stress->used[slot] = true;
	pthread_mutex_unlock(&stress->slots_lock);
	int err = umm_io_uring_update_slot(umm_io_uring_fd(stress->ring), slot, address, length);
	if (err) {
		pthread_mutex_lock(&stress->slots_lock);
		stress->used[slot] = false;
		pthread_mutex_unlock(&stress->slots_lock);
		return err;
	}
	*registration = (void *)(uintptr_t)slot;
	return 0;
}

static void deregister(void *context, void *registration)
{
	struct stress *stress = context;
	uint32_t slot = (uint32_t)(uintptr_t)registration;
	CHECK_OK(umm_io_uring_update_slot(umm_io_uring_fd(stress->ring), slot, 0, 0));
	pthread_mutex_lock(&stress->slots_lock);
	CHECK(stress->used[slot]);
	stress->used[slot] = false;
	pthread_mutex_unlock(&stress->slots_lock);
}

static const struct umm_cache_ops ops = {enroll, deregister};

/* -- what the threads do -------------------------------------------------------------------- */

static bool goes_past(struct worker *worker)
{
	return worker->stress->raw && next(worker, 2);
}

static void stamp(struct worker *worker, const struct block *block)
{
	/* No two pages ever hold the same. */
	for (uint64_t at = 0; at < block->length; at += 512) {
		uint64_t value = atomic_fetch_add(&worker->stress->stamp, 1);
		memcpy(block->memory + at, &value, sizeof(value));
	}
}

static void allocate(struct worker *worker, struct block *block)
{
	uint64_t page = worker->stress->page, pages = 1 + next(worker, PAGES_MOST), at;
	block->length = pages * page;
	/* Through us or not: new memory is nobody's yet. glibc takes blocks of this size from mmap. */
	block->from_malloc = worker->stress->raw && next(worker, 3) == 0;
	if (block->from_malloc) {
		block->memory = malloc(block->length);
		CHECK(block->memory);
	} else {
		CHECK_OK(umm_map(0, block->length, PROT_READ | PROT_WRITE,
		        UMM_MAP_PRIVATE | UMM_MAP_ANONYMOUS, -1, 0, &at));
		block->memory = (uint8_t *)(uintptr_t)at;
	}
	memset(block->memory, 0, block->length);
	stamp(worker, block);
}

static void release(struct worker *worker, struct block *block)
{
	if (block->from_malloc)
		free(block->memory);
	else if (goes_past(worker))
		CHECK_OK(umm_unmap((uintptr_t)block->memory, block->length));
	else
		CHECK_OK(umm_mm_munmap((uintptr_t)block->memory, block->length));
	block->memory = NULL;
}

static void forget_some(struct worker *worker, struct block *block)
{
	uint64_t page = worker->stress->page;
	uint64_t first = ((uintptr_t)block->memory + page - 1) / page;
	uint64_t end = ((uintptr_t)block->memory + block->length) / page;
	if (first >= end)
		return;
	uint64_t at = first + next(worker, end - first), count = 1 + next(worker, end - at);
	if (goes_past(worker))
		CHECK_OK(umm_madvise(at * page, count * page, UMM_MADV_DONTNEED));
	else
		CHECK_OK(umm_mm_madvise(at * page, count * page, UMM_MADV_DONTNEED));
}

static void resize(struct worker *worker, struct block *block)
{
	uint64_t page = worker->stress->page, at;
	uint64_t length = (1 + next(worker, PAGES_MOST)) * page;
	if (block->from_malloc) {
		block->memory = realloc(block->memory, length);
		CHECK(block->memory);
	} else {
		int (*remap)(uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t *) =
		        goes_past(worker) ? umm_remap : umm_mm_mremap;
		int err, tries = 0;
		/* EFAULT: two mappings. Blocks that lie side by side are one mapping for the kernel, until
		 * one grows in the moment that the watch is told of the other. */
		do
			err = remap(
			        (uintptr_t)block->memory, block->length, length, UMM_MREMAP_MAYMOVE, 0, &at);
		while (err == -EFAULT && ++tries < 1000 && !usleep(100));
		CHECK_OK(err);
		block->memory = (uint8_t *)(uintptr_t)at;
	}
	if (length > block->length)
		memset(block->memory + block->length, 1, length - block->length);
	block->length = length;
}

static void use(struct worker *worker, const struct block *block)
{
	struct stress *stress = worker->stress;
	uint64_t at = next(worker, block->length), length = 1 + next(worker, block->length - at);
	struct umm_cache_handle handle;
	int err = umm_cache_get(stress->cache, (uintptr_t)block->memory + at, length, &handle);
	if (err) {
		CHECK_EQUAL(err, -ENOMEM); /* RLIMIT_MEMLOCK */
		atomic_fetch_add(&stress->refused, 1);
		return;
	}
	pthread_mutex_lock(&stress->ring_lock);
	int64_t done = deliver(stress->ring, worker->file, (uint32_t)(uintptr_t)handle.registration,
	        block->memory + at, length, worker->into);
	pthread_mutex_unlock(&stress->ring_lock);
	CHECK_EQUAL(done, length);
	if (memcmp(worker->into, block->memory + at, length) != 0) {
		atomic_fetch_add(&stress->wrong, 1);
		if (stress->until_one)
			atomic_store(&stress->stop, true);
	}
	atomic_fetch_add(&stress->uses, 1);
	CHECK_OK(umm_cache_put(stress->cache, &handle));
}

static void *work(void *argument)
{
	struct worker *worker = argument;
	struct stress *stress = worker->stress;
	while (!atomic_load(&stress->stop) && umm_now_ns() < stress->end_ns) {
		struct block *block = &worker->blocks[next(worker, BLOCKS)];
		uint64_t what = next(worker, 16);
		if (!block->memory)
			allocate(worker, block);
		else if (what == 0)
			release(worker, block);
		else if (what == 1)
			forget_some(worker, block);
		else if (what == 2)
			resize(worker, block);
		else if (what < 6)
			stamp(worker, block);
		else
			use(worker, block);
	}
	for (int i = 0; i < BLOCKS; i++)
		if (worker->blocks[i].memory)
			release(worker, &worker->blocks[i]);
	return NULL;
}

static void run(struct stress *stress, int follow, double seconds)
{
	static struct worker workers[THREADS];
	const struct umm_cache_options options = {
	        .ops = &ops,
	        .context = stress,
	        .entries_max = ENTRIES,
	        .limit_ns = 10000000000u,
	        .follow = follow,
	};
	stress->ring = ring_with_slots(SLOTS);
	stress->page = (uint64_t)sysconf(_SC_PAGESIZE);
	pthread_mutex_init(&stress->ring_lock, NULL);
	pthread_mutex_init(&stress->slots_lock, NULL);
	int err = umm_cache_create(&options, &stress->cache);
	if (err == -EPERM || err == -ENOSYS || err == -EOPNOTSUPP) {
		fprintf(stderr, "lacks: a userfaultfd with write protection and events (%s)\n",
		        strerror(-err));
		exit(TEST_SKIPPED);
	}
	CHECK_OK(err);
	stress->end_ns = umm_now_ns() + (uint64_t)(seconds * 1e9);
	for (int i = 0; i < THREADS; i++) {
		workers[i] = (struct worker){
		        .stress = stress,
		        .random = 0x9E3779B97F4A7C15u * (unsigned)(i + 1),
		        .into = malloc(PAGES_MOST * stress->page),
		        .file = umm_memfd_create("delivered", UMM_MFD_CLOEXEC),
		};
		CHECK(workers[i].into && workers[i].file >= 0);
		CHECK(pthread_create(&workers[i].thread, NULL, work, &workers[i]) == 0);
	}
	for (int i = 0; i < THREADS; i++) {
		pthread_join(workers[i].thread, NULL);
		free(workers[i].into);
		close(workers[i].file);
	}
	struct umm_cache_stats stats;
	umm_cache_stats(stress->cache, &stats);
	CHECK_OK(umm_cache_destroy(stress->cache));
	for (int i = 0; i < SLOTS; i++)
		CHECK(!stress->used[i]);
	umm_io_uring_destroy(stress->ring);
	fprintf(stderr,
	        "%llu uses, %llu wrong; %llu hits, %llu misses, %llu invalidated, %llu evicted, %llu "
	        "retired, "
	        "%llu uncached, %llu repeated, %llu overtaken\n",
	        (unsigned long long)stress->uses, (unsigned long long)stress->wrong,
	        (unsigned long long)stats.hits, (unsigned long long)stats.misses,
	        (unsigned long long)stats.invalidated, (unsigned long long)stats.evicted,
	        (unsigned long long)stats.retired, (unsigned long long)stats.uncached,
	        (unsigned long long)stats.repeated, (unsigned long long)stats.overtaken);
	CHECK(stress->uses > stress->refused);
	CHECK(stats.hits > 0 || stress->until_one);
	CHECK_EQUAL(stats.overtaken, 0);
	CHECK_EQUAL(stats.in_use, 0);
}

int main(int argc, char **argv)
{
	const char *wanted = argc > 1 ? argv[1] : getenv("UMM_STRESS_S");
	double seconds = wanted ? atof(wanted) : SECONDS;
	mallopt(M_MMAP_THRESHOLD, 1);
	static struct stress followed = {.raw = true}, told, blind = {.raw = true, .until_one = true};
	run(&followed, UMM_CACHE_FOLLOW_KERNEL, seconds * 0.7);
	CHECK_EQUAL(followed.wrong, 0);
	run(&told, UMM_CACHE_FOLLOW_CALLS, seconds * 0.3);
	CHECK_EQUAL(told.wrong, 0);
	/* And this can fail: without invalidation the old bytes are delivered. */
	run(&blind, UMM_CACHE_FOLLOW_NOTHING, 60);
	CHECK(blind.wrong > 0);
	return 0;
}
