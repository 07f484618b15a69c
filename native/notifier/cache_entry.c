/* The end of an entry: what the notifier tells, and who disposes of it. */
#include <errno.h>
#include <time.h>

#include "common/clock.h"
#include "notifier/cache_internal.h"

static const uint64_t limit_most_ns = 3600000000000u;

void cache_wait(struct umm_cache *cache, uint64_t deadline_ns)
{
	struct timespec until = {
	        .tv_sec = (time_t)(deadline_ns / 1000000000u),
	        .tv_nsec = (long)(deadline_ns % 1000000000u),
	};
	pthread_cond_timedwait(&cache->changed, &cache->lock, &until);
}

bool cache_is_delivered(struct umm_cache *cache)
{
	struct umm_subscriber_stats stats;
	umm_subscriber_stats(cache->subscriber, &stats);
	return !stats.queued && !stats.busy_ns;
}

/* Under the lock, which it drops for the call. */
static void deregister(struct umm_cache_entry *entry)
{
	struct umm_cache *cache = entry->cache;
	if (!entry->registered)
		return;
	entry->registered = false;
	entry->deregistering = true;
	pthread_mutex_unlock(&cache->lock);
	cache->options.ops->deregister(cache->options.context, entry->registration);
	pthread_mutex_lock(&cache->lock);
	entry->deregistering = false;
	cache->stats.deregistered++;
	pthread_cond_broadcast(&cache->changed);
}

void cache_dispose_if_done(struct umm_cache_entry *entry)
{
	struct umm_cache *cache = entry->cache;
	if (entry->state != ENTRY_DEAD || entry->refs || entry->pins || entry->disposing)
		return;
	entry->disposing = true;
	deregister(entry);
	struct umm_subscription *subscription = entry->subscription;
	pthread_mutex_unlock(&cache->lock);
	/* Callbacks of it that wait in here wait for what has happened already. */
	if (subscription)
		umm_unsubscribe(subscription);
	pthread_mutex_lock(&cache->lock);
	cache_entry_free(entry);
	pthread_cond_broadcast(&cache->changed);
}

/* -- callbacks: one thread, the subscriber's ------------------------------------------------ */

/* New lookups do not find it. Those who use it are waited for; the rest is done by the last of them. */
static void drop(struct umm_cache_entry *entry, bool wait)
{
	struct umm_cache *cache = entry->cache;
	if (entry->state == ENTRY_REGISTERING)
		return; /* umm_read_retry tells who registers */
	if (entry->state == ENTRY_LIVE) {
		cache_kill(entry);
		cache->stats.invalidated++;
	}
	uint64_t limit_ns = cache->options.limit_ns < limit_most_ns ? cache->options.limit_ns : limit_most_ns;
	/* Longer than the change waits: so an eviction is given up, and its pages stay with the device. */
	uint64_t deadline_ns = umm_now_ns() + 2 * limit_ns;
	while (wait && (entry->refs || entry->deregistering) && umm_now_ns() < deadline_ns)
		cache_wait(cache, deadline_ns);
	if (entry->refs) {
		cache->stats.overtaken += wait;
	} else {
		/* Whoever pins it may be waiting for this very change to end. */
		deregister(entry);
		cache_dispose_if_done(entry);
	}
}

static int on_start(void *context, const struct umm_notify_event *event)
{
	struct umm_cache_entry *entry = context;
	struct umm_cache *cache = entry->cache;
	bool fork = event->reason == UMM_REASON_FORK;
	if (fork && cache_keeps_at_fork(cache, event->id, entry->address, entry->address + entry->length))
		return 0;
	pthread_mutex_lock(&cache->lock);
	drop(entry, event->promise == UMM_PROMISE_ORDERED && !fork);
	pthread_mutex_unlock(&cache->lock);
	return 0;
}

static void on_replaced(void *context, const struct umm_notify_event *event)
{
	struct umm_cache_entry *entry = context;
	struct umm_cache *cache = entry->cache;
	pthread_mutex_lock(&cache->lock);
	drop(entry, event->flags & UMM_NOTIFY_BLOCKABLE);
	pthread_mutex_unlock(&cache->lock);
}

static void on_release(void *context, const struct umm_notify_event *event)
{
	struct umm_cache_entry *entry = context;
	struct umm_cache *cache = entry->cache;
	if (event->reason == UMM_REASON_UNREGISTER)
		return; /* by us */
	/* The address space ends: users do, too. Their put finds it deregistered. */
	pthread_mutex_lock(&cache->lock);
	if (entry->state == ENTRY_LIVE)
		cache_kill(entry);
	deregister(entry);
	while (entry->deregistering) /* by its last user */
		pthread_cond_wait(&cache->changed, &cache->lock);
	pthread_mutex_unlock(&cache->lock);
}

const struct umm_notifier_ops cache_notifier_ops = {
        .release = on_release,
        .invalidate_range_start = on_start,
        .invalidate_page = on_replaced,
        .change = on_replaced,
};
