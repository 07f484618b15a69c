/* A virtual machine whose RAM is a region of the pager: KVM's page tables are a second MMU, and neither
 * eviction nor removal nor a move under a running vCPU may let it see stale or foreign data. */
#include <stddef.h>

#include "tests/kvm_guest.h"
#include "tests/kvm_vm.h"
#include "tests/pager_fixture.h"

enum {
	PAGES = 1024,
	CHUNKS = 16, /* memory slots of the RAM */
	PAGES_OF_CHUNK = PAGES / CHUNKS,
	PROGRAM_SLOT = CHUNKS,
	PROGRAM_AT = 0x10000, /* guest physical; the RAM is at RAM_AT */
	TABLES_AT = 0x20000,
	RAM_AT = 0x1000000,
};

/* Memory that host and guest share, and that is no region. */
struct tables {
	struct guest_parameters parameters[KVM_VM_VCPUS];
	uint32_t epochs[PAGES];
	struct guest_word words[KVM_VM_VCPUS][PAGES];
};

struct machine {
	struct fixture f;
	struct kvm_vm vm;
	uint64_t page, shared_bytes;
	uint8_t *shared; /* from PROGRAM_AT on */
	struct tables *tables;
	/* Where the chunks are; 0: unmapped. Changed while the vCPUs are paused, or under `layout`. */
	uint64_t address[CHUNKS];
	pthread_mutex_t layout; /* host threads that remove, move, unmap */
	bool removed[PAGES];
	_Atomic bool stop, wrong_expected;
	_Atomic uint32_t wrong, faults;
};

static uint64_t chunk_bytes(const struct machine *m)
{
	return PAGES_OF_CHUNK * m->page;
}

static uint32_t *word_of(const struct machine *m, uint8_t *ram, int vcpu, uint32_t page)
{
	/* The first word of a page is the first vCPU's, the last one the other's. */
	return (uint32_t *)(ram + page * m->page + (vcpu ? m->page - sizeof(uint32_t) : 0));
}

static void set_chunk(struct machine *m, uint32_t chunk, uint64_t address)
{
	uint64_t guest = RAM_AT + chunk * chunk_bytes(m);
	/* A slot's address cannot be changed: it is deleted and set again. */
	if (m->address[chunk])
		CHECK_OK(kvm_vm_set_slot(&m->vm, chunk, guest, m->address[chunk], 0));
	m->address[chunk] = address;
	if (address)
		CHECK_OK(kvm_vm_set_slot(&m->vm, chunk, guest, address, chunk_bytes(m)));
}

