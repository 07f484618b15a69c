/* /proc/PID/pagemap: raw entries, and the PAGEMAP_SCAN ioctl (Linux 6.7).
 *
 * No malloc, no stdio, no lock: usable from a fault handler. What the system headers lack is defined
 * here (proc_pid_pagemap(5), Documentation/admin-guide/mm/pagemap.rst). */
#ifndef UMM_KERNEL_PAGEMAP_H
#define UMM_KERNEL_PAGEMAP_H

#include <stdint.h>

/* Bits of an entry. A page that is not present and not in swap has bits of its own all the same: a
 * write-protect marker is UFFD_WP alone, a guard page GUARD alone. */
#define UMM_PAGEMAP_SOFT_DIRTY (UINT64_C(1) << 55)
#define UMM_PAGEMAP_EXCLUSIVE (UINT64_C(1) << 56)
#define UMM_PAGEMAP_UFFD_WP (UINT64_C(1) << 57)
#define UMM_PAGEMAP_GUARD (UINT64_C(1) << 58) /* Linux 6.15 */
#define UMM_PAGEMAP_FILE (UINT64_C(1) << 61)
#define UMM_PAGEMAP_SWAP (UINT64_C(1) << 62)
#define UMM_PAGEMAP_PRESENT (UINT64_C(1) << 63)
/* The page frame number of a present page; zero without CAP_SYS_ADMIN. */
#define UMM_PAGEMAP_PFN_MASK ((UINT64_C(1) << 55) - 1)

/* Categories of PAGEMAP_SCAN. */
enum umm_page_category {
	UMM_PAGE_IS_WPALLOWED = 1 << 0,
	UMM_PAGE_IS_WRITTEN = 1 << 1, /* says nothing where write protection is not registered */
	UMM_PAGE_IS_FILE = 1 << 2,
	UMM_PAGE_IS_PRESENT = 1 << 3,
	UMM_PAGE_IS_SWAPPED = 1 << 4,
	UMM_PAGE_IS_PFNZERO = 1 << 5,
	UMM_PAGE_IS_HUGE = 1 << 6, /* mapped by a PMD, or hugetlb */
	UMM_PAGE_IS_SOFT_DIRTY = 1 << 7,
	UMM_PAGE_IS_GUARD = 1 << 8, /* Linux 6.15 */
};

enum umm_pagemap_scan_flags {
	UMM_PAGEMAP_SCAN_WP_MATCHING = 1 << 0,
	UMM_PAGEMAP_SCAN_CHECK_WPASYNC = 1 << 1,
};

struct umm_page_region {
	uint64_t start, end, categories;
};

/* struct pm_scan_arg. A page matches when, of (its categories ^ category_inverted), all bits of
 * category_mask are set and, unless category_anyof_mask is 0, one of category_anyof_mask is. */
struct umm_pagemap_scan {
	uint64_t size; /* set by umm_pagemap_scan */
	uint64_t flags;
	uint64_t start, end; /* base page aligned */
	uint64_t walk_end;   /* out: the scan went up to here, also when it failed; corrected, see .c */
	uint64_t vec;        /* struct umm_page_region *; 0 with vec_len 0: write-protect only */
	uint64_t vec_len;    /* regions; when they are used up the scan ends early: go on at walk_end */
	uint64_t max_pages;  /* 0: no limit; else end after so many matching pages */
	uint64_t category_inverted;
	uint64_t category_mask;
	uint64_t category_anyof_mask;
	uint64_t return_mask;
};

/* A descriptor of a process's pagemap (0: the caller's), close-on-exec; or -errno. It stays with that
 * address space when the process forks or executes another program. */
int umm_pagemap_open(int pid);

/* The entries of `pages` pages from `address`. -EIO when the address space ends before. */
int umm_pagemap_read(int fd, uint64_t address, uint64_t pages, uint64_t page_size, uint64_t *entries);

/* The number of regions written to args->vec, or -errno: -ENOTTY before Linux 6.7, -EPERM for
 * CHECK_WPASYNC on a mapping without UFFD_FEATURE_WP_ASYNC. */
int umm_pagemap_scan(int fd, struct umm_pagemap_scan *args);

#endif
