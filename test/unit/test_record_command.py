# SPDX-License-Identifier: Apache-2.0
"""Arguments of `surg-perception record`; recording itself is tested with ROS, in test/ros/test_record.py."""

from __future__ import annotations

import argparse

import pytest

from surg_perception.cli.main import parser
from surg_perception.cli.record import _topics, rectangle, run, size

KNOWN = {"image": "", "phase": "phase/phase", "latent": "phase/latent", "answers": "vqa/answered"}


@pytest.mark.parametrize(
    ("text", "found"), [("2GB", 2 * 10**9), ("500 mb", 5 * 10**8), ("1.5k", 1500), ("7", 7), ("0", 0), ("1T", 10**12)]
)
def test_sizes(text, found):
    assert size(text) == found


@pytest.mark.parametrize("text", ["", "-1GB", "2 apples", "GB", "1e3", "2GiB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="2GB or 500MB"):
        size(text)


def test_rectangles():
    assert rectangle("0,10,300,40") == (0, 10, 300, 40)
    for text in ("0,10,300", "0,10,300,-4", "a,b,c,d", "0;1;2;3"):
        with pytest.raises(argparse.ArgumentTypeError, match="x,y,width,height"):
            rectangle(text)


def chosen(*arguments: str, left_out: tuple[str, ...] = ()) -> tuple[str, ...]:
    return _topics(parser().parse_args(["record", "--out", "bag", *arguments]), KNOWN, left_out)


def test_topics_are_chosen_added_and_left_out():
    assert chosen() == tuple(KNOWN)
    assert chosen(left_out=("latent", "answers")) == ("image", "phase")
    assert chosen("--topics", "answers", left_out=("latent", "answers")) == ("answers",), "asked for is asked for"
    assert chosen("--without", "latent", "--also", "/joints", "image") == ("image", "phase", "answers", "/joints")
    with pytest.raises(ValueError, match="'phases' is no topic, expected one of image, phase"):
        chosen("--topics", "phases")
    with pytest.raises(ValueError, match="no topic is left"):
        chosen("--topics", "image", "--without", "image")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--no-deidentify"], "goes with --share"),
        (["--mask", "0,0,9,9"], "goes with --share"),
        (["--share", "--no-deidentify", "--mask", "0,0,9,9"], "goes with --share"),
        (["--keep-times"], "goes with --share"),
        (["--share", "--raw"], "exclude each other"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused_before_anything_starts(arguments, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        run(parser().parse_args(["record", "--out", str(tmp_path / "bag"), *arguments]))
    assert not (tmp_path / "bag").exists()


@pytest.mark.parametrize(
    "arguments", [[], ["--out", "b", "--seconds", "0"], ["--out", "b", "--jpeg-quality", "101"]], ids=str
)
def test_a_command_line_that_cannot_be_used_ends_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        parser().parse_args(["record", *arguments])
    assert end.value.code == 2
    assert capsys.readouterr().err
