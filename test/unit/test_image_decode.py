# SPDX-License-Identifier: Apache-2.0
"""Every encoding gives the right colours, fast and slow path agree, and no message does worse than ImageError."""

from __future__ import annotations

import array
import io
import os
import struct
import zlib
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from surg_perception.stream.image_decode import (
    ENCODINGS,
    ImageError,
    decode_compressed,
    decode_image,
    decode_to_model_input,
    encode_image,
    encode_jpeg,
)

LOSSLESS = [e for e in ENCODINGS if not e.startswith(("yuv", "uyvy", "yuyv", "nv", "bayer", "mono"))]
COLOUR_8 = [e for e in LOSSLESS if "UC1" not in e and "16" not in e]


def picture(height=46, width=64, seed=0):
    """Smooth colours that use the whole range, so that chroma subsampling loses little."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def image(encoding, rows, width, *, height=None, padding=0, big=False, container=None):
    """An Image message from rows of bytes (uint8 [rows, row bytes]), with `padding` bytes after each row."""
    padded = np.pad(rows, ((0, 0), (0, padding)), constant_values=171)
    data = array.array("B", padded.tobytes())
    return SimpleNamespace(
        encoding=encoding,
        height=len(rows) if height is None else height,
        width=width,
        step=padded.shape[1],
        is_bigendian=int(big),
        data=container(data) if container else data,
    )


def packed(bgr, encoding, *, padding=0, big=False, container=None):
    """An Image message of a pixel-wise encoding, built here from what its name says."""
    samples = {"bgr": bgr, "rgb": bgr[..., ::-1], "mono": cv2.cvtColor(bgr, cv2.COLOR_BGR2GRAY)[..., None]}
    alpha = np.full_like(bgr[..., :1], 99)
    samples |= {f"{name}a": np.concatenate([samples[name], alpha], 2) for name in ("bgr", "rgb")}
    samples |= {"UC1": samples["mono"], "UC3": bgr, "UC4": samples["bgra"]}
    name = encoding.replace("16", "").replace("8", "")
    pixels = samples[name].astype(np.uint16)
    if "16" in encoding:
        low_bytes = np.random.default_rng(1).integers(0, 256, pixels.shape)
        pixels = ((pixels << 8) | low_bytes).astype(">u2" if big else "<u2")
    else:
        pixels = pixels.astype(np.uint8)
    rows = np.ascontiguousarray(pixels).reshape(len(bgr), -1).view(np.uint8)
    return image(encoding, rows, bgr.shape[1], padding=padding, big=big, container=container)


def limited_range_yuv(bgr):
    """BT.601 limited range, from the recommendation's own coefficients: luma 16..235, chroma 16..240."""
    blue, green, red = (bgr[..., c].astype(float) / 255 for c in range(3))
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    planes = [16 + 219 * luma, 128 + 224 * (blue - luma) / 1.772, 128 + 224 * (red - luma) / 1.402]
    return [np.rint(plane).astype(np.uint8) for plane in planes]


