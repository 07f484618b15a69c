/* For tests with an io_uring: a ring with a table of slots, and what a fixed buffer of it delivers. */
#ifndef UMM_TESTS_FIXED_BUFFERS_H
#define UMM_TESTS_FIXED_BUFFERS_H

#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"
#include "kernel/io_uring.h"

/* Ends the program where the machine forbids rings. */
static inline struct umm_io_uring *ring_with_slots(uint32_t slots)
{
	struct umm_io_uring *ring;
	int err = umm_io_uring_create(8, 0, &ring);
	if (err == -ENOSYS || err == -EPERM) {
		fprintf(stderr, "lacks: io_uring (%s; kernel.io_uring_disabled, seccomp)\n", strerror(-err));
		exit(TEST_SKIPPED);
	}
	CHECK_OK(err);
	if (slots)
		CHECK_OK(umm_io_uring_register_slots(umm_io_uring_fd(ring), slots));
	return ring;
}

/* Writes the buffer to a file and reads it back. Bytes, or -errno. */
static inline int64_t deliver(
        struct umm_io_uring *ring, int fd, uint32_t slot, const void *address, uint64_t length, void *into)
{
	const struct umm_io_uring_request request = {
	        .operation = UMM_IO_URING_WRITE_FIXED,
	        .fd = fd,
	        .address = (uintptr_t)address,
	        .length = length,
	        .slot = slot,
	};
	int64_t done = umm_io_uring_transfer(ring, &request);
	if (done == (int64_t)length)
		CHECK(pread(fd, into, length, 0) == (ssize_t)length);
	return done;
}

static inline uint8_t *map_pages(void *at, uint64_t length)
{
	uint8_t *memory = mmap(at, length, PROT_READ | PROT_WRITE,
	        MAP_PRIVATE | MAP_ANONYMOUS | (at ? MAP_FIXED : 0), -1, 0);
	CHECK(memory != MAP_FAILED);
	return memory;
}

#endif
