/* A registration cache, as RDMA libraries need it: registering memory with a device is dear, so a
 * registration is kept after its use, and dropped before its memory becomes something else.
 *
 * Entries are ranges of whole pages, as they were asked for. A lookup hits when one entry covers all of it.
 * Overlapping entries stay apart, and one that a new entry covers is retired: merging (as UCX does) would
 * register again what is registered and in use, and would tie the lives of allocations together that have
 * nothing to do with each other but their addresses; so exactly the entries drop that a change touches.
 *
 * Each entry subscribes to its range. On invalidate_range_start it leaves the cache, and is deregistered when
 * nobody uses it; an ordered change waits for the users up to the limit, as the device may be writing to
 * those pages, and goes on after it (an eviction is given up instead); then the last put deregisters. What
 * the kernel tells of calls that did not go through us is noticed by the next lookup at the latest.
 *
 * fork: entries of private memory that is not MADV_DONTFORK are dropped in the parent (copy on write takes
 * the pages from under registrations; kernels since 5.12 give copies to the child instead where pages are
 * pinned, but not every device pins). The child starts with an empty cache and deregisters nothing: what it
 * inherited is the parent's. exit: everything is deregistered, once, in use or not. */
#ifndef UMM_NOTIFIER_CACHE_H
#define UMM_NOTIFIER_CACHE_H

#include <stdbool.h>
#include <stdint.h>

struct umm_cache;
struct umm_cache_entry;

/* Called without any lock, by any thread: the user's or the cache's own. `deregister` is called once for each
 * `enroll` that returned 0. */
struct umm_cache_ops {
	/* Registers `length` bytes of whole pages. 0, and in *registration what deregister gets; or -errno.
	 */
	int (*enroll)(void *context, uint64_t address, uint64_t length, void **registration);
	void (*deregister)(void *context, void *registration);
};

enum umm_cache_follow {
	/* Raw system calls are followed, too; memory that cannot be watched is not cached. */
	UMM_CACHE_FOLLOW_KERNEL,
	/* All changes are made through us, or told by umm_notify_*. */
	UMM_CACHE_FOLLOW_CALLS,
	/* For tests only: nothing is followed. Shows what goes wrong then. */
	UMM_CACHE_FOLLOW_NOTHING,
};

struct umm_cache_options {
	const char *name; /* NULL: "cache" */
	const struct umm_cache_ops *ops;
	void *context;        /* of the ops */
	uint32_t entries_max; /* those in use count; what is asked for beyond is registered for that use only
	                       */
	uint64_t bytes_max;   /* of entries kept; 0: no limit */
	uint64_t limit_ns;    /* how long a change waits for users; 0: not at all */
	int follow;           /* enum umm_cache_follow */
};

/* A registration in use. */
struct umm_cache_handle {
	void *registration;
	uint64_t address, length;      /* what is registered; covers what was asked for */
	struct umm_cache_entry *entry; /* NULL: not cached */
	uint32_t epoch;
	bool hit;
};

struct umm_cache_stats {
	uint64_t hits, misses;
	uint64_t registered, deregistered;
	uint64_t invalidated; /* entries dropped because of a change */
	uint64_t evicted;     /* because of entries_max, bytes_max */
	uint64_t retired;     /* because a new entry covers them */
	uint64_t uncached;    /* registered for one use */
	uint64_t repeated;    /* registrations undone because the memory changed meanwhile */
	uint64_t overtaken;   /* changes that went on while the entry was in use */
	uint64_t entries, bytes, in_use;
};

int umm_cache_create(const struct umm_cache_options *options, struct umm_cache **ret);
/* Deregisters everything. -EBUSY: some are in use. */
int umm_cache_destroy(struct umm_cache *cache);
/* A registration of the pages of [address, address + length). To be put back. Not from a callback of the
 * notifier's. What `enroll` said, -EINVAL, -ENOMEM. */
int umm_cache_get(struct umm_cache *cache, uint64_t address, uint64_t length, struct umm_cache_handle *ret);
/* 0; -EINVAL: put already. A handle that a forked child inherited is forgotten. */
int umm_cache_put(struct umm_cache *cache, struct umm_cache_handle *handle);
/* Drops what nobody uses. */
void umm_cache_trim(struct umm_cache *cache);
void umm_cache_stats(struct umm_cache *cache, struct umm_cache_stats *ret);

#endif
