/* From the store (or the spill) to memory, and the question whether memory still equals the stored copy. */
#include "pager/internal.h"

#include <errno.h>
#include <string.h>
#include <xxhash.h>

uint64_t hash_bytes(const void *data, uint64_t len)
{
	uint64_t hash = XXH3_64bits(data, len);
	return hash ? hash : 1; /* 0 stands for "not known" */
}

const void *peek_unit(struct umm_region *region, uint64_t unit)
{
	struct umm_store *store = region->store;
	if (!store->ops->peek || unit_flag(region, unit, UNIT_SPILLED))
		return NULL;
	if (unit_store_bytes(region, unit) != region->unit)
		return NULL;
	return store->ops->peek(store, unit * region->unit, region->unit);
}

uint64_t hash_fetched(const struct umm_region *region, uint32_t word, const void *data)
{
	/* A stored copy that can be looked at is compared as it is (equals_stored). */
	if (!region->hashes || (region->store->ops->peek && !(word & UNIT_SPILLED)))
		return 0;
	return hash_bytes(data, region->unit);
}

/* A child's snapshot is the store as it was at the fork: once the parent has flushed, it cannot be had. */
static bool snapshot_is_stale(const struct umm_region *region)
{
	return region->in_child && region->flush_epoch &&
	       atomic_load_explicit(region->flush_epoch, memory_order_acquire) != region->child_epoch;
}

int fetch_unit(struct umm_region *region, uint64_t unit, uint32_t word, uint8_t layer, void *buffer)
{
	struct umm_store *store = region->store;
	if (word & UNIT_SPILLED)
		return spill_read(region, unit, (uint8_t)(layer - 1), buffer);
	uint64_t len = unit_store_bytes(region, unit);
	int err = 0;
	for (unsigned tries = 0; tries <= store->retries; tries++) {
		err = len ? store->ops->fetch(store, unit * region->unit, len, buffer) : 0;
		if (!err)
			break;
		atomic_fetch_add_explicit(&region->failed_fetches, 1, memory_order_relaxed);
		atomic_fetch_add_explicit(&region->pager->failed_fetches, 1, memory_order_relaxed);
	}
	if (err)
		return err;
	if (snapshot_is_stale(region))
		return -ESTALE;
	memset((uint8_t *)buffer + len, 0, region->unit - len);
	return 0;
}

void note_stored(struct umm_region *region, uint64_t unit, uint64_t hash)
{
	if (region->hashes)
		region->hashes[unit] = hash;
}

bool equals_stored(struct umm_region *region, uint64_t unit, uint32_t word, const void *data, uint64_t *hash)
{
	struct umm_store *store = region->store;
	uint64_t known = *hash;
	*hash = hash_bytes(data, region->unit);
	if ((word & UNIT_SPILLED) || !store->ops->peek)
		return known == *hash;
	uint64_t len = unit_store_bytes(region, unit);
	const void *stored = len ? store->ops->peek(store, unit * region->unit, len) : NULL;
	if (len && !stored)
		return known == *hash;
	if (len && memcmp(stored, data, len) != 0)
		return false;
	return memcmp(region->pager->zeros, (const uint8_t *)data + len, region->unit - len) == 0;
}
