/* The pager's side of a function store: requests go into the ring, a thread of its own takes the answers. */
#include "store/function.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "store/ring.h"

struct asked {
	struct umm_region *region; /* NULL: nobody waits for it any more */
	uint64_t offset, len;
};

struct function_store {
	struct umm_store base;
	struct ring_shared *ring;
	uint64_t ring_bytes, unit;
	int fd, pidfd;
	pid_t owner;
	struct asked asked[UMM_FUNCTION_SLOTS];
	uint8_t *buffer;
	pthread_t lane;
	bool started;
	_Atomic bool dead, stop;
	pthread_mutex_t lock; /* held by the lane while it answers; by forget() */
};

static const int look_ms = 100;

static int function_request(struct umm_store *base, struct umm_region *region, uint64_t offset, uint64_t len)
{
	struct function_store *store = (struct function_store *)base;
	struct ring_shared *ring = store->ring;
	uint64_t left = base->size - offset;
	if (atomic_load(&store->dead))
		return -EPIPE;
	if (len > store->unit)
		return -EINVAL;
	for (int i = 0; i < UMM_FUNCTION_SLOTS; i++) {
		struct ring_slot *slot = &ring->slots[i];
		if (atomic_load(&slot->state) != SLOT_FREE)
			continue;
		/* Requests come under the lock of one userfaultfd; another one may be faster. */
		uint32_t expected = SLOT_FREE;
		if (!atomic_compare_exchange_strong(&slot->state, &expected, SLOT_TAKEN))
			continue;
		store->asked[i] = (struct asked){region, offset, len};
		slot->offset = offset;
		slot->len = len < left ? len : left;
		slot->error = 0;
		atomic_store(&slot->state, SLOT_ASKED);
		ring_wake(&ring->asked);
		return 0;
	}
	return -EAGAIN;
}

static void answer(struct function_store *store, int number)
{
	struct ring_slot *slot = &store->ring->slots[number];
	struct asked asked = store->asked[number];
	uint64_t left = store->base.size - asked.offset;
	uint64_t len = asked.len < left ? asked.len : left;
	int error = slot->error;
	if (!asked.region) {
		atomic_store(&slot->state, SLOT_FREE);
		return;
	}
	if (!error) {
		/* Copied first: the worker could still change it. */
		memcpy(store->buffer,
		        (uint8_t *)store->ring + store->ring->data_offset + (uint64_t)number * store->unit,
		        len);
		memset(store->buffer + len, 0, asked.len - len);
	}
	store->asked[number].region = NULL;
	atomic_store(&slot->state, SLOT_FREE);
	if (!error)
		umm_region_deliver(asked.region, asked.offset, asked.len, store->buffer, NULL);
	else
		umm_region_refuse(asked.region, asked.offset, asked.len, error > 0 ? error : EIO);
}

static bool worker_is_dead(struct function_store *store)
{
	struct pollfd fd = {.fd = store->pidfd, .events = POLLIN};
	return poll(&fd, 1, 0) > 0;
}

static void fail_all(struct function_store *store)
{
	for (int i = 0; i < UMM_FUNCTION_SLOTS; i++) {
		struct asked asked = store->asked[i];
		uint32_t state = atomic_load(&store->ring->slots[i].state);
		if (state == SLOT_FREE || !asked.region)
			continue;
		store->asked[i].region = NULL;
		umm_region_fail(asked.region, asked.offset, asked.len, EPIPE);
	}
}

static void *lane_main(void *argument)
{
	struct function_store *store = argument;
	prctl(PR_SET_NAME, "umm-function");
	while (!atomic_load(&store->stop)) {
		uint32_t seen = atomic_load(&store->ring->answered);
		bool any = false;
		pthread_mutex_lock(&store->lock);
		for (int i = 0; i < UMM_FUNCTION_SLOTS; i++) {
			if (atomic_load(&store->ring->slots[i].state) == SLOT_ANSWERED) {
				answer(store, i);
				any = true;
			}
		}
		/* Its last answers have been taken: whoever still waits would wait for ever. */
		if (!any && (atomic_load(&store->dead) || worker_is_dead(store))) {
			atomic_store(&store->dead, true);
			fail_all(store);
		}
		pthread_mutex_unlock(&store->lock);
		if (!any)
			ring_wait(&store->ring->answered, seen, look_ms);
	}
	return NULL;
}

