/* fork(2): the child takes the regions over as private snapshots, or does not have them.
 *
 * Before the fork every lock is taken, so that no unit is half way anywhere. The child's memory is a
 * copy with no userfaultfd behind it: before any of its code runs, it opens descriptors of its own,
 * registers its regions and starts its own handlers. vfork and posix_spawn run no code of the child's
 * and come without all this. */
#include "pager/internal.h"

#include <errno.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "common/lock.h"
#include "kernel/pagemap.h"

static pthread_mutex_t pagers_lock = PTHREAD_MUTEX_INITIALIZER;
static struct umm_pager *pagers;
static pthread_once_t hooks_once = PTHREAD_ONCE_INIT;
static int hooks_error;
static sigset_t saved_signals;

struct umm_uf *find_uf_locked(uint64_t address)
{
	pthread_mutex_lock(&pagers_lock);
	for (struct umm_pager *pager = pagers; pager; pager = pager->next) {
		for (uint32_t i = 0; i < pager->n_ufs; i++) {
			struct umm_uf *uf = &pager->ufs[i];
			pthread_mutex_lock(&uf->lock);
			if (extents_find(uf, address)) {
				pthread_mutex_unlock(&pagers_lock);
				return uf;
			}
			pthread_mutex_unlock(&uf->lock);
		}
	}
	pthread_mutex_unlock(&pagers_lock);
	return NULL;
}

bool zero_unindexed(uint64_t address)
{
	bool done = false;
	pthread_mutex_lock(&pagers_lock);
	for (struct umm_pager *pager = pagers; pager && !done; pager = pager->next) {
		for (uint32_t i = 0; i < pager->n_ufs && pager->in_thread && !done; i++) {
			struct umm_uf *uf = &pager->ufs[i];
			pthread_mutex_lock(&uf->lock);
			/* ENOENT where it is not registered: then the signal is somebody else's. */
			int err = install_zero_page(uf, address, pager->page);
			done = err == 0 || err == -EAGAIN;
			uf->counters.faults_zero += err == 0;
			pthread_mutex_unlock(&uf->lock);
		}
	}
	pthread_mutex_unlock(&pagers_lock);
	return done;
}

int poison_filled(void)
{
	int err = 0;
	sigset_t saved;
	block_signals(&saved);
	pthread_mutex_lock(&pagers_lock);
	for (struct umm_pager *pager = pagers; pager; pager = pager->next) {
		int one = poison_filled_of(pager);
		err = err ? err : one;
	}
	pthread_mutex_unlock(&pagers_lock);
	restore_signals(&saved);
	return err;
}

int umm_range_in_region(uint64_t address, uint64_t len)
{
	sigset_t saved;
	block_signals(&saved);
	int found = 0;
	pthread_mutex_lock(&pagers_lock);
	for (struct umm_pager *pager = pagers; pager && !found; pager = pager->next) {
		for (uint32_t i = 0; i < pager->n_ufs && !found; i++) {
			struct umm_uf *uf = &pager->ufs[i];
			pthread_mutex_lock(&uf->lock);
			struct extent *x = extents_from(uf, address);
			found = x < uf->extents + uf->n_extents && x->start < address + len;
			pthread_mutex_unlock(&uf->lock);
		}
	}
	pthread_mutex_unlock(&pagers_lock);
	restore_signals(&saved);
	return found;
}

/* The child's mappings are as they are now, so the extents must be, too: events that nobody has read yet are
 * applied. The faults in front of them are taken again after the fork. */
void uf_drain(struct umm_uf *uf)
{
	struct umm_uffd_msg msg;
	for (;;) {
		struct umm_notify_reading reading;
		umm_notify_reading_begin(umm_space_self(), &reading);
		int err = umm_uffd_read(uf->fd, &msg);
		bool event = err == 0 && msg.event != UMM_UFFD_EVENT_PAGEFAULT;
		if (event)
			apply_event(uf, &msg);
		umm_notify_reading_end(umm_space_self(), &reading);
		if (err)
			return;
		if (event)
			continue;
		uint64_t address = msg.arg1 & ~(uf->pager->page - 1);
		/* Waking them now would only fill the queue again. */
		if (uf->n_deferred == MAX_DEFERRED) {
			umm_uffd_wake(uf->fd, address, uf->pager->page);
			return;
		}
		uf->deferred[uf->n_deferred++] = (struct range){address, address + uf->pager->page};
	}
}

