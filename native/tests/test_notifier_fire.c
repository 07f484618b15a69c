/* Sixteen threads that register, unregister, invalidate, fork and exit at once, for both classes of
 * subscribers.
 *
 * Under the thread and the address sanitizer this is where a wrong order or a use after free shows; plain,
 * each subscription checks that it is called in pairs, never after its end, and released once. */
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include "notifier_holder.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
/* Its allocator is not made for the children of programs with threads. */
enum { CHILDREN_MAY_ALLOCATE = 0 };
#else
enum { CHILDREN_MAY_ALLOCATE = 1 };
#endif

/* Children of a program with threads go on to do what they are to do. */
const char *__tsan_default_options(void);
const char *__tsan_default_options(void)
{
	return "die_after_fork=0";
}

static const uint64_t run_ns = 1000000000;
enum { ROOM = 1 << 16, STAYING = 6, SLEEPERS = 3, QUEUE = 64 };

static struct umm_subscriber *direct, *watched, *sleepers[SLEEPERS];
static struct holder staying[STAYING];
static _Atomic bool over;
static uint32_t *child_releases;

static uint64_t random_range(uint64_t *random, uint64_t *end)
{
	uint64_t start = holder_random(random) % ROOM;
	*end = start + 1 + holder_random(random) % (holder_random(random) % 8 ? 64 : ROOM);
	return start;
}

static struct umm_subscriber *random_subscriber(uint64_t *random)
{
	uint64_t which = holder_random(random) % (SLEEPERS + 2);
	return which < SLEEPERS ? sleepers[which] : which == SLEEPERS ? watched : direct;
}

static void change_once(struct umm_space *space, uint64_t *random, int depth)
{
	static const uint32_t flags[] = {UMM_NOTIFY_BLOCKABLE, 0, UMM_NOTIFY_VOLUNTARY | UMM_NOTIFY_BLOCKABLE,
	        UMM_NOTIFY_NO_WAIT | UMM_NOTIFY_BLOCKABLE};
	struct umm_notify_range range;
	uint64_t end, start = random_range(random, &end);
	uint32_t flag = flags[holder_random(random) % 4];
	int err = umm_notify_start(&range, space, start, end, UMM_SOURCE_USER, UMM_REASON_UNMAP, flag);
	if (err) {
		CHECK_EQUAL(err, -EAGAIN);
		CHECK(flag != UMM_NOTIFY_BLOCKABLE);
		return;
	}
	if (depth < 2 && holder_random(random) % 4 == 0)
		change_once(space, random, depth + 1);
	umm_notify_end(&range, holder_random(random) % 8 ? 0 : -ENOMEM);
}

static void invalidate(uint64_t *random)
{
	change_once(umm_space_self(), random, 0);
}

static void tell_other_things(uint64_t *random)
{
	struct umm_space *space = umm_space_self();
	uint64_t answered, end, start = random_range(random, &end);
	umm_notify_page(space, start, end, UMM_SOURCE_USER, UMM_REASON_POISON, UMM_NOTIFY_BLOCKABLE);
	umm_notify_change(space, start, end, UMM_SOURCE_USER, UMM_REASON_BACKING, 0);
	umm_notify_post(space, start, end, 0, UMM_SOURCE_USER, UMM_REASON_REMOVE, UMM_PROMISE_AFTER);
	umm_notify_age(space, start, end, UMM_SOURCE_USER, &answered);
}

static void come_and_go(uint64_t *random)
{
	struct holder *holder = calloc(1, sizeof(*holder));
	CHECK(holder);
	struct umm_subscriber *subscriber = random_subscriber(random);
	if (subscriber == direct || subscriber == watched)
		holder->refuse = holder_random(random) % 3;
	uint64_t end, start = random_range(random, &end);
	holder_subscribe(holder, umm_space_self(), subscriber, start, end);
	if (holder_random(random) % 2)
		invalidate(random);
	holder_unsubscribe(holder);
	free(holder);
}

