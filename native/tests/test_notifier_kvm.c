/* A virtual machine whose RAM is a region of the pager: KVM's page tables are a second MMU, and neither
 * eviction nor removal nor a move under a running vCPU may let it see stale or foreign data. */
#include <stddef.h>

#include "notifier/notifier.h"
#include "tests/kvm_machine.h"

struct host {
	struct machine *m;
	uint32_t seed;
	pthread_t thread;
	_Atomic uint64_t done;
};

static uint32_t draw(struct host *host, uint32_t below)
{
	host->seed = host->seed * 1664525 + 1013904223;
	return (host->seed >> 8) % below;
}

static void host_start(struct host *host, struct machine *m, void *(*run)(void *))
{
	*host = (struct host){.m = m, .seed = 7};
	CHECK(pthread_create(&host->thread, NULL, run, host) == 0);
}

static void *evict_main(void *argument)
{
	struct host *host = argument;
	struct machine *m = host->m;
	while (!atomic_load(&m->stop)) {
		uint32_t first = draw(host, PAGES), count = 1 + draw(host, PAGES - first);
		CHECK_OK(umm_region_evict(m->f.region, first * m->page, count * m->page));
		atomic_fetch_add(&host->done, 1);
		guest_reads(m, 300);
	}
	return NULL;
}

/* MADV_DONTNEED of a part of a chunk, wherever that is now. */
static void *remove_main(void *argument)
{
	struct host *host = argument;
	struct machine *m = host->m;
	while (!atomic_load(&m->stop)) {
		uint32_t chunk = draw(host, CHUNKS), from = draw(host, PAGES_OF_CHUNK);
		uint32_t count = 1 + draw(host, PAGES_OF_CHUNK - from < 8 ? PAGES_OF_CHUNK - from : 8);
		uint32_t *epochs = &m->tables->epochs[chunk * PAGES_OF_CHUNK];
		pthread_mutex_lock(&m->layout);
		uint64_t address = m->address[chunk];
		for (uint32_t page = from; address && page < from + count; page++) {
			m->removed[chunk * PAGES_OF_CHUNK + page] = true;
			__atomic_fetch_add(&epochs[page], 1, __ATOMIC_SEQ_CST);
		}
		if (address)
			CHECK(madvise((void *)(address + from * m->page), count * m->page, MADV_DONTNEED) ==
			        0);
		for (uint32_t page = from; address && page < from + count; page++)
			__atomic_fetch_add(&epochs[page], 1, __ATOMIC_SEQ_CST);
		pthread_mutex_unlock(&m->layout);
		atomic_fetch_add(&host->done, 1);
		guest_reads(m, 50);
	}
	return NULL;
}

/* The budget, from a quarter of the RAM to more than all of it and back. */
static void *budget_main(void *argument)
{
	struct host *host = argument;
	struct machine *m = host->m;
	while (!atomic_load(&m->stop)) {
		uint64_t pages = atomic_fetch_add(&host->done, 1) % 2 ? 2 * PAGES : PAGES / 2;
		CHECK_OK(umm_pager_set_budget(m->f.pager, pages * m->page));
		guest_reads(m, 1000);
	}
	return NULL;
}

static void under_eviction_and_removal(uint64_t budget_pages, bool no_move)
{
	struct machine m;
	CHECK_OK(machine_init(&m, budget_pages, no_move));
	struct host hosts[3];
	guest_start(&m);
	host_start(&hosts[0], &m, evict_main);
	host_start(&hosts[1], &m, remove_main);
	host_start(&hosts[2], &m, budget_main);
	guest_reads(&m, 10000);
	guest_stop(&m);
	for (int i = 0; i < 3; i++) {
		pthread_join(hosts[i].thread, NULL);
		CHECK(hosts[i].done > 0);
	}
	CHECK(guest_count(&m, offsetof(struct guest_parameters, writes)) > 0);
	CHECK(counters_of(&m.f).evicted_dirty > 0);
	CHECK(counters_of(&m.f).events_remove > 0);
	check_every_byte(&m);
	machine_deinit(&m);
}

