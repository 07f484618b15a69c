/* What the files of the pager share: the states of a unit, and who owns what.
 *
 * Locks, in the order in which they are taken; all with signals blocked (lock.h), so that a signal
 * handler of the same thread that touches region memory never waits for itself:
 *   pagers_lock (fork.c) -> pager->regions_lock -> pager->evict_lock -> uf->lock
 * Handlers take uf->lock only. Every change of a unit's word, of the extents and of the statistics
 * happens under the lock of the userfaultfd that the region belongs to. That lock is also what makes
 * "read a message and apply it" one step, and an install atomic against the reading of an event.
 *
 *                    fault              install
 *   MISSING, REMOVED ------> FETCHING ----------> PRESENT <-------- rescue
 *      ^   ^                                        |                  |
 *      |   |                    evictor: MOVE out   v                  |
 *      |   +--- finalised ------ STAGED <-------- LEAVING              |
 *      |                            +----------------------------------+
 *      +-- MADV_DONTNEED - ZAPPING <- COPYING <- PRESENT   (no MOVE: write-protect, copy, zap)
 *   a store that fails: -> POISONED -> (guard) FILLED -> POISONED
 *   a REMOVE event: -> REMOVED, at once or, where a thread holds a claim, when the claim ends. */
#ifndef UMM_PAGER_INTERNAL_H
#define UMM_PAGER_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>

#include "kernel/userfaultfd.h"
#include "pager/pager.h"

enum unit_state {
	UNIT_MISSING,  /* the bytes are in the store, or in the spill */
	UNIT_REMOVED,  /* taken away by the user's madvise: reads as zero */
	UNIT_FETCHING, /* one thread (or an asynchronous store) is bringing it in */
	UNIT_PRESENT,  /* in place; a missing page of it reads as zero */
	UNIT_LEAVING,  /* picked by the evictor, still in place */
	UNIT_STAGED,   /* moved out, in the staging slot that the payload names */
	UNIT_COPYING,  /* write-protected, being copied out */
	UNIT_ZAPPING,  /* copied out, being taken away */
	UNIT_POISONED, /* lost; the payload is the errno */
	UNIT_FILLED,   /* lost, and filled for a guard; the payload is the errno */
	UNIT_GONE,     /* unmapped by the user */
};

enum {
	UNIT_STATE_MASK = 0xf,
	UNIT_WANTED = 1 << 4,      /* a fault waits for the end of a claim: wake it then */
	UNIT_SPILLED = 1 << 5,     /* the newest stored copy is in the spill */
	UNIT_PREFETCHED = 1 << 6,  /* came by prefetch and was not reached by the pattern yet */
	UNIT_WAS_REMOVED = 1 << 7, /* a REMOVE event came while a claim was held */
	UNIT_PAYLOAD_SHIFT = 10,
	UNIT_PAYLOAD_MAX = (1 << 22) - 1,
	UNIT_STAMP_MASK = 0xfff,
};

enum {
	MAX_UFS = 8,
	MAX_HANDLERS = 4,
	MAX_DEFERRED = 256,
	MAX_GHOSTS = 256,
	MAX_VACATED = 64,
	MAX_STREAMS = 4,
	MAX_REQUESTS = 1024,
	MAX_PREFETCHES = 256,
	MAX_LAYERS = 255,
	STAGING_AREAS = 8,
	ZAP_MAX =
	        8192, /* pages (units of a hugetlb region) in one MADV_DONTNEED of ours: a PMD of 64K pages */
	REGION_HISTOGRAM_UNITS =
	        1024, /* smaller regions have counters but no latency histograms of their own */
};

/* A range of addresses and the part of a region that is mapped there. */
struct extent {
	uint64_t start, end;
	struct umm_region *region;
	uint64_t offset;
};

struct range {
	uint64_t start, end;
};

/* A run of faults at a fixed distance (prefetch.c). Everything in units. */
struct stream {
	int64_t stride;
	uint64_t last;   /* the unit that faulted last */
	uint64_t trip;   /* left out on purpose: a fault here asks for the next window */
	uint64_t next;   /* first unit that was not asked for yet */
	uint32_t run;    /* faults in a row that fitted */
	uint32_t window; /* units that were asked for at a time; 0: not started */
	uint64_t used;   /* for replacing the stream used longest ago */
};

/* What a fault needs comes first, in as few cache lines as it takes: with thousands of regions each fault
 * finds its region cold. */
