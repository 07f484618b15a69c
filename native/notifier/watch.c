#include "notifier/watch.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "common/clock.h"
#include "kernel/mapping.h"
#include "kernel/userfaultfd.h"
#include "notifier/watched.h"

/* A process has 65,530 mappings, by the default of vm.max_map_count, and a watched range is at least one. */
enum { PIECES_MAX = 1 << 17 };

static const uint64_t needed = UMM_UFFD_FEATURE_PAGEFAULT_FLAG_WP | UMM_UFFD_FEATURE_EVENT_REMAP |
                               UMM_UFFD_FEATURE_EVENT_REMOVE | UMM_UFFD_FEATURE_EVENT_UNMAP;
/* Takes every kind of mapping in write-protect mode (Linux 6.7), and never waits for us. */
static const uint64_t wished = UMM_UFFD_FEATURE_WP_ASYNC | UMM_UFFD_FEATURE_WP_HUGETLBFS_SHMEM;
/* How long remove waits for others' changes to end before it leaves unregistering to the thread. */
static const uint64_t patience_ns = 100000000;
static const int sweep_again_ms = 10;

struct umm_watch {
	struct umm_space *space;
	int uffd, wake_fd;
	pthread_t thread;
	_Atomic bool stop;
	/* Held for moments, by nobody who waits for an event: not over a post, in which callbacks run. Lock
	 * order: watches_lock, lock. */
	pthread_mutex_t lock;
	struct watched watched;
	struct umm_watch_stats stats;
	bool is_dead; /* in a forked child */
	uint64_t mapped;
	struct umm_watch *next;
	struct watched_piece pieces[PIECES_MAX];
};

static pthread_mutex_t watches_lock = PTHREAD_MUTEX_INITIALIZER;
static struct umm_watch *watches;
static int hooks_error;

static void before_fork(void)
{
	pthread_mutex_lock(&watches_lock);
	for (struct umm_watch *watch = watches; watch; watch = watch->next)
		pthread_mutex_lock(&watch->lock);
}

static void after_fork(void)
{
	for (struct umm_watch *watch = watches; watch; watch = watch->next)
		pthread_mutex_unlock(&watch->lock);
	pthread_mutex_unlock(&watches_lock);
}

/* The descriptors are those of the parent's memory: the child keeps neither them nor what they know. */
static void in_child(void)
{
	for (struct umm_watch *watch = watches; watch; watch = watch->next) {
		close(watch->uffd);
		close(watch->wake_fd);
		watch->is_dead = true;
		watch->watched.n = 0;
	}
	after_fork();
}

/* Before the core's (fork.c), so that the lock is taken after it has told its subscribers of the fork, and
 * let go before it tells them the end: they may call us. */
__attribute__((constructor(200))) static void set_up(void)
{
	hooks_error = pthread_atfork(before_fork, after_fork, in_child);
}

/* Unregisters what nobody wants, unless memory is changing: a mapping may then have gone of which we have not
 * read yet, and what is in its place be somebody else's. (Kernels before 6.16 let us unregister another
 * userfaultfd's memory.) Called with the lock. */
static bool sweep(struct umm_watch *watch)
{
	uint64_t at = 0;
	while (watched_unwanted(&watch->watched, &at)) {
		struct watched_piece *piece = &watch->watched.pieces[at];
		if (umm_uffd_changing(watch->uffd))
			return false;
		/* EAGAIN: a change began just now. Other errors say that nothing is registered there. */
		if (umm_uffd_unregister(watch->uffd, piece->start, piece->end - piece->start) == -EAGAIN)
			return false;
		watched_drop(&watch->watched, at);
	}
	return true;
}

static bool has_unwanted(struct umm_watch *watch)
{
	uint64_t at = 0;
	return watched_unwanted(&watch->watched, &at);
}

static void note(struct umm_watch *watch, const struct umm_uffd_msg *msg)
{
	pthread_mutex_lock(&watch->lock);
	switch (msg->event) {
	case UMM_UFFD_EVENT_REMOVE:
		watch->stats.removes++;
		break;
	case UMM_UFFD_EVENT_UNMAP:
		watch->stats.unmaps++;
		watched_gone(&watch->watched, msg->arg0, msg->arg1);
		break;
	case UMM_UFFD_EVENT_REMAP:
		watch->stats.remaps++;
		watched_gone(&watch->watched, msg->arg0, msg->arg0 + msg->arg2);
		break;
	default:
		break;
	}
	pthread_mutex_unlock(&watch->lock);
}

