/* Telling the subscribers of this address space (notifier/notifier.h) what the pager does to memory. Included
 * by internal.h, which has the structures. */
#ifndef UMM_PAGER_ANNOUNCE_H
#define UMM_PAGER_ANNOUNCE_H

#include "notifier/notifier.h"
#include "pager/eviction.h"
#include "pager/internal.h"

enum { ANNOUNCED_MAX = 512 };

/* Neighbouring units that leave together. */
struct announcement {
	struct umm_notify_range range;
};

struct announcements {
	struct umm_pager *pager;
	struct umm_notify_entry entry;
	uint32_t n;
};

/* Before a batch of LEAVING units goes: tells every subscriber, notes in the batch as which address each unit
 * was announced, and puts those back in place that are not to go now (evict_again, evict_refused say why).
 * Returns how many are left in the batch. evict_lock held. */
uint32_t announce_begin(
        struct announcements *announcements, struct umm_uf *uf, struct picked *batch, uint32_t n);
void announce_end(struct announcements *announcements);

/* A region that is about to be unmapped, wherever it is mapped. No lock held. */
enum { CLOSING_PIECES = 16 };
struct closing {
	struct umm_notify_range ranges[CLOSING_PIECES];
	uint32_t n;
};
void announce_closing(struct closing *closing, struct umm_region *region);
void announce_closed(struct closing *closing, int error);

/* The user's own madvise, munmap or mremap, as the kernel tells of it. The uf's lock held. */
void announce_event(uint64_t start, uint64_t end, uint64_t to, int reason, int promise);
/* A unit is lost. The uf's lock held. */
void announce_poison(struct umm_region *region, uint64_t unit);

#endif
