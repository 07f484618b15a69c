/* The slots of umm_notify_io_uring: what io_uring.c (the functions of the user's) and io_uring_slot.c (one
 * slot, and the callbacks) share. */
#ifndef UMM_NOTIFIER_IO_URING_INTERNAL_H
#define UMM_NOTIFIER_IO_URING_INTERNAL_H

#include <pthread.h>

#include "common/clock.h"
#include "kernel/io_uring.h"
#include "notifier/io_uring.h"
#include "notifier/notifier.h"

enum slot_state {
	SLOT_FREE,
	SLOT_EMPTY,       /* the ring has nothing */
	SLOT_REGISTERING, /* by a thread that does not hold the lock: pinning may fault */
	SLOT_LIVE,
};

struct io_slot {
	struct umm_notify_io_uring *owner;
	struct umm_subscription *subscription;
	uint64_t address, length, generation;
	uint64_t seq; /* of umm_read_begin before the registration; with `seq_known` */
	uint32_t requests, changes /* under way */, users /* threads in here without the lock */;
	int error;
	uint8_t state;
	bool seq_known, stale, ended;
};

struct umm_notify_io_uring {
	pthread_mutex_t lock;
	pthread_cond_t changed;
	struct umm_subscriber *subscriber;
	struct umm_notify_io_uring_stats stats;
	uint64_t limit_ns;
	uint32_t pid, first, n;
	int ring_fd;
	bool at_use;
	struct io_slot slots[];
};

static const uint64_t limit_most_ns = 3600000000000u;

static inline uint32_t number_of(const struct io_slot *slot)
{
	return slot->owner->first + (uint32_t)(slot - slot->owner->slots);
}

static inline uint64_t deadline_of(uint64_t timeout_ns)
{
	return umm_now_ns() + (timeout_ns < limit_most_ns ? timeout_ns : limit_most_ns);
}

/* -- io_uring_slot.c; under the lock -------------------------------------------------------- */

extern const struct umm_notifier_ops io_slot_ops;
void io_slot_empty(struct io_slot *slot);
/* Until the ring has the memory that is there now; waits without the lock. 0; -ETIMEDOUT; -ESRCH; -EDEADLK;
 * the kernel's refusal of the registration. */
int io_slot_settle(struct io_slot *slot, uint64_t deadline_ns);

#endif
