"""A client of Firecracker's vsock protocol: sends to a port of the guest that echoes, and compares hashes.

Usage: vsock.py SOCKET PORT CONNECTIONS BYTES
"""

import hashlib
import os
import socket
import sys
import threading
import time


def connect(path, port):
    """A stream to this port of the guest, once it listens."""
    while True:
        stream = socket.socket(socket.AF_UNIX)
        stream.connect(path)
        stream.sendall(b"CONNECT %d\n" % port)
        line = b""
        while not line.endswith(b"\n"):
            byte = stream.recv(1)
            if not byte:
                break
            line += byte
        if line:
            words = line.split()
            assert words[0] == b"OK" and int(words[1]) >= 1 << 30, line
            return stream
        stream.close()
        time.sleep(0.1)


def send(stream, size, digest):
    block = os.urandom(64 << 10)
    while size > 0:
        part = block[:size]
        stream.sendall(part)
        digest.update(part)
        size -= len(part)
        block = block[1:] + block[:1]
    stream.shutdown(socket.SHUT_WR)


def echo(stream, size, same):
    sent, received, count = hashlib.sha256(), hashlib.sha256(), 0
    sender = threading.Thread(target=send, args=(stream, size, sent))
    sender.start()
    while part := stream.recv(64 << 10):
        received.update(part)
        count += len(part)
    sender.join()
    if count == size and sent.digest() == received.digest():
        same.append(stream)


def main():
    path, port, connections, size = sys.argv[1], *map(int, sys.argv[2:])
    streams = [connect(path, port) for _ in range(connections)]
    same = []
    threads = [threading.Thread(target=echo, args=(stream, size, same)) for stream in streams]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"{len(same)} of {connections} echoed {size} bytes")


main()
