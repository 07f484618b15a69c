/* Fixed buffers of an io_uring that stay right while memory changes.
 *
 * A ring pins the pages of its fixed buffers: after MADV_DONTNEED and a refill WRITE_FIXED delivers the old
 * bytes, READ_FIXED fills pages that nobody sees, and the pager cannot move a pinned page away. Here a slot
 * of the ring's table is emptied before its memory changes and registered anew afterwards.
 *
 * The ring is the user's (liburing or any other), given by its descriptor; it may not be SINGLE_ISSUER, as
 * the slots are updated by another thread. What the kernel does with requests in flight: an update never
 * waits for them; they go on with the pages they had, which stay pinned until they are done. So requests are
 * counted:
 *
 *   umm_notify_io_uring_use(buffers, slot, ...)     registers the slot if it has to be; then submit
 *   umm_notify_io_uring_done(buffers, slot)         after the completion
 *
 * and an ordered change of the slot's memory waits for those in flight, up to the limit (an eviction is given
 * up after it, other changes happen). Without use and done the slot is as right as the change is ordered:
 * emptied and registered around it, but nobody waits for requests in flight, what the kernel tells afterwards
 * comes too late, and after an eviction the slot stays empty (requests fail with -EFAULT) until it is used.
 *
 * All functions may be called from any thread but not from a callback of the notifier's; in a forked child
 * only destroy may, which leaves the ring alone. fork leaves slots as they are: since Linux 5.12 a child gets
 * copies of pinned pages, and the parent keeps the pages. */
#ifndef UMM_NOTIFIER_IO_URING_H
#define UMM_NOTIFIER_IO_URING_H

#include <stdbool.h>
#include <stdint.h>

struct umm_notify_io_uring;

struct umm_notify_io_uring_options {
	const char *name;      /* NULL: "io_uring" */
	int ring_fd;           /* stays the caller's, and open until destroy */
	uint32_t first, slots; /* of the ring's table, which is there already; nobody else updates them */
	uint64_t limit_ns;     /* how long a change waits for a slot's requests; 0: not at all */
	bool at_use; /* register at the next use, not at the end of the change: memory that was given
	                back with MADV_DONTNEED is not read in at once */
};

struct umm_notify_io_uring_slot {
	uint64_t address, length;
	uint64_t generation; /* grows with every change of the memory that was told of */
	uint32_t requests;   /* in use now */
	bool registered;     /* the ring has the buffer */
	int error;           /* -errno of the last registration: -EFAULT when the memory was gone; else 0 */
};

struct umm_notify_io_uring_stats {
	uint64_t registered;  /* updates that pinned a buffer */
	uint64_t emptied;     /* slots emptied because of a change */
	uint64_t repeated;    /* registrations undone because the memory changed meanwhile */
	uint64_t kept_pinned; /* changes that went on with requests in flight */
};

/* -EEXIST: the ring is SINGLE_ISSUER. -ENXIO: it has no table. -EINVAL: not that many slots. */
int umm_notify_io_uring_create(
        const struct umm_notify_io_uring_options *options, struct umm_notify_io_uring **ret);
/* Empties the slots. -EBUSY: some are in use. */
int umm_notify_io_uring_destroy(struct umm_notify_io_uring *buffers);
/* Registers [address, address + length), up to 1 GiB, in a free slot of its own: its number in the ring's
 * table. -ENOSPC: none is free. -EFAULT: not mapped or not writable. -ENOMEM: RLIMIT_MEMLOCK. */
int umm_notify_io_uring_add(
        struct umm_notify_io_uring *buffers, uint64_t address, uint64_t length, uint32_t *slot);
/* -EBUSY: in use. -EINVAL: no such slot, here and below. */
int umm_notify_io_uring_remove(struct umm_notify_io_uring *buffers, uint32_t slot);
/* Before a request with this slot is submitted: the ring has the memory that is there now. *generation (may
 * be NULL) differs from the last one if the memory changed since. -EFAULT, -ENOMEM: it cannot be registered
 * now. -ETIMEDOUT: it is changing. */
int umm_notify_io_uring_use(
        struct umm_notify_io_uring *buffers, uint32_t slot, uint64_t timeout_ns, uint64_t *generation);
int umm_notify_io_uring_done(struct umm_notify_io_uring *buffers, uint32_t slot);
int umm_notify_io_uring_look(
        struct umm_notify_io_uring *buffers, uint32_t slot, struct umm_notify_io_uring_slot *ret);
void umm_notify_io_uring_stats(struct umm_notify_io_uring *buffers, struct umm_notify_io_uring_stats *ret);

#endif
