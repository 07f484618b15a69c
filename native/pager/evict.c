/* The evictor: keeps the resident units within the budget, oldest first. */
#include "pager/internal.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>

#include "common/lock.h"
#include "kernel/pagemap.h"

enum {
	BATCH_MAX = ANNOUNCED_MAX,
	MOVE_MAX = 64, /* pages in one hold of the lock: some 7 us */
	CALLS_MAX = 4, /* calls in one hold of the lock */
};
static const long back_off_ns = 50000000, back_off_most_ns = 400000000, event_ns = 50000;

uint64_t resident_limit(struct umm_pager *pager)
{
	uint64_t budget = atomic_load_explicit(&pager->budget, memory_order_relaxed);
	return budget > pager->staging.bytes ? budget - pager->staging.bytes : 0;
}

uint64_t evict_target(struct umm_pager *pager)
{
	uint64_t limit = resident_limit(pager);
	return limit - limit / 16;
}

void evictor_wake(struct umm_pager *pager)
{
	if (atomic_exchange_explicit(&pager->evict_wanted, true, memory_order_acq_rel))
		return;
	/* The evictor holds this lock for a few instructions, never while it works. */
	pthread_mutex_lock(&pager->evict_wake_lock);
	pthread_cond_signal(&pager->evict_wake);
	pthread_mutex_unlock(&pager->evict_wake_lock);
}

int write_out(struct umm_region *region, uint64_t unit, const void *data, uint8_t *layer)
{
	struct umm_store *store = region->store;
	int err;
	uint64_t len = unit_store_bytes(region, unit);
	if (store->kind == UMM_STORE_WRITEBACK && !region->forked && !region->in_child) {
		*layer = LAYER_STORE;
		err = len ? store->ops->write(store, unit * region->unit, len, data) : 0;
	} else {
		err = spill_write(region, unit, data, layer);
	}
	if (!err) {
		pthread_mutex_lock(&region->uf->lock);
		region->counters.bytes_written += region->unit;
		region->uf->counters.bytes_written += region->unit;
		pthread_mutex_unlock(&region->uf->lock);
	}
	return err;
}

void note_written(struct umm_region *region, uint64_t unit, uint8_t layer, uint64_t hash)
{
	if (layer == LAYER_STORE)
		spill_drop(region, unit);
	else
		spill_note(region, unit, layer);
	region->hashes[unit] = hash;
}

void back_in_place(struct umm_region *region, uint64_t unit)
{
	if (unit_state(region, unit) == UNIT_LEAVING)
		unit_set_present(region, unit);
}

static void stage(struct umm_region *region, uint64_t unit, struct staging_area *area, uint64_t slot)
{
	struct umm_pager *pager = region->pager;
	unit_set(region, unit, UNIT_STAGED, (uint32_t)(slot / pager->page));
	area->entries[area->n++] = (struct staged){.region = region, .unit = unit, .slot = slot};
}

static bool is_there(uint64_t entry)
{
	return (entry & (UMM_PAGEMAP_PRESENT | UMM_PAGEMAP_SWAP)) != 0;
}

/* After a failed or short MOVE pagemap decides, not the answer: 6.18 can move everything and say EEXIST.
 * Returns true when the unit is out. */
static bool sort_out(
        struct umm_region *region, uint64_t unit, uint64_t address, struct staging_area *area, uint64_t slot)
{
	struct umm_pager *pager = region->pager;
	uint64_t pages = region->unit / pager->page, moved = 0, stayed = 0;
	for (uint64_t i = 0; i < pages; i++) {
		uint64_t there = 0, here = 0;
		umm_pagemap_read(pager->pagemap_fd, address + i * pager->page, 1, pager->page, &here);
		umm_pagemap_read(pager->pagemap_fd, (uintptr_t)pager->staging.memory + slot + i * pager->page,
		        1, pager->page, &there);
		stayed += is_there(here);
		moved += is_there(there);
	}
	if (moved && !stayed) {
		stage(region, unit, area, slot);
		return true;
	}
	if (moved) {
		/* In two halves: what is out is copied back, what stayed answers EEXIST and stays. */
		stage(region, unit, area, slot);
		if (install_unit(region, unit, pager->staging.memory + slot) == 0) {
			area->n--;
			unit_set_present(region, unit);
		} else {
			defer_unit(region, unit);
		}
		return true;
	}
	return false;
}

