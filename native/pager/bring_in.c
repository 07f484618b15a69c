/* Bringing ranges in without a fault: prefetch, populate, and what asynchronous stores deliver. */
#include "pager/internal.h"

#include <errno.h>
#include <sys/mman.h>
#include <time.h>

#include "common/clock.h"
#include "common/lock.h"

static const uint64_t populate_slice = 256 << 10, populate_part = 8 << 20;
static const long yield_ns = 20000;

static void pause_briefly(void)
{
	nanosleep(&(struct timespec){.tv_nsec = yield_ns}, NULL);
}

static uint64_t run_of_missing(struct umm_region *region, uint64_t first, uint64_t count, uint64_t max)
{
	uint64_t n = 0;
	while (n < count && n < max && unit_state(region, first + n) == UNIT_MISSING &&
	        !unit_flag(region, first + n, UNIT_SPILLED) && !has_zeroed(region, first + n))
		n++;
	return n;
}

static void mark_present(struct umm_region *region, uint64_t unit, bool prefetched)
{
	if (prefetched) {
		unit_mark(region, unit, UNIT_PREFETCHED);
		region->counters.prefetch_installed++;
		region->uf->counters.prefetch_installed++;
	}
	if (unit_set_present(region, unit) & UNIT_WANTED)
		wake_unit(region, unit);
	region->counters.bytes_fetched += region->unit;
	region->uf->counters.bytes_fetched += region->unit;
}

/* Bytes in place: one COPY straight from the store's memory. Lock held. Units done, 0 for "not this way",
 * or -errno. */
static int64_t bring_peeked(
        struct umm_region *region, uint64_t first, uint64_t count, bool prefetched, uint64_t slice)
{
	struct umm_store *store = region->store;
	if (region->huge)
		return 0;
	uint64_t n = run_of_missing(region, first, count, slice / region->unit ? slice / region->unit : 1);
	const void *bytes = NULL;
	if (!n)
		return 0;
	if (store->ops == umm_store_zero_ops) {
		uint64_t most = region->pager->buffer_bytes / region->unit;
		n = n < most ? n : most;
		bytes = region->pager->zeros;
	} else if (store->ops->peek && unit_store_bytes(region, first + n - 1) == region->unit) {
		bytes = store->ops->peek(store, first * region->unit, n * region->unit);
	}
	if (!bytes)
		return 0;
	int err = install_units(region, first, n, bytes);
	if (err)
		return err;
	for (uint64_t i = 0; i < n; i++)
		mark_present(region, first + i, prefetched);
	return (int64_t)n;
}

/* Read into the buffer without the lock, then install. Lock held on entry and on return. */
static int64_t bring_fetched(struct umm_region *region, uint64_t first, uint64_t count, bool prefetched,
        uint64_t slice, uint8_t *buffer)
{
	struct umm_uf *uf = region->uf;
	uint64_t most = region->huge ? 1 : uf->pager->buffer_bytes / region->unit;
	if (slice / region->unit < most)
		most = slice / region->unit ? slice / region->unit : 1;
	uint64_t n = run_of_missing(region, first, count, most);
	if (n == 0)
		n = 1; /* spilled, or with removed pages: one by one */
	uint32_t word = region->units[first];
	uint8_t layer = region->layers ? region->layers[first] : 0;
	for (uint64_t i = 0; i < n; i++)
		unit_set(region, first + i, UNIT_FETCHING, 0);
	claim_begin(region);
	pthread_mutex_unlock(&uf->lock);
	int error = 0;
	uint64_t ready = 0;
	for (; ready < n && !error; ready++)
		error = fetch_unit(region, first + ready, word, layer, buffer + ready * region->unit);
	uint64_t fetched = error ? ready - 1 : ready;
	pthread_mutex_lock(&uf->lock);
	int err = 0;
	for (uint64_t i = 0; i < n; i++) {
		if (i >= fetched && !(error && i == fetched)) {
			/* Behind a unit that failed: not asked for. */
			if (!claim_lost(region, first + i) &&
			        unit_set(region, first + i, UNIT_MISSING, 0) & UNIT_WANTED)
				wake_unit(region, first + i);
			continue;
		}
		const uint8_t *data = buffer + i * region->unit;
		bool failed = error && i == fetched;
		if (failed && prefetched) {
			/* A demand fault that came meanwhile tries for itself, as often as the store's policy
			 * says. */
			if (!claim_lost(region, first + i) &&
			        unit_set(region, first + i, UNIT_MISSING, 0) & UNIT_WANTED)
				wake_unit(region, first + i);
			err = error;
			continue;
		}
		uint64_t hash = failed ? 0 : hash_fetched(region, word, data);
		int one = finish_claim(region, first + i, data, failed ? error : 0, hash, prefetched);
		if (!one) {
			region->counters.bytes_fetched += region->unit;
			uf->counters.bytes_fetched += region->unit;
			if (prefetched) {
				region->counters.prefetch_installed++;
				uf->counters.prefetch_installed++;
			}
		} else if (!err) {
			err = one;
		}
	}
	claim_end(region);
	return err ? err : (int64_t)n;
}