/* What a machine monitor does: its memory slots follow the memory. Sleeping, as it waits for the vCPUs and
 * for KVM. Eviction and removal are the business of KVM's own notifier. */
struct follower {
	struct machine *m;
	struct umm_subscriber *subscriber;
	struct umm_subscription *subscription;
	/* The chunks that are away: where they were, and the change that took them. Changes nest: the
	 * kernel's event of a move comes between our own start and end. */
	uint64_t from[CHUNKS], change[CHUNKS];
	_Atomic uint64_t told;
};

static bool moves(const struct umm_notify_event *event)
{
	return event->reason == UMM_REASON_MOVE || event->reason == UMM_REASON_UNMAP;
}

static int follower_start(void *context, const struct umm_notify_event *event)
{
	struct follower *follower = context;
	struct machine *m = follower->m;
	if (!moves(event))
		return 0;
	kvm_vm_pause(&m->vm);
	for (uint32_t chunk = 0; chunk < CHUNKS; chunk++) {
		uint64_t at = atomic_load(&m->address[chunk]);
		if (!at || at >= event->end || at + chunk_bytes(m) <= event->start)
			continue;
		follower->from[chunk] = at;
		follower->change[chunk] = event->id;
		machine_set_chunk(m, chunk, 0);
	}
	return 0;
}

static void follower_end(void *context, const struct umm_notify_event *event)
{
	struct follower *follower = context;
	struct machine *m = follower->m;
	if (!moves(event))
		return;
	for (uint32_t chunk = 0; chunk < CHUNKS; chunk++) {
		uint64_t from = follower->from[chunk];
		if (!from || follower->change[chunk] != event->id)
			continue;
		follower->from[chunk] = 0;
		if (event->error)
			machine_set_chunk(m, chunk, from);
		else if (event->reason == UMM_REASON_MOVE)
			machine_set_chunk(m, chunk, from - event->start + event->to);
	}
	atomic_fetch_add(&follower->told, 1);
	kvm_vm_resume(&m->vm);
}

static const struct umm_notifier_ops follower_ops = {
        .invalidate_range_start = follower_start,
        .invalidate_range_end = follower_end,
};

static void follower_init(struct follower *follower, struct machine *m)
{
	*follower = (struct follower){.m = m};
	const struct umm_subscriber_options options = {
	        .name = "kvm slots", .ops = &follower_ops, .sleeping = true, .limit_ns = 60000000000};
	CHECK_OK(umm_subscriber_create(&options, &follower->subscriber));
	/* Of everything: where the memory goes to is not known before it goes. */
	CHECK_OK(umm_subscribe(
	        umm_space_self(), follower->subscriber, 0, UINT64_MAX, follower, &follower->subscription));
}

static void follower_deinit(struct follower *follower)
{
	/* Each start has its end, when the evictor has come to rest; a batch may be under way. */
	CHECK_OK(umm_pager_set_budget(follower->m->f.pager, 0));
	struct umm_subscriber_stats stats;
	int tries = 0;
	do {
		CHECK(tries++ < 30000);
		sleep_ms(1);
		umm_subscriber_stats(follower->subscriber, &stats);
	} while (stats.queued || stats.busy_ns ||
	         stats.calls[UMM_NOTIFY_START] != stats.calls[UMM_NOTIFY_END]);
	CHECK_OK(umm_unsubscribe(follower->subscription));
	CHECK_EQUAL(stats.late, 0);
	CHECK_EQUAL(stats.lost, 0);
	CHECK_OK(umm_subscriber_destroy(follower->subscriber));
}

/* Somebody else's memory, full of what no page of the guest may hold. */
struct foreign {
	int fd;
	uint64_t len, placed[64];
	uint32_t n;
};

