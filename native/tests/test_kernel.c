/* The kernel layer: outcomes of the userfaultfd ioctls, pagemap and its scan, mappings, other processes. */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "kernel/madvise.h"
#include "kernel/mapping.h"
#include "kernel/pagemap.h"
#include "kernel/prctl.h"
#include "kernel/probe.h"
#include "kernel/process.h"
#include "kernel/userfaultfd.h"

static uint64_t page;

static uint64_t map_pages(uint64_t pages)
{
	uint64_t address = 0;
	CHECK_OK(umm_map(0, pages * page, PROT_READ | PROT_WRITE, UMM_MAP_PRIVATE | UMM_MAP_ANONYMOUS, -1, 0,
	        &address));
	/* Without transparent huge pages there is nothing to switch off. */
	int error = umm_madvise(address, pages * page, UMM_MADV_NOHUGEPAGE);
	CHECK(error == 0 || error == -EINVAL);
	return address;
}

static void fill(uint64_t address, uint64_t len, int value)
{
	memset((void *)(uintptr_t)address, value, len);
}

static int byte_at(uint64_t address)
{
	return *(volatile unsigned char *)(uintptr_t)address;
}

static int open_with(uint64_t features)
{
	int uffd = umm_uffd_open(UMM_UFFD_SOURCE_ANY, O_NONBLOCK, NULL);
	CHECK(uffd >= 0);
	CHECK_OK(umm_uffd_api(uffd, features, NULL, NULL));
	return uffd;
}

static void test_opening(void)
{
	for (int source = UMM_UFFD_SOURCE_SYSCALL; source <= UMM_UFFD_SOURCE_ANY; source++) {
		int used = -1, fd = umm_uffd_open(source, 0, &used);
		if (fd < 0)
			continue;
		CHECK(source == UMM_UFFD_SOURCE_ANY || used == source);
		CHECK(fcntl(fd, F_GETFD) & FD_CLOEXEC);
		close(fd);
	}
	CHECK_EQUAL(umm_uffd_open(-1, 0, NULL), -EINVAL);
	CHECK_EQUAL(umm_uffd_open(99, 0, NULL), -EINVAL);
	int fd = umm_uffd_open(UMM_UFFD_SOURCE_ANY, 0, NULL);
	CHECK_EQUAL(umm_uffd_api(fd, UINT64_C(1) << 50, NULL, NULL), -EINVAL);
	close(fd);
}

static void test_outcomes(void)
{
	enum { PAGES = 8 };
	int uffd = open_with(0);
	uint64_t memory = map_pages(PAGES), source = map_pages(PAGES), ioctls = 0;
	struct umm_uffd_result result;
	fill(source, PAGES * page, 0x42);
	CHECK_OK(umm_uffd_register(uffd, memory, PAGES * page, UMM_UFFD_MODE_MISSING, &ioctls));
	CHECK(ioctls & UINT64_C(1) << 3);

	CHECK_OK(umm_uffd_copy(uffd, memory + 2 * page, source, page, 0, &result));
	CHECK_EQUAL(result.outcome, UMM_OUTCOME_INSTALLED);
	CHECK_EQUAL(result.done, page);
	CHECK_EQUAL(byte_at(memory + 2 * page), 0x42);

	CHECK_EQUAL(umm_uffd_copy(uffd, memory + 2 * page, source, page, 0, &result), -EEXIST);
	CHECK_EQUAL(result.outcome, UMM_OUTCOME_ALREADY_THERE);
	CHECK_EQUAL(result.done, 0);

	CHECK_EQUAL(umm_uffd_copy(uffd, memory, source, 4 * page, 0, &result), -EAGAIN);
	CHECK_EQUAL(result.outcome, UMM_OUTCOME_PARTIAL);
	CHECK_EQUAL(result.done, 2 * page);

	CHECK_EQUAL(umm_uffd_copy(uffd, memory + 1, source, page, 0, &result), -EINVAL);
	CHECK_EQUAL(result.outcome, UMM_OUTCOME_FAILED);
	CHECK_EQUAL(result.error, EINVAL);

	CHECK_OK(umm_uffd_zeropage(uffd, memory + 3 * page, page, 0, &result));
	CHECK_EQUAL(byte_at(memory + 3 * page), 0);

	CHECK_OK(umm_uffd_unregister(uffd, memory, PAGES * page));
	CHECK_EQUAL(umm_uffd_copy(uffd, memory + 5 * page, source, page, 0, &result), -ENOENT);
	CHECK_EQUAL(result.outcome, UMM_OUTCOME_GONE);

	struct umm_uffd_msg message;
	CHECK_EQUAL(umm_uffd_read(uffd, &message), -EAGAIN);
	close(uffd);
	CHECK_EQUAL(umm_uffd_read(uffd, &message), -EBADF);
	CHECK_OK(umm_unmap(memory, PAGES * page));
	CHECK_OK(umm_unmap(source, PAGES * page));
}