int bring_in(struct umm_region *region, uint64_t first, uint64_t count, bool prefetched, uint64_t slice,
        uint8_t *buffer)
{
	struct umm_uf *uf = region->uf;
	uint64_t end = first + count;
	for (uint64_t unit = first; unit < end;) {
		pthread_mutex_lock(&uf->lock);
		int64_t n = 1;
		if (region->closing) {
			n = -ECANCELED;
		} else if (unit_state(region, unit) == UNIT_POISONED && !prefetched) {
			n = -EIO;
		} else if (unit_state(region, unit) == UNIT_MISSING) {
			if (region->store->ops->request && !unit_flag(region, unit, UNIT_SPILLED)) {
				unit_set(region, unit, UNIT_FETCHING, 0);
				n = request_unit(region, unit, NULL);
				if (n < 0)
					unit_set(region, unit, UNIT_MISSING, 0);
				else
					n = 1;
			} else {
				n = bring_peeked(region, unit, end - unit, prefetched, slice);
				if (n == 0)
					n = bring_fetched(
					        region, unit, end - unit, prefetched, slice, buffer);
			}
		}
		pthread_mutex_unlock(&uf->lock);
		if (n == -EAGAIN || n == -ENOMEM) {
			if (prefetched)
				return (int)n;
			pause_briefly();
			continue;
		}
		if (n < 0)
			return (int)n;
		unit += (uint64_t)n;
	}
	return 0;
}

static int check_range(const struct umm_region *region, uint64_t offset, uint64_t len)
{
	return offset > region->mapped || len > region->mapped - offset ? -EINVAL : 0;
}

/* Asynchronous stores answer later: wait until nothing of the range is on its way. */
static int wait_for_answers(struct umm_region *region, uint64_t first, uint64_t count)
{
	for (uint64_t unit = first; unit < first + count;) {
		pthread_mutex_lock(&region->uf->lock);
		int state = unit_state(region, unit);
		pthread_mutex_unlock(&region->uf->lock);
		if (state == UNIT_POISONED)
			return -EIO;
		if (state == UNIT_FETCHING)
			pause_briefly();
		else
			unit++;
	}
	return 0;
}

int umm_region_populate(struct umm_region *region, uint64_t offset, uint64_t len)
{
	if (region->unserved)
		return -ENODEV;
	struct umm_pager *pager = region->pager;
	int err = check_range(region, offset, len);
	if (err || !len)
		return err;
	uint64_t first = offset / region->unit, last = (offset + len - 1) / region->unit;
	uint8_t *buffer = map_anonymous(pager->buffer_bytes, pager->pmd);
	if (!buffer)
		return -ENOMEM;
	if (region->huge)
		madvise(buffer, pager->buffer_bytes, MADV_HUGEPAGE);
	sigset_t saved;
	block_signals(&saved);
	/* In parts, so that eviction keeps up with a range larger than the budget. */
	uint64_t part = populate_part, room = resident_limit(pager) - evict_target(pager);
	if (atomic_load(&pager->budget) && part > room)
		part = room;
	part = part / region->unit ? part / region->unit : 1;
	for (uint64_t unit = first; unit <= last && !err; unit += part) {
		uint64_t n = last + 1 - unit < part ? last + 1 - unit : part;
		while (atomic_load(&pager->budget) && !atomic_load(&pager->evict_stuck) &&
		        atomic_load(&pager->resident) > evict_target(pager)) {
			evictor_wake(pager);
			pause_briefly();
		}
		err = bring_in(region, unit, n, false, populate_slice, buffer);
	}
	restore_signals(&saved);
	if (!err && region->store->ops->request)
		err = wait_for_answers(region, first, last + 1 - first);
	munmap(buffer, pager->buffer_bytes);
	return err;
}

/* A run of units that the data fits into as they are: MISSING, or asked for. Lock held. */
static uint64_t run_of_deliverable(struct umm_region *region, uint64_t first, uint64_t count)
{
	uint64_t n = 0, most = populate_slice / 4 / region->unit;
	if (!most)
		most = 1;
	for (; n < count && n < most; n++) {
		int state = unit_state(region, first + n);
		if (unit_flag(region, first + n, UNIT_SPILLED | UNIT_WAS_REMOVED) ||
		        has_zeroed(region, first + n))
			break;
		if (state != UNIT_MISSING && !(state == UNIT_FETCHING && region->store->ops->request))
			break;
	}
	return n;
}

