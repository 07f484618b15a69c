#include "kernel/userfaultfd.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

struct uffd_range {
	uint64_t start, len;
};
struct uffdio_api_arg {
	uint64_t api, features, ioctls;
};
struct uffdio_register_arg {
	struct uffd_range range;
	uint64_t mode, ioctls;
};
struct uffdio_copy_arg {
	uint64_t dst, src, len, mode;
	int64_t done;
};
/* ZEROPAGE, CONTINUE and POISON have the same layout. */
struct uffdio_fill_arg {
	struct uffd_range range;
	uint64_t mode;
	int64_t done;
};
struct uffdio_writeprotect_arg {
	struct uffd_range range;
	uint64_t mode;
};

#define IO_REGISTER _IOWR(0xAA, 0x00, struct uffdio_register_arg)
#define IO_UNREGISTER _IOR(0xAA, 0x01, struct uffd_range)
#define IO_WAKE _IOR(0xAA, 0x02, struct uffd_range)
#define IO_COPY _IOWR(0xAA, 0x03, struct uffdio_copy_arg)
#define IO_ZEROPAGE _IOWR(0xAA, 0x04, struct uffdio_fill_arg)
#define IO_MOVE _IOWR(0xAA, 0x05, struct uffdio_copy_arg)
#define IO_WRITEPROTECT _IOWR(0xAA, 0x06, struct uffdio_writeprotect_arg)
#define IO_CONTINUE _IOWR(0xAA, 0x07, struct uffdio_fill_arg)
#define IO_POISON _IOWR(0xAA, 0x08, struct uffdio_fill_arg)
#define IO_API _IOWR(0xAA, 0x3F, struct uffdio_api_arg)
#define IO_NEW _IO(0xAA, 0x00)

static const uint64_t uffd_api_version = 0xAA;
static const int user_mode_only = 1;

static int open_device(int flags)
{
	int dev = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
	if (dev < 0)
		return -errno;
	int fd = ioctl(dev, IO_NEW, flags | O_CLOEXEC);
	int error = errno;
	close(dev);
	return fd < 0 ? -error : fd;
}

static int open_one(int source, int flags)
{
	if (source == UMM_UFFD_SOURCE_DEVICE)
		return open_device(flags);
	if (source != UMM_UFFD_SOURCE_SYSCALL && source != UMM_UFFD_SOURCE_USER_MODE)
		return -EINVAL;
	int extra = source == UMM_UFFD_SOURCE_USER_MODE ? user_mode_only : 0;
	int fd = (int)syscall(SYS_userfaultfd, flags | O_CLOEXEC | extra);
	return fd < 0 ? -errno : fd;
}

int umm_uffd_open(int source, int flags, int *used)
{
	int fd;
	if (source != UMM_UFFD_SOURCE_ANY) {
		fd = open_one(source, flags);
		if (fd >= 0 && used)
			*used = source;
		return fd;
	}
	int first = -ENOSYS;
	for (int s = UMM_UFFD_SOURCE_SYSCALL; s < UMM_UFFD_SOURCE_ANY; s++) {
		fd = open_one(s, flags);
		if (fd >= 0) {
			if (used)
				*used = s;
			return fd;
		}
		if (s == UMM_UFFD_SOURCE_SYSCALL)
			first = fd;
		/* Out of descriptors: another way of opening would fail in the same way. */
		if (fd == -EMFILE || fd == -ENFILE)
			return fd;
	}
	return first;
}

int umm_uffd_api(int uffd, uint64_t features, uint64_t *granted, uint64_t *ioctls)
{
	struct uffdio_api_arg arg = {.api = uffd_api_version, .features = features};
	if (ioctl(uffd, IO_API, &arg) < 0)
		return -errno;
	if (granted)
		*granted = arg.features;
	if (ioctls)
		*ioctls = arg.ioctls;
	return 0;
}

int umm_uffd_probe_features(int source, uint64_t *features)
{
	int fd = umm_uffd_open(source, 0, NULL);
	if (fd < 0)
		return fd;
	uint64_t offered = 0;
	int err = umm_uffd_api(fd, 0, &offered, NULL);
	close(fd);
	if (err)
		return err;
	/* The kernel offers EVENT_FORK to everybody and refuses it with EPERM to those without
	 * CAP_SYS_PTRACE; a userfaultfd takes UFFDIO_API once, so each question has a descriptor. */
	if (offered & UMM_UFFD_FEATURE_EVENT_FORK) {
		fd = umm_uffd_open(source, 0, NULL);
		if (fd < 0)
			return fd;
		if (umm_uffd_api(fd, UMM_UFFD_FEATURE_EVENT_FORK, NULL, NULL))
			offered &= ~(uint64_t)UMM_UFFD_FEATURE_EVENT_FORK;
		close(fd);
	}
	*features = offered;
	return 0;
}

int umm_uffd_register(int uffd, uint64_t start, uint64_t len, uint64_t mode, uint64_t *ioctls)
{
	struct uffdio_register_arg arg = {.range = {start, len}, .mode = mode};
	if (ioctl(uffd, IO_REGISTER, &arg) < 0)
		return -errno;
	if (ioctls)
		*ioctls = arg.ioctls;
	return 0;
}

