#include "notifier/cache.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "common/clock.h"
#include "notifier/cache_internal.h"
#include "notifier/watch.h"

static const uint64_t settle_ns = 1000000000, patience_ns = 100000000;

/* -- the whole ------------------------------------------------------------------------------ */

int cache_begin(struct umm_cache *cache)
{
	pthread_condattr_t attributes;
	pthread_condattr_init(&attributes);
	pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
	pthread_cond_init(&cache->changed, &attributes);
	pthread_condattr_destroy(&attributes);
	pthread_mutex_init(&cache->lock, NULL);
	if (cache->options.follow == UMM_CACHE_FOLLOW_KERNEL) {
		int err = umm_watch_create(umm_space_self(), &cache->watch);
		if (err)
			return err;
	}
	return umm_subscriber_create(
	        &(struct umm_subscriber_options){
	                .name = cache->name,
	                .ops = &cache_notifier_ops,
	                .sleeping = true,
	                .late = UMM_LATE_KEEP,
	                .limit_ns = cache->options.limit_ns,
	                .queue = 1024 + 2 * cache->options.entries_max,
	        },
	        &cache->subscriber);
}

void cache_end(struct umm_cache *cache)
{
	if (cache->subscriber)
		umm_subscriber_destroy(cache->subscriber);
	if (cache->watch)
		umm_watch_destroy(cache->watch);
	cache->subscriber = NULL;
	cache->watch = NULL;
}

static void free_memory(struct umm_cache *cache)
{
	cache_end(cache);
	if (cache->owned)
		cache_unmark_owned(cache);
	free(cache->kept);
	free(cache->entries);
	free(cache->index);
	free(cache);
}

int umm_cache_create(const struct umm_cache_options *options, struct umm_cache **ret)
{
	enum { ENTRIES_MOST = 1 << 20 };
	if (!options->entries_max || options->entries_max > ENTRIES_MOST || !options->ops ||
	        options->follow > UMM_CACHE_FOLLOW_NOTHING)
		return -EINVAL;
	struct umm_cache *cache = calloc(1, sizeof(*cache));
	if (!cache)
		return -ENOMEM;
	cache->options = *options;
	strncpy(cache->name, options->name ? options->name : "cache", UMM_NOTIFY_NAME_MAX);
	cache->page = (uint64_t)sysconf(_SC_PAGESIZE);
	cache->entries = calloc(options->entries_max, sizeof(*cache->entries));
	cache->index = calloc(options->entries_max, sizeof(struct umm_cache_entry *));
	int err = cache->entries && cache->index ? cache_mark_owned(cache) : -ENOMEM;
	if (!err) {
		cache_entries_init(cache);
		err = cache_begin(cache);
	}
	if (err) {
		free_memory(cache);
		return err;
	}
	*ret = cache;
	return 0;
}

/* Under the lock, which it drops. */
static void trim(struct umm_cache *cache)
{
	for (struct umm_cache_entry *entry; (entry = cache_oldest_unused(cache));) {
		cache_kill(entry);
		cache_dispose_if_done(entry);
	}
}

void umm_cache_trim(struct umm_cache *cache)
{
	cache_enter(cache);
	pthread_mutex_lock(&cache->lock);
	trim(cache);
	pthread_mutex_unlock(&cache->lock);
}

static bool is_used(const struct umm_cache *cache)
{
	return cache->stats.in_use || cache->registering;
}

/* Entries that callbacks or other threads dispose of are theirs until they are free. */
static void await_disposals(struct umm_cache *cache)
{
	for (uint32_t i = 0; i < cache->options.entries_max; i++)
		while (cache->entries[i].state != ENTRY_FREE)
			cache_wait(cache, umm_now_ns() + settle_ns);
}

int umm_cache_destroy(struct umm_cache *cache)
{
	cache_enter(cache);
	pthread_mutex_lock(&cache->lock);
	bool used = is_used(cache);
	if (!used) {
		trim(cache);
		await_disposals(cache);
	}
	pthread_mutex_unlock(&cache->lock);
	if (used)
		return -EBUSY;
	pthread_mutex_destroy(&cache->lock);
	pthread_cond_destroy(&cache->changed);
	free_memory(cache);
	return 0;
}

void umm_cache_stats(struct umm_cache *cache, struct umm_cache_stats *ret)
{
	cache_enter(cache);
	pthread_mutex_lock(&cache->lock);
	*ret = cache->stats;
	pthread_mutex_unlock(&cache->lock);
}

