# SPDX-License-Identifier: Apache-2.0
"""Draws the pictures on which engines are compared with fp32 (surg_perception/runtime/sample_frames.png).

.venv/bin/python scripts/write_sample_frames.py

They are the phantom's, so nobody's body. Measured agreements are of these pictures: draw them anew only with reason.
"""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from surg_perception.data.phantom import Phantom
from surg_perception.runtime.agreement import FRAMES, FRAMES_FILE
from surg_perception.runtime.graph import FRAME_SHAPE


def pictures() -> np.ndarray:
    """Sixteen pictures spread over the phantom's seven phases, below each other, uint8 [3584, 224, 3], BGR."""
    height, width, _ = FRAME_SHAPE
    phantom = Phantom(width=width, height=height, rate_hz=1.0, seed=0, duration_s=FRAMES * 10.0)
    indices = (np.arange(FRAMES) + 0.5) * len(phantom) / FRAMES
    return np.concatenate([phantom.frame(int(index))[0] for index in indices])


if __name__ == "__main__":
    if not cv2.imwrite(str(FRAMES_FILE), pictures(), [cv2.IMWRITE_PNG_COMPRESSION, 9]):
        sys.exit(f"could not write {FRAMES_FILE}")
