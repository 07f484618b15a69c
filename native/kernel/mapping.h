/* mmap(2), mremap(2), mincore(2) and memfd_create(2), for callers that libc headers fail or that need
 * a negative errno instead of a pointer. Constants that Debian 12's headers lack are defined here. */
#ifndef UMM_KERNEL_MAPPING_H
#define UMM_KERNEL_MAPPING_H

#include <stdint.h>
#include <sys/mman.h>

/* mmap flags of the generic ABI (x86, arm64, riscv); mapping.c asserts them against libc. */
enum umm_map_flag {
	UMM_MAP_SHARED = 0x01,
	UMM_MAP_PRIVATE = 0x02,
	UMM_MAP_FIXED = 0x10,
	UMM_MAP_ANONYMOUS = 0x20,
	UMM_MAP_GROWSDOWN = 0x100,
	UMM_MAP_LOCKED = 0x2000,
	UMM_MAP_NORESERVE = 0x4000,
	UMM_MAP_POPULATE = 0x8000,
	UMM_MAP_NONBLOCK = 0x10000,
	UMM_MAP_STACK = 0x20000,
	UMM_MAP_HUGETLB = 0x40000,
	/* EEXIST instead of replacing what is there. */
	UMM_MAP_FIXED_NOREPLACE = 0x100000,
};
/* With MAP_HUGETLB and MFD_HUGETLB: log2 of the page size, shifted; 0 is the default size. */
enum { UMM_MAP_HUGE_SHIFT = 26 };

enum umm_mremap_flag {
	UMM_MREMAP_MAYMOVE = 1 << 0,
	UMM_MREMAP_FIXED = 1 << 1,
	/* Leave the old mapping in place, empty. */
	UMM_MREMAP_DONTUNMAP = 1 << 2,
};

enum umm_memfd_flag {
	UMM_MFD_CLOEXEC = 1 << 0,
	UMM_MFD_ALLOW_SEALING = 1 << 1,
	UMM_MFD_HUGETLB = 1 << 2,
	UMM_MFD_NOEXEC_SEAL = 1 << 3, /* Linux 6.3 */
	UMM_MFD_EXEC = 1 << 4,        /* Linux 6.3 */
};

enum umm_seal {
	UMM_SEAL_SEAL = 1 << 0,
	UMM_SEAL_SHRINK = 1 << 1,
	UMM_SEAL_GROW = 1 << 2,
	UMM_SEAL_WRITE = 1 << 3,
	UMM_SEAL_FUTURE_WRITE = 1 << 4,
	UMM_SEAL_EXEC = 1 << 5, /* Linux 6.3 */
};

/* The flag bits that ask for hugetlb pages of `page_size` bytes (a power of two); 0 for 0. */
uint64_t umm_map_huge_bits(uint64_t page_size);

int umm_map(uint64_t address, uint64_t length, int protection, uint64_t flags, int fd, uint64_t offset,
        uint64_t *ret);
int umm_unmap(uint64_t address, uint64_t length);
int umm_protect(uint64_t address, uint64_t length, int protection);
int umm_remap(uint64_t address, uint64_t old_length, uint64_t new_length, uint64_t flags,
        uint64_t new_address, uint64_t *ret);

/* One byte per base page into `residency`: bit 0 says resident. */
int umm_mincore(uint64_t address, uint64_t length, uint8_t *residency);

/* A descriptor or -errno. `flags`: enum umm_memfd_flag and umm_map_huge_bits(). */
int umm_memfd_create(const char *name, uint64_t flags);
int umm_add_seals(int fd, int seals);
/* The seals, or -errno. */
int umm_get_seals(int fd);

#endif
