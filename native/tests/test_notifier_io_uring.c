/* Fixed buffers of an io_uring go stale when their memory changes, and do not with the notifier's help. */
#include <pthread.h>
#include <sys/wait.h>

#include "common/clock.h"
#include "fixed_buffers.h"
#include "kernel/madvise.h"
#include "kernel/mapping.h"
#include "kernel/userfaultfd.h"
#include "notifier/calls.h"
#include "notifier/io_uring.h"
#include "notifier/notifier.h"

enum { SLOTS = 4, PAGES = 2 };
static const uint64_t second_ns = 1000000000, short_ns = 30000000;

static struct umm_io_uring *ring;
static uint64_t page, bytes;
static int file;

static uint8_t delivered(uint32_t slot, const uint8_t *memory)
{
	uint8_t *into = malloc(bytes);
	CHECK_EQUAL(deliver(ring, file, slot, memory, bytes, into), bytes);
	uint8_t first = into[0];
	for (uint64_t i = 0; i < bytes; i++)
		CHECK(into[i] == first);
	free(into);
	return first;
}

/* -- the changes: told or not, the memory is full of `value` afterwards --------------------- */

static void forget(uint8_t *memory, bool told)
{
	if (told)
		CHECK_OK(umm_mm_madvise((uintptr_t)memory, bytes, UMM_MADV_DONTNEED));
	else
		CHECK_OK(umm_madvise((uintptr_t)memory, bytes, UMM_MADV_DONTNEED));
}

static void unmap_and_map(uint8_t *memory, bool told)
{
	if (told)
		CHECK_OK(umm_mm_munmap((uintptr_t)memory, bytes));
	else
		CHECK_OK(umm_unmap((uintptr_t)memory, bytes));
	map_pages(memory, bytes);
}

static void map_over(uint8_t *memory, bool told)
{
	uint64_t at, flags = UMM_MAP_PRIVATE | UMM_MAP_ANONYMOUS | UMM_MAP_FIXED;
	if (told)
		CHECK_OK(umm_mm_mmap((uintptr_t)memory, bytes, PROT_READ | PROT_WRITE, flags, -1, 0, &at));
	else
		map_pages(memory, bytes);
}

static void move_and_map(uint8_t *memory, bool told)
{
	uint8_t *elsewhere = map_pages(NULL, bytes);
	uint64_t at, flags = UMM_MREMAP_MAYMOVE | UMM_MREMAP_FIXED;
	if (told)
		CHECK_OK(umm_mm_mremap((uintptr_t)memory, bytes, bytes, flags, (uintptr_t)elsewhere, &at));
	else
		CHECK_OK(umm_remap((uintptr_t)memory, bytes, bytes, flags, (uintptr_t)elsewhere, &at));
	map_pages(memory, bytes);
	munmap(elsewhere, bytes);
}

static void (*const changes[])(uint8_t *memory, bool told) = {forget, unmap_and_map, map_over, move_and_map};
enum { CHANGES = sizeof(changes) / sizeof(changes[0]) };

/* The control: what everything here is about. */
static void test_without_the_notifier_the_old_bytes_are_delivered(void)
{
	for (unsigned i = 0; i < CHANGES; i++) {
		uint8_t *memory = map_pages(NULL, bytes);
		memset(memory, 'a', bytes);
		CHECK_OK(umm_io_uring_update_slot(umm_io_uring_fd(ring), 0, (uintptr_t)memory, bytes));
		changes[i](memory, true); /* told, but nobody listens */
		memset(memory, 'b', bytes);
		CHECK_EQUAL(delivered(0, memory), 'a');
		CHECK_OK(umm_io_uring_update_slot(umm_io_uring_fd(ring), 0, 0, 0));
		munmap(memory, bytes);
	}
}

static struct umm_notify_io_uring *follow(uint64_t limit_ns, bool at_use)
{
	struct umm_notify_io_uring *buffers;
	const struct umm_notify_io_uring_options options = {
	        .ring_fd = umm_io_uring_fd(ring), .slots = SLOTS, .limit_ns = limit_ns, .at_use = at_use};
	CHECK_OK(umm_notify_io_uring_create(&options, &buffers));
	return buffers;
}

