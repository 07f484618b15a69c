/* madvise(2) with every advice of Linux 6.18. */
#ifndef UMM_KERNEL_MADVISE_H
#define UMM_KERNEL_MADVISE_H

#include <stdint.h>

enum umm_advice {
	UMM_MADV_NORMAL = 0,
	UMM_MADV_RANDOM = 1,
	UMM_MADV_SEQUENTIAL = 2,
	UMM_MADV_WILLNEED = 3,
	UMM_MADV_DONTNEED = 4,
	UMM_MADV_FREE = 8,
	UMM_MADV_REMOVE = 9,
	UMM_MADV_DONTFORK = 10,
	UMM_MADV_DOFORK = 11,
	UMM_MADV_MERGEABLE = 12,
	UMM_MADV_UNMERGEABLE = 13,
	UMM_MADV_HUGEPAGE = 14,
	UMM_MADV_NOHUGEPAGE = 15,
	UMM_MADV_DONTDUMP = 16,
	UMM_MADV_DODUMP = 17,
	UMM_MADV_WIPEONFORK = 18,
	UMM_MADV_KEEPONFORK = 19,
	UMM_MADV_COLD = 20,            /* Linux 5.4 */
	UMM_MADV_PAGEOUT = 21,         /* Linux 5.4 */
	UMM_MADV_POPULATE_READ = 22,   /* Linux 5.14 */
	UMM_MADV_POPULATE_WRITE = 23,  /* Linux 5.14 */
	UMM_MADV_DONTNEED_LOCKED = 24, /* Linux 5.18 */
	UMM_MADV_COLLAPSE = 25,        /* Linux 6.1 */
	UMM_MADV_HWPOISON = 100,       /* for tests of the kernel: takes real memory out of service */
	UMM_MADV_SOFT_OFFLINE = 101,   /* likewise */
	UMM_MADV_GUARD_INSTALL = 102,  /* Linux 6.13 */
	UMM_MADV_GUARD_REMOVE = 103,   /* Linux 6.13 */
};

/* 0 or -errno; EINVAL also for an advice this kernel does not know. On memory registered with
 * EVENT_REMOVE, DONTNEED, DONTNEED_LOCKED, FREE and REMOVE wait for the event to be read: never call them
 * there from a fault handler. GUARD_INSTALL drops pages without an event (seen on 6.18). */
int umm_madvise(uint64_t address, uint64_t length, int advice);

#endif