struct umm_region {
	uint32_t *units;  /* n_units words: state, flags, payload */
	uint64_t *zeroed; /* bitmap over pages: removed, and not seen missing since; NULL when unit == page */
	struct umm_store *store;
	struct umm_uf *uf;
	struct umm_pager *pager;
	uint64_t base; /* where offset 0 is or was mapped */
	uint64_t unit, n_units;
	/* -- 64 bytes */
	uint64_t size, hugetlb;
	struct umm_latency *latency; /* NULL for small regions */
	int advice;
	bool huge, owns_mapping, closing, in_child;
	bool unserved;   /* in a child that could not take it over: PROT_NONE */
	bool any_filled; /* for a guard */
	struct umm_pager_counters counters;

	uint64_t *hashes; /* XXH3 of the stored copy, 0: not known */
	uint64_t mapped;
	uint32_t id, n_extents;
	int fork_policy;
	struct umm_region *next, **link; /* pager->regions, under regions_lock */
	uint8_t *layers; /* 1 + the layer of the spill that holds the unit, 0: none; NULL before the first
	                    spill */
	uint64_t spill_base;
	bool has_spill_base;
	bool forked; /* a child may still read the store: write-back goes to the spill until a flush */
	_Atomic uint64_t *flush_epoch; /* shared with children: counts flushes that change the store */
	uint64_t child_epoch;

	_Atomic uint64_t failed_fetches; /* counted without the lock, added to store_errors in a snapshot */
	uint32_t dependents;             /* stores on this region */
	uint32_t claims;                 /* threads that work on units of this region without the lock */
	int write_error;                 /* the newest failure of a write on eviction */
	struct stream streams[MAX_STREAMS];
	uint64_t stream_clock;
};

struct handler {
	struct umm_uf *uf;
	pthread_t thread;
	int cpu;
	uint8_t *buffer; /* pager->buffer_bytes, aligned to the PMD size */
};

/* Our own MADV_DONTNEED under way: its REMOVE events are not the user's. */
struct zap {
	_Atomic bool
	        active; /* also read without the lock: the evictor waits for a handler to read the event */
	uint64_t start, end, granule;
	uint64_t seen[(ZAP_MAX + 63) / 64];
};

struct fifo {
	uint64_t *entries;
	uint64_t capacity, head, tail; /* capacity: a power of two */
	bool lost;                     /* an entry did not fit: rebuild from the regions */
};

/* When a fault went from one part of its service to the next; nanoseconds. */
struct times {
	uint64_t arrived, claimed, fetched;
};

struct request {
	struct umm_region *region;
	uint64_t unit, deadline_ns;
	struct times times; /* of the fault that asked; arrived 0: none did */
	uint32_t tries;
	bool unsent;
};

struct umm_uf {
	struct umm_pager *pager;
	int fd;
	pthread_mutex_t lock;
	pthread_cond_t claims_done;
	struct extent *extents;
	uint64_t n_extents, capacity;
	/* Unmapped or moved away, their place mapped anew, and the old UNMAP or REMAP event unread. Without
	 * region: it was closed meanwhile. */
	struct extent ghosts[MAX_GHOSTS];
	uint32_t n_ghosts;
	struct range
	        vacated[MAX_VACATED]; /* left by mremap, whose UNMAP of the old place comes after its REMAP */
	uint32_t next_vacated;
	struct range deferred[MAX_DEFERRED];
	uint32_t n_deferred;
	bool throttled;           /* some of them were put off because of the budget */
	uint64_t admitted_ns;     /* when a fault was last served far above the budget */
	struct range *wake_later; /* of the handler that holds the lock: installs leave the waking to it */
	struct zap zap;
	struct range own_unmap; /* mapped over by us: its UNMAP event is not the user's */
	struct fifo fifo;
	struct request requests[MAX_REQUESTS];
	uint32_t n_requests;
	struct handler handlers[MAX_HANDLERS];
	uint32_t n_handlers;
	struct umm_pager_counters counters;
	struct umm_latency latency;
};

struct staged {
	struct umm_region *region; /* NULL: the slot was given up */
	uint64_t unit;
	uint64_t slot; /* byte offset in staging */
	uint64_t hash; /* of the stored copy when finalising began, then of the bytes here */
	uint32_t word;
	uint8_t layer;
	bool live, dirty;
	int error;
};

