/* Eviction: nothing that was written is lost, whoever writes, takes it back or changes the budget meanwhile.
 */
#include "tests/pager_fixture.h"

static void eviction_keeps_writes(uint64_t unit, bool no_move, int kind)
{
	struct fixture f;
	uint64_t budget = 16 * unit < (1 << 20) ? 1 << 20 : 16 * unit, size = 2 * budget;
	fixture_open(
	        &f, (struct umm_pager_options){.budget_bytes = budget, .no_move = no_move}, size, unit, kind);
	/* What is read ahead could come in after the eviction below. */
	CHECK_OK(umm_region_advise(f.region, UMM_REGION_RANDOM));
	for (uint64_t at = 0; at < size; at += 512)
		store_word(f.memory, at, word_at(at, 1));
	for (uint64_t at = 0; at < size; at += 8)
		CHECK_EQUAL(load(f.memory, at), word_at(at, at % 512 ? 0 : 1));
	CHECK_OK(umm_region_evict(f.region, 0, size));
	struct umm_pager_counters c = counters_of(&f);
	CHECK(c.evicted_dirty > 0);
	CHECK_EQUAL(c.evict_failed, 0);
	CHECK_EQUAL(c.resident_bytes, 0);
	CHECK_OK(umm_region_flush(f.region));
	for (uint64_t at = 0; at < size; at += 8)
		CHECK_EQUAL(*(uint64_t *)(f.bytes + at),
		        word_at(at, kind == UMM_STORE_WRITEBACK && at % 512 == 0 ? 1 : 0));
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
		/* A thread owns its words: the low byte counts its writes, and must never go back. */
		uint64_t old = load(w->f->memory, at);
		CHECK((old & ~0xffull) == (word_at(at, 0) & ~0xffull));
		store_word(w->f->memory, at, (old & ~0xffull) | ((old + 1) & 0xff));
	}
	return NULL;
}

enum { WRITERS = 4 };

static uint64_t counted_writes(struct fixture *f)
{
	uint64_t counted = 0;
	for (uint64_t at = 0; at < f->size; at += 8)
		counted += (uint8_t)(load(f->memory, at) - word_at(at, 0));
	return counted;
}

/* EEXIST of MOVE under writers, write-protect under writers, and the budget changing all the time. */
static void writers_under_eviction(uint64_t unit, bool no_move, bool changing)
{
	struct fixture f;
	uint64_t size = 2 << 20, rounds = (no_move                     ? 60
	                                          : unit > page_size() ? 300
	                                                               : 2000) /
	                                  (no_move ? 1 : SLOWDOWN);
	fixture_open(&f,
	        (struct umm_pager_options){
	                .budget_bytes = unit > page_size() ? 1 << 20 : 512 << 10, .no_move = no_move},
	        size, unit, UMM_STORE_PRIVATE);
	pthread_t threads[WRITERS];
	struct writer writers[WRITERS];
	for (uint64_t i = 0; i < WRITERS; i++) {
		writers[i] = (struct writer){&f, i, WRITERS, rounds};
		CHECK(pthread_create(&threads[i], NULL, write_own_words, &writers[i]) == 0);
	}
	for (int i = 0; changing && i < 20; i++) {
		static const uint64_t budgets[] = {0, 600 << 10, 1 << 20, 2 << 20};
		CHECK_OK(umm_pager_set_budget(f.pager, budgets[i % 4]));
		CHECK_OK(umm_region_evict(f.region, size / 4, size / 4));
	}
	for (int i = 0; i < WRITERS; i++)
		pthread_join(threads[i], NULL);
	CHECK_EQUAL(counted_writes(&f), WRITERS * rounds);
	CHECK(counters_of(&f).evicted_dirty > 0);
	fixture_close(&f);
}

static void *evict_main(void *argument)
{
	struct fixture *f = argument;
	umm_region_evict(f->region, 0, f->size);
	return NULL;
}

