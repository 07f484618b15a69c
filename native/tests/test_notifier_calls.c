/* mmap, munmap, mremap, madvise and mprotect through us: told before and after, exactly what changes. */
#include <errno.h>
#include <unistd.h>

#include "kernel/madvise.h"
#include "kernel/mapping.h"
#include "notifier/calls.h"
#include "tests/notifier_record.h"

static uint64_t page;

static const int read_write = PROT_READ | PROT_WRITE;
static const uint64_t anonymous = UMM_MAP_PRIVATE | UMM_MAP_ANONYMOUS;

static uint64_t map_filled(uint64_t pages)
{
	uint64_t address = 0;
	CHECK_OK(umm_mm_mmap(0, pages * page, read_write, anonymous, -1, 0, &address));
	memset((void *)(uintptr_t)address, 0x42, pages * page);
	return address;
}

/* The pair of events i and j: one change, told before (still there) and after. */
static void check_pair(struct record *r, int i, int j, uint64_t start, uint64_t end, int reason, int error)
{
	struct umm_notify_event *first = &r->events[i], *last = &r->events[j];
	CHECK(i < r->n && j < r->n);
	CHECK_EQUAL(first->kind, UMM_NOTIFY_START);
	CHECK_EQUAL(last->kind, UMM_NOTIFY_END);
	CHECK_EQUAL(first->id, last->id);
	CHECK_EQUAL(first->reason, reason);
	CHECK_EQUAL(last->reason, reason);
	CHECK_EQUAL(first->source, UMM_SOURCE_CALL);
	CHECK_EQUAL(first->promise, UMM_PROMISE_ORDERED);
	CHECK_EQUAL(first->start, start);
	CHECK_EQUAL(first->end, end);
	CHECK_EQUAL(last->start, start);
	CHECK_EQUAL(last->end, end);
	CHECK_EQUAL(last->error, error);
	CHECK(first->flags & UMM_NOTIFY_BLOCKABLE && !(first->flags & UMM_NOTIFY_VOLUNTARY));
}

static void munmap_is_told(void)
{
	struct record r;
	uint64_t at = map_filled(9);
	record_open(&r, at, at + 8 * page, true);
	CHECK_OK(umm_mm_munmap(at + page, 2 * page - 1));
	CHECK_EQUAL(r.n, 2);
	check_pair(&r, 0, 1, at + page, at + 3 * page, UMM_REASON_UNMAP, 0);
	CHECK(r.filled[0] && !r.mapped[1]);
	/* A hole is no fault: the kernel unmaps nothing and says 0. */
	CHECK_OK(umm_mm_munmap(at, 8 * page));
	CHECK_EQUAL(r.n, 4);
	check_pair(&r, 2, 3, at, at + 8 * page, UMM_REASON_UNMAP, 0);
	CHECK_OK(umm_mm_munmap(at + 8 * page, page)); /* not of this subscription */
	CHECK_EQUAL(r.n, 4);
	record_close(&r);
}

