/* userfaultfd(2): opening, registering, and the ioctls that resolve faults.
 *
 * The constants are the project's own: distribution headers lag behind the kernel. Values from
 * include/uapi/linux/userfaultfd.h of Linux 6.18. */
#ifndef UMM_KERNEL_USERFAULTFD_H
#define UMM_KERNEL_USERFAULTFD_H

#include <stdbool.h>
#include <stdint.h>

enum umm_uffd_feature {
	UMM_UFFD_FEATURE_PAGEFAULT_FLAG_WP = 1 << 0,
	UMM_UFFD_FEATURE_EVENT_FORK = 1 << 1,
	UMM_UFFD_FEATURE_EVENT_REMAP = 1 << 2,
	UMM_UFFD_FEATURE_EVENT_REMOVE = 1 << 3,
	UMM_UFFD_FEATURE_MISSING_HUGETLBFS = 1 << 4,
	UMM_UFFD_FEATURE_MISSING_SHMEM = 1 << 5,
	UMM_UFFD_FEATURE_EVENT_UNMAP = 1 << 6,
	UMM_UFFD_FEATURE_SIGBUS = 1 << 7,
	UMM_UFFD_FEATURE_THREAD_ID = 1 << 8,
	UMM_UFFD_FEATURE_MINOR_HUGETLBFS = 1 << 9,
	UMM_UFFD_FEATURE_MINOR_SHMEM = 1 << 10,
	UMM_UFFD_FEATURE_EXACT_ADDRESS = 1 << 11,
	UMM_UFFD_FEATURE_WP_HUGETLBFS_SHMEM = 1 << 12,
	UMM_UFFD_FEATURE_WP_UNPOPULATED = 1 << 13,
	UMM_UFFD_FEATURE_POISON = 1 << 14,
	UMM_UFFD_FEATURE_WP_ASYNC = 1 << 15,
	UMM_UFFD_FEATURE_MOVE = 1 << 16,
};

enum umm_uffd_register_mode {
	UMM_UFFD_MODE_MISSING = 1 << 0,
	UMM_UFFD_MODE_WP = 1 << 1,
	UMM_UFFD_MODE_MINOR = 1 << 2,
};

/* How the descriptor is had. */
enum umm_uffd_source {
	UMM_UFFD_SOURCE_SYSCALL,   /* userfaultfd(2) */
	UMM_UFFD_SOURCE_DEVICE,    /* /dev/userfaultfd */
	UMM_UFFD_SOURCE_USER_MODE, /* userfaultfd(2) with UFFD_USER_MODE_ONLY */
	UMM_UFFD_SOURCE_ANY,       /* the first of these, in this order, that works */
};

enum umm_uffd_copy_mode {
	UMM_UFFD_COPY_DONTWAKE = 1 << 0,
	UMM_UFFD_COPY_WP = 1 << 1,
};
/* ZEROPAGE, CONTINUE, POISON and MOVE share DONTWAKE = 1; CONTINUE has WP = 2. */
enum umm_uffd_move_mode {
	UMM_UFFD_MOVE_DONTWAKE = 1 << 0,
	UMM_UFFD_MOVE_ALLOW_SRC_HOLES = 1 << 1,
};
enum umm_uffd_wp_mode {
	UMM_UFFD_WP_PROTECT = 1 << 0,
	UMM_UFFD_WP_DONTWAKE = 1 << 1,
};

/* What a resolving ioctl says: the table "Outcomes an installer must tell apart" in the design. */
enum umm_outcome {
	UMM_OUTCOME_INSTALLED,     /* all of it */
	UMM_OUTCOME_ALREADY_THERE, /* EEXIST: look at pagemap before believing it */
	UMM_OUTCOME_DEFERRED,      /* EAGAIN: an event is unread or its caller has not run yet */
	UMM_OUTCOME_GONE,          /* ENOENT: no longer registered; ESRCH: process gone */
	UMM_OUTCOME_NO_MEMORY,     /* ENOMEM, ENOSPC */
	UMM_OUTCOME_BUSY,          /* EBUSY: pinned or shared page (MOVE) */
	UMM_OUTCOME_PARTIAL,       /* done < length; see `done` */
	UMM_OUTCOME_FAILED,        /* anything else: see `error` */
};

