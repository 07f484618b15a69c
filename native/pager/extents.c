/* Which region is mapped where: a sorted array, so that a fault finds its region in logarithmic time
 * without following pointers, and an event can split an entry without malloc. */
#include "pager/internal.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

/* Virtual only: pages of the array become real as it grows. */
static const uint64_t max_extents = 1 << 20;

int extents_init(struct umm_uf *uf)
{
	uf->extents = map_anonymous(max_extents * sizeof(struct extent), uf->pager->page);
	if (!uf->extents)
		return -ENOMEM;
	uf->capacity = max_extents;
	uf->n_extents = 0;
	return 0;
}

void extents_deinit(struct umm_uf *uf)
{
	if (uf->extents)
		munmap(uf->extents, max_extents * sizeof(struct extent));
	uf->extents = NULL;
}

struct extent *extents_from(struct umm_uf *uf, uint64_t address)
{
	uint64_t low = 0, high = uf->n_extents;
	while (low < high) {
		uint64_t middle = (low + high) / 2;
		if (uf->extents[middle].end <= address)
			low = middle + 1;
		else
			high = middle;
	}
	return &uf->extents[low];
}

struct extent *extents_find(struct umm_uf *uf, uint64_t address)
{
	struct extent *x = extents_from(uf, address);
	if (x == uf->extents + uf->n_extents || x->start > address)
		return NULL;
	return x;
}

static void insert_at(struct umm_uf *uf, struct extent *at, const struct extent *extent)
{
	struct extent copy = *extent;
	memmove(at + 1, at, (size_t)((uint8_t *)(uf->extents + uf->n_extents) - (uint8_t *)at));
	*at = copy;
	uf->n_extents++;
	copy.region->n_extents++;
}

static void erase_at(struct umm_uf *uf, struct extent *at)
{
	at->region->n_extents--;
	memmove(at, at + 1, (size_t)((uint8_t *)(uf->extents + uf->n_extents) - (uint8_t *)(at + 1)));
	uf->n_extents--;
}

int extents_insert(struct umm_uf *uf, const struct extent *extent)
{
	if (uf->n_extents == uf->capacity)
		return -ENOSPC;
	insert_at(uf, extents_from(uf, extent->start), extent);
	return 0;
}

int extents_remove(struct umm_uf *uf, uint64_t start, uint64_t end,
        void (*taken)(void *context, const struct extent *piece), void *context)
{
	struct extent *x = extents_from(uf, start);
	while (x < uf->extents + uf->n_extents && x->start < end) {
		struct extent piece = *x;
		if (piece.start < start) {
			piece.offset += start - piece.start;
			piece.start = start;
		}
		if (piece.end > end)
			piece.end = end;
		bool left = x->start<piece.start, right = x->end> piece.end;
		if (left && right) {
			if (uf->n_extents == uf->capacity)
				return -ENOSPC;
			struct extent tail = *x;
			tail.offset += piece.end - tail.start;
			tail.start = piece.end;
			x->end = piece.start;
			insert_at(uf, ++x, &tail);
		} else if (left) {
			x->end = piece.start;
			x++;
		} else if (right) {
			x->offset += piece.end - x->start;
			x->start = piece.end;
		} else {
			erase_at(uf, x);
		}
		if (taken)
			taken(context, &piece);
	}
	return 0;
}

static void add_ghost(struct umm_uf *uf, const struct extent *ghost)
{
	/* A full table forgets the oldest ghost. Its event would have to stay unread while 256 others
	 * came and went, and then be taken for one of the new mapping. */
	if (uf->n_ghosts == MAX_GHOSTS) {
		struct extent oldest = uf->ghosts[0];
		memmove(uf->ghosts, uf->ghosts + 1, (MAX_GHOSTS - 1) * sizeof(uf->ghosts[0]));
		uf->n_ghosts--;
		forget_piece(uf, &oldest);
	}
	uf->ghosts[uf->n_ghosts++] = *ghost;
}

static void bury_piece(void *context, const struct extent *piece)
{
	add_ghost(context, piece);
}

void extents_bury(struct umm_uf *uf, uint64_t start, uint64_t end)
{
	extents_remove(uf, start, end, bury_piece, uf);
	for (uint32_t i = 0; i < MAX_VACATED; i++) {
		struct range *old = &uf->vacated[i];
		uint64_t low = old->start > start ? old->start : start,
		         high = old->end < end ? old->end : end;
		if (low >= high)
			continue;
		/* Moved away by mremap, and free for us already: the UNMAP of it is still to be read. */
		add_ghost(uf, &(struct extent){.start = low, .end = high});
		*old = (struct range){0, 0};
	}
}

void extents_vacated(struct umm_uf *uf, uint64_t start, uint64_t end)
{
	uf->vacated[uf->next_vacated++ % MAX_VACATED] = (struct range){start, end};
}

void ghosts_forget(struct umm_uf *uf, const struct umm_region *region)
{
	for (uint32_t g = 0; g < uf->n_ghosts; g++)
		if (uf->ghosts[g].region == region)
			uf->ghosts[g].region = NULL;
}

/* `piece` cut to [low, high). */
static struct extent cut(const struct extent *piece, uint64_t low, uint64_t high)
{
	return (struct extent){low, high, piece->region, piece->offset + (low - piece->start)};
}

static uint32_t without(struct range *ranges, uint32_t n, uint64_t low, uint64_t high)
{
	for (uint32_t i = n; i-- > 0;) {
		struct range r = ranges[i];
		if (low >= r.end || high <= r.start)
			continue;
		ranges[i].end = low > r.start ? low : r.start;
		if (high < r.end)
			ranges[n++] = (struct range){high, r.end};
	}
	return n;
}

uint32_t ghosts_consume(struct umm_uf *uf, uint64_t start, uint64_t end, struct range *out,
        void (*found)(void *context, const struct extent *piece), void *context)
{
	uint32_t n = 1;
	out[0] = (struct range){start, end};
	for (uint32_t i = 0; i < MAX_VACATED; i++)
		if (uf->vacated[i].start < end && start < uf->vacated[i].end)
			uf->vacated[i] = (struct range){0, 0};
	for (uint32_t g = 0; g < uf->n_ghosts;) {
		struct extent ghost = uf->ghosts[g];
		uint64_t low = ghost.start > start ? ghost.start : start;
		uint64_t high = ghost.end < end ? ghost.end : end;
		if (low >= high) {
			g++;
			continue;
		}
		n = without(out, n, low, high);
		/* What sticks out of the event stays a ghost. */
		memmove(uf->ghosts + g, uf->ghosts + g + 1, (uf->n_ghosts - g - 1) * sizeof(uf->ghosts[0]));
		uf->n_ghosts--;
		if (ghost.start < low)
			uf->ghosts[uf->n_ghosts++] = cut(&ghost, ghost.start, low);
		if (ghost.end > high && uf->n_ghosts < MAX_GHOSTS)
			uf->ghosts[uf->n_ghosts++] = cut(&ghost, high, ghost.end);
		struct extent piece = cut(&ghost, low, high);
		found(context, &piece);
	}
	uint32_t kept = 0;
	for (uint32_t i = 0; i < n; i++)
		if (out[i].start < out[i].end)
			out[kept++] = out[i];
	return kept;
}
