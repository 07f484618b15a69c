/* ioctls of /dev/kvm (Documentation/virt/kvm/api.rst), as few as a guest without devices takes. */
#include "tests/kvm_vm.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

/* A signal is what gets a vCPU out of KVM_RUN; its handler has nothing to do. */
enum { KICK = SIGUSR1 };

static void ignore_kick(int number)
{
	(void)number;
}

int kvm_vm_init(struct kvm_vm *vm)
{
	memset(vm, 0, sizeof(*vm));
	vm->fd = -1;
	for (int i = 0; i < KVM_VM_VCPUS; i++)
		vm->vcpus[i].fd = -1;
	pthread_mutex_init(&vm->lock, NULL);
	pthread_cond_init(&vm->changed, NULL);
	struct sigaction action = {.sa_handler = ignore_kick};
	sigaction(KICK, &action, NULL);
	vm->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (vm->kvm < 0)
		return -ENODEV;
	vm->fd = ioctl(vm->kvm, KVM_CREATE_VM, 0);
	if (vm->fd < 0) {
		kvm_vm_deinit(vm);
		return -ENODEV;
	}
	return 0;
}

void kvm_vm_deinit(struct kvm_vm *vm)
{
	for (int i = 0; i < KVM_VM_VCPUS; i++) {
		if (vm->vcpus[i].run)
			munmap(vm->vcpus[i].run, vm->vcpus[i].run_bytes);
		if (vm->vcpus[i].fd >= 0)
			close(vm->vcpus[i].fd);
	}
	if (vm->fd >= 0)
		close(vm->fd);
	close(vm->kvm);
	pthread_cond_destroy(&vm->changed);
	pthread_mutex_destroy(&vm->lock);
}

int kvm_vm_set_slot(struct kvm_vm *vm, uint32_t slot, uint64_t guest, uint64_t host, uint64_t len)
{
	struct kvm_userspace_memory_region region = {
	        .slot = slot,
	        .guest_phys_addr = guest,
	        .memory_size = len,
	        .userspace_addr = host,
	};
	return ioctl(vm->fd, KVM_SET_USER_MEMORY_REGION, &region) < 0 ? -errno : 0;
}

#ifdef __x86_64__
static struct kvm_segment user_segment(uint8_t type, bool code)
{
	enum { USER = 3, CODE_SELECTOR = 8, DATA_SELECTOR = 16 };
	return (struct kvm_segment){
	        .limit = UINT32_MAX,
	        .selector = (code ? CODE_SELECTOR : DATA_SELECTOR) | USER,
	        .type = type,
	        .present = 1,
	        .dpl = USER,
	        .db = !code,
	        .l = code, /* 64 bits */
	        .s = 1,
	        .g = 1, /* the limit counts pages */
	};
}

static int set_registers(int fd, uint64_t tables, uint32_t entry, uint32_t argument)
{
	/* Intel SDM volume 3, chapter 2 */
	enum {
		CODE = 11,
		DATA = 3,
		CR0_PE = 1 << 0,
		CR0_ET_NE = 1 << 4 | 1 << 5,
		CR0_WP = 1 << 16,
		CR4_PAE = 1 << 5,
		EFER_LME_LMA = 1 << 8 | 1 << 10,
		FLAGS_ALWAYS_SET = 1 << 1,
	};
	static const uint64_t cr0_pg = UINT64_C(1) << 31;
	struct kvm_sregs special;
	if (ioctl(fd, KVM_GET_SREGS, &special) < 0)
		return -errno;
	special.cs = user_segment(CODE, true);
	special.ds = special.es = special.fs = special.gs = special.ss = user_segment(DATA, false);
	special.cr0 = cr0_pg | CR0_PE | CR0_ET_NE | CR0_WP;
	special.cr3 = tables;
	special.cr4 |= CR4_PAE;
	special.efer |= EFER_LME_LMA;
	struct kvm_regs general = {.rip = entry, .rsi = argument, .rflags = FLAGS_ALWAYS_SET};
	if (ioctl(fd, KVM_SET_SREGS, &special) < 0 || ioctl(fd, KVM_SET_REGS, &general) < 0)
		return -errno;
	return 0;
}

int kvm_vm_registers(struct kvm_vcpu *vcpu, uint32_t ret[4])
{
	struct kvm_regs r;
	if (ioctl(vcpu->fd, KVM_GET_REGS, &r) < 0)
		return -errno;
	uint64_t all[] = {r.rax, r.rbx, r.rcx, r.rdx};
	for (int i = 0; i < 4; i++)
		ret[i] = (uint32_t)all[i];
	return 0;
}
#else
static int set_registers(int fd, uint64_t tables, uint32_t entry, uint32_t argument)
{
	(void)fd;
	(void)tables;
	(void)entry;
	(void)argument;
	return -EOPNOTSUPP;
}

int kvm_vm_registers(struct kvm_vcpu *vcpu, uint32_t ret[4])
{
	(void)vcpu;
	(void)ret;
	return -EOPNOTSUPP;
}
#endif

