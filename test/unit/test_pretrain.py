# SPDX-License-Identifier: Apache-2.0
"""Next-frame pre-training: which frames form pairs, what is learned from them, and the model folder at the end."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import nn

from surg_perception.cli import train as cli
from surg_perception.data.datasets import Dataset, Video, open_dataset
from surg_perception.data.frame_readers import NoFrames
from surg_perception.data.labels import PROCEDURES
from surg_perception.gsvit import CheckpointError, load_gsvit
from surg_perception.gsvit.network import GSViT, GSViTConfig
from surg_perception.gsvit.pretrain import (
    FINE_TUNING,
    PRE_TRAINING,
    Clip,
    NextFrameTask,
    PretrainOptions,
    augment_pair,
    draw_predictions,
    frame_pairs,
    model_name,
    pretrain,
    start_model,
)
from surg_perception.gsvit.trainer import read_lines
from surg_perception.models import read_card
from surg_perception.runtime import export

SMALL = GSViTConfig("m0", decoder_width=32, decoder_rank=16)


def pictures(seed: int, count: int = 4) -> NDArray[np.uint8]:
    """Smooth pictures, uint8 [count, 224, 224, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    return np.stack([cv2.resize(image, (224, 224), interpolation=cv2.INTER_CUBIC) for image in coarse])


def clip(seed: int, count: int = 4) -> Clip:
    times_s = np.arange(count, dtype=np.float64)
    return Clip(f"clip{seed}", pictures(seed, count), times_s, frame_pairs(times_s, 1.0))


DATA = "phantom:seeds=40-42,duration_s=40,width=160,height=120"


def command(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    options = parser.parse_args(["train", "gsvit", *arguments])
    return int(options.run(options))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A model folder pre-trained on the phantom, and the command's arguments."""
    folder = tmp_path_factory.mktemp("pretrained")
    arguments = [DATA, "--out", str(folder / "base"), "--cache", str(folder / "cache"), "--size", "m0"]
    arguments += ["--decoder-width", "32", "--decoder-rank", "16", "--epochs", "2", "--learning-rate", "0.01"]
    arguments += ["--batch", "4", "--validation", "phantom-42", "--threads", "1", "--no-forecast"]
    assert command(*arguments) == 0
    return folder / "base", arguments


@pytest.fixture(scope="module")
def model() -> GSViT:
    torch.manual_seed(0)
    return GSViT(SMALL).eval()


# ---- pairs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times_s", "gap_s", "pairs"),
    [
        ([0, 1, 2, 3], 1.0, [(0, 1), (1, 2), (2, 3)]),
        ([0, 1, 2, 3], 2.0, [(0, 2), (1, 3)]),
        # A break of 5 s is never bridged.
        ([0, 1, 2, 7, 8], 1.0, [(0, 1), (1, 2), (3, 4)]),
        # At 25 fps thinned to 5: the frame a second later is five on.
        (np.arange(12) / 5, 1.0, [(k, k + 5) for k in range(7)]),
        # Nearest, and within half a step of 0.4 s: 0.2 s and 0.1 s are, 0.3 s is not.
        ([0.0, 0.4, 0.8, 1.5], 1.0, [(0, 2), (1, 3)]),
        # Frames every 4 s have none 1 s later, and each has one 4 s later.
        ([0, 4, 8], 1.0, []),
        ([0, 4, 8], 4.0, [(0, 1), (1, 2)]),
        # A gap far below the step: the frame itself is nearest, and is no pair.
        ([0, 1, 2], 0.1, []),
        ([0], 1.0, []),
    ],
)
def test_a_pair_is_the_nearest_frame_within_half_a_step(
    times_s: list[float], gap_s: float, pairs: list[tuple[int, int]]
) -> None:
    found = frame_pairs(np.asarray(times_s, np.float64), gap_s)
    assert found.dtype == np.int64
    assert found.reshape(-1, 2).tolist() == [list(pair) for pair in pairs]


def test_a_batch_holds_the_pairs_asked_for_as_bgr() -> None:
    clips = [clip(1), clip(2, 3)]
    task = NextFrameTask(GSViT(SMALL), clips, [], PretrainOptions())
    assert task.samples == 3 + 2
    batch = task.batch(np.array([4, 0]), np.random.default_rng(0))
    for row, (number, frame) in enumerate(((1, 1), (0, 0))):
        frames = torch.from_numpy(clips[number].frames).permute(0, 3, 1, 2)
        assert torch.equal(batch["frame"][row], frames[frame])
        assert torch.equal(batch["target"][row], frames[frame + 1])
    assert batch["frame"].dtype == torch.uint8


def test_augmentation_is_the_same_for_both_frames_and_decided_by_the_generator() -> None:
    first, second = pictures(3, 2)
    frame, target = augment_pair(first, first, np.random.default_rng(1))
    np.testing.assert_array_equal(frame, target)
    assert np.abs(frame.astype(int) - first).mean() > 5
    _, other = augment_pair(second, first, np.random.default_rng(1))
    np.testing.assert_array_equal(other, target)

    still = replace(clip(4), frames=np.repeat(pictures(4, 1), 4, axis=0))
    options = PretrainOptions(mirror=True, augment=True)
    task = NextFrameTask(GSViT(SMALL), [still] * 6, [], options)
    indices = np.arange(task.samples)
    batch = task.batch(indices, np.random.default_rng(5))
    assert torch.equal(batch["frame"], batch["target"])
    again = task.batch(indices, np.random.default_rng(5))
    assert torch.equal(batch["frame"], again["frame"])
    assert np.array_equal(still.frames[0], pictures(4, 1)[0])

    mirrored = NextFrameTask(task.module.model, [still] * 6, [], PretrainOptions(mirror=True))
    found = mirrored.batch(indices, np.random.default_rng(5))["frame"]
    plain = torch.from_numpy(still.frames[0]).permute(2, 0, 1)
    flipped = [bool(torch.equal(image, plain.flip(2))) for image in found]
    assert 0 < sum(flipped) < len(flipped)
    assert all(turned or torch.equal(image, plain) for turned, image in zip(flipped, found, strict=True))


# ---- network and loss --------------------------------------------------------------------------------------


@torch.no_grad()
def test_predicting_the_change_is_the_same_task_in_other_words(model: GSViT) -> None:
    torch.manual_seed(2)
    changing = GSViT(replace(SMALL, predict_change=True)).eval()
    task = NextFrameTask(changing, [clip(5)], [], PretrainOptions())
    batch = task.batch(np.arange(3), np.random.default_rng(0))
    frame, target = batch["frame"] / 255.0, batch["target"] / 255.0
    assert changing.decoder is not None
    change = changing.decoder(changing.features(frame))
    loss, _ = task.loss(task.module, batch)
    torch.testing.assert_close(loss, (change - (target - frame)).abs().mean())
    rgb = changing.predict_next(frame.flip(1))
    torch.testing.assert_close(rgb.flip(1), task.module(frame).clamp(0.0, 1.0))

    whole = NextFrameTask(model, [clip(5)], [], PretrainOptions())
    loss, _ = whole.loss(whole.module, batch)
    torch.testing.assert_close(loss, (model.predict_next(frame.flip(1)).flip(1) - target).abs().mean())


def test_validation_stands_beside_copying_the_last_frame(model: GSViT) -> None:
    class Repeat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, bgr: torch.Tensor) -> torch.Tensor:
            return bgr

    clips = [clip(6), clip(7, 3)]
    task = NextFrameTask(model, [clip(1)], clips, PretrainOptions())
    figures = task.measure(Repeat())
    errors = np.concatenate([np.diff(c.frames.astype(np.float64), axis=0) / 255.0 for c in clips])
    assert figures["l1"] == figures["l1_copy"] == pytest.approx(np.abs(errors).mean(), rel=1e-5)
    psnr_db = (-10.0 * np.log10(np.square(errors).mean((1, 2, 3)))).mean()
    assert figures["psnr_db"] == figures["psnr_copy_db"] == pytest.approx(psnr_db, rel=1e-5)
    figures = task.measure(task.module)
    assert figures["l1"] != figures["l1_copy"]
    few = NextFrameTask(model, [clip(1)], [clip(6, 101)], PretrainOptions(validation_pairs=5))
    assert few.measured[:, 1].tolist() == [0, 25, 50, 74, 99]


