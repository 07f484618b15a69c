/* A virtual machine with nothing in it but memory slots and vCPUs, for tests of memory under a running guest.
 *
 * KVM's page tables are a second MMU over this process's memory: the kernel's own notifier tells KVM of every
 * page that goes. What nobody tells KVM is that memory moved to another address: slots are set by address. */
#ifndef UMM_TESTS_KVM_VM_H
#define UMM_TESTS_KVM_VM_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

struct kvm_run;

enum { KVM_VM_VCPUS = 2 };

struct kvm_vcpu {
	struct kvm_vm *vm;
	int fd;
	struct kvm_run *run;
	uint64_t run_bytes;
	pthread_t thread;
	bool runs; /* under vm->lock: in KVM_RUN, or about to be */
};

struct kvm_vm {
	int kvm, fd;
	struct kvm_vcpu vcpus[KVM_VM_VCPUS];
	pthread_mutex_t lock;
	pthread_cond_t changed;
	uint32_t paused;  /* how many want the vCPUs out */
	uint32_t running; /* vCPUs that are in */
	uint64_t pauses;  /* that have ended */
};

enum kvm_vm_exit {
	KVM_VM_EXIT_KICKED, /* or interrupted: run it again */
	KVM_VM_EXIT_MMIO,   /* an access where there is no slot; or as FAULT, of an emulated instruction */
	KVM_VM_EXIT_FAULT,  /* an access to a slot whose memory is not mapped in this process; not executed */
};

struct kvm_vm_access {
	uint64_t address; /* guest physical */
	uint32_t *data;   /* what is written, or where an answer goes */
	bool write;
};

/* -ENODEV: no KVM here, or it is not ours to use. */
int kvm_vm_init(struct kvm_vm *vm);
void kvm_vm_deinit(struct kvm_vm *vm);
/* Guest physical [guest, guest + len) is the memory at host. len 0: there is none. */
int kvm_vm_set_slot(struct kvm_vm *vm, uint32_t slot, uint64_t guest, uint64_t host, uint64_t len);

enum { KVM_VM_TABLES_BYTES = 3 << 12 }; /* no page size of the host: three tables of x86-64 */

/* Writes page tables that map each of the first 2^30 addresses to itself, for user mode; they are at `memory`
 * here and at `guest` there. */
void kvm_vm_identity(uint8_t *memory, uint64_t guest);
/* Starts at `entry` with `argument` in RSI and the page tables at `tables`, in 64-bit user mode: KVM without
 * hardware support (pvm) runs that as it is, and would emulate any other mode instruction by instruction. */
int kvm_vm_add_vcpu(struct kvm_vm *vm, int index, uint64_t tables, uint32_t entry, uint32_t argument);
/* Runs it until it exits; waits while the machine is paused. By the vCPU's own thread (vcpu->thread). Returns
 * enum kvm_vm_exit or -errno. */
int kvm_vm_run(struct kvm_vcpu *vcpu, struct kvm_vm_access *access);
/* EAX, EBX, ECX, EDX, of these 32 bits each: for the report of a failure. */
int kvm_vm_registers(struct kvm_vcpu *vcpu, uint32_t ret[4]);

/* Around an access of the vCPU's thread to the memory of a slot: it is a part of the vCPU then, and paused
 * with it. */
void kvm_vm_enter(struct kvm_vcpu *vcpu);
void kvm_vm_leave(struct kvm_vcpu *vcpu);
/* Returns when no vCPU runs; none runs before kvm_vm_resume. Nests. Not by a vCPU's thread. */
void kvm_vm_pause(struct kvm_vm *vm);
void kvm_vm_resume(struct kvm_vm *vm);
uint64_t kvm_vm_pauses(struct kvm_vm *vm);
/* Waits until a pause ended that had not at `pauses`. */
void kvm_vm_wait_change(struct kvm_vm *vm, uint64_t pauses);

#endif