static struct umm_notify_io_uring_slot look(struct umm_notify_io_uring *buffers, uint32_t slot)
{
	struct umm_notify_io_uring_slot seen;
	CHECK_OK(umm_notify_io_uring_look(buffers, slot, &seen));
	return seen;
}

static uint8_t used(struct umm_notify_io_uring *buffers, uint32_t slot, const uint8_t *memory)
{
	uint64_t generation;
	CHECK_OK(umm_notify_io_uring_use(buffers, slot, second_ns, &generation));
	CHECK_EQUAL(generation, look(buffers, slot).generation);
	uint8_t value = delivered(slot, memory);
	CHECK_OK(umm_notify_io_uring_done(buffers, slot));
	return value;
}

static void test_with_it_the_right_bytes_arrive(bool at_use)
{
	struct umm_notify_io_uring *buffers = follow(second_ns, at_use);
	for (unsigned i = 0; i < CHANGES; i++) {
		uint8_t *memory = map_pages(NULL, bytes);
		uint32_t slot;
		memset(memory, 'a', bytes);
		CHECK_OK(umm_notify_io_uring_add(buffers, (uintptr_t)memory, bytes, &slot));
		CHECK_EQUAL(used(buffers, slot, memory), 'a');
		uint64_t generation = look(buffers, slot).generation;
		changes[i](memory, true);
		memset(memory, 'b', bytes);
		CHECK(look(buffers, slot).generation > generation);
		CHECK_EQUAL(used(buffers, slot, memory), 'b');
		CHECK_OK(umm_notify_io_uring_remove(buffers, slot));
		CHECK_EQUAL(umm_notify_io_uring_remove(buffers, slot), -EINVAL);
		munmap(memory, bytes);
	}
	CHECK_OK(umm_notify_io_uring_destroy(buffers));
}

/* Who does not count requests is served as well, where the memory is there at the end of the change. */
static void test_without_counting(void)
{
	struct umm_notify_io_uring *buffers = follow(second_ns, false);
	uint8_t *memory = map_pages(NULL, bytes);
	uint32_t slot;
	CHECK_OK(umm_notify_io_uring_add(buffers, (uintptr_t)memory, bytes, &slot));
	memset(memory, 'a', bytes);
	void (*const in_place[])(uint8_t *, bool) = {forget, map_over};
	for (unsigned i = 0; i < 2; i++) {
		in_place[i](memory, true);
		memset(memory, 'b' + (int)i, bytes);
		/* The end is told to a thread of the subscriber's, and not waited for. */
		while (!look(buffers, slot).registered)
			usleep(100);
		CHECK_EQUAL(delivered(slot, memory), 'b' + i);
	}
	CHECK_OK(umm_mm_munmap((uintptr_t)memory, bytes));
	while (look(buffers, slot).error != -EFAULT)
		usleep(100);
	CHECK(!look(buffers, slot).registered);
	CHECK_EQUAL(umm_notify_io_uring_use(buffers, slot, second_ns, NULL), -EFAULT);
	map_pages(memory, bytes);
	memset(memory, 'z', bytes);
	CHECK_EQUAL(used(buffers, slot, memory), 'z');
	CHECK_OK(umm_notify_io_uring_destroy(buffers));
	munmap(memory, bytes);
}

