"""A stand-in for a GPU's memory: copies that run in a thread, late, and chunks that hold poison until they are done."""

from __future__ import annotations

import random
import threading
import time
from queue import Queue

import torch

POISON = 0xA5


class LateCopies:
    """What `collectives.staged.Copies` asks for, over a tensor in host memory.

    Host memory is poisoned when a fetch begins and filled only when the copy is done; a store reads it only then, and
    poisons it afterwards, as another message might use it. So whoever is too early, or too late, sees wrong bytes.
    """

    def __init__(self, tensor, seed=1, longest_s=0.002):
        self.bytes = tensor.detach().view(torch.uint8)
        self.size = len(self.bytes)
        self.random, self.longest_s = random.Random(seed), longest_s
        self.engine = Engine()

    def host(self, size):
        return torch.full((size,), POISON, dtype=torch.uint8)

    def fetch(self, host, low):
        host.fill_(POISON)
        return self._late(lambda: host.copy_(self.bytes[low : low + len(host)]))

    def store(self, host, low):
        def copy():
            self.bytes[low : low + len(host)].copy_(host)
            host.fill_(POISON)

        return self._late(copy)

    def _late(self, copy):
        done = threading.Event()
        self.engine.queue.put((self.random.uniform(0, self.longest_s), copy, done))
        return done.is_set


class Engine:
    """A thread that copies in the order of the calls, as a stream does."""

    def __init__(self):
        self.queue = Queue()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        while True:
            delay, copy, done = self.queue.get()
            time.sleep(delay)
            copy()
            done.set()
