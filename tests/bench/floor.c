/*
 * What KVM itself costs: the least that starts a VM, runs a tiny guest and ends.
 *
 *   floor                  ends at once: the cost of a process
 *   floor GUEST            boots one of guest-kernels/tiny
 *   floor save GUEST FILE  boots it and saves the VM at its boot mark 8
 *   floor restore FILE N   has N VMs go on from there, one after the other: with all of a vCPU's state, without checks
 */
#include <elf.h>
#include <err.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

enum { RAM = 16 << 20, PML4 = 0x1000, PDPT = 0x2000, PD = 0x3000, BOOT_PARAMS = 0x4000 };
enum { COM1 = 0x3f8, MARK_PORT = 0xf5, SAVED_MARK = 8, SLEEP_PORT = 0x600, TSS = 0xfffbd000, STATE = 64 << 10 };

struct vm {
	int kvm, fd, vcpu;
	size_t run_size;
	uint8_t *ram;
	struct kvm_run *run;
};

/* What a file begins with; the RAM is behind it, at STATE. */
static struct state {
	struct { struct kvm_cpuid2 head; struct kvm_cpuid_entry2 entries[256]; } cpuid;
	struct { struct kvm_msrs head; struct kvm_msr_entry entries[256]; } msrs;
	struct kvm_regs regs;
	struct kvm_sregs sregs;
	struct kvm_xsave xsave;
	struct kvm_xcrs xcrs;
	struct kvm_debugregs debugregs;
	struct kvm_lapic_state lapic;
	struct kvm_vcpu_events events;
	struct kvm_mp_state mp_state;
	struct kvm_clock_data clock;
} state = { .cpuid.head.nent = 256 };
_Static_assert(sizeof(state) <= STATE, "the state has its room in the file");

#define NEED(fd, call, argument) need(ioctl(fd, call, argument), #call)

static int need(int result, const char *what)
{
	if (result < 0)
		err(1, "%s", what);
	return result;
}

static void *map(size_t size, int flags, int fd, off_t offset)
{
	void *mapping = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, fd, offset);

	if (mapping == MAP_FAILED)
		err(1, "mmap");
	return mapping;
}

static uint64_t load(const char *path, uint8_t *ram)
{
	Elf64_Ehdr elf;
	Elf64_Phdr segment;
	int fd = need(open(path, O_RDONLY | O_CLOEXEC), path);

	if (pread(fd, &elf, sizeof(elf), 0) != sizeof(elf) ||
	    pread(fd, &segment, sizeof(segment), elf.e_phoff) != sizeof(segment) ||
	    segment.p_paddr + segment.p_filesz > RAM ||
	    pread(fd, ram + segment.p_paddr, segment.p_filesz, segment.p_offset) != (ssize_t)segment.p_filesz)
		errx(1, "%s: not a tiny guest", path);
	close(fd);
	return elf.e_entry;
}

/* A VM whose RAM is a file's from STATE on, or new. */
static struct vm create(int kvm, int file)
{
	struct vm vm = { .kvm = kvm, .fd = NEED(kvm, KVM_CREATE_VM, 0) };
	int anonymous = file < 0 ? MAP_ANONYMOUS : 0;

	vm.ram = map(RAM, MAP_PRIVATE | MAP_NORESERVE | anonymous, file, file < 0 ? 0 : STATE);
	struct kvm_userspace_memory_region slot = { .memory_size = RAM, .userspace_addr = (uintptr_t)vm.ram };
	NEED(vm.fd, KVM_SET_USER_MEMORY_REGION, &slot);
	if (file >= 0)
		NEED(vm.fd, KVM_SET_TSS_ADDR, TSS);
	struct kvm_enable_cap split = { .cap = KVM_CAP_SPLIT_IRQCHIP, .args = { 24 } };
	NEED(vm.fd, KVM_ENABLE_CAP, &split);
	return vm;
}

