# SPDX-License-Identifier: Apache-2.0
"""`surg-perception ask`: what it prints and its exit status; test/ros/test_vqa_node.py asks a real node."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from surg_perception.cli.ask import TextStream, details
from surg_perception.cli.main import main


def reply(**changes: Any) -> SimpleNamespace:
    """An answer as Answer.Result has it."""
    fields = {
        "error_code": 0,
        "error_message": "",
        "answer": "dissecting the gallbladder",
        "task": "triplet",
        "task_probability": 0.987,
        "confidence": 0.5,
        "first_stamp": SimpleNamespace(sec=12, nanosec=250_000_000),
        "last_stamp": SimpleNamespace(sec=21, nanosec=0),
        "frames_used": 10,
        "first_token_ms": 640.4,
        "total_ms": 1830.0,
        "model_id": "m@0123456789ab",
        "backend": "torch:CPU:bf16",
    }
    return SimpleNamespace(**{**fields, **changes})


def client(monkeypatch: pytest.MonkeyPatch, result: Any, interrupted: bool = False) -> list[dict[str, Any]]:
    """Replace the ROS side by one that streams two words and gives this result; returns what it is asked."""
    asked: list[dict[str, Any]] = []

    def ask(question: str, *, on_text: Any, **options: Any) -> tuple[Any, bool]:
        asked.append({"question": question, **options})
        if isinstance(result, Exception):
            raise result
        on_text("dissecting")
        on_text("dissecting the")
        return result, interrupted

    module = SimpleNamespace(ask=ask, CODE_NAMES={0: "NONE", 1: "BUSY", 7: "CANCELED"})
    monkeypatch.setitem(sys.modules, "surg_perception.nodes.ask_client", module)
    monkeypatch.setattr("surg_perception.nodes.ask_client", module, raising=False)
    return asked


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["surg-perception", "ask", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_an_answer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = client(monkeypatch, reply())
    options = ("--task", "triplet", "--window", "16", "--namespace", "or1", "--timeout", "5")
    assert run(monkeypatch, "What is the hook doing?", *options) == 0
    assert asked == [
        {
            "question": "What is the hook doing?",
            "task": "triplet",
            "window_s": 16.0,
            "namespace": "or1",
            "timeout_s": 5.0,
        }
    ]
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "dissecting the gallbladder", "what was streamed is not said twice"
    for fact in ("triplet (probability 0.99)", "0.50", "10, stamped 12.250 to 21.000", "640 ms", "1830 ms", "m@01"):
        assert fact in out
    assert not err


def test_only_an_answer_without_error_code_ends_with_zero(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client(monkeypatch, reply(error_code=1, error_message="another question is being answered"))
    assert run(monkeypatch, "Where is the hook?") == 1
    assert capsys.readouterr().err == "BUSY: another question is being answered\n"
    client(monkeypatch, reply(error_code=7, error_message="canceled by the client"), interrupted=True)
    assert run(monkeypatch, "Where is the hook?") == 130
    assert "CANCELED" in capsys.readouterr().err
    client(monkeypatch, TimeoutError("there is no action /surg_perception/answer"))
    assert run(monkeypatch, "Where is the hook?") == 2
    assert capsys.readouterr().err == "surg-perception: there is no action /surg_perception/answer\n"


def test_without_ros(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delitem(sys.modules, "surg_perception.nodes.ask_client", raising=False)
    monkeypatch.delattr("surg_perception.nodes.ask_client", raising=False)
    monkeypatch.setitem(sys.modules, "rclpy", None)
    assert run(monkeypatch, "Where is the hook?") == 2
    assert "source setup.bash" in capsys.readouterr().err


def test_text_that_changes_what_was_written_starts_anew(capsys: pytest.CaptureFixture[str]) -> None:
    write = TextStream()
    for text in ("a", "ab", "ab", "ax", "axy"):
        write(text)
    assert capsys.readouterr().out == "ab\naxy"


def test_nothing_is_said_of_what_is_not_known() -> None:
    empty = reply(task="", frames_used=0, first_token_ms=0.0, model_id="")
    assert details(empty) == []
