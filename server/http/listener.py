"""The sockets a server listens on, and how many connections the system has room for."""

import resource
import socket
from contextlib import ExitStack

import psutil

from server.errors import InvalidSettings

# Connections that one turn of the event loop takes from the system.
BACKLOG = 128
# Files that are opened beside connections: databases, blobs, checkpoints.
RESERVED_FILES = 64
# Bytes the system keeps for a client that does not read. Without a bound it keeps megabytes, so that nobody notices.
SEND_BUFFER = 256 * 1024


def bind(host: str, port: int) -> list[socket.socket]:
    """Sockets bound to `host`, all to one port, not listening yet: who connects is refused until the server is ready.

    Raises:
        InvalidSettings: the port is taken, or the host is none of this machine.
    """
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise InvalidSettings(f"the host {host} is not known: {error.strerror}", param="host",
                              fix="Use 127.0.0.1, or an address of this machine with an API key.") from None
    with ExitStack() as opened:
        sockets: list[socket.socket] = []
        for family, kind, protocol, _, address in dict.fromkeys(found):
            sock = opened.enter_context(socket.socket(family, kind, protocol))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                # Port 0 is the system's choice for the first address, and the same for the others.
                sock.bind((address[0], port or (sockets[0].getsockname()[1] if sockets else 0), *address[2:]))
            except OSError as error:
                raise InvalidSettings(f"{host} port {port} cannot be listened on: {error.strerror}", param="port",
                                      fix="Stop the other server, or choose another port: --port.") from None
            sockets.append(sock)
        opened.pop_all()
    return sockets


def connection_limit(wanted: int) -> int:
    """How many connections may be open at once: as many as wanted, or as the system's limit of open files leaves. The
    limit is raised as far as that is allowed."""
    open_files = psutil.Process().num_fds() + BACKLOG + RESERVED_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted + open_files:
        soft = wanted + open_files if hard == resource.RLIM_INFINITY else min(hard, wanted + open_files)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return wanted
    return max(1, min(wanted, soft - open_files))
