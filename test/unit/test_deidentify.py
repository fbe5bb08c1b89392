# SPDX-License-Identifier: Apache-2.0
"""De-identified pictures and messages: drawn names must not survive, the view into the body must."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest

from surg_perception.data.deidentify import Deidentifier, Shown
from surg_perception.data.frame_readers import VideoFrames
from surg_perception.data.phantom import Phantom
from surg_perception.data.recorded_messages import COMPRESSED, EPOCH_NS, PrivateMessages, SharedMessages
from surg_perception.data.ros_types import typestore
from surg_perception.stream.image_decode import decode_image, encode_jpeg

SIZE = (480, 270)
RATE_HZ = 4
S = 10**9
IMAGE = "sensor_msgs/msg/Image"
OURS = "surg_perception_msgs/msg"
WHITE = (255, 255, 255)


@pytest.fixture(scope="module")
def surgery():
    patient = Phantom(*SIZE, rate_hz=RATE_HZ, seed=2, duration_s=60)
    return [patient.frame(index)[0] for index in range(60, 140)]


def inked(bgr, *texts):
    """The picture with texts (words, share of width, share of height, colour) on it, and where they cover it."""
    out, scale = bgr.copy(), bgr.shape[0] / 480
    for words, x, y, colour in texts:
        place = (int(x * bgr.shape[1]), int(y * bgr.shape[0]))
        thickness = max(1, round(1.5 * scale))
        cv2.putText(out, words, place, cv2.FONT_HERSHEY_SIMPLEX, 0.6 * scale, colour, thickness, cv2.LINE_AA)
    return out, np.abs(out.astype(int) - bgr).max(axis=2) > 60


IN_BORDER = (("MILLER JOHN", 0.01, 0.06, WHITE), ("12.03.1961", 0.01, 0.97, (0, 255, 255)))
ON_PICTURE = (("ID 4711-22", 0.42, 0.4, WHITE),)


def test_names_in_the_border_and_on_the_picture_do_not_survive_and_the_view_does(surgery):
    remove = Deidentifier()
    kept = []
    for k, bgr in enumerate(surgery):
        marked, ink = inked(bgr, *IN_BORDER, *ON_PICTURE)
        out, shown = remove(marked, k / RATE_HZ)
        assert out.shape == marked.shape
        if shown != Shown.VIEW:
            assert not out.any()
            continue
        assert not out[ink].any(), k
        untouched = (out == marked).all(axis=2)
        assert (untouched | (out == 0).all(axis=2)).all()
        lit = bgr.max(axis=2) > 40
        kept.append((untouched & lit).sum() / lit.sum())
        corner = np.s_[: int(0.15 * SIZE[1]), : int(0.15 * SIZE[0])]
        assert not out[corner].any()
    assert len(kept) > 40
    assert np.mean(kept) > 0.75


def test_until_enough_was_seen_nothing_is_shown(surgery):
    remove = Deidentifier()
    found = [remove(bgr, k / RATE_HZ)[1] for k, bgr in enumerate(surgery[:30])]
    assert found[0] == Shown.LEARNING
    assert Shown.VIEW in found
    assert found == sorted(found, key=lambda shown: shown == Shown.VIEW), "once it is known, it stays known"


def learnt(surgery, **options):
    remove = Deidentifier(**options)
    for k, bgr in enumerate(surgery):
        _, shown = remove(bgr, k / RATE_HZ)
    assert shown == Shown.VIEW
    return remove, len(surgery) / RATE_HZ


def test_out_of_the_body_and_half_a_second_after_it_all_is_black(surgery):
    remove, now_s = learnt(surgery)
    grey = cv2.resize(np.random.default_rng(0).integers(60, 200, (9, 16), np.uint8), SIZE)
    room = cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR)
    seen = []
    for k in range(4):
        out, shown = remove(room, now_s + k * 0.04)
        seen.append(shown)
        assert not out.any()
    for k in range(30):
        out, shown = remove(surgery[-1], now_s + 0.16 + k * 0.04)
        seen.append(shown)
        assert out.any() == (shown == Shown.VIEW)
    assert seen[:4] == [Shown.NOT_IN_BODY] * 4
    assert seen[4:].count(Shown.NOT_IN_BODY) == pytest.approx(12, abs=2)
    assert seen[-1] == Shown.VIEW


@pytest.mark.parametrize("level", [0, 255])
def test_a_blank_screen_is_black(surgery, level):
    remove, now_s = learnt(surgery)
    out, shown = remove(np.full_like(surgery[0], level), now_s)
    assert shown == Shown.NOT_IN_BODY
    assert not out.any()


def test_rectangles_are_black_also_where_they_reach_out_of_the_picture(surgery):
    remove, now_s = learnt(surgery, rectangles=[(200, 100, 60, 30), (400, 200, 1000, 1000), (-10, -10, 30, 30)])
    out, shown = remove(surgery[-1], now_s)
    assert shown == Shown.VIEW
    assert not out[100:130, 200:260].any()
    assert not out[200:, 400:].any()
    assert out[100:130, 180:198].any()


def test_another_size_or_a_jump_back_in_time_begins_anew(surgery):
    remove, now_s = learnt(surgery)
    assert remove(surgery[-1], 0.0)[1] == Shown.LEARNING
    remove, now_s = learnt(surgery)
    assert remove(cv2.resize(surgery[-1], (240, 136)), now_s)[1] == Shown.LEARNING


def test_real_surgery_with_names_drawn_on_it(shared_data):
    clip = sorted((shared_data / "cholec-clips").glob("*.mp4"))[2]
    times_s = np.arange(0, 24, 0.25)
    remove = Deidentifier()
    kept, ink_left = [], []
    for k, bgr in enumerate(VideoFrames(clip, times_s).read(range(len(times_s)))):
        marked, ink = inked(bgr, *IN_BORDER, *ON_PICTURE)
        out, shown = remove(marked, times_s[k])
        if shown == Shown.VIEW:
            lit = bgr.max(axis=2) > 40
            kept.append(((out == marked).all(axis=2) & lit).sum() / lit.sum())
            ink_left.append(out[ink].any(axis=1).mean())
    print({"clip": clip.name, "shown": len(kept), "kept": np.mean(kept), "ink left": np.max(ink_left)})
    assert len(kept) > 60
    assert np.mean(kept) > 0.8
    assert np.max(ink_left) < 0.05


def test_text_of_a_real_tower_goes(shared_data):
    """Gas flow and pressure at the lower left of another hospital's frames, minutes apart but taken as half seconds."""
    files = sorted((shared_data / "ood").glob("*.jpg"), key=lambda file: int(file.stem.rpartition("-")[2]))
    surgeries = sorted({file.name.partition("-frame-")[0] for file in files})
    shown = 0
    for surgery in surgeries:
        remove = Deidentifier()
        for k, file in enumerate(file for file in files if file.name.startswith(surgery)):
            out, what = remove(cv2.imread(str(file)), k / 2)
            if what == Shown.VIEW:
                shown += 1
                assert not out[int(0.9 * out.shape[0]) :, : int(0.12 * out.shape[1])].any(), file.name
    print({"surgeries": len(surgeries), "pictures": len(files), "shown": shown})
    assert shown > 30


