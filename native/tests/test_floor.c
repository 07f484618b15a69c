/* The floors deliver the source's bytes to many threads, and leave no descriptor or SIGBUS handler behind. */
#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "bench/floor.h"
#include "bench/touch.h"

#define CHECK(condition, ...)                                                                                \
	do {                                                                                                 \
		if (!(condition)) {                                                                          \
			fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition);                      \
			fprintf(stderr, __VA_ARGS__);                                                        \
			fputc('\n', stderr);                                                                 \
			exit(1);                                                                             \
		}                                                                                            \
	} while (0)

enum { PAGES = 256, SKIP = 77 };

static unsigned open_descriptors(void)
{
	unsigned n = 0;
	DIR *dir = opendir("/proc/self/fd");
	CHECK(dir, "/proc/self/fd");
	while (readdir(dir))
		n++;
	closedir(dir);
	return n;
}

static void touch_all(int kind, uint64_t *source, uint64_t page, uint32_t threads)
{
	static uint64_t addresses[PAGES], expected[PAGES];
	static uint32_t latency[PAGES];
	struct umm_floor *floor;
	int err = umm_floor_create(kind, source, PAGES * page, &floor);
	CHECK(err == 0, "kind %d: %d", kind, err);
	for (unsigned i = 0; i < PAGES; i++) {
		/* 7 and 256 have no common factor: every page once, out of order. */
		uint64_t at = (uint64_t)(i * 7 % PAGES) * page;
		addresses[i] = umm_floor_address(floor) + at;
		expected[i] = source[at / 8];
	}
	struct umm_touch_job job = {
	        .addresses = addresses,
	        .expected = expected,
	        .count = PAGES,
	        .threads = threads,
	        .latency_ns = latency,
	};
	err = umm_bench_touch(&job);
	CHECK(err == 0 && job.wrong == 0, "kind %d: error %d, %llu wrong", kind, err,
	        (unsigned long long)job.wrong);
	CHECK(job.elapsed_ns > 0, "kind %d took no time", kind);
	for (unsigned i = 0; i < PAGES; i++)
		CHECK(latency[i] > 0, "touch %u took no time", i);
	if (kind == UMM_FLOOR_IN_THREAD) {
		struct umm_floor *second;
		CHECK(umm_floor_create(kind, source, page, &second) == -EBUSY, "a second owner of SIGBUS");
	}
	expected[PAGES - 1]++;
	err = umm_bench_touch(&job);
	CHECK(err == 0 && job.wrong == 1, "a wrong word was not counted: %llu",
	        (unsigned long long)job.wrong);
	CHECK(umm_floor_destroy(floor) == 0, "kind %d: a handler failed", kind);
}

int main(void)
{
	uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
	uint64_t *source;
	CHECK(posix_memalign((void **)&source, page, PAGES * page) == 0, "memory");
	for (uint64_t i = 0; i < PAGES * page / 8; i++)
		source[i] = i + 1;

	struct umm_floor *floor;
	int err = umm_floor_create(UMM_FLOOR_PINNED, source, page, &floor);
	if (err == -EPERM || err == -ENOSYS || err == -EACCES) {
		fprintf(stderr, "lacks: the right to use userfaultfd\n");
		return SKIP;
	}
	CHECK(err == 0 && umm_floor_handlers(floor) >= 1, "pinned floor: %d", err);
	CHECK(umm_floor_destroy(floor) == 0, "pinned floor");

	CHECK(umm_floor_create(UMM_FLOOR_PINNED, source, page + 1, &floor) == -EINVAL, "half a page");
	CHECK(umm_floor_create(UMM_FLOOR_PINNED, source, 0, &floor) == -EINVAL, "no pages");
	CHECK(umm_floor_create(99, source, page, &floor) == -EINVAL, "no such kind");

	struct sigaction was, now;
	sigaction(SIGBUS, NULL, &was);
	unsigned before = open_descriptors();
	for (int kind = UMM_FLOOR_PINNED; kind <= UMM_FLOOR_IN_THREAD; kind++) {
		touch_all(kind, source, page, 1);
		touch_all(kind, source, page, 16);
	}
	CHECK(open_descriptors() == before, "%u descriptors, %u before", open_descriptors(), before);

	sigaction(SIGBUS, NULL, &now);
	CHECK(now.sa_handler == was.sa_handler, "SIGBUS still has the floor's handler");

	uint64_t elapsed, wrong;
	err = umm_floor_populate(source, PAGES * page, 16 * page, 2u << 20, 1, &elapsed, &wrong);
	CHECK(err == 0 && wrong == 0 && elapsed > 0, "populate: %d, %llu wrong", err,
	        (unsigned long long)wrong);
	CHECK(umm_floor_populate(source, PAGES * page, 1, page, 0, &elapsed, &wrong) == -EINVAL,
	        "batch of 1 byte");
	free(source);
	return 0;
}