static void tell(struct umm_watch *watch, const struct umm_uffd_msg *msg)
{
	struct umm_uffd_result ignored;
	uint64_t page = (uint64_t)getpagesize();
	switch (msg->event) {
	case UMM_UFFD_EVENT_REMOVE:
		umm_notify_post(watch->space, msg->arg0, msg->arg1, 0, UMM_SOURCE_KERNEL, UMM_REASON_REMOVE,
		        UMM_PROMISE_BEFORE);
		break;
	case UMM_UFFD_EVENT_UNMAP:
		umm_notify_post(watch->space, msg->arg0, msg->arg1, 0, UMM_SOURCE_KERNEL, UMM_REASON_UNMAP,
		        UMM_PROMISE_AFTER);
		break;
	case UMM_UFFD_EVENT_REMAP:
		umm_notify_post(watch->space, msg->arg0, msg->arg0 + msg->arg2, msg->arg1, UMM_SOURCE_KERNEL,
		        UMM_REASON_MOVE, UMM_PROMISE_AFTER);
		break;
	default:
		/* A fault: on a page that was write-protected by another watch it moved here from. */
		umm_uffd_writeprotect(watch->uffd, msg->arg1 & ~(page - 1), page, 0, &ignored);
		break;
	}
}

/* No malloc, and no lock that is held over a munmap: its caller waits for this thread. */
static void *watch_main(void *argument)
{
	struct umm_watch *watch = argument;
	struct pollfd fds[2] = {
	        {.fd = watch->uffd, .events = POLLIN}, {.fd = watch->wake_fd, .events = POLLIN}};
	for (;;) {
		struct umm_notify_reading reading;
		struct umm_uffd_msg msg;
		umm_notify_reading_begin(watch->space, &reading);
		int error = umm_uffd_read(watch->uffd, &msg);
		if (!error) {
			note(watch, &msg);
			tell(watch, &msg);
		}
		umm_notify_reading_end(watch->space, &reading);
		if (!error)
			continue;
		/* Only with an empty queue: whoever waits comes first. */
		if (atomic_load(&watch->stop)) {
			/* Here, and not after pthread_join: this thread's stack may lie in a mapping that is
			 * watched, and glibc gives it back at the thread's end. */
			close(watch->uffd);
			return NULL;
		}
		pthread_mutex_lock(&watch->lock);
		bool swept = !has_unwanted(watch) || sweep(watch);
		pthread_mutex_unlock(&watch->lock);
		if (poll(fds, 2, swept ? -1 : sweep_again_ms) > 0 && fds[1].revents) {
			uint64_t times;
			if (read(watch->wake_fd, &times, sizeof(times)) < 0 && errno != EAGAIN)
				return NULL;
		}
	}
}

static int open_uffd(int *ret)
{
	uint64_t granted = 0;
	int probe = umm_uffd_open(UMM_UFFD_SOURCE_ANY, O_NONBLOCK, NULL);
	if (probe < 0)
		return probe;
	int error = umm_uffd_api(probe, 0, &granted, NULL);
	close(probe);
	if (error)
		return error;
	if ((granted & needed) != needed)
		return -EOPNOTSUPP;
	int uffd = umm_uffd_open(UMM_UFFD_SOURCE_ANY, O_NONBLOCK, NULL);
	if (uffd < 0)
		return uffd;
	error = umm_uffd_api(uffd, needed | (granted & wished), NULL, NULL);
	if (error) {
		close(uffd);
		return error;
	}
	*ret = uffd;
	return 0;
}

static int start_thread(struct umm_watch *watch)
{
	sigset_t all, saved;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &saved);
	int error = pthread_create(&watch->thread, NULL, watch_main, watch);
	pthread_sigmask(SIG_SETMASK, &saved, NULL);
	if (!error)
		pthread_setname_np(watch->thread, "umm-watch");
	return -error;
}

int umm_watch_create(struct umm_space *space, struct umm_watch **ret)
{
	uint64_t at, size = sizeof(struct umm_watch);
	if (hooks_error)
		return -hooks_error;
	/* Touched as far as it is used. Not from malloc: nothing that the thread uses may be watched. */
	int error = umm_map(0, size, PROT_READ | PROT_WRITE,
	        UMM_MAP_PRIVATE | UMM_MAP_ANONYMOUS | UMM_MAP_NORESERVE, -1, 0, &at);
	if (error)
		return error;
	struct umm_watch *watch = (struct umm_watch *)(uintptr_t)at;
	watch->space = space;
	watch->mapped = size;
	watch->watched = (struct watched){.pieces = watch->pieces, .room = PIECES_MAX};
	pthread_mutex_init(&watch->lock, NULL);
	error = open_uffd(&watch->uffd);
	if (error)
		goto unmap;
	watch->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (watch->wake_fd < 0) {
		error = -errno;
		goto close_uffd;
	}
	/* A fork comes before, or finds it listed. */
	pthread_mutex_lock(&watches_lock);
	error = start_thread(watch);
	if (!error) {
		watch->next = watches;
		watches = watch;
	}
	pthread_mutex_unlock(&watches_lock);
	if (!error) {
		*ret = watch;
		return 0;
	}
	close(watch->wake_fd);
close_uffd:
	close(watch->uffd);
unmap:
	pthread_mutex_destroy(&watch->lock);
	umm_unmap(at, size);
	return error;
}