/* Registered with the userfaultfd of the units in it (write-protect mode only, so that its holes do not
 * fault) from the first MOVE until it is emptied: a MOVE by the region's own descriptor answers EAGAIN
 * while a munmap or mremap of the user's is under way, and so never takes a page of somebody else who
 * was mapped there a moment ago. Unregistered before it is zapped: that raises no event. */
struct staging_area {
	struct umm_uf *uf;
	uint64_t offset, used; /* bytes */
	struct staged *entries;
	uint32_t n, capacity;
};

struct staging {
	uint8_t *memory;
	_Atomic uint64_t bytes; /* what the budget sets aside for it */
	uint64_t area_bytes;
	struct staging_area areas[STAGING_AREAS];
	uint32_t n_areas, next;
};

enum { MAX_SPILL_GAPS = 256 };

struct spill_layer {
	int fd;
	bool frozen;            /* a child reads it too: never written again */
	_Atomic uint64_t units; /* that live here; a frozen file is closed when the last one left */
};

struct prefetch_request {
	struct umm_region *region;
	uint64_t first, count;
	int64_t stride;
};

struct worker {
	pthread_t thread;
	pthread_mutex_t lock;
	pthread_cond_t wake;
	struct prefetch_request requests[MAX_PREFETCHES];
	uint32_t head, tail;
	bool timeouts; /* some request has a deadline */
	bool stop;
	uint8_t *buffer;
};

struct umm_pager {
	struct umm_pager *next; /* fork.c */
	uint64_t page, pmd;
	bool in_thread, use_move, has_poison, has_wp;
	bool worker_runs, evictor_runs; /* a forked child may have failed to start them */
	int uffd_source;
	uint64_t uffd_features;
	int stop_fd, pagemap_fd;
	int empty_fd; /* for poisoning by mapping; -1 where UFFDIO_POISON exists */
	pthread_mutex_t regions_lock;
	struct umm_region *regions;
	struct umm_region **by_id;
	uint32_t n_regions, by_id_capacity, next_uf;

	struct umm_uf ufs[MAX_UFS];
	uint32_t n_ufs;
	uint64_t buffer_bytes;
	uint8_t *zeros; /* buffer_bytes of zeros, never written */

	_Atomic uint64_t budget;   /* 0: none */
	_Atomic uint64_t resident; /* bytes in place in regions */
	_Atomic uint64_t staged;   /* bytes in staging slots in use */
	_Atomic uint64_t peak;
	_Atomic uint64_t failed_fetches; /* counted without a lock, added to store_errors in a snapshot */

	pthread_mutex_t evict_lock; /* held for a batch of eviction, a flush, a guard's end, a close */
	pthread_mutex_t evict_wake_lock;
	pthread_cond_t evict_wake;
	_Atomic bool evict_wanted;
	bool evict_deferred; /* under evict_lock: some unit answered EAGAIN */
	bool evict_refused;  /* under evict_lock: some unit could not be written, or a subscriber holds it */
	bool evict_again;    /* under evict_lock: some subscriber would have to be waited for */
	bool evict_waits;    /* under evict_lock: wait for it */
	struct announcement *announced; /* under evict_lock; ANNOUNCED_MAX */
	_Atomic bool evict_stuck;       /* nothing could go lately, as stores refused */
	bool evict_stop;
	pthread_t evictor;
	uint8_t *evict_buffer;
	struct staging staging;

	struct spill_layer layers[MAX_LAYERS];
	uint64_t spill_end;
	struct range spill_gaps[MAX_SPILL_GAPS];
	uint32_t n_spill_gaps;
	struct worker worker;
};

/* -- units; under the uf's lock ------------------------------------------------------------- */

static inline int unit_state(const struct umm_region *region, uint64_t unit)
{
	return (int)(region->units[unit] & UNIT_STATE_MASK);
}

static inline uint32_t unit_payload(const struct umm_region *region, uint64_t unit)
{
	return region->units[unit] >> UNIT_PAYLOAD_SHIFT;
}

static inline bool unit_flag(const struct umm_region *region, uint64_t unit, uint32_t flag)
{
	return (region->units[unit] & flag) != 0;
}

/* Sets state and payload, keeps SPILLED and PREFETCHED, clears WANTED and WAS_REMOVED; keeps the books of
 * what is resident. Returns the flags that it cleared. */
uint32_t unit_set(struct umm_region *region, uint64_t unit, int state, uint32_t payload);
/* PRESENT, with a place in the queue of the budget. */
uint32_t unit_set_present(struct umm_region *region, uint64_t unit);

