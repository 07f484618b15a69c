/* fork(2), and the beginning and end of the process.
 *
 * A child has an address space of its own, to which nobody has subscribed: what the parent's subscribers hold
 * is the parent's. Handles that it inherited are dead: they can be unsubscribed and destroyed, no more.
 *
 * The hooks are set up when the library is loaded, before the pager's: glibc calls prepare hooks in reverse,
 * so the pager's locks, under which direct subscribers are called, are taken before ours. */
#include <unistd.h>

#include "notifier/internal.h"
#include "notifier/rcu.h"

_Atomic uint32_t umm_fork_epoch;
_Atomic uint32_t umm_forking;
#ifdef UMM_RCU_COUNTERS
struct phases umm_rcu_phases;
#else
char umm_rcu_tag;
#endif

static _Thread_local struct umm_notify_range fork_range;

void umm_notify_forking(bool begin)
{
	atomic_fetch_add(&umm_forking, begin ? 1u : (uint32_t)-1);
}

static void before_fork(void)
{
	/* The kernel write-protects private memory on both sides, as its own notifiers are told. */
	umm_notify_start(&fork_range, &umm_self, 0, UINT64_MAX, UMM_SOURCE_PROCESS, UMM_REASON_FORK,
	        UMM_NOTIFY_BLOCKABLE | UMM_NOTIFY_NO_WAIT);
	report_before_fork();
	pthread_mutex_lock(&umm_self.lock);
	umm_rcu_before_fork();
}

static void in_parent(void)
{
	umm_rcu_after_fork_parent();
	pthread_mutex_unlock(&umm_self.lock);
	report_after_fork_parent();
	umm_notify_end(&fork_range, 0);
}

static void in_child(void)
{
	umm_rcu_after_fork_child();
	report_after_fork_child();
	atomic_fetch_add(&umm_fork_epoch, 1);
	atomic_store(&umm_forking, 0);
	uint64_t generation = atomic_load(&umm_self.generation);
	space_init(&umm_self, (uint32_t)getpid());
	atomic_store(&umm_self.generation, generation + 1);
	unsubscribe_after_fork();
	walk_after_fork();
	umm_notify_end(&fork_range, 0); /* counts this thread out, no more */
}

__attribute__((constructor)) static void set_up(void)
{
	space_init(&umm_self, (uint32_t)getpid());
#ifdef UMM_RCU_COUNTERS
	phases_init(&umm_rcu_phases);
#endif
	pthread_atfork(before_fork, in_parent, in_child);
}

/* exit(3). Programs that end by _exit or a signal tell nobody. */
__attribute__((destructor)) static void tear_down(void)
{
	umm_space_release(&umm_self, UMM_SOURCE_PROCESS, UMM_REASON_EXIT, UMM_PROMISE_ORDERED);
}
