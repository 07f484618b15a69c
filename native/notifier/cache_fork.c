/* fork(2): what stays valid in the parent, and the empty cache of a child. */
#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kernel/smaps.h"
#include "notifier/cache_internal.h"

/* -- the parent ----------------------------------------------------------------------------- */

static int note_kept(void *context, const struct umm_smaps_mapping *mapping)
{
	struct umm_cache *cache = context;
	if (!mapping->shared && !mapping->dont_fork)
		return 0;
	if (cache->n_kept && cache->kept[cache->n_kept - 1].end == mapping->start) {
		cache->kept[cache->n_kept - 1].end = mapping->end;
		return 0;
	}
	if (cache->n_kept == cache->kept_capacity) {
		uint32_t capacity = cache->kept_capacity ? 2 * cache->kept_capacity : 64;
		struct kept_range *grown = realloc(cache->kept, capacity * sizeof(*grown));
		if (!grown)
			return -ENOMEM;
		cache->kept = grown;
		cache->kept_capacity = capacity;
	}
	cache->kept[cache->n_kept++] = (struct kept_range){mapping->start, mapping->end};
	return 0;
}

bool cache_keeps_at_fork(struct umm_cache *cache, uint64_t event_id, uint64_t start, uint64_t end)
{
	if (cache->kept_id != event_id) {
		/* Once for all entries that are told of this fork. */
		cache->kept_id = event_id;
		cache->n_kept = 0;
		if (umm_smaps_walk(note_kept, cache))
			cache->n_kept = 0; /* unknown: all are dropped */
	}
	for (uint32_t i = 0; i < cache->n_kept; i++)
		if (cache->kept[i].start <= start && end <= cache->kept[i].end)
			return true;
	return false;
}

/* -- the child ------------------------------------------------------------------------------ */

int cache_mark_owned(struct umm_cache *cache)
{
	void *mark = mmap(NULL, cache->page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (mark == MAP_FAILED)
		return -errno;
	if (madvise(mark, cache->page, MADV_WIPEONFORK)) {
		int error = errno;
		munmap(mark, cache->page);
		return -error;
	}
	cache->owned = mark;
	atomic_store(cache->owned, CACHE_OWNED);
	return 0;
}

void cache_unmark_owned(struct umm_cache *cache)
{
	munmap((void *)cache->owned, cache->page);
}

void cache_reset_in_child(struct umm_cache *cache)
{
	uint32_t wiped = CACHE_WIPED;
	if (!atomic_compare_exchange_strong(cache->owned, &wiped, CACHE_RESETTING)) {
		while (atomic_load(cache->owned) != CACHE_OWNED)
			sched_yield();
		return;
	}
	/* Locks and lists are as another thread of the parent's may have left them; subscriptions may be
	 * freed already, or not: they are left alone. */
	cache->epoch++;
	cache->stats = (struct umm_cache_stats){0};
	cache->uncached_in_use = 0;
	cache->kept_id = 0;
	cache_entries_init(cache);
	cache_end(cache);
	/* Without watch or subscriber nothing is cached, which is no error. */
	cache_begin(cache);
	atomic_store(cache->owned, CACHE_OWNED);
}
