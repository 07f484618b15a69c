/* A pager with a region over bytes that tell where they belong; and a store that stops where a test says. */
#ifndef UMM_TESTS_PAGER_FIXTURE_H
#define UMM_TESTS_PAGER_FIXTURE_H

#include <errno.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "pager/pager.h"
#include "tests/check.h"

/* Under a sanitizer everything takes ten times as long. */
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
enum { SLOWDOWN = 8 };
#else
enum { SLOWDOWN = 1 };
#endif

static inline uint64_t page_size(void)
{
	return (uint64_t)sysconf(_SC_PAGESIZE);
}

/* A case; with UMM_TEST_TIMES set, how long it took. */
#define RUN(call)                                                                                            \
	do {                                                                                                 \
		struct timespec run_a, run_b;                                                                \
		clock_gettime(CLOCK_MONOTONIC, &run_a);                                                      \
		call;                                                                                        \
		clock_gettime(CLOCK_MONOTONIC, &run_b);                                                      \
		if (getenv("UMM_TEST_TIMES"))                                                                \
			fprintf(stderr, "%7.3f s %s\n",                                                      \
			        (double)(run_b.tv_sec - run_a.tv_sec) +                                      \
			                (double)(run_b.tv_nsec - run_a.tv_nsec) / 1e9,                       \
			        #call);                                                                      \
	} while (0)

/* Every 8 bytes name their own offset and a version. */
static inline uint64_t word_at(uint64_t offset, uint64_t version)
{
	return (offset << 8) ^ (version * 0x9e3779b97f4a7c15u) ^ 0x5a;
}

static inline uint8_t *make_bytes(uint64_t len)
{
	uint8_t *p = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(p != MAP_FAILED);
	for (uint64_t at = 0; at + 8 <= len; at += 8)
		*(uint64_t *)(p + at) = word_at(at, 0);
	return p;
}

static inline uint64_t load(volatile uint8_t *memory, uint64_t at)
{
	return __atomic_load_n((volatile uint64_t *)(memory + at), __ATOMIC_RELAXED);
}

static inline void store_word(volatile uint8_t *memory, uint64_t at, uint64_t value)
{
	__atomic_store_n((volatile uint64_t *)(memory + at), value, __ATOMIC_RELAXED);
}

/* [start, end) holds the words of this version. */
static inline void check_words(volatile uint8_t *memory, uint64_t start, uint64_t end, uint64_t version)
{
	for (uint64_t at = start; at < end; at += 8)
		CHECK_EQUAL(load(memory, at), word_at(at, version));
}

static inline void check_zeros(volatile uint8_t *memory, uint64_t start, uint64_t end)
{
	for (uint64_t at = start; at < end; at += 8)
		CHECK_EQUAL(load(memory, at), 0);
}

static inline void sleep_ms(long ms)
{
	nanosleep(&(struct timespec){ms / 1000, ms % 1000 * 1000000}, NULL);
}

struct fixture {
	struct umm_pager *pager;
	struct umm_store *store;
	struct umm_region *region;
	uint8_t *bytes;
	volatile uint8_t *memory;
	uint64_t size;
};

/* A region on f->store, which the caller has made. */
static inline void fixture_map(
        struct fixture *f, struct umm_pager_options pager, struct umm_region_options region)
{
	pager.uffd_source = 3; /* enum umm_uffd_source: any */
	CHECK_OK(umm_pager_create(&pager, &f->pager));
	CHECK_OK(umm_region_create(f->pager, f->store, &region, &f->region));
	f->memory = (volatile uint8_t *)umm_region_address(f->region);
	f->size = region.size;
}

static inline void fixture_open(
        struct fixture *f, struct umm_pager_options pager, uint64_t size, uint64_t unit, int kind)
{
	*f = (struct fixture){.bytes = make_bytes(size)};
	CHECK_OK(umm_store_memory_create(f->bytes, size, kind, &f->store));
	fixture_map(f, pager, (struct umm_region_options){.size = size, .unit = unit});
}

static inline void fixture_close(struct fixture *f)
{
	CHECK_OK(umm_region_close(f->region));
	umm_store_put(f->store);
	CHECK_OK(umm_pager_destroy(f->pager));
	munmap(f->bytes, f->size);
}

static inline struct umm_pager_counters counters_of(struct fixture *f)
{
	static struct umm_pager_stats stats;
	CHECK_OK(umm_pager_stats(f->pager, &stats));
	return stats.counters;
}

/* A memory store that keeps out of sight (no peek), and stops in fetch or write at the bytes that a test
 * names: it posts `reached`, and goes on when the test posts `go`. */
struct gate {
	_Atomic uint64_t offset; /* UINT64_MAX: none */
	sem_t reached, go;
};

struct gated_store {
	struct umm_store base;
	uint8_t *bytes;
	struct gate fetch, write;
	_Atomic int fetch_error, write_error; /* answered instead of doing it; 0: none */
	_Atomic uint64_t fetches, writes, flushes;
};

static inline void gate_pass(struct gate *gate, uint64_t offset, uint64_t len)
{
	uint64_t at = atomic_load(&gate->offset);
	if (at < offset || at >= offset + len)
		return;
	/* Once: whoever comes later passes. */
	if (!atomic_compare_exchange_strong(&gate->offset, &at, UINT64_MAX))
		return;
	sem_post(&gate->reached);
	while (sem_wait(&gate->go) < 0)
		CHECK(errno == EINTR);
}

static inline void gate_close(struct gate *gate, uint64_t offset)
{
	atomic_store(&gate->offset, offset);
}

static inline void gate_reached(struct gate *gate)
{
	while (sem_wait(&gate->reached) < 0)
		CHECK(errno == EINTR);
}

static int gated_fetch(struct umm_store *base, uint64_t offset, uint64_t len, void *buf)
{
	struct gated_store *store = (struct gated_store *)base;
	atomic_fetch_add(&store->fetches, 1);
	gate_pass(&store->fetch, offset, len);
	int error = atomic_load(&store->fetch_error);
	if (error)
		return -error;
	for (uint64_t at = 0; at < len; at += 8)
		*(uint64_t *)((uint8_t *)buf + at) = load(store->bytes, offset + at);
	return 0;
}

static int gated_write(struct umm_store *base, uint64_t offset, uint64_t len, const void *buf)
{
	struct gated_store *store = (struct gated_store *)base;
	atomic_fetch_add(&store->writes, 1);
	gate_pass(&store->write, offset, len);
	int error = atomic_load(&store->write_error);
	if (error)
		return -error;
	for (uint64_t at = 0; at < len; at += 8)
		store_word(store->bytes, offset + at, *(const uint64_t *)((const uint8_t *)buf + at));
	return 0;
}

static int gated_flush(struct umm_store *base)
{
	atomic_fetch_add(&((struct gated_store *)base)->flushes, 1);
	return 0;
}

static void gated_destroy(struct umm_store *base)
{
	free(base);
}

static const struct umm_store_ops gated_ops = {
        .name = "gated",
        .fetch = gated_fetch,
        .write = gated_write,
        .flush = gated_flush,
        .destroy = gated_destroy,
};

/* A region over a gated store; the store in *ret. */
static inline void gated_open(struct fixture *f, struct umm_pager_options pager, uint64_t size, uint64_t unit,
        int kind, struct gated_store **ret)
{
	struct gated_store *store = calloc(1, sizeof(*store));
	CHECK(store);
	umm_store_init(&store->base, &gated_ops, kind, size);
	store->fetch.offset = store->write.offset = UINT64_MAX;
	sem_init(&store->fetch.reached, 0, 0);
	sem_init(&store->fetch.go, 0, 0);
	sem_init(&store->write.reached, 0, 0);
	sem_init(&store->write.go, 0, 0);
	*f = (struct fixture){.bytes = make_bytes(size), .store = &store->base};
	store->bytes = f->bytes;
	fixture_map(f, pager, (struct umm_region_options){.size = size, .unit = unit});
	*ret = store;
}

/* One word read, or written, by a thread of its own. */
struct access {
	volatile uint8_t *memory;
	uint64_t at, value;
	bool write;
	_Atomic bool done;
	pthread_t thread;
};

static void *access_main(void *argument)
{
	struct access *access = argument;
	if (access->write)
		store_word(access->memory, access->at, access->value);
	else
		access->value = load(access->memory, access->at);
	atomic_store(&access->done, true);
	return NULL;
}

static inline void access_start(struct access *access)
{
	CHECK(pthread_create(&access->thread, NULL, access_main, access) == 0);
}

static inline void access_join(struct access *access)
{
	CHECK(pthread_join(access->thread, NULL) == 0);
}

#endif
