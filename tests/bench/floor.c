/*
 * What KVM itself costs: the least that starts a VM, runs a tiny guest that writes a byte to COM1 and powers off, and
 * ends. `floor GUEST` takes one of guest-kernels/tiny; `floor` alone ends at once: the cost of a process.
 */
#include <elf.h>
#include <err.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

enum { RAM = 16 << 20, PML4 = 0x1000, PDPT = 0x2000, PD = 0x3000, COM1 = 0x3f8, SLEEP_PORT = 0x600 };

static int need(int result, const char *what)
{
	if (result < 0)
		err(1, "%s", what);
	return result;
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

int main(int argc, char **argv)
{
	if (argc < 2)
		return 0;

	int kvm = need(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
	int vm = need(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
	uint8_t *ram = mmap(NULL, RAM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (ram == MAP_FAILED)
		err(1, "mmap");
	struct kvm_userspace_memory_region slot = { .memory_size = RAM, .userspace_addr = (uintptr_t)ram };
	need(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot), "KVM_SET_USER_MEMORY_REGION");
	struct kvm_enable_cap split = { .cap = KVM_CAP_SPLIT_IRQCHIP, .args = { 24 } };
	need(ioctl(vm, KVM_ENABLE_CAP, &split), "KVM_CAP_SPLIT_IRQCHIP");

	/* The first GiB one to one, in pages of 2 MiB. */
	uint64_t entry = load(argv[1], ram);
	*(uint64_t *)(ram + PML4) = PDPT | 3;
	*(uint64_t *)(ram + PDPT) = PD | 3;
	for (uint64_t i = 0; i < 512; i++)
		((uint64_t *)(ram + PD))[i] = i << 21 | 0x83;

	static struct { struct kvm_cpuid2 head; struct kvm_cpuid_entry2 entries[256]; } cpuid = { .head.nent = 256 };
	need(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid), "KVM_GET_SUPPORTED_CPUID");
	int size = need(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
	int vcpu = need(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
	struct kvm_run *run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	if (run == MAP_FAILED)
		err(1, "mmap of the vCPU");
	need(ioctl(vcpu, KVM_SET_CPUID2, &cpuid), "KVM_SET_CPUID2");

	struct kvm_sregs sregs;
	need(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
	struct kvm_segment data = { .limit = ~0u, .selector = 0x18, .type = 3, .present = 1, .db = 1, .s = 1, .g = 1 };
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
	sregs.cs = data;
	sregs.cs.selector = 0x10, sregs.cs.type = 11, sregs.cs.db = 0, sregs.cs.l = 1;
	sregs.cr0 = 0x80000011, sregs.cr3 = PML4, sregs.cr4 = 0x20, sregs.efer = 0x500;
	need(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
	struct kvm_regs regs = { .rip = entry, .rflags = 2 };
	need(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");

	for (;;) {
		need(ioctl(vcpu, KVM_RUN, 0), "KVM_RUN");
		if (run->exit_reason != KVM_EXIT_IO)
			errx(1, "exit %u", run->exit_reason);
		if (run->io.port == COM1 && write(STDOUT_FILENO, (char *)run + run->io.data_offset, 1) != 1)
			err(1, "write");
		if (run->io.port == SLEEP_PORT)
			return 0;
	}
}
