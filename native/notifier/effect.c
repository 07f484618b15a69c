#include "notifier/effect.h"

#include <stdbool.h>
#include <unistd.h>

#include "kernel/madvise.h"
#include "kernel/mapping.h"
#include "notifier/notifier.h"

/* munmap, mprotect, madvise and mremap's old address ignore the tag of an arm64 address. */
static uint64_t untagged(uint64_t address)
{
#ifdef __aarch64__
	return address >> 55 & 1 ? address : address & (UINT64_MAX >> 8);
#else
	return address;
#endif
}

static bool page_aligned(uint64_t address)
{
	return (address & ((uint64_t)getpagesize() - 1)) == 0;
}

/* 0: nothing, or more than there is. */
static uint64_t rounded_up(uint64_t length)
{
	uint64_t mask = (uint64_t)getpagesize() - 1;
	return (length + mask) & ~mask;
}

static uint32_t one(uint64_t address, uint64_t length, int reason, struct umm_effect *ret)
{
	uint64_t size = rounded_up(length), end;
	if (!size || !page_aligned(address) || __builtin_add_overflow(address, size, &end))
		return 0;
	*ret = (struct umm_effect){address, end, reason};
	return 1;
}

uint32_t umm_effect_unmap(uint64_t address, uint64_t length, struct umm_effect ret[UMM_EFFECTS_MAX])
{
	return one(untagged(address), length, UMM_REASON_UNMAP, ret);
}

uint32_t umm_effect_mprotect(uint64_t address, uint64_t length, struct umm_effect ret[UMM_EFFECTS_MAX])
{
	return one(untagged(address), length, UMM_REASON_PROTECT, ret);
}

static int reason_of(int advice)
{
	switch (advice) {
	case UMM_MADV_DONTNEED:
	case UMM_MADV_DONTNEED_LOCKED:
	case UMM_MADV_FREE:
	case UMM_MADV_REMOVE:
	case UMM_MADV_GUARD_INSTALL: /* drops the pages, like DONTNEED */
		return UMM_REASON_REMOVE;
	case UMM_MADV_PAGEOUT:
		return UMM_REASON_EVICT;
	case UMM_MADV_COLLAPSE:
	case UMM_MADV_SOFT_OFFLINE: /* migrates */
	case UMM_MADV_UNMERGEABLE:  /* a merged page is copied */
		return UMM_REASON_BACKING;
	case UMM_MADV_HWPOISON:
		return UMM_REASON_POISON;
	default:
		return -1;
	}
}

uint32_t umm_effect_madvise(
        uint64_t address, uint64_t length, int advice, struct umm_effect ret[UMM_EFFECTS_MAX])
{
	int reason = reason_of(advice);
	return reason < 0 ? 0 : one(untagged(address), length, reason, ret);
}

uint32_t umm_effect_mremap(uint64_t address, uint64_t old_length, uint64_t new_length, uint64_t flags,
        uint64_t new_address, struct umm_effect ret[UMM_EFFECTS_MAX])
{
	uint64_t from = untagged(address), old_size = rounded_up(old_length),
	         new_size = rounded_up(new_length), end, to_end;
	bool fixed = flags & UMM_MREMAP_FIXED, stays = flags & UMM_MREMAP_DONTUNMAP;
	bool may_move = flags & UMM_MREMAP_MAYMOVE;
	uint32_t n = 0;
	if (!page_aligned(from) || !new_size || (old_length && !old_size) ||
	        ((fixed || stays) && !may_move) || (stays && old_size != new_size) ||
	        __builtin_add_overflow(from, old_size, &end))
		return 0;
	if (fixed) {
		if (!page_aligned(new_address) || __builtin_add_overflow(new_address, new_size, &to_end) ||
		        (from < to_end && new_address < end))
			return 0;
		ret[n++] = (struct umm_effect){new_address, to_end, UMM_REASON_UNMAP};
	}
	if (new_size < old_size)
		ret[n++] = (struct umm_effect){from + new_size, end, UMM_REASON_UNMAP};
	/* An old length of 0 maps shared memory a second time: nothing goes. */
	uint64_t moved = new_size < old_size ? new_size : old_size;
	if (moved && (fixed || stays || (may_move && new_size > old_size)))
		ret[n++] = (struct umm_effect){from, from + moved, UMM_REASON_MOVE};
	return n;
}