/* What the kernel tells: before, or after, and nobody waits. */
static void test_told_out_of_order(void)
{
	struct umm_notify_io_uring *buffers = follow(second_ns, false);
	uint8_t *memory = map_pages(NULL, bytes);
	uint32_t slot;
	memset(memory, 'a', bytes);
	CHECK_OK(umm_notify_io_uring_add(buffers, (uintptr_t)memory, bytes, &slot));
	umm_notify_post(umm_space_self(), (uintptr_t)memory, (uintptr_t)memory + page, 0, UMM_SOURCE_KERNEL,
	        UMM_REASON_REMOVE, UMM_PROMISE_BEFORE);
	forget(memory, false);
	memset(memory, 'b', bytes);
	CHECK_EQUAL(used(buffers, slot, memory), 'b');
	map_over(memory, false);
	umm_notify_post(umm_space_self(), (uintptr_t)memory, (uintptr_t)memory + page, 0, UMM_SOURCE_KERNEL,
	        UMM_REASON_UNMAP, UMM_PROMISE_AFTER);
	memset(memory, 'c', bytes);
	CHECK_EQUAL(used(buffers, slot, memory), 'c');
	forget(memory, false);
	umm_notify_page(umm_space_self(), (uintptr_t)memory, (uintptr_t)memory + page, UMM_SOURCE_USER,
	        UMM_REASON_REMOVE, UMM_NOTIFY_BLOCKABLE);
	memset(memory, 'd', bytes);
	CHECK_EQUAL(used(buffers, slot, memory), 'd');
	CHECK_OK(umm_notify_io_uring_destroy(buffers));
	munmap(memory, bytes);
}

/* -- requests in flight --------------------------------------------------------------------- */

struct changer {
	uint8_t *memory;
	_Atomic bool done;
};

static void *change_in_thread(void *argument)
{
	struct changer *changer = argument;
	forget(changer->memory, true);
	atomic_store(&changer->done, true);
	return NULL;
}

static void submit_read(int from, uint32_t slot, const uint8_t *memory)
{
	const struct umm_io_uring_request request = {
	        .operation = UMM_IO_URING_READ_FIXED,
	        .fd = from,
	        .address = (uintptr_t)memory,
	        .length = 1,
	        .offset = UINT64_MAX,
	        .slot = slot,
	};
	CHECK_OK(umm_io_uring_submit(ring, &request));
}

static void await_read(int to)
{
	uint64_t user_data;
	int32_t result;
	CHECK(write(to, "x", 1) == 1);
	CHECK_OK(umm_io_uring_wait(ring, &user_data, &result));
	CHECK_EQUAL(result, 1);
}

static void test_a_change_waits_for_requests_in_flight(bool too_long)
{
	struct umm_notify_io_uring *buffers = follow(too_long ? short_ns : 60 * second_ns, false);
	struct changer changer = {.memory = map_pages(NULL, bytes)};
	struct umm_notify_io_uring_stats stats;
	uint32_t slot;
	int ends[2];
	pthread_t thread;
	CHECK(pipe(ends) == 0);
	CHECK_OK(umm_notify_io_uring_add(buffers, (uintptr_t)changer.memory, bytes, &slot));
	CHECK_OK(umm_notify_io_uring_use(buffers, slot, second_ns, NULL));
	submit_read(ends[0], slot, changer.memory);
	CHECK(pthread_create(&thread, NULL, change_in_thread, &changer) == 0);
	while (look(buffers, slot).registered)
		usleep(100);
	CHECK_EQUAL(umm_notify_io_uring_remove(buffers, slot), -EBUSY);
	CHECK_EQUAL(umm_notify_io_uring_destroy(buffers), -EBUSY);
	CHECK_EQUAL(umm_notify_io_uring_use(buffers, slot, short_ns / 30, NULL), -ETIMEDOUT);
	if (too_long) {
		pthread_join(thread, NULL);
		/* The change is through, and the request still writes to the page that is nobody's now. */
		await_read(ends[1]);
		CHECK_EQUAL(changer.memory[0], 0);
		CHECK_OK(umm_notify_io_uring_done(buffers, slot));
	} else {
		usleep(10000);
		CHECK(!atomic_load(&changer.done));
		await_read(ends[1]);
		CHECK_EQUAL(changer.memory[0], 'x');
		CHECK_OK(umm_notify_io_uring_done(buffers, slot));
		pthread_join(thread, NULL);
	}
	CHECK_EQUAL(umm_notify_io_uring_done(buffers, slot), -EINVAL);
	memset(changer.memory, 'b', bytes);
	CHECK_EQUAL(used(buffers, slot, changer.memory), 'b');
	umm_notify_io_uring_stats(buffers, &stats);
	CHECK(too_long || stats.kept_pinned == 0);
	CHECK_OK(umm_notify_io_uring_destroy(buffers));
	close(ends[0]);
	close(ends[1]);
	munmap(changer.memory, bytes);
}