static void lock_all(void)
{
	sigset_t saved;
	/* The evictor may be waiting for a subscriber that needs what the forking thread holds (the GIL). */
	umm_notify_forking(true);
	block_signals(&saved);
	pthread_mutex_lock(&pagers_lock);
	saved_signals = saved;
	for (struct umm_pager *pager = pagers; pager; pager = pager->next) {
		pthread_mutex_lock(&pager->regions_lock);
		pthread_mutex_lock(&pager->evict_lock);
		for (uint32_t i = 0; i < pager->n_ufs; i++) {
			pthread_mutex_lock(&pager->ufs[i].lock);
			uf_drain(&pager->ufs[i]);
		}
		/* Here, not in the child, which may run only after a flush of ours. A child's own children
		 * have the snapshot that it has. */
		for (struct umm_region *region = pager->regions; region; region = region->next)
			if (region->flush_epoch && !region->in_child)
				region->child_epoch = atomic_load(region->flush_epoch);
		/* Last: handlers take them with their uf locked. */
		pthread_mutex_lock(&pager->evict_wake_lock);
		pthread_mutex_lock(&pager->worker.lock);
	}
}

static void unlock_all(void)
{
	for (struct umm_pager *pager = pagers; pager; pager = pager->next) {
		pthread_mutex_unlock(&pager->worker.lock);
		for (uint32_t i = pager->n_ufs; i-- > 0;)
			pthread_mutex_unlock(&pager->ufs[i].lock);
		pthread_mutex_unlock(&pager->evict_wake_lock);
		pthread_mutex_unlock(&pager->evict_lock);
		pthread_mutex_unlock(&pager->regions_lock);
	}
	sigset_t saved = saved_signals;
	pthread_mutex_unlock(&pagers_lock);
	restore_signals(&saved);
}

static void in_parent(void)
{
	for (struct umm_pager *pager = pagers; pager; pager = pager->next) {
		for (uint32_t i = 0; i < pager->n_ufs; i++)
			wake_deferred(&pager->ufs[i]);
		spill_freeze(pager);
		for (struct umm_region *region = pager->regions; region; region = region->next)
			if (region->fork_policy == UMM_FORK_SNAPSHOT && region->flush_epoch)
				region->forked = true;
	}
	umm_notify_forking(false);
	unlock_all();
}

/* The child cannot serve this region: an access must be a crash, not a zero. */
static void forbid(struct umm_region *region)
{
	struct umm_uf *uf = region->uf;
	region->unserved = true;
	for (uint64_t i = 0; i < uf->n_extents; i++)
		if (uf->extents[i].region == region)
			mprotect((void *)uf->extents[i].start, uf->extents[i].end - uf->extents[i].start,
			        PROT_NONE);
}

static void adopt_region(struct umm_region *region, bool served)
{
	struct umm_uf *uf = region->uf;
	region->claims = 0;
	region->in_child = true;
	for (uint64_t unit = 0; unit < region->n_units; unit++) {
		/* Claims of the parent's threads: nobody here will end them. */
		int state = unit_state(region, unit);
		if (state == UNIT_FETCHING)
			unit_set(region, unit,
			        unit_flag(region, unit, UNIT_WAS_REMOVED) ? UNIT_REMOVED : UNIT_MISSING, 0);
		else if (region->fork_policy == UMM_FORK_EXCLUDE)
			unit_set(region, unit, UNIT_GONE, 0);
	}
	if (region->fork_policy == UMM_FORK_EXCLUDE) {
		for (uint64_t i = 0; i < uf->n_extents;)
			if (uf->extents[i].region == region)
				extents_remove(uf, uf->extents[i].start, uf->extents[i].end, NULL, NULL);
			else
				i++;
		return;
	}
	if (served && region->store->ops->after_fork && region->store->ops->after_fork(region->store))
		served = false;
	for (uint64_t i = 0; i < uf->n_extents && served; i++) {
		struct extent *x = &uf->extents[i];
		if (x->region == region && region_register(region, x->start, x->end - x->start))
			served = false;
	}
	if (!served)
		forbid(region);
}

