/* A shadow page table: a copy of which address holds which part of a store, kept right by notifications
 * alone, and compared with what is mapped after every one of many random operations. */
#include "common/clock.h"
#include "kernel/pagemap.h"
#include "notifier/calls.h"
#include "notifier/notifier.h"
#include "tests/pager_fixture.h"

enum {
	UNITS = 64,   /* of the region, a page each */
	WINDOW = 160, /* pages of address space in which all of it happens */
	STAMP_SHIFT = 16,
};
static const uint64_t patience_ns = 60000000000, brief_ns = 4000000000;

struct shadow {
	struct umm_pager *pager;
	struct umm_store *store;
	struct umm_region *region;
	uint8_t *bytes; /* of the store */
	volatile uint8_t *window;
	uint64_t page, life; /* how many regions there have been */
	int pagemap;
	uint32_t ignored; /* bits of enum umm_notify_reason: what this subscriber does not drop for */
	struct umm_subscriber *subscriber;
	struct umm_subscription *subscription;
	/* The stamp of what is at each page of the window; 0: not known. Dropped by callbacks, filled in by
	 * the test when it looks at the memory. */
	_Atomic uint64_t entries[WINDOW];
	bool mapped[WINDOW]; /* the region's, as far as the test did it */
	uint64_t seed, fills, wrong;
};

static uint32_t draw(struct shadow *s, uint32_t below)
{
	s->seed = s->seed * 6364136223846793005u + 1442695040888963407u;
	return (uint32_t)(s->seed >> 33) % below;
}

static volatile uint8_t *page_of(const struct shadow *s, uint64_t i)
{
	return s->window + i * s->page;
}

/* Names a part of the store of one region, and no other. Never 0. */
static uint64_t stamp_of(const struct shadow *s, uint64_t unit)
{
	return (s->life << STAMP_SHIFT | unit) + 1;
}

/* -- the subscriber ------------------------------------------------------------------------- */

static int drop(void *context, const struct umm_notify_event *event)
{
	struct shadow *s = context;
	if (s->ignored >> event->reason & 1)
		return 0;
	uint64_t base = (uintptr_t)s->window, last = (event->end - 1 - base) / s->page;
	for (uint64_t i = event->start > base ? (event->start - base) / s->page : 0; i <= last && i < WINDOW;
	        i++)
		atomic_store(&s->entries[i], 0);
	return 0;
}

static const struct umm_notifier_ops ops = {.invalidate_range_start = drop};

/* What is there, looked up without a lock; brings it in. */
static void look_up(struct shadow *s, uint64_t i)
{
	uint64_t seq;
	do {
		CHECK_OK(umm_read_begin(s->subscription, patience_ns, &seq));
		atomic_store(&s->entries[i], load(page_of(s, i), 0));
		if (!umm_read_retry(s->subscription, seq))
			break;
		atomic_store(&s->entries[i], 0);
	} while (true);
	s->fills++;
}

/* Entries that are wrong: their page is not there, or another one is. */
static unsigned compare(struct shadow *s)
{
	uint64_t here[WINDOW], seq;
	unsigned wrong = 0;
	/* The kernel's events of what this thread did may be on their way to the subscriber: this waits. */
	CHECK_OK(umm_read_begin(s->subscription, patience_ns, &seq));
	for (uint64_t i = 0; i < WINDOW; i++)
		here[i] = atomic_load(&s->entries[i]);
	uint64_t pagemap[WINDOW];
	CHECK_OK(umm_pagemap_read(s->pagemap, (uintptr_t)s->window, WINDOW, s->page, pagemap));
	for (uint64_t i = 0; i < WINDOW; i++) {
		if (!here[i])
			continue;
		bool right = pagemap[i] & (UMM_PAGEMAP_PRESENT | UMM_PAGEMAP_SWAP) &&
		             load(page_of(s, i), 0) == here[i];
		/* The evictor goes on meanwhile: it says so first. */
		wrong += !right && atomic_load(&s->entries[i]) == here[i];
	}
	return wrong;
}

/* -- operations ----------------------------------------------------------------------------- */

static void reserve(struct shadow *s, uint64_t first, uint64_t count)
{
	void *place = (void *)page_of(s, first);
	CHECK(mmap(place, count * s->page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) ==
	        place);
	for (uint64_t i = first; i < first + count; i++)
		s->mapped[i] = false;
}