# -- messages --------------------------------------------------------------------------------------------------------


def made(name: str, **fields: Any) -> Any:
    """A message of this type with these fields, the others empty."""
    store = typestore()
    message = store.types[name]
    empty: dict[str, Any] = {}
    for field, (kind, detail) in store.fielddefs[name][1]:
        if kind.name == "NAME":
            empty[field] = made(detail)
        elif kind.name == "BASE":
            empty[field] = "" if detail[0] == "string" else 0
        else:
            inner = detail[0][1][0]
            empty[field] = [] if inner == "string" else np.array([], inner if inner != "byte" else np.uint8)
    return message(**{**empty, **fields})


def raw(message: Any) -> bytes:
    return bytes(typestore().serialize_cdr(message, message.__msgtype__))


def header(stamp_ns: int, frame_id: str = "or_3_st_marys") -> Any:
    sec, nanosec = divmod(stamp_ns, S)
    stamp = made("builtin_interfaces/msg/Time", sec=sec, nanosec=nanosec)
    return made("std_msgs/msg/Header", stamp=stamp, frame_id=frame_id)


def image(bgr: np.ndarray, stamp_ns: int) -> bytes:
    height, width = bgr.shape[:2]
    fields = {"height": height, "width": width, "encoding": "bgr8", "step": 3 * width, "data": bgr.reshape(-1)}
    return raw(made(IMAGE, header=header(stamp_ns), **fields))


