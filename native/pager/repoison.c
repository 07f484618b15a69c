/* The end of a guard: units that were filled for it are lost again. */
#include "pager/internal.h"

#include <errno.h>

static int repoison_unit(struct umm_region *region, uint64_t unit)
{
	struct umm_uf *uf = region->uf;
	uint64_t granule = region->hugetlb ? region->hugetlb : uf->pager->page;
	pthread_mutex_lock(&uf->lock);
	uint64_t address = unit_state(region, unit) == UNIT_FILLED ? unit_address(region, unit) : 0;
	int error = (int)unit_payload(region, unit);
	/* Before the fill goes: a fault from now on is answered with poison, not with a fetch. */
	if (address)
		unit_set(region, unit, UNIT_POISONED, (uint32_t)error);
	pthread_mutex_unlock(&uf->lock);
	if (!address)
		return 0;
	/* What a subscriber holds of the fill is no data: nobody is waited for, with locks held. */
	struct umm_notify_range range;
	umm_notify_start(&range, umm_space_self(), address, address + region->unit, UMM_SOURCE_PAGER,
	        UMM_REASON_POISON, UMM_NOTIFY_BLOCKABLE | UMM_NOTIFY_NO_WAIT);
	int err = poisoned_by_mapping(region) ? unfill_mapped(region, address)
	                                      : zap_range(uf, address, region->unit, granule);
	if (!poisoned_by_mapping(region)) {
		pthread_mutex_lock(&uf->lock);
		if (unit_state(region, unit) == UNIT_POISONED)
			poison_unit(region, unit, error);
		pthread_mutex_unlock(&uf->lock);
	}
	umm_notify_end(&range, err);
	return err;
}

static bool is_filled(struct umm_region *region, uint64_t unit)
{
	pthread_mutex_lock(&region->uf->lock);
	bool filled = unit_state(region, unit) == UNIT_FILLED;
	pthread_mutex_unlock(&region->uf->lock);
	return filled;
}

/* Reads and clears the mark that saves looking at every unit of every region. */
static bool take_any_filled(struct umm_region *region)
{
	pthread_mutex_lock(&region->uf->lock);
	bool any = region->any_filled;
	region->any_filled = false;
	pthread_mutex_unlock(&region->uf->lock);
	return any;
}

int poison_filled_of(struct umm_pager *pager)
{
	pthread_mutex_lock(&pager->regions_lock);
	pthread_mutex_lock(&pager->evict_lock);
	int err = 0;
	for (struct umm_region *region = pager->regions; region; region = region->next) {
		bool any = take_any_filled(region);
		for (uint64_t unit = 0; any && unit < region->n_units; unit++)
			if (is_filled(region, unit)) {
				int one = repoison_unit(region, unit);
				err = err ? err : one;
			}
	}
	pthread_mutex_unlock(&pager->evict_lock);
	pthread_mutex_unlock(&pager->regions_lock);
	return err;
}
