/* Which entries there are, which covers a range, and which was used last. */
#include <string.h>

#include "notifier/cache_internal.h"

static uint64_t end_of(const struct umm_cache_entry *entry)
{
	return entry->address + entry->length;
}

void cache_entries_init(struct umm_cache *cache)
{
	cache->free = cache->registering = cache->newest = cache->oldest = NULL;
	cache->n = 0;
	for (uint32_t i = cache->options.entries_max; i-- > 0;) {
		cache->entries[i] = (struct umm_cache_entry){.cache = cache, .next = cache->free};
		cache->free = &cache->entries[i];
	}
}

/* Of the first entry that starts after `address`. */
static uint32_t place_after(const struct umm_cache *cache, uint64_t address)
{
	uint32_t low = 0, high = cache->n;
	while (low < high) {
		uint32_t middle = low + (high - low) / 2;
		if (cache->index[middle]->address <= address)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

struct umm_cache_entry *cache_find(struct umm_cache *cache, uint64_t start, uint64_t end)
{
	uint32_t place = place_after(cache, start);
	if (!place || end_of(cache->index[place - 1]) < end)
		return NULL;
	return cache->index[place - 1];
}

struct umm_cache_entry *cache_find_registering(struct umm_cache *cache, uint64_t start, uint64_t end)
{
	for (struct umm_cache_entry *entry = cache->registering; entry; entry = entry->next)
		if (entry->address <= start && end <= end_of(entry))
			return entry;
	return NULL;
}

/* -- lists ---------------------------------------------------------------------------------- */

static void link_first(struct umm_cache_entry **first, struct umm_cache_entry *entry)
{
	entry->previous = NULL;
	entry->next = *first;
	if (entry->next)
		entry->next->previous = entry;
	*first = entry;
}

static void unlink_from(struct umm_cache_entry **first, struct umm_cache_entry *entry)
{
	if (entry->previous)
		entry->previous->next = entry->next;
	else
		*first = entry->next;
	if (entry->next)
		entry->next->previous = entry->previous;
}

static void link_newest(struct umm_cache_entry *entry)
{
	struct umm_cache *cache = entry->cache;
	link_first(&cache->newest, entry);
	if (!cache->oldest)
		cache->oldest = entry;
}

static void unlink_used(struct umm_cache_entry *entry)
{
	struct umm_cache *cache = entry->cache;
	if (cache->oldest == entry)
		cache->oldest = entry->previous;
	unlink_from(&cache->newest, entry);
}

void cache_used_now(struct umm_cache_entry *entry)
{
	if (entry->cache->newest == entry)
		return;
	unlink_used(entry);
	link_newest(entry);
}

struct umm_cache_entry *cache_oldest_unused(struct umm_cache *cache)
{
	struct umm_cache_entry *entry = cache->oldest;
	while (entry && entry->refs)
		entry = entry->previous;
	return entry;
}

/* -- the life of an entry ------------------------------------------------------------------- */

struct umm_cache_entry *cache_entry_take(struct umm_cache *cache, uint64_t address, uint64_t length)
{
	struct umm_cache_entry *entry = cache->free;
	if (!entry)
		return NULL;
	cache->free = entry->next;
	*entry = (struct umm_cache_entry){
	        .cache = cache,
	        .address = address,
	        .length = length,
	        .refs = 1,
	        .state = ENTRY_REGISTERING,
	};
	link_first(&cache->registering, entry);
	return entry;
}

void cache_entry_free(struct umm_cache_entry *entry)
{
	struct umm_cache *cache = entry->cache;
	*entry = (struct umm_cache_entry){.cache = cache, .next = cache->free};
	cache->free = entry;
}

static void insert(struct umm_cache_entry *entry)
{
	struct umm_cache *cache = entry->cache;
	uint32_t place = place_after(cache, entry->address);
	/* One that starts here as well lies within this one, or this one would not be here. */
	while (place && cache->index[place - 1]->address == entry->address)
		place--;
	memmove(&cache->index[place + 1], &cache->index[place], (cache->n - place) * sizeof(cache->index[0]));
	cache->index[place] = entry;
	cache->n++;
}

static uint32_t place_of(const struct umm_cache_entry *entry)
{
	const struct umm_cache *cache = entry->cache;
	uint32_t place = place_after(cache, entry->address);
	/* Up to two start at the same address, while a new entry retires what it covers. */
	while (cache->index[place - 1] != entry)
		place--;
	return place - 1;
}

void cache_publish(struct umm_cache_entry *entry)
{
	struct umm_cache *cache = entry->cache;
	unlink_from(&cache->registering, entry);
	if (cache_find(cache, entry->address, end_of(entry))) {
		entry->state = ENTRY_DEAD;
		return;
	}
	entry->state = ENTRY_LIVE;
	insert(entry);
	link_newest(entry);
	cache->stats.entries++;
	cache->stats.bytes += entry->length;
}

void cache_kill(struct umm_cache_entry *entry)
{
	struct umm_cache *cache = entry->cache;
	if (entry->state == ENTRY_REGISTERING) {
		unlink_from(&cache->registering, entry);
	} else if (entry->state == ENTRY_LIVE) {
		uint32_t place = place_of(entry);
		cache->n--;
		memmove(&cache->index[place], &cache->index[place + 1],
		        (cache->n - place) * sizeof(cache->index[0]));
		unlink_used(entry);
		cache->stats.entries--;
		cache->stats.bytes -= entry->length;
	}
	entry->state = ENTRY_DEAD;
}

struct umm_cache_entry *cache_find_covered(struct umm_cache_entry *entry)
{
	const struct umm_cache *cache = entry->cache;
	if (entry->state != ENTRY_LIVE)
		return NULL;
	/* Those within it stand right behind it. */
	uint32_t place = place_of(entry) + 1;
	if (place < cache->n && end_of(cache->index[place]) <= end_of(entry))
		return cache->index[place];
	return NULL;
}
