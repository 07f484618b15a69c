#include "kernel/madvise.h"

#include <errno.h>
#include <sys/mman.h>

_Static_assert(UMM_MADV_DONTNEED == MADV_DONTNEED && UMM_MADV_FREE == MADV_FREE, "advice");
_Static_assert(UMM_MADV_REMOVE == MADV_REMOVE && UMM_MADV_DONTFORK == MADV_DONTFORK, "advice");
_Static_assert(UMM_MADV_HUGEPAGE == MADV_HUGEPAGE && UMM_MADV_DODUMP == MADV_DODUMP, "advice");
_Static_assert(UMM_MADV_KEEPONFORK == MADV_KEEPONFORK, "advice");

int umm_madvise(uint64_t address, uint64_t length, int advice)
{
	return madvise((void *)(uintptr_t)address, length, advice) ? -errno : 0;
}