/* -- moving pages, as eviction does --------------------------------------------------------- */

static int move_out(int uffd, uint8_t *memory, uint8_t *staging)
{
	struct umm_uffd_result result;
	int err;
	do
		err = umm_uffd_move(uffd, (uintptr_t)staging, (uintptr_t)memory, bytes, 0, &result);
	while (err == -EAGAIN && result.done == 0);
	return err;
}

static int evict(int uffd, uint8_t *memory, uint8_t *staging)
{
	struct umm_notify_range range;
	int err = umm_notify_start(&range, umm_space_self(), (uintptr_t)memory, (uintptr_t)memory + bytes,
	        UMM_SOURCE_USER, UMM_REASON_EVICT, UMM_NOTIFY_BLOCKABLE | UMM_NOTIFY_VOLUNTARY);
	if (err)
		return err;
	err = move_out(uffd, memory, staging);
	umm_notify_end(&range, err);
	return err;
}

static void test_a_pinned_page_cannot_be_moved_and_an_emptied_one_can(void)
{
	int uffd = umm_uffd_open(UMM_UFFD_SOURCE_ANY, 0, NULL);
	if (uffd < 0 || umm_uffd_api(uffd, UMM_UFFD_FEATURE_MOVE, NULL, NULL)) {
		fprintf(stderr, "without UFFD_FEATURE_MOVE: moving pinned pages is left out\n");
		if (uffd >= 0)
			close(uffd);
		return;
	}
	uint8_t *memory = map_pages(NULL, 2 * bytes), *staging = memory + bytes;
	struct umm_notify_io_uring *buffers = follow(short_ns, false);
	uint32_t slot;
	madvise(memory, 2 * bytes, MADV_NOHUGEPAGE);
	memset(memory, 'a', bytes);
	CHECK_OK(umm_uffd_register(uffd, (uintptr_t)staging, bytes, UMM_UFFD_MODE_MISSING, NULL));
	CHECK_OK(umm_notify_io_uring_add(buffers, (uintptr_t)memory, bytes, &slot));
	CHECK_EQUAL(move_out(uffd, memory, staging), -EBUSY);

	/* A request is in flight: the eviction is given up. */
	CHECK_OK(umm_notify_io_uring_use(buffers, slot, second_ns, NULL));
	CHECK_EQUAL(evict(uffd, memory, staging), -EBUSY);
	CHECK_OK(umm_notify_io_uring_done(buffers, slot));

	CHECK_EQUAL(used(buffers, slot, memory), 'a');
	CHECK_OK(evict(uffd, memory, staging));
	CHECK_EQUAL(staging[0], 'a');
	/* Not brought back by its own buffer. */
	CHECK(!look(buffers, slot).registered);
	memset(memory, 'b', bytes);
	CHECK_EQUAL(used(buffers, slot, memory), 'b');
	CHECK_OK(umm_notify_io_uring_destroy(buffers));
	munmap(memory, 2 * bytes);
	close(uffd);
}

/* -- the rest ------------------------------------------------------------------------------- */

