# SPDX-License-Identifier: Apache-2.0
"""The newest frame, and nothing older: what a live stream puts between its callback and its worker."""

from __future__ import annotations

import threading
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class MailboxCounts(NamedTuple):
    """A consistent snapshot; `received == taken + replaced + pending` in each."""

    received: int
    replaced: int
    taken: int
    pending: int


class Mailbox(Generic[T]):
    """One slot between threads. A newer item replaces an unread one, and each replacement is counted."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._item: T | None = None
        self._received = self._replaced = self._taken = 0
        self._closed = False

    def put(self, item: T) -> bool:
        """Offer an item (not None); never blocks on the reader. False, and not counted, once closed."""
        if item is None:
            raise ValueError("a mailbox cannot hold None: get() answers None when there is nothing")
        with self._changed:
            if self._closed:
                return False
            self._received += 1
            self._replaced += self._item is not None
            self._item = item
            self._changed.notify()
            return True

    def get(self, timeout_s: float | None = None) -> T | None:
        """Take the newest item, waiting up to `timeout_s` seconds (None: without limit).

        None after the timeout, and at once when the mailbox is closed; an item still unread then stays
        counted as pending.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._item is not None, timeout_s)
            if self._closed or self._item is None:
                return None
            item, self._item = self._item, None
            self._taken += 1
            return item

    def close(self) -> None:
        """Wake every waiter and refuse what comes after. May be called again."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._closed

    def counts(self) -> MailboxCounts:
        """Counters since construction."""
        with self._changed:
            pending = int(self._item is not None)
            return MailboxCounts(self._received, self._replaced, self._taken, pending)
