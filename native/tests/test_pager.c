/* Regions over memory: every byte arrives, survives eviction, and follows the user's own system calls. */
#include <errno.h>
#include <pthread.h>
#include <string.h>

#include "tests/pager_fixture.h"

static void every_byte_arrives(uint64_t unit, bool in_thread)
{
	struct fixture f;
	uint64_t size = 4 << 20;
	fixture_open(&f, (struct umm_pager_options){.in_thread = in_thread, .uffd_source = 3}, size, unit,
	        UMM_STORE_PRIVATE);
	for (uint64_t at = 0; at < size; at += 8)
		CHECK_EQUAL(*(volatile uint64_t *)(f.memory + at), word_at(at, 0));
	struct umm_pager_counters c = counters_of(&f);
	CHECK(c.faults_missing > 0);
	CHECK(c.bytes_fetched == size);
	CHECK_EQUAL(c.resident_bytes, size);
	fixture_close(&f);
}

static void eviction_keeps_writes(uint64_t unit, bool no_move, int kind)
{
	struct fixture f;
	uint64_t budget = 16 * unit < (4 << 20) ? 4 << 20 : 16 * unit, size = 3 * budget;
	fixture_open(&f,
	        (struct umm_pager_options){.budget_bytes = budget, .no_move = no_move, .uffd_source = 3},
	        size, unit, kind);
	for (uint64_t round = 1; round <= 2; round++) {
		for (uint64_t at = 0; at < size; at += 512)
			*(volatile uint64_t *)(f.memory + at) = word_at(at, round);
		for (uint64_t at = 0; at < size; at += 8)
			CHECK_EQUAL(*(volatile uint64_t *)(f.memory + at), word_at(at, at % 512 ? 0 : round));
	}
	struct umm_pager_counters c = counters_of(&f);
	CHECK(c.evicted_dirty > 0);
	CHECK_EQUAL(c.evict_failed, 0);
	CHECK_EQUAL(c.resident_bytes / size, 0);
	if (kind == UMM_STORE_WRITEBACK) {
		CHECK_OK(umm_region_flush(f.region));
		for (uint64_t at = 0; at < size; at += 8)
			CHECK_EQUAL(*(uint64_t *)(f.bytes + at), word_at(at, at % 512 ? 0 : 2));
	} else {
		for (uint64_t at = 0; at < size; at += 8)
			CHECK_EQUAL(*(uint64_t *)(f.bytes + at), word_at(at, 0));
	}
	fixture_close(&f);
}

static void removed_pages_read_zero(uint64_t unit)
{
	struct fixture f;
	uint64_t size = 64 * unit, page = page_size();
	fixture_open(&f, (struct umm_pager_options){.uffd_source = 3}, size, unit, UMM_STORE_PRIVATE);
	CHECK_OK(umm_region_populate(f.region, 0, size / 2));
	/* present and absent units, whole and in part */
	uint64_t starts[] = {unit, 40 * unit, 3 * unit + (unit - page), 50 * unit};
	uint64_t lens[] = {unit, unit, page, page};
	for (int i = 0; i < 4; i++)
		CHECK(madvise((void *)(f.memory + starts[i]), lens[i], MADV_DONTNEED) == 0);
	for (uint64_t at = 0; at < size; at += 8) {
		bool removed = false;
		for (int i = 0; i < 4; i++)
			removed |= at >= starts[i] && at < starts[i] + lens[i];
		CHECK_EQUAL(*(volatile uint64_t *)(f.memory + at), removed ? 0 : word_at(at, 0));
	}
	CHECK_OK(umm_region_evict(f.region, 0, size));
	CHECK_EQUAL(counters_of(&f).resident_bytes, 0);
	for (uint64_t at = 0; at < size; at += 8) {
		bool removed = false;
		for (int i = 0; i < 4; i++)
			removed |= at >= starts[i] && at < starts[i] + lens[i];
		CHECK_EQUAL(*(volatile uint64_t *)(f.memory + at), removed ? 0 : word_at(at, 0));
	}
	fixture_close(&f);
}

