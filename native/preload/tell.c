#include "preload/tell.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "notifier/event_ring.h"
#include "notifier/preload.h"

static const struct umm_preload_hooks *_Atomic hooks;
static struct umm_event_ring *_Atomic ring;
static _Atomic int own_pid; /* of who has this memory: differs from getpid() in a child of vfork */
static _Atomic bool exit_told;

/* -- changes made inside of a hook ---------------------------------------------------------- */

enum { PENDING_MAX = 16 };

/* A callback that changes memory, or a signal handler that does while a hook runs, must not enter the core
 * again (it may hold a lock there, and a callback that always does would never end): told when the hook is
 * over. */
static _Thread_local struct {
	bool inside, overflow;
	_Atomic uint32_t n; /* atomic against signal handlers of this thread */
	struct umm_effect effects[PENDING_MAX];
} self __attribute__((tls_model("initial-exec")));

static void hook_begin(void)
{
	self.inside = true;
	atomic_signal_fence(memory_order_seq_cst);
}

static void hook_end(const struct umm_preload_hooks *core)
{
	/* What is added meanwhile is told, too, until the list is full. */
	uint32_t told = 0;
	do
		for (; told < atomic_load(&self.n); told++)
			core->post(self.effects[told].start, self.effects[told].end, 0,
			        self.effects[told].reason);
	while (!self.overflow && !atomic_compare_exchange_strong(&self.n, &told, 0));
	if (self.overflow) {
		core->post(0, UINT64_MAX, 0, UMM_REASON_LOST);
		atomic_store(&self.n, 0);
		self.overflow = false;
	}
	atomic_signal_fence(memory_order_seq_cst);
	self.inside = false;
}

static void hook_later(const struct umm_told *told)
{
	for (uint32_t i = 0; i < told->n; i++) {
		uint32_t at = atomic_load(&self.n);
		if (at == PENDING_MAX) {
			self.overflow = true;
			return;
		}
		self.effects[at] = told->effects[i];
		atomic_store(&self.n, at + 1);
	}
}

/* -- the ring ------------------------------------------------------------------------------- */

static void put(struct umm_event_ring *to, int kind, uint64_t start, uint64_t end, int reason, uint64_t id,
        int error, uint64_t moved_to)
{
	struct umm_notify_event event = {.start = start,
	        .end = end,
	        .to = moved_to,
	        .id = id,
	        .generation = id,
	        .error = error,
	        .kind = (uint8_t)kind,
	        .source = UMM_SOURCE_PRELOAD,
	        .reason = (uint8_t)reason,
	        .promise = UMM_PROMISE_ORDERED,
	        .pid = (uint32_t)atomic_load_explicit(&own_pid, memory_order_relaxed)};
	umm_event_ring_put(to, &event);
}

static uint64_t next_id(struct umm_event_ring *to)
{
	return atomic_fetch_add(&to->ids, 1) + 1;
}

/* -- start and end -------------------------------------------------------------------------- */

/* Each change has its id of the ring beside what the core keeps for it. */
struct own_told {
	struct umm_event_ring *ring;
	const struct umm_preload_hooks *core;
	uint64_t id;
};
_Static_assert(sizeof(((struct umm_told *)0)->own) >= sizeof(struct own_told), "room in struct umm_told");

static void start(struct umm_told *told)
{
	struct own_told own = {.ring = atomic_load_explicit(&ring, memory_order_acquire),
	        .core = atomic_load_explicit(&hooks, memory_order_acquire)};
	if (own.ring) {
		own.id = atomic_fetch_add(&own.ring->ids, told->n) + 1;
		for (uint32_t i = 0; i < told->n; i++)
			put(own.ring, UMM_NOTIFY_START, told->effects[i].start, told->effects[i].end,
			        told->effects[i].reason, own.id + i, 0, 0);
	}
	if (own.core && self.inside) {
		own.core = NULL;
		hook_later(told);
	}
	memcpy(told->own, &own, sizeof(own));
	if (own.core) {
		hook_begin();
		own.core->teller.start(told);
		hook_end(own.core);
	}
}

