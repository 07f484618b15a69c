/* What a call does to memory that is there: which ranges change, and how. Pure arithmetic, from the arguments
 * alone and as the kernel rounds them (mm/mmap.c, mm/mremap.c, mm/madvise.c); no lock, no memory, no core:
 * the preloaded library has it, too.
 *
 * Each function returns how many ranges it wrote: 0 when nothing changes that somebody could hold, or when
 * the kernel will refuse the arguments. */
#ifndef UMM_NOTIFIER_EFFECT_H
#define UMM_NOTIFIER_EFFECT_H

#include <stdint.h>

enum { UMM_EFFECTS_MAX = 3 };

struct umm_effect {
	uint64_t start, end;
	int reason; /* enum umm_notify_reason */
};

/* All of the mapping [address, address + length) goes: munmap, MAP_FIXED. */
uint32_t umm_effect_unmap(uint64_t address, uint64_t length, struct umm_effect ret[UMM_EFFECTS_MAX]);
/* The target of MREMAP_FIXED, the tail that a shrinking call cuts off, and, last, what moves. A call that
 * grows may or may not move the memory: this says what happens if it does. */
uint32_t umm_effect_mremap(uint64_t address, uint64_t old_length, uint64_t new_length, uint64_t flags,
        uint64_t new_address, struct umm_effect ret[UMM_EFFECTS_MAX]);
uint32_t umm_effect_madvise(
        uint64_t address, uint64_t length, int advice, struct umm_effect ret[UMM_EFFECTS_MAX]);
uint32_t umm_effect_mprotect(uint64_t address, uint64_t length, struct umm_effect ret[UMM_EFFECTS_MAX]);

#endif
