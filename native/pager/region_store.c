/* A store on another region: its content at the moment of each fetch, without touching its memory.
 *
 * A region's store is fixed when it is made, from regions that exist already: there are no cycles. The
 * region underneath cannot be closed while a store on it lives. */
#include "pager/internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "common/lock.h"
#include "kernel/pagemap.h"

struct region_store {
	struct umm_store base;
	struct umm_region *region;
	uint64_t offset;
	pthread_mutex_t lock; /* of the buffer; taken by fault handlers, one store after the other */
	uint8_t *buffer;      /* one unit of the region */
};

static const long wait_ns = 20000;

static void wait_a_moment(void)
{
	nanosleep(&(struct timespec){.tv_nsec = wait_ns}, NULL);
}

/* Pages that are in place, read through the kernel. Lock held: no REMOVE event is read meanwhile, so what
 * pagemap shows as present stays so, and a page that is not there is one that was removed. */
int read_in_place(struct umm_region *region, uint64_t unit, uint8_t *buffer)
{
	struct umm_pager *pager = region->pager;
	uint64_t granule = region->hugetlb ? region->hugetlb : pager->page;
	for (uint64_t at = 0; at < region->unit; at += granule) {
		uint64_t run, address = region_address_of(region, unit * region->unit + at, &run);
		uint64_t entry = 0;
		if (!run)
			return -EFAULT;
		int err = umm_pagemap_read(pager->pagemap_fd, address, 1, pager->page, &entry);
		if (err < 0)
			return err;
		if (!(entry & (UMM_PAGEMAP_PRESENT | UMM_PAGEMAP_SWAP))) {
			memset(buffer + at, 0, granule);
			continue;
		}
		struct iovec local = {buffer + at, granule}, remote = {(void *)address, granule};
		ssize_t n = process_vm_readv(getpid(), &local, 1, &remote, 1, 0);
		if (n != (ssize_t)granule)
			return n < 0 ? -errno : -EFAULT;
	}
	return 0;
}

void zero_removed_pages(struct umm_region *region, uint64_t unit, uint8_t *buffer)
{
	uint64_t page = region->pager->page, per_unit = region->unit / page;
	for (uint64_t i = 0; region->zeroed && i < per_unit; i++) {
		uint64_t number = unit * per_unit + i;
		if (region->zeroed[number / 64] >> (number % 64) & 1)
			memset(buffer + i * page, 0, page);
	}
}

/* Its own store is asked, and the region left as it is. Lock held, dropped meanwhile. */
static int read_missing(struct umm_region *region, uint64_t unit, uint8_t *buffer)
{
	struct umm_uf *uf = region->uf;
	uint32_t word = region->units[unit];
	uint8_t layer = region->layers ? region->layers[unit] : 0;
	if (region->store->ops->request && !(word & UNIT_SPILLED)) {
		/* Brought in by the answer; looked at again then. */
		unit_set(region, unit, UNIT_FETCHING, 0);
		int err = request_unit(region, unit, NULL);
		if (err)
			unit_set(region, unit, UNIT_MISSING, 0);
		return err && err != -EAGAIN ? err : -EAGAIN;
	}
	unit_set(region, unit, UNIT_FETCHING, 0);
	claim_begin(region);
	pthread_mutex_unlock(&uf->lock);
	int err = fetch_unit(region, unit, word, layer, buffer);
	pthread_mutex_lock(&uf->lock);
	bool wanted = unit_flag(region, unit, UNIT_WANTED), lost = claim_lost(region, unit);
	if (!lost)
		unit_set(region, unit, UNIT_MISSING, 0);
	if (!lost && wanted)
		wake_unit(region, unit);
	claim_end(region);
	return lost ? -EAGAIN : err;
}

