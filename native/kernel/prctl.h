/* prctl(2): transparent huge pages of this process, and whether others of its user may look at it. */
#ifndef UMM_KERNEL_PRCTL_H
#define UMM_KERNEL_PRCTL_H

enum umm_thp_disable {
	UMM_THP_ALLOWED = 0,
	UMM_THP_DISABLED = 1,
	UMM_THP_EXCEPT_ADVISED = 3, /* Linux 6.18: off, but not where MADV_HUGEPAGE or COLLAPSE ask for it */
};

/* enum umm_thp_disable of this process, or -errno. Inherited by fork and exec. */
int umm_thp_disable_get(void);
int umm_thp_disable_set(int mode);

/* Whether /proc/self belongs to this user (pagemap, mem). A change of user id turns it off. */
int umm_dumpable_get(void);
int umm_dumpable_set(int dumpable);

#endif
