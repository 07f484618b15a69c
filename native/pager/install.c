/* Putting pages in place: the outcomes of the resolving ioctls, told apart. Under the uf's lock. */
#include "pager/internal.h"

#include <errno.h>
#include <sched.h>
#include <stddef.h>

#include "kernel/pagemap.h"

static bool page_present(struct umm_pager *pager, uint64_t address)
{
	uint64_t entry = 0;
	if (umm_pagemap_read(pager->pagemap_fd, address, 1, pager->page, &entry) < 0)
		return true; /* without pagemap EEXIST is believed */
	return (entry & (UMM_PAGEMAP_PRESENT | UMM_PAGEMAP_SWAP)) != 0;
}

static void wake(struct umm_uf *uf, uint64_t address, uint64_t len)
{
	if (!uf->pager->in_thread)
		umm_uffd_wake(uf->fd, address, len);
}

/* Leave the waking of a range to the handler that holds the lock, if it is one. The mode for the ioctl. */
static uint64_t wake_later(struct umm_uf *uf, uint64_t address, uint64_t len)
{
	struct range *later = uf->wake_later;
	if (!later)
		return 0;
	if (!later->end)
		*later = (struct range){address, address + len};
	if (address < later->start)
		later->start = address;
	if (address + len > later->end)
		later->end = address + len;
	return UMM_UFFD_COPY_DONTWAKE;
}

/* COPY, page by page past what is there already. `granule`: what one EEXIST stands for. */
static int copy_range(struct umm_uf *uf, uint64_t dst, const uint8_t *src, uint64_t len, uint64_t granule)
{
	uint64_t done = 0, mode = wake_later(uf, dst, len);
	unsigned patience = 3;
	bool skipped = false;
	while (done < len) {
		struct umm_uffd_result result;
		umm_uffd_copy(uf->fd, dst + done, (uintptr_t)(src + done), len - done, mode, &result);
		done += (uint64_t)result.done;
		switch (result.outcome) {
		case UMM_OUTCOME_INSTALLED:
			break;
		case UMM_OUTCOME_PARTIAL:
			break; /* the next call says why */
		case UMM_OUTCOME_ALREADY_THERE:
			/* Never a marker: COPY heals those. But an empty pool of huge pages is EEXIST too,
			 * where a page table is there (hugetlb_mfill_atomic_pte()). */
			if (granule != uf->pager->page && !page_present(uf->pager, dst + done))
				return -ENOMEM;
			done += granule;
			skipped = true;
			break;
		case UMM_OUTCOME_DEFERRED:
			if (!patience--)
				return -EAGAIN;
			sched_yield();
			break;
		default:
			return -result.error;
		}
	}
	if (skipped && !mode)
		wake(uf, dst, len);
	return 0;
}

static int zero_range(struct umm_uf *uf, uint64_t dst, uint64_t len, uint64_t granule)
{
	struct umm_pager *pager = uf->pager;
	if (granule != pager->page) {
		/* hugetlb has no ZEROPAGE */
		for (uint64_t done = 0; done < len; done += granule) {
			int err = copy_range(uf, dst + done, pager->zeros, granule, granule);
			if (err)
				return err;
		}
		return 0;
	}
	uint64_t done = 0, mode = wake_later(uf, dst, len);
	unsigned patience = 3;
	bool skipped = false;
	while (done < len) {
		struct umm_uffd_result result;
		umm_uffd_zeropage(uf->fd, dst + done, len - done, mode, &result);
		done += (uint64_t)result.done;
		switch (result.outcome) {
		case UMM_OUTCOME_INSTALLED:
		case UMM_OUTCOME_PARTIAL:
			break;
		case UMM_OUTCOME_ALREADY_THERE:
			/* A page, or a write-protect marker or poison where no page is: COPY heals those. */
			if (!page_present(pager, dst + done)) {
				int err = copy_range(uf, dst + done, pager->zeros, granule, granule);
				if (err)
					return err;
			}
			done += granule;
			skipped = true;
			break;
		case UMM_OUTCOME_DEFERRED:
			if (!patience--)
				return -EAGAIN;
			sched_yield();
			break;
		default:
			return -result.error;
		}
	}
	if (skipped && !mode)
		wake(uf, dst, len);
	return 0;
}

int install_units(struct umm_region *region, uint64_t unit, uint64_t count, const void *data)
{
	struct umm_uf *uf = region->uf;
	uint64_t granule = region->hugetlb ? region->hugetlb : uf->pager->page;
	uint64_t offset = unit * region->unit, len = count * region->unit;
	for (uint64_t done = 0; done < len;) {
		uint64_t run, address = region_address_of(region, offset + done, &run);
		if (run == 0) {
			/* This page was unmapped; the rest of the unit may be elsewhere. */
			done += granule;
			continue;
		}
		if (run > len - done)
			run = len - done;
		int err = data ? copy_range(uf, address, (const uint8_t *)data + done, run, granule)
		               : zero_range(uf, address, run, granule);
		if (err)
			return err;
		done += run;
	}
	return 0;
}

bool has_zeroed(const struct umm_region *region, uint64_t unit)
{
	if (!region->zeroed)
		return false;
	uint64_t per_unit = region->unit / region->pager->page;
	for (uint64_t page = unit * per_unit; page < (unit + 1) * per_unit; page++)
		if (region->zeroed[page / 64] >> (page % 64) & 1)
			return true;
	return false;
}