/* Subscribers themselves, each with a few subscriptions, the last of which may be of a space of its own. */
static void make_and_destroy(uint64_t *random)
{
	struct umm_subscriber *subscriber =
	        holder_random(random) % 2
	                ? holder_direct(&holder_ops)
	                : holder_sleeping(&holder_ops, holder_second * (holder_random(random) % 2), QUEUE);
	struct holder holders[3] = {0};
	struct umm_space *space;
	CHECK_OK(umm_space_create(1, &space));
	for (int i = 0; i < 3; i++) {
		uint64_t end, start = random_range(random, &end);
		holder_subscribe(&holders[i], i < 2 ? umm_space_self() : space, subscriber, start, end);
	}
	change_once(space, random, 0);
	if (holder_random(random) % 2)
		umm_space_release(space, UMM_SOURCE_USER, UMM_REASON_EXIT, UMM_PROMISE_AFTER);
	CHECK_EQUAL(umm_subscriber_destroy(subscriber), -EBUSY);
	for (int i = 0; i < 3; i++)
		holder_unsubscribe(&holders[i]);
	CHECK_OK(umm_subscriber_destroy(subscriber));
	CHECK_OK(umm_space_destroy(space));
}

static void read_without_lock(uint64_t *random)
{
	uint64_t seq;
	struct umm_subscription *subscription = staying[holder_random(random) % STAYING].subscription;
	int err = umm_read_begin(subscription, holder_second / 100, &seq);
	CHECK(!err || err == -ETIMEDOUT);
	if (!err)
		umm_read_retry(subscription, seq);
}

/* A child knows of nobody; what it inherited it can put away, and have subscribers of its own. */
static void be_a_child(uint64_t *random)
{
	struct umm_subscriber_stats stats;
	uint64_t answered, calls = staying[0].starts;
	invalidate(random);
	tell_other_things(random);
	CHECK_EQUAL(staying[0].starts, calls);
	CHECK_EQUAL(umm_space_subscriptions(umm_space_self()), 0);
	umm_subscriber_stats(sleepers[0], &stats);
	umm_notify_age(umm_space_self(), 0, ROOM, UMM_SOURCE_USER, &answered);
	CHECK_EQUAL(answered, 0);
	if (CHILDREN_MAY_ALLOCATE) {
		for (int i = 0; i < STAYING; i++)
			CHECK_OK(umm_unsubscribe(staying[i].subscription));
		CHECK_EQUAL(staying[0].releases, 0);
		sleepers[0] = holder_sleeping(&holder_ops, holder_second, QUEUE);
		sleepers[1] = sleepers[2] = watched = direct = sleepers[0];
		come_and_go(random);
		CHECK_OK(umm_subscriber_destroy(sleepers[0]));
	}
	_exit(0);
}

static void fork_once(uint64_t *random)
{
	int status;
	pid_t child = fork();
	CHECK(child >= 0);
	if (!child)
		be_a_child(random);
	CHECK(waitpid(child, &status, 0) == child);
	CHECK_EQUAL(status, 0);
	nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL);
}

/* A program of its own, that exits while its threads change memory. */
static void exit_once(uint64_t *random)
{
	int status;
	(void)random;
	memset(child_releases, 0, 2 * sizeof(*child_releases));
	pid_t child = fork();
	CHECK(child >= 0);
	if (!child) {
		execl("/proc/self/exe", "test_notifier_fire", "exits", (char *)NULL);
		_exit(127);
	}
	CHECK(waitpid(child, &status, 0) == child);
	CHECK_EQUAL(status, 0);
	CHECK_EQUAL(child_releases[0], 1);
	CHECK_EQUAL(child_releases[1], 1);
	nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL);
}

static void count_release(void *context, const struct umm_notify_event *event)
{
	CHECK_EQUAL(event->reason, UMM_REASON_EXIT);
	++*(uint32_t *)context;
}

static void *change_for_ever(void *random)
{
	for (;;)
		invalidate(random);
	return NULL;
}

enum { SHARED_FD = 200, EXITING_THREADS = 4 };

