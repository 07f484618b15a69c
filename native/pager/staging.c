/* The waiting room between a region and its store: units that were moved out, still whole and warm.
 *
 * Areas are filled in turn; the one that is filled next is emptied first, so that a unit stays for as
 * long as the others take to fill. A fault on it meanwhile brings it back without the store. */
#include "pager/internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

static const uint64_t staging_most = 16 << 20, area_most = 2 << 20;

static uint64_t power_of_two_below(uint64_t x)
{
	return (uint64_t)1 << (63 - __builtin_clzll(x));
}

static int map_areas(struct umm_pager *pager, uint64_t total)
{
	struct staging *staging = &pager->staging;
	uint64_t area = total >= pager->page ? power_of_two_below(total) : pager->page;
	area = area < area_most ? area : area_most;
	uint64_t n = total / area;
	staging->n_areas = n < 1 ? 1 : n > STAGING_AREAS ? STAGING_AREAS : (uint32_t)n;
	staging->area_bytes = area;
	staging->bytes = staging->n_areas * area;
	staging->next = 0;
	staging->memory = map_anonymous(staging->bytes, area_most);
	if (!staging->memory)
		return -ENOMEM;
	if (pager->pmd <= area)
		madvise(staging->memory, staging->bytes, MADV_HUGEPAGE);
	for (uint32_t i = 0; i < staging->n_areas; i++) {
		struct staging_area *one = &staging->areas[i];
		*one = (struct staging_area){.offset = i * area, .capacity = (uint32_t)(area / pager->page)};
		one->entries = calloc(one->capacity, sizeof(*one->entries));
		if (!one->entries) {
			staging_deinit(pager);
			return -ENOMEM;
		}
	}
	if (!pager->announced)
		pager->announced = map_anonymous(ANNOUNCED_MAX * sizeof(*pager->announced), pager->page);
	if (!pager->evict_buffer)
		pager->evict_buffer = map_anonymous(pager->buffer_bytes, area_most);
	if (!pager->evict_buffer || !pager->announced) {
		staging_deinit(pager);
		return -ENOMEM;
	}
	return 0;
}

int staging_borrow(struct umm_pager *pager, uint64_t unit)
{
	return map_areas(pager, unit > area_most ? unit : area_most);
}

int staging_init(struct umm_pager *pager)
{
	uint64_t budget = atomic_load(&pager->budget);
	int mapped = map_areas(pager, budget / 8 < staging_most ? budget / 8 : staging_most);
	if (mapped)
		return mapped;
	for (uint32_t i = 0; i < pager->n_ufs; i++) {
		struct umm_uf *uf = &pager->ufs[i];
		struct fifo fresh, old;
		int err = fifo_init(&fresh, budget / pager->page * 2);
		if (err) {
			staging_deinit(pager);
			return err;
		}
		/* Handlers push at any time. */
		pthread_mutex_lock(&uf->lock);
		old = uf->fifo;
		uf->fifo = fresh;
		pthread_mutex_unlock(&uf->lock);
		fifo_deinit(&old);
	}
	return 0;
}

void staging_deinit(struct umm_pager *pager)
{
	struct staging *staging = &pager->staging;
	for (uint32_t i = 0; i < STAGING_AREAS; i++) {
		free(staging->areas[i].entries);
		staging->areas[i].entries = NULL;
	}
	if (staging->memory)
		munmap(staging->memory, staging->bytes);
	staging->memory = NULL;
	staging->bytes = 0;
	staging->n_areas = 0;
}

const uint8_t *staging_slot(struct umm_pager *pager, uint32_t payload)
{
	return pager->staging.memory + (uint64_t)payload * pager->page;
}

/* Removed pages of a unit that was moved out whole read as zero from now on. Lock held. */
static void zero_removed(struct umm_region *region, uint64_t unit, uint8_t *data)
{
	if (!has_zeroed(region, unit))
		return;
	uint64_t page = region->pager->page, per_unit = region->unit / page;
	for (uint64_t i = 0; i < per_unit; i++) {
		uint64_t number = unit * per_unit + i;
		uint64_t bit = 1ull << (number % 64);
		if (region->zeroed[number / 64] & bit)
			memset(data + i * page, 0, page);
		region->zeroed[number / 64] &= ~bit;
	}
}

static bool still_staged(struct umm_pager *pager, const struct staged *entry)
{
	return entry->region && unit_state(entry->region, entry->unit) == UNIT_STAGED &&
	       (uint64_t)unit_payload(entry->region, entry->unit) * pager->page == entry->slot;
}

