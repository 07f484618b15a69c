/* Moments at which a test stops one side of the protocol, to let the other go on
 * (tests/test_notifier_moments.c). Nothing at all unless it is compiled with -DUMM_NOTIFY_MOMENTS, as only
 * that test is. */
#ifndef UMM_NOTIFIER_MOMENT_H
#define UMM_NOTIFIER_MOMENT_H

struct umm_subscription;

enum umm_moment {
	UMM_MOMENT_FOUND,   /* a walk, in RCU: it has found the subscription, and not counted its call yet */
	UMM_MOMENT_CALLING, /* a walk, not in RCU: it is about to enter the callback */
	UMM_MOMENT_REMOVED, /* unsubscribing: not in the tree any more, the grace period did not begin */
	UMM_MOMENT_GRACE,   /* unsubscribing: the grace period is over, the calls are not waited for yet */
	UMM_MOMENTS,
};

#ifdef UMM_NOTIFY_MOMENTS
/* The test's. */
void umm_notify_moment(enum umm_moment moment, const struct umm_subscription *subscription);
#else
static inline void umm_notify_moment(enum umm_moment moment, const struct umm_subscription *subscription)
{
	(void)moment, (void)subscription;
}
#endif

#endif
