# SPDX-License-Identifier: Apache-2.0
"""Streaming temporal head: the same bits as over the whole video, causality, its clock, bad input, training."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surg_perception.models import ModelError
from surg_perception.stream.temporal_head import (
    INPUTS,
    StepClock,
    TemporalConfig,
    TemporalHead,
    plan_steps,
    pool_latents,
    read_temporal,
)

SMALL = TemporalConfig(features=24, classes=5, inputs="latent+probabilities", stages=2, layers=4, channels=8)
CONFIGS = [
    SMALL,
    TemporalConfig(features=24, classes=5, inputs="latent", stages=1, layers=1, channels=1),
    TemporalConfig(features=1, classes=1, inputs="latent", stages=2, layers=2, channels=3),
    TemporalConfig(features=24, classes=5, inputs="probabilities", stages=3, layers=6, channels=17),
    TemporalConfig(features=192, classes=7, inputs="latent", stages=2, layers=8, channels=32),
    TemporalConfig(features=384, classes=7, inputs="latent+probabilities", stages=2, layers=9, channels=45),
]


def head_of(config, seed=0, **options):
    """A head with random weights, under which every layer, stage and tap counts."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in config.tensor_shapes().items():
        fan_in = shape[-1] if shape else 1
        tensors[name] = rng.normal(0, (0.4 if "pointwise" in name else 1.0) / np.sqrt(fan_in), shape)
    tensors["std"] = rng.uniform(0.5, 2.0, tensors["std"].shape)
    tensors["temperature"] = np.float32(1.7)
    return TemporalHead(config, tensors, **options)


def video_of(config, frames, seed=0, pooled=False):
    rng = np.random.default_rng(seed)
    shape = (frames, config.features) if pooled else (frames, config.features, 4, 4)
    latents = rng.normal(size=shape).astype(np.float32)
    probabilities = rng.dirichlet(np.full(config.classes, 0.3), frames).astype(np.float32)
    return latents, probabilities


def stepped(head, latents, probabilities, times_s):
    return np.stack([head.step(*frame) for frame in zip(latents, probabilities, times_s, strict=True)])


def state_of(head):
    """Everything that decides what the head says next."""
    return (
        head.steps,
        dict(vars(head._clock)),
        [ring.tobytes() for rings in head._rings for ring in rings],
    )


# The same bits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("frames", [1, 2, 63, 64, 65, 300])
def test_stepping_gives_the_bits_of_the_whole_video(config, frames):
    head = head_of(config)
    latents, probabilities = video_of(config, frames)
    whole = head.run(latents, probabilities, np.arange(frames) * 1.0)
    assert whole.dtype == np.float32
    assert whole.shape == (frames, config.classes)
    np.testing.assert_allclose(whole.sum(axis=1), 1.0, atol=1e-5)
    streamed = stepped(head, latents, probabilities, np.arange(frames) * 1.0)
    assert streamed.tobytes() == whole.tobytes()
    if config.classes > 1 and frames > 2:
        assert np.ptp(whole, axis=0).max() > 0.02  # the answers differ from frame to frame at all


@settings(max_examples=60, deadline=None)
@given(
    deltas=st.lists(st.sampled_from([0.0, 0.01, 0.033, 0.4, 0.5, 0.75, 1.0, 1.9, 31.0, -0.2, -3.0]), max_size=60),
    step_s=st.sampled_from([0.3, 1.0, 4.0]),
)
def test_stepping_gives_the_bits_of_the_whole_video_at_any_times(deltas, step_s):
    config = TemporalConfig(features=6, classes=3, inputs="latent+probabilities", layers=3, channels=4, step_s=step_s)
    head = head_of(config)
    times_s = 1.7e9 + np.cumsum([0.0, *deltas])
    latents, probabilities = video_of(config, len(times_s))
    whole = head.run(latents, probabilities, times_s)
    assert stepped(head, latents, probabilities, times_s).tobytes() == whole.tobytes()


