/* What the files of the registration cache share.
 *
 * One lock; it is not held while user functions, subscriptions or the watch are called. Entries lie in an
 * array made at creation. An entry is REGISTERING (in the list of those; others who want its range wait),
 * then LIVE (in the index, and in the order of use), then DEAD (in neither; disposed of when the last user
 * puts it), then FREE.
 *
 * The index is sorted by start. As no entry in it covers another, it is sorted by end, too, and whatever
 * covers a range is found by one binary search: the last entry that starts at or before it. */
#ifndef UMM_NOTIFIER_CACHE_INTERNAL_H
#define UMM_NOTIFIER_CACHE_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>

#include "notifier/cache.h"
#include "notifier/notifier.h"

enum entry_state {
	ENTRY_FREE,
	ENTRY_REGISTERING,
	ENTRY_LIVE,
	ENTRY_DEAD,
};

struct umm_cache_entry {
	struct umm_cache *cache;
	struct umm_subscription *subscription;
	struct umm_cache_entry *next, *previous; /* FREE: next free; REGISTERING: list; LIVE: order of use */
	void *registration;
	uint64_t address, length;
	uint64_t seq;  /* of umm_read_begin: what began since is not known to be harmless */
	uint32_t refs; /* users */
	uint32_t pins; /* threads that look at it without the lock: they keep the entry, not its registration
	                */
	uint8_t state;
	bool registered; /* to be deregistered, by whoever clears this under the lock */
	bool deregistering, disposing;
};

/* Memory whose pages stay the parent's at fork. */
struct kept_range {
	uint64_t start, end;
};

struct umm_cache {
	/* WIPED in a child, until one of its threads has emptied the cache. */
	_Atomic uint32_t *owned;
	pthread_mutex_t lock;
	pthread_cond_t changed;
	struct umm_cache_options options;
	char name[UMM_NOTIFY_NAME_MAX + 1];
	uint64_t page;
	uint32_t epoch; /* grows in each child */
	struct umm_subscriber *subscriber;
	struct umm_watch *watch;
	struct umm_cache_stats stats;
	uint64_t uncached_in_use;
	struct umm_cache_entry *entries, *free, *registering;
	struct umm_cache_entry *newest, *oldest;
	struct umm_cache_entry **index;
	uint32_t n;
	/* Of the subscriber's thread: what a fork leaves as it is. */
	struct kept_range *kept;
	uint64_t kept_id;
	uint32_t n_kept, kept_capacity;
};

enum { CACHE_WIPED, CACHE_OWNED, CACHE_RESETTING };

/* -- cache_index.c; under the lock ---------------------------------------------------------- */

void cache_entries_init(struct umm_cache *cache);
/* One that covers the range, or NULL. */
struct umm_cache_entry *cache_find(struct umm_cache *cache, uint64_t start, uint64_t end);
struct umm_cache_entry *cache_find_registering(struct umm_cache *cache, uint64_t start, uint64_t end);
/* NULL: none is free. It is REGISTERING, with one user. */
struct umm_cache_entry *cache_entry_take(struct umm_cache *cache, uint64_t address, uint64_t length);
void cache_entry_free(struct umm_cache_entry *entry);
/* REGISTERING to LIVE; or to DEAD, if another covers it by now. */
void cache_publish(struct umm_cache_entry *entry);
/* LIVE or REGISTERING to DEAD. */
void cache_kill(struct umm_cache_entry *entry);
/* Entries of the index that lie within this one; NULL: none (any more). */
struct umm_cache_entry *cache_find_covered(struct umm_cache_entry *entry);
/* The one that nobody has used for the longest time, and nobody uses. */
struct umm_cache_entry *cache_oldest_unused(struct umm_cache *cache);
void cache_used_now(struct umm_cache_entry *entry);

/* -- cache_entry.c -------------------------------------------------------------------------- */

extern const struct umm_notifier_ops cache_notifier_ops;
/* Under the lock, which it drops: a DEAD entry that nobody uses or pins goes. By whoever sees it so first. */
void cache_dispose_if_done(struct umm_cache_entry *entry);
/* Have all events that began been delivered? */
bool cache_is_delivered(struct umm_cache *cache);
/* Until `deadline_ns` or a change of the cache's state. Under the lock. */
void cache_wait(struct umm_cache *cache, uint64_t deadline_ns);

/* -- cache_watch.c; without the lock -------------------------------------------------------- */

/* -errno: the memory cannot be watched. */
int cache_watch(struct umm_cache *cache, uint64_t start, uint64_t end);

/* -- cache_fork.c --------------------------------------------------------------------------- */

/* In the subscriber's thread: does the range stay the parent's at the fork of this event? */
bool cache_keeps_at_fork(struct umm_cache *cache, uint64_t event_id, uint64_t start, uint64_t end);
int cache_mark_owned(struct umm_cache *cache);
void cache_unmark_owned(struct umm_cache *cache);
/* At the beginning of every function of the user's: an inherited cache becomes an empty one. */
void cache_reset_in_child(struct umm_cache *cache);
static inline void cache_enter(struct umm_cache *cache)
{
	if (atomic_load_explicit(cache->owned, memory_order_acquire) != CACHE_OWNED)
		cache_reset_in_child(cache);
}

/* -- cache.c -------------------------------------------------------------------------------- */

/* Lock, subscriber, watch. */
int cache_begin(struct umm_cache *cache);
void cache_end(struct umm_cache *cache);

#endif