struct reader {
	uint64_t address;
	int value;
};

static void *read_byte(void *arg)
{
	struct reader *reader = arg;
	reader->value = byte_at(reader->address);
	return NULL;
}

static void test_a_fault_is_served(void)
{
	int uffd = umm_uffd_open(UMM_UFFD_SOURCE_ANY, 0, NULL);
	CHECK(uffd >= 0);
	CHECK_OK(umm_uffd_api(uffd, 0, NULL, NULL));
	uint64_t memory = map_pages(2), source = map_pages(1);
	struct umm_uffd_result result;
	struct umm_uffd_msg message;
	fill(source, page, 0x17);
	CHECK_OK(umm_uffd_register(uffd, memory, 2 * page, UMM_UFFD_MODE_MISSING, NULL));
	struct reader reader = {.address = memory + page + 3, .value = -1};
	pthread_t thread;
	CHECK_OK(-pthread_create(&thread, NULL, read_byte, &reader));
	CHECK_OK(umm_uffd_read(uffd, &message));
	CHECK_EQUAL(message.event, UMM_UFFD_EVENT_PAGEFAULT);
	CHECK_EQUAL(message.arg1 / page, memory / page + 1);
	CHECK(!(message.arg0 & UMM_UFFD_FAULT_WRITE));
	CHECK_OK(umm_uffd_copy(uffd, memory + page, source, page, UMM_UFFD_COPY_DONTWAKE, &result));
	CHECK_OK(umm_uffd_wake(uffd, memory + page, page));
	pthread_join(thread, NULL);
	CHECK_EQUAL(reader.value, 0x17);
	close(uffd);
	CHECK_OK(umm_unmap(memory, 2 * page));
	CHECK_OK(umm_unmap(source, page));
}

static void test_move_and_poison(uint64_t features)
{
	uint64_t wanted = features & (UMM_UFFD_FEATURE_MOVE | UMM_UFFD_FEATURE_POISON);
	int uffd = open_with(wanted), pagemap = umm_pagemap_open(0);
	uint64_t memory = map_pages(4), entries[4];
	struct umm_uffd_result result;
	fill(memory, page, 0x33);
	CHECK_OK(umm_uffd_register(uffd, memory, 4 * page, UMM_UFFD_MODE_MISSING, NULL));
	if (wanted & UMM_UFFD_FEATURE_MOVE) {
		CHECK_OK(umm_uffd_move(uffd, memory + page, memory, page, 0, &result));
		CHECK_EQUAL(byte_at(memory + page), 0x33);
		CHECK_EQUAL(umm_uffd_move(uffd, memory + 2 * page, memory, page, 0, &result), -ENOENT);
		CHECK_OK(umm_uffd_move(
		        uffd, memory + 2 * page, memory, page, UMM_UFFD_MOVE_ALLOW_SRC_HOLES, &result));
	}
	if (wanted & UMM_UFFD_FEATURE_POISON) {
		CHECK_OK(umm_uffd_poison(uffd, memory + 3 * page, page, 0, &result));
		CHECK_OK(umm_pagemap_read(pagemap, memory, 4, page, entries));
		CHECK(!(entries[3] & UMM_PAGEMAP_PRESENT));
		/* Looks like swap: whoever asks whether a page is missing asks for PRESENT, not for zero. */
		CHECK(entries[3] & UMM_PAGEMAP_SWAP);
	}
	close(pagemap);
	close(uffd);
	CHECK_OK(umm_unmap(memory, 4 * page));
}

