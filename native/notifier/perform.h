/* mmap, munmap, mremap, madvise and mprotect with somebody told before and after: what the calls made through
 * us and those that the preloaded library catches have in common. No core, no malloc, no lock.
 *
 * Told is what changes, and nothing else: a mapping that lands in free space (also with MAP_FIXED), memory
 * that grows in place and advice without consequences are done untold. For that, MAP_FIXED is tried as
 * MAP_FIXED_NOREPLACE first, and a mremap that may move is first tried without.
 *
 * Not seen: what mremap rounds up when the length of a hugetlb mapping is no multiple of its page;
 * what PROT_GROWSDOWN and PROT_GROWSUP add to a range; what MADV_REMOVE does to other mappings of the file.
 */
#ifndef UMM_NOTIFIER_PERFORM_H
#define UMM_NOTIFIER_PERFORM_H

#include <stdint.h>

#include "notifier/effect.h"
#include "notifier/notifier.h"

/* The changes of one call, on its caller's stack. */
struct umm_told {
	struct umm_effect effects[UMM_EFFECTS_MAX];
	uint32_t n;
	struct umm_notify_range ranges[UMM_EFFECTS_MAX]; /* of the core */
	uint64_t own[3];                                 /* of the preloaded library */
};

struct umm_teller {
	/* Before any of told->effects (n > 0) happens. */
	void (*start)(struct umm_told *told);
	/* After. error: 0 or -errno. moved_to: where the effect with reason MOVE went. */
	void (*end)(struct umm_told *told, int error, uint64_t moved_to);
};

/* 0 or -errno, as the system call has it; `ret`: its result. */
int umm_perform_mmap(const struct umm_teller *teller, uint64_t address, uint64_t length, int protection,
        uint64_t flags, int fd, uint64_t offset, uint64_t *ret);
int umm_perform_munmap(const struct umm_teller *teller, uint64_t address, uint64_t length);
int umm_perform_mremap(const struct umm_teller *teller, uint64_t address, uint64_t old_length,
        uint64_t new_length, uint64_t flags, uint64_t new_address, uint64_t *ret);
int umm_perform_madvise(const struct umm_teller *teller, uint64_t address, uint64_t length, int advice);
int umm_perform_mprotect(const struct umm_teller *teller, uint64_t address, uint64_t length, int protection);

#endif
