#include "notifier/event_ring.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "common/clock.h"

static const uint64_t ring_magic = UINT64_C(0x31676e69726d6d75); /* "ummring1" */
static const uint64_t capacity_max = UINT64_C(1) << 24;
static const uint64_t patience_ns = 1000000000;

/* System calls, as libc's functions may be the preloaded library's. */
static void *map(int fd, uint64_t bytes)
{
	long at = syscall(SYS_mmap, NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	return at == -1 ? NULL : (void *)at;
}

int umm_event_ring_create(uint64_t capacity, struct umm_event_ring **ret, int *fd)
{
	if (!capacity || capacity & (capacity - 1) || capacity > capacity_max)
		return -EINVAL;
	uint64_t bytes = sizeof(struct umm_event_ring) + capacity * sizeof(struct umm_event_slot);
	int memory = (int)syscall(SYS_memfd_create, "umm-events", MFD_CLOEXEC);
	if (memory < 0)
		return -errno;
	struct umm_event_ring *ring = ftruncate(memory, (off_t)bytes) ? NULL : map(memory, bytes);
	if (!ring) {
		int error = -errno;
		close(memory);
		return error;
	}
	ring->bytes = bytes;
	ring->capacity = capacity;
	for (uint64_t i = 0; i < capacity; i++)
		atomic_store_explicit(&ring->slots[i].turn, i, memory_order_relaxed);
	ring->magic = ring_magic;
	*ret = ring;
	*fd = memory;
	return 0;
}

void umm_event_ring_destroy(struct umm_event_ring *ring, int fd)
{
	syscall(SYS_munmap, ring, ring->bytes);
	close(fd);
}

static bool take_one(struct umm_event_ring *ring, struct umm_notify_event *ret)
{
	for (;;) {
		uint64_t at = ring->tail;
		struct umm_event_slot *slot = &ring->slots[at & (ring->capacity - 1)];
		uint64_t turn = atomic_load_explicit(&slot->turn, memory_order_acquire);
		bool written = turn == at + 1;
		if (written) {
			*ret = slot->event;
		} else {
			if (atomic_load(&ring->head) <= at)
				return false;
			uint64_t now = umm_now_ns();
			if (!ring->stuck_since_ns)
				ring->stuck_since_ns = now;
			if (now - ring->stuck_since_ns < patience_ns)
				return false;
			/* If the writer comes back after all, it finds that it has lost its turn. */
			if (!atomic_compare_exchange_strong(&slot->turn, &turn, at + ring->capacity))
				continue;
			atomic_fetch_add(&ring->lost, 1);
		}
		if (written)
			atomic_store_explicit(&slot->turn, at + ring->capacity, memory_order_release);
		ring->stuck_since_ns = 0;
		ring->tail = at + 1;
		if (written)
			return true;
	}
}

uint64_t umm_event_ring_take(struct umm_event_ring *ring, struct umm_notify_event *ret, uint64_t max)
{
	uint64_t n = 0;
	while (n < max && take_one(ring, &ret[n]))
		n++;
	return n;
}

uint64_t umm_event_ring_lost(const struct umm_event_ring *ring)
{
	return atomic_load(&ring->lost);
}

uint64_t umm_event_ring_processes(const struct umm_event_ring *ring)
{
	return atomic_load(&ring->processes);
}

struct umm_event_ring *umm_event_ring_open(const char *path)
{
	struct stat about;
	int fd = open(path, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		return NULL;
	struct umm_event_ring *ring = NULL;
	if (fstat(fd, &about) == 0 && S_ISREG(about.st_mode) &&
	        (uint64_t)about.st_size >= sizeof(struct umm_event_ring))
		ring = map(fd, (uint64_t)about.st_size);
	close(fd);
	if (!ring)
		return NULL;
	if (ring->magic != ring_magic || ring->bytes != (uint64_t)about.st_size) {
		syscall(SYS_munmap, ring, about.st_size);
		return NULL;
	}
	atomic_fetch_add(&ring->processes, 1);
	return ring;
}

void umm_event_ring_put(struct umm_event_ring *ring, const struct umm_notify_event *event)
{
	uint64_t at = atomic_load_explicit(&ring->head, memory_order_relaxed);
	for (;;) {
		struct umm_event_slot *slot = &ring->slots[at & (ring->capacity - 1)];
		uint64_t turn = atomic_load_explicit(&slot->turn, memory_order_acquire);
		if (turn == at) {
			if (!atomic_compare_exchange_weak(&ring->head, &at, at + 1))
				continue;
			slot->event = *event;
			atomic_compare_exchange_strong(&slot->turn, &turn, at + 1);
			return;
		}
		if ((int64_t)(turn - at) < 0) {
			/* Not read yet since the last round: full, unless somebody was faster meanwhile. */
			uint64_t now = atomic_load(&ring->head);
			if (now == at) {
				atomic_fetch_add(&ring->lost, 1);
				return;
			}
			at = now;
			continue;
		}
		at = atomic_load_explicit(&ring->head, memory_order_relaxed);
	}
}
