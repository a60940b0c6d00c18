"""Whose turn it is among the notebooks that run at once: cells share the cores, one that measures time has them alone."""

import fcntl
import os
from pathlib import Path


class Turns:
    """One notebook's turns; a process that ends gives its own back.

    A second lock, held while one waits for the first, keeps those that share from going ahead of one that wants to be
    alone.
    """

    def __init__(self, folder):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.queue, self.lock = (os.open(folder / name, os.O_RDWR | os.O_CREAT) for name in ("queue.lock", "turn.lock"))

    def take(self, alone):
        """Give back the turn that there is, and wait for the next: alone, or beside all others that are not."""
        fcntl.flock(self.lock, fcntl.LOCK_UN)
        fcntl.flock(self.queue, fcntl.LOCK_EX)
        fcntl.flock(self.lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(self.queue, fcntl.LOCK_UN)