static void test_move_cost(uint64_t features)
{
	struct umm_move_cost cost = {0};
	int error = umm_probe_move_cost(&cost);
	if (!(features & UMM_UFFD_FEATURE_MOVE)) {
		CHECK_EQUAL(error, -EINVAL);
		return;
	}
	CHECK_OK(error);
	CHECK(cost.single_ns > 0 && cost.batch_ns > 0);
}

static void test_pagemap(void)
{
	enum { PAGES = 16 };
	int fd = umm_pagemap_open(0);
	CHECK(fd >= 0);
	CHECK(fcntl(fd, F_GETFD) & FD_CLOEXEC);
	uint64_t memory = map_pages(PAGES), entries[PAGES];
	unsigned char residency[PAGES];
	for (int i = 0; i < PAGES; i += 3)
		fill(memory + i * page, 1, 1);
	CHECK_OK(umm_pagemap_read(fd, memory, PAGES, page, entries));
	CHECK_OK(umm_mincore(memory, PAGES * page, residency));
	for (int i = 0; i < PAGES; i++) {
		CHECK_EQUAL(!!(entries[i] & UMM_PAGEMAP_PRESENT), i % 3 == 0);
		CHECK_EQUAL(residency[i] & 1, i % 3 == 0);
	}
	CHECK_EQUAL(umm_pagemap_read(fd, memory + 1, 1, page, entries), -EINVAL);
	CHECK_EQUAL(umm_pagemap_read(fd, memory, 1, 0, entries), -EINVAL);
	CHECK_EQUAL(umm_pagemap_read(fd, UINT64_MAX - page + 1, 1, page, entries), -EIO);
	CHECK_EQUAL(umm_pagemap_open(-1), -EINVAL);
	CHECK_EQUAL(umm_pagemap_open(INT32_MAX), -ENOENT);
	int own = umm_pagemap_open(getpid());
	CHECK(own >= 0);
	close(own);
	close(fd);
	CHECK_OK(umm_unmap(memory, PAGES * page));
}

/* A scan in steps of any size finds each region once. The kernel's walk_end makes it twice for some of these
 * steps (its inner rounds hold 512 regions), hence the correction. */
static void test_scan_finds_each_region_once(void)
{
	enum { REGIONS = 3000 };
	static struct umm_page_region found[REGIONS];
	const uint64_t steps[] = {7, 511, 512, 1024, 2999, REGIONS};
	uint64_t memory = map_pages(2 * REGIONS), end = memory + 2 * REGIONS * page;
	int fd = umm_pagemap_open(0);
	for (uint64_t i = 0; i < REGIONS; i++)
		fill(memory + 2 * i * page, 1, 1);
	for (unsigned s = 0; s < sizeof(steps) / sizeof(*steps); s++) {
		struct umm_pagemap_scan args = {
		        .start = memory,
		        .end = end,
		        .vec = (uintptr_t)found,
		        .vec_len = steps[s],
		        .category_anyof_mask = UMM_PAGE_IS_PRESENT,
		        .return_mask = UMM_PAGE_IS_PRESENT,
		};
		uint64_t seen = 0;
		while (args.start < end) {
			int count = umm_pagemap_scan(fd, &args);
			if (count == -ENOTTY) {
				fprintf(stderr, "no PAGEMAP_SCAN: scan not tested\n");
				goto out;
			}
			CHECK(count >= 0 && (uint64_t)count <= steps[s]);
			for (int i = 0; i < count; i++, seen++) {
				CHECK_EQUAL(found[i].start, memory + 2 * seen * page);
				CHECK_EQUAL(found[i].end, found[i].start + page);
				CHECK_EQUAL(found[i].categories, UMM_PAGE_IS_PRESENT);
			}
			CHECK(args.walk_end > args.start);
			args.start = args.walk_end;
		}
		CHECK_EQUAL(seen, REGIONS);
	}
out:
	close(fd);
	CHECK_OK(umm_unmap(memory, 2 * REGIONS * page));
}