/* One MOVE for neighbouring units, in one hold of the lock. Marks what could not be moved in `refused`. */
static uint64_t move_run(const struct picked *batch, uint64_t count, struct staging_area *area, bool *refused)
{
	struct umm_region *region = batch->region;
	uint64_t first = batch->unit;
	struct umm_pager *pager = region->pager;
	struct umm_uf *uf = region->uf;
	*refused = false;
	uint64_t run, address = region_address_of(region, first * region->unit, &run);
	if (run < region->unit || (batch->address && batch->address != address)) {
		/* Unmapped, or moved elsewhere since it was announced. */
		for (uint64_t i = 0; i < count; i++)
			back_in_place(region, first + i);
		return 0;
	}
	if (run / region->unit < count)
		count = run / region->unit;
	uint64_t slot = (area->used + region->unit - 1) / region->unit * region->unit;
	uint64_t base = area->offset + slot;
	struct umm_uffd_result result;
	umm_uffd_move(uf->fd, (uintptr_t)pager->staging.memory + base, address, count * region->unit,
	        UMM_UFFD_MOVE_ALLOW_SRC_HOLES, &result);
	uint64_t out = 0;
	for (uint64_t i = 0; i < count; i++) {
		uint64_t unit_slot = base + i * region->unit;
		if (result.outcome == UMM_OUTCOME_INSTALLED) {
			stage(region, first + i, area, unit_slot);
			out++;
		} else if (sort_out(region, first + i, address + i * region->unit, area, unit_slot)) {
			out++;
		} else if (result.outcome == UMM_OUTCOME_DEFERRED ||
		           result.outcome == UMM_OUTCOME_NO_MEMORY) {
			back_in_place(region, first + i);
			pager->evict_deferred = true;
		} else {
			*refused = true; /* still LEAVING */
		}
	}
	atomic_fetch_add(&pager->staged, slot + count * region->unit - area->used);
	area->used = slot + count * region->unit;
	return out;
}

static uint64_t run_of_leaving(
        struct umm_region *region, const struct picked *batch, uint32_t n, uint64_t most)
{
	uint64_t count = 0;
	while (count < n && count < most && batch[count].region == region &&
	        batch[count].unit == batch[0].unit + count &&
	        (!batch[0].address || batch[count].address == batch[0].address + count * region->unit) &&
	        unit_state(region, batch[count].unit) == UNIT_LEAVING)
		count++;
	return count;
}

static uint64_t move_batch(struct umm_uf *uf, struct picked *batch, uint32_t n, struct staging_area *area)
{
	struct umm_pager *pager = uf->pager;
	uint64_t went = 0;
	unsigned calls = 0;
	pthread_mutex_lock(&uf->lock);
	for (uint32_t i = 0; i < n;) {
		struct umm_region *region = batch[i].region;
		uint64_t most = MOVE_MAX * pager->page / region->unit;
		uint64_t count = run_of_leaving(region, batch + i, n - i, most ? most : 1);
		if (!count) {
			i++; /* somebody came first */
			continue;
		}
		bool refused;
		went += move_run(batch + i, count, area, &refused);
		if (refused) {
			pthread_mutex_unlock(&uf->lock);
			went += copy_out(batch + i, count);
			pthread_mutex_lock(&uf->lock);
			calls = 0;
		}
		i += (uint32_t)count;
		if (++calls == CALLS_MAX) {
			/* Demand faults go first. */
			pthread_mutex_unlock(&uf->lock);
			calls = 0;
			pthread_mutex_lock(&uf->lock);
		}
	}
	/* Whatever a short run left behind. */
	for (uint32_t i = 0; i < n; i++)
		back_in_place(batch[i].region, batch[i].unit);
	pthread_mutex_unlock(&uf->lock);
	return went;
}