struct umm_uffd_result {
	int outcome;  /* enum umm_outcome */
	int error;    /* positive errno, 0 when none */
	int64_t done; /* bytes that were resolved, never negative */
};

enum umm_uffd_event_kind {
	UMM_UFFD_EVENT_PAGEFAULT = 0x12,
	UMM_UFFD_EVENT_FORK = 0x13,
	UMM_UFFD_EVENT_REMAP = 0x14,
	UMM_UFFD_EVENT_REMOVE = 0x15,
	UMM_UFFD_EVENT_UNMAP = 0x16,
};

enum umm_uffd_fault_flag {
	UMM_UFFD_FAULT_WRITE = 1 << 0,
	UMM_UFFD_FAULT_WP = 1 << 1,
	UMM_UFFD_FAULT_MINOR = 1 << 2,
};

/* struct uffd_msg of the kernel, 32 bytes. */
struct umm_uffd_msg {
	uint8_t event; /* enum umm_uffd_event_kind */
	uint8_t reserved1;
	uint16_t reserved2;
	uint32_t reserved3;
	uint64_t arg0; /* PAGEFAULT: flags; REMAP: from; REMOVE, UNMAP: start; FORK: the child's descriptor
	                  (low 32 bits) */
	uint64_t arg1; /* PAGEFAULT: address; REMAP: to; REMOVE, UNMAP: end */
	uint64_t arg2; /* PAGEFAULT: thread id (low 32 bits) with THREAD_ID; REMAP: length */
};

/* Open a descriptor (close-on-exec). `flags` are O_NONBLOCK or 0. The source that worked goes to
 * *used (may be NULL). Returns the descriptor or -errno. */
int umm_uffd_open(int source, int flags, int *used);

/* UFFDIO_API, once per descriptor. *granted: features that the kernel has, *ioctls: bits of 1 << number. */
int umm_uffd_api(int uffd, uint64_t features, uint64_t *granted, uint64_t *ioctls);

/* Features this kernel has, found out on fresh descriptors. A feature that needs a right the
 * caller lacks is reported as absent. */
int umm_uffd_probe_features(int source, uint64_t *features);

int umm_uffd_register(int uffd, uint64_t start, uint64_t len, uint64_t mode, uint64_t *ioctls);
int umm_uffd_unregister(int uffd, uint64_t start, uint64_t len);
int umm_uffd_wake(int uffd, uint64_t start, uint64_t len);

/* The resolving ioctls. `ret` is filled in every case; the return value is 0 for INSTALLED and the
 * -errno (or -EAGAIN for PARTIAL) otherwise. */
int umm_uffd_copy(
        int uffd, uint64_t dst, uint64_t src, uint64_t len, uint64_t mode, struct umm_uffd_result *ret);
int umm_uffd_zeropage(int uffd, uint64_t start, uint64_t len, uint64_t mode, struct umm_uffd_result *ret);
int umm_uffd_move(
        int uffd, uint64_t dst, uint64_t src, uint64_t len, uint64_t mode, struct umm_uffd_result *ret);
int umm_uffd_continue(int uffd, uint64_t start, uint64_t len, uint64_t mode, struct umm_uffd_result *ret);
int umm_uffd_poison(int uffd, uint64_t start, uint64_t len, uint64_t mode, struct umm_uffd_result *ret);
int umm_uffd_writeprotect(int uffd, uint64_t start, uint64_t len, uint64_t mode, struct umm_uffd_result *ret);

/* 1: a munmap, mremap or madvise of registered memory is under way: from before the memory changes (under
 * the lock of the mappings) until after its event was read, and its caller has run. 0: none is. Or -errno.
 * (mmap_changing of fs/userfaultfd.c, which WRITEPROTECT looks at before its argument.) */
int umm_uffd_changing(int uffd);

/* Read one message. 0, or -EAGAIN when there is none (non-blocking descriptor), or -errno. */
int umm_uffd_read(int uffd, struct umm_uffd_msg *ret);

#endif