static void test_scan_limits_and_errors(void)
{
	struct umm_page_region found[8];
	uint64_t memory = map_pages(8);
	int fd = umm_pagemap_open(0);
	fill(memory, 8 * page, 1);
	struct umm_pagemap_scan args = {
	        .start = memory,
	        .end = memory + 8 * page,
	        .vec = (uintptr_t)found,
	        .vec_len = 8,
	        .max_pages = 3,
	        .category_anyof_mask = UMM_PAGE_IS_PRESENT,
	        .return_mask = UMM_PAGE_IS_PRESENT,
	};
	int count = umm_pagemap_scan(fd, &args);
	if (count != -ENOTTY) {
		CHECK_EQUAL(count, 1);
		CHECK_EQUAL(found[0].end - found[0].start, 3 * page);
		CHECK_EQUAL(args.walk_end, memory + 3 * page);
		args.max_pages = 8;
		CHECK_EQUAL(umm_pagemap_scan(fd, &args), 1);
		CHECK_EQUAL(args.walk_end, memory + 8 * page);
		args.flags = UMM_PAGEMAP_SCAN_WP_MATCHING | UMM_PAGEMAP_SCAN_CHECK_WPASYNC;
		CHECK_EQUAL(umm_pagemap_scan(fd, &args), -EPERM);
		args.flags = 0;
		args.start++;
		CHECK_EQUAL(umm_pagemap_scan(fd, &args), -EINVAL);
	}
	close(fd);
	CHECK_EQUAL(umm_pagemap_scan(fd, &args), -EBADF);
	CHECK_OK(umm_unmap(memory, 8 * page));
}

static void test_mappings(void)
{
	uint64_t memory = map_pages(4), other = 0;
	const uint64_t anonymous = UMM_MAP_PRIVATE | UMM_MAP_ANONYMOUS;
	CHECK_EQUAL(umm_map(memory, page, PROT_READ, anonymous | UMM_MAP_FIXED_NOREPLACE, -1, 0, &other),
	        -EEXIST);
	CHECK_EQUAL(umm_map(0, 0, PROT_READ, anonymous, -1, 0, &other), -EINVAL);
	fill(memory, page, 5);
	CHECK_OK(umm_remap(memory, page, page, UMM_MREMAP_MAYMOVE | UMM_MREMAP_DONTUNMAP, 0, &other));
	CHECK_EQUAL(byte_at(other), 5);
	CHECK_EQUAL(byte_at(memory), 0);
	CHECK_OK(umm_unmap(other, page));
	CHECK_OK(umm_protect(memory, page, PROT_NONE));
	CHECK_OK(umm_unmap(memory, 4 * page));
	CHECK_EQUAL(umm_protect(memory, page, PROT_READ), -ENOMEM);
	CHECK_EQUAL(umm_madvise(memory + 1, page, UMM_MADV_WILLNEED), -EINVAL);
	CHECK_EQUAL(umm_map_huge_bits(0), 0);
	CHECK_EQUAL(umm_map_huge_bits(UINT64_C(2) << 20), UINT64_C(21) << 26);
	CHECK_EQUAL(umm_map_huge_bits(UINT64_C(16) << 30), UINT64_C(34) << 26);
}

