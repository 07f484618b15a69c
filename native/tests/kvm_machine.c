#include "tests/kvm_machine.h"

#include <stddef.h>

static uint32_t *word_of(const struct machine *m, uint8_t *ram, int vcpu, uint32_t page)
{
	/* The first word of a page is the first vCPU's, the last one the other's. */
	return (uint32_t *)(ram + page * m->page + (vcpu ? m->page - sizeof(uint32_t) : 0));
}

void machine_set_chunk(struct machine *m, uint32_t chunk, uint64_t address)
{
	uint64_t guest = RAM_AT + chunk * chunk_bytes(m);
	/* A slot's address cannot be changed: it is deleted and set again. */
	if (atomic_load(&m->address[chunk]))
		CHECK_OK(kvm_vm_set_slot(&m->vm, chunk, guest, atomic_load(&m->address[chunk]), 0));
	atomic_store(&m->address[chunk], address);
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
	kvm_vm_identity(m->shared + (PAGE_TABLES_AT - PROGRAM_AT), PAGE_TABLES_AT);
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

int machine_init(struct machine *m, uint64_t budget_pages, bool no_move)
{
	memset(m, 0, sizeof(*m));
	int err = kvm_vm_init(&m->vm);
	if (err)
		return err;
	m->page = page_size();
	pthread_mutex_init(&m->layout, NULL);
	fixture_open(&m->f,
	        (struct umm_pager_options){.budget_bytes = budget_pages * m->page, .no_move = no_move},
	        PAGES * m->page, m->page, UMM_STORE_WRITEBACK);
	make_guest(m);
	/* Nothing is there yet; but the store's bytes were written beside the evictor, and that the faults of
	 * a guest come after it is nothing that the thread sanitizer can see. */
	CHECK_OK(umm_region_evict(m->f.region, 0, m->f.size));
	for (uint32_t chunk = 0; chunk < CHUNKS; chunk++)
		machine_set_chunk(m, chunk, (uint64_t)m->f.memory + chunk * chunk_bytes(m));
	for (int i = 0; i < KVM_VM_VCPUS; i++)
		CHECK_OK(kvm_vm_add_vcpu(&m->vm, i, PAGE_TABLES_AT, PROGRAM_AT,
		        TABLES_AT + (uint32_t)offsetof(struct tables, parameters[i])));
	return 0;
}

void machine_deinit(struct machine *m)
{
	kvm_vm_deinit(&m->vm);
	munmap(m->shared, m->shared_bytes);
	fixture_close(&m->f);
	pthread_mutex_destroy(&m->layout);
}

static void report_wrong(struct machine *m, struct kvm_vcpu *vcpu)
{
	uint32_t r[4];
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

/* Memory moved away or was unmapped, and nobody told us yet. */
static void await_change(struct machine *m, uint64_t pauses)
{
	atomic_fetch_add(&m->faults, 1);
	if (atomic_load(&m->wrong_expected))
		sleep_ms(1); /* nobody will */
	else
		kvm_vm_wait_change(&m->vm, pauses);
}

/* An access that KVM could not do. */
static void answer(
        struct machine *m, struct kvm_vcpu *vcpu, const struct kvm_vm_access *access, uint64_t pauses)
{
	uint64_t offset = access->address - RAM_AT, chunk = offset / chunk_bytes(m);
	CHECK(access->address >= RAM_AT && chunk < CHUNKS);
	if (atomic_load(&m->address[chunk]))
		await_change(m, pauses);
	kvm_vm_enter(vcpu);
	uint64_t address = atomic_load(&m->address[chunk]);
	uint32_t *word = (uint32_t *)(address + offset % chunk_bytes(m));
	if (address && access->write)
		__atomic_store_n(word, *access->data, __ATOMIC_RELAXED);
	else if (!access->write)
		*access->data = address ? __atomic_load_n(word, __ATOMIC_RELAXED) : guest_gone;
	kvm_vm_leave(vcpu);
}

static void *vcpu_main(void *argument)
{
	struct kvm_vcpu *vcpu = argument;
	struct machine *m = (struct machine *)((uint8_t *)vcpu->vm - offsetof(struct machine, vm));
	for (;;) {
		struct kvm_vm_access access;
		uint64_t pauses = kvm_vm_pauses(&m->vm);
		int exit = kvm_vm_run(vcpu, &access);
		if (exit == KVM_VM_EXIT_MMIO && access.address == GUEST_DONE) {
			return NULL;
		} else if (exit == KVM_VM_EXIT_MMIO && access.address == GUEST_WRONG) {
			report_wrong(m, vcpu);
			if (atomic_load(&m->stop))
				return NULL;
		} else if (exit == KVM_VM_EXIT_MMIO) {
			answer(m, vcpu, &access, pauses);
		} else if (exit == KVM_VM_EXIT_FAULT) {
			await_change(m, pauses);
		} else {
			CHECK_EQUAL(exit, KVM_VM_EXIT_KICKED);
		}
	}
}

void guest_start(struct machine *m)
{
	for (int i = 0; i < KVM_VM_VCPUS; i++)
		CHECK(pthread_create(&m->vm.vcpus[i].thread, NULL, vcpu_main, &m->vm.vcpus[i]) == 0);
}

uint32_t guest_count(const struct machine *m, uint64_t counter)
{
	uint32_t sum = 0;
	for (int i = 0; i < KVM_VM_VCPUS; i++)
		sum += __atomic_load_n(
		        (uint32_t *)((uint8_t *)&m->tables->parameters[i] + counter), __ATOMIC_RELAXED);
	return sum;
}

void guest_reads(struct machine *m, uint32_t more)
{
	uint32_t from = guest_count(m, offsetof(struct guest_parameters, reads));
	while (!atomic_load(&m->stop) &&
	        guest_count(m, offsetof(struct guest_parameters, reads)) - from < more)
		sleep_ms(1);
}

void guest_stop(struct machine *m)
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

void check_every_byte(struct machine *m)
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
