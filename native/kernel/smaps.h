/* /proc/self/smaps: the mappings of this process and their flags, for those that PROCMAP_QUERY does not tell.
 * Source: proc_pid_smaps(5), Documentation/filesystems/proc.rst (VmFlags). */
#ifndef UMM_KERNEL_SMAPS_H
#define UMM_KERNEL_SMAPS_H

#include <stdbool.h>
#include <stdint.h>

struct umm_smaps_mapping {
	uint64_t start, end;
	bool shared;    /* sh: MAP_SHARED */
	bool dont_fork; /* dc: MADV_DONTFORK */
};

/* Calls `each` for every mapping in order of address, until it returns a value other than 0, which is passed
 * on. 0, or -errno of reading. The file is read piece by piece: mappings that change meanwhile may be told in
 * parts. */
int umm_smaps_walk(int (*each)(void *context, const struct umm_smaps_mapping *mapping), void *context);

#endif
