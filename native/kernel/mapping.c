#include "kernel/mapping.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

_Static_assert(UMM_MAP_SHARED == MAP_SHARED && UMM_MAP_PRIVATE == MAP_PRIVATE, "mmap flags");
_Static_assert(UMM_MAP_FIXED == MAP_FIXED && UMM_MAP_ANONYMOUS == MAP_ANONYMOUS, "mmap flags");
_Static_assert(UMM_MAP_GROWSDOWN == MAP_GROWSDOWN && UMM_MAP_LOCKED == MAP_LOCKED, "mmap flags");
_Static_assert(UMM_MAP_NORESERVE == MAP_NORESERVE && UMM_MAP_POPULATE == MAP_POPULATE, "mmap flags");
_Static_assert(UMM_MAP_NONBLOCK == MAP_NONBLOCK && UMM_MAP_STACK == MAP_STACK, "mmap flags");
_Static_assert(UMM_MAP_HUGETLB == MAP_HUGETLB, "mmap flags");

uint64_t umm_map_huge_bits(uint64_t page_size)
{
	return page_size ? (uint64_t)__builtin_ctzll(page_size) << UMM_MAP_HUGE_SHIFT : 0;
}

/* libc's wrapper takes an int: the hugetlb size of 1 GiB and more reaches the sign bit's neighbours, so
 * the value is passed on as the bit pattern it is. */
static int as_flags(uint64_t flags)
{
	return (int)(unsigned)flags;
}

int umm_map(uint64_t address, uint64_t length, int protection, uint64_t flags, int fd, uint64_t offset,
        uint64_t *ret)
{
	void *at = mmap((void *)(uintptr_t)address, length, protection, as_flags(flags), fd, (off_t)offset);
	if (at == MAP_FAILED)
		return -errno;
	/* A kernel before 4.17 takes FIXED_NOREPLACE for a hint. */
	if (flags & UMM_MAP_FIXED_NOREPLACE && (uintptr_t)at != address) {
		munmap(at, length);
		return -EEXIST;
	}
	*ret = (uintptr_t)at;
	return 0;
}

int umm_unmap(uint64_t address, uint64_t length)
{
	return munmap((void *)(uintptr_t)address, length) ? -errno : 0;
}

int umm_protect(uint64_t address, uint64_t length, int protection)
{
	return mprotect((void *)(uintptr_t)address, length, protection) ? -errno : 0;
}

int umm_remap(uint64_t address, uint64_t old_length, uint64_t new_length, uint64_t flags,
        uint64_t new_address, uint64_t *ret)
{
	void *at = mremap((void *)(uintptr_t)address, old_length, new_length, as_flags(flags),
	        (void *)(uintptr_t)new_address);
	if (at == MAP_FAILED)
		return -errno;
	*ret = (uintptr_t)at;
	return 0;
}

int umm_mincore(uint64_t address, uint64_t length, uint8_t *residency)
{
	return mincore((void *)(uintptr_t)address, length, residency) ? -errno : 0;
}

int umm_memfd_create(const char *name, uint64_t flags)
{
	int fd = (int)syscall(SYS_memfd_create, name, (unsigned)flags);
	return fd < 0 ? -errno : fd;
}

int umm_add_seals(int fd, int seals)
{
	return fcntl(fd, F_ADD_SEALS, seals) ? -errno : 0;
}

int umm_get_seals(int fd)
{
	int seals = fcntl(fd, F_GET_SEALS);
	return seals < 0 ? -errno : seals;
}
