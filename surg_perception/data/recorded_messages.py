# SPDX-License-Identifier: Apache-2.0
"""What of a live message goes into a recording: pictures as JPEG; to be shared, nothing that says whose they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from surg_perception.data.bags import IMAGE_TYPES
from surg_perception.data.deidentify import Deidentifier, Rectangle, Shown
from surg_perception.data.ros_types import MESSAGES, typestore
from surg_perception.stream.image_decode import Bgr, ImageError, decode_image, encode_jpeg

COMPRESSED = "sensor_msgs/msg/CompressedImage"
EPOCH_NS = 946_684_800 * 10**9
"""Where the time of a shared recording begins: 2000-01-01, in no surgery's time zone."""
FRAME_ID = "endoscope"
_SAME_CLOCK_NS = 3600 * 10**9


@dataclass(frozen=True)
class Recorded:
    """A message as it is written; fields as BagWriter.write takes them."""

    topic: str
    msgtype: str
    log_ns: int
    raw: bytes


class PrivateMessages:
    """Messages for one's own use: as they came, save that raw images become JPEG.

    Args:
        jpeg_quality: 1 to 100; 0 keeps raw images.

    Attributes:
        unreadable: messages and images that could not be decoded and were left out, by the reason.
    """

    def __init__(self, jpeg_quality: int = 90) -> None:
        self.unreadable: Counter[str] = Counter()
        self._quality = jpeg_quality

    def outgoing(self, topic: str, msgtype: str) -> tuple[str, str]:
        """Topic and type in the bag of what comes on topic."""
        if msgtype == "sensor_msgs/msg/Image" and self._quality:
            return f"{topic}/compressed", COMPRESSED
        return topic, msgtype

    def __call__(self, topic: str, msgtype: str, log_ns: int, raw: bytes) -> Recorded | None:
        """The message as it is written; None where it is left out."""
        name, kept_type = self.outgoing(topic, msgtype)
        if kept_type == msgtype:
            return Recorded(name, msgtype, log_ns, raw)
        image = _read(topic, msgtype, raw, self.unreadable)
        picture = None if image is None else _decoded(image, self.unreadable)
        if picture is None:
            return None
        return Recorded(name, kept_type, log_ns, _jpeg_message(picture, image.header, self._quality))


