/* madvise, mremap and munmap of the user's on a region, against faults, eviction and new mappings. */
#include "common/clock.h"
#include "tests/pager_fixture.h"

static void removed_pages_read_zero(uint64_t unit)
{
	struct fixture f;
	uint64_t size = 64 * unit, page = page_size();
	fixture_open(&f, (struct umm_pager_options){0}, size, unit, UMM_STORE_PRIVATE);
	CHECK_OK(umm_region_populate(f.region, 0, size / 2));
	/* present and absent units, whole and in part */
	uint64_t starts[] = {unit, 40 * unit, 3 * unit + (unit - page), 50 * unit};
	uint64_t lens[] = {unit, unit, page, page};
	for (int i = 0; i < 4; i++)
		CHECK(madvise((void *)(f.memory + starts[i]), lens[i], MADV_DONTNEED) == 0);
	for (int round = 0; round < 2; round++) {
		for (uint64_t at = 0; at < size; at += 8) {
			bool removed = false;
			for (int i = 0; i < 4; i++)
				removed |= at >= starts[i] && at < starts[i] + lens[i];
			CHECK_EQUAL(load(f.memory, at), removed ? 0 : word_at(at, 0));
		}
		CHECK_OK(umm_region_evict(f.region, 0, size));
		CHECK_EQUAL(counters_of(&f).resident_bytes, 0);
	}
	fixture_close(&f);
}

/* The design's race: a fault is being fetched while its page is removed. What was fetched is stale then. */
static void remove_during_fetch(uint64_t unit, uint64_t at, uint64_t len, bool prefetched)
{
	struct fixture f;
	struct gated_store *store;
	uint64_t size = 32 * unit;
	gated_open(&f, (struct umm_pager_options){.handlers = 2}, size, unit, UMM_STORE_PRIVATE, &store);
	CHECK_OK(umm_region_advise(f.region, UMM_REGION_RANDOM));
	gate_close(&store->fetch, 4 * unit);
	struct access access = {.memory = f.memory, .at = at};
	if (prefetched)
		CHECK_OK(umm_region_prefetch(f.region, 2 * unit, 8 * unit));
	else
		access_start(&access);
	gate_reached(&store->fetch);
	if (prefetched)
		access_start(&access);
	/* Returns although the fetch hangs. */
	CHECK(madvise((void *)(f.memory + at), len, MADV_DONTNEED) == 0);
	sem_post(&store->fetch.go);
	access_join(&access);
	CHECK(access.value == 0);
	check_zeros(f.memory, at, at + len);
	check_words(f.memory, 0, at, 0);
	check_words(f.memory, at + len, size, 0);
	fixture_close(&f);
}

/* The fetch fails in the middle of a prefetched run: units behind it were removed meanwhile. */
static void remove_behind_a_failure(void)
{
	struct fixture f;
	struct gated_store *store;
	uint64_t unit = page_size(), size = 32 * unit;
	gated_open(&f, (struct umm_pager_options){.handlers = 2}, size, unit, UMM_STORE_PRIVATE, &store);
	gate_close(&store->fetch, 4 * unit);
	CHECK_OK(umm_region_prefetch(f.region, 0, 16 * unit));
	gate_reached(&store->fetch);
	CHECK(madvise((void *)(f.memory + 4 * unit), 4 * unit, MADV_DONTNEED) == 0);
	store->fetch_error = EIO;
	sem_post(&store->fetch.go);
	while (counters_of(&f).store_errors == 0)
		sleep_ms(1);
	store->fetch_error = 0;
	check_words(f.memory, 0, 4 * unit, 0);
	check_zeros(f.memory, 4 * unit, 8 * unit);
	check_words(f.memory, 8 * unit, size, 0);
	fixture_close(&f);
}

static void *evict_main(void *argument)
{
	struct fixture *f = argument;
	CHECK_OK(umm_region_evict(f->region, 0, f->size));
	return NULL;
}

