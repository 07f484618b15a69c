/* Where modified units go that must not reach their store: unlinked temporary files.
 *
 * A forked child reads the same file, so what is in it at a fork is never overwritten: the layer is
 * frozen on both sides, and each goes on with a layer of its own. */
#include "pager/internal.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static int open_unlinked(void)
{
	const char *dirs[] = {getenv("TMPDIR"), "/var/tmp", "/tmp"};
	int err = -ENOENT;
	for (unsigned i = 0; i < sizeof(dirs) / sizeof(dirs[0]); i++) {
		if (!dirs[i])
			continue;
		int fd = open(dirs[i], O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
		if (fd >= 0)
			return fd;
		err = -errno;
		/* File systems without O_TMPFILE. */
		char name[PATH_MAX];
		if (snprintf(name, sizeof(name), "%s/umm-spill-XXXXXX", dirs[i]) >= (int)sizeof(name))
			continue;
		fd = mkostemp(name, O_CLOEXEC);
		if (fd >= 0) {
			unlink(name);
			return fd;
		}
	}
	return err;
}

/* Descriptor 0 stands for "no layer". */
static int open_temporary(void)
{
	int fd = open_unlinked();
	if (fd != 0)
		return fd;
	fd = fcntl(0, F_DUPFD_CLOEXEC, 1);
	int err = fd < 0 ? -errno : fd;
	close(0);
	return err;
}

static int current_layer(struct umm_pager *pager)
{
	int empty = -1;
	for (int i = 0; i < MAX_LAYERS; i++) {
		struct spill_layer *layer = &pager->layers[i];
		if (layer->fd > 0 && !layer->frozen)
			return i;
		if (layer->fd <= 0 && empty < 0)
			empty = i;
	}
	if (empty < 0)
		return -ENOSPC;
	int fd = open_temporary();
	if (fd < 0)
		return fd;
	pager->layers[empty] = (struct spill_layer){.fd = fd};
	return empty;
}

/* Ranges of the sparse files: first fit, so that the offsets of long-lived pagers stay small. */
static void place_region(struct umm_region *region)
{
	struct umm_pager *pager = region->pager;
	region->has_spill_base = true;
	for (uint32_t i = 0; i < pager->n_spill_gaps; i++) {
		struct range *gap = &pager->spill_gaps[i];
		if (gap->end - gap->start < region->mapped)
			continue;
		region->spill_base = gap->start;
		gap->start += region->mapped;
		if (gap->start == gap->end)
			*gap = pager->spill_gaps[--pager->n_spill_gaps];
		return;
	}
	region->spill_base = pager->spill_end;
	pager->spill_end += region->mapped;
}

int spill_write(struct umm_region *region, uint64_t unit, const void *data, uint8_t *layer)
{
	struct umm_pager *pager = region->pager;
	int number = current_layer(pager);
	if (number < 0)
		return number;
	if (!region->layers) {
		void *p = mmap(NULL, region->n_units, PROT_READ | PROT_WRITE,
		        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
		if (p == MAP_FAILED)
			return -ENOMEM;
		pthread_mutex_lock(&region->uf->lock);
		region->layers = p;
		pthread_mutex_unlock(&region->uf->lock);
	}
	if (!region->has_spill_base)
		place_region(region);
	for (uint64_t done = 0; done < region->unit;) {
		ssize_t n = pwrite(pager->layers[number].fd, (const uint8_t *)data + done,
		        region->unit - done, (off_t)(region->spill_base + unit * region->unit + done));
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n < 0 ? -errno : -EIO;
		done += (uint64_t)n;
	}
	*layer = (uint8_t)number;
	return 0;
}

int spill_read(struct umm_region *region, uint64_t unit, uint8_t layer, void *buffer)
{
	for (uint64_t done = 0; done < region->unit;) {
		ssize_t n = pread(region->pager->layers[layer].fd, (uint8_t *)buffer + done,
		        region->unit - done, (off_t)(region->spill_base + unit * region->unit + done));
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n < 0 ? -errno : -ENODATA;
		done += (uint64_t)n;
	}
	return 0;
}

void spill_note(struct umm_region *region, uint64_t unit, uint8_t layer)
{
	region->pager->layers[layer].units++;
	spill_drop(region, unit);
	region->layers[unit] = (uint8_t)(layer + 1);
	region->counters.spill_bytes += region->unit;
	region->uf->counters.spill_bytes += region->unit;
	unit_mark(region, unit, UNIT_SPILLED);
}

void spill_drop(struct umm_region *region, uint64_t unit)
{
	unit_unmark(region, unit, UNIT_SPILLED);
	if (!region->layers || !region->layers[unit])
		return;
	struct spill_layer *layer = &region->pager->layers[region->layers[unit] - 1];
	region->layers[unit] = 0;
	region->counters.spill_bytes -= region->unit;
	region->uf->counters.spill_bytes -= region->unit;
	/* The layer that is written to stays open: a unit may have been written that is not noted yet. */
	if (--layer->units == 0 && layer->frozen) {
		close(layer->fd);
		*layer = (struct spill_layer){0};
	}
}

void spill_forget(struct umm_region *region)
{
	struct umm_pager *pager = region->pager;
	if (!region->has_spill_base)
		return;
	for (int i = 0; i < MAX_LAYERS; i++)
		if (pager->layers[i].fd > 0 && !pager->layers[i].frozen)
			fallocate(pager->layers[i].fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
			        (off_t)region->spill_base, (off_t)region->mapped);
	if (pager->n_spill_gaps < MAX_SPILL_GAPS)
		pager->spill_gaps[pager->n_spill_gaps++] =
		        (struct range){region->spill_base, region->spill_base + region->mapped};
	region->has_spill_base = false;
}

void spill_freeze(struct umm_pager *pager)
{
	for (int i = 0; i < MAX_LAYERS; i++)
		if (pager->layers[i].fd > 0 && pager->layers[i].units) {
			pager->layers[i].frozen = true;
		} else if (pager->layers[i].fd > 0) {
			close(pager->layers[i].fd);
			pager->layers[i] = (struct spill_layer){0};
		}
}

void spill_close(struct umm_pager *pager)
{
	for (int i = 0; i < MAX_LAYERS; i++) {
		if (pager->layers[i].fd > 0)
			close(pager->layers[i].fd);
		pager->layers[i] = (struct spill_layer){0};
	}
}