def stamp_ns(stamp: Any) -> int:
    return stamp.sec * S + stamp.nanosec


NAMES = {
    "/or_3/image": "/surg_perception/image",
    "/or_3/phase": "/surg_perception/phase/phase",
    "/or_3/labels": "/surg_perception/phase/labels",
    "/or_3/novelty": "/surg_perception/phase/novelty",
    "/or_3/answered": "/surg_perception/vqa/answered",
    "/or_3/latent": "/surg_perception/phase/latent",
}
START = 1_790_000_000 * S


def test_shared_images_are_jpeg_without_names_places_times_or_anything_outside_the_view(surgery):
    share = SharedMessages(NAMES)
    shown = 0
    for k, bgr in enumerate(surgery):
        marked, ink = inked(bgr, *IN_BORDER)
        now = START + k * S // RATE_HZ
        out = share("/or_3/image", IMAGE, now, image(marked, now - 7_000_000))
        assert (out.topic, out.msgtype) == ("/surg_perception/image/compressed", COMPRESSED)
        assert out.log_ns == EPOCH_NS + k * S // RATE_HZ
        assert b"or_3" not in out.raw
        assert b"Exif" not in out.raw
        message = typestore().deserialize_cdr(out.raw, COMPRESSED)
        assert message.header.frame_id == "endoscope"
        assert stamp_ns(message.header.stamp) == out.log_ns - 7_000_000
        picture = decode_image(message)
        # JPEG spreads what is beside a block's black part over 8 pixels; drawn text is far from the view.
        assert picture[ink].max() < 16
        if picture.any():
            shown += 1
    assert shown == share.shown[Shown.VIEW] > 40
    assert share.shown[Shown.LEARNING] == len(surgery) - shown


def test_other_shared_messages_lose_cards_errors_and_times_and_keep_the_rest():
    share = SharedMessages(NAMES)
    phase = made(f"{OURS}/SurgicalPhase", header=header(START), phase="Clipping", phase_id=2, model_id="m@1")
    out = share("/or_3/phase", f"{OURS}/SurgicalPhase", START, raw(phase))
    back = typestore().deserialize_cdr(out.raw, out.msgtype)
    assert (back.phase, back.phase_id, back.header.frame_id) == ("Clipping", 2, "endoscope")
    assert stamp_ns(back.header.stamp) == EPOCH_NS == out.log_ns

    labels = made(f"{OURS}/PhaseLabels", labels=["a", "b"], card="trained at St Mary's by Dr. A.")
    labels.licence, labels.intended_use = "as agreed with St Mary's", "in St Mary's"
    out = share("/or_3/labels", f"{OURS}/PhaseLabels", START + 1, raw(labels))
    back = typestore().deserialize_cdr(out.raw, out.msgtype)
    assert (back.labels, back.card) == (["a", "b"], "")
    assert b"Mary" not in out.raw

    made_of = header(START - 3 * S).stamp
    news = made(f"{OURS}/Novelty", header=header(START), predicted_from=made_of, score=2.5)
    back = typestore().deserialize_cdr(
        share("/or_3/novelty", f"{OURS}/Novelty", START, raw(news)).raw, f"{OURS}/Novelty"
    )
    assert (stamp_ns(back.predicted_from), back.score) == (EPOCH_NS - 3 * S, 2.5)

    answer = made(f"{OURS}/QuestionAnswer", header=header(START), question="What?", error_message="/home/mary/x")
    out = share("/or_3/answered", f"{OURS}/QuestionAnswer", START, raw(answer))
    assert b"/home/mary" not in out.raw
    back = typestore().deserialize_cdr(out.raw, out.msgtype)
    assert back.question == "What?"
    assert stamp_ns(back.first_stamp) == 0, "no time stays no time"


