#include "postcopy/tracker.h"

#include <errno.h>
#include <unistd.h>

#include "kernel/pagemap.h"
#include "kernel/userfaultfd.h"

enum { SCAN_REGIONS = 512 };

int umm_tracker_init(struct umm_tracker *tracker, uint64_t address, uint64_t size)
{
	*tracker = (struct umm_tracker){
	        .uffd = -1,
	        .pagemap = -1,
	        .address = address,
	        .size = size,
	        .page_size = (uint64_t)sysconf(_SC_PAGESIZE),
	};
	const uint64_t wanted = UMM_UFFD_FEATURE_WP_ASYNC | UMM_UFFD_FEATURE_WP_UNPOPULATED |
	                        UMM_UFFD_FEATURE_PAGEFAULT_FLAG_WP;
	uint64_t features;
	int error = umm_uffd_probe_features(UMM_UFFD_SOURCE_ANY, &features);
	if (error)
		return error;
	if ((features & wanted) != wanted)
		return -EOPNOTSUPP;
	tracker->uffd = umm_uffd_open(UMM_UFFD_SOURCE_ANY, 0, NULL);
	if (tracker->uffd < 0)
		return tracker->uffd;
	uint64_t ioctls;
	error = umm_uffd_api(tracker->uffd, wanted, &features, &ioctls);
	if (!error)
		error = umm_uffd_register(tracker->uffd, address, size, UMM_UFFD_MODE_WP, &ioctls);
	if (!error) {
		tracker->pagemap = umm_pagemap_open(0);
		if (tracker->pagemap < 0)
			error = tracker->pagemap;
	}
	if (error)
		umm_tracker_deinit(tracker);
	return error;
}

void umm_tracker_deinit(struct umm_tracker *tracker)
{
	if (tracker->pagemap >= 0)
		close(tracker->pagemap);
	/* Unregisters, which drops the protection: nothing was missing, so nothing is lost. */
	if (tracker->uffd >= 0)
		close(tracker->uffd);
	tracker->pagemap = tracker->uffd = -1;
}

int umm_tracker_scan(struct umm_tracker *tracker, int protect, umm_tracker_range *range, void *context)
{
	struct umm_page_region regions[SCAN_REGIONS];
	const uint64_t end = tracker->address + tracker->size;
	for (uint64_t at = tracker->address; at < end;) {
		struct umm_pagemap_scan scan = {
		        .flags = protect ? UMM_PAGEMAP_SCAN_WP_MATCHING | UMM_PAGEMAP_SCAN_CHECK_WPASYNC : 0,
		        .start = at,
		        .end = end,
		        .vec = (uint64_t)(uintptr_t)regions,
		        .vec_len = SCAN_REGIONS,
		        .category_mask = UMM_PAGE_IS_WRITTEN,
		        /* Not the missing ones: protecting them would plant markers. */
		        .category_anyof_mask = UMM_PAGE_IS_PRESENT | UMM_PAGE_IS_SWAPPED,
		        .return_mask = UMM_PAGE_IS_WRITTEN,
		};
		int found = umm_pagemap_scan(tracker->pagemap, &scan);
		if (found == -EINTR)
			continue;
		if (found < 0)
			return found == -ENOTTY ? -EOPNOTSUPP : found;
		for (int i = 0; i < found; i++) {
			int error = range(context, (regions[i].start - tracker->address) / tracker->page_size,
			        (regions[i].end - regions[i].start) / tracker->page_size);
			if (error)
				return error;
		}
		if (scan.walk_end <= at)
			return -EIO;
		at = scan.walk_end;
	}
	return 0;
}