def test_pooled_and_unpooled_latents_give_the_same_bits():
    head = head_of(SMALL)
    latents, probabilities = video_of(SMALL, 40)
    pooled = pool_latents(latents)
    np.testing.assert_allclose(pooled, latents.mean(axis=(2, 3)), atol=1e-6)
    times_s = np.arange(40.0)
    whole = head.run(pooled, probabilities, times_s)
    assert head.run(latents, probabilities, times_s).tobytes() == whole.tobytes()
    # As a backend may hand them over: one frame of a batch, channels last in memory.
    strided = np.moveaxis(np.ascontiguousarray(np.moveaxis(latents, 1, -1)), -1, 1)
    assert stepped(head, strided, probabilities, times_s).tobytes() == whole.tobytes()


def test_run_neither_uses_nor_changes_the_history():
    head, fresh = head_of(SMALL), head_of(SMALL)
    latents, probabilities = video_of(SMALL, 30)
    stepped(head, latents[:10], probabilities[:10], np.arange(10.0))
    before = state_of(head)
    whole = head.run(latents, probabilities, np.arange(30.0))
    assert state_of(head) == before
    assert whole.tobytes() == fresh.run(latents, probabilities, np.arange(30.0)).tobytes()


@pytest.mark.parametrize("inputs", INPUTS)
def test_the_future_changes_nothing_and_the_past_does(inputs):
    config = TemporalConfig(features=12, classes=4, inputs=inputs, layers=4, channels=8)
    head = head_of(config)
    latents, probabilities = video_of(config, 120)
    times_s = np.arange(120.0)
    whole = head.run(latents, probabilities, times_s)
    other = latents.copy(), probabilities.copy()
    other[0][60:] += 1.0
    other[1][60:] = other[1][60:, ::-1]
    changed = head.run(*other, times_s)
    assert changed[:60].tobytes() == whole[:60].tobytes()
    assert (changed[60] != whole[60]).any()
    # One early frame reaches as far as the receptive field says, and no further.
    reach = config.receptive_steps
    assert reach == 1 + 2 * 2 * 15
    early = latents.copy(), probabilities.copy()
    early[0][5] += 1.0
    early[1][5] = early[1][5, ::-1]
    differs = np.flatnonzero((head.run(*early, times_s) != whole).any(axis=1))
    assert differs[0] == 5
    assert 5 + reach - 20 < differs[-1] <= 5 + reach - 1


# The clock -----------------------------------------------------------------------------------------------------


def joined_times(times_s, step_s):
    return np.asarray(times_s)[plan_steps(times_s, step_s).joins]


@pytest.mark.parametrize("rate_hz", [1.0, 2.0, 7.0, 24.0, 25.0, 29.97, 30.0, 59.94, 60.0])
@pytest.mark.parametrize("step_s", [1.0, 4.0, 0.7])
@pytest.mark.parametrize("jitter", [0.0, 0.4])
def test_steps_do_not_drift_at_any_frame_rate(rate_hz, step_s, jitter):
    frame_s = 1.0 / rate_hz
    noise = np.random.default_rng(0).uniform(-jitter / 2, jitter / 2, int(200 * rate_hz)) * frame_s
    times_s = 1.7e9 + np.arange(len(noise)) * frame_s + noise
    joined = joined_times(times_s, step_s) - times_s[0]
    if frame_s > step_s:
        assert len(joined) == len(times_s)
        return
    points = np.round(joined / step_s)
    assert np.abs(joined - points * step_s).max() <= frame_s * (0.5 + jitter) + 1e-6
    assert np.diff(points).min() == 1
    assert len(joined) == pytest.approx(200 / step_s, rel=0.05 if jitter and frame_s > step_s / 2 else 0.0, abs=1.1)


def test_irregular_frames_keep_the_grid_where_they_can():
    # CholecT50: gaps of 1 and 2 s, steps of 4 s.
    gaps = np.random.default_rng(1).choice([1.0, 2.0], 400, p=[0.6, 0.4])
    times_s = np.concatenate(([0.0], np.cumsum(gaps)))
    joined = joined_times(times_s, 4.0)
    assert np.diff(joined).min() >= 2.0
    assert np.diff(joined).max() <= 6.0
    assert np.diff(joined).mean() == pytest.approx(4.0, abs=0.02)
    # 2.7 comes for 3, and nothing for 2; after a pause no steps are made up for.
    assert joined_times([0.0, 1.0, 2.7, 3.3, 3.9, 4.7], 1.0).tolist() == [0.0, 1.0, 2.7, 3.9, 4.7]
    assert joined_times([0.0, 9.9, 10.0, 10.1, 10.9, 11.0], 1.0).tolist() == [0.0, 9.9, 10.9]


