/* The worker's side of a function store's ring, and the futex that both sides sleep on. */
#include "store/ring.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

struct umm_ring {
	struct ring_shared *shared;
	uint64_t bytes;
	uint32_t next;
};

void ring_wait(_Atomic uint32_t *word, uint32_t seen, int timeout_ms)
{
	struct timespec timeout = {timeout_ms / 1000, timeout_ms % 1000 * 1000000L};
	syscall(SYS_futex, word, FUTEX_WAIT, seen, &timeout, NULL, 0);
}

void ring_wake(_Atomic uint32_t *word)
{
	atomic_fetch_add(word, 1);
	syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

int umm_ring_attach(int fd, struct umm_ring **ret)
{
	struct stat status;
	if (fstat(fd, &status) < 0)
		return -errno;
	if (status.st_size < (off_t)sizeof(struct ring_shared))
		return -EINVAL;
	struct ring_shared *shared =
	        mmap(NULL, (size_t)status.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (shared == MAP_FAILED)
		return -errno;
	struct umm_ring *ring = calloc(1, sizeof(*ring));
	if (!ring || shared->magic != ring_magic || shared->version != ring_version) {
		munmap(shared, (size_t)status.st_size);
		int err = ring ? -EINVAL : -ENOMEM;
		free(ring);
		return err;
	}
	ring->shared = shared;
	ring->bytes = (uint64_t)status.st_size;
	*ret = ring;
	return 0;
}

void umm_ring_detach(struct umm_ring *ring)
{
	munmap(ring->shared, ring->bytes);
	free(ring);
}

int umm_ring_take(struct umm_ring *ring, int timeout_ms, uint64_t *offset, uint64_t *len)
{
	struct ring_shared *shared = ring->shared;
	for (int round = 0; round < 2; round++) {
		uint32_t seen = atomic_load(&shared->asked);
		if (atomic_load(&shared->closed))
			return -ECANCELED;
		/* From where the last one was found: nobody waits for ever behind a busy neighbour. */
		for (uint32_t i = 0; i < UMM_FUNCTION_SLOTS; i++) {
			uint32_t number = (ring->next + i) % UMM_FUNCTION_SLOTS;
			struct ring_slot *slot = &shared->slots[number];
			uint32_t expected = SLOT_ASKED;
			if (!atomic_compare_exchange_strong(&slot->state, &expected, SLOT_TAKEN))
				continue;
			ring->next = number + 1;
			*offset = slot->offset;
			*len = slot->len;
			return (int)number;
		}
		if (round == 0)
			ring_wait(&shared->asked, seen, timeout_ms);
	}
	return -ETIMEDOUT;
}

int umm_ring_answer(struct umm_ring *ring, int number, const void *data, uint64_t len, int error)
{
	struct ring_shared *shared = ring->shared;
	if (number < 0 || number >= UMM_FUNCTION_SLOTS)
		return -EINVAL;
	struct ring_slot *slot = &shared->slots[number];
	if (atomic_load(&slot->state) != SLOT_TAKEN)
		return -EINVAL;
	if (!error && len != slot->len)
		error = ENODATA;
	if (!error)
		memcpy((uint8_t *)shared + shared->data_offset + (uint64_t)number * shared->unit, data, len);
	slot->error = error;
	atomic_store(&slot->state, SLOT_ANSWERED);
	ring_wake(&shared->answered);
	return 0;
}
