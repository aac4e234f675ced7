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
#include <linux/random.h>
#include <linux/sockios.h>
#include <linux/vm_sockets.h>
#include <net/if.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define EXIT_PORT 0xf4 /* the byte becomes the monitor's exit status */
#define MARK_PORT 0xf5 /* the monitor time-stamps the byte: a boot mark. A restored machine reads there who it is */

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
	/* An access of four bytes touches the three ports behind, too. */
	if (syscall3(SYS_ioperm, port, 4, 1) != 0) {
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

/* What a restored machine reads: devices/src/platform/control.rs. */
struct restored {
	char magic[4];
	uint32_t length;
	uint64_t generation;
	uint64_t nanoseconds;
	uint32_t seed[8];
	uint32_t index;
	uint32_t argument_length;
	union {
		char text[(64 << 10) + 4];
		uint32_t words[(64 >> 2 << 10) + 1];
	} argument;
};

/* No string instruction: what one has read is lost when the page that it goes to is not there yet. */
static void get(void *to, unsigned long bytes)
{
	uint32_t *word = to;

	for (; bytes; bytes -= bytes < 4 ? bytes : 4)
		__asm__ volatile("inl %w1, %0" : "=a"(*word++) : "Nd"((unsigned short)MARK_PORT));
}

/* Nanoseconds of the machine's own time. */
static uint64_t monotonic(void)
{
	struct timespec time = { 0, 0 };

	syscall3(SYS_clock_gettime, CLOCK_MONOTONIC, (long)&time, 0);
	return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

/*
 * Until this is done, the kernel's random numbers are those of every machine that was restored from the same snapshot: the seed
 * goes into the pool, and the generator takes a new key from there at once, which a write to /dev/urandom would not bring about.
 * The wall time is that of the moment `began`. CAP_SYS_ADMIN and CAP_SYS_TIME are needed.
 */
static int refresh(const struct restored *restored, uint64_t began)
{
	struct {
		int bits;
		int size;
		uint32_t seed[8];
	} entropy = { 256, sizeof(entropy.seed), { 0 } };
	struct timespec now;
	uint64_t nanoseconds;
	long file = syscall3(SYS_open, (long)"/dev/urandom", O_RDWR, 0);
	int failed = 0;

	for (int i = 0; i < 8; i++)
		entropy.seed[i] = restored->seed[i];
	if (syscall3(SYS_ioctl, file, RNDADDENTROPY, (long)&entropy) != 0 ||
	    syscall3(SYS_ioctl, file, RNDRESEEDCRNG, 0) != 0) {
		say(2, "guestctl: cannot reseed /dev/urandom\n");
		failed = 1;
	}
	syscall3(SYS_close, file, 0, 0);
	nanoseconds = restored->nanoseconds + (monotonic() - began);
	now.tv_sec = (time_t)(nanoseconds / 1000000000);
	now.tv_nsec = (long)(nanoseconds % 1000000000);
	if (syscall3(SYS_clock_settime, CLOCK_REALTIME, (long)&now, 0) != 0) {
		say(2, "guestctl: cannot set the clock\n");
		failed = 1;
	}
	return failed;
}

/* Writes a mark, of which the monitor may save the machine. 1 in one that was restored, 0 in the one that goes on, -1 if it failed. */
static int snapshot(int mark, struct restored *restored)
{
	uint64_t began;

	/* Its page is there before, which costs a restored machine no time. */
	restored->argument_length = 0;
	if (put(MARK_PORT, mark) != 0)
		return -1;
	began = monotonic();
	get(restored, 8);
	if (restored->magic[0] != 'M' || restored->magic[1] != 'V' || restored->magic[2] != 'M' || restored->magic[3] != 1)
		return 0;
	get(&restored->generation, offsetof(struct restored, argument) - 8);
	if (restored->argument_length >= sizeof(restored->argument))
		return -1;
	get(restored->argument.words, restored->argument_length);
	restored->argument.text[restored->argument_length] = 0;
	return refresh(restored, began) ? -1 : 1;
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

/* "name=value" with a decimal number; enough for 64 bits of it. */
static char *number(char *to, const char *name, uint64_t value)
{
	char digits[20], *text = append(to, name, length(name));
	int count = 0;

	do
		digits[count++] = (char)('0' + value % 10);
	while (value /= 10);
	while (count)
		text = append(text, &digits[--count], 1);
	return to;
}

/* Takes a snapshot, and goes on with a command, or in a restored machine at least with its argument on stdout. */
static int snapshot_and_run(int mark, char **command, char **environment)
{
	static const char argument[] = "MINIVMM_ARGUMENT=";
	static char index[64], generation[64];
	struct restored *restored = memory(sizeof(*restored), -1);
	int is_restored = snapshot(mark, restored);
	char **variables, *text;
	unsigned long count = 0;

	if (is_restored < 0)
		return 1;
	if (!*command) {
		if (is_restored && restored->argument_length) {
			say(1, restored->argument.text);
			say(1, "\n");
		}
		return 0;
	}
	while (environment[count])
		count++;
	variables = memory((count + 4) * sizeof(*variables), -1);
	for (unsigned long i = 0; i < count; i++)
		variables[i] = environment[i];
	if (is_restored) {
		text = memory(sizeof(argument) + sizeof(restored->argument), -1);
		append(append(text, argument, sizeof(argument) - 1), restored->argument.text, restored->argument_length);
		variables[count++] = text;
		variables[count++] = number(index, "MINIVMM_INDEX=", restored->index);
		variables[count++] = number(generation, "MINIVMM_GENERATION=", restored->generation);
	}
	execute(command, variables);
	say(2, "guestctl: cannot run ");
	say(2, *command);
	say(2, "\n");
	return 127;
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

/*
 * Runs the command of /.minivmm/run, or of the file that the kernel command line names, to its end and the guest's. With a boot mark on
 * the command line, the monitor may save the machine right before; a restored one's argument names a file in place of that one.
 */
static int init(char **environment)
{
	int mark = byte(value_of(environment, "MINIVMM_MARK", ""));
	long child, ended;
	int status = 0;

	set_up();
	char **arguments = strings(value_of(environment, "MINIVMM_RUN", "/.minivmm/run"));
	char **variables = strings("/.minivmm/environment");

	child = syscall3(SYS_fork, 0, 0, 0);
	if (child == 0) {
		struct restored *restored = memory(sizeof(*restored), -1);

		if (mark >= 0 && snapshot(mark, restored) < 0)
			return 125;
		if (restored->argument_length)
			arguments = strings(restored->argument.text);
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

/* A decimal number, or VMADDR_PORT_ANY, which is no port and no context ID. */
static unsigned port_number(const char *text)
{
	uint64_t value = 0;

	if (!*text)
		return VMADDR_PORT_ANY;
	for (; *text; text++) {
		if (*text < '0' || *text > '9' || value > VMADDR_PORT_ANY)
			return VMADDR_PORT_ANY;
		value = value * 10 + (uint64_t)(*text - '0');
	}
	return value < VMADDR_PORT_ANY ? (unsigned)value : VMADDR_PORT_ANY;
}

static int vsock_failed(const char *what)
{
	say(2, "guestctl: vsock: ");
	say(2, what);
	return 1;
}

/* Copies all that comes; 0 at its end. */
static int copy(long from, long to)
{
	static char buffer[64 << 10];
	long count, done, n;

	while ((count = syscall3(SYS_read, from, (long)buffer, sizeof(buffer))) > 0)
		for (done = 0; done < count; done += n)
			if ((n = syscall3(SYS_write, to, (long)buffer + done, count - done)) < 0)
				return 1;
	return count != 0;
}

/* Sends stdin to a connection and what comes from there to stdout, each to its end. */
static int vsock_connect(unsigned cid, unsigned port)
{
	struct sockaddr_vm address = { .svm_family = AF_VSOCK, .svm_port = port, .svm_cid = cid };
	long file = syscall3(SYS_socket, AF_VSOCK, SOCK_STREAM, 0), child;
	int failed;

	if (file < 0)
		return vsock_failed("this kernel has none, or its driver is not loaded\n");
	if (syscall3(SYS_connect, file, (long)&address, sizeof(address)) != 0)
		return vsock_failed("nothing listens there\n");
	child = syscall3(SYS_fork, 0, 0, 0);
	if (child == 0) {
		failed = copy(0, file);
		syscall3(SYS_shutdown, file, SHUT_WR, 0);
		return failed;
	}
	failed = copy(file, 1);
	/* The host may end first, and still want the rest. */
	syscall6(SYS_wait4, child, 0, 0, 0, 0, 0);
	return failed ? vsock_failed("the connection was reset\n") : 0;
}

/* Runs the command for each connection, which is its stdin and stdout. */
static int vsock_listen(unsigned port, char **command, char **environment)
{
	struct sockaddr_vm address = { .svm_family = AF_VSOCK, .svm_port = port, .svm_cid = VMADDR_CID_ANY };
	long file = syscall3(SYS_socket, AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0), connection;

	if (file < 0)
		return vsock_failed("this kernel has none, or its driver is not loaded\n");
	if (syscall3(SYS_bind, file, (long)&address, sizeof(address)) != 0 || syscall3(SYS_listen, file, 128, 0) != 0)
		return vsock_failed("cannot listen at this port\n");
	for (;;) {
		connection = syscall6(SYS_accept4, file, 0, 0, SOCK_CLOEXEC, 0, 0);
		if (connection >= 0 && syscall3(SYS_fork, 0, 0, 0) == 0) {
			syscall3(SYS_dup2, connection, 0, 0);
			syscall3(SYS_dup2, connection, 1, 0);
			execute(command, environment);
			return vsock_failed("cannot run the command\n");
		}
		syscall3(SYS_close, connection, 0, 0);
		while (syscall6(SYS_wait4, -1, 0, WNOHANG, 0, 0, 0) > 0)
			;
	}
}

static int run(long argc, char **argv)
{
	static const char usage[] =
		"Usage: guestctl exit N    end the virtual machine; N (0-255) is the monitor's exit status\n"
		"       guestctl drain     wait until the console has sent all that was written to it\n"
		"       guestctl mark N    a boot mark N (0-255) for the monitor's timeline\n"
		"       guestctl probe N   print the kernel's release and end with status N\n"
		"       guestctl snapshot N [COMMAND [ARGUMENT...]]\n"
		"                          boot mark N, at which the monitor may save the machine, then COMMAND. In a restored\n"
		"                          machine, /dev/urandom is reseeded and the clock set before; the argument that it was\n"
		"                          restored with is $MINIVMM_ARGUMENT, beside $MINIVMM_INDEX and $MINIVMM_GENERATION, or,\n"
		"                          without a command, printed\n"
		"       guestctl vsock connect CID PORT\n"
		"                          send stdin to a socket of the host (context ID 2), and what comes from there to stdout\n"
		"       guestctl vsock listen PORT COMMAND [ARGUMENT...]\n"
		"                          run COMMAND for each connection from the host, as its stdin and stdout\n"
		"exit, mark and snapshot need root (CAP_SYS_RAWIO, snapshot also CAP_SYS_ADMIN and CAP_SYS_TIME).\n";
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
	if (argc >= 3 && equal(argv[1], "snapshot") && (value = byte(argv[2])) >= 0)
		return snapshot_and_run(value, argv + 3, argv + argc + 1);
	if (argc == 5 && equal(argv[1], "vsock") && equal(argv[2], "connect") &&
	    port_number(argv[3]) != VMADDR_PORT_ANY && port_number(argv[4]) != VMADDR_PORT_ANY)
		return vsock_connect(port_number(argv[3]), port_number(argv[4]));
	if (argc >= 5 && equal(argv[1], "vsock") && equal(argv[2], "listen") && port_number(argv[3]) != VMADDR_PORT_ANY)
		return vsock_listen(port_number(argv[3]), argv + 4, argv + argc + 1);
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
