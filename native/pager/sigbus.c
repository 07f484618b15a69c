/* SIGBUS, the signal of a page that cannot be had: the in-thread mode serves its faults here, and a guard
 * lets an access to a lost unit complete on a fill.
 *
 * A fault in the memory of a region is never taken under one of our locks, so this handler may take them. */
#include "pager/internal.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "common/clock.h"
#include "common/lock.h"
#include "kernel/pagemap.h"

static struct sigaction previous;
static pthread_mutex_t install_lock = PTHREAD_MUTEX_INITIALIZER;
static uint8_t *fill_buffer;
static uint64_t fill_bytes;

/* Per thread; initial-exec, so that touching it in a signal handler allocates nothing. */
static _Thread_local __attribute__((tls_model("initial-exec"))) struct {
	unsigned depth;
	bool passed_on;
	struct umm_lost first;
} guard;

static void pass_on(int signal, siginfo_t *info, void *context)
{
	/* faulthandler puts back the handler that it found, ours, and raises the signal again: handed to it
	 * once more, that would never end. */
	bool raised_again = info->si_code <= 0 && guard.passed_on;
	guard.passed_on = info->si_code > 0;
	if (raised_again) {
		struct sigaction fatal = {.sa_handler = SIG_DFL};
		sigaction(SIGBUS, &fatal, NULL);
		raise(SIGBUS); /* delivered when this handler returns */
		return;
	}
	if (previous.sa_flags & SA_SIGINFO) {
		previous.sa_sigaction(signal, info, context);
	} else if (previous.sa_handler == SIG_DFL || previous.sa_handler == SIG_IGN) {
		/* Returning repeats the access, now with the default action: death by SIGBUS. */
		struct sigaction fatal = {.sa_handler = SIG_DFL};
		sigaction(SIGBUS, &fatal, NULL);
	} else {
		previous.sa_handler(signal);
	}
}

static bool note_filled(
        struct umm_region *region, uint64_t unit, uint64_t offset, uint64_t address, int error)
{
	unit_set(region, unit, UNIT_FILLED, (uint32_t)error);
	region->any_filled = true;
	if (guard.first.units++ == 0)
		guard.first = (struct umm_lost){region, address, offset, 1, error};
	return true;
}

static bool fill_lost(struct umm_region *region, uint64_t unit, uint64_t offset, uint64_t address)
{
	int error = (int)unit_payload(region, unit);
	if (poisoned_by_mapping(region)) {
		uint64_t home = unit_address(region, unit);
		if (!home || !fill_mapped(region, home, UMM_FILL_BYTE))
			return false;
		return note_filled(region, unit, offset, address, error);
	}
	uint64_t at = unit * region->unit, n = region->hugetlb ? region->hugetlb : region->pager->page;
	if (n > fill_bytes)
		return false;
	if (region->hugetlb)
		memset(fill_buffer, UMM_FILL_BYTE, n);
	for (uint64_t done = 0; done < region->unit;) {
		uint64_t run, where = region_address_of(region, at + done, &run);
		if (run < n)
			return false;
		struct umm_uffd_result result;
		umm_uffd_copy(region->uf->fd, where, (uintptr_t)fill_buffer, n, 0, &result);
		if (result.outcome == UMM_OUTCOME_DEFERRED || result.outcome == UMM_OUTCOME_PARTIAL)
			return true; /* the access is repeated, and comes here again */
		if (result.outcome != UMM_OUTCOME_INSTALLED && result.outcome != UMM_OUTCOME_ALREADY_THERE)
			return false;
		done += n;
	}
	return note_filled(region, unit, offset, address, error);
}

/* The signal does not say whether a page is missing or write-protected (by an eviction by copying). What is
 * there can only have been a write to the latter; lifting it once too often does no harm. */