/* Removed while its bytes are being written out: they must not come back. */
static void remove_during_write(uint64_t unit, bool no_move, int kind, uint64_t at, uint64_t len)
{
	struct fixture f;
	struct gated_store *store;
	uint64_t size = 32 * unit;
	gated_open(
	        &f, (struct umm_pager_options){.handlers = 2, .no_move = no_move}, size, unit, kind, &store);
	for (uint64_t word = 0; word < size; word += 8)
		store_word(f.memory, word, word_at(word, 1));
	gate_close(&store->write, 4 * unit);
	pthread_t evictor;
	struct access again = {.memory = f.memory, .at = at};
	CHECK(pthread_create(&evictor, NULL, evict_main, &f) == 0);
	gate_reached(&store->write);
	CHECK(madvise((void *)(f.memory + at), len, MADV_DONTNEED) == 0);
	access_start(&again);
	access_join(&again);
	CHECK_EQUAL(again.value, 0);
	sem_post(&store->write.go);
	pthread_join(evictor, NULL);
	check_zeros(f.memory, at, at + len);
	check_words(f.memory, 0, at, 1);
	check_words(f.memory, at + len, size, 1);
	CHECK_OK(umm_region_evict(f.region, 0, size));
	CHECK_OK(umm_region_flush(f.region));
	check_zeros(f.bytes, at, at + len);
	check_words(f.bytes, 0, at, 1);
	check_words(f.bytes, at + len, size, 1);
	fixture_close(&f);
}

/* After DONTNEED has returned a read is zero, however the faults before it came. */
struct racer {
	struct fixture *f;
	_Atomic bool stop;
};

static void *touch_main(void *argument)
{
	struct racer *racer = argument;
	uint64_t unit = page_size(), n = racer->f->size / unit, i = 0;
	while (!atomic_load(&racer->stop)) {
		uint64_t value = load(racer->f->memory, i % n * unit);
		CHECK(value == 0 || value == word_at(i % n * unit, 0));
		i += 7;
	}
	return NULL;
}

static void remove_against_faults(uint64_t budget, bool no_move)
{
	struct fixture f;
	struct racer racer = {.f = &f};
	uint64_t unit = page_size(), size = 256 * unit;
	pthread_t touchers[2];
	for (int round = 0; round < (budget ? 1 : 12 / SLOWDOWN + 1); round++) {
		fixture_open(&f,
		        (struct umm_pager_options){.handlers = 4, .budget_bytes = budget, .no_move = no_move},
		        size, unit, UMM_STORE_PRIVATE);
		racer.stop = false;
		for (int i = 0; i < 2; i++)
			CHECK(pthread_create(&touchers[i], NULL, touch_main, &racer) == 0);
		for (uint64_t at = 0; at < size; at += 2 * unit) {
			CHECK(madvise((void *)(f.memory + at), unit, MADV_DONTNEED) == 0);
			CHECK_EQUAL(load(f.memory, at), 0);
		}
		atomic_store(&racer.stop, true);
		for (int i = 0; i < 2; i++)
			pthread_join(touchers[i], NULL);
		for (uint64_t at = 0; at < size; at += unit)
			CHECK_EQUAL(load(f.memory, at), at / unit % 2 ? word_at(at, 0) : 0);
		fixture_close(&f);
	}
}

static void *evict_all_main(void *argument)
{
	struct racer *racer = argument;
	while (!atomic_load(&racer->stop))
		CHECK_OK(umm_region_evict(racer->f->region, 0, racer->f->size));
	return NULL;
}

static void remapped_range_keeps_its_place(void)
{
	struct fixture f;
	uint64_t page = page_size(), size = 64 * page;
	fixture_open(&f, (struct umm_pager_options){0}, size, page, UMM_STORE_PRIVATE);
	check_words(f.memory, 0, 20 * page, 0);
	uint8_t *moved = mremap((void *)(f.memory + 16 * page), 16 * page, 16 * page,
	        MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);
	CHECK(moved != MAP_FAILED && moved != f.memory + 16 * page);
	check_zeros(f.memory, 16 * page, 32 * page);
	uint8_t *grown = mremap(moved, 16 * page, 24 * page, MREMAP_MAYMOVE);
	CHECK(grown != MAP_FAILED);
	for (uint64_t at = 0; at < 16 * page; at += 8)
		CHECK_EQUAL(load(grown, at), word_at(16 * page + at, 0));
	check_zeros(grown, 16 * page, 24 * page);
	store_word(grown, 8, 77);
	CHECK_OK(umm_region_evict(f.region, 0, size));
	CHECK_EQUAL(load(grown, 8), 77);
	CHECK(munmap((void *)(f.memory + 40 * page), 8 * page) == 0);
	check_words(f.memory, 32 * page, 40 * page, 0);
	check_words(f.memory, 48 * page, size, 0);
	struct umm_pager_counters c = counters_of(&f);
	CHECK(c.events_remap >= 2);
	CHECK(c.events_unmap >= 1);
	/* Fixed, onto another place of the same region. */
	CHECK(mremap((void *)(f.memory + 48 * page), 4 * page, 4 * page, MREMAP_MAYMOVE | MREMAP_FIXED,
	              (void *)f.memory) == (void *)f.memory);
	for (uint64_t at = 0; at < 4 * page; at += 8)
		CHECK_EQUAL(load(f.memory, at), word_at(48 * page + at, 0));
	munmap(grown + 16 * page, 8 * page);
	munmap((void *)(f.memory + 16 * page), 16 * page);
	fixture_close(&f);
}