static void refused_arguments_are_not_told(void)
{
	struct record r;
	uint64_t at = map_filled(4), ret;
	record_open(&r, 0, UINT64_MAX, false);
	CHECK_EQUAL(umm_mm_munmap(at + 1, page), -EINVAL);
	CHECK_EQUAL(umm_mm_munmap(at, 0), -EINVAL);
	CHECK_EQUAL(umm_mm_munmap(at, UINT64_MAX), -EINVAL);
	CHECK_EQUAL(umm_mm_munmap(at, UINT64_MAX - page), -EINVAL);
	CHECK_EQUAL(umm_mm_munmap(UINT64_MAX - page + 1, 2 * page), -EINVAL);
	CHECK_EQUAL(umm_mm_mprotect(at + 1, page, PROT_READ), -EINVAL);
	CHECK_OK(umm_mm_mprotect(at, 0, PROT_READ));
	CHECK_EQUAL(umm_mm_madvise(at + 1, page, UMM_MADV_DONTNEED), -EINVAL);
	CHECK_OK(umm_mm_madvise(at, 0, UMM_MADV_DONTNEED));
	CHECK_EQUAL(umm_mm_madvise(at, UINT64_MAX, UMM_MADV_DONTNEED), -EINVAL);
	CHECK_EQUAL(umm_mm_madvise(at, page, 12345), -EINVAL);
	CHECK_EQUAL(umm_mm_mremap(at + 1, page, page, UMM_MREMAP_MAYMOVE, 0, &ret), -EINVAL);
	CHECK_EQUAL(umm_mm_mremap(at, page, 0, UMM_MREMAP_MAYMOVE, 0, &ret), -EINVAL);
	CHECK_EQUAL(umm_mm_mremap(at, page, page, UMM_MREMAP_FIXED, at + 8 * page, &ret), -EINVAL);
	CHECK_EQUAL(
	        umm_mm_mremap(at, 2 * page, 2 * page, UMM_MREMAP_FIXED | UMM_MREMAP_MAYMOVE, at + page, &ret),
	        -EINVAL);
	CHECK_EQUAL(umm_mm_mremap(at, 2 * page, page, UMM_MREMAP_DONTUNMAP | UMM_MREMAP_MAYMOVE, 0, &ret),
	        -EINVAL);
	CHECK_EQUAL(umm_mm_mmap(at + 1, page, read_write, anonymous | UMM_MAP_FIXED, -1, 0, &ret), -EINVAL);
	CHECK_EQUAL(umm_mm_mmap(at, page, read_write, UMM_MAP_PRIVATE | UMM_MAP_FIXED, -1, 0, &ret), -EBADF);
	CHECK_EQUAL(
	        umm_mm_mmap(at, page, read_write, anonymous | UMM_MAP_FIXED_NOREPLACE, -1, 0, &ret), -EEXIST);
	CHECK_EQUAL(umm_mm_mmap(0, 0, read_write, anonymous, -1, 0, &ret), -EINVAL);
	CHECK_EQUAL(r.n, 0);
	record_close(&r);
	CHECK_OK(umm_mm_munmap(at, 4 * page));
}

static void mmap_over_memory_is_told(void)
{
	struct record r;
	uint64_t at = map_filled(4), ret = 0;
	CHECK_OK(umm_mm_munmap(at + 2 * page, 2 * page));
	record_open(&r, at, at + 4 * page, true);
	/* into free space: nobody can hold anything */
	CHECK_OK(umm_mm_mmap(at + 3 * page, page, read_write, anonymous | UMM_MAP_FIXED, -1, 0, &ret));
	CHECK_EQUAL(ret, at + 3 * page);
	CHECK_OK(umm_mm_mmap(at + 2 * page, page, read_write, anonymous, -1, 0, &ret));
	CHECK_EQUAL(r.n, 0);
	CHECK_OK(umm_mm_munmap(ret, page));
	int before = r.n;
	CHECK_OK(umm_mm_mmap(at + page, 2 * page - 7, read_write, anonymous | UMM_MAP_FIXED, -1, 0, &ret));
	CHECK_EQUAL(ret, at + page);
	CHECK_EQUAL(r.n, before + 2);
	check_pair(&r, before, before + 1, at + page, at + 3 * page, UMM_REASON_UNMAP, 0);
	CHECK(r.filled[before] && r.mapped[before + 1] && !r.filled[before + 1]);
	/* MAP_SHARED_VALIDATE does not know MAP_FIXED_NOREPLACE, with which we look */
	int fd = umm_memfd_create("test", UMM_MFD_CLOEXEC);
	CHECK(fd >= 0 && ftruncate(fd, (off_t)page) == 0);
	CHECK_OK(umm_mm_mmap(at, page, read_write, 3 | UMM_MAP_FIXED, fd, 0, &ret));
	CHECK_EQUAL(r.n, before + 4);
	check_pair(&r, before + 2, before + 3, at, at + page, UMM_REASON_UNMAP, 0);
	close(fd);
	record_close(&r);
	CHECK_OK(umm_mm_munmap(at, 4 * page));
}

