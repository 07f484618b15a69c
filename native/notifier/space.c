/* Address spaces: this process's, and those of others of which somebody reports events. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "notifier/internal.h"

struct umm_space umm_self;

void space_init(struct umm_space *space, uint32_t pid)
{
	memset(space, 0, sizeof(*space));
	phases_init(&space->changes);
	pthread_mutex_init(&space->lock, NULL);
	space->pid = pid;
	space->epoch = atomic_load(&umm_fork_epoch);
}

struct umm_space *umm_space_self(void)
{
	return &umm_self;
}

int umm_space_create(uint32_t pid, struct umm_space **ret)
{
	struct umm_space *space = malloc(sizeof(*space));
	if (!space)
		return -ENOMEM;
	space_init(space, pid);
	*ret = space;
	return 0;
}

int umm_space_destroy(struct umm_space *space)
{
	if (space == &umm_self)
		return -EINVAL;
	if (space->epoch == atomic_load(&umm_fork_epoch)) {
		if (umm_space_subscriptions(space))
			return -EBUSY;
		tree_collect(space);
	}
	pthread_mutex_destroy(&space->lock);
	free(space);
	return 0;
}

uint64_t umm_space_generation(const struct umm_space *space)
{
	return atomic_load(&space->generation);
}

uint32_t umm_space_pid(const struct umm_space *space)
{
	return space->pid;
}

uint32_t umm_space_subscriptions(struct umm_space *space)
{
	/* The parent's: nobody here is subscribed, and its lock may be held for ever. */
	if (space->epoch != atomic_load(&umm_fork_epoch))
		return 0;
	pthread_mutex_lock(&space->lock);
	uint32_t n = space->n;
	pthread_mutex_unlock(&space->lock);
	return n;
}

void umm_space_revive(struct umm_space *space)
{
	atomic_store(&space->released, false);
}
