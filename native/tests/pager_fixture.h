/* A pager with a region over bytes that tell where they belong. */
#ifndef UMM_TESTS_PAGER_FIXTURE_H
#define UMM_TESTS_PAGER_FIXTURE_H

#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

#include "pager/pager.h"
#include "tests/check.h"

static inline uint64_t page_size(void)
{
	return (uint64_t)sysconf(_SC_PAGESIZE);
}

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

struct fixture {
	struct umm_pager *pager;
	struct umm_store *store;
	struct umm_region *region;
	uint8_t *bytes;
	volatile uint8_t *memory;
	uint64_t size;
};

static inline void fixture_open(
        struct fixture *f, struct umm_pager_options pager, uint64_t size, uint64_t unit, int kind)
{
	*f = (struct fixture){.size = size, .bytes = make_bytes(size)};
	CHECK_OK(umm_pager_create(&pager, &f->pager));
	CHECK_OK(umm_store_memory_create(f->bytes, size, kind, &f->store));
	struct umm_region_options region = {.size = size, .unit = unit};
	CHECK_OK(umm_region_create(f->pager, f->store, &region, &f->region));
	f->memory = (volatile uint8_t *)umm_region_address(f->region);
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

#endif
