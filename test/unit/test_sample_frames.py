# SPDX-License-Identifier: Apache-2.0
"""The pictures that engines are compared on: the phantom's, and a damaged file is said to be one."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from surg_perception.runtime import agreement

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "write_sample_frames.py"


def test_the_pictures_are_those_that_the_script_draws() -> None:
    drawn = runpy.run_path(str(SCRIPT))["pictures"]().reshape(agreement.reference_frames().shape)
    # Another OpenCV may round another way.
    assert np.abs(drawn.astype(int) - agreement.reference_frames()).mean() < 0.5


@pytest.fixture
def unread() -> Iterator[None]:
    """Nothing remembered of the file, before and after."""
    agreement.reference_frames.cache_clear()
    yield
    agreement.reference_frames.cache_clear()


@pytest.mark.parametrize("content", [None, b"", b"no picture", "cut"])
def test_a_missing_or_damaged_file_is_named(
    content: bytes | str | None, unread: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sample_frames.png"
    if content == "cut":
        import cv2

        assert cv2.imwrite(str(path), np.zeros((224, 224, 3), np.uint8))
    elif isinstance(content, bytes):
        path.write_bytes(content)
    monkeypatch.setattr(agreement, "FRAMES_FILE", path)
    with pytest.raises(RuntimeError, match=r"sample_frames\.png (cannot be read|has shape \[224, 224, 3\]).*install"):
        agreement.reference_frames()