static inline void unit_mark(struct umm_region *region, uint64_t unit, uint32_t flag)
{
	region->units[unit] |= flag;
}

static inline void unit_unmark(struct umm_region *region, uint64_t unit, uint32_t flag)
{
	region->units[unit] &= ~flag;
}

/* Bytes of a unit that belong to the store; the rest of the last unit reads as zero. */
uint64_t unit_store_bytes(const struct umm_region *region, uint64_t unit);
/* Address of a unit that is mapped in one piece, 0 otherwise. */
uint64_t unit_address(struct umm_region *region, uint64_t unit);
/* Is any page of it mapped? */
bool unit_is_mapped(struct umm_region *region, uint64_t unit);
/* An event took the unit away while a claim on it was held: sets what it is now, and says so. */
bool claim_lost(struct umm_region *region, uint64_t unit);
/* Where `offset` is mapped, and how much from there on in one piece; 0 when nowhere. */
uint64_t region_address_of(struct umm_region *region, uint64_t offset, uint64_t *run);

void claim_begin(struct umm_region *region);
void claim_end(struct umm_region *region);

/* -- fifo.c: the order of eviction; under the uf's lock ------------------------------------- */

int fifo_init(struct fifo *fifo, uint64_t entries);
void fifo_deinit(struct fifo *fifo);
void fifo_push(struct umm_region *region, uint64_t unit);
/* The oldest unit that is still PRESENT since it was queued; false when there is none. */
bool fifo_pop(struct umm_uf *uf, struct umm_region **region, uint64_t *unit);
/* Queue every PRESENT unit of the region (a budget was set, or entries were lost). */
void fifo_add_region(struct umm_region *region);

/* -- install.c; under the uf's lock --------------------------------------------------------- */

/* Put `data` (unit bytes; NULL: zeros) where the unit is mapped, and wake who waits for it. Pages that
 * are there already stay as they are. 0, -EAGAIN (an event is under way: defer), -ENOMEM, -ENOENT. */
int install_unit(struct umm_region *region, uint64_t unit, const void *data);
/* The same for `count` neighbouring units. */
int install_units(struct umm_region *region, uint64_t unit, uint64_t count, const void *data);
/* Does a page of the unit await zeros because it was removed? Such pages are left out by install_unit. */
bool has_zeroed(const struct umm_region *region, uint64_t unit);
/* One zero page at an address that no unit's data belongs to. */
int install_zero_page(struct umm_uf *uf, uint64_t address, uint64_t page);
/* A PMD-sized buffer, page by page or as a huge page (then the buffer is empty afterwards). */
int install_huge(struct umm_region *region, uint64_t unit, void *buffer);
void poison_unit(struct umm_region *region, uint64_t unit, int error);
void wake_unit(struct umm_region *region, uint64_t unit);
/* Leave the faults of [address, address + len) unanswered until the queue of messages is empty. */
void defer(struct umm_uf *uf, uint64_t address, uint64_t len);
void defer_unit(struct umm_region *region, uint64_t unit);
void wake_deferred(struct umm_uf *uf);

/* -- fetch.c -------------------------------------------------------------------------------- */

/* The bytes of a unit in memory that stays as it is while the lock is held, or NULL. Lock held. */
const void *peek_unit(struct umm_region *region, uint64_t unit);
/* Fill `buffer` with the unit's bytes, zeros past the store's end; tries again as the store says. No
 * lock held (but in in-thread mode by the faulting thread); the caller has claimed the unit. */
int fetch_unit(struct umm_region *region, uint64_t unit, uint32_t word, uint8_t layer, void *buffer);
uint64_t hash_bytes(const void *data, uint64_t len);
/* What to remember of a unit that was just read: 0 where its stored copy stays in sight. `word`: the unit's
 * before it was claimed. */
uint64_t hash_fetched(const struct umm_region *region, uint32_t word, const void *data);
/* Remember what the stored copy looks like. Lock held. */
void note_stored(struct umm_region *region, uint64_t unit, uint64_t hash);
/* True when `data` equals the stored copy. *hash: what was remembered of that (region->hashes) when the word
 * was read; then the hash of the data. Lock not needed: the caller holds evict_lock and the claim. */
bool equals_stored(struct umm_region *region, uint64_t unit, uint32_t word, const void *data, uint64_t *hash);

/* -- fault.c -------------------------------------------------------------------------------- */