/* -- get: a hit ----------------------------------------------------------------------------- */

static void hand_out(struct umm_cache_entry *entry, bool hit, struct umm_cache_handle *ret)
{
	struct umm_cache *cache = entry->cache;
	*ret = (struct umm_cache_handle){
	        .registration = entry->registration,
	        .address = entry->address,
	        .length = entry->length,
	        .entry = entry,
	        .epoch = cache->epoch,
	        .hit = hit,
	};
	cache->stats.in_use++;
}

static void unref(struct umm_cache_entry *entry)
{
	if (!--entry->refs)
		pthread_cond_broadcast(&entry->cache->changed);
	cache_dispose_if_done(entry);
}

static bool is_followed(const struct umm_cache *cache)
{
	return cache->options.follow != UMM_CACHE_FOLLOW_NOTHING;
}

/* Something began since the registration that this entry may have outlived (a fork), or that is not delivered
 * yet. When all is delivered and it still lives, it is as good as new. */
static void look_closely(struct umm_cache_entry *entry)
{
	struct umm_cache *cache = entry->cache;
	uint64_t deadline_ns = umm_now_ns() + settle_ns, seq = 0;
	bool delivered = false;
	entry->pins++;
	pthread_mutex_unlock(&cache->lock);
	int err = umm_read_begin(entry->subscription, settle_ns, &seq);
	while (!err && !(delivered = cache_is_delivered(cache)) && umm_now_ns() < deadline_ns)
		nanosleep(&(struct timespec){.tv_nsec = 20000}, NULL);
	pthread_mutex_lock(&cache->lock);
	if (entry->state == ENTRY_LIVE) {
		if (delivered) {
			entry->seq = seq;
		} else {
			cache_kill(entry);
			cache->stats.invalidated++;
		}
	}
	entry->pins--;
	cache_dispose_if_done(entry);
}

/* Under the lock, which it may drop. True: handed out. */
static bool find(struct umm_cache *cache, uint64_t start, uint64_t end, struct umm_cache_handle *ret)
{
	struct umm_cache_entry *entry;
	for (;;) {
		entry = cache_find(cache, start, end);
		if (entry) {
			if (!is_followed(cache) || !umm_read_retry(entry->subscription, entry->seq))
				break;
			look_closely(entry);
		} else if (cache_find_registering(cache, start, end)) {
			cache_wait(cache, umm_now_ns() + settle_ns);
		} else {
			return false;
		}
	}
	entry->refs++;
	cache->stats.hits++;
	cache_used_now(entry);
	hand_out(entry, true, ret);
	return true;
}

/* An address that was unmapped by another thread can be somebody's again while the kernel's word of it is on
 * its way. False: it does not come; what is known of addresses may be old. */
static bool has_settled(struct umm_cache *cache)
{
	if (!cache->watch)
		return true;
	uint64_t deadline_ns = umm_now_ns() + patience_ns;
	int changing;
	while ((changing = umm_watch_changing(cache->watch)) == 1 && umm_now_ns() < deadline_ns)
		sched_yield();
	return changing == 0;
}

/* -- get: a miss ---------------------------------------------------------------------------- */

/* Under the lock, which it drops. */
static void make_room(struct umm_cache *cache, uint64_t length)
{
	for (;;) {
		bool full = !cache->free || (cache->options.bytes_max &&
		                                    cache->stats.bytes + length > cache->options.bytes_max);
		struct umm_cache_entry *entry = full ? cache_oldest_unused(cache) : NULL;
		if (!entry)
			return;
		cache->stats.evicted++;
		cache_kill(entry);
		cache_dispose_if_done(entry);
	}
}

static int enroll(struct umm_cache *cache, uint64_t address, uint64_t length, void **registration)
{
	return cache->options.ops->enroll(cache->options.context, address, length, registration);
}

/* Without the lock. 0: registered, and current when `*current`. */
static int register_once(struct umm_cache_entry *entry, bool *current)
{
	struct umm_cache *cache = entry->cache;
	void *registration;
	uint64_t seq = 0;
	int err = is_followed(cache) ? umm_read_begin(entry->subscription, settle_ns, &seq) : 0;
	if (err)
		return err;
	err = enroll(cache, entry->address, entry->length, &registration);
	if (err)
		return err;
	pthread_mutex_lock(&cache->lock);
	entry->registration = registration;
	entry->seq = seq;
	/* From here on a change finds the entry, or is seen here. */
	*current = !is_followed(cache) || !umm_read_retry(entry->subscription, seq);
	cache->stats.registered++;
	if (*current) {
		entry->registered = true;
		cache_publish(entry);
		pthread_cond_broadcast(&cache->changed);
	} else {
		cache->stats.deregistered++;
		cache->stats.repeated++;
	}
	pthread_mutex_unlock(&cache->lock);
	if (!*current)
		cache->options.ops->deregister(cache->options.context, registration);
	return 0;
}

