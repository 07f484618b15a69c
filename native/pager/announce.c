/* What the pager does to memory, and whom it tells. */
#include "pager/announce.h"

#include <errno.h>

/* Where each unit is mapped; the uf's lock is not held between this and the move, which looks again. */
static void find_addresses(struct umm_uf *uf, struct picked *batch, uint32_t n)
{
	pthread_mutex_lock(&uf->lock);
	for (uint32_t i = 0; i < n; i++)
		batch[i].address = unit_address(batch[i].region, batch[i].unit);
	pthread_mutex_unlock(&uf->lock);
}

static uint32_t run_of_neighbours(const struct picked *batch, uint32_t n)
{
	uint32_t count = 1;
	while (count < n && batch[count].region == batch[0].region &&
	        batch[count].address == batch[0].address + count * batch[0].region->unit)
		count++;
	return count;
}

static void keep(struct umm_uf *uf, const struct picked *batch, uint32_t n)
{
	pthread_mutex_lock(&uf->lock);
	for (uint32_t i = 0; i < n; i++)
		back_in_place(batch[i].region, batch[i].unit);
	pthread_mutex_unlock(&uf->lock);
}

uint32_t announce_begin(
        struct announcements *announcements, struct umm_uf *uf, struct picked *batch, uint32_t n)
{
	struct umm_pager *pager = uf->pager;
	announcements->pager = pager;
	announcements->n = 0;
	if (!umm_notify_enter(umm_space_self(), &announcements->entry)) {
		for (uint32_t i = 0; i < n; i++)
			batch[i].address = 0;
		return n;
	}
	uint32_t flags = UMM_NOTIFY_VOLUNTARY | (pager->evict_waits ? UMM_NOTIFY_BLOCKABLE : 0), left = 0;
	find_addresses(uf, batch, n);
	for (uint32_t i = 0, count; i < n; i += count) {
		uint64_t address = batch[i].address;
		count = address ? run_of_neighbours(batch + i, n - i) : 1;
		struct announcement *one = &pager->announced[announcements->n];
		int err = address ? umm_notify_start(&one->range, umm_space_self(), address,
		                            address + count * batch[i].region->unit, UMM_SOURCE_PAGER,
		                            UMM_REASON_EVICT, flags)
		                  : -ENOENT; /* in pieces: it does not go as a whole */
		if (err) {
			pager->evict_again |= err == -EAGAIN;
			pager->evict_refused |= err == -EBUSY;
			keep(uf, batch + i, count);
			continue;
		}
		announcements->n++;
		for (uint32_t k = 0; k < count; k++)
			batch[left++] = batch[i + k];
	}
	return left;
}

void announce_end(struct announcements *announcements)
{
	for (uint32_t i = 0; i < announcements->n; i++)
		umm_notify_end(&announcements->pager->announced[i].range, 0);
	umm_notify_leave(umm_space_self(), &announcements->entry);
}

void announce_closing(struct closing *closing, struct umm_region *region)
{
	struct umm_uf *uf = region->uf;
	struct range pieces[CLOSING_PIECES];
	closing->n = 0;
	pthread_mutex_lock(&uf->lock);
	for (uint64_t i = 0; i < uf->n_extents; i++) {
		const struct extent *x = &uf->extents[i];
		if (x->region != region)
			continue;
		/* Of a region in very many pieces the last announcement covers what lies between as well. */
		if (closing->n < CLOSING_PIECES)
			pieces[closing->n++] = (struct range){x->start, x->end};
		else
			pieces[CLOSING_PIECES - 1].end = x->end;
	}
	pthread_mutex_unlock(&uf->lock);
	for (uint32_t i = 0; i < closing->n; i++)
		umm_notify_start(&closing->ranges[i], umm_space_self(), pieces[i].start, pieces[i].end,
		        UMM_SOURCE_PAGER, UMM_REASON_UNMAP, UMM_NOTIFY_BLOCKABLE);
}

void announce_closed(struct closing *closing, int error)
{
	for (uint32_t i = closing->n; i-- > 0;)
		umm_notify_end(&closing->ranges[i], error);
}

void announce_event(uint64_t start, uint64_t end, uint64_t to, int reason, int promise)
{
	umm_notify_post(umm_space_self(), start, end, to, UMM_SOURCE_KERNEL, reason, promise);
}

void announce_poison(struct umm_region *region, uint64_t unit)
{
	uint64_t address = unit_address(region, unit);
	if (address)
		umm_notify_page(umm_space_self(), address, address + region->unit, UMM_SOURCE_PAGER,
		        UMM_REASON_POISON, 0);
}