/* Serve a fault. Called with the uf's lock, returns with it; drops it while a store is read. */
void serve_fault(struct umm_uf *uf, uint64_t address, uint64_t flags, uint8_t *buffer, struct times *times);
/* The fault has been served: its latency goes into the histograms. */
void record_latency(struct umm_region *region, const struct times *times);
/* End of a claim: install, or give up. Lock held. `data` NULL: zeros. */
int finish_claim(struct umm_region *region, uint64_t unit, const void *data, int error, uint64_t hash,
        bool prefetched);

/* -- event.c; under the uf's lock ----------------------------------------------------------- */

void apply_event(struct umm_uf *uf, const struct umm_uffd_msg *msg);
/* What was mapped there is unmapped. */
void forget_piece(void *context, const struct extent *piece);
void apply_remove(struct umm_uf *uf, uint64_t start, uint64_t end);

/* -- handler.c, in_thread.c ----------------------------------------------------------------- */

int handlers_start(struct umm_pager *pager);
void handlers_join(struct umm_pager *pager);
/* The SIGBUS handler, for the in-thread mode and for guards; installed once, put back on top if displaced. */
int sigbus_install(void);

/* -- region_store.c; under the uf's lock ---------------------------------------------------- */

/* Copies a unit that is in place without touching it; holes become zeros. -EFAULT when a part of it is
 * unmapped. */
int read_in_place(struct umm_region *region, uint64_t unit, uint8_t *buffer);
/* Zeros over the pages that were removed and may not have been zapped yet. */
void zero_removed_pages(struct umm_region *region, uint64_t unit, uint8_t *buffer);

/* -- prefetch.c, bring_in.c ----------------------------------------------------------------- */

void prefetch_on_fault(struct umm_region *region, uint64_t unit);
/* stride 0: map poison over the unit. False when there is no place. */
bool prefetch_post(struct umm_region *region, uint64_t first, uint64_t count, int64_t stride);
int worker_start(struct umm_pager *pager);
void worker_join(struct umm_pager *pager);
/* Bring [first, first + count) in. slice: bytes installed in one hold of the lock. No lock held. */
int bring_in(struct umm_region *region, uint64_t first, uint64_t count, bool prefetched, uint64_t slice,
        uint8_t *buffer);
/* Lock held. */
/* times: of the demand fault that asks, NULL for others. */
int request_unit(struct umm_region *region, uint64_t unit, const struct times *times);
/* The answer is there: the times of the fault that asked for it, if one did. */
bool request_times(struct umm_region *region, uint64_t unit, struct times *ret);
/* A try failed. True when the store was asked again. Lock held. */
bool request_again(struct umm_region *region, uint64_t unit);
void request_done(struct umm_region *region, uint64_t unit);
/* Fails or repeats the requests that are late; the next deadline or 0. */
uint64_t requests_expire(struct umm_uf *uf, uint64_t now);

/* -- region.c, fork.c ----------------------------------------------------------------------- */

int region_register(struct umm_region *region, uint64_t start, uint64_t len);
int uf_open(struct umm_pager *pager, struct umm_uf *uf);
/* Apply the events that nobody has read yet; faults in front of them are deferred. Lock held. */
void uf_drain(struct umm_uf *uf);
int pager_listed(struct umm_pager *pager);
void pager_unlisted(struct umm_pager *pager);
/* -- poison.c: what poison_unit does on kernels without UFFDIO_POISON -- */

int poison_init(struct umm_pager *pager);
/* In the in-thread mode the faulting thread looks at the unit's state itself. */
static inline bool poisoned_by_mapping(const struct umm_region *region)
{
	return !region->pager->has_poison && !region->pager->in_thread;
}
/* By the worker; no lock held. */
void poison_by_mapping(struct umm_region *region, uint64_t unit);
/* Make the unit readable with `fill`; and take it away again. */
bool fill_mapped(struct umm_region *region, uint64_t address, uint8_t fill);
int unfill_mapped(struct umm_region *region, uint64_t address);
/* Lost units that were filled for a guard are poisoned again. */
int poison_filled_of(struct umm_pager *pager);
/* The same for every pager. */
int poison_filled(void);
/* Extent of any pager at this address: pager, its uf locked, or NULL. For the SIGBUS handler. */
struct umm_uf *find_uf_locked(uint64_t address);
/* Memory that mremap added to a region of an in-thread pager is in no extent: it reads as zero. */
bool zero_unindexed(uint64_t address);

void *map_anonymous(uint64_t len, uint64_t align);

#include "pager/announce.h"
#include "pager/eviction.h"
#include "pager/extents.h"

#endif