static void function_forget(struct umm_store *base, struct umm_region *region)
{
	struct function_store *store = (struct function_store *)base;
	pthread_mutex_lock(&store->lock);
	for (int i = 0; i < UMM_FUNCTION_SLOTS; i++)
		if (store->asked[i].region == region)
			store->asked[i].region = NULL;
	pthread_mutex_unlock(&store->lock);
}

static void function_destroy(struct umm_store *base)
{
	struct function_store *store = (struct function_store *)base;
	bool owner = store->owner == getpid();
	if (owner) {
		atomic_store(&store->ring->closed, 1);
		ring_wake(&store->ring->asked);
	}
	/* A forked child has neither the lane thread nor a say in the worker's life. */
	if (store->started && owner) {
		atomic_store(&store->stop, true);
		ring_wake(&store->ring->answered);
		pthread_join(store->lane, NULL);
	}
	if (store->started)
		close(store->pidfd);
	munmap(store->ring, store->ring_bytes);
	munmap(store->buffer, store->unit);
	close(store->fd);
	pthread_mutex_destroy(&store->lock);
	free(store);
}

static const struct umm_store_ops function_ops = {
        .name = "function",
        .request = function_request,
        .forget = function_forget,
        .destroy = function_destroy,
};

int umm_store_function_create(uint64_t size, uint64_t unit, int kind, int *ring_fd, struct umm_store **ret)
{
	uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
	if (!size || !unit || unit % page || kind == UMM_STORE_WRITEBACK)
		return -EINVAL;
	struct function_store *store = calloc(1, sizeof(*store));
	if (!store)
		return -ENOMEM;
	uint64_t head = (sizeof(struct ring_shared) + page - 1) / page * page;
	store->unit = unit;
	store->ring_bytes = head + UMM_FUNCTION_SLOTS * unit;
	store->fd = memfd_create("umm-function", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	int err = store->fd < 0 || ftruncate(store->fd, (off_t)store->ring_bytes) < 0 ? -errno : 0;
	/* The worker cannot take the memory away under the pager. */
	if (!err && fcntl(store->fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0)
		err = -errno;
	if (!err) {
		store->ring = mmap(NULL, store->ring_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, store->fd, 0);
		store->buffer = mmap(NULL, unit, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		err = store->ring == MAP_FAILED || store->buffer == MAP_FAILED ? -ENOMEM : 0;
	}
	if (err) {
		if (store->fd >= 0)
			close(store->fd);
		free(store);
		return err;
	}
	store->ring->magic = ring_magic;
	store->ring->version = ring_version;
	store->ring->unit = unit;
	store->ring->bytes = store->ring_bytes;
	store->ring->data_offset = head;
	pthread_mutex_init(&store->lock, NULL);
	store->owner = getpid();
	umm_store_init(&store->base, &function_ops, kind, size);
	*ring_fd = store->fd;
	*ret = &store->base;
	return 0;
}

int umm_store_function_start(struct umm_store *base, int pidfd)
{
	struct function_store *store = (struct function_store *)base;
	store->pidfd = fcntl(pidfd, F_DUPFD_CLOEXEC, 0);
	if (store->pidfd < 0)
		return -errno;
	sigset_t all, saved;
	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &saved);
	int err = pthread_create(&store->lane, NULL, lane_main, store);
	pthread_sigmask(SIG_SETMASK, &saved, NULL);
	store->started = !err;
	store->owner = getpid();
	if (err)
		close(store->pidfd);
	return -err;
}