def yuv(bgr, encoding, *, padding=0):
    """An Image message of a YUV encoding; chroma is the mean over the pixels that share it."""
    height, width = bgr.shape[:2]
    y, u, v = limited_range_yuv(bgr)

    def shared(plane, down, across):
        mean = plane.reshape(height // down, down, width // across, across).mean((1, 3))
        return np.rint(mean).astype(np.uint8)

    if encoding.startswith("nv"):
        block = 1 if encoding == "nv24" else 2
        first, second = (v, u) if encoding == "nv21" else (u, v)
        chroma = np.stack([shared(first, block, block), shared(second, block, block)], axis=-1)
        if encoding == "nv24" and padding:  # one chroma row is two of these, padding and all at its end
            luma = np.pad(y, ((0, 0), (0, padding)), constant_values=171)
            wide = np.pad(chroma.reshape(height, 2 * width), ((0, 0), (0, 2 * padding)), constant_values=171)
            message = image(encoding, np.zeros((1, width + padding), np.uint8), width, height=height)
            message.data = array.array("B", luma.tobytes() + wide.tobytes())
            return message
        return image(encoding, np.array([*y, *chroma.reshape(-1, width)]), width, height=height, padding=padding)
    chroma = np.stack([shared(u, 1, 2), shared(v, 1, 2)], axis=-1).reshape(height, width)
    pair = (chroma, y) if encoding in ("uyvy", "yuv422") else (y, chroma)
    return image(encoding, np.stack(pair, axis=-1).reshape(height, -1), width, padding=padding)


def bayer(bgr, encoding, *, padding=0, big=False):
    """An Image message of the mosaic that the encoding's name spells, row by row."""
    pattern = encoding[6:10]
    mosaic = np.empty(bgr.shape[:2], np.uint8)
    for position, letter in enumerate(pattern):
        row, column = divmod(position, 2)
        mosaic[row::2, column::2] = bgr[row::2, column::2, "bgr".index(letter)]
    if encoding.endswith("16"):
        wide = ((mosaic.astype(np.uint16) << 8) | 77).astype(">u2" if big else "<u2")
        mosaic = wide.reshape(len(bgr), -1).view(np.uint8)
    return image(encoding, mosaic, bgr.shape[1], padding=padding, big=big)


def message_of(bgr, encoding, **options):
    if encoding.startswith("bayer"):
        return bayer(bgr, encoding, **options)
    if encoding.startswith(("nv", "yuv", "uyvy", "yuyv")):
        return yuv(bgr, encoding, padding=options.get("padding", 0))
    return packed(bgr, encoding, **options)


def difference(a, b):
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("encoding", LOSSLESS)
def test_lossless_encodings_give_the_exact_picture(encoding, big, padding):
    bgr = picture()
    expected = bgr if "UC1" not in encoding else cv2.cvtColor(
        cv2.cvtColor(bgr, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR
    )  # fmt: skip
    decoded = decode_image(packed(bgr, encoding, big=big, padding=padding))
    np.testing.assert_array_equal(decoded, expected)
    assert decoded.flags.c_contiguous
    assert decoded.dtype == np.uint8


@pytest.mark.parametrize("encoding", ["mono8", "mono16"])
def test_mono_gives_equal_channels(encoding):
    bgr = picture()
    decoded = decode_image(packed(bgr, encoding))
    grey = cv2.cvtColor(bgr, cv2.COLOR_BGR2GRAY)
    np.testing.assert_array_equal(decoded, np.stack([grey] * 3, axis=-1))


@pytest.mark.parametrize("padding", [0, 6])
@pytest.mark.parametrize("encoding", [e for e in ENCODINGS if e.startswith(("nv", "yuv", "uyvy", "yuyv"))])
def test_yuv_is_bt601_limited_range_in_the_named_order(encoding, padding):
    bgr = np.kron(picture(6, 8), np.ones((8, 8, 1), np.uint8))  # flat 8x8 blocks: subsampling loses nothing
    assert difference(decode_image(yuv(bgr, encoding, padding=padding)), bgr) <= 4


@pytest.mark.parametrize("encoding", [e for e in ENCODINGS if e.startswith("bayer")])
@pytest.mark.parametrize("big", [False, True])
def test_bayer_patterns_are_named_by_their_first_rows(encoding, big):
    flat = np.empty((12, 16, 3), np.uint8)
    flat[:] = (30, 120, 220)
    decoded = decode_image(bayer(flat, encoding, big=big, padding=5))
    np.testing.assert_array_equal(decoded[2:-2, 2:-2], flat[2:-2, 2:-2])


@pytest.mark.parametrize("padding", [0, 10])
@pytest.mark.parametrize("shape", [(46, 64), (480, 854), (300, 224), (224, 224)])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_fast_path_equals_decode_then_resize(encoding, shape, padding):
    message = message_of(picture(*shape), encoding, padding=padding)
    slow = cv2.resize(decode_image(message), (224, 224), interpolation=cv2.INTER_LINEAR)
    fast = decode_to_model_input(message)
    assert fast.shape == (224, 224, 3)
    assert fast.dtype == np.uint8
    assert fast.flags.c_contiguous
    assert fast.flags.writeable
    assert difference(fast, slow) <= 1


@pytest.mark.parametrize("padding", [0, 10])
@pytest.mark.parametrize("shape", [(896, 66), (1080, 94), (2159, 2), (1000, 300)])
@pytest.mark.parametrize("encoding", ["uyvy", "yuyv", "yuv422", "yuv422_yuy2"])
def test_rows_that_the_resize_does_not_read_are_not_converted(encoding, shape, padding, monkeypatch):
    height, width = shape
    noise = np.random.default_rng(0).integers(0, 256, (height, width * 2), np.uint8)
    message = image(encoding, noise, width, padding=padding)
    slow = cv2.resize(decode_image(message), (224, 224), interpolation=cv2.INTER_LINEAR)
    converted, convert = [], cv2.cvtColor
    monkeypatch.setattr(cv2, "cvtColor", lambda source, code: (converted.append(len(source)), convert(source, code))[1])
    fast = decode_to_model_input(message)
    assert (fast.shape, fast.dtype, fast.flags.c_contiguous) == ((224, 224, 3), np.uint8, True)
    assert difference(fast, slow) <= 1
    assert converted == [448]


def test_model_input_never_shares_memory_with_the_message():
    message = packed(picture(224, 224), "bgr8")
    before = bytes(message.data)
    decode_to_model_input(message)[:] = 0
    assert bytes(message.data) == before


@pytest.mark.parametrize(
    "container",
    [bytes, bytearray, memoryview, lambda a: np.frombuffer(a, np.uint8), lambda a: a],
    ids=["bytes", "bytearray", "memoryview", "ndarray", "array"],
)
def test_any_byte_buffer_is_taken_without_a_copy(container):
    bgr = picture()
    message = packed(bgr, "bgr8", container=container)
    decoded = decode_image(message)
    np.testing.assert_array_equal(decoded, bgr)
    assert np.shares_memory(decoded, np.frombuffer(message.data, np.uint8))


def test_padding_of_the_last_row_may_be_missing():
    bgr = picture()
    message = packed(bgr, "rgb8", padding=9)
    message.data = message.data[:-9]
    np.testing.assert_array_equal(decode_image(message), bgr)
    message.data = message.data[:-1]
    with pytest.raises(ImageError, match="needs"):
        decode_image(message)


def broken(**changes):
    message = packed(picture(), "rgb8")
    vars(message).update(changes)
    return message


@pytest.mark.parametrize(
    ("kind", "message", "says"),
    [
        ("step", broken(step=191), r"step is 191 bytes, but a row of 64 rgb8 pixels takes 192"),
        ("truncated", broken(data=bytes(100)), r"data has 100 bytes.*needs 8832"),
        ("truncated", broken(data=b""), r"data has 0 bytes"),
        ("encoding", broken(encoding="h264"), r"unknown encoding 'h264'; known: .*bgr8.*nv12"),
        ("encoding", broken(encoding="32FC1"), r"unknown encoding"),
        ("empty", broken(height=0, width=0), r"0x0"),
        ("too_large", broken(height=4320, width=7680), r"7680x4320.*input\.max_pixels"),
        ("odd_size", broken(encoding="nv12", width=63, step=64), r"63x46"),
        ("odd_size", broken(encoding="nv21", height=45), r"64x45"),
        ("odd_size", broken(encoding="uyvy", width=63), r"63x46"),
        ("header", broken(step="192"), r"step is '192'"),
        ("header", broken(height=None), r"height is None"),
        ("data", broken(data=[1, 2, 3]), r"byte buffer but list"),
        ("data", broken(data=np.zeros((90, 900), np.uint8)[:, ::2]), r"contiguous"),
    ],
)
def test_each_fault_is_named(kind, message, says):
    for decode in (decode_image, decode_to_model_input):
        with pytest.raises(ImageError, match=says) as caught:
            decode(message)
        assert caught.value.kind == kind


def test_nv12_height_is_that_of_the_luma():
    bgr = picture(48, 64)
    message = yuv(bgr, "nv12", padding=4)
    assert (message.height, len(message.data)) == (48, 68 * 72)
    assert decode_image(message).shape == bgr.shape
    message.data = message.data[: 68 * 71]
    with pytest.raises(ImageError, match="needs"):
        decode_image(message)


ANY_COUNT = st.one_of(st.integers(0, 40), st.integers(0, 2**32 - 1))
HYPOTHESIS = settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@HYPOTHESIS
@given(
    encoding=st.one_of(st.sampled_from(ENCODINGS), st.text(max_size=12)),
    height=ANY_COUNT,
    width=ANY_COUNT,
    step=ANY_COUNT,
    big=st.integers(0, 255),
    data=st.binary(max_size=6000),
)
def test_any_image_message_decodes_to_its_size_or_raises_image_error(encoding, height, width, step, big, data):
    message = SimpleNamespace(
        encoding=encoding, height=height, width=width, step=step, is_bigendian=big, data=array.array("B", data)
    )
    try:
        decoded = decode_image(message)
    except ImageError:
        with pytest.raises(ImageError):
            decode_to_model_input(message, 32)
    else:
        assert decoded.shape == (height, width, 3)
        assert decoded.dtype == np.uint8
        assert decode_to_model_input(message, 32).shape == (32, 32, 3)


@HYPOTHESIS
@given(
    encoding=st.sampled_from(ENCODINGS),
    height=st.integers(1, 24),
    width=st.integers(1, 24),
    padding=st.integers(0, 5),
    surplus=st.integers(-4, 4),
    big=st.booleans(),
)
def test_nearly_right_messages_decode_or_raise_image_error(encoding, height, width, padding, surplus, big):
    bits = 16 if "16" in encoding else 8
    samples = {"bgra": 4, "rgba": 4, "bgr": 3, "rgb": 3, "8UC3": 3, "8UC4": 4, "16UC3": 3, "16UC4": 4}
    per_pixel = next((n for name, n in samples.items() if encoding.startswith(name)), 1) * bits // 8
    per_pixel = 2 if encoding.startswith(("yuv", "uyvy", "yuyv")) else per_pixel
    rows = height * {"nv12": 1.5, "nv21": 1.5, "nv24": 3}.get(encoding, 1)
    step = width * per_pixel + padding
    needed = int(step * rows) - padding * (2 if encoding == "nv24" else 1)
    data = np.random.default_rng(height * 31 + width).integers(0, 256, max(0, needed + surplus), np.uint8)
    message = SimpleNamespace(
        encoding=encoding, height=height, width=width, step=step, is_bigendian=big, data=data.tobytes()
    )
    too_odd = (encoding in ("nv12", "nv21") and (width % 2 or height % 2)) or (
        encoding.startswith(("yuv", "uyvy", "yuyv")) and width % 2
    )
    too_small = encoding.startswith("bayer") and min(width, height) < 3
    if surplus < 0 or too_odd or too_small:
        with pytest.raises(ImageError):
            decode_image(message)
    else:
        assert decode_image(message).shape == (height, width, 3)
        slow = cv2.resize(decode_image(message), (32, 32), interpolation=cv2.INTER_LINEAR)
        assert difference(decode_to_model_input(message, 32), slow) <= 1


# Compressed -----------------------------------------------------------------------------------------------------

COMPRESSED = {
    "jpeg": (".jpg", [cv2.IMWRITE_JPEG_QUALITY, 95]),
    "progressive": (".jpg", [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]),
    "restarts": (".jpg", [cv2.IMWRITE_JPEG_RST_INTERVAL, 2]),
    "png": (".png", []),
    "webp": (".webp", [cv2.IMWRITE_WEBP_QUALITY, 101]),
    "bmp": (".bmp", []),
}


def compressed(bgr, kind="jpeg"):
    suffix, options = COMPRESSED[kind]
    return cv2.imencode(suffix, bgr, options)[1].tobytes()


def compressed_message(data, format="jpeg"):
    return SimpleNamespace(format=format, data=array.array("B", data))


def with_exif(jpeg, orientation=6, thumbnail=b""):
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = io.BytesIO()
    Image.open(io.BytesIO(jpeg)).save(out, "JPEG", exif=exif.tobytes() + thumbnail, quality=95)
    return out.getvalue()


@pytest.mark.parametrize("kind", COMPRESSED)
@pytest.mark.parametrize("format", ["jpeg", "png", "rgb8; jpeg compressed bgr8", "bgr8; png compressed bgr8", ""])
def test_compressed_pictures_decode_whatever_the_format_field_says(kind, format):
    bgr = picture(96, 128)
    message = compressed_message(compressed(bgr, kind), format)
    lossless = kind in ("png", "webp", "bmp")
    assert difference(decode_image(message), bgr) <= (0 if lossless else 24)
    slow = cv2.resize(decode_image(message), (224, 224), interpolation=cv2.INTER_LINEAR)
    assert difference(decode_to_model_input(message), slow) <= 1


def test_red_stays_red_in_jpeg():
    red = np.zeros((16, 16, 3), np.uint8)
    red[..., 2] = 255
    for format in ("jpeg", "rgb8; jpeg compressed bgr8", "rgb8; jpeg compressed rgb8"):
        decoded = decode_image(compressed_message(compressed(red), format))
        assert decoded[..., 2].min() > 240
        assert decoded[..., :2].max() < 20


def test_grey_alpha_and_16_bit_png_become_8_bit_bgr():
    bgr = picture()
    grey = cv2.cvtColor(bgr, cv2.COLOR_BGR2GRAY)
    alpha = np.dstack([bgr, np.full(bgr.shape[:2], 9, np.uint8)])
    wide = (bgr.astype(np.uint16) << 8) | 200
    for source, expected in ((grey, np.stack([grey] * 3, -1)), (alpha, bgr), (wide, bgr)):
        data = cv2.imencode(".png", source)[1].tobytes()
        np.testing.assert_array_equal(decode_compressed(data), expected)


def test_grey_jpeg_of_a_bayer_mosaic_is_demosaiced():
    flat = np.empty((32, 32, 3), np.uint8)
    flat[:] = (30, 120, 220)
    mosaic = np.frombuffer(bayer(flat, "bayer_rggb8").data, np.uint8).reshape(32, 32)
    data = cv2.imencode(".png", mosaic)[1].tobytes()
    decoded = decode_image(compressed_message(data, "bayer_rggb8; png compressed "))
    np.testing.assert_array_equal(decoded[2:-2, 2:-2], flat[2:-2, 2:-2])
    plain = decode_image(compressed_message(data, "mono8; png compressed "))
    np.testing.assert_array_equal(plain[..., 0], mosaic)


def test_exif_orientation_is_ignored():
    bgr = picture(40, 64)
    assert decode_compressed(with_exif(compressed(bgr), orientation=6)).shape == bgr.shape


@pytest.mark.parametrize("kind", ["jpeg", "progressive", "restarts", "png"])
@pytest.mark.parametrize("tail", [b"", bytes(64)], ids=["cut", "zero-filled"])
def test_a_cut_at_any_place_is_an_error(kind, tail):
    data = compressed(picture(24, 32), kind)
    whole = decode_compressed(data + tail)
    assert whole.shape == (24, 32, 3)
    for end in range(len(data)):
        try:
            decoded = decode_compressed(data[:end] + tail)
        except ImageError:
            continue
        # Only a PNG's last four bytes, the checksum of its empty end chunk, carry no picture.
        assert kind == "png"
        assert end >= len(data) - 4
        np.testing.assert_array_equal(decoded, whole)


@pytest.mark.parametrize("kind", ["webp", "bmp"])
def test_a_cut_is_an_error_for_the_rarer_formats(kind):
    data = compressed(picture(24, 32), kind)
    for end in range(len(data)):
        with pytest.raises(ImageError):
            decode_compressed(data[:end])


def test_a_cut_behind_the_thumbnail_of_a_jpeg_is_an_error():
    thumbnail = compressed(picture(8, 8))
    data = with_exif(compressed(picture(24, 32)), thumbnail=thumbnail)
    start = data.index(thumbnail)
    decode_compressed(data)
    with pytest.raises(ImageError):
        decode_compressed(data[: start + len(thumbnail)])


def test_zero_padding_and_a_further_picture_after_a_jpeg_are_allowed_and_rubbish_is_not():
    data = compressed(picture())
    whole = decode_compressed(data)
    np.testing.assert_array_equal(decode_compressed(data + bytes(1000)), whole)
    np.testing.assert_array_equal(decode_compressed(data + bytes(3) + data), whole)
    with pytest.raises(ImageError) as caught:
        decode_compressed(data + b"\x01\x02\x03")
    assert caught.value.kind == "corrupt"


@pytest.mark.parametrize("kind", ["jpeg", "progressive", "restarts"])
def test_a_damaged_middle_of_a_jpeg_is_an_error(kind):
    noisy = np.random.default_rng(0).integers(0, 256, (240, 320, 3), np.uint8)
    data = compressed(noisy, kind)
    middle = len(data) // 2
    for seed in range(8):
        damage = np.random.default_rng(seed).bytes(4096)
        with pytest.raises(ImageError) as caught:
            decode_compressed(data[:middle] + damage + data[middle + len(damage) :])
        assert caught.value.kind in ("corrupt", "truncated")


def test_a_marker_that_no_scan_can_have_is_named():
    data = bytearray(compressed(picture(240, 320)))
    data[-200:-198] = b"\xff\x05"
    with pytest.raises(ImageError, match="impossible marker 0x5") as caught:
        decode_compressed(bytes(data))
    assert caught.value.kind == "corrupt"


def test_a_damaged_png_is_an_error():
    data = bytearray(compressed(picture(), "png"))
    data[len(data) // 2] ^= 1
    with pytest.raises(ImageError, match="PNG is cut or damaged"):
        decode_compressed(bytes(data))


def png_header(width, height):
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


@pytest.mark.parametrize("side", [5000, 60000])  # beyond our limit, and beyond the one where Pillow gives up
def test_a_decompression_bomb_is_refused_by_its_header(side, monkeypatch):
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    end = struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
    with pytest.raises(ImageError, match=r"input\.max_pixels") as caught:
        decode_image(compressed_message(png_header(side, side) + end, "png"))
    assert caught.value.kind == "too_large"


def test_the_limit_of_pixels_is_inclusive():
    message = compressed_message(compressed(picture()))
    assert decode_image(message, max_pixels=64 * 46).shape == (46, 64, 3)
    with pytest.raises(ImageError, match="64x46"):
        decode_image(message, max_pixels=64 * 46 - 1)
    raw = packed(picture(), "bgr8")
    assert decode_image(raw, max_pixels=64 * 46).shape == (46, 64, 3)
    with pytest.raises(ImageError, match="64x46"):
        decode_image(raw, max_pixels=64 * 46 - 1)


@pytest.mark.parametrize(
    ("kind", "data", "format"),
    [
        ("empty", b"", "jpeg"),
        ("corrupt", b"\xff\xd8\xff", "jpeg"),
        ("corrupt", b"no picture at all", "jpeg"),
        ("corrupt", b"GIF89a" + bytes(40), "gif"),
        ("encoding", b"\x00" * 40, "16UC1; compressedDepth png"),
    ],
)
def test_each_compressed_fault_is_named(kind, data, format):
    with pytest.raises(ImageError) as caught:
        decode_image(compressed_message(data, format))
    assert caught.value.kind == kind


@HYPOTHESIS
@given(
    kind=st.sampled_from(sorted(COMPRESSED)),
    edits=st.lists(st.tuples(st.floats(0, 0.9999), st.integers(0, 255)), max_size=6),
    keep=st.floats(0, 1),
    format=st.sampled_from(["jpeg", "png", "bayer_rggb8; jpeg compressed ", "x;y;z", "16UC1; compressedDepth"]),
)
def test_any_compressed_message_decodes_to_its_size_or_raises_image_error(kind, edits, keep, format):
    data = bytearray(compressed(picture(12, 16), kind))
    for place, value in edits:
        data[int(place * len(data))] = value
    message = compressed_message(bytes(data[: int(keep * len(data))] if keep < 0.5 else data), format)
    try:
        decoded = decode_image(message, max_pixels=10**6)
    except ImageError:
        return
    assert decoded.shape[2] == 3
    assert decoded.dtype == np.uint8
    assert decoded.shape[1::-1] == Image.open(io.BytesIO(bytes(data))).size


@HYPOTHESIS
@given(data=st.binary(max_size=300))
def test_random_bytes_are_no_compressed_picture(data):
    for start in (b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"RIFF", b"BM"):
        with pytest.raises(ImageError):
            decode_compressed(start + data)


# Encoding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["bgr8", "rgb8", "bgra8", "rgba8", "mono8", "nv12"])
def test_encoded_pictures_decode_to_themselves(encoding):
    bgr = np.kron(picture(6, 8), np.ones((8, 8, 1), np.uint8))
    if encoding == "mono8":
        bgr = np.repeat(bgr[..., :1], 3, axis=2)
    name, step, data = encode_image(bgr, encoding)
    assert isinstance(data, array.array)
    assert data.typecode == "B"
    message = SimpleNamespace(encoding=name, height=48, width=64, step=step, is_bigendian=0, data=data)
    assert len(data) == step * 48 * (1.5 if encoding == "nv12" else 1)
    assert difference(decode_image(message), bgr) <= (4 if encoding == "nv12" else 0)


def test_encoding_takes_pictures_that_are_not_contiguous():
    bgr = picture()[:, ::-1]
    name, step, data = encode_image(bgr, "bgr8")
    message = SimpleNamespace(encoding=name, height=46, width=64, step=step, is_bigendian=0, data=data)
    np.testing.assert_array_equal(decode_image(message), bgr)


def test_unknown_target_encoding_is_refused_by_name():
    with pytest.raises(ImageError, match="cannot encode to 'yuv9'; known: bgr8"):
        encode_image(picture(), "yuv9")
    with pytest.raises(ImageError, match="63x46"):
        encode_image(picture(46, 63), "nv12")


def test_jpeg_quality_matters_and_is_checked():
    bgr = picture(240, 320)
    small, large = encode_jpeg(bgr, 20), encode_jpeg(bgr, 95)
    assert len(small) < len(large)
    assert difference(decode_image(compressed_message(bytes(large))), bgr) < 24
    for quality in (0, 101):
        with pytest.raises(ImageError, match="1 to 100"):
            encode_jpeg(bgr, quality)


# Real pictures --------------------------------------------------------------------------------------------------


def test_real_frames_survive_every_encoding(shared_data):
    files = sorted((shared_data / "ood").glob("*.jpg"))[::20]
    assert len(files) == 8
    for file in files:
        bgr = decode_compressed(file.read_bytes())
        np.testing.assert_array_equal(bgr, cv2.imread(os.fspath(file)))
        for encoding in COLOUR_8:
            np.testing.assert_array_equal(decode_image(packed(bgr, encoding, padding=8)), bgr)
        for encoding in ("nv12", "uyvy", "yuyv"):
            decoded = decode_image(yuv(bgr, encoding))
            assert np.abs(decoded.astype(int) - bgr).mean() < 3