static void test_a_child_leaves_the_ring_alone(void)
{
	struct umm_notify_io_uring *buffers = follow(second_ns, false);
	uint8_t *memory = map_pages(NULL, bytes);
	uint32_t slot;
	int status;
	memset(memory, 'a', bytes);
	CHECK_OK(umm_notify_io_uring_add(buffers, (uintptr_t)memory, bytes, &slot));
	pid_t child = fork();
	CHECK(child >= 0);
	if (!child) {
		forget(memory, true);
		CHECK_EQUAL(umm_notify_io_uring_use(buffers, slot, 0, NULL), -ESHUTDOWN);
		CHECK_EQUAL(umm_notify_io_uring_add(buffers, (uintptr_t)memory, bytes, &slot), -ESHUTDOWN);
		CHECK_OK(umm_notify_io_uring_destroy(buffers));
		_exit(0);
	}
	CHECK(waitpid(child, &status, 0) == child);
	CHECK(status == 0);
	/* The pinned pages are the parent's still, and the child has had copies. */
	memset(memory, 'b', bytes);
	CHECK_EQUAL(delivered(slot, memory), 'b');
	CHECK_EQUAL(used(buffers, slot, memory), 'b');
	CHECK_OK(umm_notify_io_uring_destroy(buffers));
	munmap(memory, bytes);
}

static void test_refusals(void)
{
	struct umm_notify_io_uring *buffers;
	struct umm_notify_io_uring_options options = {.ring_fd = umm_io_uring_fd(ring), .slots = SLOTS + 1};
	CHECK_EQUAL(umm_notify_io_uring_create(&options, &buffers), -EINVAL);
	options.slots = 0;
	CHECK_EQUAL(umm_notify_io_uring_create(&options, &buffers), -EINVAL);
	struct umm_io_uring *bare = ring_with_slots(0);
	options = (struct umm_notify_io_uring_options){.ring_fd = umm_io_uring_fd(bare), .slots = 1};
	CHECK_EQUAL(umm_notify_io_uring_create(&options, &buffers), -ENXIO);
	umm_io_uring_destroy(bare);
	struct umm_io_uring *single;
	if (umm_io_uring_create(8, UMM_IO_URING_SINGLE_ISSUER, &single) == 0) {
		options.ring_fd = umm_io_uring_fd(single);
		CHECK_OK(umm_io_uring_register_slots(options.ring_fd, 1));
		CHECK_EQUAL(umm_notify_io_uring_create(&options, &buffers), -EEXIST);
		umm_io_uring_destroy(single);
	}
	buffers = follow(0, false);
	uint8_t *memory = map_pages(NULL, bytes);
	uint32_t slot;
	for (int i = 0; i < SLOTS; i++)
		CHECK_OK(umm_notify_io_uring_add(buffers, (uintptr_t)memory, bytes, &slot));
	CHECK_EQUAL(umm_notify_io_uring_add(buffers, (uintptr_t)memory, bytes, &slot), -ENOSPC);
	CHECK_OK(umm_notify_io_uring_remove(buffers, 1));
	CHECK_EQUAL(umm_notify_io_uring_add(buffers, (uintptr_t)memory, 0, &slot), -EINVAL);
	CHECK_EQUAL(umm_notify_io_uring_use(buffers, SLOTS, 0, NULL), -EINVAL);
	CHECK_EQUAL(umm_notify_io_uring_use(buffers, 1, 0, NULL), -EINVAL);
	munmap(memory, bytes);
	CHECK_EQUAL(umm_notify_io_uring_add(buffers, (uintptr_t)memory, bytes, &slot), -EFAULT);
	CHECK_OK(umm_notify_io_uring_destroy(buffers));
}

int main(void)
{
	umm_notify_set_reporter(umm_notify_keep_reports, NULL); /* two are late on purpose */
	page = (uint64_t)sysconf(_SC_PAGESIZE);
	bytes = PAGES * page;
	ring = ring_with_slots(SLOTS);
	file = umm_memfd_create("delivered", UMM_MFD_CLOEXEC);
	CHECK(file >= 0);
	test_without_the_notifier_the_old_bytes_are_delivered();
	test_with_it_the_right_bytes_arrive(false);
	test_with_it_the_right_bytes_arrive(true);
	test_without_counting();
	test_told_out_of_order();
	test_a_change_waits_for_requests_in_flight(false);
	test_a_change_waits_for_requests_in_flight(true);
	test_a_pinned_page_cannot_be_moved_and_an_emptied_one_can();
	test_a_child_leaves_the_ring_alone();
	test_refusals();
	close(file);
	umm_io_uring_destroy(ring);
	return 0;
}
