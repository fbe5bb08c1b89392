# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by the unit tests."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest


def _needs(*names: str) -> None:
    from surg_perception.surgllm.base_models import BaseModelMissing, find_base_model

    for name in names:
        try:
            find_base_model(name)
        except BaseModelMissing as error:
            pytest.skip(str(error).splitlines()[0])


@pytest.fixture
def caplog(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """pytest's own, which also hears this package's loggers beside ROS's `launch`.

    Once `launch` is imported, new loggers do not pass records on to the root, where pytest listens.
    """
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith("surg_perception") and isinstance(logger, logging.Logger):
            monkeypatch.setattr(logger, "propagate", True)
    return caplog


@pytest.fixture(scope="session")
def sentence_model() -> None:
    """The sentence encoder is on this machine."""
    _needs("all-minilm-l6-v2")


@pytest.fixture(scope="session")
def smollm2(sentence_model: None) -> str:
    """The language model of `small` is on this machine; its name."""
    _needs("smollm2-135m-instruct")
    return "smollm2-135m-instruct"


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Frames and features that the trainings of `tiny` share."""
    return tmp_path_factory.mktemp("surgllm_cache")


@pytest.fixture(scope="session")
def tiny_surgllm(sentence_model: None, tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folder of a `tiny` SurgLLM that went through all stages. Read only: others use it too."""
    from tiny_surgllm import train

    return train(tmp_path_factory.mktemp("surgllm") / "tiny", tiny_cache).folder
