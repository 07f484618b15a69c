#include "kernel/io_uring.h"

#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

/* The same numbers everywhere; libc headers may be older. */
#ifndef SYS_io_uring_setup
#define SYS_io_uring_setup 425
#define SYS_io_uring_enter 426
#define SYS_io_uring_register 427
#endif

struct sq_offsets {
	uint32_t head, tail, ring_mask, ring_entries, flags, dropped, array, reserved1;
	uint64_t reserved2;
};
struct cq_offsets {
	uint32_t head, tail, ring_mask, ring_entries, overflow, cqes, flags, reserved1;
	uint64_t reserved2;
};
struct setup_arg {
	uint32_t sq_entries, cq_entries, flags, sq_thread_cpu, sq_thread_idle, features, wq_fd, reserved[3];
	struct sq_offsets sq;
	struct cq_offsets cq;
};
struct submission {
	uint8_t opcode, flags;
	uint16_t priority;
	int32_t fd;
	uint64_t offset, address;
	uint32_t length, operation_flags;
	uint64_t user_data;
	uint16_t slot, personality;
	uint32_t reserved1;
	uint64_t reserved2[2];
};
struct completion {
	uint64_t user_data;
	int32_t result;
	uint32_t flags;
};
struct register_arg {
	uint32_t count, flags;
	uint64_t reserved, data, tags;
};
struct update_arg {
	uint32_t offset, reserved1;
	uint64_t data, tags;
	uint32_t count, reserved2;
};
_Static_assert(sizeof(struct setup_arg) == 120, "struct io_uring_params");
_Static_assert(sizeof(struct submission) == 64, "struct io_uring_sqe");
_Static_assert(offsetof(struct submission, slot) == 40, "struct io_uring_sqe");
_Static_assert(sizeof(struct completion) == 16, "struct io_uring_cqe");

enum {
	REGISTER_UNREGISTER_BUFFERS = 1,
	REGISTER_BUFFERS2 = 15,
	REGISTER_BUFFERS_UPDATE = 16,
	RESOURCE_SPARSE = 1 << 0,
	FEATURE_SINGLE_MMAP = 1 << 0,
	ENTER_GETEVENTS = 1 << 0,
};
static const off_t rings_offset = 0, sqes_offset = 0x10000000;

struct umm_io_uring {
	int fd;
	uint8_t *rings; /* both of them */
	uint64_t rings_length;
	struct submission *sqes;
	uint64_t sqes_length;
	uint32_t *sq_head, *sq_tail, *sq_array, sq_mask, sq_entries;
	uint32_t *cq_head, *cq_tail, cq_mask;
	struct completion *cqes;
};

static void *map_of(int fd, uint64_t length, off_t offset)
{
	/* A child that touched the parent's ring would take its completions. */
	void *at = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, offset);
	if (at != MAP_FAILED)
		madvise(at, length, MADV_DONTFORK);
	return at;
}

static int map_rings(struct umm_io_uring *ring, const struct setup_arg *arg)
{
	uint64_t sq_end = arg->sq.array + arg->sq_entries * sizeof(uint32_t);
	uint64_t cq_end = arg->cq.cqes + arg->cq_entries * sizeof(struct completion);
	/* Linux 5.4; what has sparse tables has this. */
	if (!(arg->features & FEATURE_SINGLE_MMAP))
		return -ENOSYS;
	ring->rings_length = sq_end > cq_end ? sq_end : cq_end;
	ring->sqes_length = arg->sq_entries * sizeof(struct submission);
	ring->rings = map_of(ring->fd, ring->rings_length, rings_offset);
	if (ring->rings == MAP_FAILED)
		return -errno;
	ring->sqes = map_of(ring->fd, ring->sqes_length, sqes_offset);
	if (ring->sqes == MAP_FAILED) {
		int error = errno;
		munmap(ring->rings, ring->rings_length);
		return -error;
	}
	ring->sq_head = (uint32_t *)(ring->rings + arg->sq.head);
	ring->sq_tail = (uint32_t *)(ring->rings + arg->sq.tail);
	ring->sq_array = (uint32_t *)(ring->rings + arg->sq.array);
	ring->sq_mask = *(uint32_t *)(ring->rings + arg->sq.ring_mask);
	ring->sq_entries = arg->sq_entries;
	ring->cq_head = (uint32_t *)(ring->rings + arg->cq.head);
	ring->cq_tail = (uint32_t *)(ring->rings + arg->cq.tail);
	ring->cq_mask = *(uint32_t *)(ring->rings + arg->cq.ring_mask);
	ring->cqes = (struct completion *)(ring->rings + arg->cq.cqes);
	return 0;
}

