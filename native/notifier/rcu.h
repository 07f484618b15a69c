/* Read-copy update: liburcu's "bulletproof" flavour, whose readers need not be registered.
 *
 * With -DUMM_RCU_COUNTERS (meson: -Drcu=counters) the phases of this room take its place, for builds where
 * liburcu cannot be had; a reader then costs two atomic instructions.
 *
 * A reader's critical section is short: it finds a subscription and counts a call in flight. No callback runs
 * in one, nothing in one waits or faults. */
#ifndef UMM_NOTIFIER_RCU_H
#define UMM_NOTIFIER_RCU_H

#if defined(__SANITIZE_THREAD__)
#define UMM_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define UMM_TSAN 1
#endif
#endif

/* liburcu is not instrumented: what a grace period orders is said here. Everything before a reader's end is
 * seen after the grace period that waited for it. */
#ifdef UMM_TSAN
void __tsan_acquire(void *address);
void __tsan_release(void *address);
#define UMM_HAPPENS_BEFORE(tag) __tsan_release(tag)
#define UMM_HAPPENS_AFTER(tag) __tsan_acquire(tag)
#else
#define UMM_HAPPENS_BEFORE(tag) ((void)0)
#define UMM_HAPPENS_AFTER(tag) ((void)0)
#endif

#ifdef UMM_RCU_COUNTERS

#include "notifier/phases.h"

extern struct phases umm_rcu_phases;

static inline void *umm_rcu_read_lock(unsigned slot)
{
	return (void *)phases_enter(&umm_rcu_phases, slot);
}

static inline void umm_rcu_read_unlock(void *reader)
{
	phases_leave(reader);
}

static inline void umm_rcu_synchronize(void)
{
	phases_drain(&umm_rcu_phases, UINT64_MAX);
}

static inline void umm_rcu_before_fork(void)
{
	pthread_mutex_lock(&umm_rcu_phases.lock);
}

static inline void umm_rcu_after_fork_parent(void)
{
	pthread_mutex_unlock(&umm_rcu_phases.lock);
}

static inline void umm_rcu_after_fork_child(void)
{
	phases_init(&umm_rcu_phases); /* the readers were the parent's threads */
}

#else

#include <urcu/urcu-bp.h>

extern char umm_rcu_tag;

static inline void *umm_rcu_read_lock(unsigned slot)
{
	(void)slot;
	urcu_bp_read_lock();
	return NULL;
}

static inline void umm_rcu_read_unlock(void *reader)
{
	(void)reader;
	UMM_HAPPENS_BEFORE(&umm_rcu_tag);
	urcu_bp_read_unlock();
}

static inline void umm_rcu_synchronize(void)
{
	urcu_bp_synchronize_rcu();
	UMM_HAPPENS_AFTER(&umm_rcu_tag);
}

static inline void umm_rcu_before_fork(void)
{
	urcu_bp_before_fork();
}

static inline void umm_rcu_after_fork_parent(void)
{
	urcu_bp_after_fork_parent();
}

static inline void umm_rcu_after_fork_child(void)
{
	urcu_bp_after_fork_child();
}

#endif

#endif
