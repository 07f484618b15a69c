/* The threads of this room: they block all signals, and the stream's give way to those that serve faults. */
#ifndef UMM_POSTCOPY_THREAD_H
#define UMM_POSTCOPY_THREAD_H

#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

/* 0 or -errno. Signals are the program's: it may not expect them in a thread that it did not start. */
static inline int umm_thread_start(pthread_t *thread, void *(*run)(void *), void *context)
{
	sigset_t all, before;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	int error = pthread_create(thread, NULL, run, context);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	return -error;
}

/* For the calling thread alone: Linux keeps the nice value per thread (setpriority(2)). Half the weight of
 * the threads that serve faults, not less: the stream must arrive on a busy host, too. */
static inline void umm_thread_give_way(void)
{
	(void)setpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid), 3);
}

#endif
