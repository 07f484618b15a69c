/* io_uring(7): as much of it as fixed buffers need.
 *
 * A fixed buffer is memory whose pages a ring has pinned: READ_FIXED and WRITE_FIXED go to those pages,
 * whatever the address maps meanwhile. Constants and layouts from include/uapi/linux/io_uring.h of
 * Linux 6.18; sparse tables of buffers are Linux 5.19. */
#ifndef UMM_KERNEL_IO_URING_H
#define UMM_KERNEL_IO_URING_H

#include <stdint.h>

enum umm_io_uring_operation {
	UMM_IO_URING_READ_FIXED = 4,
	UMM_IO_URING_WRITE_FIXED = 5,
};

enum umm_io_uring_setup_flag {
	UMM_IO_URING_SINGLE_ISSUER = 1 << 12, /* Linux 6.0 */
};

enum {
	UMM_IO_URING_SLOTS_MAX = 1 << 14,  /* buffers of one ring (IORING_MAX_REG_BUFFERS) */
	UMM_IO_URING_BUFFER_MAX = 1 << 30, /* bytes of one buffer */
};

/* A ring of our own; for one thread at a time. A forked child may only destroy it. */
struct umm_io_uring;

/* -ENOSYS, -EPERM: this machine, its seccomp profile or kernel.io_uring_disabled forbids it. flags: enum
 * umm_io_uring_setup_flag. */
int umm_io_uring_create(uint32_t entries, uint32_t flags, struct umm_io_uring **ret);
/* Requests in flight keep their buffers pinned until they are done, also after this. */
void umm_io_uring_destroy(struct umm_io_uring *ring);
int umm_io_uring_fd(const struct umm_io_uring *ring);

struct umm_io_uring_request {
	uint64_t address, length; /* within the buffer of `slot`; at most UINT32_MAX bytes */
	uint64_t offset;          /* in the file; UINT64_MAX: its current position, and for pipes */
	uint64_t user_data;       /* comes back with the result */
	int32_t operation;        /* enum umm_io_uring_operation */
	int32_t fd;
	uint32_t slot;
};
/* 0: under way. -EBUSY: the ring is full. A slot without a buffer is found at completion (-EFAULT). */
int umm_io_uring_submit(struct umm_io_uring *ring, const struct umm_io_uring_request *request);
/* Waits for the next completion; *result: bytes or -errno. */
int umm_io_uring_wait(struct umm_io_uring *ring, uint64_t *user_data, int32_t *result);
/* One request, and its result: bytes or -errno. No other may be under way. */
int64_t umm_io_uring_transfer(struct umm_io_uring *ring, const struct umm_io_uring_request *request);

/* -- buffers, of any ring that the caller has a descriptor of: io_uring_register(2) -- */

/* A table of `slots` empty slots. -EBUSY: the ring has a table. */
int umm_io_uring_register_slots(int ring_fd, uint32_t slots);
int umm_io_uring_unregister_slots(int ring_fd);
/* The slot's buffer is [address, address + length) now, whose pages are read in and pinned; length 0: the
 * slot is empty. Requests that are under way go on with the pages they had, which stay pinned until then (so
 * it has been since sparse tables; nothing here waits for them). -EFAULT: not mapped, or not writable.
 * -EEXIST: the ring is SINGLE_ISSUER, and this is not the thread that made it. -ENOMEM: RLIMIT_MEMLOCK.
 * -EINVAL: no such slot. -ENXIO: no table. */
int umm_io_uring_update_slot(int ring_fd, uint32_t slot, uint64_t address, uint64_t length);

#endif
