/* Interval readers: did a change pass meanwhile? */
#include <errno.h>
#include <sched.h>
#include <time.h>

#include "common/clock.h"
#include "notifier/internal.h"

enum { SPINS = 100, NAP_NS = 20000 };
static const uint64_t active_mask = (1ull << SEQ_ACTIVE_BITS) - 1;

static bool has_ended(const struct umm_subscription *subscription)
{
	return subscription->epoch != atomic_load(&umm_fork_epoch) || atomic_load(&subscription->released);
}

int umm_read_begin(struct umm_subscription *subscription, uint64_t timeout_ns, uint64_t *seq)
{
	struct umm_space *space = subscription->space;
	if (in_callback_of(subscription))
		return -EDEADLK;
	uint64_t began = 0;
	for (unsigned spins = 0;; spins++) {
		if (has_ended(subscription))
			return -ESRCH;
		if (atomic_load(&subscription->unsettled) && !umm_thread.frames && !umm_thread.open &&
		        phases_drain(&space->changes, timeout_ns) == 0)
			atomic_store(&subscription->unsettled, false);
		if (!atomic_load(&subscription->unsettled) && !atomic_load(&space->reading)) {
			*seq = atomic_load(&subscription->seq);
			if (!(*seq & active_mask))
				return 0;
		}
		if (!began)
			began = umm_now_ns();
		else if (timeout_ns != UINT64_MAX && umm_now_ns() - began > timeout_ns)
			return -ETIMEDOUT;
		if (spins < SPINS)
			sched_yield();
		else
			nanosleep(&(struct timespec){.tv_nsec = NAP_NS}, NULL);
	}
}

bool umm_read_retry(struct umm_subscription *subscription, uint64_t seq)
{
	/* A read-modify-write of the same value, instead of a fence: what was looked at before stays before.
	 */
	while (!has_ended(subscription) && atomic_fetch_add(&subscription->space->reading, 0))
		sched_yield();
	return atomic_fetch_add(&subscription->seq, 0) != seq || has_ended(subscription);
}
