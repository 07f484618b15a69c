/* Eviction where MOVE does not exist or refuses: write-protect, copy, then MADV_DONTNEED.
 *
 * A write to a unit that is being copied faults; the handler lifts the protection at once and takes the
 * claim away, so a writer never waits for the store. */
#include "pager/internal.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "common/lock.h"
#include "kernel/pagemap.h"

static const uint64_t kept_max = 2 << 20;

int zap_range(struct umm_uf *uf, uint64_t address, uint64_t len, uint64_t granule)
{
	if (len / granule > ZAP_MAX)
		return -EINVAL;
	pthread_mutex_lock(&uf->lock);
	uf->zap.start = address;
	uf->zap.end = address + len;
	uf->zap.granule = granule;
	memset(uf->zap.seen, 0, (len / granule + 63) / 64 * sizeof(uf->zap.seen[0]));
	uf->zap.active = true;
	pthread_mutex_unlock(&uf->lock);
	/* A handler reads the REMOVE event of this; it must not need evict_lock, and does not. */
	int err = madvise((void *)address, len, MADV_DONTNEED) < 0 ? -errno : 0;
	pthread_mutex_lock(&uf->lock);
	uf->zap.active = false;
	/* No REMOVE event: the user moved the memory away since `address` was looked up, it is untouched, and
	 * what was taken is of whoever got the place since. */
	bool ours = false;
	for (uint64_t i = 0; i < (len / granule + 63) / 64; i++)
		ours |= uf->zap.seen[i] != 0;
	pthread_mutex_unlock(&uf->lock);
	return err ? err : ours ? 0 : -EAGAIN;
}

/* Through the kernel: a range that the user unmaps meanwhile is an error here, not a crash. */
static int read_memory(uint64_t address, uint64_t len, void *buffer)
{
	struct iovec local = {buffer, len}, remote = {(void *)address, len};
	ssize_t n = process_vm_readv(getpid(), &local, 1, &remote, 1, 0);
	return n < 0 ? -errno : (uint64_t)n == len ? 0 : -EFAULT;
}

static void give_up(struct umm_region *region, uint64_t unit)
{
	/* The protection that may be left on the pages is lifted by the first write. */
	if (unit_state(region, unit) == UNIT_LEAVING || unit_state(region, unit) == UNIT_COPYING)
		unit_set_present(region, unit);
}

static uint64_t protect(struct umm_region *region, uint64_t unit, uint64_t announced)
{
	struct umm_pager *pager = region->pager;
	uint64_t address = unit_address(region, unit);
	if (unit_state(region, unit) != UNIT_LEAVING)
		return 0;
	struct umm_uffd_result result = {0};
	if (!address || (announced && address != announced) || !pager->has_wp || has_zeroed(region, unit) ||
	        umm_uffd_writeprotect(region->uf->fd, address, region->unit, UMM_UFFD_WP_PROTECT, &result)) {
		give_up(region, unit);
		pager->evict_deferred |= result.outcome == UMM_OUTCOME_DEFERRED;
		return 0;
	}
	unit_set(region, unit, UNIT_COPYING, 0);
	return address;
}

/* madvise() lets go of the mapping while its event is read, and then takes what stands at the address: when
 * the user's mremap came in between, that is somebody else's, and pagemap tells. */
static bool was_moved_away(struct umm_region *region, uint64_t unit, uint64_t zapped)
{
	struct umm_pager *pager = region->pager;
	uint64_t address = unit_address(region, unit), there = 0;
	for (uint64_t at = 0; address && address != zapped && at < region->unit; at += pager->page) {
		uint64_t entry = 0;
		umm_pagemap_read(pager->pagemap_fd, address + at, 1, pager->page, &entry);
		there |= entry & (UMM_PAGEMAP_PRESENT | UMM_PAGEMAP_SWAP);
	}
	return there != 0;
}

static void end_zap(struct umm_region *region, uint64_t unit, uint64_t address, int err)
{
	bool wanted = unit_flag(region, unit, UNIT_WANTED);
	if (claim_lost(region, unit))
		return;
	if (!err && was_moved_away(region, unit, address))
		err = -EAGAIN;
	if (err)
		unit_set_present(region, unit);
	else
		unit_set(region, unit, UNIT_MISSING, 0);
	if (wanted)
		wake_unit(region, unit);
}

static bool copy_one(struct umm_region *region, uint64_t unit, uint64_t announced)
{
	struct umm_pager *pager = region->pager;
	struct umm_uf *uf = region->uf;
	uint64_t granule = region->hugetlb ? region->hugetlb : pager->page;

	pthread_mutex_lock(&uf->lock);
	uint64_t address = protect(region, unit, announced);
	uint32_t word = region->units[unit];
	uint64_t hash = region->hashes[unit];
	pthread_mutex_unlock(&uf->lock);
	if (!address)
		return false;

	uint8_t layer = LAYER_STORE;
	int err = read_memory(address, region->unit, pager->evict_buffer);
	if (err == -EFAULT) {
		/* Moved or unmapped by the user, whose event is about to be read. */
		pthread_mutex_lock(&uf->lock);
		give_up(region, unit);
		pager->evict_deferred = true;
		pthread_mutex_unlock(&uf->lock);
		return false;
	}
	bool dirty = !err && !equals_stored(region, unit, word, pager->evict_buffer, &hash);
	if (dirty)
		err = write_out(region, unit, pager->evict_buffer, &layer);

	/* Of units of 32 or 512 MiB the copy is not kept. */
	if (region->unit > kept_max)
		madvise(pager->evict_buffer, region->unit, MADV_DONTNEED);

	pthread_mutex_lock(&uf->lock);
	int state = unit_state(region, unit);
	if (dirty && !err && state != UNIT_REMOVED && state != UNIT_GONE)
		note_written(region, unit, layer, hash);
	if (err) {
		region->counters.evict_failed++;
		uf->counters.evict_failed++;
		region->write_error = err;
		pager->evict_refused = true;
		give_up(region, unit);
	}
	/* Not COPYING any more: it was written, removed or unmapped, and is not ours to take away. */
	bool ours = !err && unit_state(region, unit) == UNIT_COPYING && unit_address(region, unit) == address;
	if (ours)
		unit_set(region, unit, UNIT_ZAPPING, 0);
	else if (!err)
		give_up(region, unit);
	pthread_mutex_unlock(&uf->lock);
	if (!ours)
		return false;

	err = zap_range(uf, address, region->unit, granule);
	pthread_mutex_lock(&uf->lock);
	end_zap(region, unit, address, err);
	struct umm_pager_counters *both[2] = {&region->counters, &uf->counters};
	for (int i = 0; i < 2 && !err; i++) {
		both[i]->evicted_dirty += dirty;
		both[i]->evicted_clean += !dirty;
	}
	pthread_mutex_unlock(&uf->lock);
	return !err;
}

uint64_t copy_out(const struct picked *batch, uint64_t count)
{
	uint64_t went = 0;
	for (uint64_t i = 0; i < count; i++)
		went += copy_one(batch[i].region, batch[i].unit, batch[i].address);
	return went;
}