def test_clocks_beside_each_other_are_shifted_each_and_no_latency_tells_the_true_time():
    share, kind = SharedMessages(NAMES), f"{OURS}/SurgicalPhase"

    def shared(stamp: int, log_ns: int, latency_ms: float) -> Any:
        message = made(kind, header=header(stamp), latency_ms=latency_ms)
        return typestore().deserialize_cdr(share("/or_3/phase", kind, log_ns, raw(message)).raw, kind)

    uptime = 1000 * S
    for k in range(3):
        back = shared(uptime + k * S, START + k * S, (START - uptime) * 1e-6)
        assert (stamp_ns(back.header.stamp), back.latency_ms) == (EPOCH_NS + k * S, 0.0)
        back = shared(START + k * S - S, START + k * S, 1000.0)
        assert (stamp_ns(back.header.stamp), back.latency_ms) == (EPOCH_NS + k * S - S, 1000.0)
        back = shared(0, START + k * S, START * 1e-6)
        assert (stamp_ns(back.header.stamp), back.latency_ms) == (0, 0.0)
    news = made(f"{OURS}/Novelty", header=header(0), predicted_from=header(START - S).stamp)
    out = SharedMessages(NAMES)("/or_3/novelty", news.__msgtype__, START, raw(news))
    assert stamp_ns(typestore().deserialize_cdr(out.raw, out.msgtype).predicted_from) == EPOCH_NS - S


def test_a_camera_clock_of_its_own_begins_with_the_year_2000_too_and_times_can_be_kept():
    phase = made(f"{OURS}/SurgicalPhase", header=header(55 * S))
    share = SharedMessages(NAMES)
    back = typestore().deserialize_cdr(
        share("/or_3/phase", phase.__msgtype__, START, raw(phase)).raw, phase.__msgtype__
    )
    assert stamp_ns(back.header.stamp) == EPOCH_NS
    share = SharedMessages(NAMES, shift_times=False)
    out = share("/or_3/phase", phase.__msgtype__, START, raw(phase))
    assert out.log_ns == START
    assert stamp_ns(typestore().deserialize_cdr(out.raw, out.msgtype).header.stamp) == 55 * S


@pytest.mark.parametrize(
    ("topic", "msgtype", "words"),
    [
        ("/or_3/latent", f"{OURS}/LatentFeatures", "the picture can be guessed"),
        ("/notes", "std_msgs/msg/String", "not known what it says"),
    ],
)
def test_what_cannot_be_shared_is_refused_with_what_to_do(topic, msgtype, words):
    with pytest.raises(ValueError, match=words) as refused:
        SharedMessages(NAMES).outgoing(topic, msgtype)
    assert "--no-deidentify" in str(refused.value)


def test_private_raw_images_become_jpeg_and_all_else_stays_as_it_came(surgery):
    keep = PrivateMessages(jpeg_quality=95)
    out = keep("/camera", IMAGE, START, image(surgery[0], START))
    assert (out.topic, out.msgtype, out.log_ns) == ("/camera/compressed", COMPRESSED, START)
    message = typestore().deserialize_cdr(out.raw, COMPRESSED)
    assert (message.header.frame_id, stamp_ns(message.header.stamp)) == ("or_3_st_marys", START)
    assert np.abs(decode_image(message).astype(int) - surgery[0]).mean() < 3
    jpeg = made(COMPRESSED, header=header(START), format="jpeg", data=np.frombuffer(encode_jpeg(surgery[0]), np.uint8))
    for topic, msgtype, content in (("/camera", COMPRESSED, raw(jpeg)), ("/any", "any_msgs/msg/Thing", b"\x00\x01")):
        out = keep(topic, msgtype, START, content)
        assert (out.topic, out.msgtype, out.raw) == (topic, msgtype, content)
    content = image(surgery[0], START)
    assert PrivateMessages(jpeg_quality=0)("/camera", IMAGE, START, content).raw == content


def test_an_image_that_cannot_be_decoded_is_left_out_and_counted(surgery):
    broken = made(IMAGE, header=header(START), height=4, width=4, encoding="bgr8", step=12, data=np.zeros(5, np.uint8))
    for messages in (PrivateMessages(), SharedMessages(NAMES)):
        assert messages("/or_3/image", IMAGE, START, raw(broken)) is None
        ((reason, count),) = messages.unreadable.items()
        assert "data has 5 bytes" in reason
        assert count == 1


def test_a_message_that_is_not_what_its_type_says_is_left_out_and_counted():
    share, kind = SharedMessages(NAMES), f"{OURS}/SurgicalPhase"
    for messages, topic, msgtype in (
        (share, "/or_3/phase", kind),
        (PrivateMessages(), "/image", "sensor_msgs/msg/Image"),
    ):
        assert messages(topic, msgtype, START, b"\x00\x01\x00\x00\xff\xff") is None
        ((reason, count),) = messages.unreadable.items()
        assert (count, reason.startswith(f"{topic}: no {msgtype}")) == (1, True)