static void end(struct umm_told *told, int error, uint64_t moved_to)
{
	struct own_told own;
	memcpy(&own, told->own, sizeof(own));
	if (own.core) {
		hook_begin();
		own.core->teller.end(told, error, moved_to);
		hook_end(own.core);
	}
	for (uint32_t i = told->n; own.ring && i-- > 0;)
		put(own.ring, UMM_NOTIFY_END, told->effects[i].start, told->effects[i].end,
		        told->effects[i].reason, own.id + i, error,
		        told->effects[i].reason == UMM_REASON_MOVE ? moved_to : 0);
}

const struct umm_teller *teller_for(const void *caller)
{
	static const struct umm_teller teller = {.start = start, .end = end};
	const struct umm_preload_hooks *core = atomic_load_explicit(&hooks, memory_order_acquire);
	if (core) {
		uintptr_t from = (uintptr_t)caller;
		return from >= core->own_start && from < core->own_end ? NULL : &teller;
	}
	return atomic_load_explicit(&ring, memory_order_acquire) ? &teller : NULL;
}

/* -- the process ---------------------------------------------------------------------------- */

static bool is_own_process(void)
{
	return (int)syscall(SYS_getpid) == atomic_load(&own_pid);
}

bool tell_leave(int reason)
{
	const struct umm_preload_hooks *core = atomic_load(&hooks);
	struct umm_event_ring *to = atomic_load(&ring);
	if ((!core && !to) || !is_own_process())
		return false;
	if (core && !self.inside) {
		hook_begin();
		core->leave(reason);
		hook_end(core);
	}
	if (to && !(reason == UMM_REASON_EXIT && atomic_exchange(&exit_told, true)))
		put(to, UMM_NOTIFY_RELEASE, 0, UINT64_MAX, reason, next_id(to), 0, 0);
	return true;
}

void tell_stay(int error)
{
	const struct umm_preload_hooks *core = atomic_load(&hooks);
	struct umm_event_ring *to = atomic_load(&ring);
	if (core)
		core->stay();
	if (to)
		put(to, UMM_NOTIFY_END, 0, UINT64_MAX, UMM_REASON_EXEC, next_id(to), -error, 0);
}

static _Thread_local uint64_t fork_id __attribute__((tls_model("initial-exec")));

/* fork write-protects private memory. (The core tells its own subscribers.) */
static void before_fork(void)
{
	struct umm_event_ring *to = atomic_load(&ring);
	if (!to)
		return;
	fork_id = next_id(to);
	put(to, UMM_NOTIFY_START, 0, UINT64_MAX, UMM_REASON_FORK, fork_id, 0, 0);
}

static void in_parent(void)
{
	struct umm_event_ring *to = atomic_load(&ring);
	if (to && fork_id)
		put(to, UMM_NOTIFY_END, 0, UINT64_MAX, UMM_REASON_FORK, fork_id, 0, 0);
}

/* The ring is shared memory: the child writes into it under its own number. */
static void in_child(void)
{
	atomic_store(&own_pid, getpid());
	atomic_store(&exit_told, false);
	self.inside = self.overflow = false;
	atomic_store(&self.n, 0);
	if (atomic_load(&ring))
		atomic_fetch_add(&atomic_load(&ring)->processes, 1);
}

__attribute__((constructor)) static void set_up(void)
{
	const char *path = getenv("UMM_NOTIFY_SHM");
	atomic_store(&own_pid, getpid());
	pthread_atfork(before_fork, in_parent, in_child);
	if (path)
		atomic_store_explicit(&ring, umm_event_ring_open(path), memory_order_release);
}

__attribute__((destructor)) static void tear_down(void)
{
	/* The core tells of exit(3) by itself. */
	struct umm_event_ring *to = atomic_load(&ring);
	if (to && is_own_process() && !atomic_exchange(&exit_told, true))
		put(to, UMM_NOTIFY_RELEASE, 0, UINT64_MAX, UMM_REASON_EXIT, next_id(to), 0, 0);
}

__attribute__((visibility("default"))) int umm_preload_attach(const struct umm_preload_hooks *offered)
{
	const struct umm_preload_hooks *none = NULL;
	if (offered->version != UMM_PRELOAD_VERSION || offered->told_size != sizeof(struct umm_told))
		return -EINVAL;
	return atomic_compare_exchange_strong(&hooks, &none, offered) ? 0 : -EBUSY;
}