static void open_region(struct shadow *s)
{
	s->life++;
	for (uint64_t unit = 0; unit < UNITS; unit++)
		*(uint64_t *)(s->bytes + unit * s->page) = stamp_of(s, unit);
	uint64_t first = draw(s, WINDOW - UNITS + 1);
	void *place = (void *)page_of(s, first);
	CHECK(mmap(place, UNITS * s->page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED,
	              -1, 0) == place);
	const struct umm_region_options options = {
	        .size = UNITS * s->page, .unit = s->page, .address = (uintptr_t)place};
	CHECK_OK(umm_region_create(s->pager, s->store, &options, &s->region));
	for (uint64_t i = 0; i < UNITS; i++)
		s->mapped[first + i] = true;
}

/* Closing tells; the mapping is the test's own and goes afterwards. */
static void close_region(struct shadow *s)
{
	CHECK_OK(umm_region_close(s->region));
	reserve(s, 0, WINDOW);
}

/* Some pages in a row that are mapped; 0: none at the place that was drawn. */
static uint64_t draw_mapped(struct shadow *s, uint64_t *first)
{
	uint64_t most = 1 + draw(s, 6), count = 0;
	*first = draw(s, WINDOW);
	while (count < most && *first + count < WINDOW && s->mapped[*first + count])
		count++;
	return count;
}

static void remove_some(struct shadow *s, bool raw)
{
	uint64_t first, count = draw_mapped(s, &first);
	if (!count)
		return;
	if (raw)
		CHECK(madvise((void *)page_of(s, first), count * s->page, MADV_DONTNEED) == 0);
	else
		CHECK_OK(umm_mm_madvise((uintptr_t)page_of(s, first), count * s->page, MADV_DONTNEED));
}

static void unmap_some(struct shadow *s, bool raw)
{
	uint64_t first, count = draw_mapped(s, &first), at;
	if (!count)
		return;
	at = (uintptr_t)page_of(s, first);
	if (!raw && draw(s, 2))
		CHECK_OK(umm_mm_munmap(at, count * s->page));
	else if (!raw)
		CHECK_OK(umm_mm_mmap(
		        at, count * s->page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0, &at));
	else if (draw(s, 2))
		CHECK(munmap((void *)at, count * s->page) == 0);
	reserve(s, first, count);
}

static void move_some(struct shadow *s, bool raw)
{
	uint64_t first, count = draw_mapped(s, &first), to, moved = 0;
	if (!count)
		return;
	to = draw(s, (uint32_t)(WINDOW - count + 1));
	if (to < first + count && first < to + count)
		return;
	uint64_t from_at = (uintptr_t)page_of(s, first), to_at = (uintptr_t)page_of(s, to),
	         len = count * s->page;
	enum { HOW = MREMAP_MAYMOVE | MREMAP_FIXED };
	int err = 0;
	if (!raw)
		err = umm_mm_mremap(from_at, len, len, HOW, to_at, &moved);
	else if (mremap((void *)from_at, len, len, HOW, (void *)to_at) == MAP_FAILED)
		err = -errno;
	if (err) {
		/* Put together of pieces: refused after the destination was unmapped. */
		CHECK_EQUAL(err, -EFAULT);
		reserve(s, to, count);
		return;
	}
	for (uint64_t i = 0; i < count; i++)
		s->mapped[to + i] = true;
	reserve(s, first, count);
}

static void touch(struct shadow *s, bool write)
{
	uint64_t first, count = draw_mapped(s, &first);
	for (uint64_t i = first; i < first + count; i++) {
		if (write)
			store_word(page_of(s, i), s->page - 8, draw(s, 1000));
		look_up(s, i);
	}
}

static void bring_in_or_out(struct shadow *s, uint32_t what)
{
	uint64_t first = draw(s, UNITS), count = 1 + draw(s, UNITS - (uint32_t)first);
	uint64_t offset = first * s->page, len = count * s->page;
	if (what == 0)
		CHECK_OK(umm_region_evict(s->region, offset, len));
	else if (what == 1)
		CHECK_OK(umm_region_prefetch(s->region, offset, len));
	else
		(void)umm_region_populate(s->region, offset, len); /* parts of it may be unmapped */
}

