/* The order in which units came in, oldest first: what the budget evicts.
 *
 * An entry names region, unit and a stamp that the unit's word repeats while it is PRESENT by this very
 * entry; a unit that left meanwhile has another word, and its entry is passed over. */
#include "pager/internal.h"

#include <errno.h>
#include <sys/mman.h>

enum { STAMP_BITS = 12, UNIT_BITS = 32 };

int fifo_init(struct fifo *fifo, uint64_t entries)
{
	uint64_t capacity = 4096; /* no page size: entries */
	while (capacity < entries)
		capacity *= 2;
	void *p = mmap(NULL, capacity * sizeof(uint64_t), PROT_READ | PROT_WRITE,
	        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (p == MAP_FAILED)
		return -ENOMEM;
	*fifo = (struct fifo){.entries = p, .capacity = capacity};
	return 0;
}

void fifo_deinit(struct fifo *fifo)
{
	if (fifo->entries)
		munmap(fifo->entries, fifo->capacity * sizeof(uint64_t));
	*fifo = (struct fifo){0};
}

void fifo_push(struct umm_region *region, uint64_t unit)
{
	struct fifo *fifo = &region->uf->fifo;
	if (!fifo->entries)
		return;
	if (fifo->tail - fifo->head == fifo->capacity) {
		fifo->lost = true;
		return;
	}
	uint64_t stamp = (fifo->tail + 1) & UNIT_STAMP_MASK;
	uint32_t word = region->units[unit];
	region->units[unit] =
	        (word & ((1u << UNIT_PAYLOAD_SHIFT) - 1)) | (uint32_t)(stamp << UNIT_PAYLOAD_SHIFT);
	fifo->entries[fifo->tail++ & (fifo->capacity - 1)] =
	        (uint64_t)region->id << (STAMP_BITS + UNIT_BITS) | unit << STAMP_BITS | stamp;
}

bool fifo_pop(struct umm_uf *uf, struct umm_region **region, uint64_t *unit)
{
	struct fifo *fifo = &uf->fifo;
	while (fifo->head != fifo->tail) {
		uint64_t entry = fifo->entries[fifo->head++ & (fifo->capacity - 1)];
		uint32_t id = (uint32_t)(entry >> (STAMP_BITS + UNIT_BITS));
		struct umm_region *r = id < uf->pager->by_id_capacity ? uf->pager->by_id[id] : NULL;
		uint64_t u = (entry >> STAMP_BITS) & ((1ull << UNIT_BITS) - 1);
		if (!r || r->uf != uf || u >= r->n_units || r->closing)
			continue;
		if (unit_state(r, u) != UNIT_PRESENT || unit_payload(r, u) != (entry & UNIT_STAMP_MASK))
			continue;
		*region = r;
		*unit = u;
		return true;
	}
	return false;
}

void fifo_add_region(struct umm_region *region)
{
	for (uint64_t unit = 0; unit < region->n_units; unit++)
		if (unit_state(region, unit) == UNIT_PRESENT)
			fifo_push(region, unit);
}
