# SPDX-License-Identifier: Apache-2.0
"""Temporal head in PyTorch: the network that runs live, its training on few videos, its file, calibration."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from surg_perception.gsvit import temporal as temporal_module
from surg_perception.gsvit.calibration import best_temperature
from surg_perception.gsvit.temporal import (
    LatentSequence,
    TemporalConfig,
    TemporalNetwork,
    TemporalSettings,
    load_temporal,
    save_temporal,
    train_temporal,
)
from surg_perception.models import ModelError
from surg_perception.stream.temporal_head import TemporalHead

FEATURES, CLASSES = 6, 4
# Videos that begin anywhere (cut) or in excerpts (gaps) would take the history that these tests are about.
QUICK = TemporalSettings(
    TemporalConfig(FEATURES, CLASSES, layers=5, channels=12, dropout=0.1),
    epochs=25,
    learning_rate=8e-3,
    cut=0.05,
    gaps=0.0,
    seed=3,
)


def surgery(seed, step_s=1.0, name=""):
    """A video whose frames look alike in phases 0 and 2, and in 1 and 3: only the history tells them apart."""
    rng = np.random.default_rng(seed)
    phases = np.repeat(np.arange(4), rng.integers(20, 50, 4))
    looks = np.zeros((len(phases), FEATURES))
    looks[np.arange(len(phases)), phases % 2] = 3.0
    latents = (looks + rng.normal(size=looks.shape)).astype(np.float32)
    frame_head = np.exp(latents[:, [0, 1, 0, 1]])
    probabilities = (frame_head / frame_head.sum(axis=1, keepdims=True)).astype(np.float32)
    return LatentSequence(latents, probabilities, np.arange(len(phases)) * step_s, phases, name or f"video {seed}")


TRAINING = [surgery(seed) for seed in range(4)]
HELD_OUT = [surgery(seed) for seed in range(100, 106)]


@pytest.fixture(scope="module")
def trained():
    return train_temporal(TRAINING, QUICK, validation=HELD_OUT[:3])


def accuracy(answers, sequences):
    right = [(a.argmax(axis=1) == s.phases).mean() for a, s in zip(answers, sequences, strict=True)]
    return float(np.mean(right))


def randomised(config, seed=0):
    """A network with random weights and buffers, all at work."""
    torch.manual_seed(seed)
    network = TemporalNetwork(config).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.mul_(1.5)
    network.mean.normal_()
    network.std.uniform_(0.5, 2.0)
    network.temperature.fill_(1.6)
    return network


# The network ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", ["latent", "probabilities", "latent+probabilities"])
@pytest.mark.parametrize(("stages", "layers", "channels"), [(1, 1, 4), (2, 8, 32), (3, 5, 24)])
def test_the_streaming_head_says_what_the_network_says(inputs, stages, layers, channels):
    config = TemporalConfig(192, 7, inputs, stages, layers, channels)
    network = randomised(config)
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(400, 192, 4, 4)).astype(np.float32)
    probabilities = rng.dirichlet(np.full(7, 0.1), 400).astype(np.float32)
    expected = network.probabilities(latents, probabilities).numpy()
    found = network.head().run(latents, probabilities, np.arange(400.0))
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    assert np.ptp(expected, axis=0).max() > 0.02


def test_no_step_of_the_network_sees_a_later_one():
    network = randomised(TemporalConfig(8, 3, layers=5, channels=8))
    inputs = torch.randn(100, 8)
    inputs.requires_grad_()
    network(inputs)[-1][40].sum().backward()
    assert inputs.grad[41:].abs().max() == 0
    assert (inputs.grad[:41].abs().amax(dim=1) > 0).all()


def test_dropout_acts_in_training_only():
    network = randomised(TemporalConfig(8, 3, layers=3, channels=8, dropout=0.5))
    inputs = torch.randn(30, 8)
    assert torch.equal(network(inputs), network(inputs))
    network.train()
    assert not torch.equal(network(inputs), network(inputs))


# Training ------------------------------------------------------------------------------------------------------


def test_the_history_tells_what_one_frame_cannot(trained):
    frame_wise = accuracy([sequence.probabilities for sequence in HELD_OUT], HELD_OUT)
    head = trained.head()
    answers = [head.run(sequence.latents, None, sequence.times_s) for sequence in HELD_OUT]
    assert frame_wise < 0.65
    assert accuracy(answers, HELD_OUT) > 0.9


def test_probabilities_alone_and_both_inputs_train_as_well():
    for inputs in ("probabilities", "latent+probabilities"):
        settings = replace(QUICK, config=replace(QUICK.config, inputs=inputs), class_weights=True, epochs=30)
        head = train_temporal(TRAINING, settings).head()
        answers = [head.run(s.latents, s.probabilities, s.times_s) for s in HELD_OUT]
        assert accuracy(answers, HELD_OUT) > 0.85


def test_the_seed_decides_everything():
    settings = replace(QUICK, epochs=2)
    torch.manual_seed(1)
    first = train_temporal(TRAINING, settings).state_dict()
    torch.manual_seed(2)
    drawn = torch.rand(3)
    torch.manual_seed(2)
    second = train_temporal(TRAINING, settings).state_dict()
    assert torch.equal(torch.rand(3), drawn), "training must leave the caller's generator alone"
    other = train_temporal(TRAINING, replace(settings, seed=4)).state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not torch.equal(first["stages.0.inlet.weight"], other["stages.0.inlet.weight"])


def test_inputs_are_standardised_by_the_training_videos(trained):
    latents = np.concatenate([sequence.latents for sequence in TRAINING])
    np.testing.assert_allclose(trained.mean, latents.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(trained.std, latents.std(axis=0), atol=1e-5)
    constant = [replace(sequence, latents=sequence.latents * 0 + 5) for sequence in TRAINING]
    assert torch.equal(train_temporal(constant, replace(QUICK, epochs=1)).std, torch.ones(FEATURES))


def test_every_version_of_a_video_is_drawn():
    """Versions that tell the phase teach it although the plain latents are noise."""
    rng = np.random.default_rng(0)
    telling = [np.eye(FEATURES, dtype=np.float32)[s.phases] * 4 for s in TRAINING]
    noise = [replace(s, latents=rng.normal(size=s.latents.shape).astype(np.float32)) for s in TRAINING]
    both = [replace(s, versions=[one, one, one]) for s, one in zip(noise, telling, strict=True)]
    settings = replace(QUICK, epochs=15)
    seen = [np.eye(FEATURES, dtype=np.float32)[s.phases] * 4 for s in HELD_OUT]

    def score(sequences):
        head = train_temporal(sequences, settings).head()
        return accuracy([head.run(z, None, s.times_s) for z, s in zip(seen, HELD_OUT, strict=True)], HELD_OUT)

    assert score(both) > 0.9 > 0.7 > score(noise)


def test_a_video_at_a_higher_rate_is_learned_in_its_steps():
    """At 5 frames a second and steps of 1 s, a training takes each fifth frame, on a grid that varies."""
    dense = replace(surgery(0), times_s=surgery(0).times_s / 5)
    history = temporal_module._histories(dense, QUICK.config)[0]
    rng = np.random.default_rng(0)
    plain = replace(QUICK, cut=0.0, speed=1.0)
    starts = set()
    for _ in range(40):
        steps = temporal_module._augmented_steps(history, plain, rng)
        starts.add(int(steps[0]))
        assert set(np.diff(steps)) == {5}
    assert starts == {0, 1, 2, 3, 4}


def test_augmented_videos_keep_their_order_and_vary_in_length():
    history = temporal_module._histories(surgery(0), QUICK.config)[0]
    rng = np.random.default_rng(0)
    drawn = [temporal_module._augmented_steps(history, replace(QUICK, cut=0.5, speed=1.5), rng) for _ in range(200)]
    assert all((np.diff(steps) >= 0).all() and np.diff(steps).max(initial=0) <= 2 for steps in drawn)
    lengths = np.array([len(steps) for steps in drawn if steps[0] == 0]) / len(history.times_s)
    assert lengths.min() < 0.8 < 1.25 < lengths.max()
    assert lengths.min() > 0.6
    assert lengths.max() < 1.6
    assert max(steps[0] for steps in drawn) > len(history.times_s) / 3
    same = temporal_module._augmented_steps(history, replace(QUICK, cut=0.0, speed=1.0), rng)
    assert same.tolist() == list(range(len(history.times_s)))


def test_excerpts_keep_the_order_and_leave_stretches_out():
    steps, rng = np.arange(400), np.random.default_rng(0)
    drawn = [temporal_module._excerpts(steps, rng) for _ in range(100)]
    assert all(one[0] == 0 and (np.diff(one) > 0).all() for one in drawn)
    shares = [len(one) / 400 for one in drawn]
    assert min(shares) < 0.3 < 0.6 < max(shares)
    assert np.median([(np.diff(one) > 1).sum() for one in drawn]) > 5
    history = temporal_module._histories(surgery(0), QUICK.config)[0]
    paused = temporal_module._augmented_steps(history, replace(QUICK, cut=0.0, speed=1.0, gaps=1.0), rng)
    assert len(paused) < 0.9 * len(history.times_s)


def test_a_gap_divides_a_video_into_histories():
    sequence = surgery(0)
    times_s = sequence.times_s.copy()
    times_s[30:] += 600.0
    histories = temporal_module._histories(replace(sequence, times_s=times_s), QUICK.config)
    assert [len(history.times_s) for history in histories] == [30, len(times_s) - 30]


def test_unknown_phases_are_ignored():
    hidden = []
    for sequence in TRAINING:
        phases = sequence.phases.copy()
        phases[::2] = -1
        hidden.append(replace(sequence, phases=phases))
    head = train_temporal(hidden, QUICK).head()
    assert accuracy([head.run(s.latents, None, s.times_s) for s in HELD_OUT], HELD_OUT) > 0.85
    nothing = [replace(sequence, phases=np.full_like(sequence.phases, -1)) for sequence in TRAINING]
    with pytest.raises(ValueError, match="no frame with a known phase"):
        train_temporal(nothing, QUICK)


def test_losses_are_those_of_the_papers():
    torch.manual_seed(0)
    logits, phases = torch.randn(2, 30, CLASSES) * 5, torch.randint(0, CLASSES, (30,))
    phases[3] = -1
    plain = replace(QUICK, label_smoothing=0.0, smoothing_weight=0.0)
    known = phases >= 0
    expected = sum(-torch.log_softmax(stage, 1)[known][torch.arange(29), phases[known]].mean() for stage in logits)
    torch.testing.assert_close(temporal_module._loss(logits, phases, None, plain), expected)
    smooth = 0.0
    for stage in logits.double():
        log = torch.log_softmax(stage, 1)
        change = (log[1:] - log[:-1]).abs()
        smooth += float(torch.where(change > 4, torch.tensor(4.0).double(), change).pow(2).mean())
    with_smoothing = temporal_module._loss(logits, phases, None, replace(plain, smoothing_weight=0.15))
    assert float(with_smoothing) == pytest.approx(float(expected) + 0.15 * smooth, rel=1e-5)
    weights = temporal_module._median_frequency_weights([np.array([0, 0, 0, 1]), np.array([0, 2, -1])], 4)
    # Frequencies 4/6, 1/4 (one video), 1/2 (one video), none; median 1/2.
    np.testing.assert_allclose(weights, [0.75, 2.0, 1.0, 0.0], atol=1e-6)


# Bad input -----------------------------------------------------------------------------------------------------


def bad_sequences():
    good = surgery(0, name="VID68")
    count = len(good.phases)
    broken = good.latents.copy()
    broken[17, 2] = np.nan
    return [
        (replace(good, latents=broken), "'VID68'.*not finite.*row 17"),
        (replace(good, versions=[broken]), "'VID68'.*not finite.*row 17"),
        (replace(good, latents=good.latents[:, :5]), "'VID68'.*5 features.*takes 6 features"),
        (replace(good, latents=good.latents[:9]), f"'VID68'.*9 latents.*{count} times"),
        (replace(good, phases=good.phases[:9]), r"'VID68'.*phases \(9,\)"),
        (replace(good, phases=good.phases + 4), "'VID68'.*4 to 7.*4 classes.*another procedure"),
        (replace(good, times_s=good.times_s[::-1]), "'VID68'.*must not decrease"),
        (replace(good, versions=[good.latents] * 2, version_probabilities=[good.probabilities]), "2 versions, but"),
    ]


@pytest.mark.parametrize(("sequence", "says"), bad_sequences())
def test_a_video_that_does_not_fit_is_named(sequence, says):
    with pytest.raises(ValueError, match=says):
        train_temporal([surgery(1), sequence], QUICK)
    with pytest.raises(ValueError, match=says):
        train_temporal([surgery(1)], QUICK, validation=[sequence])


def test_no_video_is_an_error():
    with pytest.raises(ValueError, match="0 training videos"):
        train_temporal([], QUICK)


def test_a_loss_that_is_not_finite_stops_the_training_and_names_the_video(monkeypatch):
    from surg_perception.gsvit.trainer import TrainingDiverged

    calls = []
    loss = temporal_module._loss

    def failing(*arguments):
        calls.append(1)
        return loss(*arguments) * (math.nan if len(calls) == 6 else 1.0)

    monkeypatch.setattr(temporal_module, "_loss", failing)
    with pytest.raises(TrainingDiverged, match=r"epoch 1, .*step 5|video 'video \d'") as caught:
        train_temporal(TRAINING, QUICK)
    assert (caught.value.epoch, caught.value.step) == (1, 5)
    assert TRAINING[caught.value.indices[0]].name in str(caught.value)
    assert len(calls) == 6


@pytest.mark.parametrize(
    ("name", "value"),
    [("epochs", 0), ("learning_rate", 0.0), ("speed", 0.5), ("cut", 1.5), ("noise", -1.0), ("gradient_clip", math.nan)],
)
def test_impossible_settings_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        replace(QUICK, **{name: value})


def test_progress_is_shown_when_asked_for(capsys):
    text = io.StringIO()
    train_temporal(TRAINING[:1], replace(QUICK, epochs=2), console=Console(file=text, force_terminal=True, width=120))
    assert "temporal head, loss" in text.getvalue()
    train_temporal(TRAINING[:1], replace(QUICK, epochs=2))
    assert capsys.readouterr().out == ""


# File and calibration ------------------------------------------------------------------------------------------


def test_a_saved_head_is_the_same_head(tmp_path, trained):
    path = save_temporal(trained, tmp_path / "new" / "temporal.safetensors")
    assert [file.name for file in path.parent.iterdir()] == ["temporal.safetensors"]
    assert path.stat().st_mode & 0o777 == 0o644
    again = load_temporal(path)
    assert again.config == QUICK.config
    assert not again.training
    for name, value in trained.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    sequence = HELD_OUT[0]
    opened = TemporalHead.open(path).run(sequence.latents, None, sequence.times_s)
    assert opened.tobytes() == trained.head().run(sequence.latents, None, sequence.times_s).tobytes()
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ModelError, match="is no temporal head"):
        load_temporal(path)


def test_a_failed_save_keeps_the_old_file(tmp_path, trained, monkeypatch):
    import safetensors.torch

    path = save_temporal(trained, tmp_path / "temporal.safetensors")
    before = path.read_bytes()

    def full(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_temporal(trained, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_temperature_is_the_one_that_made_the_truth():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40_000, 7, generator=generator) * 2
    for temperature in (0.5, 1.0, 3.0):
        phases = torch.multinomial(torch.softmax(logits / temperature, 1), 1, generator=generator)[:, 0]
        assert best_temperature(logits, phases) == pytest.approx(temperature, rel=0.03)
    unknown = torch.cat([phases, torch.full((40_000,), -1)])
    doubled = torch.cat([logits, torch.full_like(logits, 9.0)])
    assert best_temperature(doubled, unknown) == pytest.approx(3.0, rel=0.03)


def test_the_temperature_has_bounds_and_refuses_nonsense():
    logits = torch.eye(7) * 4
    assert best_temperature(logits, torch.arange(7)) == pytest.approx(0.2, rel=0.01)
    assert best_temperature(logits, (torch.arange(7) + 1) % 7) == pytest.approx(20.0, rel=0.01)
    with pytest.raises(ValueError, match="known phase"):
        best_temperature(logits, torch.full((7,), -1))
    with pytest.raises(ValueError, match="not finite"):
        best_temperature(logits * math.nan, torch.arange(7))
    with pytest.raises(ValueError, match=r"found \[7, 7\], \[6\]"):
        best_temperature(logits, torch.arange(6))


def test_training_calibrates_on_the_validation_videos(trained):
    assert float(trained.temperature) != 1.0
    logits = torch.cat([trained.logits(s.latents, None) for s in HELD_OUT[:3]])
    phases = torch.from_numpy(np.concatenate([s.phases for s in HELD_OUT[:3]]))
    assert float(trained.temperature) == pytest.approx(best_temperature(logits, phases), rel=1e-3)
    assert float(train_temporal(TRAINING, replace(QUICK, epochs=1)).temperature) == 1.0
