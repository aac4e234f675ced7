/*
 * What runs in a guest that is saved and restored, as tests/restore.rs asks: a process for each CPU, bound to it, that sleeps 1 ms
 * again and again and looks at the clocks. SIGUSR1 asks it what it has seen: it sleeps 100 times more, prints a line and ends.
 *
 * With an argument, it answers each line that it reads with the time of day, until there are no more.
 */
#define _GNU_SOURCE
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MILLISECOND = 1000000, AFTER = 100 };

static volatile sig_atomic_t asked;

static void on_signal(int signal)
{
	(void)signal;
	asked = 1;
}

static long long now(clockid_t clock)
{
	struct timespec time;

	clock_gettime(clock, &time);
	return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static int watch(int cpu)
{
	const struct timespec pause = { 0, MILLISECOND };
	long long last = now(CLOCK_MONOTONIC), time, longest = 0, wall;
	unsigned char random[16];
	char line[160];
	int length;
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (sched_setaffinity(0, sizeof(set), &set) != 0)
		return 1;
	for (int left = AFTER; left > 0; last = time, left -= asked) {
		/* The signal interrupts it: it begins anew. */
		while (clock_nanosleep(CLOCK_MONOTONIC, 0, &pause, NULL) != 0)
			;
		time = now(CLOCK_MONOTONIC);
		if (time < last + MILLISECOND) {
			printf("cpu %d: after 1 ms the clock stood at %lld, before at %lld\n", cpu, time, last);
			return 1;
		}
		if (time - last > longest)
			longest = time - last;
	}
	wall = now(CLOCK_REALTIME);
	if (getrandom(random, sizeof(random), 0) != sizeof(random))
		return 1;
	length = snprintf(line, sizeof(line), "cpu %d slept at most %lld us, wall %lld us, getrandom ", cpu, longest / 1000, wall / 1000);
	for (unsigned int i = 0; i < sizeof(random); i++)
		length += snprintf(line + length, sizeof(line) - length, "%02x", random[i]);
	line[length++] = '\n';
	return write(1, line, length) != length;
}

static int tell_time(void)
{
	char line[80];

	while (fgets(line, sizeof(line), stdin) != NULL) {
		printf("wall %lld us\n", now(CLOCK_REALTIME) / 1000);
		fflush(stdout);
	}
	return 0;
}

int main(int argc, char **argv)
{
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);
	int status, failed = 0;

	(void)argv;
	if (argc > 1)
		return tell_time();
	signal(SIGUSR1, on_signal);
	for (int cpu = 0; cpu < cpus; cpu++)
		if (fork() == 0)
			_exit(watch(cpu));
	while (cpus > 0)
		if (wait(&status) > 0) {
			cpus--;
			failed |= status;
		}
	puts(failed ? "witnesses failed" : "witnesses done");
	return failed != 0;
}