int umm_io_uring_create(uint32_t entries, uint32_t flags, struct umm_io_uring **ret)
{
	struct umm_io_uring *ring = calloc(1, sizeof(*ring));
	if (!ring)
		return -ENOMEM;
	struct setup_arg arg = {.flags = flags};
	/* The descriptor is close-on-exec by itself. */
	ring->fd = (int)syscall(SYS_io_uring_setup, entries, &arg);
	int error = ring->fd < 0 ? -errno : 0;
	if (!error) {
		error = map_rings(ring, &arg);
		if (error)
			close(ring->fd);
	}
	if (error) {
		free(ring);
		return error;
	}
	*ret = ring;
	return 0;
}

void umm_io_uring_destroy(struct umm_io_uring *ring)
{
	munmap(ring->sqes, ring->sqes_length);
	munmap(ring->rings, ring->rings_length);
	close(ring->fd);
	free(ring);
}

int umm_io_uring_fd(const struct umm_io_uring *ring)
{
	return ring->fd;
}

static int enter(struct umm_io_uring *ring, uint32_t submit, uint32_t wait)
{
	for (;;) {
		int done = (int)syscall(SYS_io_uring_enter, ring->fd, submit, wait,
		        wait ? ENTER_GETEVENTS : 0, NULL, (size_t)0);
		if (done >= 0)
			return done;
		if (errno != EINTR)
			return -errno;
	}
}

int umm_io_uring_submit(struct umm_io_uring *ring, const struct umm_io_uring_request *request)
{
	if (request->length > UINT32_MAX || request->slot > UINT16_MAX)
		return -EINVAL;
	uint32_t tail = *ring->sq_tail;
	if (tail - __atomic_load_n(ring->sq_head, __ATOMIC_ACQUIRE) >= ring->sq_entries)
		return -EBUSY;
	uint32_t at = tail & ring->sq_mask;
	ring->sqes[at] = (struct submission){
	        .opcode = (uint8_t)request->operation,
	        .fd = request->fd,
	        .offset = request->offset,
	        .address = request->address,
	        .length = (uint32_t)request->length,
	        .user_data = request->user_data,
	        .slot = (uint16_t)request->slot,
	};
	ring->sq_array[at] = at;
	__atomic_store_n(ring->sq_tail, tail + 1, __ATOMIC_RELEASE);
	int done = enter(ring, 1, 0);
	if (done == 1)
		return 0;
	/* Not taken: nobody else reads the queue, so it can be taken back. */
	__atomic_store_n(ring->sq_tail, tail, __ATOMIC_RELEASE);
	return done < 0 ? done : -EBUSY;
}

int umm_io_uring_wait(struct umm_io_uring *ring, uint64_t *user_data, int32_t *result)
{
	uint32_t head = *ring->cq_head;
	while (head == __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE)) {
		int error = enter(ring, 0, 1);
		if (error < 0)
			return error;
	}
	const struct completion *completion = &ring->cqes[head & ring->cq_mask];
	*user_data = completion->user_data;
	*result = completion->result;
	__atomic_store_n(ring->cq_head, head + 1, __ATOMIC_RELEASE);
	return 0;
}

int64_t umm_io_uring_transfer(struct umm_io_uring *ring, const struct umm_io_uring_request *request)
{
	uint64_t user_data;
	int32_t result;
	int error = umm_io_uring_submit(ring, request);
	if (!error)
		error = umm_io_uring_wait(ring, &user_data, &result);
	return error ? error : result;
}

static int register_with(int ring_fd, unsigned operation, void *arg, unsigned count)
{
	int done = (int)syscall(SYS_io_uring_register, ring_fd, operation, arg, count);
	return done < 0 ? -errno : done;
}

int umm_io_uring_register_slots(int ring_fd, uint32_t slots)
{
	struct register_arg arg = {.count = slots, .flags = RESOURCE_SPARSE};
	return register_with(ring_fd, REGISTER_BUFFERS2, &arg, sizeof(arg));
}

int umm_io_uring_unregister_slots(int ring_fd)
{
	return register_with(ring_fd, REGISTER_UNREGISTER_BUFFERS, NULL, 0);
}

int umm_io_uring_update_slot(int ring_fd, uint32_t slot, uint64_t address, uint64_t length)
{
	struct iovec buffer = {.iov_base = length ? (void *)(uintptr_t)address : NULL, .iov_len = length};
	uint64_t tag = 0;
	struct update_arg arg = {
	        .offset = slot,
	        .data = (uintptr_t)&buffer,
	        .tags = (uintptr_t)&tag,
	        .count = 1,
	};
	int done = register_with(ring_fd, REGISTER_BUFFERS_UPDATE, &arg, sizeof(arg));
	if (done < 0)
		return done;
	return done == 1 ? 0 : -EFAULT;
}