static void mremap_is_told(void)
{
	struct record r;
	uint64_t at = map_filled(8), there = map_filled(8), ret = 0;
	record_open(&r, 0, UINT64_MAX, true);
	/* shrinks in place: only the tail */
	CHECK_OK(umm_mm_mremap(at, 8 * page, 6 * page - 1, 0, 0, &ret));
	CHECK_EQUAL(r.n, 2);
	check_pair(&r, 0, 1, at + 6 * page, at + 8 * page, UMM_REASON_UNMAP, 0);
	CHECK(r.filled[0] && !r.mapped[1]);
	/* grows in place: nothing. (The two pages behind it were its own.) */
	CHECK_OK(umm_mm_mremap(at, 6 * page, 7 * page, UMM_MREMAP_MAYMOVE, 0, &ret));
	CHECK_EQUAL(ret, at);
	CHECK_OK(umm_mm_mremap(at, 7 * page, 7 * page, UMM_MREMAP_MAYMOVE, 0, &ret));
	CHECK_EQUAL(r.n, 2);
	/* part of a mapping cannot grow in place */
	CHECK_EQUAL(umm_mm_mremap(at, page, 2 * page, 0, 0, &ret), -ENOMEM);
	CHECK_EQUAL(r.n, 2);
	CHECK_OK(umm_mm_mremap(at, page, 2 * page, UMM_MREMAP_MAYMOVE, 0, &ret));
	CHECK(ret != at);
	CHECK_EQUAL(r.n, 4);
	check_pair(&r, 2, 3, at, at + page, UMM_REASON_MOVE, 0);
	CHECK_EQUAL(r.events[3].to, ret);
	CHECK(r.filled[2] && !r.mapped[3]);
	CHECK_OK(umm_unmap(ret, 2 * page));
	/* onto a target, shrinking: all three */
	CHECK_OK(umm_mm_mremap(
	        at + page, 3 * page, 2 * page, UMM_MREMAP_MAYMOVE | UMM_MREMAP_FIXED, there + page, &ret));
	CHECK_EQUAL(ret, there + page);
	CHECK_EQUAL(r.n, 10);
	check_pair(&r, 4, 9, there + page, there + 3 * page, UMM_REASON_UNMAP, 0);
	check_pair(&r, 5, 8, at + 3 * page, at + 4 * page, UMM_REASON_UNMAP, 0);
	check_pair(&r, 6, 7, at + page, at + 3 * page, UMM_REASON_MOVE, 0);
	CHECK_EQUAL(r.events[7].to, there + page);
	CHECK(r.filled[4] && r.filled[5] && r.filled[6] && !r.mapped[7] && !r.mapped[8]);
	/* the old mapping stays, empty */
	CHECK_OK(umm_mm_mremap(there, page, page, UMM_MREMAP_MAYMOVE | UMM_MREMAP_DONTUNMAP, 0, &ret));
	CHECK_EQUAL(r.n, 12);
	check_pair(&r, 10, 11, there, there + page, UMM_REASON_MOVE, 0);
	CHECK_EQUAL(r.events[11].to, ret);
	CHECK(r.filled[10] && r.mapped[11] && !r.filled[11]);
	CHECK_OK(umm_unmap(ret, page));
	/* fails after it was announced: a hole does not move */
	CHECK_EQUAL(
	        umm_mm_mremap(at + 2 * page, page, page, UMM_MREMAP_MAYMOVE | UMM_MREMAP_FIXED, there, &ret),
	        -EFAULT);
	CHECK_EQUAL(r.n, 16);
	check_pair(&r, 12, 15, there, there + page, UMM_REASON_UNMAP, -EFAULT);
	check_pair(&r, 13, 14, at + 2 * page, at + 3 * page, UMM_REASON_MOVE, -EFAULT);
	CHECK_EQUAL(r.events[14].to, 0);
	record_close(&r);
	CHECK_OK(umm_mm_munmap(at, 8 * page));
	CHECK_OK(umm_mm_munmap(there, 8 * page));
}

static void shared_memory_mapped_twice_is_not_told(void)
{
	struct record r;
	uint64_t at = 0, ret = 0;
	CHECK_OK(umm_mm_mmap(0, 2 * page, read_write, UMM_MAP_SHARED | UMM_MAP_ANONYMOUS, -1, 0, &at));
	record_open(&r, 0, UINT64_MAX, false);
	CHECK_OK(umm_mm_mremap(at, 0, 2 * page, UMM_MREMAP_MAYMOVE, 0, &ret));
	CHECK(ret != at);
	CHECK_EQUAL(r.n, 0);
	record_close(&r);
	CHECK_OK(umm_mm_munmap(at, 2 * page));
	CHECK_OK(umm_mm_munmap(ret, 2 * page));
}

