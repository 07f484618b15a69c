/* Write-back on request: every modified unit to the store, then the store to its disk. */
#include "pager/internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "common/lock.h"

/* The unit's bytes as they are now. evict_lock held, so it stays where it is: 1 when there is something
 * that may have to be written, 0 when the store has it already, or -errno. */
static int read_unit(
        struct umm_region *region, uint64_t unit, uint32_t *word, uint64_t *hash, uint8_t *buffer)
{
	struct umm_uf *uf = region->uf;
	int err = 0;
	pthread_mutex_lock(&uf->lock);
	*word = region->units[unit];
	*hash = region->hashes[unit];
	int state = unit_state(region, unit);
	uint8_t layer = region->layers ? region->layers[unit] : 0;
	if (state == UNIT_PRESENT) {
		/* Through the kernel, not by touching it: a fault under evict_lock would, in in-thread mode,
		 * want the lock that fork() takes before it waits for this one. */
		err = read_in_place(region, unit, buffer);
		zero_removed_pages(region, unit, buffer);
	}
	pthread_mutex_unlock(&uf->lock);
	switch (state) {
	case UNIT_REMOVED:
		memset(buffer, 0, region->unit);
		return 1;
	case UNIT_MISSING:
		if (!(*word & UNIT_SPILLED))
			return 0;
		return fetch_unit(region, unit, *word, layer, buffer) ?: 1;
	case UNIT_PRESENT:
		/* Partly unmapped: what is gone cannot be written, and the rest stays as it is. */
		return err == -EFAULT ? 0 : err ? err : 1;
	default:
		return 0; /* on its way in, lost, or unmapped: the store has what there is */
	}
}

static int flush_unit(struct umm_region *region, uint64_t unit, uint8_t *buffer)
{
	struct umm_store *store = region->store;
	uint32_t word;
	uint64_t hash;
	int found = read_unit(region, unit, &word, &hash, buffer);
	if (found <= 0)
		return found;
	uint64_t len = unit_store_bytes(region, unit);
	bool removed = (word & UNIT_STATE_MASK) == UNIT_REMOVED;
	bool same = equals_stored(region, unit, removed ? 0 : word, buffer, &hash);
	if (same && !(word & UNIT_SPILLED) && !removed)
		return 0;
	if (!len)
		return 0;
	int err = store->ops->write(store, unit * region->unit, len, buffer);
	pthread_mutex_lock(&region->uf->lock);
	if (err) {
		region->write_error = err;
	} else {
		region->counters.bytes_written += len;
		region->uf->counters.bytes_written += len;
		/* A write after the bytes were read leaves the unit unequal to this hash: dirty, as it is. */
		if (unit_state(region, unit) != UNIT_REMOVED || removed)
			note_written(region, unit, LAYER_STORE, hash);
	}
	pthread_mutex_unlock(&region->uf->lock);
	return err;
}

int umm_region_flush(struct umm_region *region)
{
	struct umm_pager *pager = region->pager;
	struct umm_store *store = region->store;
	if (store->kind != UMM_STORE_WRITEBACK || region->in_child)
		return 0;
	uint8_t *buffer = map_anonymous(region->unit, pager->page);
	if (!buffer)
		return -ENOMEM;
	sigset_t saved;
	block_signals(&saved);
	pthread_mutex_lock(&pager->evict_lock);
	/* Children that still read the store learn that it is not their snapshot any more, before it changes.
	 */
	if (region->flush_epoch && region->forked)
		atomic_fetch_add(region->flush_epoch, 1);
	region->forked = false;
	staging_finalise_all(pager);
	int err = 0;
	for (uint64_t unit = 0; unit < region->n_units; unit++) {
		int one = flush_unit(region, unit, buffer);
		if (one && !err)
			err = one;
	}
	int one = store->ops->flush ? store->ops->flush(store) : 0;
	pthread_mutex_unlock(&pager->evict_lock);
	restore_signals(&saved);
	munmap(buffer, region->unit);
	return err ? err : one;
}
