/* A pager: made, asked for figures, and taken down. */
#include "pager/internal.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "common/lock.h"
#include "kernel/pagemap.h"
#include "kernel/probe.h"

static const uint64_t default_pmd = 2 << 20;
static const uint32_t most_regions = 1 << 20; /* what an entry of the fifo has room for */

static uint64_t read_pmd_size(uint64_t page)
{
	char text[32] = {0};
	int fd = open("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size", O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);
	if (fd >= 0)
		close(fd);
	uint64_t size = n > 0 ? strtoull(text, NULL, 10) : 0;
	return size > page ? size : default_pmd;
}

uint64_t umm_unit_max(const struct umm_pager *pager)
{
	return pager->pmd > default_pmd ? pager->pmd : default_pmd;
}

static uint64_t largest_hugetlb(void)
{
	uint64_t largest = 0;
	DIR *dir = opendir("/sys/kernel/mm/hugepages");
	for (struct dirent *entry = dir ? readdir(dir) : NULL; entry; entry = readdir(dir)) {
		unsigned long long kib;
		if (sscanf(entry->d_name, "hugepages-%llukB", &kib) == 1 && kib * 1024 > largest)
			largest = kib * 1024;
	}
	if (dir)
		closedir(dir);
	return largest;
}

int uf_open(struct umm_pager *pager, struct umm_uf *uf)
{
	uint64_t want =
	        pager->uffd_features &
	        (UMM_UFFD_FEATURE_EVENT_REMAP | UMM_UFFD_FEATURE_EVENT_REMOVE | UMM_UFFD_FEATURE_EVENT_UNMAP |
	                UMM_UFFD_FEATURE_MISSING_HUGETLBFS | UMM_UFFD_FEATURE_PAGEFAULT_FLAG_WP |
	                UMM_UFFD_FEATURE_POISON | UMM_UFFD_FEATURE_MOVE);
	if (pager->in_thread)
		want |= UMM_UFFD_FEATURE_SIGBUS;
	int fd = umm_uffd_open(pager->uffd_source, O_NONBLOCK, NULL);
	if (fd < 0)
		return fd;
	int err = umm_uffd_api(fd, want, NULL, NULL);
	if (err) {
		close(fd);
		return err;
	}
	uf->fd = fd;
	return 0;
}

/* Before some version MOVE flushed the TLB for every page, and a batch cost as much as its pages one by one:
 * copying is cheaper then. Asked once per process. */
static bool move_is_cheap;

static void probe_move(void)
{
	struct umm_move_cost cost;
	move_is_cheap = umm_probe_move_cost(&cost) == 0 && cost.batch_ns * 2 < cost.single_ns;
}

static bool move_pays(void)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;
	pthread_once(&once, probe_move);
	return move_is_cheap;
}

static int open_ufs(struct umm_pager *pager, unsigned handlers)
{
	cpu_set_t allowed;
	CPU_ZERO(&allowed);
	if (sched_getaffinity(0, sizeof(allowed), &allowed) < 0)
		return -errno;
	uint32_t n_cpus = (uint32_t)CPU_COUNT(&allowed);
	uint32_t per_uf = handlers ? handlers : n_cpus < MAX_HANDLERS ? n_cpus : MAX_HANDLERS;
	if (per_uf > MAX_HANDLERS)
		per_uf = MAX_HANDLERS;
	uint32_t n = pager->in_thread || handlers ? 1 : (n_cpus + per_uf - 1) / per_uf;
	n = n < MAX_UFS ? n : MAX_UFS;
	for (uint32_t i = 0; i < n; i++) {
		struct umm_uf *uf = &pager->ufs[i];
		uf->pager = pager;
		int err = uf_open(pager, uf);
		if (err)
			return err;
		pager->n_ufs = i + 1;
		pthread_mutex_init(&uf->lock, NULL);
		pthread_cond_init(&uf->claims_done, NULL);
		/* The faulting threads serve themselves: one thread is left to follow events. */
		uf->n_handlers = pager->in_thread ? 1 : per_uf;
		err = extents_init(uf);
		if (err)
			return err;
	}
	return 0;
}

