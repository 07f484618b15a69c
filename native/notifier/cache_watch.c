/* Watching the mappings that entries lie in.
 *
 * Whole mappings are watched, and stay so: a userfaultfd on a part of one, or taken off a part of one that
 * grew, would cut it in two, and the user's mremap() of it would fail with EFAULT. */
#include <errno.h>

#include "kernel/procmap.h"
#include "notifier/cache_internal.h"
#include "notifier/watch.h"

int cache_watch(struct umm_cache *cache, uint64_t start, uint64_t end)
{
	uint64_t first_start, first_end, last_start, last_end, next_start, next_end;
	int err = umm_procmap_find(start, &first_start, &first_end);
	if (!err)
		err = umm_procmap_find(end - 1, &last_start, &last_end);
	if (err)
		return err;
	bool has_neighbour = umm_procmap_find(last_end, &next_start, &next_end) == 0;
	err = umm_watch_keep(cache->watch, first_start, last_end);
	/* It grew in between: put together again. */
	if (!err && !has_neighbour && umm_procmap_find(last_end, &next_start, &next_end) == 0)
		umm_watch_keep(cache->watch, next_start, next_end);
	return err;
}
