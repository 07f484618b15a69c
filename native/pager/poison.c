/* Poison on kernels without UFFDIO_POISON (before 6.6): a page past the end of an empty file is mapped over
 * the lost unit, and a touch of it is SIGBUS.
 *
 * The range stays in the index of extents, so that a guard finds the region; a fill for a guard is a plain
 * anonymous mapping in its place. Unlike real poison it is not healed by the user's MADV_DONTNEED. */
#include "pager/internal.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int poison_init(struct umm_pager *pager)
{
	if (pager->has_poison)
		return 0;
	pager->empty_fd = memfd_create("umm-poison", MFD_CLOEXEC);
	return pager->empty_fd < 0 ? -errno : 0;
}

static int map_empty(struct umm_region *region, uint64_t address)
{
	void *p = mmap((void *)address, region->unit, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
	        region->pager->empty_fd, 0);
	return p == MAP_FAILED ? -errno : 0;
}

void poison_by_mapping(struct umm_region *region, uint64_t unit)
{
	struct umm_uf *uf = region->uf;
	pthread_mutex_lock(&uf->lock);
	uint64_t address = unit_state(region, unit) == UNIT_POISONED ? unit_address(region, unit) : 0;
	if (address)
		uf->own_unmap = (struct range){address, address + region->unit};
	pthread_mutex_unlock(&uf->lock);
	if (!address)
		return;
	/* Replaces registered memory: a handler reads the event of that. */
	int err = map_empty(region, address);
	pthread_mutex_lock(&uf->lock);
	uf->own_unmap = (struct range){0, 0};
	/* Woken, the threads touch the file; or, if it could not be mapped, come back here. */
	wake_unit(region, unit);
	pthread_mutex_unlock(&uf->lock);
	if (err)
		usleep(1000);
}

bool fill_mapped(struct umm_region *region, uint64_t address, uint8_t fill)
{
	void *p = mmap((void *)address, region->unit, PROT_READ | PROT_WRITE,
	        MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	if (p == MAP_FAILED)
		return false;
	memset(p, fill, region->unit);
	return true;
}

int unfill_mapped(struct umm_region *region, uint64_t address)
{
	return map_empty(region, address);
}