def test_what_joined_would_join_alone():
    rng = np.random.default_rng(2)
    for _ in range(50):
        times_s = np.cumsum(rng.choice([0.02, 0.04, 0.3, 0.6, 1.1], 200))
        joined = joined_times(times_s, 1.0)
        assert joined_times(joined, 1.0).tolist() == joined.tolist()


def test_two_frames_of_one_time_are_both_judged_and_only_the_first_joins():
    head = head_of(SMALL)
    latents, probabilities = video_of(SMALL, 4)
    first = head.step(latents[0], probabilities[0], 5.0)
    second = head.step(latents[1], probabilities[1], 5.0)
    assert head.steps == 1
    assert (first != second).any()
    assert head.step(latents[2], probabilities[2], 5.5).shape == (5,)
    assert head.steps == 1
    assert head.step(latents[3], probabilities[3], 6.0).shape == (5,)
    assert head.steps == 2
    assert head.resets == {"gap": 0, "seek": 0}


def test_thirty_frames_a_second_give_at_the_steps_what_one_a_second_gives():
    head = head_of(SMALL)
    times_s = 100.0 + np.arange(30 * 40) / 30
    latents, probabilities = video_of(SMALL, len(times_s), pooled=True)
    fast = stepped(head, latents, probabilities, times_s)
    assert head.steps == 40
    slow = stepped(head_of(SMALL), latents[::30], probabilities[::30], times_s[::30])
    assert fast[::30].tobytes() == slow.tobytes()
    # In between, every frame has an answer of its own.
    assert len(np.unique(fast, axis=0)) == len(fast)


def test_a_frame_between_two_steps_is_a_peek_and_changes_nothing():
    head = head_of(SMALL)
    latents, probabilities = video_of(SMALL, 40)
    stepped(head, latents[:30], probabilities[:30], np.arange(30.0))
    before = state_of(head)
    peeked = head.peek(latents[30], probabilities[30])
    assert state_of(head) == before
    between = head.step(latents[30], probabilities[30], 29.4)
    assert head.steps == 30
    assert state_of(head)[2] == before[2]
    assert between.tobytes() == peeked.tobytes()
    assert head.step(latents[30], probabilities[30], 30.0).tobytes() == peeked.tobytes()
    assert head.steps == 31


@pytest.mark.parametrize(
    ("config", "jump_s", "reason"),
    [
        (SMALL, 300.0, ""),
        (SMALL, 300.1, "gap"),
        (TemporalConfig(24, 5, "latent+probabilities", layers=4, channels=8, step_s=40.0), 399.0, ""),
        (TemporalConfig(24, 5, "latent+probabilities", layers=4, channels=8, step_s=40.0), 401.0, "gap"),
        (SMALL, -0.4, ""),
        (SMALL, -0.6, "seek"),
        (SMALL, -1000.0, "seek"),
    ],
)
def test_a_gap_or_a_seek_starts_a_new_history(config, jump_s, reason):
    head, fresh = head_of(config), head_of(config)
    latents, probabilities = video_of(config, 40)
    times_s = np.arange(40) * config.step_s
    times_s[20:] += jump_s - config.step_s
    answers = stepped(head, latents, probabilities, times_s)
    assert head.resets == {"gap": int(reason == "gap"), "seek": int(reason == "seek")}
    anew = stepped(fresh, latents[20:], probabilities[20:], times_s[20:])
    assert (answers[20:].tobytes() == anew.tobytes()) == bool(reason)
    assert (state_of(head) == state_of(fresh)) == bool(reason)


