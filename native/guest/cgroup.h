/* The control group that holds the command, so that what it takes is bounded and none of it stays. */
#ifndef UMM_GUEST_CGROUP_H
#define UMM_GUEST_CGROUP_H

#include <stdint.h>

/* Where cgroup2 is mounted; set up the controllers for groups below. Does nothing when it is not there. */
void umm_cgroup_init(void);
/* Make the group of a command anew. The descriptor of its cgroup.procs, to which the child writes itself; -1
 * when there are no control groups. */
int umm_cgroup_open(void);
/* Kill what is in it, those that fork at this moment included. */
void umm_cgroup_kill(void);
/* How many processes the out-of-memory killer took so far, of the whole guest. */
uint64_t umm_oom_kills(void);

#endif