struct mover {
	uint8_t *from, *to;
	uint64_t len;
};

static void *move_main(void *argument)
{
	struct mover *m = argument;
	if (m->to)
		CHECK(mremap(m->from, m->len, m->len, MREMAP_MAYMOVE | MREMAP_FIXED, m->to) == m->to);
	else
		CHECK(munmap(m->from, m->len) == 0);
	return NULL;
}

static bool is_mapped(uint8_t *address)
{
	unsigned char vector;
	return mincore(address, page_size(), &vector) == 0;
}

/* The only handler hangs in a fetch, so the event stays unread while its place is mapped anew: the event that
 * comes late is the old region's, not the new one's. */
static void place_is_taken_before_the_event_is_read(bool moved)
{
	struct fixture f;
	struct gated_store *store;
	uint64_t unit = page_size(), len = 8 * unit, size = 32 * unit;
	gated_open(&f, (struct umm_pager_options){.handlers = 1}, size, unit, UMM_STORE_PRIVATE, &store);
	CHECK_OK(umm_region_advise(f.region, UMM_REGION_RANDOM));
	uint8_t *place = (uint8_t *)f.memory + 8 * unit, *there = NULL;
	if (moved) {
		there = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		CHECK(there != MAP_FAILED);
	}
	gate_close(&store->fetch, 0);
	struct access access = {.memory = f.memory, .at = 0};
	access_start(&access);
	gate_reached(&store->fetch);
	struct mover mover = {place, there, len};
	pthread_t thread;
	CHECK(pthread_create(&thread, NULL, move_main, &mover) == 0);
	while (is_mapped(place))
		sleep_ms(1);
	CHECK(mmap(place, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1,
	              0) == place);
	uint8_t *bytes = make_bytes(len);
	for (uint64_t at = 0; at < len; at += 8)
		*(uint64_t *)(bytes + at) = word_at(at, 5);
	struct umm_store *other_store;
	struct umm_region *other;
	CHECK_OK(umm_store_memory_create(bytes, len, UMM_STORE_PRIVATE, &other_store));
	struct umm_region_options options = {.size = len, .unit = unit, .address = (uint64_t)place};
	CHECK_OK(umm_region_create(f.pager, other_store, &options, &other));
	sem_post(&store->fetch.go);
	access_join(&access);
	pthread_join(thread, NULL);
	for (uint64_t at = 0; at < len; at += 8)
		CHECK_EQUAL(load(place, at), word_at(at, 5));
	for (uint64_t at = 0; moved && at < len; at += 8)
		CHECK_EQUAL(load(there, at), word_at(8 * unit + at, 0));
	check_words(f.memory, 16 * unit, size, 0);
	CHECK_OK(umm_region_close(other));
	umm_store_put(other_store);
	munmap(place, len);
	munmap(bytes, len);
	fixture_close(&f);
}

/* A unit that is unmapped while it is fetched is gone: nothing of it is written to the store. */
static void unmap_during_fetch(void)
{
	struct fixture f;
	struct gated_store *store;
	uint64_t unit = page_size(), size = 32 * unit;
	gated_open(&f, (struct umm_pager_options){.handlers = 2}, size, unit, UMM_STORE_WRITEBACK, &store);
	gate_close(&store->fetch, 4 * unit);
	CHECK_OK(umm_region_prefetch(f.region, 4 * unit, unit));
	gate_reached(&store->fetch);
	CHECK(munmap((void *)(f.memory + 4 * unit), unit) == 0);
	sem_post(&store->fetch.go);
	while (counters_of(&f).events_unmap == 0)
		sleep_ms(1);
	check_words(f.memory, 0, 4 * unit, 0);
	check_words(f.memory, 5 * unit, size, 0);
	CHECK_OK(umm_region_flush(f.region));
	check_words(f.bytes, 0, size, 0);
	CHECK_EQUAL(counters_of(&f).resident_bytes, size - unit);
	fixture_close(&f);
}