class SharedMessages:
    """Messages for others: images go through `Deidentifier`, other messages lose what could name anybody.

    Topics get names of their own, frame_id is "endoscope", times are shifted so that the recording begins with the
    year 2000 (stamps of another clock too; a latency that tells how far two clocks are apart becomes 0), what model
    cards and error texts say is emptied. Types of which it is not known what they hold are refused; so are latent
    features, from which the whole picture can be guessed, blanked parts too.

    Args:
        names: topic in the bag for each live topic.
        jpeg_quality: 1 to 100.
        rectangles: areas of the images that are always blanked.
        shift_times: False keeps the true times.

    Attributes:
        unreadable: as in PrivateMessages.
        shown: images by what became of them.
    """

    def __init__(
        self,
        names: Mapping[str, str],
        *,
        jpeg_quality: int = 90,
        rectangles: Sequence[Rectangle] = (),
        shift_times: bool = True,
    ) -> None:
        self.unreadable: Counter[str] = Counter()
        self._names = names
        self._quality = jpeg_quality
        self._rectangles = tuple(rectangles)
        self._shift_times = shift_times
        self._log_shift_ns: int | None = None
        # Of each clock of stamps: how far it was ahead of the log when first seen, and its shift.
        self._clocks: list[tuple[int, int]] = []
        self._cameras: dict[str, Deidentifier] = {}

    @property
    def shown(self) -> dict[Shown, int]:
        return {kind: sum(camera.counts[kind] for camera in self._cameras.values()) for kind in Shown}

    def outgoing(self, topic: str, msgtype: str) -> tuple[str, str]:
        """Topic and type in the bag of what comes on topic.

        Raises:
            ValueError: it cannot be shared; says why and what to do.
        """
        if msgtype in IMAGE_TYPES:
            return f"{self._names[topic].removesuffix('/compressed')}/compressed", COMPRESSED
        if msgtype in _CLEANERS:
            return self._names[topic], msgtype
        if msgtype == f"{MESSAGES}/msg/LatentFeatures":
            raise ValueError(
                f"{topic}: the picture can be guessed from its latent features, what is blanked too: leave them out "
                "(they can be computed again from the recording), or say --no-deidentify"
            )
        raise ValueError(
            f"{topic} is {msgtype}, of which it is not known what it says about the patient: leave it out, or say "
            "--no-deidentify"
        )

    def __call__(self, topic: str, msgtype: str, log_ns: int, raw: bytes) -> Recorded | None:
        """The message as it is written; None where it is left out."""
        name, kept_type = self.outgoing(topic, msgtype)
        message = _read(topic, msgtype, raw, self.unreadable)
        if message is None:
            return None
        if self._log_shift_ns is None:
            self._log_shift_ns = EPOCH_NS - log_ns if self._shift_times else 0
        if hasattr(message, "header"):
            message.header.frame_id = FRAME_ID
            self._shift(message.header.stamp, log_ns)
        shifted_ns = log_ns + self._log_shift_ns
        if msgtype in IMAGE_TYPES:
            picture = _decoded(message, self.unreadable)
            if picture is None:
                return None
            camera = self._cameras.setdefault(topic, Deidentifier(self._rectangles))
            picture, _ = camera(picture, log_ns * 1e-9)
            return Recorded(name, kept_type, shifted_ns, _jpeg_message(picture, message.header, self._quality))
        _CLEANERS[msgtype](message, partial(self._shift, log_ns=log_ns))
        if self._shift_times and abs(getattr(message, "latency_ms", 0.0)) * 1e6 >= _SAME_CLOCK_NS:
            message.latency_ms = 0.0  # of a camera without a clock, or with one of its own: it tells the true time
        return Recorded(name, kept_type, shifted_ns, bytes(typestore().serialize_cdr(message, msgtype)))

    def _shift(self, stamp: Any, log_ns: int) -> None:
        """Shift a stamp of any clock, in a message received at log_ns; zero, which means none, stays."""
        stamp_ns = _nanoseconds(stamp)
        if stamp_ns and self._shift_times:
            stamp.sec, stamp.nanosec = divmod(max(0, stamp_ns + self._shift_of(stamp_ns, log_ns)), 10**9)

    def _shift_of(self, stamp_ns: int, log_ns: int) -> int:
        assert self._log_shift_ns is not None
        ahead_ns = stamp_ns - log_ns
        clocks = [(0, self._log_shift_ns), *self._clocks]
        nearest_ns, shift_ns = min(clocks, key=lambda clock: abs(clock[0] - ahead_ns))
        if abs(nearest_ns - ahead_ns) < _SAME_CLOCK_NS:
            return shift_ns
        self._clocks.append((ahead_ns, self._log_shift_ns - ahead_ns))
        return self._log_shift_ns - ahead_ns


def _nothing_more(message: Any, shift: Callable[[Any], None]) -> None:
    pass


def _clean_labels(message: Any, shift: Callable[[Any], None]) -> None:
    message.card = message.licence = message.intended_use = ""  # a model's card can name hospitals, people and folders


def _clean_novelty(message: Any, shift: Callable[[Any], None]) -> None:
    shift(message.predicted_from)


def _clean_answer(message: Any, shift: Callable[[Any], None]) -> None:
    message.error_message = ""
    shift(message.first_stamp)
    shift(message.last_stamp)


_CLEANERS: dict[str, Callable[[Any, Callable[[Any], None]], None]] = {
    f"{MESSAGES}/msg/SurgicalPhase": _nothing_more,
    f"{MESSAGES}/msg/PhaseLabels": _clean_labels,
    f"{MESSAGES}/msg/Novelty": _clean_novelty,
    f"{MESSAGES}/msg/QuestionAnswer": _clean_answer,
}


def _read(topic: str, msgtype: str, raw: bytes, unreadable: Counter[str]) -> Any:
    """The message; None, counted, where its bytes are not what its type says (another version of it, say)."""
    try:
        return typestore().deserialize_cdr(raw, msgtype)
    except Exception as error:  # of many kinds; the recording must go on
        unreadable[f"{topic}: no {msgtype}, or one of another version ({type(error).__name__})"] += 1
        return None


def _decoded(image: Any, unreadable: Counter[str]) -> Bgr | None:
    try:
        return decode_image(image)
    except ImageError as error:
        unreadable[str(error)] += 1
        return None


def _jpeg_message(picture: Bgr, header: Any, quality: int) -> bytes:
    store = typestore()
    data = np.frombuffer(encode_jpeg(picture, quality), np.uint8)
    return bytes(store.serialize_cdr(store.types[COMPRESSED](header, "jpeg", data), COMPRESSED))


def _nanoseconds(stamp: Any) -> int:
    return int(stamp.sec) * 10**9 + int(stamp.nanosec)