static uint64_t take_out(struct umm_uf *uf, struct picked *batch, uint32_t n)
{
	struct umm_pager *pager = uf->pager;
	struct staging *staging = &pager->staging;
	uint64_t went = 0;
	uint32_t movable = 0;
	/* What cannot be moved at all goes by copying; the rest closes up. */
	for (uint32_t i = 0; i < n;) {
		struct umm_region *region = batch[i].region;
		uint32_t count = 1;
		while (i + count < n && batch[i + count].region == region &&
		        batch[i + count].unit == batch[i].unit + count)
			count++;
		if (!pager->use_move || region->hugetlb || region->unit > staging->area_bytes) {
			went += copy_out(batch + i, count);
		} else {
			for (uint32_t k = 0; k < count; k++)
				batch[movable++] = batch[i + k];
		}
		i += count;
	}
	if (!movable)
		return went;
	struct staging_area *area = &staging->areas[staging->next];
	uint64_t refused = staging_finalise(pager, area);
	staging->next = (staging->next + 1) % staging->n_areas;
	uint64_t memory = (uintptr_t)staging->memory + area->offset;
	pthread_mutex_lock(&uf->lock);
	int err = umm_uffd_register(uf->fd, memory, staging->area_bytes, UMM_UFFD_MODE_WP, NULL);
	if (!err)
		area->uf = uf;
	for (uint32_t i = 0; i < movable && err; i++)
		back_in_place(batch[i].region, batch[i].unit);
	pthread_mutex_unlock(&uf->lock);
	if (!err)
		went += move_batch(uf, batch, movable, area);
	/* What only went out and came back is no progress. */
	return went > refused ? went - refused : 0;
}

uint64_t evict_batch(struct umm_uf *uf, struct picked *batch, uint32_t n)
{
	struct announcements announcements;
	n = announce_begin(&announcements, uf, batch, n);
	uint64_t went = n ? take_out(uf, batch, n) : 0;
	announce_end(&announcements);
	return went;
}

static int compare_picked(const void *a, const void *b)
{
	const struct picked *x = a, *y = b;
	if (x->region != y->region)
		return x->region < y->region ? -1 : 1;
	return x->unit < y->unit ? -1 : x->unit > y->unit;
}

static uint32_t pick(struct umm_uf *uf, struct picked *batch, uint64_t bytes)
{
	uint32_t n = 0;
	uint64_t picked = 0;
	struct picked one;
	pthread_mutex_lock(&uf->lock);
	while (n < BATCH_MAX && picked < bytes && fifo_pop(uf, &one.region, &one.unit)) {
		if (n && picked + one.region->unit > bytes) {
			/* Too large for the rest of this batch: it is first in the next one. */
			uf->fifo.head--;
			break;
		}
		unit_set(one.region, one.unit, UNIT_LEAVING, 0);
		picked += one.region->unit;
		batch[n++] = one;
	}
	pthread_mutex_unlock(&uf->lock);
	qsort(batch, n, sizeof(*batch), compare_picked);
	return n;
}

static void rebuild_queues(struct umm_pager *pager)
{
	pthread_mutex_lock(&pager->regions_lock);
	for (uint32_t i = 0; i < pager->n_ufs; i++) {
		struct umm_uf *uf = &pager->ufs[i];
		pthread_mutex_lock(&uf->lock);
		if (uf->fifo.lost) {
			uf->fifo.lost = false;
			uf->fifo.head = uf->fifo.tail = 0;
			for (struct umm_region *region = pager->regions; region; region = region->next)
				if (region->uf == uf)
					fifo_add_region(region);
		}
		pthread_mutex_unlock(&uf->lock);
	}
	pthread_mutex_unlock(&pager->regions_lock);
}

static bool any_lost(struct umm_pager *pager)
{
	bool lost = false;
	for (uint32_t i = 0; i < pager->n_ufs; i++) {
		pthread_mutex_lock(&pager->ufs[i].lock);
		lost |= pager->ufs[i].fifo.lost;
		pthread_mutex_unlock(&pager->ufs[i].lock);
	}
	return lost;
}

