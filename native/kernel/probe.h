/* What has to be measured because no flag tells it. */
#ifndef UMM_KERNEL_PROBE_H
#define UMM_KERNEL_PROBE_H

#include <stdint.h>

struct umm_move_cost {
	uint64_t single_ns; /* per page, moved one at a time */
	uint64_t batch_ns;  /* per page, moved 64 at a time */
	int contended;      /* a second thread of this process was busy: TLB flushes had to interrupt it */
};

/* The cost of UFFDIO_MOVE, on fresh memory and a fresh descriptor, in a few milliseconds. Since Linux 6.18
 * a batch is flushed from the TLBs as one; before, each page is. -EINVAL where MOVE does not exist. */
int umm_probe_move_cost(struct umm_move_cost *ret);

#endif
