/* The pager: regions of anonymous memory whose pages come from stores, on demand.
 *
 * A pager owns one userfaultfd (more on machines with more than 4 CPUs), its handler threads, one
 * prefetcher and one evictor. All functions return 0 or -errno. They may be called from any thread,
 * but not from a signal handler. See regions in pager/README of the design: docs in design.md. */
#ifndef UMM_PAGER_PAGER_H
#define UMM_PAGER_PAGER_H

#include <stdbool.h>
#include <stdint.h>

#include "common/histogram.h"
#include "store/store.h"

struct umm_pager;
struct umm_region;

struct umm_pager_options {
	uint64_t budget_bytes; /* resident bytes over all regions, staging included; 0: no limit */
	unsigned handlers;     /* threads per userfaultfd; 0: min(allowed CPUs, 4) */
	int uffd_source;       /* enum umm_uffd_source */
	bool in_thread;        /* UFFD_FEATURE_SIGBUS: the faulting thread serves itself */
	bool no_poison; /* as on kernels without UFFDIO_POISON: an empty file is mapped over lost units */
	bool no_move;   /* as on kernels without UFFDIO_MOVE: copy, write-protect, MADV_DONTNEED */
};

enum umm_fork_policy {
	UMM_FORK_SNAPSHOT, /* the child owns a private copy of the content at the fork, never written back */
	UMM_FORK_EXCLUDE,  /* MADV_DONTFORK: an access in the child is SIGSEGV */
};

enum umm_region_advice {
	UMM_REGION_NORMAL,     /* recognise sequential and strided runs */
	UMM_REGION_SEQUENTIAL, /* prefetch from the first fault on */
	UMM_REGION_RANDOM,     /* never prefetch */
};

struct umm_region_options {
	uint64_t size;          /* bytes, greater than 0; the mapping is rounded up to units */
	uint64_t unit;          /* bytes: base page .. umm_unit_max(), a power of two; or `hugetlb` */
	uint64_t hugetlb;       /* huge page size of a hugetlb mapping, 0 for none */
	int fork_policy;        /* enum umm_fork_policy */
	uint64_t address;       /* 0, or an existing private anonymous mapping that the region takes over */
	const uint8_t *present; /* with `address`: bitmap over units (bit u & 7 of byte u >> 3) of what is
	                           there; NULL: nothing */
};

/* Latency: from the moment that the handler was told (poll returned, or the previous message was
 * done) to the wake, and its three parts. Nanoseconds. */
struct umm_latency {
	struct umm_histogram total, queue, fetch, install;
};

struct umm_pager_counters {
	/* What every fault counts is first: one cache line of a region that was not touched for long. */
	uint64_t faults_missing; /* served with bytes of the store */
	uint64_t bytes_fetched;
	uint64_t resident_bytes; /* now; for a pager: with staging */
	uint64_t resident_peak_bytes;
	uint64_t faults_zero;     /* served with zeros: zero store, or removed by madvise */
	uint64_t faults_wp;       /* writes that met an eviction by copying */
	uint64_t faults_rescued;  /* the unit was still in staging: it was warm */
	uint64_t faults_stale;    /* somebody had installed it meanwhile */
	uint64_t faults_deferred; /* had to wait for an event (EAGAIN) */
	uint64_t faults_poisoned;
	uint64_t bytes_written;      /* to stores and spill */
	uint64_t prefetch_issued;    /* units */
	uint64_t prefetch_installed; /* units */
	uint64_t prefetch_hits;      /* prefetched units that the pattern reached later */
	uint64_t prefetch_wasted;    /* prefetched units evicted before that */
	uint64_t evicted_clean;      /* units dropped because they equalled the stored copy */
	uint64_t evicted_dirty;      /* units written before they were dropped */
	uint64_t evict_failed;       /* the store refused; the unit went back */
	uint64_t events_remove, events_unmap, events_remap, events_fork;
	uint64_t store_errors; /* failed tries */
	uint64_t pages_lost;   /* units poisoned */
	uint64_t spill_bytes;
};

struct umm_pager_stats {
	struct umm_pager_counters counters;
	struct umm_latency latency;
	uint64_t budget_bytes;
	uint64_t staging_bytes;
	uint32_t handlers, regions, uffds;
	uint32_t uses_move, in_thread;
};

int umm_pager_create(const struct umm_pager_options *options, struct umm_pager **ret);
/* -EBUSY while regions are open. Stops and joins every thread. */
int umm_pager_destroy(struct umm_pager *pager);
int umm_pager_set_budget(struct umm_pager *pager, uint64_t bytes);
/* The largest unit that is no hugetlb page: 2 MiB, or what a PMD maps where that is more (16K and 64K pages).
 */
uint64_t umm_unit_max(const struct umm_pager *pager);
int umm_pager_stats(struct umm_pager *pager, struct umm_pager_stats *ret);

int umm_region_create(struct umm_pager *pager, struct umm_store *store,
        const struct umm_region_options *options, struct umm_region **ret);
/* -EBUSY while it is the store of another region. Unmaps the region and forgets it. What was not flushed is
 * gone: callers flush first. */
int umm_region_close(struct umm_region *region);
uint64_t umm_region_address(const struct umm_region *region);
uint64_t umm_region_mapped_bytes(const struct umm_region *region);
uint64_t umm_region_unit(const struct umm_region *region);
int umm_region_stats(struct umm_region *region, struct umm_pager_stats *ret);

/* 1 when any of [address, address + len) is memory of a region of any pager. */
int umm_range_in_region(uint64_t address, uint64_t len);

/* Ask for a range to be brought in, in the background. Ranges outside the region: -EINVAL. */
int umm_region_prefetch(struct umm_region *region, uint64_t offset, uint64_t len);
/* Bring a range in now, in the calling thread; returns when all of it is present, or the first error. */
int umm_region_populate(struct umm_region *region, uint64_t offset, uint64_t len);
int umm_region_advise(struct umm_region *region, int advice);
/* Write every modified unit to the store, then flush the store. The first error; the others still
 * get their try, and nothing is dropped. */
int umm_region_flush(struct umm_region *region);
/* Push a range out (the explicit form of what the budget does). */
int umm_region_evict(struct umm_region *region, uint64_t offset, uint64_t len);

/* PageLost guards, per thread. Between enter and leave an access to a lost unit of any region
 * completes on UMM_FILL_BYTE; leave poisons those units again and reports the first of them. */
enum { UMM_FILL_BYTE = 0xBD };
struct umm_lost {
	struct umm_region *region;
	uint64_t address; /* of the first lost unit, in its region's mapping */
	uint64_t offset;  /* in the region */
	uint64_t units;   /* lost units that were accessed in this guard */
	int error;        /* the store's errno */
};
int umm_guard_enter(void);
int umm_guard_leave(struct umm_lost *ret);

#endif
