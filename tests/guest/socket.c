/* What the demo guest's busybox cannot do on a network, for tests/guest/net. */
#include <arpa/inet.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static int fail(const char *what)
{
	perror(what);
	return 1;
}

/* A socket that is connected to this address, or bound to "::". */
static int open_socket(const char *host, const char *port, int type)
{
	struct sockaddr_in6 to = { .sin6_family = AF_INET6, .sin6_port = htons(atoi(port)) };
	char mapped[64];
	int fd = socket(AF_INET6, type, 0);

	snprintf(mapped, sizeof(mapped), "%s%s", strchr(host, ':') ? "" : "::ffff:", host);
	if (inet_pton(AF_INET6, mapped, &to.sin6_addr) != 1 || fd < 0 ||
	    (strcmp(host, "::") ? connect : bind)(fd, (struct sockaddr *)&to, sizeof(to))) {
		perror(host);
		exit(1);
	}
	return fd;
}

/* Sends a word until an answer comes. */
static int udp(const char *host, const char *port, const char *word)
{
	int fd = open_socket(host, port, SOCK_DGRAM);
	char answer[2048];

	for (int tries = 0; tries < 100; tries++) {
		struct pollfd readable = { .fd = fd, .events = POLLIN };
		ssize_t len;

		if (send(fd, word, strlen(word), 0) < 0)
			return fail("send");
		if (poll(&readable, 1, 1000) != 1)
			continue;
		len = recv(fd, answer, sizeof(answer), 0);
		if (len >= 0) {
			printf("answer %.*s\n", (int)len, answer);
			return 0;
		}
	}
	return fail("no answer");
}

/* Answers each datagram with the same. */
static int udp_server(const char *port)
{
	int fd = open_socket("::", port, SOCK_DGRAM);

	for (;;) {
		char bytes[65536];
		struct sockaddr_storage from;
		socklen_t from_len = sizeof(from);
		ssize_t len = recvfrom(fd, bytes, sizeof(bytes), 0, (struct sockaddr *)&from, &from_len);

		if (len < 0)
			return fail("recvfrom");
		sendto(fd, bytes, len, 0, (struct sockaddr *)&from, from_len);
	}
}

/* Opens connections, all at once, and reads a byte of each, which comes when the other end has all. */
static int many(const char *host, const char *port, int count)
{
	int *fds = calloc(count, sizeof(*fds));

	for (int i = 0; i < count; i++)
		fds[i] = open_socket(host, port, SOCK_STREAM);
	for (int i = 0; i < count; i++) {
		char byte;

		if (read(fds[i], &byte, 1) != 1)
			return fail("read");
	}
	printf("many %d\n", count);
	return 0;
}

/* Sends all of the standard input, in large blocks: busybox's nc writes 1 KiB at a time. */
static int send_all(const char *host, const char *port)
{
	int fd = open_socket(host, port, SOCK_STREAM);
	static char block[65536];
	ssize_t len;

	while ((len = read(0, block, sizeof(block))) > 0)
		for (ssize_t done = 0, sent; done < len; done += sent) {
			sent = write(fd, block + done, len - done);
			if (sent < 0)
				return fail("write");
		}
	return len ? fail("read") : 0;
}

int main(int argc, char **argv)
{
	if (argc == 5 && !strcmp(argv[1], "udp"))
		return udp(argv[2], argv[3], argv[4]);
	if (argc == 3 && !strcmp(argv[1], "udp-server"))
		return udp_server(argv[2]);
	if (argc == 5 && !strcmp(argv[1], "many"))
		return many(argv[2], argv[3], atoi(argv[4]));
	if (argc == 4 && !strcmp(argv[1], "send"))
		return send_all(argv[2], argv[3]);
	return 2;
}
