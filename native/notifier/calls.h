/* The system calls that change memory, for those who want the subscribers of this process told: start before
 * anything changes, end after all of it, source UMM_SOURCE_CALL, ranges as the kernel rounds them.
 *
 * 0 or -errno, as the system call; the end event carries the errno of one that failed. Arguments that the
 * kernel refuses go to it untold. What is told is said in perform.h and effect.h. MADV_COLLAPSE that
 * succeeded is told as `change`, too, between start and end.
 *
 * Not from a signal handler, and not for memory of a pager's region while holding what its handlers need:
 * the call waits for subscribers that may sleep. */
#ifndef UMM_NOTIFIER_CALLS_H
#define UMM_NOTIFIER_CALLS_H

#include <stdint.h>

#include "notifier/perform.h"

int umm_mm_mmap(uint64_t address, uint64_t length, int protection, uint64_t flags, int fd, uint64_t offset,
        uint64_t *ret);
int umm_mm_munmap(uint64_t address, uint64_t length);
int umm_mm_mremap(uint64_t address, uint64_t old_length, uint64_t new_length, uint64_t flags,
        uint64_t new_address, uint64_t *ret);
int umm_mm_madvise(uint64_t address, uint64_t length, int advice);
int umm_mm_mprotect(uint64_t address, uint64_t length, int protection);

/* Tells the subscribers of this process. For tellers with another source. */
void umm_told_start(struct umm_told *told, int source);
void umm_told_end(struct umm_told *told, int error, uint64_t moved_to);

#endif
