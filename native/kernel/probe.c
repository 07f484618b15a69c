#include "kernel/probe.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <unistd.h>

#include "common/clock.h"
#include "kernel/userfaultfd.h"

enum { PAGES = 64, ROUNDS = 5 };

/* A thread that is running in this address space on another CPU, so that its TLB has to be flushed. */
struct busy_thread {
	pthread_t thread;
	_Atomic int running, stop;
};

static void *be_busy(void *arg)
{
	struct busy_thread *busy = arg;
	atomic_store(&busy->running, 1);
	while (!atomic_load_explicit(&busy->stop, memory_order_relaxed))
		;
	return NULL;
}

static int start_busy(struct busy_thread *busy)
{
	cpu_set_t allowed;
	if (sched_getaffinity(0, sizeof(allowed), &allowed) || CPU_COUNT(&allowed) < 2)
		return 0;
	/* The application's signal handlers are not for this thread to run. */
	sigset_t all, before;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	int error = pthread_create(&busy->thread, NULL, be_busy, busy);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (error)
		return 0;
	while (!atomic_load(&busy->running))
		sched_yield();
	return 1;
}

static int move(int uffd, uint64_t to, uint64_t from, uint64_t len, uint64_t step, uint64_t *best)
{
	uint64_t begin = umm_now_ns();
	for (uint64_t at = 0; at < len; at += step) {
		struct umm_uffd_result result;
		int error = umm_uffd_move(uffd, to + at, from + at, step, 0, &result);
		/* EAGAIN: another thread of the process is changing its mappings. */
		for (int tries = 0; error == -EAGAIN && result.done == 0 && tries < 1000; tries++) {
			sched_yield();
			error = umm_uffd_move(uffd, to + at, from + at, step, 0, &result);
		}
		if (error)
			return error;
	}
	uint64_t took = umm_now_ns() - begin;
	if (took < *best)
		*best = took;
	return 0;
}

static int measure(int uffd, uint64_t memory, uint64_t page, struct umm_move_cost *ret)
{
	uint64_t half = PAGES * page, single = UINT64_MAX, batch = UINT64_MAX;
	struct busy_thread busy = {0};
	int error = 0;
	ret->contended = start_busy(&busy);
	for (int round = 0; round < ROUNDS && !error; round++) {
		error = move(uffd, memory + half, memory, half, page, &single);
		if (!error)
			error = move(uffd, memory, memory + half, half, half, &batch);
	}
	if (ret->contended) {
		atomic_store(&busy.stop, 1);
		pthread_join(busy.thread, NULL);
	}
	ret->single_ns = single / PAGES;
	ret->batch_ns = batch / PAGES;
	return error;
}

int umm_probe_move_cost(struct umm_move_cost *ret)
{
	uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), size = 2 * PAGES * page;
	int uffd = umm_uffd_open(UMM_UFFD_SOURCE_ANY, 0, NULL);
	if (uffd < 0)
		return uffd;
	int error = umm_uffd_api(uffd, UMM_UFFD_FEATURE_MOVE, NULL, NULL);
	if (error)
		goto close_uffd;
	char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED) {
		error = -errno;
		goto close_uffd;
	}
	/* Small pages, not shared with a child that another thread forks meanwhile; present before they are
	 * registered, so that no access can fault. */
	madvise(memory, size, MADV_NOHUGEPAGE);
	madvise(memory, size, MADV_DONTFORK);
	for (uint64_t at = 0; at < PAGES * page; at += page)
		memory[at] = 1;
	error = umm_uffd_register(uffd, (uintptr_t)memory, size, UMM_UFFD_MODE_MISSING, NULL);
	if (!error)
		error = measure(uffd, (uintptr_t)memory, page, ret);
	munmap(memory, size);
close_uffd:
	close(uffd);
	return error;
}