static void foreign_init(struct foreign *foreign, uint64_t len)
{
	*foreign = (struct foreign){.fd = memfd_create("foreign", MFD_CLOEXEC), .len = len};
	CHECK(foreign->fd >= 0 && ftruncate(foreign->fd, (off_t)len) == 0);
	uint8_t *bytes = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, foreign->fd, 0);
	CHECK(bytes != MAP_FAILED);
	memset(bytes, 0xf0, len);
	munmap(bytes, len);
}

/* Takes a place that was just left, and keeps it: an address is used once. */
static void foreign_place(struct foreign *foreign, uint64_t at)
{
	CHECK(foreign->n < 64);
	CHECK(mmap((void *)at, foreign->len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED_NOREPLACE,
	              foreign->fd, 0) == (void *)at);
	foreign->placed[foreign->n++] = at;
}

/* True when somebody wrote there, through a slot that should have followed. */
static bool foreign_deinit(struct foreign *foreign)
{
	bool changed = false;
	for (uint32_t i = 0; i < foreign->n; i++) {
		for (uint64_t at = 0; at < foreign->len; at++)
			changed |= *(uint8_t *)(foreign->placed[i] + at) != 0xf0;
		munmap((void *)foreign->placed[i], foreign->len);
	}
	close(foreign->fd);
	return changed;
}

static uint64_t reserve(uint64_t len)
{
	void *place = mmap(NULL, len, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(place != MAP_FAILED);
	return (uint64_t)place;
}

/* Moves the chunk, and lets somebody else have its old place before anybody is told the end. */
static void move_chunk(struct machine *m, uint32_t chunk, struct foreign *foreign)
{
	uint64_t len = chunk_bytes(m), from = atomic_load(&m->address[chunk]), to = reserve(len);
	struct umm_notify_range range;
	CHECK_OK(umm_notify_start(&range, umm_space_self(), from, from + len, UMM_SOURCE_USER,
	        UMM_REASON_MOVE, UMM_NOTIFY_BLOCKABLE));
	CHECK(mremap((void *)from, len, len, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)to) == (void *)to);
	foreign_place(foreign, from);
	umm_notify_moved(&range, to);
	umm_notify_end(&range, 0);
}

static void set_epochs(struct machine *m, uint32_t chunk, bool unmapped)
{
	for (uint32_t page = chunk * PAGES_OF_CHUNK; page < (chunk + 1) * PAGES_OF_CHUNK; page++)
		__atomic_store_n(&m->tables->epochs[page],
		        unmapped ? guest_unmapped : m->tables->epochs[page] | 1, __ATOMIC_SEQ_CST);
}

static void unmap_chunk(struct machine *m, uint32_t chunk, struct foreign *foreign)
{
	uint64_t len = chunk_bytes(m), from = atomic_load(&m->address[chunk]);
	struct umm_notify_range range;
	set_epochs(m, chunk, false);
	CHECK_OK(umm_notify_start(&range, umm_space_self(), from, from + len, UMM_SOURCE_USER,
	        UMM_REASON_UNMAP, UMM_NOTIFY_BLOCKABLE));
	CHECK(munmap((void *)from, len) == 0);
	foreign_place(foreign, from);
	umm_notify_end(&range, 0);
	set_epochs(m, chunk, true);
}

static void under_moves(bool no_move)
{
	struct machine m;
	struct host evictor, remover, *hosts[] = {&evictor, &remover};
	struct foreign foreign;
	struct follower follower;
	CHECK_OK(machine_init(&m, PAGES / 2, no_move));
	foreign_init(&foreign, chunk_bytes(&m));
	follower_init(&follower, &m);
	guest_start(&m);
	host_start(&evictor, &m, evict_main);
	host_start(&remover, &m, remove_main);
	struct host mover = {.m = &m, .seed = 11};
	for (int i = 0; i < 40; i++) {
		pthread_mutex_lock(&m.layout);
		uint32_t chunk = draw(&mover, CHUNKS);
		if (atomic_load(&m.address[chunk]) && i % 8 == 7)
			unmap_chunk(&m, chunk, &foreign);
		else if (atomic_load(&m.address[chunk]))
			move_chunk(&m, chunk, &foreign);
		pthread_mutex_unlock(&m.layout);
		guest_reads(&m, 200);
	}
	guest_stop(&m);
	for (int i = 0; i < 2; i++) {
		pthread_join(hosts[i]->thread, NULL);
		CHECK(hosts[i]->done > 0);
	}
	CHECK(guest_count(&m, offsetof(struct guest_parameters, gones)) > 0);
	follower_deinit(&follower);
	check_every_byte(&m);
	CHECK(!foreign_deinit(&foreign));
	machine_deinit(&m);
}

