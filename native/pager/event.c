/* Following what the user's own madvise, munmap and mremap do to registered memory. */
#include "pager/internal.h"

/* Takes the part of a REMOVE event that our own MADV_DONTNEED announced, granule by granule: of two
 * equal announcements one is ours, in whichever order they are read. What is left is the user's. */
static bool is_own_zap(struct zap *zap, uint64_t granule_start)
{
	if (!zap->active || granule_start < zap->start || granule_start >= zap->end)
		return false;
	uint64_t i = (granule_start - zap->start) / zap->granule;
	if (zap->seen[i / 64] >> (i % 64) & 1)
		return false;
	zap->seen[i / 64] |= 1ull << (i % 64);
	return true;
}

static void remove_unit(struct umm_region *region, uint64_t unit)
{
	switch (unit_state(region, unit)) {
	case UNIT_FETCHING:
	case UNIT_ZAPPING:
		unit_mark(region, unit, UNIT_WAS_REMOVED);
		return;
	case UNIT_GONE:
		return;
	default:
		/* LEAVING, COPYING, STAGED: the evictor finds its claim gone and drops its copy. */
		unit_unmark(region, unit, UNIT_SPILLED | UNIT_PREFETCHED);
		unit_set(region, unit, UNIT_REMOVED, 0);
		return;
	}
}

static void remove_range(struct umm_region *region, uint64_t start, uint64_t end)
{
	uint64_t page = region->pager->page;
	uint64_t first = start / region->unit, last = (end - 1) / region->unit;
	for (uint64_t unit = first; unit <= last; unit++) {
		uint64_t unit_start = unit * region->unit, unit_end = unit_start + region->unit;
		if (start <= unit_start && end >= unit_end) {
			remove_unit(region, unit);
			continue;
		}
		/* A part of the unit. (A hugetlb unit cannot be removed in part.) */
		if (!region->zeroed || unit_state(region, unit) == UNIT_REMOVED)
			continue;
		uint64_t low = start > unit_start ? start : unit_start,
		         high = end < unit_end ? end : unit_end;
		for (uint64_t number = low / page; number < (high + page - 1) / page; number++)
			region->zeroed[number / 64] |= 1ull << (number % 64);
		/* What was moved out has the removed bytes in it: bring it back by its stored copy is not
		 * possible, so the staged bytes stay, and the finaliser puts zeros over the removed pages. */
	}
}

/* What the user takes away of an extent. */
static void remove_piece(const struct extent *x, uint64_t low, uint64_t high)
{
	announce_event(low, high, 0, UMM_REASON_REMOVE, UMM_PROMISE_BEFORE);
	remove_range(x->region, low - x->start + x->offset, high - x->start + x->offset);
}

void apply_remove(struct umm_uf *uf, uint64_t start, uint64_t end)
{
	for (struct extent *x = extents_from(uf, start); x < uf->extents + uf->n_extents && x->start < end;
	        x++) {
		uint64_t low = start > x->start ? start : x->start, high = end < x->end ? end : x->end;
		uint64_t granule = x->region->hugetlb ? x->region->hugetlb : uf->pager->page;
		if (!uf->zap.active || high <= uf->zap.start || low >= uf->zap.end) {
			remove_piece(x, low, high);
			continue;
		}
		/* Runs of what is not ours. */
		uint64_t run = low;
		for (uint64_t at = low; at < high; at += granule) {
			if (!is_own_zap(&uf->zap, at))
				continue;
			if (run < at)
				remove_piece(x, run, at);
			run = at + granule;
		}
		if (run < high)
			remove_piece(x, run, high);
	}
}

void forget_piece(void *context, const struct extent *piece)
{
	(void)context;
	struct umm_region *region = piece->region;
	if (!region)
		return; /* a ghost whose region was closed */
	uint64_t first = piece->offset / region->unit;
	uint64_t last = (piece->offset + (piece->end - piece->start) - 1) / region->unit;
	for (uint64_t unit = first; unit <= last && unit < region->n_units; unit++) {
		/* A unit of which a part is still mapped lives on. A claim that is held ends as it finds the
		 * unit then (claim_lost). */
		if (unit_is_mapped(region, unit) || unit_state(region, unit) == UNIT_FETCHING ||
		        unit_state(region, unit) == UNIT_ZAPPING)
			continue;
		unit_set(region, unit, UNIT_GONE, 0);
	}
}

