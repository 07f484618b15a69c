#include "notifier/io_uring_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

/* A forked child has the ring's descriptor, too: it must not change the parent's slots. */
static bool is_forked(const struct umm_notify_io_uring *buffers)
{
	return buffers->pid != (uint32_t)getpid();
}

/* NULL: no such slot, or it is in none's use. */
static struct io_slot *slot_of(struct umm_notify_io_uring *buffers, uint32_t number)
{
	if (number < buffers->first || number - buffers->first >= buffers->n)
		return NULL;
	struct io_slot *slot = &buffers->slots[number - buffers->first];
	return slot->state != SLOT_FREE && slot->subscription ? slot : NULL;
}

/* -- the slots as a whole ------------------------------------------------------------------- */

struct first_update {
	const struct umm_notify_io_uring_options *options;
	int error;
};

/* In a thread of its own, as the later ones are: the kernel refuses it for a SINGLE_ISSUER ring. */
static void *empty_all(void *argument)
{
	struct first_update *update = argument;
	for (uint32_t i = 0; i < update->options->slots && !update->error; i++)
		update->error =
		        umm_io_uring_update_slot(update->options->ring_fd, update->options->first + i, 0, 0);
	return NULL;
}

static int check_ring(const struct umm_notify_io_uring_options *options)
{
	struct first_update update = {options, 0};
	pthread_t thread;
	if (!options->slots || options->slots > UMM_IO_URING_SLOTS_MAX ||
	        options->first > UMM_IO_URING_SLOTS_MAX - options->slots)
		return -EINVAL;
	int err = -pthread_create(&thread, NULL, empty_all, &update);
	if (err)
		return err;
	pthread_join(thread, NULL);
	return update.error;
}

int umm_notify_io_uring_create(
        const struct umm_notify_io_uring_options *options, struct umm_notify_io_uring **ret)
{
	int err = check_ring(options);
	if (err)
		return err;
	struct umm_notify_io_uring *buffers =
	        calloc(1, sizeof(*buffers) + options->slots * sizeof(buffers->slots[0]));
	if (!buffers)
		return -ENOMEM;
	buffers->ring_fd = options->ring_fd;
	buffers->first = options->first;
	buffers->n = options->slots;
	buffers->limit_ns = options->limit_ns < limit_most_ns ? options->limit_ns : limit_most_ns;
	buffers->at_use = options->at_use;
	buffers->pid = (uint32_t)getpid();
	for (uint32_t i = 0; i < buffers->n; i++)
		buffers->slots[i].owner = buffers;
	pthread_condattr_t attributes;
	pthread_condattr_init(&attributes);
	pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
	pthread_cond_init(&buffers->changed, &attributes);
	pthread_condattr_destroy(&attributes);
	pthread_mutex_init(&buffers->lock, NULL);
	err = umm_subscriber_create(
	        &(struct umm_subscriber_options){
	                .name = options->name ? options->name : "io_uring",
	                .ops = &io_slot_ops,
	                .sleeping = true,
	                .late = UMM_LATE_KEEP,
	                .limit_ns = buffers->limit_ns,
	        },
	        &buffers->subscriber);
	if (err) {
		pthread_mutex_destroy(&buffers->lock);
		pthread_cond_destroy(&buffers->changed);
		free(buffers);
		return err;
	}
	*ret = buffers;
	return 0;
}

/* The slot is nobody's any more. `registered`: by add() in full. */
static void take_out(struct io_slot *slot)
{
	struct umm_notify_io_uring *buffers = slot->owner;
	struct umm_subscription *subscription = slot->subscription;
	slot->subscription = NULL; /* no function finds it; callbacks still may, and do no harm */
	pthread_mutex_unlock(&buffers->lock);
	umm_unsubscribe(subscription);
	pthread_mutex_lock(&buffers->lock);
	io_slot_empty(slot);
	*slot = (struct io_slot){.owner = buffers, .state = SLOT_FREE};
}

static int remove_all(struct umm_notify_io_uring *buffers)
{
	int err = 0;
	pthread_mutex_lock(&buffers->lock);
	for (uint32_t i = 0; i < buffers->n; i++)
		if (buffers->slots[i].requests || buffers->slots[i].users)
			err = -EBUSY;
	for (uint32_t i = 0; i < buffers->n && !err; i++)
		if (buffers->slots[i].subscription)
			take_out(&buffers->slots[i]);
	pthread_mutex_unlock(&buffers->lock);
	return err;
}

