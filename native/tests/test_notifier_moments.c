/* The races of walk, unregister and release, one at a time: a side is stopped at a named moment
 * (notifier/moment.h), the other does what it can, and then both go on. */
#include <pthread.h>
#include <stdlib.h>

#include "notifier/moment.h"
#include "notifier_holder.h"

/* One gate for each moment. Who comes there while it is shut waits. */
static struct {
	_Atomic bool shut;
	_Atomic uint32_t inside, came;
} gates[UMM_MOMENTS];
/* Only threads that take part are stopped. */
static _Thread_local bool takes_part;

void umm_notify_moment(enum umm_moment moment, const struct umm_subscription *subscription)
{
	CHECK(subscription);
	if (!takes_part)
		return;
	atomic_fetch_add(&gates[moment].came, 1);
	atomic_fetch_add(&gates[moment].inside, 1);
	while (atomic_load(&gates[moment].shut))
		nanosleep(&(struct timespec){.tv_nsec = 50000}, NULL);
	atomic_fetch_sub(&gates[moment].inside, 1);
}

static void shut(enum umm_moment moment)
{
	atomic_store(&gates[moment].shut, true);
}

static void let_go(enum umm_moment moment)
{
	atomic_store(&gates[moment].shut, false);
}

static void await(_Atomic uint32_t *word, uint32_t value)
{
	uint64_t began = umm_now_ns();
	while (atomic_load(word) != value) {
		CHECK(umm_now_ns() - began < 100 * holder_second);
		nanosleep(&(struct timespec){.tv_nsec = 50000}, NULL);
	}
}

/* Long enough for a thread that could go on to do it: a wrong core fails here, mostly; a right one always
 * passes. */
static void give_time(void)
{
	nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
}

struct scene {
	struct umm_space *space;
	struct umm_subscriber *subscriber;
	struct holder *holder, *bystander; /* allocated: their end is seen by the address sanitizer */
	_Atomic uint32_t changed, unsubscribed, released;
	pthread_t threads[3];
	int n_threads;
};

static void *change(void *argument)
{
	struct scene *scene = argument;
	struct umm_notify_range range;
	takes_part = true;
	CHECK_OK(umm_notify_start(
	        &range, scene->space, 0, 10, UMM_SOURCE_USER, UMM_REASON_UNMAP, UMM_NOTIFY_BLOCKABLE));
	takes_part = false;
	umm_notify_end(&range, 0);
	atomic_store(&scene->changed, 1);
	return NULL;
}

static void *unsubscribe(void *argument)
{
	struct scene *scene = argument;
	takes_part = true;
	/* release runs in this thread; it is not what is to be stopped here */
	CHECK_OK(umm_unsubscribe(scene->holder->subscription));
	atomic_store(&scene->holder->gone, true);
	CHECK_EQUAL(scene->holder->releases, 1);
	CHECK_EQUAL(scene->holder->inside, 0);
	free(scene->holder);
	atomic_store(&scene->unsubscribed, 1);
	return NULL;
}

static void *release(void *argument)
{
	struct scene *scene = argument;
	takes_part = true;
	umm_space_release(scene->space, UMM_SOURCE_USER, UMM_REASON_EXIT, UMM_PROMISE_ORDERED);
	atomic_store(&scene->released, 1);
	return NULL;
}

static void scene_init(struct scene *scene)
{
	*scene = (struct scene){.holder = calloc(1, sizeof(struct holder))};
	scene->bystander = calloc(1, sizeof(struct holder));
	CHECK(scene->holder && scene->bystander);
	CHECK_OK(umm_space_create(1, &scene->space));
	scene->subscriber = holder_direct(&holder_ops);
	holder_subscribe(scene->holder, scene->space, scene->subscriber, 0, 100);
	for (int moment = 0; moment < UMM_MOMENTS; moment++) {
		CHECK_EQUAL(gates[moment].inside, 0);
		gates[moment].shut = false;
		gates[moment].came = 0;
	}
}

static void scene_start(struct scene *scene, void *(*part)(void *))
{
	CHECK_OK(-pthread_create(&scene->threads[scene->n_threads++], NULL, part, scene));
}