static void unmap_during_write(bool no_move)
{
	struct fixture f;
	struct gated_store *store;
	uint64_t unit = page_size(), size = 32 * unit;
	gated_open(&f, (struct umm_pager_options){.handlers = 2, .no_move = no_move}, size, unit,
	        UMM_STORE_WRITEBACK, &store);
	for (uint64_t at = 0; at < size; at += 8)
		store_word(f.memory, at, word_at(at, 1));
	gate_close(&store->write, 4 * unit);
	pthread_t evictor;
	CHECK(pthread_create(&evictor, NULL, evict_main, &f) == 0);
	gate_reached(&store->write);
	CHECK(munmap((void *)(f.memory + 4 * unit), unit) == 0);
	sem_post(&store->write.go);
	pthread_join(evictor, NULL);
	check_words(f.memory, 0, 4 * unit, 1);
	check_words(f.memory, 5 * unit, size, 1);
	CHECK_OK(umm_region_flush(f.region));
	check_words(f.bytes, 0, size, 1);
	fixture_close(&f);
}

/* Moved while it is copied out, and its old place taken by somebody else: it is still there, and what is
 * written to it afterwards goes to the store. */
static void move_during_eviction(bool no_move)
{
	struct fixture f;
	struct gated_store *store;
	uint64_t unit = page_size(), size = 16 * unit;
	gated_open(&f, (struct umm_pager_options){.handlers = 2, .no_move = no_move}, size, unit,
	        UMM_STORE_WRITEBACK, &store);
	CHECK_OK(umm_region_advise(f.region, UMM_REGION_RANDOM));
	uint8_t *here = (uint8_t *)f.memory;
	struct racer racer = {.f = &f};
	pthread_t evictor;
	CHECK(pthread_create(&evictor, NULL, evict_all_main, &racer) == 0);
	/* An emulated machine does a part of it. */
	uint64_t until = umm_now_ns() + 2000000000;
	for (uint64_t round = 1; round <= 2000 / SLOWDOWN && umm_now_ns() < until; round++) {
		uint8_t *next = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		CHECK(next != MAP_FAILED);
		for (uint64_t at = 0; at < size; at += unit)
			store_word(here, at, round);
		CHECK(mremap(here, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, next) == next);
		/* The evictor itself may have taken it: also somebody else. */
		bool taken = mmap(here, size, PROT_READ | PROT_WRITE,
		                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) == here;
		for (uint64_t at = 0; at < size; at += unit) {
			CHECK_EQUAL(load(next, at), round);
			store_word(next, at, round + 1000000);
		}
		CHECK_OK(umm_region_flush(f.region));
		for (uint64_t at = 0; at < size; at += unit)
			CHECK_EQUAL(load(f.bytes, at), round + 1000000);
		if (taken)
			munmap(here, size);
		here = next;
	}
	atomic_store(&racer.stop, true);
	pthread_join(evictor, NULL);
	fixture_close(&f);
}

int main(void)
{
	uint64_t page = page_size(), large = 64 << 10;
	RUN(removed_pages_read_zero(page));
	RUN(removed_pages_read_zero(large));
	for (int prefetched = 0; prefetched <= 1; prefetched++) {
		RUN(remove_during_fetch(page, 4 * page, page, prefetched));
		RUN(remove_during_fetch(large, 4 * large, large, prefetched));
		if (large > page)
			RUN(remove_during_fetch(large, 4 * large + page, page, prefetched));
	}
	RUN(remove_behind_a_failure());
	for (int no_move = 0; no_move <= 1; no_move++) {
		RUN(remove_during_write(page, no_move, UMM_STORE_WRITEBACK, 4 * page, page));
		RUN(remove_during_write(large, no_move, UMM_STORE_WRITEBACK, 4 * large, large));
		if (large > page)
			RUN(remove_during_write(large, no_move, UMM_STORE_WRITEBACK, 4 * large + page, page));
		RUN(unmap_during_write(no_move));
		RUN(remove_against_faults(128 * page, no_move));
	}
	RUN(remove_against_faults(0, false));
	RUN(remapped_range_keeps_its_place());
	RUN(place_is_taken_before_the_event_is_read(false));
	RUN(place_is_taken_before_the_event_is_read(true));
	RUN(unmap_during_fetch());
	RUN(move_during_eviction(false));
	RUN(move_during_eviction(true));
	return 0;
}
