/* The handler threads: one pinned to each CPU, a few per userfaultfd.
 *
 * Every fault wakes all of them; the one on the CPU of the faulting thread is there first, and it is the
 * wake-up that decides the latency. */
#include "pager/internal.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "common/clock.h"
#include "common/lock.h"

static const int pause_for_memory_us = 1000, pause_for_caller_us = 20, pause_for_eviction_us = 100;

static void *handler_main(void *argument)
{
	struct handler *self = argument;
	struct umm_uf *uf = self->uf;
	/* Pauses of microseconds are meant as such. */
	prctl(PR_SET_TIMERSLACK, 1);
	struct pollfd fds[2] = {
	        {.fd = uf->fd, .events = POLLIN}, {.fd = uf->pager->stop_fd, .events = POLLIN}};

	for (;;) {
		struct times times = {.arrived = umm_now_ns()};
		/* Woken while the lock is held, the faulting thread would run at once and the lock with it
		 * wait for a CPU: so the wake comes after the unlock. */
		struct range wake = {0, 0};
		pthread_mutex_lock(&uf->lock);
		uf->wake_later = &wake;
		struct umm_uffd_msg msg;
		struct umm_notify_reading reading;
		umm_notify_reading_begin(umm_space_self(), &reading);
		int err = umm_uffd_read(uf->fd, &msg);
		bool fault = err == 0 && msg.event == UMM_UFFD_EVENT_PAGEFAULT;
		if (err == 0 && !fault)
			apply_event(uf, &msg);
		umm_notify_reading_end(umm_space_self(), &reading);
		if (fault)
			serve_fault(uf, msg.arg1, msg.arg0, self->buffer, &times);
		/* Faults are handed out before events: an event that makes installs answer EAGAIN comes
		 * only once the faults in front of it have been taken out of the queue. So a deferred fault
		 * is woken when the queue is empty, not before. */
		struct pollfd more = {.fd = uf->fd, .events = POLLIN};
		bool wake_others = uf->n_deferred && poll(&more, 1, 0) == 0;
		bool throttled = uf->throttled;
		uf->wake_later = NULL;
		pthread_mutex_unlock(&uf->lock);
		if (wake.end)
			umm_uffd_wake(uf->fd, wake.start, wake.end - wake.start);
		if (wake_others) {
			/* The event has been read, its caller (or the evictor) has yet to run: it needs a CPU
			 * more than we do. */
			usleep(throttled ? pause_for_eviction_us : pause_for_caller_us);
			pthread_mutex_lock(&uf->lock);
			uf->throttled = false;
			wake_deferred(uf);
			pthread_mutex_unlock(&uf->lock);
		}
		if (err == -ENOMEM)
			usleep(pause_for_memory_us);
		/* Read first, poll only when there was nothing: the COPY wakes a faulting thread on this CPU,
		 * which runs, and often faults again, before this thread comes back from the ioctl.
		 * Signals are blocked at creation, so that no signal handler ever runs here. */
		if (err != -EAGAIN)
			continue;
		if (poll(fds, 2, -1) < 0 && errno != EINTR)
			break;
		if (fds[1].revents)
			break;
	}
	return NULL;
}

static uint32_t nth_cpu(const cpu_set_t *set, uint32_t n)
{
	for (uint32_t cpu = 0; cpu < CPU_SETSIZE; cpu++)
		if (CPU_ISSET(cpu, set) && n-- == 0)
			return cpu;
	return 0;
}

int handlers_start(struct umm_pager *pager)
{
	cpu_set_t allowed;
	CPU_ZERO(&allowed);
	if (sched_getaffinity(0, sizeof(allowed), &allowed) < 0 || CPU_COUNT(&allowed) == 0)
		return -errno;
	uint32_t n_cpus = (uint32_t)CPU_COUNT(&allowed), next = 0;
	for (uint32_t i = 0; i < pager->n_ufs; i++) {
		struct umm_uf *uf = &pager->ufs[i];
		for (uint32_t h = 0; h < uf->n_handlers; h++) {
			struct handler *handler = &uf->handlers[h];
			handler->uf = uf;
			handler->cpu = (int)nth_cpu(&allowed, next++ % n_cpus);
			if (!handler->buffer)
				handler->buffer = map_anonymous(pager->buffer_bytes, pager->pmd);
			int err = handler->buffer
			                  ? pthread_create(&handler->thread, NULL, handler_main, handler)
			                  : ENOMEM;
			if (err) {
				uf->n_handlers = h;
				for (uint32_t j = i + 1; j < pager->n_ufs; j++)
					pager->ufs[j].n_handlers = 0;
				return -err;
			}
			cpu_set_t one;
			CPU_ZERO(&one);
			CPU_SET(handler->cpu, &one);
			pthread_setaffinity_np(handler->thread, sizeof(one), &one);
			char name[16];
			snprintf(name, sizeof(name), "umm-fault/%d", handler->cpu);
			pthread_setname_np(handler->thread, name);
		}
	}
	return 0;
}

void handlers_join(struct umm_pager *pager)
{
	uint64_t one = 1;
	if (write(pager->stop_fd, &one, sizeof(one)) < 0)
		return;
	for (uint32_t i = 0; i < pager->n_ufs; i++)
		for (uint32_t h = 0; h < pager->ufs[i].n_handlers; h++)
			pthread_join(pager->ufs[i].handlers[h].thread, NULL);
}