static void scene_deinit(struct scene *scene)
{
	while (scene->n_threads)
		CHECK_OK(-pthread_join(scene->threads[--scene->n_threads], NULL));
	if (scene->bystander->subscription) {
		if (!scene->released)
			holder_check_balance(scene->bystander);
		holder_unsubscribe(scene->bystander);
	}
	free(scene->bystander);
	CHECK_OK(umm_space_destroy(scene->space));
	CHECK_OK(umm_subscriber_destroy(scene->subscriber));
}

/* Between finding and counting: the grace period waits. */
static void unsubscribing_waits_for_who_found_it(void)
{
	struct scene scene;
	scene_init(&scene);
	shut(UMM_MOMENT_FOUND);
	scene_start(&scene, change);
	await(&gates[UMM_MOMENT_FOUND].inside, 1);
	scene_start(&scene, unsubscribe);
	await(&gates[UMM_MOMENT_REMOVED].came, 1);
	give_time();
	CHECK_EQUAL(gates[UMM_MOMENT_GRACE].came, 0);
	CHECK_EQUAL(scene.unsubscribed, 0);
	let_go(UMM_MOMENT_FOUND);
	await(&scene.unsubscribed, 1);
	await(&scene.changed, 1);
	scene_deinit(&scene);
}

/* Between counting and the callback: the grace period passes, the call is waited for, and is made. */
static void unsubscribing_waits_for_who_is_about_to_call(void)
{
	struct scene scene;
	scene_init(&scene);
	shut(UMM_MOMENT_CALLING);
	scene_start(&scene, change);
	await(&gates[UMM_MOMENT_CALLING].inside, 1);
	/* Its release would stop at the gate as well. */
	CHECK_EQUAL(umm_subscription_claim_release(scene.holder->subscription), 1);
	holder_release(scene.holder, &(struct umm_notify_event){.kind = UMM_NOTIFY_RELEASE});
	scene_start(&scene, unsubscribe);
	await(&gates[UMM_MOMENT_GRACE].came, 1);
	give_time();
	CHECK_EQUAL(scene.unsubscribed, 0);
	CHECK_EQUAL(scene.holder->starts, 0);
	let_go(UMM_MOMENT_CALLING);
	await(&scene.unsubscribed, 1);
	scene_deinit(&scene);
}

/* Between removal and grace period: new changes do not find it, and wait for nothing. */
static void changes_pass_one_that_is_removed(void)
{
	struct scene scene;
	scene_init(&scene);
	holder_subscribe(scene.bystander, scene.space, scene.subscriber, 0, 100);
	shut(UMM_MOMENT_REMOVED);
	scene_start(&scene, unsubscribe);
	await(&gates[UMM_MOMENT_REMOVED].inside, 1);
	CHECK_EQUAL(umm_space_subscriptions(scene.space), 1);
	scene_start(&scene, change);
	await(&scene.changed, 1);
	CHECK_EQUAL(scene.holder->starts, 0);
	CHECK_EQUAL(scene.bystander->starts, 1);
	CHECK_EQUAL(scene.unsubscribed, 0);
	let_go(UMM_MOMENT_REMOVED);
	await(&scene.unsubscribed, 1);
	scene_deinit(&scene);
}

/* A walk that found the first goes on to the second, which was removed while it was stopped. */
static void a_walk_goes_on_from_one_that_is_gone(void)
{
	struct scene scene;
	scene_init(&scene);
	holder_subscribe(scene.bystander, scene.space, scene.subscriber, 5, 100);
	shut(UMM_MOMENT_FOUND);
	shut(UMM_MOMENT_REMOVED);
	scene_start(&scene, change);
	await(&gates[UMM_MOMENT_FOUND].inside, 1);
	scene_start(&scene, unsubscribe);
	await(&gates[UMM_MOMENT_REMOVED].inside, 1);
	let_go(UMM_MOMENT_FOUND);
	await(&scene.changed, 1);
	CHECK_EQUAL(scene.bystander->starts, 1);
	let_go(UMM_MOMENT_REMOVED);
	await(&scene.unsubscribed, 1);
	scene_deinit(&scene);
}

