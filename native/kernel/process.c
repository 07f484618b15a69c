#include "kernel/process.h"

#include <errno.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

/* The generic system call table, which x86-64 shares since 5.1: libc headers may be older. */
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#ifndef SYS_pidfd_getfd
#define SYS_pidfd_getfd 438
#endif
#ifndef SYS_process_madvise
#define SYS_process_madvise 440
#endif

/* The kernel reads an array of umm_span as one of iovec. */
_Static_assert(sizeof(struct umm_span) == sizeof(struct iovec), "struct iovec");
_Static_assert(offsetof(struct umm_span, length) == offsetof(struct iovec, iov_len), "struct iovec");

int umm_pidfd_open(int pid, unsigned flags)
{
	int fd = (int)syscall(SYS_pidfd_open, pid, flags);
	return fd < 0 ? -errno : fd;
}

int umm_pidfd_getfd(int pidfd, int target)
{
	int fd = (int)syscall(SYS_pidfd_getfd, pidfd, target, 0);
	return fd < 0 ? -errno : fd;
}

static int conclude(long got, uint64_t *done)
{
	*done = got < 0 ? 0 : (uint64_t)got;
	return got < 0 ? -errno : 0;
}

int umm_process_madvise(int pidfd, const struct umm_span *spans, uint64_t count, int advice, uint64_t *done)
{
	return conclude(syscall(SYS_process_madvise, pidfd, spans, count, advice, 0), done);
}

int umm_process_read(int pid, const struct umm_span *local, uint64_t local_count,
        const struct umm_span *remote, uint64_t remote_count, uint64_t *done)
{
	return conclude(
	        syscall(SYS_process_vm_readv, (long)pid, local, local_count, remote, remote_count, 0L), done);
}

int umm_process_write(int pid, const struct umm_span *local, uint64_t local_count,
        const struct umm_span *remote, uint64_t remote_count, uint64_t *done)
{
	return conclude(
	        syscall(SYS_process_vm_writev, (long)pid, local, local_count, remote, remote_count, 0L),
	        done);
}
