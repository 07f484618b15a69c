/* Other processes: pidfd_open(2), pidfd_getfd(2), process_madvise(2), process_vm_readv(2) and writev.
 *
 * libc has no wrappers for most of these in Debian 12. */
#ifndef UMM_KERNEL_PROCESS_H
#define UMM_KERNEL_PROCESS_H

#include <stdint.h>

/* struct iovec with the sizes that Python sees. */
struct umm_span {
	uint64_t address, length;
};

enum umm_pidfd_flag {
	UMM_PIDFD_THREAD = 0200,    /* O_EXCL; Linux 6.9: pid is a thread id */
	UMM_PIDFD_NONBLOCK = 04000, /* O_NONBLOCK; Linux 5.10 */
};

/* A descriptor (close-on-exec) or -errno. */
int umm_pidfd_open(int pid, unsigned flags);
/* A duplicate (close-on-exec) of the other process's descriptor `target`; needs ptrace rights. */
int umm_pidfd_getfd(int pidfd, int target);

/* *done: bytes advised. With several spans the call stops at the first failure, whose errno is hidden
 * when bytes went before it: 0 with *done short of the sum means partial. */
int umm_process_madvise(int pidfd, const struct umm_span *spans, uint64_t count, int advice, uint64_t *done);

/* *done: bytes transferred, which may be fewer than asked for (a span is never split at less than a page
 * unless the local side ends). At most IOV_MAX spans on either side. */
int umm_process_read(int pid, const struct umm_span *local, uint64_t local_count,
        const struct umm_span *remote, uint64_t remote_count, uint64_t *done);
int umm_process_write(int pid, const struct umm_span *local, uint64_t local_count,
        const struct umm_span *remote, uint64_t remote_count, uint64_t *done);

#endif
