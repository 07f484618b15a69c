/* Locks that a thread never holds while a signal handler of its own can run.
 *
 * A signal handler that touches region memory faults and waits for a fault handler, which wants the uf's
 * lock; were the interrupted code holding it, both would wait for ever. */
#ifndef UMM_COMMON_LOCK_H
#define UMM_COMMON_LOCK_H

#include <pthread.h>
#include <signal.h>

static inline void block_signals(sigset_t *saved)
{
	sigset_t all;
	sigfillset(&all);
	/* Raised by what the thread itself does: blocked, they would kill the process. */
	sigdelset(&all, SIGBUS);
	sigdelset(&all, SIGSEGV);
	sigdelset(&all, SIGFPE);
	sigdelset(&all, SIGILL);
	pthread_sigmask(SIG_BLOCK, &all, saved);
}

static inline void restore_signals(const sigset_t *saved)
{
	pthread_sigmask(SIG_SETMASK, saved, NULL);
}

#endif