/* The space's release has claimed it and not called it yet: unregister waits, and does not call it again. */
static void release_is_waited_for(void)
{
	struct scene scene;
	scene_init(&scene);
	shut(UMM_MOMENT_CALLING);
	scene_start(&scene, release);
	await(&gates[UMM_MOMENT_CALLING].inside, 1);
	CHECK_EQUAL(umm_subscription_claim_release(scene.holder->subscription), 0);
	scene_start(&scene, unsubscribe);
	await(&gates[UMM_MOMENT_GRACE].came, 1);
	give_time();
	CHECK_EQUAL(scene.unsubscribed, 0);
	CHECK_EQUAL(scene.holder->releases, 0);
	let_go(UMM_MOMENT_CALLING);
	await(&scene.unsubscribed, 1);
	await(&scene.released, 1);
	scene_deinit(&scene);
}

/* Unregister has claimed it: the space's release passes by. */
static void release_passes_one_that_is_being_released(void)
{
	struct scene scene;
	scene_init(&scene);
	holder_subscribe(scene.bystander, scene.space, scene.subscriber, 0, 100);
	shut(UMM_MOMENT_REMOVED);
	scene_start(&scene, unsubscribe);
	await(&gates[UMM_MOMENT_REMOVED].inside, 1);
	CHECK_EQUAL(scene.holder->releases, 1);
	scene_start(&scene, release);
	await(&scene.released, 1);
	CHECK_EQUAL(scene.bystander->releases, 1);
	let_go(UMM_MOMENT_REMOVED);
	await(&scene.unsubscribed, 1);
	scene_deinit(&scene);
}

/* A callback ends a subscription whose umm_subscribe still waits for the change that the callback is part of.
 */
static int end_in_callback(void *context, const struct umm_notify_event *event)
{
	struct scene *scene = context;
	int answer = holder_start(scene->holder, event);
	CHECK_OK(umm_unsubscribe(scene->holder->subscription));
	atomic_store(&scene->unsubscribed, 1);
	return answer;
}

static void *subscribe_late(void *argument)
{
	static const struct umm_notifier_ops ops = {.invalidate_range_start = end_in_callback};
	struct scene *scene = argument;
	struct umm_subscriber *subscriber = holder_direct(&ops);
	CHECK_OK(umm_subscribe(scene->space, subscriber, 0, 100, scene, &scene->holder->subscription));
	await(&scene->unsubscribed, 1);
	CHECK_OK(umm_subscriber_destroy(subscriber));
	return NULL;
}

static void a_subscription_ends_before_it_is_settled(void)
{
	struct scene scene;
	struct umm_notify_range outer, inner;
	scene_init(&scene);
	holder_unsubscribe(scene.holder);
	memset(scene.holder, 0, sizeof(*scene.holder));
	CHECK_OK(umm_notify_start(
	        &outer, scene.space, 0, 10, UMM_SOURCE_USER, UMM_REASON_UNMAP, UMM_NOTIFY_BLOCKABLE));
	scene_start(&scene, subscribe_late);
	while (!umm_space_subscriptions(scene.space))
		sched_yield();
	CHECK_OK(umm_notify_start(
	        &inner, scene.space, 0, 10, UMM_SOURCE_USER, UMM_REASON_UNMAP, UMM_NOTIFY_BLOCKABLE));
	CHECK_EQUAL(scene.unsubscribed, 1);
	CHECK_EQUAL(umm_space_subscriptions(scene.space), 0);
	umm_notify_end(&inner, 0);
	umm_notify_end(&outer, 0);
	CHECK_EQUAL(scene.holder->starts, 1);
	scene_deinit(&scene);
	free(scene.holder);
}

int main(void)
{
	a_subscription_ends_before_it_is_settled();
	unsubscribing_waits_for_who_found_it();
	unsubscribing_waits_for_who_is_about_to_call();
	changes_pass_one_that_is_removed();
	a_walk_goes_on_from_one_that_is_gone();
	release_is_waited_for();
	release_passes_one_that_is_being_released();
	return 0;
}