static void operate(struct shadow *s)
{
	uint32_t what = draw(s, 1000);
	bool raw = draw(s, 2);
	if (what < 500)
		touch(s, what % 2);
	else if (what < 700)
		bring_in_or_out(s, what % 3);
	else if (what < 800)
		remove_some(s, raw);
	else if (what < 850)
		unmap_some(s, raw);
	else if (what < 980)
		move_some(s, raw);
	else if (what < 990)
		CHECK_OK(umm_pager_set_budget(
		        s->pager, draw(s, 3) ? (UNITS / 4 + draw(s, UNITS / 2)) * s->page : 0));
	else {
		close_region(s);
		s->wrong += compare(s);
		open_region(s);
	}
}

/* -- cases ---------------------------------------------------------------------------------- */

static void shadow_init(struct shadow *s, bool no_move, uint32_t ignored)
{
	*s = (struct shadow){.page = page_size(), .ignored = ignored, .seed = 42};
	s->pagemap = umm_pagemap_open(0);
	CHECK(s->pagemap >= 0);
	s->bytes = make_bytes(UNITS * s->page);
	s->window = mmap(NULL, WINDOW * s->page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(s->window != MAP_FAILED);
	CHECK_OK(umm_store_memory_create(s->bytes, UNITS * s->page, UMM_STORE_WRITEBACK, &s->store));
	const struct umm_pager_options options = {
	        .budget_bytes = UNITS / 2 * s->page, .uffd_source = 3, .no_move = no_move};
	CHECK_OK(umm_pager_create(&options, &s->pager));
	const struct umm_subscriber_options subscriber = {.name = "shadow", .ops = &ops};
	CHECK_OK(umm_subscriber_create(&subscriber, &s->subscriber));
	uint64_t base = (uintptr_t)s->window;
	CHECK_OK(umm_subscribe(
	        umm_space_self(), s->subscriber, base, base + WINDOW * s->page, s, &s->subscription));
	open_region(s);
}

static void shadow_deinit(struct shadow *s)
{
	close_region(s);
	CHECK_OK(umm_unsubscribe(s->subscription));
	CHECK_OK(umm_subscriber_destroy(s->subscriber));
	umm_store_put(s->store);
	CHECK_OK(umm_pager_destroy(s->pager));
	munmap((void *)s->window, WINDOW * s->page);
	munmap(s->bytes, UNITS * s->page);
	close(s->pagemap);
}

static void notifications_suffice(uint32_t operations, bool no_move)
{
	struct shadow s;
	shadow_init(&s, no_move, 0);
	/* An emulated machine does a part of it. */
	uint64_t until = getenv("UMM_TEST_BRIEF") ? umm_now_ns() + brief_ns : UINT64_MAX;
	operations /= SLOWDOWN;
	uint32_t i = 0;
	for (; i < operations && (i < operations / 20 || umm_now_ns() < until); i++) {
		operate(&s);
		s.wrong += compare(&s);
		CHECK_EQUAL(s.wrong, 0);
	}
	if (i < operations)
		fprintf(stderr, "%u of %u operations\n", i, operations);
	static struct umm_pager_stats stats;
	CHECK_OK(umm_pager_stats(s.pager, &stats));
	const struct umm_pager_counters *c = &stats.counters;
	CHECK(c->events_remove && c->events_unmap && c->events_remap && c->evicted_clean && c->evicted_dirty);
	CHECK(s.fills > i / 4);
	shadow_deinit(&s);
}

/* Who does not listen to one of the reasons is found out by the same comparison. (Not to MOVE: the kernel
 * tells of the place that mremap left once more, as unmapped.) */
static void an_ignored_reason_shows(int reason)
{
	struct shadow s;
	shadow_init(&s, false, 1u << reason);
	for (uint32_t i = 0; i < 20000 && !s.wrong; i++) {
		operate(&s);
		s.wrong += compare(&s);
	}
	CHECK(s.wrong > 0);
	shadow_deinit(&s);
}

int main(void)
{
	RUN(notifications_suffice(60000, false));
	RUN(notifications_suffice(40000, true));
	RUN(an_ignored_reason_shows(UMM_REASON_EVICT));
	RUN(an_ignored_reason_shows(UMM_REASON_REMOVE));
	RUN(an_ignored_reason_shows(UMM_REASON_UNMAP));
	return 0;
}