/* Units that left their regions. *deferred: none, as an event of the user's is under way. */
static uint64_t evict_once(struct umm_pager *pager, struct picked *batch, uint64_t excess, bool waits,
        bool *deferred, bool *refused, bool *again)
{
	uint64_t went = 0;
	pthread_mutex_lock(&pager->evict_lock);
	pager->evict_deferred = pager->evict_refused = pager->evict_again = false;
	pager->evict_waits = waits;
	for (uint32_t i = 0; i < pager->n_ufs; i++) {
		uint64_t area = pager->staging.area_bytes;
		uint32_t n = pick(&pager->ufs[i], batch, excess < area ? excess : area);
		if (n)
			went += evict_batch(&pager->ufs[i], batch, n);
	}
	*deferred = !went && pager->evict_deferred;
	*refused = pager->evict_refused;
	*again = !went && pager->evict_again;
	pthread_mutex_unlock(&pager->evict_lock);
	return went;
}

/* As the kernel's reclaim of last resort: first what nobody has to be waited for, and only when nothing else
 * can go, with waiting. */
static uint64_t evict_round(
        struct umm_pager *pager, struct picked *batch, uint64_t excess, bool *deferred, bool *refused)
{
	bool again;
	uint64_t went = evict_once(pager, batch, excess, false, deferred, refused, &again);
	if (!went && again)
		went = evict_once(pager, batch, excess, true, deferred, refused, &again);
	*deferred |= !went && again; /* a fork is under way */
	return went;
}

static uint64_t low_mark(struct umm_pager *pager)
{
	uint64_t target = evict_target(pager);
	return target - target / 32;
}

static void *evictor_main(void *argument)
{
	struct umm_pager *pager = argument;
	struct picked batch[BATCH_MAX];
	long back_off = back_off_ns;
	prctl(PR_SET_NAME, "umm-evict");
	pthread_mutex_lock(&pager->evict_wake_lock);
	while (!pager->evict_stop) {
		if (!atomic_load(&pager->evict_wanted)) {
			pthread_cond_wait(&pager->evict_wake, &pager->evict_wake_lock);
			continue;
		}
		pthread_mutex_unlock(&pager->evict_wake_lock);
		atomic_exchange(&pager->evict_wanted, false); /* sees what its wakers did before */
		uint64_t fruitless = 0;
		bool refused = false;
		while (atomic_load(&pager->budget)) {
			uint64_t resident = atomic_load(&pager->resident), low = low_mark(pager);
			if (resident <= low)
				break;
			if (any_lost(pager))
				rebuild_queues(pager);
			bool deferred;
			if (evict_round(pager, batch, resident - low, &deferred, &refused)) {
				fruitless = 0;
			} else if (deferred) {
				nanosleep(&(struct timespec){.tv_nsec = event_ns}, NULL);
			} else if (++fruitless == 3) {
				break;
			}
		}
		/* Units that are written all the time come back as they are copied: that is no reason to let
		 * more in. A store that refuses is: putting faults off would not help it. */
		atomic_store(&pager->evict_stuck, fruitless && refused);
		if (fruitless) {
			/* Not a reason to spin: a store that goes on refusing is asked less and less often.
			 */
			nanosleep(&(struct timespec){.tv_nsec = refused ? back_off : event_ns}, NULL);
			back_off = refused && back_off < back_off_most_ns ? 2 * back_off : back_off;
		} else {
			back_off = back_off_ns;
		}
		pthread_mutex_lock(&pager->evict_wake_lock);
	}
	pthread_mutex_unlock(&pager->evict_wake_lock);
	return NULL;
}

int evictor_start(struct umm_pager *pager)
{
	pager->evict_stop = false;
	int err = pthread_create(&pager->evictor, NULL, evictor_main, pager);
	pager->evictor_runs = !err;
	return -err;
}

void evictor_join(struct umm_pager *pager)
{
	pthread_mutex_lock(&pager->evict_wake_lock);
	pager->evict_stop = true;
	pthread_cond_signal(&pager->evict_wake);
	pthread_mutex_unlock(&pager->evict_wake_lock);
	if (pager->evictor_runs)
		pthread_join(pager->evictor, NULL);
}
