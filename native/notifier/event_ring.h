/* Events of other processes in shared memory: many write, none of them ever waits; one reads. What finds the
 * ring full is counted and lost. No malloc, no lock; a writer may be a signal handler, or killed half way. */
#ifndef UMM_NOTIFIER_EVENT_RING_H
#define UMM_NOTIFIER_EVENT_RING_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "notifier/notifier.h"

struct umm_event_slot {
	/* Position of who may write here next; +1 when it was written. */
	_Atomic uint64_t turn;
	struct umm_notify_event event;
};

struct umm_event_ring {
	uint64_t magic;
	uint64_t bytes;             /* of all this */
	uint64_t capacity;          /* slots, a power of two */
	_Atomic uint64_t processes; /* that opened it */
	_Atomic uint64_t ids;       /* of events */
	_Atomic uint64_t lost;
	_Alignas(64) _Atomic uint64_t head; /* next position to be written */
	_Alignas(64) uint64_t tail;         /* next to be read: the reader's */
	uint64_t stuck_since_ns;            /* likewise: the writer at `tail` has not come back; 0: not so */
	_Alignas(64) struct umm_event_slot slots[];
};

/* The reader's side. *fd: a memfd (close-on-exec) that writers open as /proc/PID/fd/FD.
 * -EINVAL: capacity is no power of two, or above 2^24. */
int umm_event_ring_create(uint64_t capacity, struct umm_event_ring **ret, int *fd);
void umm_event_ring_destroy(struct umm_event_ring *ring, int fd);
/* Up to `max` events in the order of their writing; how many. A writer that began and for a second did
 * not end (it was killed) counts as lost. */
uint64_t umm_event_ring_take(struct umm_event_ring *ring, struct umm_notify_event *ret, uint64_t max);
uint64_t umm_event_ring_lost(const struct umm_event_ring *ring);
uint64_t umm_event_ring_processes(const struct umm_event_ring *ring);

/* The writers' side. NULL: no such ring. */
struct umm_event_ring *umm_event_ring_open(const char *path);
void umm_event_ring_put(struct umm_event_ring *ring, const struct umm_notify_event *event);

#endif
