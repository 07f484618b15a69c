#include "bench/floor.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "common/clock.h"
#include "kernel/userfaultfd.h"

enum { MAX_HANDLERS = 4 };

struct floor_handler {
	pthread_t thread;
	struct umm_floor *floor;
	int cpu; /* -1: not pinned */
};

struct umm_floor {
	int kind;
	int uffd;
	uint64_t page;
	char *base;
	uint64_t size;   /* of the content */
	uint64_t mapped; /* with the stop pages behind it: one per handler */
	const char *source;
	unsigned handlers;
	struct floor_handler handler[MAX_HANDLERS];
	_Atomic int error;
	struct sigaction previous;
};

/* The one floor that SIGBUS belongs to. */
static struct umm_floor *_Atomic in_thread;

/* A fault that cannot be served must not hang its thread: without the registration it reads zero, and
 * the error is told by umm_floor_destroy. */
static void give_up(struct umm_floor *floor, int error)
{
	int none = 0;
	atomic_compare_exchange_strong(&floor->error, &none, error);
	umm_uffd_unregister(floor->uffd, (uint64_t)(uintptr_t)floor->base, floor->size);
}

/* True when it was a stop page: the handler that served it ends. */
static bool serve(struct umm_floor *floor, uint64_t address)
{
	uint64_t offset = (address - (uint64_t)(uintptr_t)floor->base) & ~(floor->page - 1);
	bool stop = offset >= floor->size;
	struct umm_uffd_result result;
	int err = umm_uffd_copy(floor->uffd, (uint64_t)(uintptr_t)floor->base + offset,
	        (uint64_t)(uintptr_t)floor->source + (stop ? 0 : offset), floor->page, 0, &result);
	/* Two threads that touch one page queue two messages. */
	if (err && result.outcome != UMM_OUTCOME_ALREADY_THERE)
		give_up(floor, err);
	return stop;
}
static void *handle_blocking(void *arg)
{
	struct umm_floor *floor = ((struct floor_handler *)arg)->floor;
	struct umm_uffd_msg message;
	for (;;) {
		int err = umm_uffd_read(floor->uffd, &message);
		if (err)
			give_up(floor, err);
		else if (message.event == UMM_UFFD_EVENT_PAGEFAULT && serve(floor, message.arg1))
			return NULL;
	}
}

static void *handle_polling(void *arg)
{
	struct umm_floor *floor = ((struct floor_handler *)arg)->floor;
	struct pollfd ready = {.fd = floor->uffd, .events = POLLIN};
	struct umm_uffd_msg message;
	for (;;) {
		if (poll(&ready, 1, -1) < 0 && errno != EINTR)
			give_up(floor, -errno);
		int err;
		while ((err = umm_uffd_read(floor->uffd, &message)) == 0) {
			if (message.event == UMM_UFFD_EVENT_PAGEFAULT && serve(floor, message.arg1))
				return NULL;
		}
		if (err != -EAGAIN)
			give_up(floor, err);
	}
}

static void on_sigbus(int signal, siginfo_t *info, void *context)
{
	struct umm_floor *floor = atomic_load(&in_thread);
	uint64_t offset = (uint64_t)(uintptr_t)info->si_addr - (uint64_t)(uintptr_t)floor->base;
	if (offset < floor->size) {
		int saved = errno;
		serve(floor, (uint64_t)(uintptr_t)info->si_addr);
		errno = saved;
		return;
	}
	if (floor->previous.sa_flags & SA_SIGINFO)
		floor->previous.sa_sigaction(signal, info, context);
	else
		sigaction(SIGBUS, &floor->previous, NULL); /* the access is repeated, and dies of it */
}

static int start_in_thread(struct umm_floor *floor)
{
	struct umm_floor *none = NULL;
	if (!atomic_compare_exchange_strong(&in_thread, &none, floor))
		return -EBUSY;
	struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_NODEFER};
	sigemptyset(&action.sa_mask);
	if (sigaction(SIGBUS, &action, &floor->previous) == 0)
		return 0;
	atomic_store(&in_thread, NULL);
	return -errno;
}

static int start_handler(struct floor_handler *handler)
{
	sigset_t all, before;
	sigfillset(&all);
	pthread_attr_t attr;
	int err = pthread_attr_init(&attr);
	if (err)
		return -err;
	if (handler->cpu >= 0) {
		cpu_set_t one;
		CPU_ZERO(&one);
		CPU_SET(handler->cpu, &one);
		err = pthread_attr_setaffinity_np(&attr, sizeof(one), &one);
	}
	if (!err) {
		pthread_sigmask(SIG_SETMASK, &all, &before);
		err = pthread_create(&handler->thread, &attr,
		        handler->floor->kind == UMM_FLOOR_POLLING ? handle_polling : handle_blocking,
		        handler);
		pthread_sigmask(SIG_SETMASK, &before, NULL);
	}
	pthread_attr_destroy(&attr);
	return -err;
}

/* Each touch of a stop page ends the handler that happens to serve it. Not pthread_cancel: the address
 * sanitizer does not survive its unwinding. */
static void stop_handlers(struct umm_floor *floor)
{
	for (unsigned i = 0; i < floor->handlers; i++)
		(void)*(volatile char *)(floor->base + floor->size + i * floor->page);
	for (unsigned i = 0; i < floor->handlers; i++)
		pthread_join(floor->handler[i].thread, NULL);
}