/* Moved and unmapped by calls that nobody announces: the kernel tells afterwards. Until then an access of the
 * guest's fails, and is done again when the slot is where the memory is. (Nothing else may map memory
 * meanwhile: whoever got the old place would be seen, which is what "told after" means.) */
static void behind_our_back(void)
{
	struct machine m;
	struct follower follower;
	CHECK_OK(machine_init(&m, 0, false));
	follower_init(&follower, &m);
	uint64_t len = chunk_bytes(&m), places[24];
	enum { MOVES = sizeof(places) / sizeof(places[0]) };
	for (int i = 0; i < MOVES; i++)
		places[i] = reserve(len);
	struct host mover = {.m = &m, .seed = 5};
	guest_start(&m);
	for (int i = 0; i < MOVES; i++) {
		uint32_t chunk = draw(&mover, CHUNKS);
		uint64_t from = atomic_load(&m.address[chunk]), to = i % 8 == 7 ? 0 : places[i];
		if (!from)
			continue;
		if (to) {
			CHECK(mremap((void *)from, len, len, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)to) ==
			        (void *)to);
			places[i] = 0;
		} else {
			set_epochs(&m, chunk, false);
			CHECK(munmap((void *)from, len) == 0);
			set_epochs(&m, chunk, true);
		}
		while (atomic_load(&m.address[chunk]) != to)
			sleep_ms(1);
		guest_reads(&m, 1000);
	}
	guest_stop(&m);
	CHECK(guest_count(&m, offsetof(struct guest_parameters, gones)) > 0);
	follower_deinit(&follower);
	check_every_byte(&m);
	for (int i = 0; i < MOVES; i++)
		if (places[i])
			munmap((void *)places[i], len);
	machine_deinit(&m);
}

/* Announced moves without the subscriber: the guest sees what is somebody else's. */
static void moved_without_a_follower(void)
{
	struct machine m;
	struct foreign foreign;
	CHECK_OK(machine_init(&m, 0, false));
	atomic_store(&m.wrong_expected, true);
	foreign_init(&foreign, chunk_bytes(&m));
	guest_start(&m);
	guest_reads(&m, 500);
	for (uint32_t chunk = 0; chunk < CHUNKS; chunk++)
		move_chunk(&m, chunk, &foreign);
	guest_reads(&m, 2000);
	guest_stop(&m);
	CHECK(atomic_load(&m.wrong) > 0);
	foreign_deinit(&foreign);
	machine_deinit(&m);
}

int main(void)
{
#ifndef __x86_64__
	fprintf(stderr, "lacks: an x86-64 processor, whose code the guest program is\n");
	return TEST_SKIPPED;
#endif
	struct kvm_vm vm;
	if (kvm_vm_init(&vm)) {
		fprintf(stderr, "lacks: /dev/kvm, or the right to use it\n");
		return TEST_SKIPPED;
	}
	kvm_vm_deinit(&vm);
	RUN(under_eviction_and_removal(0, false));
	RUN(under_eviction_and_removal(PAGES / 2, false));
	RUN(under_eviction_and_removal(PAGES / 2, true));
	RUN(under_moves(false));
	RUN(under_moves(true));
	RUN(behind_our_back());
	RUN(moved_without_a_follower());
	return 0;
}