static void apply_unmap(struct umm_uf *uf, uint64_t start, uint64_t end)
{
	if (uf->own_unmap.end && start == uf->own_unmap.start && end == uf->own_unmap.end) {
		uf->own_unmap = (struct range){0, 0};
		return;
	}
	announce_event(start, end, 0, UMM_REASON_UNMAP, UMM_PROMISE_AFTER);
	struct range live[MAX_GHOSTS + 1];
	uint32_t n = ghosts_consume(uf, start, end, live, forget_piece, uf);
	for (uint32_t i = 0; i < n; i++)
		extents_remove(uf, live[i].start, live[i].end, forget_piece, uf);
}

enum { MOVED_AT_A_TIME = 64 };

struct moved {
	struct umm_uf *uf;
	uint64_t from, to;
	/* extents_remove is walking the array, so a piece cannot be inserted from its callback: kept aside.
	 */
	struct extent pieces[MOVED_AT_A_TIME];
	uint32_t n;
	struct range ghosts[MAX_GHOSTS];
	uint32_t n_ghosts;
};

static void keep_piece(void *context, const struct extent *piece)
{
	struct moved *moved = context;
	if (moved->n < MOVED_AT_A_TIME)
		moved->pieces[moved->n++] = *piece;
}

static void insert_moved(void *context, const struct extent *piece)
{
	struct moved *moved = context;
	struct extent there = *piece;
	there.start = piece->start - moved->from + moved->to;
	there.end = there.start + (piece->end - piece->start);
	extents_insert(moved->uf, &there);
	if (there.offset == 0)
		__atomic_store_n(&there.region->base, there.start, __ATOMIC_RELAXED);
}

static void ghost_moved(void *context, const struct extent *piece)
{
	struct moved *moved = context;
	if (moved->n_ghosts < MAX_GHOSTS)
		moved->ghosts[moved->n_ghosts++] = (struct range){piece->start, piece->end};
	if (piece->region)
		insert_moved(moved, piece);
}

static void move_range(struct moved *moved, uint64_t start, uint64_t end)
{
	struct umm_uf *uf = moved->uf;
	/* Some extents at a time: a range that was cut up by earlier calls may hold many. */
	while (start < end) {
		uint64_t stop = end, pieces = 0;
		for (struct extent *x = extents_from(uf, start);
		        x < uf->extents + uf->n_extents && x->start < end; x++)
			if (++pieces == MOVED_AT_A_TIME) {
				stop = x->end < end ? x->end : end;
				break;
			}
		moved->n = 0;
		extents_remove(uf, start, stop, keep_piece, moved);
		for (uint32_t i = 0; i < moved->n; i++)
			insert_moved(moved, &moved->pieces[i]);
		start = stop;
	}
}

static void apply_remap(struct umm_uf *uf, uint64_t from, uint64_t to, uint64_t len)
{
	announce_event(from, from + len, to, UMM_REASON_MOVE, UMM_PROMISE_AFTER);
	struct moved moved = {.uf = uf, .from = from, .to = to};
	struct range live[MAX_GHOSTS + 1];
	/* Where somebody was mapped anew in the place that was left, the ghost is what moved. It leaves a
	 * ghost: mremap() tells of the old place twice, as moved from and then as unmapped. (Not with
	 * MREMAP_DONTUNMAP, but then nobody was mapped there.) */
	uint32_t n = ghosts_consume(uf, from, from + len, live, ghost_moved, &moved);
	for (uint32_t i = 0; i < moved.n_ghosts && uf->n_ghosts < MAX_GHOSTS; i++)
		uf->ghosts[uf->n_ghosts++] =
		        (struct extent){.start = moved.ghosts[i].start, .end = moved.ghosts[i].end};
	for (uint32_t i = 0; i < n; i++)
		move_range(&moved, live[i].start, live[i].end);
}

void apply_event(struct umm_uf *uf, const struct umm_uffd_msg *msg)
{
	switch (msg->event) {
	case UMM_UFFD_EVENT_REMOVE:
		uf->counters.events_remove++;
		apply_remove(uf, msg->arg0, msg->arg1);
		break;
	case UMM_UFFD_EVENT_UNMAP:
		uf->counters.events_unmap++;
		apply_unmap(uf, msg->arg0, msg->arg1);
		break;
	case UMM_UFFD_EVENT_REMAP:
		uf->counters.events_remap++;
		apply_remap(uf, msg->arg0, msg->arg1, msg->arg2);
		extents_vacated(uf, msg->arg0, msg->arg0 + msg->arg2);
		break;
	default:
		break;
	}
}
