/* The mapping of this process that an address lies in: PROCMAP_QUERY (Linux 6.11), before it /proc/self/maps.
 * Sources: Documentation/filesystems/proc.rst, include/uapi/linux/fs.h. */
#ifndef UMM_KERNEL_PROCMAP_H
#define UMM_KERNEL_PROCMAP_H

#include <stdint.h>

/* 0; -ENOENT: nothing is mapped there; -errno of opening or reading. */
int umm_procmap_find(uint64_t address, uint64_t *start, uint64_t *end);

#endif
