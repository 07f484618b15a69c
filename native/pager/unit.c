/* The word of a unit: its state, and the books that depend on it. */
#include "pager/internal.h"

#include <sys/mman.h>
#include <unistd.h>

static bool is_resident(int state)
{
	switch (state) {
	case UNIT_PRESENT:
	case UNIT_LEAVING:
	case UNIT_COPYING:
	case UNIT_ZAPPING:
	case UNIT_FILLED:
		return true;
	default:
		return false;
	}
}

static void account(struct umm_region *region, int64_t bytes)
{
	struct umm_pager *pager = region->pager;
	struct umm_pager_counters *own = &region->counters;
	own->resident_bytes += (uint64_t)bytes;
	if (own->resident_bytes > own->resident_peak_bytes && bytes > 0)
		own->resident_peak_bytes = own->resident_bytes;
	uint64_t now = atomic_fetch_add_explicit(&pager->resident, (uint64_t)bytes, memory_order_relaxed) +
	               (uint64_t)bytes;
	now += atomic_load_explicit(&pager->staged, memory_order_relaxed);
	uint64_t peak = atomic_load_explicit(&pager->peak, memory_order_relaxed);
	while (bytes > 0 && now > peak &&
	        !atomic_compare_exchange_weak_explicit(
	                &pager->peak, &peak, now, memory_order_relaxed, memory_order_relaxed))
		;
}

uint32_t unit_set(struct umm_region *region, uint64_t unit, int state, uint32_t payload)
{
	uint32_t word = region->units[unit];
	bool was = is_resident((int)(word & UNIT_STATE_MASK)), is = is_resident(state);
	region->units[unit] =
	        (word & (UNIT_SPILLED | UNIT_PREFETCHED)) | (uint32_t)state | (payload << UNIT_PAYLOAD_SHIFT);
	if (was != is)
		account(region, is ? (int64_t)region->unit : -(int64_t)region->unit);
	return word & (UNIT_WANTED | UNIT_WAS_REMOVED);
}

uint32_t unit_set_present(struct umm_region *region, uint64_t unit)
{
	uint32_t cleared = unit_set(region, unit, UNIT_PRESENT, 0);
	uint64_t budget = atomic_load_explicit(&region->pager->budget, memory_order_relaxed);
	if (budget) {
		fifo_push(region, unit);
		if (atomic_load_explicit(&region->pager->resident, memory_order_relaxed) >
		        evict_target(region->pager))
			evictor_wake(region->pager);
	}
	return cleared;
}

uint64_t unit_store_bytes(const struct umm_region *region, uint64_t unit)
{
	uint64_t offset = unit * region->unit;
	uint64_t size = region->store->size < region->size ? region->store->size : region->size;
	if (offset >= size)
		return 0;
	return size - offset < region->unit ? size - offset : region->unit;
}

uint64_t region_address_of(struct umm_region *region, uint64_t offset, uint64_t *run)
{
	struct umm_uf *uf = region->uf;
	/* Almost always the region is where it was mapped, in one piece. */
	struct extent *home = extents_find(uf, region->base + offset);
	if (home && home->region == region &&
	        home->offset + (region->base + offset - home->start) == offset) {
		*run = home->end - (region->base + offset);
		return region->base + offset;
	}
	for (uint64_t i = 0; i < uf->n_extents; i++) {
		struct extent *x = &uf->extents[i];
		if (x->region == region && offset >= x->offset && offset - x->offset < x->end - x->start) {
			*run = x->end - x->start - (offset - x->offset);
			return x->start + (offset - x->offset);
		}
	}
	*run = 0;
	return 0;
}

uint64_t unit_address(struct umm_region *region, uint64_t unit)
{
	uint64_t run, address = region_address_of(region, unit * region->unit, &run);
	return run >= region->unit ? address : 0;
}

bool unit_is_mapped(struct umm_region *region, uint64_t unit)
{
	uint64_t run, granule = region->hugetlb ? region->hugetlb : region->pager->page;
	for (uint64_t at = 0; at < region->unit; at += granule)
		if (region_address_of(region, unit * region->unit + at, &run))
			return true;
	return false;
}

bool claim_lost(struct umm_region *region, uint64_t unit)
{
	if (!unit_is_mapped(region, unit)) {
		unit_set(region, unit, UNIT_GONE, 0);
		return true;
	}
	if (!unit_flag(region, unit, UNIT_WAS_REMOVED))
		return false;
	unit_unmark(region, unit, UNIT_SPILLED | UNIT_PREFETCHED);
	unit_set(region, unit, UNIT_REMOVED, 0);
	wake_unit(region, unit);
	return true;
}

void claim_begin(struct umm_region *region)
{
	region->claims++;
}

void claim_end(struct umm_region *region)
{
	if (--region->claims == 0 && region->closing)
		pthread_cond_broadcast(&region->uf->claims_done);
}

void *map_anonymous(uint64_t len, uint64_t align)
{
	/* No slack where it is not needed: a gap would keep regions that lie side by side from being one VMA
	 * of the kernel's. With 10,000 regions its search for the VMA costs a fault 2 us. */
	if (align <= (uint64_t)sysconf(_SC_PAGESIZE))
		align = 0;
	uint8_t *p = mmap(NULL, len + align, PROT_READ | PROT_WRITE,
	        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (p == MAP_FAILED)
		return NULL;
	if (!align)
		return p;
	uint8_t *start = (uint8_t *)(((uintptr_t)p + align - 1) & ~(uintptr_t)(align - 1));
	if (start > p)
		munmap(p, (size_t)(start - p));
	if (start < p + align)
		munmap(start + len, (size_t)(p + align - start));
	return start;
}