static int read_unit_once(struct umm_region *region, uint64_t unit, uint8_t *buffer)
{
	int err = 0;
	switch (unit_state(region, unit)) {
	case UNIT_REMOVED:
		memset(buffer, 0, region->unit);
		return 0;
	case UNIT_PRESENT:
	case UNIT_LEAVING:
	case UNIT_COPYING:
		err = read_in_place(region, unit, buffer);
		break;
	case UNIT_STAGED:
		memcpy(buffer, staging_slot(region->pager, unit_payload(region, unit)), region->unit);
		break;
	case UNIT_MISSING:
		err = read_missing(region, unit, buffer);
		break;
	case UNIT_FETCHING:
	case UNIT_ZAPPING:
		return -EAGAIN;
	case UNIT_POISONED:
	case UNIT_FILLED:
		return -(int)unit_payload(region, unit);
	default:
		return -EFAULT;
	}
	if (!err)
		zero_removed_pages(region, unit, buffer);
	return err;
}

static int read_unit(struct umm_region *region, uint64_t unit, uint8_t *buffer)
{
	for (;;) {
		pthread_mutex_lock(&region->uf->lock);
		int err = read_unit_once(region, unit, buffer);
		pthread_mutex_unlock(&region->uf->lock);
		if (err != -EAGAIN)
			return err;
		/* Another thread's claim, which ends without us. */
		wait_a_moment();
	}
}

static int region_fetch(struct umm_store *base, uint64_t offset, uint64_t len, void *buf)
{
	struct region_store *store = (struct region_store *)base;
	struct umm_region *region = store->region;
	uint64_t at = store->offset + offset;
	int err = 0;
	pthread_mutex_lock(&store->lock);
	for (uint64_t done = 0; done < len && !err;) {
		uint64_t unit = (at + done) / region->unit, within = (at + done) % region->unit;
		uint64_t n = region->unit - within < len - done ? region->unit - within : len - done;
		err = read_unit(region, unit, store->buffer);
		if (!err)
			memcpy((uint8_t *)buf + done, store->buffer + within, n);
		done += n;
	}
	pthread_mutex_unlock(&store->lock);
	return err;
}

static int region_after_fork(struct umm_store *base)
{
	struct region_store *store = (struct region_store *)base;
	/* A handler of the parent may have held it. */
	pthread_mutex_init(&store->lock, NULL);
	return store->region->fork_policy == UMM_FORK_SNAPSHOT ? 0 : -EACCES;
}

static void region_destroy(struct umm_store *base)
{
	struct region_store *store = (struct region_store *)base;
	struct umm_region *region = store->region;
	sigset_t saved;
	block_signals(&saved);
	pthread_mutex_lock(&region->uf->lock);
	region->dependents--;
	pthread_mutex_unlock(&region->uf->lock);
	restore_signals(&saved);
	munmap(store->buffer, region->unit);
	pthread_mutex_destroy(&store->lock);
	free(store);
}

static const struct umm_store_ops region_ops = {
        .name = "region",
        .fetch = region_fetch,
        .after_fork = region_after_fork,
        .destroy = region_destroy,
};
const struct umm_store_ops *const umm_store_region_ops = &region_ops;

int umm_store_region_create(
        struct umm_region *region, uint64_t offset, uint64_t size, int kind, struct umm_store **ret)
{
	if (!size || offset > region->size || size > region->size - offset || kind == UMM_STORE_WRITEBACK)
		return -EINVAL;
	/* The lock that the faulting thread of such a pager holds while it reads a store may be this
	 * region's. */
	if (region->pager->in_thread)
		return -EOPNOTSUPP;
	struct region_store *store = calloc(1, sizeof(*store));
	if (!store)
		return -ENOMEM;
	store->buffer = map_anonymous(region->unit, region->pager->page);
	if (!store->buffer) {
		free(store);
		return -ENOMEM;
	}
	umm_store_init(&store->base, &region_ops, kind, size);
	store->region = region;
	store->offset = offset;
	pthread_mutex_init(&store->lock, NULL);
	sigset_t saved;
	block_signals(&saved);
	pthread_mutex_lock(&region->uf->lock);
	region->dependents++;
	pthread_mutex_unlock(&region->uf->lock);
	restore_signals(&saved);
	*ret = &store->base;
	return 0;
}