void kvm_vm_identity(uint8_t *memory, uint64_t guest)
{
	enum { ENTRIES = 512, PRESENT_WRITABLE_USER = 7, LARGE = 1 << 7, LARGE_SHIFT = 21 };
	uint64_t *tables = (uint64_t *)memory, bytes = ENTRIES * sizeof(*tables);
	tables[0] = (guest + bytes) | PRESENT_WRITABLE_USER;
	tables[ENTRIES] = (guest + 2 * bytes) | PRESENT_WRITABLE_USER;
	for (uint64_t i = 0; i < ENTRIES; i++)
		tables[2 * ENTRIES + i] = i << LARGE_SHIFT | LARGE | PRESENT_WRITABLE_USER;
}

int kvm_vm_add_vcpu(struct kvm_vm *vm, int index, uint64_t tables, uint32_t entry, uint32_t argument)
{
	struct kvm_vcpu *vcpu = &vm->vcpus[index];
	vcpu->vm = vm;
	vcpu->fd = ioctl(vm->fd, KVM_CREATE_VCPU, index);
	if (vcpu->fd < 0)
		return -errno;
	int bytes = ioctl(vm->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	if (bytes < 0)
		return -errno;
	void *run = mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd, 0);
	if (run == MAP_FAILED)
		return -errno;
	vcpu->run = run;
	vcpu->run_bytes = (uint64_t)bytes;
	return set_registers(vcpu->fd, tables, entry, argument);
}

void kvm_vm_enter(struct kvm_vcpu *vcpu)
{
	struct kvm_vm *vm = vcpu->vm;
	pthread_mutex_lock(&vm->lock);
	while (vm->paused)
		pthread_cond_wait(&vm->changed, &vm->lock);
	vcpu->runs = true;
	/* Set by who pauses, under the lock and after this: KVM_RUN then returns at once. */
	__atomic_store_n(&vcpu->run->immediate_exit, 0, __ATOMIC_RELAXED);
	vm->running++;
	pthread_mutex_unlock(&vm->lock);
}

void kvm_vm_leave(struct kvm_vcpu *vcpu)
{
	struct kvm_vm *vm = vcpu->vm;
	pthread_mutex_lock(&vm->lock);
	vcpu->runs = false;
	vm->running--;
	pthread_cond_broadcast(&vm->changed);
	pthread_mutex_unlock(&vm->lock);
}

int kvm_vm_run(struct kvm_vcpu *vcpu, struct kvm_vm_access *access)
{
	struct kvm_run *run = vcpu->run;
	kvm_vm_enter(vcpu);
	int err = ioctl(vcpu->fd, KVM_RUN, 0) < 0 ? errno : 0;
	kvm_vm_leave(vcpu);
	if (err == EINTR || err == EAGAIN)
		return KVM_VM_EXIT_KICKED;
	/* Since Linux 6.8 with KVM_EXIT_MEMORY_FAULT beside it. The instruction was not executed. */
	if (err == EFAULT)
		return KVM_VM_EXIT_FAULT;
	if (err)
		return -err;
	switch (run->exit_reason) {
	case KVM_EXIT_INTR:
		return KVM_VM_EXIT_KICKED;
	case KVM_EXIT_MMIO:
		/* A read is completed by the next KVM_RUN, with what is in data by then. */
		*access = (struct kvm_vm_access){.address = run->mmio.phys_addr,
		        .data = (uint32_t *)run->mmio.data,
		        .write = run->mmio.is_write};
		return KVM_VM_EXIT_MMIO;
	default:
		return -EIO;
	}
}

void kvm_vm_pause(struct kvm_vm *vm)
{
	pthread_mutex_lock(&vm->lock);
	vm->paused++;
	while (vm->running) {
		for (int i = 0; i < KVM_VM_VCPUS; i++)
			if (vm->vcpus[i].runs) {
				__atomic_store_n(&vm->vcpus[i].run->immediate_exit, 1, __ATOMIC_RELAXED);
				pthread_kill(vm->vcpus[i].thread, KICK);
			}
		pthread_cond_wait(&vm->changed, &vm->lock);
	}
	pthread_mutex_unlock(&vm->lock);
}

void kvm_vm_resume(struct kvm_vm *vm)
{
	pthread_mutex_lock(&vm->lock);
	vm->paused--;
	vm->pauses++;
	pthread_cond_broadcast(&vm->changed);
	pthread_mutex_unlock(&vm->lock);
}

uint64_t kvm_vm_pauses(struct kvm_vm *vm)
{
	pthread_mutex_lock(&vm->lock);
	uint64_t pauses = vm->pauses;
	pthread_mutex_unlock(&vm->lock);
	return pauses;
}

void kvm_vm_wait_change(struct kvm_vm *vm, uint64_t pauses)
{
	pthread_mutex_lock(&vm->lock);
	while (vm->pauses == pauses)
		pthread_cond_wait(&vm->changed, &vm->lock);
	pthread_mutex_unlock(&vm->lock);
}