static void add_vcpu(struct vm *vm)
{
	vm->run_size = NEED(vm->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	vm->vcpu = NEED(vm->fd, KVM_CREATE_VCPU, 0);
	vm->run = map(vm->run_size, MAP_SHARED, vm->vcpu, 0);
	NEED(vm->vcpu, KVM_SET_CPUID2, &state.cpuid);
}

static struct vm boot(int kvm, const char *guest)
{
	struct vm vm = create(kvm, -1);
	uint64_t entry = load(guest, vm.ram);

	/* The first GiB one to one, in pages of 2 MiB. */
	*(uint64_t *)(vm.ram + PML4) = PDPT | 3;
	*(uint64_t *)(vm.ram + PDPT) = PD | 3;
	for (uint64_t i = 0; i < 512; i++)
		((uint64_t *)(vm.ram + PD))[i] = i << 21 | 0x83;
	/* Its command line is empty: a zero behind the parameters. */
	*(uint32_t *)(vm.ram + BOOT_PARAMS + 0x228) = BOOT_PARAMS + 0x1000;
	NEED(kvm, KVM_GET_SUPPORTED_CPUID, &state.cpuid);
	add_vcpu(&vm);

	struct kvm_sregs sregs;
	NEED(vm.vcpu, KVM_GET_SREGS, &sregs);
	struct kvm_segment data = { .limit = ~0u, .selector = 0x18, .type = 3, .present = 1, .db = 1, .s = 1, .g = 1 };
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
	sregs.cs = data;
	sregs.cs.selector = 0x10, sregs.cs.type = 11, sregs.cs.db = 0, sregs.cs.l = 1;
	sregs.cr0 = 0x80000011, sregs.cr3 = PML4, sregs.cr4 = 0x20, sregs.efer = 0x500;
	NEED(vm.vcpu, KVM_SET_SREGS, &sregs);
	struct kvm_regs regs = { .rip = entry, .rsi = BOOT_PARAMS, .rflags = 2 };
	NEED(vm.vcpu, KVM_SET_REGS, &regs);
	return vm;
}

static void run(const struct vm *vm, int until_port, uint8_t value)
{
	for (;;) {
		NEED(vm->vcpu, KVM_RUN, 0);
		if (vm->run->exit_reason != KVM_EXIT_IO)
			errx(1, "exit %u", vm->run->exit_reason);
		uint8_t *data = (uint8_t *)vm->run + vm->run->io.data_offset;
		/* COM1 has room for another byte. */
		if (vm->run->io.direction == KVM_EXIT_IO_IN)
			*data = 0xff;
		else if (vm->run->io.port == COM1 && write(STDOUT_FILENO, data, 1) != 1)
			err(1, "write");
		if (vm->run->io.port == until_port && *data == value)
			return;
	}
}

/* KVM_SET_MSRS stops at what it does not take: only what it takes is kept. */
static void get_msrs(const struct vm *vm)
{
	static struct { struct kvm_msr_list head; uint32_t indices[256]; } list = { .head.nmsrs = 256 };

	NEED(vm->kvm, KVM_GET_MSR_INDEX_LIST, &list);
	for (uint32_t i = 0; i < list.head.nmsrs; i++) {
		struct { struct kvm_msrs head; struct kvm_msr_entry entry; } one = {
			.head.nmsrs = 1, .entry.index = list.indices[i],
		};
		if (ioctl(vm->vcpu, KVM_GET_MSRS, &one) == 1 && ioctl(vm->vcpu, KVM_SET_MSRS, &one) == 1)
			state.msrs.entries[state.msrs.head.nmsrs++] = one.entry;
	}
}

static void save(const struct vm *vm, const char *path)
{
	/* The write to the port completes when the vCPU is run again. */
	vm->run->immediate_exit = 1;
	if (ioctl(vm->vcpu, KVM_RUN, 0) == 0)
		errx(1, "the vCPU runs on");
	NEED(vm->vcpu, KVM_GET_MP_STATE, &state.mp_state);
	NEED(vm->vcpu, KVM_GET_REGS, &state.regs);
	NEED(vm->vcpu, KVM_GET_SREGS, &state.sregs);
	NEED(vm->vcpu, KVM_GET_XSAVE, &state.xsave);
	NEED(vm->vcpu, KVM_GET_XCRS, &state.xcrs);
	NEED(vm->vcpu, KVM_GET_DEBUGREGS, &state.debugregs);
	NEED(vm->vcpu, KVM_GET_LAPIC, &state.lapic);
	get_msrs(vm);
	NEED(vm->vcpu, KVM_GET_VCPU_EVENTS, &state.events);
	NEED(vm->fd, KVM_GET_CLOCK, &state.clock);
	state.clock.flags = 0;

	int file = need(open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600), path);
	if (write(file, &state, sizeof(state)) != sizeof(state) || pwrite(file, vm->ram, RAM, STATE) != RAM)
		err(1, "%s", path);
}

static void restore(int kvm, int file)
{
	struct vm vm = create(kvm, file);

	add_vcpu(&vm);
	NEED(vm.vcpu, KVM_SET_MP_STATE, &state.mp_state);
	NEED(vm.vcpu, KVM_SET_REGS, &state.regs);
	NEED(vm.vcpu, KVM_SET_SREGS, &state.sregs);
	NEED(vm.vcpu, KVM_SET_XSAVE, &state.xsave);
	NEED(vm.vcpu, KVM_SET_XCRS, &state.xcrs);
	NEED(vm.vcpu, KVM_SET_DEBUGREGS, &state.debugregs);
	NEED(vm.vcpu, KVM_SET_LAPIC, &state.lapic);
	if (NEED(vm.vcpu, KVM_SET_MSRS, &state.msrs) != (int)state.msrs.head.nmsrs)
		errx(1, "KVM does not take all MSRs");
	NEED(vm.vcpu, KVM_SET_VCPU_EVENTS, &state.events);
	NEED(vm.fd, KVM_SET_CLOCK, &state.clock);
	run(&vm, SLEEP_PORT, 0x34);
	munmap(vm.run, vm.run_size);
	close(vm.vcpu);
	close(vm.fd);
	munmap(vm.ram, RAM);
}

int main(int argc, char **argv)
{
	if (argc < 2)
		return 0;

	int kvm = need(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
	if (argc < 4) {
		struct vm vm = boot(kvm, argv[1]);
		run(&vm, SLEEP_PORT, 0x34);
	} else if (strcmp(argv[1], "save") == 0) {
		struct vm vm = boot(kvm, argv[2]);
		run(&vm, MARK_PORT, SAVED_MARK);
		save(&vm, argv[3]);
	} else {
		int file = need(open(argv[2], O_RDONLY | O_CLOEXEC), argv[2]);
		if (read(file, &state, sizeof(state)) != sizeof(state))
			err(1, "%s", argv[2]);
		for (int i = atoi(argv[3]); i > 0; i--)
			restore(kvm, file);
	}
	return 0;
}
