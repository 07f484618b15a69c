/* Serving one fault: what to do depends on the state of the unit, and never waits for anybody but the store.
 */
#include "pager/internal.h"

#include <errno.h>
#include <sched.h>

#include "common/clock.h"
#include "common/histogram_owned.h"

static const uint64_t admit_every_ns = 2000000;

void record_latency(struct umm_region *region, const struct times *times)
{
	struct umm_uf *uf = region->uf;
	uint64_t done = umm_now_ns();
	struct umm_latency *all[2] = {&uf->latency, region->latency};
	for (int i = 0; i < 2 && all[i]; i++) {
		umm_histogram_record_owned(&all[i]->total, done - times->arrived);
		umm_histogram_record_owned(&all[i]->queue, times->claimed - times->arrived);
		umm_histogram_record_owned(&all[i]->fetch, times->fetched - times->claimed);
		umm_histogram_record_owned(&all[i]->install, done - times->fetched);
	}
}

#define COUNT(region, field, n)                                                                              \
	do {                                                                                                 \
		(region)->counters.field += (n);                                                             \
		(region)->uf->counters.field += (n);                                                         \
	} while (0)

static void zeroed_clear(struct umm_region *region, uint64_t page)
{
	if (region->zeroed)
		region->zeroed[page / 64] &= ~(1ull << (page % 64));
}

static void zeroed_set_unit(struct umm_region *region, uint64_t unit)
{
	if (!region->zeroed)
		return;
	uint64_t per_unit = region->unit / region->pager->page;
	for (uint64_t page = unit * per_unit; page < (unit + 1) * per_unit; page++)
		region->zeroed[page / 64] |= 1ull << (page % 64);
}

/* This very page has been seen missing: it was zapped, and what is put there now is data like any other. */
static void zeroed_clear_at(struct umm_region *region, uint64_t address)
{
	struct extent *x = extents_find(region->uf, address);
	if (x && x->region == region)
		zeroed_clear(region, (address - x->start + x->offset) / region->pager->page);
}

/* A page that was removed, or that nothing was ever stored for. */
static int install_zeros(struct umm_region *region, uint64_t address, uint64_t flags, bool whole_unit)
{
	struct umm_pager *pager = region->pager;
	uint64_t granule = region->hugetlb ? region->hugetlb : pager->page;
	if (whole_unit && granule == region->unit && (flags & UMM_UFFD_FAULT_WRITE)) {
		/* A page of its own at once: the shared zero page would fault again at this write. */
		struct umm_uffd_result result;
		umm_uffd_copy(region->uf->fd, address & ~(granule - 1), (uintptr_t)pager->zeros, granule, 0,
		        &result);
		if (result.outcome == UMM_OUTCOME_INSTALLED)
			return 0;
	}
	return install_zero_page(region->uf, address, granule);
}

static void after_install(struct umm_region *region, uint64_t unit)
{
	if (unit_set_present(region, unit) & UNIT_WANTED)
		wake_unit(region, unit);
}

int finish_claim(
        struct umm_region *region, uint64_t unit, const void *data, int error, uint64_t hash, bool prefetched)
{
	/* The address may be gone, or the bytes stale, since the claim was made. */
	if (claim_lost(region, unit))
		return unit_state(region, unit) == UNIT_GONE ? -ENOENT : 0;
	if (error) {
		poison_unit(region, unit, error);
		return error;
	}
	int err = data && region->huge ? install_huge(region, unit, (void *)(uintptr_t)data)
	                               : install_unit(region, unit, data);
	if (err == -EAGAIN || err == -ENOMEM || err == -ENOSPC) {
		unit_set(region, unit, UNIT_MISSING, 0);
		/* Whoever waits comes again, when the event that is in the way has been read. */
		defer_unit(region, unit);
		return err;
	}
	if (err) {
		unit_set(region, unit, err == -ENOENT || err == -ESRCH ? UNIT_GONE : UNIT_MISSING, 0);
		wake_unit(region, unit);
		return err;
	}
	note_stored(region, unit, hash);
	if (prefetched)
		unit_mark(region, unit, UNIT_PREFETCHED);
	else
		unit_unmark(region, unit, UNIT_PREFETCHED);
	after_install(region, unit);
	return 0;
}

/* Close to the budget faults are put off and come again, like balance_dirty_pages() in the kernel: the
 * evictor gets the CPU. Events are read meanwhile, and one fault is served every so often whatever the
 * evictor does: its store may itself wait for a fault. */
