/* Where regions are mapped, also after munmap and mremap by the user. Included by internal.h, which has the
 * structures. */
#ifndef UMM_PAGER_EXTENTS_H
#define UMM_PAGER_EXTENTS_H

#include "pager/internal.h"

/* -- extents.c; under the uf's lock --------------------------------------------------------- */

int extents_init(struct umm_uf *uf);
void extents_deinit(struct umm_uf *uf);
struct extent *extents_find(struct umm_uf *uf, uint64_t address);
/* First extent that ends after `address`; may be past the last. */
struct extent *extents_from(struct umm_uf *uf, uint64_t address);
int extents_insert(struct umm_uf *uf, const struct extent *extent);
/* Takes [start, end) out; calls `taken` for every piece. -ENOSPC when a split finds no room. */
int extents_remove(struct umm_uf *uf, uint64_t start, uint64_t end,
        void (*taken)(void *context, const struct extent *piece), void *context);
/* Addresses that are about to be mapped anew: what stands there is unmapped already, its event is unread. */
void extents_bury(struct umm_uf *uf, uint64_t start, uint64_t end);
/* mremap took what was at [start, end) elsewhere. */
void extents_vacated(struct umm_uf *uf, uint64_t start, uint64_t end);
/* Parts of [start, end) that are no ghost go to `out` (at most MAX_GHOSTS + 1); the ghosts in it are laid to
 * rest, and `found` is told of each. */
uint32_t ghosts_consume(struct umm_uf *uf, uint64_t start, uint64_t end, struct range *out,
        void (*found)(void *context, const struct extent *piece), void *context);
void ghosts_forget(struct umm_uf *uf, const struct umm_region *region);

#endif