static void answered(struct umm_region *region, uint64_t unit, uint64_t delivered_ns)
{
	struct times times;
	if (request_times(region, unit, &times)) {
		times.fetched = delivered_ns;
		record_latency(region, &times);
	}
	request_done(region, unit);
}

int umm_region_deliver(
        struct umm_region *region, uint64_t offset, uint64_t len, const void *data, uint64_t *installed)
{
	struct umm_uf *uf = region->uf;
	if (check_range(region, offset, len) || offset % region->unit || len % region->unit)
		return -EINVAL;
	uint64_t first = offset / region->unit, count = len / region->unit, new_units = 0;
	uint64_t delivered_ns = umm_now_ns();
	const uint8_t *bytes = data;
	int err = 0;
	sigset_t saved;
	block_signals(&saved);
	pthread_mutex_lock(&uf->lock);
	claim_begin(region);
	for (uint64_t i = 0; i < count && !err;) {
		uint64_t unit = first + i;
		const void *part = bytes ? bytes + i * region->unit : NULL;
		if (region->closing) {
			err = -ECANCELED;
			break;
		}
		uint64_t n = run_of_deliverable(region, unit, count - i);
		int state = unit_state(region, unit);
		if (n) {
			int one = install_units(region, unit, n, part);
			if (one == -EAGAIN || one == -ENOMEM) {
				pthread_mutex_unlock(&uf->lock);
				pause_briefly();
				pthread_mutex_lock(&uf->lock);
				continue;
			}
			err = one;
			for (uint64_t k = 0; k < n && !err; k++) {
				const uint8_t *at = bytes ? (const uint8_t *)part + k * region->unit
				                          : region->pager->zeros;
				if (unit_state(region, unit + k) == UNIT_FETCHING)
					answered(region, unit + k, delivered_ns);
				note_stored(
				        region, unit + k, region->hashes ? hash_bytes(at, region->unit) : 0);
				mark_present(region, unit + k, false);
			}
			new_units += err ? 0 : n;
			i += n;
			continue;
		}
		if (state == UNIT_FETCHING && region->store->ops->request) {
			const void *at = part ? part : region->pager->zeros;
			uint64_t hash = region->hashes ? hash_bytes(at, region->unit) : 0;
			int one = finish_claim(region, unit, part, 0, hash, false);
			if (one == 0) {
				new_units++;
				answered(region, unit, delivered_ns);
			} else {
				request_done(region, unit);
			}
		}
		i++;
	}
	claim_end(region);
	pthread_mutex_unlock(&uf->lock);
	restore_signals(&saved);
	if (installed)
		*installed = new_units;
	return err;
}

int umm_region_fail(struct umm_region *region, uint64_t offset, uint64_t len, int error)
{
	struct umm_uf *uf = region->uf;
	if (check_range(region, offset, len) || !error)
		return -EINVAL;
	if (!len)
		return 0;
	uint64_t first = offset / region->unit, last = (offset + len - 1) / region->unit;
	sigset_t saved;
	block_signals(&saved);
	for (uint64_t unit = first; unit <= last; unit++) {
		pthread_mutex_lock(&uf->lock);
		int state = unit_state(region, unit);
		if (state == UNIT_FETCHING && region->store->ops->request) {
			region->counters.store_errors++;
			uf->counters.store_errors++;
			request_done(region, unit);
			finish_claim(region, unit, NULL, error < 0 ? error : -error, 0, false);
		} else if (state == UNIT_MISSING && !unit_flag(region, unit, UNIT_SPILLED)) {
			poison_unit(region, unit, error);
		}
		pthread_mutex_unlock(&uf->lock);
	}
	restore_signals(&saved);
	return 0;
}

int umm_region_refuse(struct umm_region *region, uint64_t offset, uint64_t len, int error)
{
	struct umm_uf *uf = region->uf;
	if (check_range(region, offset, len) || !error || len != region->unit)
		return -EINVAL;
	uint64_t unit = offset / region->unit;
	sigset_t saved;
	block_signals(&saved);
	pthread_mutex_lock(&uf->lock);
	bool again = unit_state(region, unit) == UNIT_FETCHING && request_again(region, unit);
	if (again) {
		region->counters.store_errors++;
		uf->counters.store_errors++;
	}
	pthread_mutex_unlock(&uf->lock);
	restore_signals(&saved);
	return again ? 0 : umm_region_fail(region, offset, len, error);
}