int umm_uffd_unregister(int uffd, uint64_t start, uint64_t len)
{
	struct uffd_range arg = {start, len};
	return ioctl(uffd, IO_UNREGISTER, &arg) < 0 ? -errno : 0;
}

int umm_uffd_wake(int uffd, uint64_t start, uint64_t len)
{
	struct uffd_range arg = {start, len};
	return ioctl(uffd, IO_WAKE, &arg) < 0 ? -errno : 0;
}

static enum umm_outcome outcome_of(int error)
{
	switch (error) {
	case EEXIST:
		return UMM_OUTCOME_ALREADY_THERE;
	case EAGAIN:
		return UMM_OUTCOME_DEFERRED;
	case ENOENT:
	case ESRCH:
		return UMM_OUTCOME_GONE;
	case ENOMEM:
	case ENOSPC:
		return UMM_OUTCOME_NO_MEMORY;
	case EBUSY:
		return UMM_OUTCOME_BUSY;
	default:
		return UMM_OUTCOME_FAILED;
	}
}

/* `done` is signed: a positive value short of len is partial progress (and errno says EAGAIN), a
 * negative one repeats -errno. A kernel that fails before it writes the field leaves the 0 we put there. */
static int conclude(int rc, int error, int64_t done, uint64_t len, struct umm_uffd_result *ret)
{
	*ret = (struct umm_uffd_result){.outcome = UMM_OUTCOME_INSTALLED, .done = done > 0 ? done : 0};
	if (rc == 0 && done >= 0 && (uint64_t)done == len)
		return 0;
	if (done > 0 && (uint64_t)done < len) {
		ret->outcome = UMM_OUTCOME_PARTIAL;
		ret->error = EAGAIN;
		return -EAGAIN;
	}
	if (rc == 0)
		error = EIO;
	else if (done < 0)
		error = (int)-done;
	ret->outcome = outcome_of(error);
	ret->error = error;
	return -error;
}

int umm_uffd_copy(
        int uffd, uint64_t dst, uint64_t src, uint64_t len, uint64_t mode, struct umm_uffd_result *ret)
{
	struct uffdio_copy_arg arg = {.dst = dst, .src = src, .len = len, .mode = mode};
	int rc = ioctl(uffd, IO_COPY, &arg);
	return conclude(rc, errno, arg.done, len, ret);
}

int umm_uffd_move(
        int uffd, uint64_t dst, uint64_t src, uint64_t len, uint64_t mode, struct umm_uffd_result *ret)
{
	struct uffdio_copy_arg arg = {.dst = dst, .src = src, .len = len, .mode = mode};
	int rc = ioctl(uffd, IO_MOVE, &arg);
	return conclude(rc, errno, arg.done, len, ret);
}

static int fill(int uffd, unsigned long request, uint64_t start, uint64_t len, uint64_t mode,
        struct umm_uffd_result *ret)
{
	struct uffdio_fill_arg arg = {.range = {start, len}, .mode = mode};
	int rc = ioctl(uffd, request, &arg);
	return conclude(rc, errno, arg.done, len, ret);
}

int umm_uffd_zeropage(int uffd, uint64_t start, uint64_t len, uint64_t mode, struct umm_uffd_result *ret)
{
	return fill(uffd, IO_ZEROPAGE, start, len, mode, ret);
}

int umm_uffd_continue(int uffd, uint64_t start, uint64_t len, uint64_t mode, struct umm_uffd_result *ret)
{
	return fill(uffd, IO_CONTINUE, start, len, mode, ret);
}

int umm_uffd_poison(int uffd, uint64_t start, uint64_t len, uint64_t mode, struct umm_uffd_result *ret)
{
	return fill(uffd, IO_POISON, start, len, mode, ret);
}

int umm_uffd_writeprotect(int uffd, uint64_t start, uint64_t len, uint64_t mode, struct umm_uffd_result *ret)
{
	struct uffdio_writeprotect_arg arg = {.range = {start, len}, .mode = mode};
	int rc = ioctl(uffd, IO_WRITEPROTECT, &arg);
	return conclude(rc, errno, rc == 0 ? (int64_t)len : 0, len, ret);
}

int umm_uffd_changing(int uffd)
{
	/* An empty range is refused, but later. (A NULL would be, too, and costs a page fault.) */
	struct uffdio_writeprotect_arg nothing = {{0, 0}, 0};
	if (ioctl(uffd, IO_WRITEPROTECT, &nothing) == 0)
		return -EIO;
	return errno == EAGAIN ? 1 : errno == EINVAL ? 0 : -errno;
}

int umm_uffd_read(int uffd, struct umm_uffd_msg *ret)
{
	for (;;) {
		ssize_t n = read(uffd, ret, sizeof(*ret));
		if (n == (ssize_t)sizeof(*ret))
			return 0;
		if (n >= 0)
			return -EIO;
		if (errno != EINTR)
			return -errno;
	}
}