static int init_memory(struct umm_pager *pager)
{
	pager->zeros = mmap(
	        NULL, pager->buffer_bytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (pager->zeros == MAP_FAILED) {
		pager->zeros = NULL;
		return -ENOMEM;
	}
	/* Never huge: reading it must not cost 2 MiB. */
	madvise(pager->zeros, pager->buffer_bytes, MADV_NOHUGEPAGE);
	pager->by_id_capacity = most_regions;
	pager->by_id = mmap(NULL, most_regions * sizeof(*pager->by_id), PROT_READ | PROT_WRITE,
	        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (pager->by_id == MAP_FAILED) {
		pager->by_id = NULL;
		return -ENOMEM;
	}
	return 0;
}

static void pager_free(struct umm_pager *pager)
{
	for (uint32_t i = 0; i < pager->n_ufs; i++) {
		struct umm_uf *uf = &pager->ufs[i];
		close(uf->fd);
		extents_deinit(uf);
		fifo_deinit(&uf->fifo);
		for (int h = 0; h < MAX_HANDLERS; h++)
			if (uf->handlers[h].buffer)
				munmap(uf->handlers[h].buffer, pager->buffer_bytes);
		pthread_mutex_destroy(&uf->lock);
		pthread_cond_destroy(&uf->claims_done);
	}
	staging_deinit(pager);
	spill_close(pager);
	if (pager->worker.buffer)
		munmap(pager->worker.buffer, pager->buffer_bytes);
	if (pager->announced)
		munmap(pager->announced, ANNOUNCED_MAX * sizeof(*pager->announced));
	if (pager->evict_buffer)
		munmap(pager->evict_buffer, pager->buffer_bytes);
	if (pager->zeros)
		munmap(pager->zeros, pager->buffer_bytes);
	if (pager->by_id)
		munmap(pager->by_id, pager->by_id_capacity * sizeof(*pager->by_id));
	if (pager->stop_fd >= 0)
		close(pager->stop_fd);
	if (pager->empty_fd >= 0)
		close(pager->empty_fd);
	if (pager->pagemap_fd >= 0)
		close(pager->pagemap_fd);
	pthread_mutex_destroy(&pager->regions_lock);
	pthread_mutex_destroy(&pager->evict_lock);
	free(pager);
}

static int start_threads(struct umm_pager *pager)
{
	int err = handlers_start(pager);
	if (!err) {
		err = worker_start(pager);
		if (!err) {
			err = evictor_start(pager);
			if (!err)
				return 0;
			worker_join(pager);
		}
	}
	handlers_join(pager);
	return err;
}

int umm_pager_create(const struct umm_pager_options *options, struct umm_pager **ret)
{
	struct umm_pager *pager = calloc(1, sizeof(*pager));
	if (!pager)
		return -ENOMEM;
	pager->page = (uint64_t)sysconf(_SC_PAGESIZE);
	pager->pmd = read_pmd_size(pager->page);
	uint64_t hugetlb = largest_hugetlb();
	/* Room for the largest unit: 32 and 512 MiB with 16K and 64K pages. What no unit fills costs no
	 * memory. */
	pager->buffer_bytes = hugetlb > umm_unit_max(pager) ? hugetlb : umm_unit_max(pager);
	pager->in_thread = options->in_thread;
	pager->uffd_source = options->uffd_source;
	pager->stop_fd = pager->pagemap_fd = pager->empty_fd = -1;
	atomic_store(&pager->budget, options->budget_bytes);
	pthread_mutex_init(&pager->regions_lock, NULL);
	pthread_mutex_init(&pager->evict_lock, NULL);
	pthread_mutex_init(&pager->evict_wake_lock, NULL);
	pthread_cond_init(&pager->evict_wake, NULL);

	sigset_t saved;
	block_signals(&saved); /* the threads inherit it */
	/* UMM_UFFD_SOURCE_ANY: keep to the one that works, for the children of a fork too. */
	int probe = umm_uffd_open(pager->uffd_source, 0, &pager->uffd_source);
	int err = probe < 0 ? probe : 0;
	if (!err) {
		close(probe);
		err = umm_uffd_probe_features(pager->uffd_source, &pager->uffd_features);
	}
	if (!err) {
		pager->use_move =
		        (pager->uffd_features & UMM_UFFD_FEATURE_MOVE) && !options->no_move && move_pays();
		pager->has_poison = (pager->uffd_features & UMM_UFFD_FEATURE_POISON) && !options->no_poison;
		pager->has_wp = pager->uffd_features & UMM_UFFD_FEATURE_PAGEFAULT_FLAG_WP;
		pager->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		pager->pagemap_fd = umm_pagemap_open(0);
		if (pager->stop_fd < 0)
			err = -errno;
		/* After a failed MOVE nothing else tells which pages went. */
		if (pager->pagemap_fd < 0)
			pager->use_move = false;
	}
	if (!err)
		err = poison_init(pager);
	if (!err)
		err = init_memory(pager);
	if (!err)
		err = open_ufs(pager, options->handlers);
	if (!err && options->budget_bytes)
		err = staging_init(pager);
	if (!err && pager->in_thread)
		err = sigbus_install();
	if (!err)
		err = start_threads(pager);
	if (!err) {
		err = pager_listed(pager);
		if (err)
			umm_pager_destroy(pager);
	} else {
		pager_free(pager);
	}
	restore_signals(&saved);
	if (!err)
		*ret = pager;
	return err;
}

int umm_pager_destroy(struct umm_pager *pager)
{
	sigset_t saved;
	block_signals(&saved);
	pthread_mutex_lock(&pager->regions_lock);
	bool busy = pager->regions != NULL;
	pthread_mutex_unlock(&pager->regions_lock);
	if (!busy) {
		pager_unlisted(pager);
		evictor_join(pager);
		worker_join(pager);
		handlers_join(pager);
		pager_free(pager);
	}
	restore_signals(&saved);
	return busy ? -EBUSY : 0;
}

int umm_pager_set_budget(struct umm_pager *pager, uint64_t bytes)
{
	sigset_t saved;
	block_signals(&saved);
	pthread_mutex_lock(&pager->regions_lock);
	pthread_mutex_lock(&pager->evict_lock);
	int err = 0;
	for (struct umm_region *region = pager->regions; region && bytes; region = region->next)
		if (bytes < 8 * region->unit)
			err = -ENOBUFS;
	if (!err && bytes) {
		staging_finalise_all(pager);
		uint64_t old = atomic_exchange(&pager->budget, bytes);
		staging_deinit(pager);
		err = staging_init(pager);
		/* No memory for the new one: back to the old one, or, when even that fails, to none. */
		if (err) {
			atomic_store(&pager->budget, old);
			if (!old || staging_init(pager))
				atomic_store(&pager->budget, 0);
		}
	} else if (!err) {
		staging_finalise_all(pager);
		atomic_store(&pager->budget, 0);
	}
	if (atomic_load(&pager->budget)) {
		for (uint32_t i = 0; i < pager->n_ufs; i++) {
			struct umm_uf *uf = &pager->ufs[i];
			pthread_mutex_lock(&uf->lock);
			uf->fifo.lost = true; /* rebuilt by the evictor */
			pthread_mutex_unlock(&uf->lock);
		}
		evictor_wake(pager);
	}
	pthread_mutex_unlock(&pager->evict_lock);
	pthread_mutex_unlock(&pager->regions_lock);
	restore_signals(&saved);
	return err;
}

static void add_counters(struct umm_pager_counters *to, const struct umm_pager_counters *from)
{
	uint64_t *t = (uint64_t *)to;
	const uint64_t *f = (const uint64_t *)from;
	for (size_t i = 0; i < sizeof(*to) / sizeof(*t); i++)
		t[i] += f[i];
}

static void fill_common(struct umm_pager *pager, struct umm_pager_stats *ret)
{
	ret->budget_bytes = atomic_load(&pager->budget);
	ret->staging_bytes = atomic_load(&pager->staged);
	ret->uffds = pager->n_ufs;
	ret->regions = pager->n_regions;
	ret->uses_move = pager->use_move;
	ret->in_thread = pager->in_thread;
	for (uint32_t i = 0; i < pager->n_ufs; i++)
		ret->handlers += pager->ufs[i].n_handlers;
}

int umm_pager_stats(struct umm_pager *pager, struct umm_pager_stats *ret)
{
	memset(ret, 0, sizeof(*ret));
	sigset_t saved;
	block_signals(&saved);
	for (uint32_t i = 0; i < pager->n_ufs; i++) {
		struct umm_uf *uf = &pager->ufs[i];
		pthread_mutex_lock(&uf->lock);
		add_counters(&ret->counters, &uf->counters);
		umm_histogram_add(&ret->latency.total, &uf->latency.total);
		umm_histogram_add(&ret->latency.queue, &uf->latency.queue);
		umm_histogram_add(&ret->latency.fetch, &uf->latency.fetch);
		umm_histogram_add(&ret->latency.install, &uf->latency.install);
		pthread_mutex_unlock(&uf->lock);
	}
	restore_signals(&saved);
	ret->counters.resident_bytes = atomic_load(&pager->resident) + atomic_load(&pager->staged);
	ret->counters.resident_peak_bytes = atomic_load(&pager->peak);
	ret->counters.store_errors += atomic_load(&pager->failed_fetches);
	fill_common(pager, ret);
	return 0;
}

int umm_region_stats(struct umm_region *region, struct umm_pager_stats *ret)
{
	memset(ret, 0, sizeof(*ret));
	sigset_t saved;
	block_signals(&saved);
	pthread_mutex_lock(&region->uf->lock);
	ret->counters = region->counters;
	ret->counters.store_errors += atomic_load(&region->failed_fetches);
	if (region->latency)
		ret->latency = *region->latency;
	pthread_mutex_unlock(&region->uf->lock);
	restore_signals(&saved);
	fill_common(region->pager, ret);
	ret->regions = 1;
	return 0;
}