static void make_guest(struct machine *m)
{
	uint64_t align = TABLES_AT - PROGRAM_AT;
	m->shared_bytes = (align + sizeof(*m->tables) + align - 1) / align * align;
	m->shared = mmap(NULL, m->shared_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(m->shared != MAP_FAILED);
	memcpy(m->shared, guest_program, sizeof(guest_program));
	m->tables = (struct tables *)(m->shared + align);
	CHECK_OK(kvm_vm_set_slot(
	        &m->vm, PROGRAM_SLOT, PROGRAM_AT, (uint64_t)(uintptr_t)m->shared, m->shared_bytes));
	for (int i = 0; i < KVM_VM_VCPUS; i++) {
		m->tables->parameters[i] = (struct guest_parameters){
		        .seed = 12345 + (uint32_t)i,
		        .pages_mask = PAGES - 1,
		        .page_bytes = (uint32_t)m->page,
		        .ram = RAM_AT + (i ? (uint32_t)m->page - sizeof(uint32_t) : 0),
		        .epochs = TABLES_AT + offsetof(struct tables, epochs),
		        .words = TABLES_AT + (uint32_t)offsetof(struct tables, words[i]),
		        .gone = guest_gone,
		};
		for (uint32_t page = 0; page < PAGES; page++) {
			uint32_t stamp = (page + 1) << GUEST_STAMP_SHIFT;
			*word_of(m, m->f.bytes, i, page) = stamp;
			m->tables->words[i][page].value = stamp;
		}
	}
}

/* False: no KVM. */
static bool machine_init(struct machine *m, uint64_t budget_pages, bool no_move)
{
	memset(m, 0, sizeof(*m));
	if (kvm_vm_init(&m->vm))
		return false;
	m->page = page_size();
	pthread_mutex_init(&m->layout, NULL);
	fixture_open(&m->f,
	        (struct umm_pager_options){.budget_bytes = budget_pages * m->page, .no_move = no_move},
	        PAGES * m->page, m->page, UMM_STORE_WRITEBACK);
	make_guest(m);
	for (uint32_t chunk = 0; chunk < CHUNKS; chunk++)
		set_chunk(m, chunk, (uint64_t)m->f.memory + chunk * chunk_bytes(m));
	for (int i = 0; i < KVM_VM_VCPUS; i++)
		CHECK_OK(kvm_vm_add_vcpu(
		        &m->vm, i, PROGRAM_AT, TABLES_AT + (uint32_t)offsetof(struct tables, parameters[i])));
	return true;
}

static void machine_deinit(struct machine *m)
{
	kvm_vm_deinit(&m->vm);
	munmap(m->shared, m->shared_bytes);
	fixture_close(&m->f);
	pthread_mutex_destroy(&m->layout);
}

static void report_wrong(struct machine *m, struct kvm_vcpu *vcpu)
{
	uint32_t r[8];
	CHECK_OK(kvm_vm_registers(vcpu, r));
	int index = (int)(vcpu - m->vm.vcpus);
	struct guest_word *word = &m->tables->words[index][r[1]];
	atomic_fetch_add(&m->wrong, 1);
	if (atomic_load(&m->wrong_expected))
		return;
	fprintf(stderr,
	        "vCPU %d read %#x in page %u in epoch %u; expected %#x, last seen in epoch %u, raced %u\n",
	        index, r[0], r[1], r[3], word->value, word->seen, word->raced);
	abort();
}

static void *vcpu_main(void *argument)
{
	struct kvm_vcpu *vcpu = argument;
	struct machine *m = (struct machine *)((uint8_t *)vcpu->vm - offsetof(struct machine, vm));
	for (;;) {
		struct kvm_vm_access access;
		uint64_t pauses = kvm_vm_pauses(&m->vm);
		int exit = kvm_vm_run(vcpu, &access);
		if (exit == KVM_VM_EXIT_PORT) {
			if (access.address == GUEST_PORT_DONE)
				return NULL;
			report_wrong(m, vcpu);
			if (atomic_load(&m->stop))
				return NULL;
		} else if (exit == KVM_VM_EXIT_MMIO) {
			uint64_t chunk = (access.address - RAM_AT) / chunk_bytes(m);
			CHECK(access.address >= RAM_AT && chunk < CHUNKS && !m->address[chunk]);
			if (!access.write)
				*access.data = guest_gone;
		} else if (exit == KVM_VM_EXIT_FAULT) {
			/* Moved or unmapped, and nobody told us yet. */
			atomic_fetch_add(&m->faults, 1);
			kvm_vm_wait_change(&m->vm, pauses);
		} else {
			CHECK_EQUAL(exit, KVM_VM_EXIT_KICKED);
		}
	}
}

static void guest_start(struct machine *m)
{
	for (int i = 0; i < KVM_VM_VCPUS; i++)
		CHECK(pthread_create(&m->vm.vcpus[i].thread, NULL, vcpu_main, &m->vm.vcpus[i]) == 0);
}

static uint32_t guest_count(const struct machine *m, uint64_t member)
{
	uint32_t sum = 0;
	for (int i = 0; i < KVM_VM_VCPUS; i++)
		sum += __atomic_load_n(
		        (uint32_t *)((uint8_t *)&m->tables->parameters[i] + member), __ATOMIC_RELAXED);
	return sum;
}

/* Waits until the guest has read so many more words, or is stopped. */
static void guest_reads(struct machine *m, uint32_t more)
{
	uint32_t from = guest_count(m, offsetof(struct guest_parameters, reads));
	while (!atomic_load(&m->stop) &&
	        guest_count(m, offsetof(struct guest_parameters, reads)) - from < more)
		sleep_ms(1);
}

static void guest_stop(struct machine *m)
{
	atomic_store(&m->stop, true);
	for (int i = 0; i < KVM_VM_VCPUS; i++)
		__atomic_store_n(&m->tables->parameters[i].stop, 1, __ATOMIC_SEQ_CST);
	for (int i = 0; i < KVM_VM_VCPUS; i++)
		pthread_join(m->vm.vcpus[i].thread, NULL);
}

/* What the page must be; `actual` says which of two where both are right. */
static void expect_page(struct machine *m, uint32_t page, uint8_t *actual, uint8_t *expected)
{
	for (uint64_t at = 0; at < m->page; at += 8)
		*(uint64_t *)(expected + at) = m->removed[page] ? 0 : word_at(page * m->page + at, 0);
	for (int i = 0; i < KVM_VM_VCPUS; i++) {
		struct guest_word *word = &m->tables->words[i][page];
		bool dropped = word->seen != m->tables->epochs[page];
		uint32_t value = dropped ? 0 : word->value;
		if (dropped && word->raced && *word_of(m, actual, i, 0) == word->value)
			value = word->value;
		*word_of(m, expected, i, 0) = value;
	}
}

/* Every byte, as it is read through the region, and in the store. */
static void check_every_byte(struct machine *m)
{
	uint8_t *expected = malloc(m->page);
	CHECK(expected);
	for (int stored = 0; stored < 2; stored++) {
		if (stored)
			CHECK_OK(umm_region_flush(m->f.region));
		for (uint32_t page = 0; page < PAGES; page++) {
			uint32_t chunk = page / PAGES_OF_CHUNK;
			if (!m->address[chunk])
				continue;
			uint8_t *actual =
			        stored ? m->f.bytes + page * m->page
			               : (uint8_t *)m->address[chunk] + page % PAGES_OF_CHUNK * m->page;
			expect_page(m, page, actual, expected);
			for (uint64_t at = 0; at < m->page; at++)
				CHECK_EQUAL(actual[at], expected[at]);
		}
	}
	free(expected);
}

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
	CHECK(machine_init(&m, budget_pages, no_move));
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
	return 0;
}
