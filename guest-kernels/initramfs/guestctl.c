/*
 * guestctl: a guest process talks to the monitor through its two I/O ports.
 *
 * Without a C library and static, so that it runs in every initramfs: a few hundred bytes of code. ioperm(2) rather than
 * /dev/port, which Debian's cloud kernel does not have.
 */
#include <asm/ioctls.h>
#include <sys/syscall.h>

#define EXIT_PORT 0xf4 /* the byte becomes the monitor's exit status */
#define MARK_PORT 0xf5 /* the monitor time-stamps the byte: a boot mark */

static long syscall3(long number, long a, long b, long c)
{
	long result;

	__asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
	return result;
}

static unsigned long length(const char *text)
{
	unsigned long n = 0;

	while (text[n])
		n++;
	return n;
}

static void say(int file, const char *text)
{
	syscall3(SYS_write, file, (long)text, (long)length(text));
}

static int equal(const char *a, const char *b)
{
	while (*a && *a == *b)
		a++, b++;
	return *a == *b;
}

/* A decimal number from 0 to 255, or -1. */
static int byte(const char *text)
{
	int value = 0;

	if (!*text)
		return -1;
	for (; *text; text++) {
		if (*text < '0' || *text > '9')
			return -1;
		value = value * 10 + (*text - '0');
		if (value > 255)
			return -1;
	}
	return value;
}

/* Waits until the terminal on stdout has sent what was written to it, as tcdrain(3): the end of the machine does not. */
static void drain(void)
{
	syscall3(SYS_ioctl, 1, TCSBRK, 1);
}

static int run(long argc, char **argv)
{
	static const char usage[] =
		"Usage: guestctl exit N    end the virtual machine; N (0-255) is the monitor's exit status\n"
		"       guestctl drain     wait until the console has sent all that was written to it\n"
		"       guestctl mark N    a boot mark N (0-255) for the monitor's timeline\n"
		"exit and mark need root (CAP_SYS_RAWIO).\n";
	int port, value;

	if (argc == 2 && (equal(argv[1], "--help") || equal(argv[1], "-h"))) {
		say(1, usage);
		return 0;
	}
	if (argc == 2 && equal(argv[1], "drain")) {
		drain();
		return 0;
	}
	port = argc != 3 ? 0 : equal(argv[1], "exit") ? EXIT_PORT : equal(argv[1], "mark") ? MARK_PORT : 0;
	value = port ? byte(argv[2]) : -1;
	if (value < 0) {
		say(2, usage);
		return 2;
	}
	if (syscall3(SYS_ioperm, port, 1, 1) != 0) {
		say(2, "guestctl: no access to I/O ports (not root, or the kernel is locked down)\n");
		return 1;
	}
	if (port == EXIT_PORT)
		drain();
	__asm__ volatile("outb %b0, %w1" : : "a"(value), "Nd"((unsigned short)port));
	return 0;
}

/* argc and the arguments lie on the stack as the kernel left them, before any C prologue moves it. */
__attribute__((used)) static void start(long *stack)
{
	syscall3(SYS_exit_group, run(stack[0], (char **)(stack + 1)), 0, 0);
	__builtin_unreachable();
}

__asm__(".globl _start\n"
	"_start:\n"
	"	xor %ebp, %ebp\n"
	"	mov %rsp, %rdi\n"
	"	and $-16, %rsp\n"
	"	call start\n");
