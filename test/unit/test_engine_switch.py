# SPDX-License-Identifier: Apache-2.0
"""An engine made ready in the background: tries, pauses, one taker, cancellation."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest

from surg_perception.nodes import engine_switch
from surg_perception.nodes.engine_switch import STEADY_S, BackOff, EngineSwitch

PATIENCE_S = 60.0


class Engine:
    def __init__(self) -> None:
        self.closed = False

    def close(self) -> None:
        self.closed = True


def until(condition: Callable[[], Any]) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.005)


def test_pauses_double_and_are_short_again_after_a_long_success(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [5000.0]
    monkeypatch.setattr(engine_switch, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    back_off = BackOff(10.0)
    assert list(islice(back_off.pauses_s(), 6)) == [10, 20, 40, 80, 120, 120]
    back_off.succeeded()
    clock[0] += STEADY_S / 2
    assert next(back_off.pauses_s()) == 120, "it failed again soon"
    back_off.succeeded()
    clock[0] += STEADY_S + 1
    assert list(islice(back_off.pauses_s(), 2)) == [10, 20]
    assert list(islice(BackOff(300.0).pauses_s(), 3)) == [300, 300, 300], "never shorter than asked for"


def test_a_switch_tries_until_it_succeeds_and_gives_once() -> None:
    engine = Engine()
    outcomes: list[Any] = [RuntimeError("away"), RuntimeError("away"), ValueError("another model"), engine]
    told: list[str] = []
    proceed = threading.Semaphore(0)

    def load(builder: Any) -> Any:
        proceed.acquire()
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    switch = EngineSwitch("the server", load, told.append, iter([0.0] * 9))
    assert switch.progress == "the server is on its way"
    for left, failure, new in ((3, "away", "away"), (2, "away", ""), (1, "another model", "another model")):
        proceed.release()
        until(lambda left=left: len(outcomes) == left)
        until(lambda failure=failure: switch.failure == failure)
        assert (switch.new_failure(), switch.new_failure()) == (new, "")
        assert switch.take() is None
    proceed.release()
    until(lambda: switch.progress == "the server is loaded and checked")
    assert switch.take() is engine
    assert switch.take() is None
    switch.cancel()
    assert not engine.closed, "it belongs to who took it"


def test_without_pauses_left_it_gives_up() -> None:
    tries = []

    def load(builder: Any) -> Any:
        tries.append(1)
        raise RuntimeError("no")

    switch = EngineSwitch("it", load, print)
    switch._thread.join(PATIENCE_S)
    assert not switch._thread.is_alive()
    assert (len(tries), switch.failure, switch.take()) == (1, "no", None)


def test_cancel_ends_the_waiting_and_closes_what_came() -> None:
    waiting = EngineSwitch("it", lambda builder: pytest.fail("tried"), print, [3600.0])
    waiting.cancel()
    waiting._thread.join(PATIENCE_S)
    assert not waiting._thread.is_alive()

    ready = Engine()
    switch = EngineSwitch("it", lambda builder: ready, print)
    switch._thread.join(PATIENCE_S)
    switch.cancel()
    assert ready.closed
    assert switch.take() is None

    late, begun, proceed = Engine(), threading.Event(), threading.Event()

    def load(builder: Any) -> Any:
        begun.set()
        assert proceed.wait(PATIENCE_S)
        return late

    loading = EngineSwitch("it", load, print)
    assert begun.wait(PATIENCE_S)
    loading.cancel()
    proceed.set()
    loading._thread.join(PATIENCE_S)
    assert late.closed
    assert loading.take() is None