static int register_entry(struct umm_cache_entry *entry)
{
	enum { TRIES = 16 };
	struct umm_cache *cache = entry->cache;
	int err = 0;
	/* A region of the pager's, say, or nothing at all: `enroll` will tell. */
	if (cache->watch && cache_watch(cache, entry->address, entry->address + entry->length))
		return -EAGAIN;
	if (is_followed(cache))
		err = umm_subscribe(umm_space_self(), cache->subscriber, entry->address,
		        entry->address + entry->length, entry, &entry->subscription);
	bool current = false;
	for (int i = 0; !err && !current && i < TRIES; i++)
		err = register_once(entry, &current);
	return err ? err : current ? 0 : -EAGAIN;
}

/* For one use. */
static int register_uncached(
        struct umm_cache *cache, uint64_t start, uint64_t end, struct umm_cache_handle *ret)
{
	*ret = (struct umm_cache_handle){.address = start, .length = end - start, .epoch = cache->epoch};
	int err = enroll(cache, start, end - start, &ret->registration);
	if (err)
		return err;
	pthread_mutex_lock(&cache->lock);
	cache->stats.registered++;
	cache->stats.uncached++;
	cache->stats.in_use++;
	pthread_mutex_unlock(&cache->lock);
	return 0;
}

static void retire_covered(struct umm_cache_entry *entry)
{
	for (struct umm_cache_entry *covered; (covered = cache_find_covered(entry));) {
		entry->cache->stats.retired++;
		cache_kill(covered);
		cache_dispose_if_done(covered);
	}
}

int umm_cache_get(struct umm_cache *cache, uint64_t address, uint64_t length, struct umm_cache_handle *ret)
{
	cache_enter(cache);
	uint64_t start = address & ~(cache->page - 1), end = address + length;
	if (!length || end < address || end > UINT64_MAX - cache->page)
		return -EINVAL;
	end = (end + cache->page - 1) & ~(cache->page - 1);
	bool settled = has_settled(cache);
	pthread_mutex_lock(&cache->lock);
	struct umm_cache_entry *entry = NULL;
	if (cache->subscriber && settled) {
		if (find(cache, start, end, ret)) {
			pthread_mutex_unlock(&cache->lock);
			return 0;
		}
		make_room(cache, end - start);
		/* Meanwhile somebody may have registered it: then this one is the second, and goes at its
		 * put. */
		entry = cache_entry_take(cache, start, end - start);
	}
	cache->stats.misses++;
	pthread_mutex_unlock(&cache->lock);
	if (!entry)
		return register_uncached(cache, start, end, ret);
	int err = register_entry(entry);
	pthread_mutex_lock(&cache->lock);
	if (err) {
		cache_kill(entry);
		unref(entry);
	} else {
		hand_out(entry, false, ret);
		retire_covered(entry);
	}
	pthread_mutex_unlock(&cache->lock);
	/* It cannot be watched, it changes all the time, or changes are not told any more: what it is now,
	 * for one use. */
	bool unfollowed = err == -EAGAIN || err == -ETIMEDOUT || err == -ESRCH || err == -EDEADLK;
	return unfollowed ? register_uncached(cache, start, end, ret) : err;
}

int umm_cache_put(struct umm_cache *cache, struct umm_cache_handle *handle)
{
	cache_enter(cache);
	struct umm_cache_handle taken = *handle;
	*handle = (struct umm_cache_handle){0};
	if (!taken.length)
		return -EINVAL;
	if (taken.epoch != cache->epoch)
		return 0; /* the parent's */
	pthread_mutex_lock(&cache->lock);
	cache->stats.in_use--;
	if (taken.entry)
		unref(taken.entry);
	else
		cache->stats.deregistered++;
	pthread_mutex_unlock(&cache->lock);
	if (!taken.entry)
		cache->options.ops->deregister(cache->options.context, taken.registration);
	return 0;
}