int umm_notify_io_uring_destroy(struct umm_notify_io_uring *buffers)
{
	if (is_forked(buffers)) {
		/* The lock may be held by a thread that is not here. */
		for (uint32_t i = 0; i < buffers->n; i++)
			if (buffers->slots[i].subscription)
				umm_unsubscribe(buffers->slots[i].subscription);
	} else {
		int err = remove_all(buffers);
		if (err)
			return err;
		pthread_mutex_destroy(&buffers->lock);
		pthread_cond_destroy(&buffers->changed);
	}
	umm_subscriber_destroy(buffers->subscriber);
	free(buffers);
	return 0;
}

/* -- one slot ------------------------------------------------------------------------------- */

static struct io_slot *find_free(struct umm_notify_io_uring *buffers)
{
	for (uint32_t i = 0; i < buffers->n; i++)
		if (buffers->slots[i].state == SLOT_FREE)
			return &buffers->slots[i];
	return NULL;
}

int umm_notify_io_uring_add(
        struct umm_notify_io_uring *buffers, uint64_t address, uint64_t length, uint32_t *ret)
{
	static const uint64_t settle_ns = 10000000000u;
	if (is_forked(buffers))
		return -ESHUTDOWN;
	if (!length || length > UMM_IO_URING_BUFFER_MAX || address + length < address)
		return -EINVAL;
	pthread_mutex_lock(&buffers->lock);
	struct io_slot *slot = find_free(buffers);
	if (!slot) {
		pthread_mutex_unlock(&buffers->lock);
		return -ENOSPC;
	}
	slot->state = SLOT_EMPTY;
	slot->address = address;
	slot->length = length;
	pthread_mutex_unlock(&buffers->lock);
	struct umm_subscription *subscription = NULL;
	int err = umm_subscribe(
	        umm_space_self(), buffers->subscriber, address, address + length, slot, &subscription);
	pthread_mutex_lock(&buffers->lock);
	if (err) {
		*slot = (struct io_slot){.owner = buffers, .state = SLOT_FREE};
	} else {
		slot->subscription = subscription;
		err = io_slot_settle(slot, deadline_of(settle_ns));
		if (err)
			take_out(slot);
		else
			*ret = number_of(slot);
	}
	pthread_mutex_unlock(&buffers->lock);
	return err;
}

int umm_notify_io_uring_remove(struct umm_notify_io_uring *buffers, uint32_t number)
{
	if (is_forked(buffers))
		return -ESHUTDOWN;
	pthread_mutex_lock(&buffers->lock);
	struct io_slot *slot = slot_of(buffers, number);
	int err = !slot ? -EINVAL : slot->requests || slot->users ? -EBUSY : 0;
	if (!err)
		take_out(slot);
	pthread_mutex_unlock(&buffers->lock);
	return err;
}

int umm_notify_io_uring_use(
        struct umm_notify_io_uring *buffers, uint32_t number, uint64_t timeout_ns, uint64_t *generation)
{
	if (is_forked(buffers))
		return -ESHUTDOWN;
	pthread_mutex_lock(&buffers->lock);
	struct io_slot *slot = slot_of(buffers, number);
	int err = slot ? io_slot_settle(slot, deadline_of(timeout_ns)) : -EINVAL;
	if (!err) {
		slot->requests++;
		if (generation)
			*generation = slot->generation;
	}
	pthread_mutex_unlock(&buffers->lock);
	return err;
}

int umm_notify_io_uring_done(struct umm_notify_io_uring *buffers, uint32_t number)
{
	if (is_forked(buffers))
		return -ESHUTDOWN;
	pthread_mutex_lock(&buffers->lock);
	struct io_slot *slot = slot_of(buffers, number);
	int err = slot && slot->requests ? 0 : -EINVAL;
	if (!err && !--slot->requests)
		pthread_cond_broadcast(&buffers->changed);
	pthread_mutex_unlock(&buffers->lock);
	return err;
}

int umm_notify_io_uring_look(
        struct umm_notify_io_uring *buffers, uint32_t number, struct umm_notify_io_uring_slot *ret)
{
	if (is_forked(buffers))
		return -ESHUTDOWN;
	pthread_mutex_lock(&buffers->lock);
	struct io_slot *slot = slot_of(buffers, number);
	if (slot)
		*ret = (struct umm_notify_io_uring_slot){
		        .address = slot->address,
		        .length = slot->length,
		        .generation = slot->generation,
		        .requests = slot->requests,
		        .registered = slot->state == SLOT_LIVE,
		        .error = slot->error,
		};
	pthread_mutex_unlock(&buffers->lock);
	return slot ? 0 : -EINVAL;
}

void umm_notify_io_uring_stats(struct umm_notify_io_uring *buffers, struct umm_notify_io_uring_stats *ret)
{
	*ret = (struct umm_notify_io_uring_stats){0};
	if (is_forked(buffers))
		return;
	pthread_mutex_lock(&buffers->lock);
	*ret = buffers->stats;
	pthread_mutex_unlock(&buffers->lock);
}
