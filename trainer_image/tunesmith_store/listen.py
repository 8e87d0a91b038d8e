"""A listening socket on every address of a pod, be its cluster of IPv4, IPv6 or both.

Used by the trainer's status server and the model server.
"""

from __future__ import annotations

import errno
import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

__all__ = ["PodHTTPServer", "listening_socket"]

BACKLOG = 1024


def listening_socket(port: int, ip: str = "") -> socket.socket:
    """Listen on that port, 0 for a free one; on all addresses unless one is named."""
    if ip:
        family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        return socket.create_server((ip, port), family=family, backlog=BACKLOG)
    try:
        return socket.create_server(("::", port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise
        # this machine has no IPv6
        return socket.create_server(("0.0.0.0", port), backlog=BACKLOG)  # noqa: S104 - guarded by a NetworkPolicy


class PodHTTPServer(ThreadingHTTPServer):
    """The standard library's HTTP server on a listening socket of ours, with a thread for each connection."""

    daemon_threads = True

    def __init__(self, port: int, handler: type[BaseHTTPRequestHandler], ip: str = "") -> None:
        listener = listening_socket(port, ip)
        super().__init__(listener.getsockname()[:2], handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