static int reopen(struct umm_pager *pager)
{
	int err = 0;
	/* All of the parent's first: at the descriptor limit this is what makes room. */
	for (uint32_t i = 0; i < pager->n_ufs; i++)
		close(pager->ufs[i].fd);
	close(pager->stop_fd);
	close(pager->pagemap_fd);
	/* Opening a userfaultfd through its device takes a second descriptor for a moment: while there is
	 * room. */
	for (uint32_t i = 0; i < pager->n_ufs; i++) {
		struct umm_uf *uf = &pager->ufs[i];
		uf->n_deferred = uf->n_ghosts = uf->n_requests = 0;
		uf->zap.active = false;
		int one = err ? err : uf_open(pager, uf);
		if (one) {
			uf->fd = -1;
			err = one;
		}
	}
	pager->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (pager->stop_fd < 0)
		err = -errno;
	/* /proc/self/pagemap stays the parent's when it is inherited. */
	pager->pagemap_fd = umm_pagemap_open(0);
	if (pager->pagemap_fd < 0)
		pager->use_move = false;
	return err;
}

static void child_pager(struct umm_pager *pager)
{
	int err = reopen(pager);
	for (uint32_t i = 0; i < pager->staging.n_areas; i++) {
		struct staging_area *area = &pager->staging.areas[i];
		if (area->uf && !err)
			umm_uffd_register(area->uf->fd, (uintptr_t)pager->staging.memory + area->offset,
			        pager->staging.area_bytes, UMM_UFFD_MODE_WP, NULL);
	}
	spill_freeze(pager);
	for (uint32_t i = 0; i < pager->n_ufs; i++) {
		pthread_cond_init(&pager->ufs[i].claims_done, NULL);
		memset(&pager->ufs[i].counters, 0, sizeof(pager->ufs[i].counters));
		memset(&pager->ufs[i].latency, 0, sizeof(pager->ufs[i].latency));
	}
	for (struct umm_region *region = pager->regions; region; region = region->next)
		adopt_region(region, !err);
	pthread_mutex_unlock(&pager->worker.lock);
	pthread_mutex_init(&pager->worker.lock, NULL);
	pthread_mutex_unlock(&pager->evict_wake_lock);
	pthread_mutex_init(&pager->evict_wake_lock, NULL);
	pthread_cond_init(&pager->evict_wake, NULL);
	atomic_store(&pager->evict_wanted, false);
	/* None of the parent's threads is here to be joined. */
	pager->worker_runs = pager->evictor_runs = false;
	for (uint32_t i = 0; i < pager->n_ufs && err; i++)
		pager->ufs[i].n_handlers = 0;
	if (!err)
		err = handlers_start(pager);
	if (!err)
		err = worker_start(pager);
	if (!err)
		err = evictor_start(pager);
	if (err)
		for (struct umm_region *region = pager->regions; region; region = region->next)
			forbid(region);
	for (uint32_t i = pager->n_ufs; i-- > 0;)
		pthread_mutex_unlock(&pager->ufs[i].lock);
	pthread_mutex_unlock(&pager->evict_lock);
	pthread_mutex_unlock(&pager->regions_lock);
}

static void in_child(void)
{
	for (struct umm_pager *pager = pagers; pager; pager = pager->next)
		child_pager(pager);
	sigset_t saved = saved_signals;
	pthread_mutex_unlock(&pagers_lock);
	restore_signals(&saved);
}

static void hook(void)
{
	hooks_error = pthread_atfork(lock_all, in_parent, in_child);
}

int pager_listed(struct umm_pager *pager)
{
	pthread_once(&hooks_once, hook);
	if (hooks_error)
		return -hooks_error;
	pthread_mutex_lock(&pagers_lock);
	pager->next = pagers;
	pagers = pager;
	pthread_mutex_unlock(&pagers_lock);
	return 0;
}

void pager_unlisted(struct umm_pager *pager)
{
	pthread_mutex_lock(&pagers_lock);
	for (struct umm_pager **link = &pagers; *link; link = &(*link)->next)
		if (*link == pager) {
			*link = pager->next;
			break;
		}
	pthread_mutex_unlock(&pagers_lock);
}
