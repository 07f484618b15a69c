/* A virtual machine of two vCPUs whose RAM is a region of a pager, with the guest of kvm_guest.h in it. */
#ifndef UMM_TESTS_KVM_MACHINE_H
#define UMM_TESTS_KVM_MACHINE_H

#include "tests/kvm_guest.h"
#include "tests/kvm_vm.h"
#include "tests/pager_fixture.h"

enum {
	PAGES = 1024,
	CHUNKS = 16, /* memory slots of the RAM */
	PAGES_OF_CHUNK = PAGES / CHUNKS,
	PROGRAM_SLOT = CHUNKS,
	PROGRAM_AT = 0x10000, /* guest physical; the RAM is at RAM_AT */
	PAGE_TABLES_AT = 0x14000,
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
	_Atomic uint64_t address[CHUNKS]; /* of the chunks; 0: unmapped */
	pthread_mutex_t layout;           /* host threads that remove, move, unmap */
	bool removed[PAGES];
	_Atomic bool stop, wrong_expected;
	_Atomic uint32_t wrong, faults;
};

static inline uint64_t chunk_bytes(const struct machine *m)
{
	return PAGES_OF_CHUNK * m->page;
}

/* Under a budget when budget_pages is not 0. -ENODEV: no KVM. */
int machine_init(struct machine *m, uint64_t budget_pages, bool no_move);
void machine_deinit(struct machine *m);
/* The slot of the chunk is at `address` from now on; 0: there is none. */
void machine_set_chunk(struct machine *m, uint32_t chunk, uint64_t address);

/* Starts the vCPUs. One that finds what must not be there ends the program, unless that is expected. */
void guest_start(struct machine *m);
/* Sum of a counter (offset in struct guest_parameters) over the vCPUs. */
uint32_t guest_count(const struct machine *m, uint64_t counter);
/* Waits until the guest has read so many more words, or is stopped. */
void guest_reads(struct machine *m, uint32_t more);
void guest_stop(struct machine *m);

/* Every byte of the RAM, as it is read through the region, and in the store: what the guest knows of its
 * words, and what the store had where nobody removed it. */
void check_every_byte(struct machine *m);

#endif