/* Touched and changed while its old bytes are being written: the change is not lost. */
static void change_during_write(uint64_t unit, bool no_move)
{
	struct fixture f;
	struct gated_store *store;
	uint64_t size = 32 * unit;
	gated_open(&f, (struct umm_pager_options){.handlers = 2, .no_move = no_move}, size, unit,
	        UMM_STORE_WRITEBACK, &store);
	for (uint64_t at = 0; at < size; at += 8)
		store_word(f.memory, at, word_at(at, 1));
	gate_close(&store->write, 4 * unit);
	pthread_t evictor;
	CHECK(pthread_create(&evictor, NULL, evict_main, &f) == 0);
	gate_reached(&store->write);
	struct access change = {.memory = f.memory, .at = 4 * unit + 64, .value = 99, .write = true};
	access_start(&change);
	access_join(&change); /* does not wait for the store */
	sem_post(&store->write.go);
	pthread_join(evictor, NULL);
	CHECK_EQUAL(load(f.memory, 4 * unit + 64), 99);
	CHECK_OK(umm_region_evict(f.region, 0, size));
	CHECK_EQUAL(load(f.memory, 4 * unit + 64), 99);
	CHECK_OK(umm_region_flush(f.region));
	for (uint64_t at = 0; at < size; at += 8)
		CHECK_EQUAL(*(uint64_t *)(f.bytes + at), at == 4 * unit + 64 ? 99 : word_at(at, 1));
	fixture_close(&f);
}

/* A store that refuses loses nothing, and is asked again. */
static void store_refuses(uint64_t budget, bool no_move)
{
	struct fixture f;
	struct gated_store *store;
	uint64_t unit = page_size(), size = 256 * unit;
	gated_open(&f, (struct umm_pager_options){.no_move = no_move, .budget_bytes = budget}, size, unit,
	        UMM_STORE_WRITEBACK, &store);
	store->write_error = ENOSPC;
	for (uint64_t at = 0; at < size; at += 8)
		store_word(f.memory, at, word_at(at, 1));
	CHECK(umm_region_evict(f.region, 0, size) == -ENOSPC);
	CHECK_OK(umm_region_populate(f.region, 0, size)); /* does not wait for room that never comes */
	check_words(f.memory, 0, size, 1);
	CHECK(umm_region_flush(f.region) == -ENOSPC);
	CHECK(counters_of(&f).evict_failed > 0);
	store->write_error = 0;
	CHECK_OK(umm_region_flush(f.region));
	check_words(f.bytes, 0, size, 1);
	check_words(f.memory, 0, size, 1);
	fixture_close(&f);
}

static void budget_of_bad_size(void)
{
	struct fixture f;
	uint64_t unit = 64 << 10;
	fixture_open(&f, (struct umm_pager_options){.budget_bytes = 16 * unit}, 64 * unit, unit,
	        UMM_STORE_PRIVATE);
	CHECK(umm_pager_set_budget(f.pager, 4 * unit) == -ENOBUFS);
	check_words(f.memory, 0, f.size, 0);
	CHECK(umm_pager_destroy(f.pager) == -EBUSY);
	CHECK(umm_region_evict(f.region, 1, f.size) == -EINVAL);
	CHECK(umm_region_populate(f.region, UINT64_MAX, 2) == -EINVAL);
	CHECK(umm_region_prefetch(f.region, f.size + 1, 0) == -EINVAL);
	fixture_close(&f);
}

int main(void)
{
	uint64_t page = page_size(), large = 64 << 10;
	for (int no_move = 0; no_move <= 1; no_move++) {
		RUN(eviction_keeps_writes(page, no_move, UMM_STORE_PRIVATE));
		RUN(eviction_keeps_writes(page, no_move, UMM_STORE_WRITEBACK));
		RUN(eviction_keeps_writes(large, no_move, UMM_STORE_PRIVATE));
		if (SLOWDOWN == 1)
			RUN(eviction_keeps_writes(2 << 20, no_move, UMM_STORE_PRIVATE));
		RUN(writers_under_eviction(page, no_move, false));
		RUN(writers_under_eviction(large, no_move, false));
		RUN(writers_under_eviction(page, no_move, true));
		RUN(change_during_write(page, no_move));
		RUN(change_during_write(large, no_move));
		RUN(store_refuses(0, no_move));
		RUN(store_refuses(64 * page, no_move));
	}
	RUN(budget_of_bad_size());
	return 0;
}