def test_the_gap_is_a_setting():
    head = head_of(SMALL, reset_gap_s=2.0)
    latents, probabilities = video_of(SMALL, 3)
    stepped(head, latents, probabilities, [0.0, 2.0, 4.5])
    assert head.resets["gap"] == 1
    with pytest.raises(ValueError, match="reset_gap_s is 0"):
        head_of(SMALL, reset_gap_s=0.0)


def test_reset_forgets_everything():
    head, fresh = head_of(SMALL), head_of(SMALL)
    latents, probabilities = video_of(SMALL, 50)
    stepped(head, latents, probabilities, np.arange(50.0))
    assert state_of(head) != state_of(fresh)
    head.reset()
    assert state_of(head) == state_of(fresh)
    again = stepped(head, latents, probabilities, 7.0 + np.arange(50.0))
    assert again.tobytes() == stepped(fresh, latents, probabilities, np.arange(50.0)).tobytes()


def test_work_and_memory_of_a_frame_are_constant(monkeypatch):
    from surg_perception.stream import temporal_head

    head = head_of(SMALL)
    sizes = []
    products = temporal_head._affine

    def counting(x, weight_and_bias):
        sizes[-1] += len(x) * weight_and_bias[0].size
        return products(x, weight_and_bias)

    monkeypatch.setattr(temporal_head, "_affine", counting)
    latents, probabilities = video_of(SMALL, 200)
    held = head.state_bytes
    rings = [id(ring) for rings in head._rings for ring in rings]
    for k in range(200):
        sizes.append(0)
        head.step(latents[k], probabilities[k], k * 0.3)
    assert set(sizes) == {head.multiply_adds}
    assert head.multiply_adds == 8 * 29 + 5 * 8 + 8 * 5 + 5 * 8 + 2 * 4 * (3 * 64 + 64)
    assert head.state_bytes == held == 2 * 2 * (1 + 2 + 4 + 8) * 8 * 4
    assert [id(ring) for rings in head._rings for ring in rings] == rings
    assert not any(isinstance(value, list | dict) and len(value) > 4 for value in vars(head).values())
    assert set(vars(head._clock)) == set(vars(StepClock(1.0, 30.0)))


# Bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("latent", "probabilities", "time_s", "says"),
    [
        (np.zeros((192, 4, 4)), np.full(5, 0.2), 1.0, "192 features.*takes 24 features"),
        (np.zeros(23), np.full(5, 0.2), 1.0, "23 features.*takes 24 features"),
        (np.zeros((24, 4)), np.full(5, 0.2), 1.0, r"shape \(1, 24, 4\).*takes 24 features"),
        (None, np.full(5, 0.2), 1.0, "latents are missing"),
        (np.zeros(24), np.full(7, 0.2), 1.0, r"\(1, 7\).*takes \[n, 5\]"),
        (np.zeros(24), None, 1.0, "probabilities are missing"),
        (np.full(24, np.nan), np.full(5, 0.2), 1.0, "not finite"),
        (np.full((24, 4, 4), np.inf), np.full(5, 0.2), 1.0, "not finite"),
        (np.zeros(24), np.full(5, np.nan), 1.0, "not finite"),
        (np.zeros(24), np.full(5, 0.2), float("nan"), "time_s is nan"),
    ],
)
def test_bad_input_is_refused_and_leaves_no_trace(latent, probabilities, time_s, says):
    head = head_of(SMALL)
    head.step(np.ones(24), np.full(5, 0.2), 0.0)
    before = state_of(head)
    with pytest.raises(ValueError, match=says):
        head.step(latent, probabilities, time_s)
    assert state_of(head) == before


def test_videos_whose_parts_do_not_fit_are_refused():
    head = head_of(SMALL)
    latents, probabilities = video_of(SMALL, 10)
    with pytest.raises(ValueError, match=r"9 times, but .* 10 frames"):
        head.run(latents, probabilities, np.arange(9.0))
    with pytest.raises(ValueError, match="10 latents, but 8"):
        head.run(latents, probabilities[:8], np.arange(10.0))
    latents[3, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="row 3 of 10"):
        head.run(latents, probabilities, np.arange(10.0))
    assert head.run(latents[:0], probabilities[:0], []).shape == (0, 5)


