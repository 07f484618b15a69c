/* Eviction on request: the explicit form of what the budget does. */
#include <errno.h>
#include <stdlib.h>
#include <time.h>

#include "common/lock.h"
#include "pager/internal.h"

static const long event_ns = 50000;

static uint32_t pick_range(
        struct umm_region *region, uint64_t *unit, uint64_t end, struct picked *batch, uint64_t bytes)
{
	uint32_t n = 0;
	pthread_mutex_lock(&region->uf->lock);
	for (; *unit < end && n < ANNOUNCED_MAX && (n == 0 || (n + 1) * region->unit <= bytes); ++*unit) {
		if (unit_state(region, *unit) != UNIT_PRESENT)
			continue;
		unit_set(region, *unit, UNIT_LEAVING, 0);
		batch[n++] = (struct picked){region, *unit, 0};
	}
	pthread_mutex_unlock(&region->uf->lock);
	return n;
}

int umm_region_evict(struct umm_region *region, uint64_t offset, uint64_t len)
{
	if (region->unserved)
		return -ENODEV;
	struct umm_pager *pager = region->pager;
	if (offset > region->mapped || len > region->mapped - offset)
		return -EINVAL;
	if (!len)
		return 0;
	/* The evictor may be waiting for this callback, with the lock that this needs. */
	if (umm_notify_in_callback())
		return -EDEADLK;
	struct picked *batch = malloc(ANNOUNCED_MAX * sizeof(*batch));
	if (!batch)
		return -ENOMEM;
	sigset_t saved;
	block_signals(&saved);
	int err = 0;
	pthread_mutex_lock(&pager->evict_lock);
	bool borrowed = !pager->staging.memory;
	if (borrowed)
		err = staging_borrow(pager, region->unit);
	region->write_error = 0;
	uint64_t unit = offset / region->unit, end = (offset + len - 1) / region->unit + 1;
	while (!err && unit < end) {
		uint64_t from = unit;
		uint32_t n = pick_range(region, &unit, end, batch, pager->staging.area_bytes);
		pager->evict_waits = true;
		pager->evict_again = pager->evict_refused = false;
		if (n)
			evict_batch(region->uf, batch, n);
		if (pager->evict_again) {
			/* A fork waits for evict_lock. */
			pthread_mutex_unlock(&pager->evict_lock);
			nanosleep(&(struct timespec){.tv_nsec = event_ns}, NULL);
			pthread_mutex_lock(&pager->evict_lock);
			unit = from;
		} else if (pager->evict_refused && !region->write_error) {
			region->write_error = -EBUSY;
		}
	}
	staging_finalise_all(pager);
	if (borrowed)
		staging_deinit(pager);
	if (!err)
		err = region->write_error;
	pthread_mutex_unlock(&pager->evict_lock);
	restore_signals(&saved);
	free(batch);
	return err;
}