static void wake(struct umm_watch *watch)
{
	uint64_t one = 1;
	while (write(watch->wake_fd, &one, sizeof(one)) < 0 && errno == EINTR)
		;
}

int umm_watch_destroy(struct umm_watch *watch)
{
	if (!watch->is_dead && pthread_equal(pthread_self(), watch->thread))
		return -EDEADLK;
	pthread_mutex_lock(&watches_lock);
	for (struct umm_watch **link = &watches; *link; link = &(*link)->next)
		if (*link == watch) {
			*link = watch->next;
			break;
		}
	pthread_mutex_unlock(&watches_lock);
	if (!watch->is_dead) {
		atomic_store(&watch->stop, true);
		wake(watch);
		pthread_join(watch->thread, NULL);
		close(watch->wake_fd);
	}
	pthread_mutex_destroy(&watch->lock);
	return umm_unmap((uintptr_t)watch, watch->mapped);
}

static bool is_range(uint64_t start, uint64_t end)
{
	return start < end && ((start | end) & ((uint64_t)getpagesize() - 1)) == 0;
}

/* What the kernel's error says about the memory. */
static int why(int error, uint64_t start)
{
	unsigned char vector;
	if (error == -EINVAL)
		return mincore((void *)(uintptr_t)start, (size_t)getpagesize(), &vector) ? -ENOMEM
		                                                                         : -EOPNOTSUPP;
	return error == -EPERM ? -EOPNOTSUPP : error;
}

int umm_watch_add(struct umm_watch *watch, uint64_t start, uint64_t end)
{
	if (!is_range(start, end))
		return -EINVAL;
	pthread_mutex_lock(&watch->lock);
	int error = watch->is_dead ? -ESRCH : watched_add(&watch->watched, start, end);
	if (error) {
		pthread_mutex_unlock(&watch->lock);
		return error;
	}
	/* Also where it was added before: something else may be mapped there by now. */
	error = umm_uffd_register(watch->uffd, start, end - start, UMM_UFFD_MODE_WP, NULL);
	if (error) {
		watched_remove(&watch->watched, start, end);
		/* Whatever is there is not what was added before. */
		watched_gone(&watch->watched, start, end);
	}
	pthread_mutex_unlock(&watch->lock);
	return error ? why(error, start) : 0;
}

int umm_watch_keep(struct umm_watch *watch, uint64_t start, uint64_t end)
{
	if (!is_range(start, end))
		return -EINVAL;
	pthread_mutex_lock(&watch->lock);
	int error = watch->is_dead
	                    ? -ESRCH
	                    : umm_uffd_register(watch->uffd, start, end - start, UMM_UFFD_MODE_WP, NULL);
	pthread_mutex_unlock(&watch->lock);
	return error && error != -ESRCH ? why(error, start) : error;
}

int umm_watch_remove(struct umm_watch *watch, uint64_t start, uint64_t end)
{
	if (!is_range(start, end))
		return -EINVAL;
	pthread_mutex_lock(&watch->lock);
	int error = watch->is_dead ? -ESRCH : watched_remove(&watch->watched, start, end);
	/* Whoever runs in a callback may be what the change under way waits for. */
	uint64_t until = umm_notify_in_callback() ? 0 : umm_now_ns() + patience_ns;
	while (!error && !sweep(watch)) {
		pthread_mutex_unlock(&watch->lock);
		if (umm_now_ns() >= until) {
			wake(watch);
			return 0;
		}
		sched_yield();
		pthread_mutex_lock(&watch->lock);
	}
	pthread_mutex_unlock(&watch->lock);
	return error;
}

int umm_watch_changing(struct umm_watch *watch)
{
	return watch->is_dead ? -ESRCH : umm_uffd_changing(watch->uffd);
}

void umm_watch_stats(struct umm_watch *watch, struct umm_watch_stats *ret)
{
	pthread_mutex_lock(&watch->lock);
	*ret = watch->stats;
	ret->bytes = ret->pieces = 0;
	for (uint64_t i = 0; i < watch->watched.n; i++) {
		struct watched_piece *piece = &watch->watched.pieces[i];
		ret->pieces += piece->count > 0;
		ret->bytes += piece->count ? piece->end - piece->start : 0;
	}
	pthread_mutex_unlock(&watch->lock);
}
