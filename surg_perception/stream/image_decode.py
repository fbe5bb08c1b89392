# SPDX-License-Identifier: Apache-2.0
"""ROS images to BGR pictures and back, without ROS and without cv_bridge.

Messages are taken by duck typing: a raw image has `encoding, height, width, step, is_bigendian, data`
(sensor_msgs/Image), a compressed one `format, data` (sensor_msgs/CompressedImage). Encodings mean what
sensor_msgs/image_encodings.hpp says; YUV is BT.601 limited range, 16 bits become 8 by their high byte.
"""

from __future__ import annotations

import array
import io
import operator
import re
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Bgr = NDArray[np.uint8]

MAX_PIXELS = 4096 * 4096


class ImageError(ValueError):
    """A message that holds no usable picture. `kind` is a short stable word to throttle and count by.

    Kinds: "encoding" (unknown or refused), "empty", "too_large", "step", "truncated", "odd_size"
    (subsampled formats), "header" (a field is no whole number), "data" (no byte buffer), "corrupt".
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


# encoding -> (samples per pixel, bytes per sample, samples that are blue, green, red)
_PACKED: dict[str, tuple[int, int, tuple[int, int, int]]] = {
    f"{name}{8 * width}": (samples, width, bgr)
    for width in (1, 2)
    for name, samples, bgr in (
        ("bgr", 3, (0, 1, 2)),
        ("rgb", 3, (2, 1, 0)),
        ("bgra", 4, (0, 1, 2)),
        ("rgba", 4, (2, 1, 0)),
        ("mono", 1, (0, 0, 0)),
    )
}
_PACKED |= {
    f"{8 * width}UC{samples}": (samples, width, bgr)
    for width in (1, 2)
    for samples, bgr in ((1, (0, 0, 0)), (3, (0, 1, 2)), (4, (0, 1, 2)))
}

# image_encodings.hpp: "yuv422" is the old name of UYVY, "yuv422_yuy2" that of YUYV.
_YUV422 = {
    "uyvy": cv2.COLOR_YUV2BGR_UYVY,
    "yuv422": cv2.COLOR_YUV2BGR_UYVY,
    "yuyv": cv2.COLOR_YUV2BGR_YUY2,
    "yuv422_yuy2": cv2.COLOR_YUV2BGR_YUY2,
}
_YUV420 = {"nv12": cv2.COLOR_YUV2BGR_NV12, "nv21": cv2.COLOR_YUV2BGR_NV21}

# OpenCV names a Bayer pattern by its second row's second and third pixel, ROS by the first two rows.
_BAYER = {
    "bayer_rggb": cv2.COLOR_BayerBG2BGR,
    "bayer_bggr": cv2.COLOR_BayerRG2BGR,
    "bayer_gbrg": cv2.COLOR_BayerGR2BGR,
    "bayer_grbg": cv2.COLOR_BayerGB2BGR,
}

_PICK = {
    (1, (0, 0, 0)): cv2.COLOR_GRAY2BGR,
    (3, (2, 1, 0)): cv2.COLOR_RGB2BGR,
    (4, (0, 1, 2)): cv2.COLOR_BGRA2BGR,
    (4, (2, 1, 0)): cv2.COLOR_RGBA2BGR,
}

# ITU-R BT.601, limited range: B, G, R from Y, U, V and a constant.
_BT601 = np.array([[1.164, 2.018, 0.0], [1.164, -0.391, -0.813], [1.164, 0.0, 1.596]])
_BT601_AFFINE = np.hstack([_BT601, -_BT601 @ np.array([[16.0], [128.0], [128.0]])])

ENCODINGS: tuple[str, ...] = (
    *_PACKED,
    *_YUV422,
    *_YUV420,
    "nv24",
    *(f"{pattern}{bits}" for pattern in _BAYER for bits in (8, 16)),
)

# A start of image, then segments; inside a scan 0xff is followed by 0 (stuffing) or a restart marker.
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7]")
_COMPRESSED_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")


def decode_image(msg: Any, *, max_pixels: int = MAX_PIXELS) -> Bgr:
    """Full-size picture of a raw or compressed image message.

    Returns uint8 [H, W, 3] BGR, C-contiguous. Only for bgr8 and 8UC3 without row padding is it a view of
    the message's own buffer (read-only where that is); everything else is a new array. EXIF orientation
    is ignored. Raises ImageError and nothing else, whatever the fields and bytes hold.
    """
    return _bgr(*_read(msg, max_pixels))


def decode_to_model_input(msg: Any, size: int = 224, *, max_pixels: int = MAX_PIXELS) -> Bgr:
    """The model's input: uint8 [size, size, 3] BGR, a new C-contiguous array.

    Equal within one level to `cv2.resize(decode_image(msg), (size, size), interpolation=cv2.INTER_LINEAR)`:
    where colour conversion works pixel by pixel it commutes with the resize and is done on the small
    picture, and where it works row by row only rows that the resize reads are converted. Raises ImageError as
    decode_image does.
    """
    native, order = _read(msg, max_pixels, size)
    return _bgr(resize_to_model_input(native, size), order)


def resize_to_model_input(picture: Bgr, size: int = 224) -> Bgr:
    """Plain bilinear resize (no antialiasing, aspect not kept): uint8 [H, W, C] to a new [size, size, C]."""
    small = cv2.resize(picture, (size, size), interpolation=cv2.INTER_LINEAR)
    return small.reshape(size, size, picture.shape[2]).astype(np.uint8, copy=False)


def decode_compressed(data: Any, format: str = "", *, max_pixels: int = MAX_PIXELS) -> Bgr:
    """Picture uint8 [H, W, 3] BGR of a JPEG, PNG, WebP or BMP in a byte buffer.

    `format` is the message's field ("jpeg", "rgb8; jpeg compressed bgr8", …). The content decides what the
    bytes are; of `format` only a Bayer source encoding (a grey JPEG of the mosaic, to be demosaiced here)
    and compressedDepth (refused) matter. Size is read from the header and checked before any pixel is
    decoded; a cut file is an error. Raises ImageError.
    """
    if "compressedDepth" in format:
        raise ImageError("encoding", f"format {format!r} is a depth image; a colour image is needed")
    buffer = _buffer(data)
    size, grey = _check_compressed(buffer, format, max_pixels)
    bayer = _BAYER.get(re.sub(r"(8|16)$", "", format.split(";")[0].strip())) if grey else None
    mode = cv2.IMREAD_COLOR if bayer is None else cv2.IMREAD_GRAYSCALE
    try:
        picture = cv2.imdecode(buffer, mode | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        raise ImageError("corrupt", f"compressed image of {buffer.size} bytes: {error.err}") from error
    if picture is None or picture.shape[1::-1] != size:
        raise ImageError("corrupt", f"compressed image of {buffer.size} bytes cannot be decoded")
    return _uint8(picture) if bayer is None else _demosaic(_uint8(picture), bayer)


def encode_image(bgr: Bgr, encoding: str) -> tuple[str, int, array.array[int]]:
    """Fields `encoding, step, data` of an Image message for a picture uint8 [H, W, 3] BGR.

    Encodings: bgr8, rgb8, bgra8, rgba8, mono8 and nv12 (even width and height). Rows are not padded.
    `data` is an `array.array('B')`, the one type that rclpy assigns without checking each byte.
    Raises ImageError for another encoding.
    """
    height, width = bgr.shape[:2]
    if encoding == "bgr8":
        native, step = np.ascontiguousarray(bgr), 3 * width
    elif encoding in _ENCODE:
        native = cv2.cvtColor(bgr, _ENCODE[encoding]).astype(np.uint8, copy=False)
        step = native.nbytes // height
    elif encoding == "nv12":
        _require_even(encoding, width, height)
        planar = cv2.cvtColor(bgr, cv2.COLOR_BGR2YUV_I420)
        chroma = planar[height:].reshape(2, -1).T
        native, step = np.concatenate([planar[:height].ravel(), chroma.ravel()]).astype(np.uint8), width
    else:
        known = ", ".join(["bgr8", *_ENCODE, "nv12"])
        raise ImageError("encoding", f"cannot encode to {encoding!r}; known: {known}")
    data = array.array("B")
    data.frombytes(native.data)
    return encoding, step, data


def encode_jpeg(bgr: Bgr, quality: int = 90) -> array.array[int]:
    """`data` of a CompressedImage with format "jpeg": baseline JPEG, `quality` 1 to 100.

    Takes uint8 [H, W, 3] BGR. Raises ImageError where the quality is out of range.
    """
    if not 1 <= quality <= 100:
        raise ImageError("encoding", f"JPEG quality is {quality}; it must be 1 to 100")
    _, encoded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
    data = array.array("B")
    data.frombytes(encoded.data)
    return data


_ENCODE = {
    "rgb8": cv2.COLOR_BGR2RGB,
    "bgra8": cv2.COLOR_BGR2BGRA,
    "rgba8": cv2.COLOR_BGR2RGBA,
    "mono8": cv2.COLOR_BGR2GRAY,
}

# Pixels as the message has them (uint8 [H, W, K]) and which of the K bytes are blue, green and red.
_Native = tuple[Bgr, tuple[int, int, int]]


def _read(msg: Any, max_pixels: int, size: int | None = None) -> _Native:
    """The picture; where that is cheaper, already resized to `size` if it is given."""
    if hasattr(msg, "format"):
        return decode_compressed(msg.data, msg.format, max_pixels=max_pixels), (0, 1, 2)
    encoding = msg.encoding
    if encoding not in ENCODINGS:
        raise ImageError("encoding", f"unknown encoding {encoding!r}; known: {', '.join(ENCODINGS)}")
    height, width, step = (_whole(msg, name) for name in ("height", "width", "step"))
    _check_size(width, height, max_pixels)
    buffer = _buffer(msg.data)

    if encoding in _PACKED:
        samples, sample_bytes, bgr = _PACKED[encoding]
        order = _high_bytes(bgr, sample_bytes, msg.is_bigendian)
        return _plane(buffer, encoding, height, width, samples * sample_bytes, step), order
    if encoding in _YUV422:
        _require_even(encoding, width, height)
        packed = _plane(buffer, encoding, height, width, 2, step)
        if size is not None and height >= 4 * size:
            return _resized_by_rows(packed, _YUV422[encoding], size), (0, 1, 2)
        return _uint8(cv2.cvtColor(packed, _YUV422[encoding])), (0, 1, 2)
    if encoding in _YUV420:
        _require_even(encoding, width, height)
        planes = _plane(buffer, encoding, height * 3 // 2, width, 1, step)
        return _uint8(cv2.cvtColor(planes, _YUV420[encoding])), (0, 1, 2)
    if encoding == "nv24":
        # After the luma rows, chroma rows of twice the step (V4L2_PIX_FMT_NV24).
        luma = _plane(buffer, encoding, height, width, 1, step)
        chroma = _plane(buffer, encoding, height, width, 2, 2 * step, offset=step * height)
        yuv = np.concatenate([np.maximum(luma, 16), chroma], axis=2)
        return _uint8(cv2.transform(yuv, _BT601_AFFINE)), (0, 1, 2)
    sample_bytes = 2 if encoding.endswith("16") else 1
    mosaic = _plane(buffer, encoding, height, width, sample_bytes, step)
    high = _high_bytes((0, 0, 0), sample_bytes, msg.is_bigendian)[0]
    pattern = encoding.removesuffix(str(8 * sample_bytes))
    return _demosaic(np.ascontiguousarray(mosaic[..., high]), _BAYER[pattern]), (0, 1, 2)


def _resized_by_rows(packed: Bgr, conversion: int, size: int) -> Bgr:
    """What cv2.INTER_LINEAR makes of the converted picture, from the two rows that it reads for each row, alone."""
    centres = (np.arange(size) + 0.5) * (len(packed) / size) - 0.5
    upper = centres.astype(np.intp)
    rows = cv2.cvtColor(packed[np.stack([upper, upper + 1], axis=1).reshape(-1)], conversion)
    narrow = cv2.resize(rows, (size, 2 * size), interpolation=cv2.INTER_LINEAR).reshape(size, 2, size, 3)
    weights = (centres - upper).astype(np.float32)[:, np.newaxis, np.newaxis]
    picture: Bgr = np.rint(narrow[:, 0] * (1 - weights) + narrow[:, 1] * weights).astype(np.uint8)
    return picture


def _bgr(native: Bgr, order: tuple[int, int, int]) -> Bgr:
    key = (native.shape[2], order)
    if key == (3, (0, 1, 2)):
        return np.ascontiguousarray(native)
    if key in _PICK:
        return _uint8(cv2.cvtColor(native, _PICK[key]))
    picture = np.empty((*native.shape[:2], 3), np.uint8)
    cv2.mixChannels([native], [picture], [order[0], 0, order[1], 1, order[2], 2])
    return picture


def _high_bytes(samples: tuple[int, int, int], sample_bytes: int, is_bigendian: Any) -> tuple[int, int, int]:
    high = 0 if is_bigendian else sample_bytes - 1
    blue, green, red = (sample * sample_bytes + high for sample in samples)
    return blue, green, red


def _plane(buffer: Bgr, encoding: str, height: int, width: int, pixel_bytes: int, step: int, offset: int = 0) -> Bgr:
    """View uint8 [height, width, pixel_bytes] of rows `step` bytes apart; the last may lack its padding."""
    row_bytes = width * pixel_bytes
    if step < row_bytes:
        raise ImageError("step", f"step is {step} bytes, but a row of {width} {encoding} pixels takes {row_bytes}")
    needed = offset + step * (height - 1) + row_bytes
    if buffer.size < needed:
        raise ImageError(
            "truncated",
            f"data has {buffer.size} bytes, but {encoding} with width {width} and step {step} needs {needed}",
        )
    strides = (row_bytes if height == 1 else step, pixel_bytes, 1)
    return np.ndarray((height, width, pixel_bytes), np.uint8, buffer, offset, strides)


def _demosaic(mosaic: Bgr, conversion: int) -> Bgr:
    height, width = mosaic.shape[:2]
    if height < 3 or width < 3:
        raise ImageError("empty", f"a Bayer picture must be at least 3x3, this one is {width}x{height}")
    return _uint8(cv2.cvtColor(mosaic, conversion))


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width <= 0 or height <= 0:
        raise ImageError("empty", f"image is {width}x{height}: there are no pixels")
    if width * height > max_pixels:
        raise ImageError(
            "too_large",
            f"image is {width}x{height}, {width * height} pixels; the parameter input.max_pixels allows {max_pixels}",
        )


def _require_even(encoding: str, width: int, height: int) -> None:
    if width % 2 or (encoding in _YUV420 and height % 2):
        raise ImageError("odd_size", f"{encoding} shares colour between pixel pairs, so {width}x{height} cannot be")


def _whole(msg: Any, name: str) -> int:
    try:
        return operator.index(getattr(msg, name))
    except TypeError as error:
        raise ImageError("header", f"{name} is {getattr(msg, name)!r}, not a whole number") from error


def _buffer(data: Any) -> Bgr:
    try:
        return np.frombuffer(data, np.uint8)
    except (TypeError, ValueError, BufferError) as error:
        raise ImageError("data", f"data is no contiguous byte buffer but {type(data).__name__}") from error


def _uint8(picture: NDArray[Any]) -> Bgr:
    return picture.astype(np.uint8, copy=False)


def _check_compressed(buffer: Bgr, format: str, max_pixels: int) -> tuple[tuple[int, int], bool]:
    """(width, height) and whether it is grey; ImageError unless it is whole and of an allowed size."""
    from PIL import Image

    if buffer.size == 0:
        raise ImageError("empty", f"compressed image ({format!r}) has no bytes")
    try:
        # Plugins raise anything on malformed bytes: struct.error, SyntaxError, DecompressionBombError, …
        header = Image.open(io.BytesIO(buffer.data), formats=_COMPRESSED_FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError("too_large", f"{error}; the parameter input.max_pixels allows {max_pixels}") from error
    except Exception as error:
        raise ImageError(
            "corrupt",
            f"{buffer.size} bytes with format {format!r}, starting with {bytes(buffer[:8]).hex(' ')}, are no "
            f"readable {', '.join(_COMPRESSED_FORMATS)}",
        ) from error
    _check_size(*header.size, max_pixels)
    if header.format in ("JPEG", "MPO"):
        _check_jpeg(buffer)
    else:
        try:
            header.verify()
        except Exception as error:
            raise ImageError("truncated", f"{header.format} is cut or damaged: {error}") from error
    return header.size, header.mode in ("L", "I;16")


def _check_jpeg(buffer: Bgr) -> None:
    """Walk the segments from start to end of image (ITU-T T.81 B.1).

    Decoders fill what is missing with grey and report success, so that a cut is found only here. A marker
    that cannot be inside a scan shows damage there. After the end, zero padding may follow, or the next
    picture of a multi-picture file.
    """
    size = buffer.size
    cut = f"JPEG of {size} bytes is cut: its end-of-image marker is missing"
    data = buffer.data
    position, in_scan, scans = 2, False, 0
    while True:
        marker = (_JPEG_MARKER.search if in_scan else _JPEG_MARKER.match)(data, position)
        if marker is None:
            if in_scan or position >= size - 1:
                raise ImageError("truncated", cut)
            raise ImageError("corrupt", f"JPEG is damaged: no marker at byte {position}")
        code = data[marker.end() - 1]
        if code == 0xD9:
            break
        if code == 0xFF:  # fill byte
            position = marker.start() + 1
            continue
        if code < 0xC0:
            raise ImageError("corrupt", f"JPEG is damaged: impossible marker {code:#x} at byte {marker.start()}")
        position = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
        if position > size - 2:
            raise ImageError("truncated", cut)
        in_scan = code == 0xDA
        scans += in_scan
    rest = bytes(data[marker.end() :]).lstrip(b"\0")
    if not scans or (rest and not rest.startswith(b"\xff\xd8")):
        raise ImageError("corrupt", f"JPEG is damaged: it ends at byte {marker.start()} of {size}")
