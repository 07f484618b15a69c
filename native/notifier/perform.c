#include "notifier/perform.h"

#include <errno.h>
#include <stdbool.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "kernel/mapping.h"

static const long hugetlbfs_magic = 0x958458f6; /* linux/magic.h */

/* The system call itself: libc's wrappers may be the preloaded library's, which end up here. */
static int map(uint64_t address, uint64_t length, int protection, uint64_t flags, int fd, uint64_t offset,
        uint64_t *ret)
{
	long at = syscall(SYS_mmap, address, length, protection, flags, fd, offset);
	if (at == -1)
		return -errno;
	*ret = (uint64_t)at;
	return 0;
}

static uint64_t huge_page_of(int fd)
{
	struct statfs about;
	return syscall(SYS_fstatfs, fd, &about) == 0 && about.f_type == hugetlbfs_magic
	               ? (uint64_t)about.f_bsize
	               : 0;
}

/* The kernel rounds the length of a hugetlb mapping up to its own page. */
static uint64_t mapped_length(uint64_t length, uint64_t flags, int fd)
{
	uint64_t huge = 0;
	if (!(flags & UMM_MAP_ANONYMOUS)) {
		huge = huge_page_of(fd);
	} else if (flags & UMM_MAP_HUGETLB && flags >> UMM_MAP_HUGE_SHIFT & 63) {
		huge = UINT64_C(1) << (flags >> UMM_MAP_HUGE_SHIFT & 63);
	} else if (flags & UMM_MAP_HUGETLB) {
		int probe = (int)syscall(SYS_memfd_create, "", UMM_MFD_HUGETLB | UMM_MFD_CLOEXEC);
		if (probe >= 0) {
			huge = huge_page_of(probe);
			close(probe);
		}
	}
	uint64_t padded;
	if (!huge || __builtin_add_overflow(length, huge - 1, &padded))
		return length;
	return padded & ~(huge - 1);
}

int umm_perform_mmap(const struct umm_teller *teller, uint64_t address, uint64_t length, int protection,
        uint64_t flags, int fd, uint64_t offset, uint64_t *ret)
{
	struct umm_told told;
	if (!(flags & UMM_MAP_FIXED) || flags & UMM_MAP_FIXED_NOREPLACE)
		return map(address, length, protection, flags, fd, offset, ret);
	uint64_t gentle = (flags & ~(uint64_t)UMM_MAP_FIXED) | UMM_MAP_FIXED_NOREPLACE;
	int error = map(address, length, protection, gentle, fd, offset, ret);
	/* A kernel before 4.17 takes it for a hint. */
	if (!error && *ret != address) {
		syscall(SYS_munmap, *ret, length);
		error = -EEXIST;
	}
	/* EOPNOTSUPP: MAP_SHARED_VALIDATE does not know the flag. Other errors are the call's own, and come
	 * before anything was replaced. */
	if (error != -EEXIST && error != -EOPNOTSUPP)
		return error;
	told.n = umm_effect_unmap(address, mapped_length(length, flags, fd), told.effects);
	if (told.n)
		teller->start(&told);
	error = map(address, length, protection, flags, fd, offset, ret);
	if (told.n)
		teller->end(&told, error, 0);
	return error;
}

int umm_perform_munmap(const struct umm_teller *teller, uint64_t address, uint64_t length)
{
	struct umm_told told;
	told.n = umm_effect_unmap(address, length, told.effects);
	if (told.n)
		teller->start(&told);
	int error = syscall(SYS_munmap, address, length) ? -errno : 0;
	if (told.n)
		teller->end(&told, error, 0);
	return error;
}

static int remap(uint64_t address, uint64_t old_length, uint64_t new_length, uint64_t flags,
        uint64_t new_address, uint64_t *ret)
{
	long at = syscall(SYS_mremap, address, old_length, new_length, flags, new_address);
	if (at == -1)
		return -errno;
	*ret = (uint64_t)at;
	return 0;
}

int umm_perform_mremap(const struct umm_teller *teller, uint64_t address, uint64_t old_length,
        uint64_t new_length, uint64_t flags, uint64_t new_address, uint64_t *ret)
{
	struct umm_told told;
	told.n = umm_effect_mremap(address, old_length, new_length, flags, new_address, told.effects);
	if (told.n && flags == UMM_MREMAP_MAYMOVE && new_length > old_length) {
		int error = remap(address, old_length, new_length, 0, 0, ret);
		if (error != -ENOMEM)
			return error;
	}
	if (told.n)
		teller->start(&told);
	int error = remap(address, old_length, new_length, flags, new_address, ret);
	if (told.n)
		teller->end(&told, error, error ? 0 : *ret);
	return error;
}

int umm_perform_madvise(const struct umm_teller *teller, uint64_t address, uint64_t length, int advice)
{
	struct umm_told told;
	told.n = umm_effect_madvise(address, length, advice, told.effects);
	if (told.n)
		teller->start(&told);
	int error = syscall(SYS_madvise, address, length, advice) ? -errno : 0;
	if (told.n)
		teller->end(&told, error, 0);
	return error;
}

int umm_perform_mprotect(const struct umm_teller *teller, uint64_t address, uint64_t length, int protection)
{
	struct umm_told told;
	told.n = umm_effect_mprotect(address, length, told.effects);
	if (told.n)
		teller->start(&told);
	int error = syscall(SYS_mprotect, address, length, protection) ? -errno : 0;
	if (told.n)
		teller->end(&told, error, 0);
	return error;
}
