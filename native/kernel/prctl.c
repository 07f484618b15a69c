#include "kernel/prctl.h"

#include <errno.h>
#include <sys/prctl.h>

static const unsigned long except_advised = 1 << 1;

int umm_thp_disable_get(void)
{
	int mode = prctl(PR_GET_THP_DISABLE, 0ul, 0ul, 0ul, 0ul);
	return mode < 0 ? -errno : mode;
}

int umm_thp_disable_set(int mode)
{
	if (mode != UMM_THP_ALLOWED && mode != UMM_THP_DISABLED && mode != UMM_THP_EXCEPT_ADVISED)
		return -EINVAL;
	unsigned long flags = mode == UMM_THP_EXCEPT_ADVISED ? except_advised : 0;
	return prctl(PR_SET_THP_DISABLE, mode != UMM_THP_ALLOWED ? 1ul : 0ul, flags, 0ul, 0ul) ? -errno : 0;
}

int umm_dumpable_get(void)
{
	int dumpable = prctl(PR_GET_DUMPABLE, 0ul, 0ul, 0ul, 0ul);
	return dumpable < 0 ? -errno : dumpable;
}

int umm_dumpable_set(int dumpable)
{
	return prctl(PR_SET_DUMPABLE, dumpable ? 1ul : 0ul, 0ul, 0ul, 0ul) ? -errno : 0;
}