static void madvise_is_told(void)
{
	static const int advices[] = {UMM_MADV_DONTNEED, UMM_MADV_FREE, UMM_MADV_DONTNEED_LOCKED,
	        UMM_MADV_PAGEOUT, UMM_MADV_COLD, UMM_MADV_NORMAL, UMM_MADV_WILLNEED, UMM_MADV_DONTFORK,
	        UMM_MADV_DOFORK, UMM_MADV_POPULATE_WRITE, UMM_MADV_DODUMP};
	struct record r;
	uint64_t at = map_filled(8);
	record_open(&r, at, at + 8 * page, true);
	for (unsigned i = 0; i < sizeof(advices) / sizeof(*advices); i++) {
		memset((void *)(uintptr_t)at, 0x42, 8 * page);
		int before = r.n, advice = advices[i];
		int error = umm_mm_madvise(at + page, 2 * page - 5, advice);
		/* what this kernel or a sanitizer's memory does not take is told with its failure */
		CHECK(error == 0 || error == -EINVAL);
		if (i > 3) {
			CHECK_EQUAL(r.n, before);
			continue;
		}
		CHECK_EQUAL(r.n, before + 2);
		check_pair(&r, before, before + 1, at + page, at + 3 * page,
		        advice == UMM_MADV_PAGEOUT ? UMM_REASON_EVICT : UMM_REASON_REMOVE, error);
		CHECK(r.filled[before]);
		if (advice == UMM_MADV_DONTNEED)
			CHECK(r.mapped[before + 1] && !r.filled[before + 1]);
	}
	int before = r.n, error;
	CHECK_OK(umm_mm_munmap(at + 2 * page, page));
	CHECK_EQUAL(r.n, before + 2);
	CHECK_EQUAL(umm_mm_madvise(at, 4 * page, UMM_MADV_DONTNEED), -ENOMEM);
	check_pair(&r, before + 2, before + 3, at, at + 4 * page, UMM_REASON_REMOVE, -ENOMEM);
	/* whether there is a huge page to be had is not ours to say */
	error = umm_mm_madvise(at, page, UMM_MADV_COLLAPSE);
	check_pair(&r, before + 4, r.n - 1, at, at + page, UMM_REASON_BACKING, error);
	CHECK_EQUAL(r.n, before + 6 + !error);
	if (!error)
		CHECK_EQUAL(r.events[before + 5].kind, UMM_NOTIFY_CHANGE);
	record_close(&r);
	CHECK_OK(umm_mm_munmap(at, 8 * page));
}

static void mprotect_is_told(void)
{
	struct record r;
	uint64_t at = map_filled(4);
	record_open(&r, at, at + 4 * page, true);
	CHECK_OK(umm_mm_mprotect(at + page, page + 1, PROT_READ));
	CHECK_EQUAL(r.n, 2);
	check_pair(&r, 0, 1, at + page, at + 3 * page, UMM_REASON_PROTECT, 0);
	CHECK(r.filled[0] && r.filled[1]);
	CHECK_EQUAL(umm_mm_mprotect(at, page, 1 << 20), -EINVAL);
	check_pair(&r, 2, 3, at, at + page, UMM_REASON_PROTECT, -EINVAL);
	record_close(&r);
	CHECK_OK(umm_mm_munmap(at, 4 * page));
}

static void hugetlb_lengths_are_whole_pages(void)
{
	struct record r;
	uint64_t huge = UINT64_C(2) << 20, at = 0, ret = 0;
	if (page > UINT64_C(4) << 10)
		return; /* another size there */
	CHECK_OK(umm_mm_mmap(0, 3 * huge, PROT_NONE, anonymous | UMM_MAP_NORESERVE, -1, 0, &at));
	uint64_t aligned = (at + huge - 1) & ~(huge - 1);
	record_open(&r, 0, UINT64_MAX, false);
	/* With or without free huge pages: what is replaced is told. */
	int error = umm_mm_mmap(aligned, page, read_write,
	        anonymous | UMM_MAP_FIXED | UMM_MAP_HUGETLB | umm_map_huge_bits(huge), -1, 0, &ret);
	CHECK(error == 0 || error == -ENOMEM || error == -EINVAL);
	if (r.n) {
		CHECK_EQUAL(r.n, 2);
		check_pair(&r, 0, 1, aligned, aligned + huge, UMM_REASON_UNMAP, error);
	}
	record_close(&r);
	CHECK_OK(umm_mm_munmap(at, 3 * huge));
}

int main(void)
{
	page = (uint64_t)getpagesize();
	munmap_is_told();
	refused_arguments_are_not_told();
	mmap_over_memory_is_told();
	mremap_is_told();
	shared_memory_mapped_twice_is_not_told();
	madvise_is_told();
	mprotect_is_told();
	hugetlb_lengths_are_whole_pages();
	return 0;
}