static bool put_off(struct umm_uf *uf, const struct times *times)
{
	struct umm_pager *pager = uf->pager;
	if (!atomic_load_explicit(&pager->budget, memory_order_relaxed) || pager->in_thread)
		return false;
	/* Room for what other handlers and the prefetcher bring in meanwhile. */
	uint64_t most = (evict_target(pager) + resident_limit(pager)) / 2;
	if (atomic_load_explicit(&pager->resident, memory_order_relaxed) <= most)
		return false;
	evictor_wake(pager);
	if (times->arrived - uf->admitted_ns > admit_every_ns ||
	        atomic_load_explicit(&pager->evict_stuck, memory_order_relaxed)) {
		uf->admitted_ns = times->arrived;
		return false;
	}
	uf->throttled = true;
	return true;
}

static void serve_missing(struct umm_region *region, uint64_t unit, uint64_t address, uint64_t flags,
        uint8_t *buffer, struct times *times)
{
	struct umm_uf *uf = region->uf;
	struct umm_store *store = region->store;
	uint32_t word = region->units[unit];
	times->claimed = umm_now_ns();

	const void *peeked = region->huge ? NULL : peek_unit(region, unit);
	bool zeros = !(word & UNIT_SPILLED) && !region->huge &&
	             (store->ops == umm_store_zero_ops || unit_store_bytes(region, unit) == 0);
	if (peeked || zeros) {
		times->fetched = times->claimed;
		int err = zeros && region->unit == uf->pager->page
		                  ? install_zeros(region, address, flags, true)
		                  : install_unit(region, unit, peeked);
		if (err == -EAGAIN || err == -ENOMEM || err == -ENOSPC) {
			defer_unit(region, unit);
			return;
		}
		if (err) {
			wake_unit(region, unit);
			return;
		}
		unit_unmark(region, unit, UNIT_PREFETCHED);
		after_install(region, unit);
		if (zeros)
			COUNT(region, faults_zero, 1);
		else
			COUNT(region, faults_missing, 1);
		COUNT(region, bytes_fetched, zeros ? 0 : region->unit);
		record_latency(region, times);
		return;
	}
	if (store->ops->request && !(word & UNIT_SPILLED)) {
		unit_set(region, unit, UNIT_FETCHING, 0);
		unit_mark(region, unit, UNIT_WANTED);
		COUNT(region, faults_missing, 1);
		int err = request_unit(region, unit, times);
		if (err == -EAGAIN) {
			unit_set(region, unit, UNIT_MISSING, 0);
			defer_unit(region, unit);
		} else if (err) {
			poison_unit(region, unit, err);
		}
		return;
	}

	/* The store may take its time: claim the unit and let the others work meanwhile. */
	unit_set(region, unit, UNIT_FETCHING, 0);
	claim_begin(region);
	uint8_t layer = region->layers ? region->layers[unit] : 0;
	struct range *later = uf->wake_later;
	uf->wake_later = NULL;
	if (!uf->pager->in_thread)
		pthread_mutex_unlock(&uf->lock);
	int error = fetch_unit(region, unit, word, layer, buffer);
	uint64_t hash = error ? 0 : hash_fetched(region, word, buffer);
	times->fetched = umm_now_ns();
	if (!uf->pager->in_thread)
		pthread_mutex_lock(&uf->lock);
	uf->wake_later = later;
	int err = finish_claim(region, unit, buffer, error, hash, false);
	if (error) {
		COUNT(region, faults_poisoned, 1);
	} else if (err == -EAGAIN || err == -ENOMEM || err == -ENOSPC) {
		uf->counters.faults_deferred++;
	} else if (!err) {
		COUNT(region, faults_missing, 1);
		COUNT(region, bytes_fetched, region->unit);
		record_latency(region, times);
	}
	claim_end(region);
}

static void serve_hole(
        struct umm_region *region, uint64_t unit, uint64_t address, uint64_t flags, struct times *times)
{
	times->claimed = times->fetched = umm_now_ns();
	int err = install_zeros(region, address, flags, false);
	if (err == -EAGAIN || err == -ENOMEM || err == -ENOSPC) {
		defer_unit(region, unit);
		return;
	}
	zeroed_clear_at(region, address);
	COUNT(region, faults_zero, 1);
	record_latency(region, times);
}

static void serve_removed(
        struct umm_region *region, uint64_t unit, uint64_t address, uint64_t flags, struct times *times)
{
	times->claimed = times->fetched = umm_now_ns();
	/* Only this page is known to be gone; the rest of the unit may be zapped a moment later. The holes
	 * fault one by one and read as zero. */
	zeroed_set_unit(region, unit);
	unit_unmark(region, unit, UNIT_SPILLED);
	int err = install_zeros(region, address, flags, true);
	if (err == -EAGAIN || err == -ENOMEM || err == -ENOSPC) {
		defer_unit(region, unit);
		return;
	}
	if (err) {
		wake_unit(region, unit);
		return;
	}
	/* No stored copy has this content. */
	note_stored(region, unit, 0);
	unit_unmark(region, unit, UNIT_PREFETCHED);
	unit_set_present(region, unit);
	zeroed_clear_at(region, address);
	COUNT(region, faults_zero, 1);
	record_latency(region, times);
}