static int start_handlers(struct umm_floor *floor)
{
	cpu_set_t allowed;
	if (sched_getaffinity(0, sizeof(allowed), &allowed) < 0)
		return -errno;
	unsigned wanted = floor->kind == UMM_FLOOR_POLLING ? 1 : MAX_HANDLERS;
	for (int cpu = 0; cpu < CPU_SETSIZE && floor->handlers < wanted; cpu++) {
		if (!CPU_ISSET(cpu, &allowed))
			continue;
		struct floor_handler *handler = &floor->handler[floor->handlers];
		handler->floor = floor;
		handler->cpu = floor->kind == UMM_FLOOR_POLLING ? -1 : cpu;
		int err = start_handler(handler);
		if (err) {
			stop_handlers(floor);
			return err;
		}
		floor->handlers++;
	}
	return 0;
}

/* A private anonymous range, registered for missing pages with a userfaultfd of its own. */
static int map_registered(uint64_t size, int uffd, void **ret)
{
	void *base =
	        mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (base == MAP_FAILED)
		return -errno;
	int err = umm_uffd_register(uffd, (uint64_t)(uintptr_t)base, size, UMM_UFFD_MODE_MISSING, NULL);
	if (err) {
		munmap(base, size);
		return err;
	}
	*ret = base;
	return 0;
}

static int open_uffd(int flags, uint64_t features)
{
	int uffd = umm_uffd_open(UMM_UFFD_SOURCE_ANY, flags, NULL);
	if (uffd < 0)
		return uffd;
	int err = umm_uffd_api(uffd, features, NULL, NULL);
	if (err) {
		close(uffd);
		return err;
	}
	return uffd;
}

int umm_floor_create(int kind, const void *source, uint64_t size, struct umm_floor **ret)
{
	uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
	if (kind < UMM_FLOOR_PINNED || kind > UMM_FLOOR_IN_THREAD || !source || size == 0 || size % page)
		return -EINVAL;
	struct umm_floor *floor = calloc(1, sizeof(*floor));
	if (!floor)
		return -ENOMEM;
	*floor = (struct umm_floor){
	        .kind = kind,
	        .page = page,
	        .source = source,
	        .size = size,
	        .mapped = size + MAX_HANDLERS * page,
	};
	void *base;
	int err = open_uffd(kind == UMM_FLOOR_POLLING ? O_NONBLOCK : 0,
	        kind == UMM_FLOOR_IN_THREAD ? UMM_UFFD_FEATURE_SIGBUS : 0);
	if (err < 0)
		goto free_floor;
	floor->uffd = err;
	err = map_registered(floor->mapped, floor->uffd, &base);
	if (err)
		goto close_uffd;
	floor->base = base;
	err = kind == UMM_FLOOR_IN_THREAD ? start_in_thread(floor) : start_handlers(floor);
	if (err)
		goto unmap;
	*ret = floor;
	return 0;
unmap:
	munmap(floor->base, floor->mapped);
close_uffd:
	close(floor->uffd);
free_floor:
	free(floor);
	return err;
}

uint64_t umm_floor_address(const struct umm_floor *floor)
{
	return (uint64_t)(uintptr_t)floor->base;
}

unsigned umm_floor_handlers(const struct umm_floor *floor)
{
	return floor->handlers;
}

int umm_floor_destroy(struct umm_floor *floor)
{
	if (floor->kind == UMM_FLOOR_IN_THREAD) {
		sigaction(SIGBUS, &floor->previous, NULL);
		atomic_store(&in_thread, NULL);
	} else {
		stop_handlers(floor);
	}
	int error = atomic_load(&floor->error);
	munmap(floor->base, floor->mapped);
	close(floor->uffd);
	free(floor);
	return error;
}

int umm_floor_populate(const void *source, uint64_t size, uint64_t batch, uint64_t align, int huge,
        uint64_t *elapsed_ns, uint64_t *wrong)
{
	uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
	if (!source || size == 0 || size % page || batch == 0 || batch % page || align < page ||
	        (align & (align - 1)))
		return -EINVAL;
	int uffd = open_uffd(0, 0);
	if (uffd < 0)
		return uffd;
	void *mapping;
	uint64_t mapped = size + align - page;
	int err = map_registered(mapped, uffd, &mapping);
	if (err)
		goto close_uffd;
	uint64_t base = ((uint64_t)(uintptr_t)mapping + align - 1) & ~(align - 1);
	if (huge && madvise(mapping, mapped, MADV_HUGEPAGE) < 0 && errno != EINVAL) {
		err = -errno;
		goto unmap;
	}
	uint64_t begin = umm_now_ns();
	for (uint64_t done = 0; done < size && !err;) {
		uint64_t len = size - done < batch ? size - done : batch;
		struct umm_uffd_result result;
		err = umm_uffd_copy(uffd, base + done, (uint64_t)(uintptr_t)source + done, len, 0, &result);
		if (result.outcome == UMM_OUTCOME_PARTIAL)
			err = 0;
		done += (uint64_t)result.done;
	}
	*elapsed_ns = umm_now_ns() - begin;
	*wrong = 0;
	for (uint64_t at = 0; at < size && !err; at += page) {
		const uint64_t *there = (const uint64_t *)((uintptr_t)base + at);
		*wrong += *there != *(const uint64_t *)((const char *)source + at);
	}
unmap:
	munmap(mapping, mapped);
close_uffd:
	close(uffd);
	return err;
}
