/* The floors: fault handlers with nothing in them but the system calls that no handler can do without.
 *
 * A floor is a private anonymous range that one userfaultfd serves with UFFDIO_COPY of base pages from
 * memory. It keeps no state per page, evicts nothing, counts nothing and follows no events. */
#ifndef UMM_BENCH_FLOOR_H
#define UMM_BENCH_FLOOR_H

#include <stdint.h>

enum umm_floor_kind {
	UMM_FLOOR_PINNED,    /* one thread per allowed CPU, at most 4, pinned; each blocks in read() */
	UMM_FLOOR_POLLING,   /* one thread where the scheduler likes it; poll(), then read() until EAGAIN */
	UMM_FLOOR_IN_THREAD, /* UFFD_FEATURE_SIGBUS: the handler of SIGBUS copies, in the faulting thread */
};

struct umm_floor;

/* A range of `size` bytes (a multiple of the base page) whose content is that of `source`, which stays
 * the caller's. At most one IN_THREAD floor at a time (-EBUSY): it owns the process's SIGBUS. */
int umm_floor_create(int kind, const void *source, uint64_t size, struct umm_floor **ret);
uint64_t umm_floor_address(const struct umm_floor *floor);
unsigned umm_floor_handlers(const struct umm_floor *floor);
/* Stops the handlers and unmaps. The first error that a handler met: its faults read as zeros. */
int umm_floor_destroy(struct umm_floor *floor);

/* Fills a fresh range aligned to `align` (a power of two, at least the base page) from `source` with
 * UFFDIO_COPY of `batch` bytes at a time, in the calling thread; the duration of the copying alone goes
 * to *elapsed_ns. huge: the range is MADV_HUGEPAGE. *wrong: words at the start of a base page that
 * differ from the source afterwards. */
int umm_floor_populate(const void *source, uint64_t size, uint64_t batch, uint64_t align, int huge,
        uint64_t *elapsed_ns, uint64_t *wrong);

#endif