/* The store refused: the unit goes back to where it was. */
static void put_back(struct umm_pager *pager, struct staged *entry)
{
	struct umm_region *region = entry->region;
	pthread_mutex_lock(&region->uf->lock);
	while (still_staged(pager, entry)) {
		int err = install_unit(region, entry->unit, pager->staging.memory + entry->slot);
		if (err != -EAGAIN && err != -ENOMEM) {
			unit_set_present(region, entry->unit);
			break;
		}
		/* The handlers must be able to read the event that is in the way. */
		pthread_mutex_unlock(&region->uf->lock);
		nanosleep(&(struct timespec){.tv_nsec = 50000}, NULL);
		pthread_mutex_lock(&region->uf->lock);
	}
	region->counters.evict_failed++;
	region->uf->counters.evict_failed++;
	region->write_error = entry->error;
	pager->evict_refused = true;
	pthread_mutex_unlock(&region->uf->lock);
}

static void look_up(struct umm_pager *pager, struct staging_area *area)
{
	for (uint32_t i = 0; i < area->n; i++) {
		struct staged *entry = &area->entries[i];
		entry->live = still_staged(pager, entry);
		if (!entry->live)
			continue;
		zero_removed(entry->region, entry->unit, pager->staging.memory + entry->slot);
		entry->word = entry->region->units[entry->unit];
		entry->hash = entry->region->hashes[entry->unit];
	}
}

static void write_dirty(struct umm_pager *pager, struct staging_area *area)
{
	for (uint32_t i = 0; i < area->n; i++) {
		struct staged *entry = &area->entries[i];
		if (!entry->live)
			continue;
		const uint8_t *data = pager->staging.memory + entry->slot;
		entry->dirty = !equals_stored(entry->region, entry->unit, entry->word, data, &entry->hash);
		entry->error = entry->dirty ? write_out(entry->region, entry->unit, data, &entry->layer) : 0;
	}
}

static void settle(struct umm_pager *pager, struct staging_area *area)
{
	for (uint32_t i = 0; i < area->n; i++) {
		struct staged *entry = &area->entries[i];
		struct umm_region *region = entry->region;
		if (!entry->live || entry->error)
			continue;
		int state = unit_state(region, entry->unit);
		/* Brought back meanwhile: what was written is a valid stored copy all the same. Removed or
		 * unmapped: it is not. */
		if (entry->dirty && state != UNIT_REMOVED && state != UNIT_GONE)
			note_written(region, entry->unit, entry->layer, entry->hash);
		if (!still_staged(pager, entry))
			continue;
		if (unit_flag(region, entry->unit, UNIT_PREFETCHED)) {
			region->counters.prefetch_wasted++;
			region->uf->counters.prefetch_wasted++;
			unit_unmark(region, entry->unit, UNIT_PREFETCHED);
		}
		unit_set(region, entry->unit, UNIT_MISSING, 0);
		struct umm_pager_counters *both[2] = {&region->counters, &region->uf->counters};
		for (int k = 0; k < 2; k++) {
			both[k]->evicted_dirty += entry->dirty;
			both[k]->evicted_clean += !entry->dirty;
		}
	}
}

uint64_t staging_finalise(struct umm_pager *pager, struct staging_area *area)
{
	struct umm_uf *uf = area->uf;
	uint64_t refused = 0;
	if (!uf)
		return 0;
	pthread_mutex_lock(&uf->lock);
	look_up(pager, area);
	pthread_mutex_unlock(&uf->lock);
	write_dirty(pager, area);
	pthread_mutex_lock(&uf->lock);
	settle(pager, area);
	pthread_mutex_unlock(&uf->lock);
	for (uint32_t i = 0; i < area->n; i++)
		if (area->entries[i].live && area->entries[i].error) {
			put_back(pager, &area->entries[i]);
			refused++;
		}
	/* Nobody reads these slots any more: a rescue works under the lock, and no unit names them. */
	uint8_t *memory = pager->staging.memory + area->offset;
	umm_uffd_unregister(uf->fd, (uintptr_t)memory, pager->staging.area_bytes);
	madvise(memory, pager->staging.area_bytes, MADV_DONTNEED);
	atomic_fetch_sub(&pager->staged, area->used);
	area->used = 0;
	area->n = 0;
	area->uf = NULL;
	return refused;
}

void staging_finalise_all(struct umm_pager *pager)
{
	for (uint32_t i = 0; i < pager->staging.n_areas; i++)
		staging_finalise(
		        pager, &pager->staging.areas[(pager->staging.next + i) % pager->staging.n_areas]);
}

void staging_forget(struct umm_region *region)
{
	struct staging *staging = &region->pager->staging;
	for (uint32_t i = 0; i < staging->n_areas; i++)
		for (uint32_t k = 0; k < staging->areas[i].n; k++)
			if (staging->areas[i].entries[k].region == region)
				staging->areas[i].entries[k].region = NULL;
}
