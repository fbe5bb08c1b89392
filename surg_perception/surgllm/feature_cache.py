# SPDX-License-Identifier: Apache-2.0
"""The seconds of a video, resized, and what the frozen stem makes of them, on disk: no stage computes them twice."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from surg_perception.data.clip_labels import ClipVideo
from surg_perception.data.label_files import DatasetError
from surg_perception.stream.image_decode import resize_to_model_input
from surg_perception.surgllm.encoder import VideoEncoder

_FORMAT = "1"
_CHUNK = 16  # frames at a time: enough to keep the convolutions busy


def cached_clip_frames(
    videos: Sequence[ClipVideo], size: int, cache: Path, progress: Callable[[int, int], None] | None = None
) -> dict[str, NDArray[np.uint8]]:
    """Every second of every video as the encoder sees it, in memory maps that are written once.

    Args:
        videos: with names of their own.
        size: side in pixels; frames are resized by plain bilinear interpolation.
        cache: folder, made if it does not exist; 110 kB a second at 192 pixels.
        progress: called with (seconds done, seconds of all videos).

    Returns:
        For each video's name uint8 BGR [seconds, size, size, 3].

    Raises:
        DatasetError: a frame cannot be read, or the disk is full.
    """
    total, done = sum(len(video) for video in videos), 0
    frames: dict[str, NDArray[np.uint8]] = {}
    for video in videos:
        key = hashlib.sha256("\n".join([_FORMAT, str(size), cv2.__version__, video.fingerprint()]).encode()).hexdigest()
        file = cache / f"{re.sub(r'[^A-Za-z0-9._-]', '_', video.name)}-frames-{key[:24]}.npy"
        if not file.exists():
            pictures = [resize_to_model_input(frame, size) for frame in video.frames(range(len(video)))]
            write_array(file, np.stack(pictures), video.name)
        frames[video.name] = np.load(file, mmap_mode="r")
        done += len(video)
        if progress:
            progress(done, total)
    return frames


def cached_features(
    encoder: VideoEncoder,
    videos: Sequence[ClipVideo],
    cache: Path,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, NDArray[np.float16]]:
    """`encoder.features` of every second of every video, as read-only memory maps, which threads may share.

    Frames are resized to the encoder's input by plain bilinear interpolation. A file is written at the first call
    and found again while nothing that decides it changes: the stem and its weights, the input size, the video, the
    decoder. It appears when it is whole; where two processes want it at once, both make it and the last one stays.

    Args:
        encoder: its stem must not be trained afterwards.
        videos: with names of their own.
        cache: folder, made if it does not exist; 32 kB a second for the model `small`.
        progress: called with (seconds done, seconds of all videos).

    Returns:
        For each video's name float16 [seconds, C, h, w].

    Raises:
        DatasetError: a frame cannot be read, a feature is not a finite float16, or the disk is full.
    """
    stem = _stem_digest(encoder)
    total, done = sum(len(video) for video in videos), 0
    features: dict[str, NDArray[np.float16]] = {}
    for video in videos:
        key = hashlib.sha256("\n".join([_FORMAT, stem, cv2.__version__, video.fingerprint()]).encode()).hexdigest()
        file = cache / f"{re.sub(r'[^A-Za-z0-9._-]', '_', video.name)}-{key[:24]}.npy"
        if not file.exists():
            frames = cached_clip_frames([video], encoder.config.image_size, cache)[video.name]
            write_array(file, _features_of(encoder, video, frames), video.name)
        features[video.name] = np.load(file, mmap_mode="r")
        done += len(video)
        if progress:
            progress(done, total)
    return features


def _stem_digest(encoder: VideoEncoder) -> str:
    """What decides the features beside the frames."""
    digest = hashlib.sha256(f"{encoder.config.stem} {encoder.config.image_size}".encode())
    for name, tensor in encoder.stem.state_dict().items():
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def _features_of(encoder: VideoEncoder, video: ClipVideo, frames: NDArray[np.uint8]) -> NDArray[np.float16]:
    """float16 [seconds, C, h, w]; a still that is shown for several seconds is computed once."""
    device = encoder.project.weight.device
    new = [i for i, index in enumerate(video.indices) if i == 0 or index != video.indices[i - 1]]
    chunks = []
    was_training = encoder.training
    encoder.eval()
    for first in range(0, len(new), _CHUNK):
        chunk = torch.from_numpy(frames[new[first : first + _CHUNK]]).to(device)
        chunks.append(encoder.features(chunk[None])[0].transpose(0, 1).half().cpu())
    encoder.train(was_training)
    found = torch.cat(chunks).numpy()
    if not np.isfinite(found).all():
        raise DatasetError(
            f"{video.name}: a feature of the stem is not a finite float16; are the stem's weights those of "
            "load_stem_weights?"
        )
    return np.repeat(found, np.diff([*new, len(video)]), axis=0)


def write_array(file: Path, content: NDArray[Any], name: str) -> None:
    """Write `.npy` so that it is there whole or not at all; raises DatasetError where the disk is full."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    try:
        with partial.open("wb") as stream:
            np.save(stream, content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise DatasetError(
            f"{name} cannot be cached in {file.parent}: {error.strerror or error}; it takes "
            f"{content.nbytes / 1e6:.1f} MB: make room or choose another folder"
        ) from error
