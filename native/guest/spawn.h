/* Starting a process: descriptors, session, control group, and why it failed when it did. */
#ifndef UMM_GUEST_SPAWN_H
#define UMM_GUEST_SPAWN_H

#include <stdint.h>
#include <sys/types.h>

struct umm_spawn {
	const char *cwd;
	char *const *argv;
	char *const *env;
	int in, out, err, report; /* the child's ends */
	int terminal;             /* becomes its controlling terminal; -1: none */
	int cgroup;               /* cgroup.procs to join; -1: none */
};

/* What the child could not do, for the message. */
struct umm_spawn_failure {
	int error;
	char what[24];
};

/* Returns once the program runs. 0, or negative errno with `failure` filled. */
int umm_spawn(const struct umm_spawn *spawn, pid_t *pid, struct umm_spawn_failure *failure);

#endif