static void test_memfd(void)
{
	int fd = umm_memfd_create("test", UMM_MFD_CLOEXEC | UMM_MFD_ALLOW_SEALING);
	CHECK(fd >= 0);
	CHECK_EQUAL(umm_get_seals(fd), 0);
	CHECK_OK(umm_add_seals(fd, UMM_SEAL_GROW | UMM_SEAL_SEAL));
	CHECK_EQUAL(umm_get_seals(fd), UMM_SEAL_GROW | UMM_SEAL_SEAL);
	CHECK_EQUAL(umm_add_seals(fd, UMM_SEAL_SHRINK), -EPERM);
	close(fd);
	CHECK_EQUAL(umm_get_seals(fd), -EBADF);
	CHECK_EQUAL(umm_memfd_create("test", UINT64_C(1) << 20), -EINVAL);
}

static void test_processes(void)
{
	uint64_t memory = map_pages(2), done = 7;
	fill(memory, 2 * page, 0x61);
	pid_t child = fork();
	if (child == 0) {
		pause();
		_exit(0);
	}
	CHECK(child > 0);
	int pidfd = umm_pidfd_open(child, 0);
	CHECK(pidfd >= 0);
	char into[64] = {0};
	struct umm_span local = {(uintptr_t)into, sizeof(into)}, remote = {memory, sizeof(into)};
	CHECK_OK(umm_process_read(child, &local, 1, &remote, 1, &done));
	CHECK_EQUAL(done, sizeof(into));
	CHECK_EQUAL(into[63], 0x61);
	memset(into, 0x62, sizeof(into));
	CHECK_OK(umm_process_write(child, &local, 1, &remote, 1, &done));
	CHECK_EQUAL(byte_at(memory), 0x61); /* the child's copy was written, not ours */
	remote.address = 0;
	CHECK_EQUAL(umm_process_read(child, &local, 1, &remote, 1, &done), -EFAULT);
	CHECK_EQUAL(done, 0);
	struct umm_span spans[] = {{memory, page}, {memory + page, page}};
	int error = umm_process_madvise(pidfd, spans, 2, UMM_MADV_COLD, &done);
	CHECK(error == -EPERM || (error == 0 && done == 2 * page)); /* EPERM: without CAP_SYS_NICE */
	CHECK_EQUAL(umm_pidfd_getfd(pidfd, 9999), -EBADF);
	kill(child, SIGKILL);
	waitpid(child, NULL, 0);
	CHECK_EQUAL(umm_pidfd_getfd(pidfd, 0), -ESRCH);
	close(pidfd);
	CHECK_EQUAL(umm_pidfd_open(-1, 0), -EINVAL);
	CHECK_OK(umm_unmap(memory, 2 * page));
}

static void test_prctl(void)
{
	int before = umm_thp_disable_get();
	CHECK(before >= 0);
	CHECK_OK(umm_thp_disable_set(UMM_THP_DISABLED));
	CHECK_EQUAL(umm_thp_disable_get(), UMM_THP_DISABLED);
	int error = umm_thp_disable_set(UMM_THP_EXCEPT_ADVISED);
	CHECK(error == 0 || error == -EINVAL); /* EINVAL: before Linux 6.18 */
	if (!error)
		CHECK_EQUAL(umm_thp_disable_get(), UMM_THP_EXCEPT_ADVISED);
	CHECK_EQUAL(umm_thp_disable_set(2), -EINVAL);
	CHECK_OK(umm_thp_disable_set(before));
	CHECK_OK(umm_dumpable_set(0));
	CHECK_EQUAL(umm_dumpable_get(), 0);
	CHECK_OK(umm_dumpable_set(1));
}

int main(void)
{
	uint64_t features = 0;
	page = (uint64_t)sysconf(_SC_PAGESIZE);
	test_pagemap();
	test_scan_finds_each_region_once();
	test_scan_limits_and_errors();
	test_mappings();
	test_memfd();
	test_processes();
	test_prctl();
	int error = umm_uffd_probe_features(UMM_UFFD_SOURCE_ANY, &features);
	if (error) {
		fprintf(stderr, "lacks: userfaultfd (%s)\n", strerror(-error));
		return TEST_SKIPPED;
	}
	test_opening();
	test_outcomes();
	test_a_fault_is_served();
	test_move_and_poison(features);
	test_move_cost(features);
	return 0;
}