static void serve_staged(struct umm_region *region, uint64_t unit, struct times *times)
{
	struct umm_uf *uf = region->uf;
	times->claimed = times->fetched = umm_now_ns();
	int err = install_unit(region, unit, staging_slot(uf->pager, unit_payload(region, unit)));
	if (err == -EAGAIN || err == -ENOMEM || err == -ENOSPC) {
		defer_unit(region, unit);
		return;
	}
	if (err) {
		wake_unit(region, unit);
		return;
	}
	unit_unmark(region, unit, UNIT_PREFETCHED);
	unit_set_present(region, unit);
	COUNT(region, faults_rescued, 1);
	record_latency(region, times);
}

static void serve_write_protected(struct umm_region *region, uint64_t unit, uint64_t address)
{
	struct umm_uf *uf = region->uf;
	COUNT(region, faults_wp, 1);
	if (unit_state(region, unit) == UNIT_ZAPPING) {
		unit_mark(region, unit, UNIT_WANTED); /* the page goes away in a moment; then it is missing */
		return;
	}
	/* Being written: it is not cold. The evictor sees that its claim is gone. */
	if (unit_state(region, unit) == UNIT_COPYING || unit_state(region, unit) == UNIT_LEAVING)
		unit_set_present(region, unit);
	uint64_t run, home = region_address_of(region, unit * region->unit, &run);
	struct umm_uffd_result result;
	if (run >= region->unit && umm_uffd_writeprotect(uf->fd, home, region->unit, 0, &result) == 0)
		return;
	uint64_t granule = region->hugetlb ? region->hugetlb : uf->pager->page;
	if (umm_uffd_writeprotect(uf->fd, address & ~(granule - 1), granule, 0, &result) == -EAGAIN)
		defer(uf, address & ~(granule - 1), granule);
}

/* What the fault needs after the ioctl. With thousands of regions these lines are in no cache: they come
 * while the ioctl runs, not one after the other. */
static void prefetch_books(struct umm_region *region)
{
	enum { LINE = 64 };
	for (size_t at = 0; at < sizeof(region->streams); at += LINE)
		__builtin_prefetch((char *)region->streams + at, 1);
	__builtin_prefetch(&region->stream_clock, 1);
	__builtin_prefetch(&region->counters.faults_missing, 1);
	__builtin_prefetch(&region->counters.bytes_fetched, 1);
	__builtin_prefetch(&region->counters.resident_peak_bytes, 1);
}

void serve_fault(struct umm_uf *uf, uint64_t address, uint64_t flags, uint8_t *buffer, struct times *times)
{
	struct extent *x = extents_find(uf, address);
	if (!x) {
		/* Registered, but not (or no longer) part of a region: memory that mremap made larger, or the
		 * old place after MREMAP_DONTUNMAP. Fresh anonymous memory is zero. */
		uint64_t page = uf->pager->page;
		if (install_zero_page(uf, address, page) == -EAGAIN)
			defer(uf, address & ~(page - 1), page);
		else
			uf->counters.faults_zero++;
		return;
	}
	struct umm_region *region = x->region;
	uint64_t unit = (address - x->start + x->offset) / region->unit;
	prefetch_books(region);
	if (flags & UMM_UFFD_FAULT_WP) {
		serve_write_protected(region, unit, address);
		return;
	}
	switch (unit_state(region, unit)) {
	case UNIT_MISSING:
		if (put_off(uf, times)) {
			defer_unit(region, unit);
			return;
		}
		serve_missing(region, unit, address, flags, buffer, times);
		prefetch_on_fault(region, unit);
		return;
	case UNIT_REMOVED:
		serve_removed(region, unit, address, flags, times);
		return;
	case UNIT_STAGED:
		serve_staged(region, unit, times);
		return;
	case UNIT_FETCHING:
	case UNIT_ZAPPING:
		/* Who holds the claim wakes this thread when it ends. */
		unit_mark(region, unit, UNIT_WANTED);
		COUNT(region, faults_stale, 1);
		return;
	case UNIT_POISONED:
		COUNT(region, faults_poisoned, 1);
		poison_unit(region, unit, (int)unit_payload(region, unit));
		return;
	case UNIT_COPYING:
	case UNIT_LEAVING:
		/* A hole of a unit that the evictor picked: it is in use. The evictor sees its claim gone. */
		unit_set_present(region, unit);
		serve_hole(region, unit, address, flags, times);
		return;
	default:
		serve_hole(region, unit, address, flags, times);
		return;
	}
}
