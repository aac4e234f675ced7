/*
 * guestctl: a guest process talks to the monitor through its two I/O ports. As a guest's first process, under the name init, it
 * runs one command and hands its status on: what a container runtime's init does, for `minivmm compare`.
 *
 * Without a C library and static, so that it runs in every initramfs and every root: a page or two. ioperm(2) rather than
 * /dev/port, which Debian's cloud kernel does not have.
 */
#include <asm/ioctls.h>
#include <asm/termbits.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/sockios.h>
#include <net/if.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

#define EXIT_PORT 0xf4 /* the byte becomes the monitor's exit status */
#define MARK_PORT 0xf5 /* the monitor time-stamps the byte: a boot mark */

static long syscall6(long number, long a, long b, long c, long d, long e, long f)
{
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = f;
	long result;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return result;
}

static long syscall3(long number, long a, long b, long c)
{
	return syscall6(number, a, b, c, 0, 0, 0);
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

/* The byte goes to the port, or the answer is why not. */
static int put(int port, int value)
{
	if (syscall3(SYS_ioperm, port, 1, 1) != 0) {
		say(2, "guestctl: no access to I/O ports (not root, or the kernel is locked down)\n");
		return 1;
	}
	if (port == EXIT_PORT)
		drain();
	__asm__ volatile("outb %b0, %w1" : : "a"(value), "Nd"((unsigned short)port));
	return 0;
}

/* The kernel that this process sees, and a status to see whether that arrives. */
static int probe(int status)
{
	static struct utsname name;

	syscall3(SYS_uname, (long)&name, 0, 0);
	say(1, name.release);
	say(1, "\n");
	return status;
}

static void *memory(unsigned long size, long file)
{
	long flags = file < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_PRIVATE;

	return (void *)syscall6(SYS_mmap, 0, (long)size, PROT_READ | PROT_WRITE, flags, file, 0);
}

/* A file's strings, each with a zero byte behind it, as execve(2) takes them. */
static char **strings(const char *path)
{
	long file = syscall3(SYS_open, (long)path, O_RDONLY, 0);
	long size = file < 0 ? 0 : syscall3(SYS_lseek, file, 0, SEEK_END);
	char **list = memory(((unsigned long)size + 1) * sizeof(*list), -1);
	char *text = size > 0 ? memory(size, file) : 0;
	long count = 0;

	for (long i = 0; i < size; i++)
		if (i == 0 || !text[i - 1])
			list[count++] = text + i;
	return list;
}

/* What comes behind "name=" in an environment, or what is given instead. */
static const char *value_of(char **environment, const char *name, const char *instead)
{
	for (; *environment; environment++) {
		unsigned long n = 0;

		while (name[n] && name[n] == (*environment)[n])
			n++;
		if (!name[n] && (*environment)[n] == '=')
			return *environment + n + 1;
	}
	return instead;
}

static char *append(char *to, const char *text, unsigned long size)
{
	while (size--)
		*to++ = *text++;
	*to = 0;
	return to;
}

/* As execvp(3); only returns if that fails. */
static int execute(char **arguments, char **environment)
{
	const char *name = arguments[0], *path = value_of(environment, "PATH", "/bin");
	static char file[4096 + 256];
	long result = -ENOENT;

	for (const char *c = name; *c; c++)
		if (*c == '/')
			return (int)syscall3(SYS_execve, (long)name, (long)arguments, (long)environment);
	while (*path && result == -ENOENT) {
		unsigned long n = 0;

		while (path[n] && path[n] != ':')
			n++;
		if (n < 4096 && length(name) < 255) {
			append(append(append(file, path, n), "/", 1), name, length(name));
			result = syscall3(SYS_execve, (long)file, (long)arguments, (long)environment);
		}
		path += path[n] ? n + 1 : n;
	}
	return (int)result;
}

/* What a container finds as well: the kernel's file systems, the console for output as it is, and a loopback device. */
static void set_up(void)
{
	static const char *const mounts[][2] = {
		{ "proc", "/proc" },	   { "sysfs", "/sys" },	    { "devtmpfs", "/dev" },
		{ "devpts", "/dev/pts" }, { "tmpfs", "/dev/shm" },
	};
	static struct termios console;
	static struct ifreq loopback = { .ifr_name = "lo", .ifr_flags = IFF_UP };
	long file;

	for (unsigned long i = 0; i < sizeof(mounts) / sizeof(*mounts); i++) {
		syscall3(SYS_mkdir, (long)mounts[i][1], 0755, 0);
		syscall6(SYS_mount, (long)mounts[i][0], (long)mounts[i][1], (long)mounts[i][0], 0, 0, 0);
	}
	file = syscall3(SYS_open, (long)"/dev/console", O_RDWR | O_NOCTTY, 0);
	syscall3(SYS_dup2, file, 1, 0);
	syscall3(SYS_dup2, file, 2, 0);
	file = syscall3(SYS_open, (long)"/dev/null", O_RDONLY, 0);
	syscall3(SYS_dup2, file, 0, 0);
	for (file = 3; file < 6; file++)
		syscall3(SYS_close, file, 0, 0);
	if (syscall3(SYS_ioctl, 1, TCGETS, (long)&console) == 0) {
		console.c_oflag &= ~(tcflag_t)OPOST;
		syscall3(SYS_ioctl, 1, TCSETS, (long)&console);
	}
	file = syscall3(SYS_socket, AF_INET, SOCK_DGRAM, 0);
	syscall3(SYS_ioctl, file, SIOCSIFFLAGS, (long)&loopback);
	syscall3(SYS_close, file, 0, 0);
}

/* Runs the command of /.minivmm/run, or of the file that the kernel command line names, to its end and the guest's. */
static int init(char **environment)
{
	long child, ended;
	int status = 0;

	set_up();
	char **arguments = strings(value_of(environment, "MINIVMM_RUN", "/.minivmm/run"));
	char **variables = strings("/.minivmm/environment");

	child = syscall3(SYS_fork, 0, 0, 0);
	if (child == 0) {
		long failed = arguments[0] ? execute(arguments, variables) : -ENOENT;

		say(2, "minivmm: cannot run ");
		say(2, arguments[0] ? arguments[0] : "nothing");
		say(2, failed == -ENOENT ? ": no such file\n" : ": not to be executed here\n");
		return failed == -ENOENT ? 127 : 126;
	}
	do
		ended = syscall6(SYS_wait4, -1, (long)&status, 0, 0, 0, 0);
	while (ended != child && ended > 0);
	put(EXIT_PORT, WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
	/* Not minivmm: there is no such port. The end of process 1 would be a panic. */
	for (;;)
		syscall3(SYS_pause, 0, 0, 0);
}

static int run(long argc, char **argv)
{
	static const char usage[] =
		"Usage: guestctl exit N    end the virtual machine; N (0-255) is the monitor's exit status\n"
		"       guestctl drain     wait until the console has sent all that was written to it\n"
		"       guestctl mark N    a boot mark N (0-255) for the monitor's timeline\n"
		"       guestctl probe N   print the kernel's release and end with status N\n"
		"exit and mark need root (CAP_SYS_RAWIO).\n";
	int port, value;

	if (argc > 0 && equal(argv[0], "/.minivmm/init") && syscall3(SYS_getpid, 0, 0, 0) == 1)
		return init(argv + argc + 1);
	if (argc == 2 && (equal(argv[1], "--help") || equal(argv[1], "-h"))) {
		say(1, usage);
		return 0;
	}
	if (argc == 2 && equal(argv[1], "drain")) {
		drain();
		return 0;
	}
	port = argc != 3 ? 0 : equal(argv[1], "exit") ? EXIT_PORT : equal(argv[1], "mark") ? MARK_PORT : 0;
	value = argc == 3 ? byte(argv[2]) : -1;
	if (value >= 0 && equal(argv[1], "probe"))
		return probe(value);
	if (!port || value < 0) {
		say(2, usage);
		return 2;
	}
	return put(port, value);
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