def test_a_picture_from_another_world_does_not_poison_the_history():
    head = head_of(SMALL)
    latents, probabilities = video_of(SMALL, 10)
    assert np.isfinite(head.step(np.full(24, 3e38), probabilities[0], 0.0)).all()
    for k in range(1, 10):
        assert np.isfinite(head.step(latents[k], probabilities[k], float(k))).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("features", 0),
        ("classes", 2.0),
        ("inputs", "pixels"),
        ("stages", 0),
        ("layers", 40),
        ("channels", -1),
        ("dropout", 1.0),
        ("step_s", 0.0),
        ("step_s", float("nan")),
    ],
)
def test_impossible_configurations_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        TemporalConfig(**{"features": 24, "classes": 5, name: value})


def test_an_unused_input_may_be_missing():
    config = TemporalConfig(features=24, classes=5, inputs="latent", layers=2, channels=4)
    latents, probabilities = video_of(config, 1)
    answer = head_of(config).step(latents[0], None, 0.0)
    assert answer.tobytes() == head_of(config).step(latents[0], probabilities[0], 0.0).tobytes()


# Files ---------------------------------------------------------------------------------------------------------


def write(path, tensors, config):
    from dataclasses import asdict

    from safetensors.numpy import save_file

    save_file(tensors, path, metadata={"temporal_config": json.dumps(asdict(config))})
    return path


def tensors_of(config, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: np.asarray(rng.uniform(0.1, 1.0, shape), np.float32) for name, shape in config.tensor_shapes().items()
    }


def test_a_file_is_read_as_the_safetensors_library_reads_it(tmp_path):
    tensors = tensors_of(SMALL)
    config, found = read_temporal(write(tmp_path / "t.safetensors", tensors, SMALL))
    assert config == SMALL
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(found[name], value)
        assert found[name].shape == value.shape
    latents, probabilities = video_of(SMALL, 9)
    opened = TemporalHead.open(tmp_path / "t.safetensors").run(latents, probabilities, np.arange(9.0))
    assert opened.tobytes() == TemporalHead(SMALL, tensors).run(latents, probabilities, np.arange(9.0)).tobytes()


def test_files_that_are_no_temporal_head_are_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    with pytest.raises(ModelError, match="no temporal head at"):
        TemporalHead.open(path)
    tensors = tensors_of(SMALL)
    good = write(path, tensors, SMALL).read_bytes()
    for content in (b"", b"\x00", b"not a file", good[:200], good[:-4], b"\xff" * 8 + good[8:], good[:8] + b"[" * 999):
        path.write_bytes(content)
        with pytest.raises(ModelError, match="is no temporal head"):
            TemporalHead.open(path)
    wrong = [
        ({name: value for name, value in tensors.items() if name != "std"}, "missing.*std"),
        ({**tensors, "more": np.zeros(1, np.float32)}, "not expected.*more"),
        ({**tensors, "mean": np.zeros(7, np.float32)}, r"mean has shape \(7,\), expected \(29,\)"),
        ({**tensors, "mean": np.full(29, np.nan, np.float32)}, "mean is not finite"),
        ({**tensors, "std": np.zeros(29, np.float32)}, "std has values that are not above 0"),
        ({**tensors, "mean": np.zeros(29, np.float16)}, "expected float32"),
    ]
    for content, says in wrong:
        with pytest.raises(ModelError, match=says):
            TemporalHead.open(write(path, content, SMALL))
    from safetensors.numpy import save_file

    save_file(tensors, path)
    with pytest.raises(ModelError, match="is no temporal head"):
        TemporalHead.open(path)


def test_the_streaming_head_needs_neither_torch_nor_safetensors(tmp_path):
    path = write(tmp_path / "t.safetensors", tensors_of(SMALL), SMALL)
    code = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['safetensors'] = None\n"
        "import numpy as np\n"
        "from surg_perception.stream.temporal_head import TemporalHead\n"
        f"print(TemporalHead.open({str(path)!r}).step(np.zeros(24), np.full(5, 0.2), 0.0).shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(5,)"
