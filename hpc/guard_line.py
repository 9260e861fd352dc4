"""What the guards of a job's hosts tell each other, by datagrams. Only Python's own library."""

from __future__ import annotations

import fcntl
import json
import secrets
import socket
import struct
import time
from contextlib import suppress
from typing import Any

SIOCGIFADDR = 0x8915
DATAGRAM = 1400  # bytes


class Line:
    """What guards tell each other: JSON datagrams with the job's secret. The hub hears all, the others hear the hub.

    hub  whether this is the guard of rank 0's host
    """

    def __init__(self, hub: bool):
        self.hub = hub
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        self.socket.bind(("", 0))
        self.secret, self.me = "", ""
        self.addresses: dict[str, list[tuple[str, int]]] = {}  # guard -> where it is, or may be
        self.heard: dict[str, float] = {}  # guard -> when last

    def reachable_at(self) -> list[tuple[str, int]]:
        """Where others may reach this host: the address of every interface that is up, loopback last."""
        port, found = self.socket.getsockname()[1], []
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                packed = fcntl.ioctl(self.socket.fileno(), SIOCGIFADDR, struct.pack("256s", name[:15].encode()))
                found.append((socket.inet_ntoa(packed[20:24]), port))
        return sorted(found, key=lambda a: a[0].startswith("127."))

    @property
    def alone(self) -> bool:
        return not self.addresses

    def say(self, what: str, **more: Any) -> None:
        """Tell every guard that this one hears."""
        text = json.dumps({"secret": self.secret, "from": self.me, "say": what, **more}).encode()
        assert len(text) <= DATAGRAM, "texts are short where they are made"
        for places in self.addresses.values():
            for address in places:
                with suppress(OSError):
                    self.socket.sendto(text, address)

    def hear(self) -> list[dict[str, Any]]:
        """What was told since the last call, by guards of this job."""
        found = []
        with suppress(BlockingIOError):
            while True:
                text, address = self.socket.recvfrom(DATAGRAM)
                with suppress(ValueError, KeyError, TypeError, AttributeError):
                    told = json.loads(text)
                    if secrets.compare_digest(str(told["secret"]), self.secret):
                        sender = str(told["from"])
                        self.addresses[sender] = [address]  # the one that works
                        self.heard[sender] = time.monotonic()
                        found.append(told)
        return found