static int exit_in_the_middle(void)
{
	static const struct umm_notifier_ops ops = {.release = count_release};
	static uint64_t random[EXITING_THREADS];
	static struct umm_subscription *subscriptions[2];
	pthread_t thread;
	uint32_t *releases =
	        mmap(NULL, 2 * sizeof(*releases), PROT_READ | PROT_WRITE, MAP_SHARED, SHARED_FD, 0);
	CHECK(releases != MAP_FAILED);
	static struct umm_subscriber *one, *two;
	one = holder_direct(&ops);
	two = holder_sleeping(&ops, 60 * holder_second, QUEUE);
	CHECK_OK(umm_subscribe(umm_space_self(), one, 0, ROOM, &releases[0], &subscriptions[0]));
	CHECK_OK(umm_subscribe(umm_space_self(), two, 0, ROOM, &releases[1], &subscriptions[1]));
	for (int i = 0; i < EXITING_THREADS; i++) {
		random[i] = (uint64_t)i + 1;
		CHECK_OK(-pthread_create(&thread, NULL, change_for_ever, &random[i]));
		pthread_detach(thread);
	}
	nanosleep(&(struct timespec){.tv_nsec = 2000000}, NULL);
	return 0; /* exit(3), with the threads at work */
}

static void (*const jobs[])(uint64_t *) = {invalidate, invalidate, invalidate, invalidate, invalidate,
        tell_other_things, come_and_go, come_and_go, come_and_go, come_and_go, make_and_destroy,
        make_and_destroy, read_without_lock, read_without_lock, fork_once, exit_once};
enum { THREADS = sizeof(jobs) / sizeof(jobs[0]) };

struct work {
	pthread_t thread;
	void (*job)(uint64_t *random);
	uint64_t random, n;
};

static void *work(void *argument)
{
	struct work *work = argument;
	do {
		work->job(&work->random);
		work->n++;
	} while (!atomic_load(&over));
	return NULL;
}

static void all_at_once(void)
{
	static struct work works[THREADS];
	for (int i = 0; i < STAYING; i++) {
		staying[i].refuse = i == 1 ? 3 : 0;
		holder_subscribe(&staying[i], umm_space_self(), i < 3 ? direct : sleepers[i - 3],
		        (uint64_t)i * 100, ROOM);
	}
	for (int i = 0; i < THREADS; i++) {
		works[i].job = jobs[i];
		works[i].random = (uint64_t)i * 7919 + 1;
		CHECK_OK(-pthread_create(&works[i].thread, NULL, work, &works[i]));
	}
	nanosleep(&(struct timespec){.tv_sec = (time_t)(run_ns / holder_second)}, NULL);
	atomic_store(&over, true);
	for (int i = 0; i < THREADS; i++) {
		CHECK_OK(-pthread_join(works[i].thread, NULL));
		printf("job %d: %llu times\n", i, (unsigned long long)works[i].n);
	}
	for (int i = 0; i < SLEEPERS; i++)
		holder_settle(sleepers[i]);
	for (int i = 0; i < STAYING; i++) {
		CHECK(staying[i].starts);
		holder_check_balance(&staying[i]);
		holder_unsubscribe(&staying[i]);
	}
	CHECK_EQUAL(umm_space_subscriptions(umm_space_self()), 0);
}

int main(int argc, char **argv)
{
	(void)argv;
	if (argc > 1)
		return exit_in_the_middle();
	int fd = memfd_create("releases", 0);
	CHECK(fd >= 0 && ftruncate(fd, 2 * sizeof(*child_releases)) == 0 && dup2(fd, SHARED_FD) == SHARED_FD);
	child_releases =
	        mmap(NULL, 2 * sizeof(*child_releases), PROT_READ | PROT_WRITE, MAP_SHARED, SHARED_FD, 0);
	CHECK(child_releases != MAP_FAILED);
	struct umm_subscriber_options options = {
	        .name = "watched", .ops = &holder_ops, .limit_ns = 100 * holder_second};
	CHECK_OK(umm_subscriber_create(&options, &watched));
	direct = holder_direct(&holder_ops);
	sleepers[0] = holder_sleeping(&holder_ops, 60 * holder_second, 0);
	sleepers[1] = holder_sleeping(&holder_ops, 0, QUEUE);
	sleepers[2] = holder_sleeping(&holder_ops, 60 * holder_second, 8);
	all_at_once();
	CHECK_OK(umm_subscriber_destroy(direct));
	CHECK_OK(umm_subscriber_destroy(watched));
	for (int i = 0; i < SLEEPERS; i++)
		CHECK_OK(umm_subscriber_destroy(sleepers[i]));
	return 0;
}
