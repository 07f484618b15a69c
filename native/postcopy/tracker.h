/* Which pages of a mapping were written: asynchronous write-protect and PAGEMAP_SCAN (Linux 6.7).
 *
 * A write to a protected page clears its bit in the kernel and goes on; no thread serves faults. Pages
 * that nobody ever touched are not reported: they are zero. madvise(MADV_DONTNEED) by the owner of the
 * mapping is not seen (a page that was sent and is then dropped reads as zero here, unnoticed). */
#ifndef UMM_POSTCOPY_TRACKER_H
#define UMM_POSTCOPY_TRACKER_H

#include <stdint.h>

struct umm_tracker {
	int uffd, pagemap;
	uint64_t address, size; /* page aligned */
	uint64_t page_size;
};

/* Called with consecutive ranges [first, first + count) in pages, in order. Non-zero ends the scan. */
typedef int umm_tracker_range(void *context, uint64_t first, uint64_t count);

/* -EOPNOTSUPP: this kernel has no asynchronous write-protect or no PAGEMAP_SCAN; else -errno. */
int umm_tracker_init(struct umm_tracker *tracker, uint64_t address, uint64_t size);
void umm_tracker_deinit(struct umm_tracker *tracker);
/* Pages written since they were last protected (at first: every page that is there). protect: each range is
 * protected, atomically with finding it, before `range` is called for it. */
int umm_tracker_scan(struct umm_tracker *tracker, int protect, umm_tracker_range *range, void *context);

#endif
