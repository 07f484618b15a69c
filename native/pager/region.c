/* Regions: made, registered, and taken down. */
#include "pager/internal.h"

#include <errno.h>
#include <linux/mman.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "common/lock.h"

static bool is_power_of_two(uint64_t x)
{
	return x && !(x & (x - 1));
}

static int check_options(struct umm_pager *pager, const struct umm_region_options *options)
{
	uint64_t unit = options->unit;
	if (options->size == 0 || options->size > (uint64_t)1 << 46)
		return -EINVAL;
	if (options->hugetlb) {
		if (unit != options->hugetlb || !is_power_of_two(unit) || unit > pager->buffer_bytes ||
		        options->address)
			return -EINVAL;
	} else if (!is_power_of_two(unit) || unit < pager->page || unit > umm_unit_max(pager)) {
		return -EINVAL;
	}
	if (options->address % unit || (options->present && !options->address))
		return -EINVAL;
	if (options->fork_policy != UMM_FORK_SNAPSHOT && options->fork_policy != UMM_FORK_EXCLUDE)
		return -EINVAL;
	uint64_t budget = atomic_load(&pager->budget);
	return budget && budget < 8 * unit ? -ENOBUFS : 0;
}

static void *map_region(struct umm_pager *pager, const struct umm_region_options *options, uint64_t mapped)
{
	if (!options->hugetlb)
		return map_anonymous(mapped, options->unit < pager->page ? pager->page : options->unit);
	/* Huge pages are reserved: with an empty pool COPY says ENOMEM for ever, and who touched the page
	 * would wait. Under a budget as many as it lets in must be there now, and others may take them. */
	int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB |
	            (__builtin_ctzll(options->hugetlb) << MAP_HUGE_SHIFT);
	uint64_t budget = atomic_load(&pager->budget) & ~(options->hugetlb - 1);
	uint64_t reserved = budget && budget < mapped ? budget : mapped;
	void *p = mmap(NULL, reserved, PROT_READ | PROT_WRITE, flags, -1, 0);
	if (p != MAP_FAILED && reserved < mapped) {
		munmap(p, reserved);
		p = mmap(NULL, mapped, PROT_READ | PROT_WRITE, flags | MAP_NORESERVE, -1, 0);
	}
	return p == MAP_FAILED ? NULL : p;
}

static void *table(uint64_t bytes)
{
	/* Pages become real as units are used. */
	void *p =
	        mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	return p == MAP_FAILED ? NULL : p;
}

static void drop_table(void *p, uint64_t bytes)
{
	if (p)
		munmap(p, bytes);
}

static uint64_t zeroed_bytes(const struct umm_region *region)
{
	return (region->mapped / region->pager->page + 63) / 64 * 8;
}

static void region_free(struct umm_region *region)
{
	/* Small tables come from malloc: 10,000 regions are not 40,000 mappings. */
	if (region->n_units < REGION_HISTOGRAM_UNITS) {
		free(region->units);
		free(region->hashes);
		free(region->zeroed);
	} else {
		drop_table(region->units, region->n_units * sizeof(uint32_t));
		drop_table(region->hashes, region->n_units * sizeof(uint64_t));
		drop_table(region->zeroed, zeroed_bytes(region));
		drop_table(region->latency, sizeof(*region->latency));
	}
	drop_table(region->layers, region->n_units);
	drop_table((void *)region->flush_epoch, region->pager->page);
	if (region->store)
		umm_store_put(region->store);
	free(region);
}

static void *small_or_table(const struct umm_region *region, uint64_t bytes)
{
	return region->n_units < REGION_HISTOGRAM_UNITS ? calloc(1, bytes) : table(bytes);
}