static void remapped_range_keeps_its_place(void)
{
	struct fixture f;
	uint64_t page = page_size(), size = 64 * page;
	fixture_open(&f, (struct umm_pager_options){.uffd_source = 3}, size, page, UMM_STORE_PRIVATE);
	CHECK_EQUAL(f.memory[0], (uint8_t)word_at(0, 0));
	uint8_t *moved = mremap(
	        (void *)(f.memory + 16 * page), 16 * page, 16 * page, MREMAP_MAYMOVE | MREMAP_DONTUNMAP);
	if (moved == MAP_FAILED || moved == f.memory + 16 * page)
		moved = mremap((void *)(f.memory + 16 * page), 16 * page, 32 * page, MREMAP_MAYMOVE);
	CHECK(moved != MAP_FAILED);
	for (uint64_t at = 0; at < 16 * page; at += 8)
		CHECK_EQUAL(*(volatile uint64_t *)(moved + at), word_at(16 * page + at, 0));
	CHECK(munmap((void *)(f.memory + 40 * page), 8 * page) == 0);
	for (uint64_t at = 32 * page; at < 40 * page; at += 8)
		CHECK_EQUAL(*(volatile uint64_t *)(f.memory + at), word_at(at, 0));
	struct umm_pager_counters c = counters_of(&f);
	CHECK(c.events_remap >= 1);
	CHECK(c.events_unmap >= 1);
	fixture_close(&f);
}

struct writer {
	struct fixture *f;
	uint64_t first, step, rounds;
};

static void *write_own_words(void *argument)
{
	struct writer *w = argument;
	uint64_t seed = w->first * 2654435761u + 1;
	for (uint64_t round = 0; round < w->rounds; round++) {
		seed = seed * 6364136223846793005u + 1442695040888963407u;
		uint64_t words = w->f->size / 8 / w->step;
		uint64_t at = ((seed >> 33) % words * w->step + w->first) * 8;
		volatile uint64_t *word = (volatile uint64_t *)(w->f->memory + at);
		/* A thread owns its words: the low byte counts its writes, and must never go back. */
		uint64_t old = *word;
		CHECK((old & ~0xffull) == (word_at(at, 0) & ~0xffull));
		*word = (old & ~0xffull) | ((old + 1) & 0xff);
	}
	return NULL;
}

static void writers_under_eviction(uint64_t unit, bool no_move)
{
	enum { N = 4 };
	struct fixture f;
	uint64_t size = 8 << 20;
	fixture_open(&f,
	        (struct umm_pager_options){.budget_bytes = 2 << 20, .no_move = no_move, .uffd_source = 3},
	        size, unit, UMM_STORE_PRIVATE);
	pthread_t threads[N];
	struct writer writers[N];
	/* Each round may move a whole unit: fewer of them with larger units. */
	uint64_t rounds = (no_move ? 8000 : 30000) / (unit > page_size() ? 8 : 1);
	for (uint64_t i = 0; i < N; i++) {
		writers[i] = (struct writer){&f, i, N, rounds};
		CHECK(pthread_create(&threads[i], NULL, write_own_words, &writers[i]) == 0);
	}
	for (int i = 0; i < N; i++)
		pthread_join(threads[i], NULL);
	uint64_t counted = 0;
	for (uint64_t at = 0; at < size; at += 8)
		counted += (uint8_t)(*(volatile uint64_t *)(f.memory + at) - word_at(at, 0));
	CHECK_EQUAL(counted, N * rounds);
	CHECK(counters_of(&f).evicted_dirty > 0);
	fixture_close(&f);
}

int main(void)
{
	uint64_t page = page_size();
	every_byte_arrives(page, false);
	every_byte_arrives(64 << 10, false);
	every_byte_arrives(2 << 20, false);
	every_byte_arrives(page, true);
	removed_pages_read_zero(page);
	removed_pages_read_zero(64 << 10);
	remapped_range_keeps_its_place();
	for (int no_move = 0; no_move <= 1; no_move++) {
		eviction_keeps_writes(page, no_move, UMM_STORE_PRIVATE);
		eviction_keeps_writes(page, no_move, UMM_STORE_WRITEBACK);
		eviction_keeps_writes(64 << 10, no_move, UMM_STORE_PRIVATE);
		eviction_keeps_writes(2 << 20, no_move, UMM_STORE_PRIVATE);
		writers_under_eviction(page, no_move);
		writers_under_eviction(64 << 10, no_move);
	}
	return 0;
}
