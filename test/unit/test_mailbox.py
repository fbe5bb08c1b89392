# SPDX-License-Identifier: Apache-2.0
"""The mailbox hands over the newest item, counts the rest, and never hangs a thread."""

from __future__ import annotations

import threading
import time

import pytest

from surg_perception.stream.mailbox import Mailbox, MailboxCounts


def test_the_newest_item_wins_and_replacements_are_counted():
    mailbox: Mailbox[int] = Mailbox()
    for item in (1, 2, 3):
        assert mailbox.put(item)
    assert mailbox.counts() == MailboxCounts(received=3, replaced=2, taken=0, pending=1)
    assert mailbox.get(0) == 3
    assert mailbox.get(0) is None
    assert mailbox.counts() == MailboxCounts(received=3, replaced=2, taken=1, pending=0)


def test_falsy_items_count_as_items_and_none_is_refused():
    mailbox: Mailbox[int] = Mailbox()
    mailbox.put(0)
    mailbox.put(0)
    assert mailbox.counts().replaced == 1
    assert mailbox.get(0) == 0
    with pytest.raises(ValueError, match="None"):
        mailbox.put(None)


def test_get_waits_for_an_item_from_another_thread():
    mailbox: Mailbox[str] = Mailbox()
    timer = threading.Timer(0.05, mailbox.put, ["frame"])
    timer.start()
    assert mailbox.get(10.0) == "frame"
    timer.join()


def test_get_gives_up_after_its_timeout():
    started_s = time.monotonic()
    assert Mailbox().get(0.05) is None
    assert time.monotonic() - started_s >= 0.05


@pytest.mark.parametrize("timeout_s", [None, 60.0])
def test_close_wakes_every_waiter(timeout_s):
    mailbox: Mailbox[int] = Mailbox()
    got: list[object] = []
    waiters = [threading.Thread(target=lambda: got.append(mailbox.get(timeout_s)), daemon=True) for _ in range(3)]
    for waiter in waiters:
        waiter.start()
    time.sleep(0.05)
    mailbox.close()
    mailbox.close()
    for waiter in waiters:
        waiter.join(10.0)
    assert got == [None, None, None]


def test_a_closed_mailbox_refuses_and_keeps_its_counts():
    mailbox: Mailbox[int] = Mailbox()
    mailbox.put(1)
    mailbox.close()
    assert mailbox.closed
    assert not mailbox.put(2)
    assert mailbox.get() is None
    assert mailbox.counts() == MailboxCounts(received=1, replaced=0, taken=0, pending=1)


def test_counts_add_up_at_every_moment_with_many_threads():
    mailbox: Mailbox[int] = Mailbox()
    per_writer, writers, readers = 4000, 4, 2
    taken: list[list[int]] = [[] for _ in range(readers)]
    wrong: list[MailboxCounts] = []
    done = threading.Event()

    def write(writer: int) -> None:
        for number in range(per_writer):
            mailbox.put(writer * per_writer + number)

    def read(reader: int) -> None:
        while (item := mailbox.get()) is not None:
            taken[reader].append(item)

    def watch() -> None:
        while not done.is_set():
            counts = mailbox.counts()
            if counts.received != counts.taken + counts.replaced + counts.pending:
                wrong.append(counts)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(writers)]
    others = [threading.Thread(target=read, args=(i,)) for i in range(readers)]
    others.append(threading.Thread(target=watch))
    for thread in threads + others:
        thread.start()
    for thread in threads:
        thread.join()
    while mailbox.counts().pending:
        time.sleep(0.001)
    mailbox.close()
    done.set()
    for thread in others:
        thread.join(10.0)

    counts = mailbox.counts()
    everything = [item for items in taken for item in items]
    assert not wrong
    assert counts.received == per_writer * writers
    assert counts.taken == len(everything) == len(set(everything))
    assert counts.received == counts.taken + counts.replaced
    for items in taken:  # what one reader sees of one writer is in order
        for writer in range(writers):
            own = [item for item in items if item // per_writer == writer]
            assert own == sorted(own)
