/* What the files of eviction share: picking units, the staging areas, copying out, the spill. Included by
 * internal.h, which has the locks and the structures. */
#ifndef UMM_PAGER_EVICTION_H
#define UMM_PAGER_EVICTION_H

#include "pager/internal.h"

/* -- evict.c, staging.c, copy_out.c --------------------------------------------------------- */

int evictor_start(struct umm_pager *pager);
void evictor_join(struct umm_pager *pager);
void evictor_wake(struct umm_pager *pager);
int staging_init(struct umm_pager *pager);
void staging_deinit(struct umm_pager *pager);
/* For an eviction on request in a pager without a budget. evict_lock held. */
int staging_borrow(struct umm_pager *pager, uint64_t unit);
/* Write or drop what the area holds and empty it. evict_lock held. Units that their store refused. */
uint64_t staging_finalise(struct umm_pager *pager, struct staging_area *area);
void staging_finalise_all(struct umm_pager *pager);
/* Give up the region's slots. evict_lock held. */
void staging_forget(struct umm_region *region);
/* The slot's memory. */
const uint8_t *staging_slot(struct umm_pager *pager, uint32_t payload);
/* One unit that a batch of eviction picked: LEAVING, unless somebody came first. */
struct picked {
	struct umm_region *region;
	uint64_t unit;
	uint64_t address; /* as which it was announced (announce.h); 0: nobody wants to know */
};
/* Evict a sorted batch of one userfaultfd's units. evict_lock held. Units that went. */
uint64_t evict_batch(struct umm_uf *uf, struct picked *batch, uint32_t n);
/* Without MOVE, or for pages that it refuses (shared after a fork, pinned): LEAVING units are
 * write-protected, copied and zapped. evict_lock held. Units that went. */
uint64_t copy_out(const struct picked *batch, uint64_t count);
/* Still LEAVING: it stays. The uf's lock held. */
void back_in_place(struct umm_region *region, uint64_t unit);
/* MADV_DONTNEED of ours; the units are ZAPPING (or POISONED). evict_lock held, uf's lock not. -EAGAIN: they
 * were moved away before. */
int zap_range(struct umm_uf *uf, uint64_t address, uint64_t len, uint64_t granule);
/* Write a unit's bytes where modified units go. evict_lock held, uf's lock not. *layer: 0xff for the store.
 */
int write_out(struct umm_region *region, uint64_t unit, const void *data, uint8_t *layer);
enum { LAYER_STORE = 0xff };
/* Records what write_out did. evict_lock and the uf's lock held. */
void note_written(struct umm_region *region, uint64_t unit, uint8_t layer, uint64_t hash);
/* What regions may hold: staging has the rest of the budget. Whoever brings units in stays below it. */
uint64_t resident_limit(struct umm_pager *pager);
/* Where eviction starts: some faults earlier, so that they need not wait for it. */
uint64_t evict_target(struct umm_pager *pager);

/* -- spill.c; evict_lock held --------------------------------------------------------------- */

int spill_write(struct umm_region *region, uint64_t unit, const void *data, uint8_t *layer);
/* From any thread that has claimed the unit. */
int spill_read(struct umm_region *region, uint64_t unit, uint8_t layer, void *buffer);
void spill_note(struct umm_region *region, uint64_t unit, uint8_t layer); /* uf's lock held as well */
void spill_drop(struct umm_region *region, uint64_t unit);                /* uf's lock held as well */
void spill_forget(struct umm_region *region);
void spill_freeze(struct umm_pager *pager);
void spill_close(struct umm_pager *pager);

#endif