static uint64_t kind_of_fault(struct umm_pager *pager, int state, uint64_t address)
{
	uint64_t entry = 0;
	if (!pager->has_wp || (state != UNIT_PRESENT && state != UNIT_LEAVING && state != UNIT_COPYING))
		return 0;
	umm_pagemap_read(pager->pagemap_fd, address & ~(pager->page - 1), 1, pager->page, &entry);
	return entry & (UMM_PAGEMAP_PRESENT | UMM_PAGEMAP_SWAP) ? UMM_UFFD_FAULT_WP : 0;
}

/* True when the access can be repeated. Lock held. */
static bool resolve(struct umm_uf *uf, uint64_t address)
{
	struct extent *x = extents_find(uf, address);
	struct umm_region *region = x->region;
	uint64_t offset = address - x->start + x->offset, unit = offset / region->unit;
	int state = unit_state(region, unit);
	if (state == UNIT_POISONED)
		return guard.depth && fill_lost(region, unit, offset, address);
	if (!uf->pager->in_thread)
		/* Filled for another thread, or removed, since the signal was raised. */
		return state == UNIT_FILLED || state == UNIT_REMOVED || state == UNIT_MISSING ||
		       state == UNIT_FETCHING;
	struct times times = {.arrived = umm_now_ns()};
	serve_fault(uf, address, kind_of_fault(uf->pager, state, address), uf->handlers[0].buffer, &times);
	uf->n_deferred = 0; /* nobody waits: the access is repeated */
	if (unit_state(region, unit) == UNIT_POISONED)
		return guard.depth && fill_lost(region, unit, offset, address);
	return true;
}

static void on_sigbus(int signal, siginfo_t *info, void *context)
{
	int saved_errno = errno;
	uint64_t address = (uintptr_t)info->si_addr;
	struct umm_uf *uf = info->si_code > 0 ? find_uf_locked(address) : NULL;
	bool again = false;
	if (uf) {
		struct extent *x = extents_find(uf, address);
		int before = unit_state(x->region, (address - x->start + x->offset) / x->region->unit);
		again = resolve(uf, address);
		pthread_mutex_unlock(&uf->lock);
		if (again && before != UNIT_MISSING)
			sched_yield(); /* somebody else's claim: let it end */
	}
	if (!again && !uf && info->si_code > 0)
		again = zero_unindexed(address);
	if (!again)
		pass_on(signal, info, context);
	errno = saved_errno;
}

int sigbus_install(void)
{
	struct sigaction wanted = {.sa_sigaction = on_sigbus,
	                         .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART},
	                 now;
	sigfillset(&wanted.sa_mask);
	sigdelset(&wanted.sa_mask, SIGSEGV);
	sigset_t saved;
	block_signals(&saved);
	pthread_mutex_lock(&install_lock);
	int err = 0;
	if (!fill_buffer) {
		fill_bytes = 2 << 20; /* hugetlb pages are filled in one piece; the rest by base pages */
		fill_buffer = map_anonymous(fill_bytes, fill_bytes);
		if (!fill_buffer)
			err = -ENOMEM;
		else
			memset(fill_buffer, UMM_FILL_BYTE, (size_t)sysconf(_SC_PAGESIZE));
	}
	/* Somebody (faulthandler, a JIT) may have put a handler over ours since. */
	if (!err && sigaction(SIGBUS, NULL, &now) == 0 &&
	        (!(now.sa_flags & SA_SIGINFO) || now.sa_sigaction != on_sigbus)) {
		previous = now;
		if (sigaction(SIGBUS, &wanted, NULL) < 0)
			err = -errno;
	}
	pthread_mutex_unlock(&install_lock);
	restore_signals(&saved);
	return err;
}

int umm_guard_enter(void)
{
	int err = sigbus_install();
	if (err)
		return err;
	if (guard.depth++ == 0)
		memset(&guard.first, 0, sizeof(guard.first));
	return 0;
}

int umm_guard_leave(struct umm_lost *ret)
{
	if (!guard.depth)
		return -EINVAL;
	memset(ret, 0, sizeof(*ret));
	if (--guard.depth)
		return 0;
	*ret = guard.first;
	/* In whichever pager they are; the region of the first one may be closed by now. */
	return guard.first.units ? poison_filled() : 0;
}
