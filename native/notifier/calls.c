#include "notifier/calls.h"

void umm_told_start(struct umm_told *told, int source)
{
	struct umm_space *space = umm_space_self();
	/* BLOCKABLE and not VOLUNTARY: always 0. */
	for (uint32_t i = 0; i < told->n; i++)
		umm_notify_start(&told->ranges[i], space, told->effects[i].start, told->effects[i].end,
		        source, told->effects[i].reason, UMM_NOTIFY_BLOCKABLE);
}

void umm_told_end(struct umm_told *told, int error, uint64_t moved_to)
{
	for (uint32_t i = told->n; i-- > 0;) {
		struct umm_notify_range *range = &told->ranges[i];
		if (told->effects[i].reason == UMM_REASON_MOVE && !error)
			umm_notify_moved(range, moved_to);
		if (told->effects[i].reason == UMM_REASON_BACKING && !error)
			umm_notify_change(umm_space_self(), told->effects[i].start, told->effects[i].end,
			        range->event.source, UMM_REASON_BACKING, UMM_NOTIFY_BLOCKABLE);
		umm_notify_end(range, error);
	}
}

static void start(struct umm_told *told)
{
	umm_told_start(told, UMM_SOURCE_CALL);
}

static const struct umm_teller teller = {.start = start, .end = umm_told_end};

int umm_mm_mmap(uint64_t address, uint64_t length, int protection, uint64_t flags, int fd, uint64_t offset,
        uint64_t *ret)
{
	return umm_perform_mmap(&teller, address, length, protection, flags, fd, offset, ret);
}

int umm_mm_munmap(uint64_t address, uint64_t length)
{
	return umm_perform_munmap(&teller, address, length);
}

int umm_mm_mremap(uint64_t address, uint64_t old_length, uint64_t new_length, uint64_t flags,
        uint64_t new_address, uint64_t *ret)
{
	return umm_perform_mremap(&teller, address, old_length, new_length, flags, new_address, ret);
}

int umm_mm_madvise(uint64_t address, uint64_t length, int advice)
{
	return umm_perform_madvise(&teller, address, length, advice);
}

int umm_mm_mprotect(uint64_t address, uint64_t length, int protection)
{
	return umm_perform_mprotect(&teller, address, length, protection);
}
