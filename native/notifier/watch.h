/* What becomes of memory that is in no region, whoever changes it: raw system calls, and libc's own (the
 * munmap of a free() that no preloaded library sees).
 *
 * A userfaultfd is registered in write-protect mode, with nothing protected, so nothing faults; what it has
 * is the kernel's events. A thread of the watch reads them and posts them to the space, source
 * UMM_SOURCE_KERNEL:
 *
 *   REMOVE  MADV_DONTNEED, MADV_FREE, MADV_REMOVE    promise BEFORE: pages go after the post
 *   UNMAP   munmap, MAP_FIXED over it, brk, mremap   promise AFTER; the range is that of the whole call
 *   MOVE    mremap; then UNMAP of the place it left  promise AFTER
 *
 * Who changes the memory goes on when the event has been read. The post comes a moment later, and reading and
 * posting are bracketed by umm_notify_reading_*: so from when munmap() returns, umm_read_begin and
 * umm_read_retry never say that nothing changed.
 *
 * While munmap() has not returned, another thread can have mapped the range anew, before the event was
 * even queued. One who got an address and asks whether what he knows about it still holds, calls
 * umm_watch_changing first and umm_read_begin then: 0 from the first says that every change that made room
 * for his mapping was read.
 *
 * Not seen: mprotect, swapping, migration, merging (KSM), huge pages put together (told by their callers
 * through calls.h), MADV_GUARD_INSTALL, holes punched through a descriptor or another mapping of a file.
 *
 * What watching does to the memory: a part of a mapping that is watched is a mapping of its own, and merges
 * with watched neighbours only (so one mremap of both parts fails with EFAULT: watch whole mappings);
 * khugepaged and MADV_COLLAPSE put huge pages together only where no page is missing; file and shared memory
 * is faulted in page by page (no fault-around), and shared hugetlb memory has page tables of its own; a fork
 * copies the page tables. No page is pinned. Memory that moves (mremap) or grows stays watched at its new
 * place. A forked child has no watch. Memory can have one userfaultfd: a watched range cannot be made a
 * region. */
#ifndef UMM_NOTIFIER_WATCH_H
#define UMM_NOTIFIER_WATCH_H

#include <stdint.h>

#include "notifier/notifier.h"

struct umm_watch;

struct umm_watch_stats {
	uint64_t removes, unmaps, remaps; /* events that were read */
	uint64_t bytes;                   /* that somebody wants watched, now */
	uint64_t pieces;                  /* ranges of those */
};

/* -EOPNOTSUPP: no userfaultfd with write protection and events (Linux 5.7; on arm64 6.10). -EPERM, -ENOSYS:
 * none at all. For memory of this process, told to `space`. */
int umm_watch_create(struct umm_space *space, struct umm_watch **ret);
/* Changes under way may not be told any more. In a forked child, too. -EDEADLK: called by a callback in its
 * own thread. */
int umm_watch_destroy(struct umm_watch *watch);

/* Watches what is mapped in [start, end) now; whole pages (of the mapping's own size: hugetlb). Each add has
 * its remove, also where the memory went meanwhile; ranges may overlap.
 * 0; -EINVAL: not whole pages, or empty; -ENOMEM: nothing is mapped at its start (or no memory); -EBUSY:
 * another userfaultfd's, such as a pager's region, which tells by itself; -EOPNOTSUPP: a mapping that the
 * kernel does not take: a file's before Linux 6.7, a shared one of a file opened for reading only; who
 * keeps something about it cannot know when it goes, and must not keep it. -ENOSPC: too many ranges.
 * -ESRCH: in a forked child. */
int umm_watch_add(struct umm_watch *watch, uint64_t start, uint64_t end);
/* 0; -EINVAL; -ENOENT: a part of it was not added; -ESRCH. A mapping that took the place of what
 * was added is not touched. While other memory is changing the kernel may only be told later, by the watch's
 * thread. */
int umm_watch_remove(struct umm_watch *watch, uint64_t start, uint64_t end);

/* The same until the memory is unmapped or the watch destroyed: there is no remove, so no mapping is cut in
 * two afterwards (of which mremap() would fail). A watch is used with add and remove, or with this. */
int umm_watch_keep(struct umm_watch *watch, uint64_t start, uint64_t end);

/* 1: a change of watched memory, anywhere, has begun and may not have been read. 0: every change that began
 * before this call has been read. Costs one system call. -ESRCH in a forked child. */
int umm_watch_changing(struct umm_watch *watch);
void umm_watch_stats(struct umm_watch *watch, struct umm_watch_stats *ret);

#endif