static int alloc_tables(struct umm_region *region)
{
	struct umm_store *store = region->store;
	region->units = small_or_table(region, region->n_units * sizeof(uint32_t));
	if (!region->units)
		return -ENOMEM;
	region->hashes = small_or_table(region, region->n_units * sizeof(uint64_t));
	if (!region->hashes)
		return -ENOMEM;
	if (region->unit != region->pager->page && !region->hugetlb) {
		region->zeroed = small_or_table(region, zeroed_bytes(region));
		if (!region->zeroed)
			return -ENOMEM;
	}
	if (region->n_units >= REGION_HISTOGRAM_UNITS) {
		region->latency = table(sizeof(*region->latency));
		if (!region->latency)
			return -ENOMEM;
	}
	if (store->kind == UMM_STORE_WRITEBACK && !store->ops->peek &&
	        region->fork_policy == UMM_FORK_SNAPSHOT) {
		void *shared = mmap(
		        NULL, region->pager->page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
		if (shared == MAP_FAILED)
			return -ENOMEM;
		region->flush_epoch = shared;
	}
	return 0;
}

int region_register(struct umm_region *region, uint64_t start, uint64_t len)
{
	struct umm_pager *pager = region->pager;
	uint64_t mode = UMM_UFFD_MODE_MISSING;
	if (pager->has_wp)
		mode |= UMM_UFFD_MODE_WP;
	int err = umm_uffd_register(region->uf->fd, start, len, mode, NULL);
	if (err == -EINVAL && (mode & UMM_UFFD_MODE_WP))
		err = umm_uffd_register(region->uf->fd, start, len, UMM_UFFD_MODE_MISSING, NULL);
	return err;
}

static int take_id(struct umm_pager *pager, struct umm_region *region)
{
	uint32_t id = 0;
	while (id < pager->by_id_capacity && pager->by_id[id])
		id++;
	if (pager->n_regions < pager->by_id_capacity && id < pager->by_id_capacity) {
		pager->by_id[id] = region;
		region->id = id;
		return 0;
	}
	return -EMFILE;
}

static void set_present(struct umm_region *region, const uint8_t *present)
{
	for (uint64_t unit = 0; present && unit < region->n_units; unit++)
		if (present[unit >> 3] >> (unit & 7) & 1)
			unit_set_present(region, unit);
}

static void unmap_own(struct umm_region *region)
{
	if (region->base && region->owns_mapping)
		munmap((void *)region->base, region->mapped);
}

/* A unit that is read into a huge page is moved into place as one. Without such regions the buffers of the
 * threads stay small. */
static void use_huge_buffers(struct umm_pager *pager)
{
	for (uint32_t i = 0; i < pager->n_ufs; i++)
		for (uint32_t h = 0; h < pager->ufs[i].n_handlers; h++)
			madvise(pager->ufs[i].handlers[h].buffer, pager->buffer_bytes, MADV_HUGEPAGE);
	madvise(pager->worker.buffer, pager->buffer_bytes, MADV_HUGEPAGE);
}

int umm_region_create(struct umm_pager *pager, struct umm_store *store,
        const struct umm_region_options *options, struct umm_region **ret)
{
	int err = check_options(pager, options);
	if (err)
		return err;
	if (store->size + options->unit <= options->size)
		return -EFBIG;
	if (pager->in_thread && (store->ops->request || store->ops == umm_store_region_ops))
		return -EOPNOTSUPP;
	enum { CACHE_LINE = 64 };
	struct umm_region *region;
	if (posix_memalign((void **)&region, CACHE_LINE, sizeof(*region)))
		return -ENOMEM;
	memset(region, 0, sizeof(*region));
	region->pager = pager;
	region->unit = options->unit;
	region->hugetlb = options->hugetlb;
	region->size = options->size;
	region->mapped = (options->size + options->unit - 1) / options->unit * options->unit;
	region->n_units = region->mapped / region->unit;
	region->store = store;
	umm_store_get(store);
	region->huge = !region->hugetlb && region->unit == pager->pmd && pager->pmd > pager->page;
	/* An asynchronous store answers one process. */
	region->fork_policy = store->ops->request ? UMM_FORK_EXCLUDE : options->fork_policy;
	region->advice = store->ops->request ? UMM_REGION_RANDOM : UMM_REGION_NORMAL;
	err = alloc_tables(region);
	region->owns_mapping = !options->address;
	region->base = options->address ? options->address
	                                : (uint64_t)(uintptr_t)map_region(pager, options, region->mapped);
	if (!err && !region->base)
		err = -ENOMEM;
	if (err) {
		unmap_own(region);
		region_free(region);
		return err;
	}
	/* Advice is best effort: a kernel without THP says EINVAL. */
	if (!region->hugetlb && !options->address)
		madvise((void *)region->base, region->mapped, region->huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
	if (region->fork_policy == UMM_FORK_EXCLUDE)
		madvise((void *)region->base, region->mapped, MADV_DONTFORK);

	if (region->huge)
		use_huge_buffers(pager);
	sigset_t saved;
	block_signals(&saved);
	pthread_mutex_lock(&pager->regions_lock);
	struct umm_uf *uf = region->uf = &pager->ufs[pager->next_uf++ % pager->n_ufs];
	pthread_mutex_lock(&uf->lock);
	if (!err)
		err = take_id(pager, region);
	if (!err) {
		/* A region of the user's that stood here was unmapped, even if nobody has told us yet. */
		for (uint32_t i = 0; i < pager->n_ufs; i++)
			if (&pager->ufs[i] == uf)
				extents_bury(uf, region->base, region->base + region->mapped);
		struct extent whole = {region->base, region->base + region->mapped, region, 0};
		set_present(region, options->present);
		err = extents_insert(uf, &whole);
		/* Faults may come from the moment of registration on; they wait for the lock. */
		if (!err)
			err = region_register(region, region->base, region->mapped);
		if (err) {
			extents_remove(uf, region->base, region->base + region->mapped, NULL, NULL);
			for (uint64_t unit = 0; unit < region->n_units; unit++)
				unit_set(region, unit, UNIT_GONE, 0);
			pager->by_id[region->id] = NULL;
		}
	}
	if (!err) {
		region->next = pager->regions;
		region->link = &pager->regions;
		if (pager->regions)
			pager->regions->link = &region->next;
		pager->regions = region;
		pager->n_regions++;
		if (store->timeout_ms)
			pager->worker.timeouts = true;
	}
	pthread_mutex_unlock(&uf->lock);
	pthread_mutex_unlock(&pager->regions_lock);
	if (!err && store->timeout_ms) {
		pthread_mutex_lock(&pager->worker.lock);
		pthread_cond_signal(&pager->worker.wake);
		pthread_mutex_unlock(&pager->worker.lock);
	}
	restore_signals(&saved);
	if (err) {
		unmap_own(region);
		region_free(region);
		return err;
	}
	*ret = region;
	return 0;
}

/* Unregister and unmap some of what is left of the region; false when nothing was. */
static bool take_down(struct umm_region *region)
{
	enum { AT_A_TIME = 64 };
	struct umm_uf *uf = region->uf;
	struct range pieces[AT_A_TIME];
	uint32_t n = 0;
	pthread_mutex_lock(&uf->lock);
	/* What the user unmapped is not ours to unmap again: somebody else may be there by now. */
	uf_drain(uf);
	wake_deferred(uf);
	struct extent *home = extents_find(uf, region->base);
	uint64_t from = home && home->region == region ? (uint64_t)(home - uf->extents) : 0;
	for (uint64_t i = from; i < uf->n_extents && region->n_extents && n < AT_A_TIME;) {
		if (uf->extents[i].region != region) {
			i++;
			continue;
		}
		struct range piece = {uf->extents[i].start, uf->extents[i].end};
		/* Unregistered first: an unmap of ours raises no event. */
		umm_uffd_unregister(uf->fd, piece.start, piece.end - piece.start);
		extents_remove(uf, piece.start, piece.end, NULL, NULL);
		pieces[n++] = piece;
	}
	pthread_mutex_unlock(&uf->lock);
	/* Without the lock: freeing gigabytes takes a while. */
	for (uint32_t i = 0; i < n && region->owns_mapping; i++)
		munmap((void *)pieces[i].start, pieces[i].end - pieces[i].start);
	return n != 0;
}

static int close_region(struct umm_region *region)
{
	struct umm_pager *pager = region->pager;
	struct umm_uf *uf = region->uf;
	sigset_t saved;
	block_signals(&saved);
	pthread_mutex_lock(&pager->regions_lock);
	pthread_mutex_lock(&uf->lock);
	if (region->dependents) {
		pthread_mutex_unlock(&uf->lock);
		pthread_mutex_unlock(&pager->regions_lock);
		restore_signals(&saved);
		return -EBUSY;
	}
	region->closing = true;
	while (region->claims)
		pthread_cond_wait(&uf->claims_done, &uf->lock);
	/* First, so that nobody asks the store again once it has forgotten the region. */
	for (uint32_t i = 0; i < uf->n_requests;)
		if (uf->requests[i].region == region)
			uf->requests[i] = uf->requests[--uf->n_requests];
		else
			i++;
	ghosts_forget(uf, region);
	pthread_mutex_unlock(&uf->lock);
	if (region->store->ops->forget)
		region->store->ops->forget(region->store, region);
	/* The evictor works on units of a region under evict_lock only. */
	pthread_mutex_lock(&pager->evict_lock);
	staging_forget(region);
	while (take_down(region))
		;
	pthread_mutex_lock(&uf->lock);
	for (uint64_t unit = 0; unit < region->n_units; unit++) {
		spill_drop(region, unit);
		unit_set(region, unit, UNIT_GONE, 0);
	}
	spill_forget(region);
	pager->by_id[region->id] = NULL;
	*region->link = region->next;
	if (region->next)
		region->next->link = region->link;
	pager->n_regions--;
	pthread_mutex_unlock(&uf->lock);
	pthread_mutex_unlock(&pager->evict_lock);
	pthread_mutex_unlock(&pager->regions_lock);
	restore_signals(&saved);
	region_free(region);
	return 0;
}

int umm_region_close(struct umm_region *region)
{
	struct closing closing;
	/* Who waits for this callback may hold the locks that this needs. */
	if (umm_notify_in_callback())
		return -EDEADLK;
	sigset_t saved;
	block_signals(&saved);
	announce_closing(&closing, region);
	restore_signals(&saved);
	int err = close_region(region);
	announce_closed(&closing, err);
	return err;
}

uint64_t umm_region_address(const struct umm_region *region)
{
	/* Who asks need not wait for what another thread's mremap is about to change. */
	return __atomic_load_n(&region->base, __ATOMIC_RELAXED);
}

uint64_t umm_region_mapped_bytes(const struct umm_region *region)
{
	return region->mapped;
}

uint64_t umm_region_unit(const struct umm_region *region)
{
	return region->unit;
}