static int install_around_zeroed(struct umm_region *region, uint64_t unit, const uint8_t *data)
{
	struct umm_uf *uf = region->uf;
	uint64_t page = uf->pager->page, per_unit = region->unit / page;
	for (uint64_t i = 0; i < per_unit; i++) {
		uint64_t number = unit * per_unit + i;
		if (region->zeroed[number / 64] >> (number % 64) & 1)
			continue;
		uint64_t run, address = region_address_of(region, number * page, &run);
		if (!run)
			continue;
		int err = data ? copy_range(uf, address, data + i * page, page, page)
		               : zero_range(uf, address, page, page);
		if (err)
			return err;
	}
	/* Who waits for a page that was left out comes again, and gets zeros. */
	wake_unit(region, unit);
	return 0;
}

int install_unit(struct umm_region *region, uint64_t unit, const void *data)
{
	if (has_zeroed(region, unit))
		return install_around_zeroed(region, unit, data);
	return install_units(region, unit, 1, data);
}

int install_zero_page(struct umm_uf *uf, uint64_t address, uint64_t granule)
{
	return zero_range(uf, address & ~(granule - 1), granule, granule);
}

int install_huge(struct umm_region *region, uint64_t unit, void *buffer)
{
	struct umm_uf *uf = region->uf;
	uint64_t address = unit_address(region, unit);
	if (address && uf->pager->use_move && !region->hugetlb && !has_zeroed(region, unit)) {
		struct umm_uffd_result result;
		umm_uffd_move(uf->fd, address, (uintptr_t)buffer, region->unit,
		        wake_later(uf, address, region->unit), &result);
		if (result.outcome == UMM_OUTCOME_INSTALLED)
			return 0;
		if (result.outcome == UMM_OUTCOME_DEFERRED && result.done == 0)
			return -EAGAIN;
		/* 6.18 can move every page and still say EEXIST; and a part may have been moved before a
		 * failure. What is in place stays; only what is still in the buffer is copied. */
		uint64_t page = uf->pager->page;
		for (uint64_t at = 0; at < region->unit; at += page) {
			if (!page_present(uf->pager, (uintptr_t)buffer + at))
				continue;
			int err = copy_range(uf, address + at, (uint8_t *)buffer + at, page, page);
			if (err)
				return err;
		}
		wake(uf, address, region->unit);
		return 0;
	}
	return install_unit(region, unit, buffer);
}

void poison_unit(struct umm_region *region, uint64_t unit, int error)
{
	struct umm_uf *uf = region->uf;
	uint64_t granule = region->hugetlb ? region->hugetlb : uf->pager->page;
	if (unit_state(region, unit) != UNIT_POISONED) {
		uf->counters.pages_lost++;
		region->counters.pages_lost++;
		announce_poison(region, unit);
	}
	unit_set(region, unit, UNIT_POISONED, (uint32_t)(error < 0 ? -error : error));
	if (!uf->pager->has_poison) {
		/* A handler cannot change mappings: its own event would wait for it. */
		if (!uf->pager->in_thread && !prefetch_post(region, unit, 1, 0))
			defer_unit(region, unit);
		return;
	}
	for (uint64_t at = 0; at < region->unit; at += granule) {
		uint64_t run, address = region_address_of(region, unit * region->unit + at, &run);
		if (!run)
			continue;
		struct umm_uffd_result result;
		umm_uffd_poison(uf->fd, address, granule, 0, &result);
		if (result.outcome == UMM_OUTCOME_DEFERRED)
			defer(uf, address, granule);
		else if (result.outcome != UMM_OUTCOME_INSTALLED)
			wake(uf, address, granule);
	}
}

void wake_unit(struct umm_region *region, uint64_t unit)
{
	uint64_t run, offset = unit * region->unit;
	for (uint64_t done = 0; done < region->unit; done += run) {
		uint64_t address = region_address_of(region, offset + done, &run);
		if (!run)
			break;
		wake(region->uf, address, run < region->unit - done ? run : region->unit - done);
	}
}

void defer(struct umm_uf *uf, uint64_t address, uint64_t len)
{
	uf->counters.faults_deferred++;
	if (!uf->wake_later) {
		/* Not called by a handler: they may all sleep, with no message coming that would make them
		 * look at the list. Who is woken faults again, which is a message. */
		wake(uf, address, len);
		return;
	}
	if (uf->n_deferred == MAX_DEFERRED) {
		/* More faults than places: wake those that wait longest, they come again. */
		wake(uf, uf->deferred[0].start, uf->deferred[0].end - uf->deferred[0].start);
		uf->deferred[0] = (struct range){address, address + len};
		return;
	}
	uf->deferred[uf->n_deferred++] = (struct range){address, address + len};
}

void defer_unit(struct umm_region *region, uint64_t unit)
{
	uint64_t run, offset = unit * region->unit;
	for (uint64_t done = 0; done < region->unit; done += run) {
		uint64_t address = region_address_of(region, offset + done, &run);
		if (!run)
			break;
		defer(region->uf, address, run < region->unit - done ? run : region->unit - done);
	}
}

void wake_deferred(struct umm_uf *uf)
{
	/* The faulting threads come again, with a new message each: by then the event that was in their way
	 * has been read, and its caller has had a chance to run. */
	for (uint32_t i = 0; i < uf->n_deferred; i++)
		wake(uf, uf->deferred[i].start, uf->deferred[i].end - uf->deferred[i].start);
	uf->n_deferred = 0;
}