def test_the_picture_shows_what_it_says(tmp_path: Path) -> None:
    frames, targets = pictures(8, 2), pictures(9, 2)
    predictions = np.stack([targets[0], frames[1]])
    draw_predictions(frames, predictions, targets, ["video01, 3.0 s", "video02, 4.0 s"], 1.0, tmp_path / "p.png")
    picture = cv2.imread(str(tmp_path / "p.png"))
    assert picture is not None
    row, column = 224 + 22, 224 + 6
    assert picture.shape == (22 + 2 * row, 6 + 4 * column, 3)
    for k in range(2):
        for n, images in enumerate((frames, predictions, targets)):
            panel = picture[22 + k * row : 22 + k * row + 224, 6 + n * column : 6 + n * column + 224]
            np.testing.assert_array_equal(panel, images[k])
        error = picture[22 + k * row : 22 + k * row + 224, 6 + 3 * column : 6 + 3 * column + 224]
        assert (error.max() < 20) == (k == 0)
        assert picture[22 + k * row + 224 : 22 + (k + 1) * row].min() < 60
    for n in range(4):
        assert picture[:22, 6 + n * column : 6 + n * column + 224].min() < 60


# ---- start weights -----------------------------------------------------------------------------------------


def test_start_weights_of_every_kind(base: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, _ = base
    model = load_gsvit(folder)
    bare = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    save_file(bare | {"head.l.weight": torch.zeros(3)}, tmp_path / "timm.safetensors")
    save_file({f"encoder.{name}": value for name, value in bare.items()}, tmp_path / "prefixed.safetensors")
    ask = PretrainOptions(start=folder)

    same, facts = start_model(ask, 0)
    assert replace(same.config, head_hidden=SMALL.head_hidden) == SMALL
    assert same.training
    for name, value in same.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert facts["start_decoder"] == "that of the start weights"
    assert facts["start_model"] == read_card(folder).model_id
    assert facts["start_weights"]["sha256"] == read_card(folder).weights.sha256

    for options in (
        replace(ask, decoder_width=48),
        replace(ask, predict_change=True),
        replace(ask, start=tmp_path / "timm.safetensors", size="m0", decoder_width=32, decoder_rank=16),
        replace(ask, start=tmp_path / "prefixed.safetensors", size="m0", decoder_width=32, decoder_rank=16),
    ):
        other, facts = start_model(options, 0)
        assert facts["start_decoder"] == "random"
        for name, value in other.encoder.state_dict().items():
            torch.testing.assert_close(value, bare[name], rtol=0, atol=0, msg=name)
        assert other.decoder is not None
        assert other.config.predict_change == bool(options.predict_change)
        assert other.decoder.width == (options.decoder_width or 32)

    with pytest.raises(CheckpointError, match="'m0', but 'm5' was asked for"):
        start_model(replace(ask, size="m5"), 0)
    with pytest.raises(CheckpointError, match=r"does not hold a GSViT of size 'm5'"):
        start_model(PretrainOptions(start=tmp_path / "timm.safetensors"), 0)
    with pytest.raises(FileNotFoundError):
        start_model(PretrainOptions(start=tmp_path / "none.pkl"), 0)


def test_random_start_is_decided_by_the_seed() -> None:
    options = PretrainOptions(size="m0", decoder_width=32, decoder_rank=16)
    first, again, other = (start_model(options, seed)[0].encoder.state_dict() for seed in (1, 1, 2))
    name = "stages.0.blocks.0.dw0.m.conv.weight"
    name = name if name in first else next(key for key, value in first.items() if value.ndim == 4)
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


# ---- which videos ------------------------------------------------------------------------------------------


def videos(*facts: tuple[str, str], step_s: float = 1.0) -> Dataset:
    times_s = np.arange(5) * step_s
    unknown = np.full(5, -1, np.int64)
    made = tuple(Video(name, procedure, times_s, unknown, None, NoFrames("no frames")) for name, procedure in facts)
    return Dataset(Path("x"), "videos", "", (), made)


@pytest.mark.parametrize(
    ("options", "step_s", "reason"),
    [
        (PretrainOptions(procedure="Colectomy"), 1.0, r"no video of the procedure 'Colectomy'; the data has Hepatec"),
        (PretrainOptions(validation=("d",)), 1.0, r"no video d to hold back; the data has a, b, c"),
        (PretrainOptions(validation=("a", "b", "c")), 1.0, r"all 3 videos are held back"),
        (PretrainOptions(), 4.0, r"none of a, b has two frames 1 s apart; their frames are 4 s apart.*--gap"),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused_with_the_reason(
    options: PretrainOptions, step_s: float, reason: str, tmp_path: Path
) -> None:
    data = videos(("a", "Hepatectomy"), ("b", "Hernia Repair"), ("c", ""), step_s=step_s)
    with pytest.raises(ValueError, match=reason):
        pretrain([data], tmp_path / "out", options, PRE_TRAINING, cache=tmp_path)
    assert not (tmp_path / "out").exists()


def test_the_papers_settings_and_names() -> None:
    assert (PRE_TRAINING.epochs, PRE_TRAINING.batch, PRE_TRAINING.optimiser) == (5, 100, "adam")
    assert (PRE_TRAINING.learning_rate, PRE_TRAINING.final_learning_rate) == (1e-3, 1e-5)
    assert PretrainOptions().gap_s == 1.0
    assert FINE_TUNING.epochs == 1
    assert [FINE_TUNING.learning_rate_at(step, 10) for step in range(10)] == [1e-4] * 10
    assert len(PROCEDURES) == 10
    assert model_name("hernia repair") == "GSViT-HerniaRepair"
    assert model_name("Cholecystectomy") == "GSViT-Cholecystectomy"


# ---- the whole ---------------------------------------------------------------------------------------------


def test_pretraining_learns_and_leaves_a_model_folder(base: tuple[Path, list[str]]) -> None:
    folder, _ = base
    training = folder / "training"
    losses = [line["loss"] for line in read_lines(training / "losses.jsonl")]
    assert len(losses) == 2 * (2 * 39 // 4)
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:3])
    metrics = read_lines(training / "metrics.jsonl")
    assert metrics[-1]["l1"] < metrics[0]["l1"]
    drawn = cv2.imread(str(training / "pictures" / f"step_{len(losses):07d}" / "prediction.png"))
    assert drawn is not None
    assert drawn.std() > 30

    card = read_card(folder)
    card.verify()
    measured = card.metrics["next_frame"]
    assert measured["l1"] == pytest.approx(metrics[-1]["l1"], abs=1e-5)
    frames = np.load(next((folder.parent / "cache").glob("phantom-42-*.npy")))
    copied = np.abs(np.diff(frames.astype(np.float64), axis=0)).mean() / 255.0
    assert measured["l1_copy"] == pytest.approx(copied, abs=1e-5)
    assert card.training["videos"] == ["phantom-40", "phantom-41"]
    assert card.training["held_back"] == ["phantom-42"]
    assert (card.training["frames"], card.training["pairs"], card.training["gap_s"]) == (80, 78, 1.0)
    assert card.training["start_weights"] == "random"
    assert card.licence == "Apache-2.0"
    assert str(folder.parent) not in card.to_yaml()
    assert replace(load_gsvit(folder).config, head_hidden=SMALL.head_hidden) == SMALL


def test_pretraining_again_goes_on_only_with_the_same_options(
    base: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, arguments = base
    losses = (folder / "training" / "losses.jsonl").read_bytes()
    assert command(*arguments, "--gap", "2") == 1
    assert "gap_s was 1.0 and is now 2.0" in capsys.readouterr().err
    assert (folder / "training" / "losses.jsonl").read_bytes() == losses


def test_a_procedure_is_fine_tuned_from_the_pretrained_weights(
    base: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = base
    # Exporting the encoder takes seconds and has its own tests.
    graph = (folder / "model.onnx").read_bytes()
    monkeypatch.setattr(export, "export_onnx", lambda model, path, **_: path.write_bytes(graph) and path)
    fine = ["phantom:seeds=40-40,duration_s=40,width=160,height=120", "--out", str(tmp_path / "fine")]
    fine += ["--start", str(folder), "--procedure", "cholecystectomy", "--validation", "none", "--batch", "4"]
    assert command(*fine, "--cache", str(folder.parent / "cache"), "--threads", "1", "--weights", "fp16") == 0
    card = read_card(tmp_path / "fine")
    card.verify()
    assert (card.name, card.procedure) == ("GSViT-Cholecystectomy", "Cholecystectomy")
    assert card.training["start_model"] == read_card(folder).model_id
    assert card.training["settings"]["learning_rate"] == 1e-4
    assert card.metrics == {}
    assert card.forecast is not None
    assert card.forecast.gap_s == 1.0
    lines = read_lines(tmp_path / "fine" / "training" / "losses.jsonl")
    assert [line["lr"] for line in lines] == [1e-4] * (39 // 4)
    before, after = (load_gsvit(path).state_dict() for path in (folder, tmp_path / "fine"))
    moved = [(before[name] - value).abs().max() for name, value in after.items() if name.endswith("weight")]
    assert 0.0 < max(moved) < 0.05


def test_real_frames_every_four_seconds_pair_at_a_gap_of_four(shared_data: Path) -> None:
    data = open_dataset(shared_data / "cholec80")
    video = data.videos[0]
    assert len(frame_pairs(video.times_s, 1.0)) == 0
    pairs = frame_pairs(video.times_s, 4.0)
    assert len(pairs) > 0.95 * len(video.times_s)
    np.testing.assert_allclose(np.diff(video.times_s[pairs], axis=1), 4.0)


def test_the_command_line_leaves_defaults_to_the_training() -> None:
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    options = parser.parse_args(["train", "gsvit", "phantom", "--out", "x"])
    assert cli.train_settings(options, PRE_TRAINING) == PRE_TRAINING
    options = parser.parse_args(["train", "gsvit", "phantom", "--out", "x", "--precision", "bf16", "--channels-last"])
    assert cli.train_settings(options, FINE_TUNING) == replace(FINE_TUNING, precision="bf16", channels_last=True)
