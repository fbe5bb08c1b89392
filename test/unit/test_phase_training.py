# SPDX-License-Identifier: Apache-2.0
"""Phase training and what stands before it: augmentation, distillation, label files, and the model folder after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from surg_perception.data.datasets import Dataset, open_dataset
from surg_perception.data.label_files import DatasetError
from surg_perception.data.labels import CHOLEC80_PHASES
from surg_perception.gsvit import distil as distillation
from surg_perception.gsvit.augment import augment, noise_for, relight, scope_mask
from surg_perception.gsvit.checkpoint import load_gsvit
from surg_perception.gsvit.distil import Distilled, DistilTask, distil, view_matrix
from surg_perception.gsvit.network import GSViT, GSViTConfig
from surg_perception.gsvit.phase_training import (
    FROZEN,
    EndToEnd,
    EndToEndTask,
    HeadTask,
    LabelledVideo,
    PhaseOptions,
    VideoLatents,
    class_weights,
    latents_of,
    open_videos,
    train_phase,
    train_phase_model,
)
from surg_perception.gsvit.pretrain import PretrainOptions, pretrain
from surg_perception.gsvit.resequence import LabelledSurgery, read_surgeries, resequence
from surg_perception.gsvit.temporal import LatentSequence, TemporalConfig, TemporalSettings
from surg_perception.gsvit.trainer import TrainSettings, order_of_groups
from surg_perception.models import read_card
from surg_perception.stream.temporal_head import TemporalHead

PHANTOM = "phantom:seeds=50-52,duration_s=60,width=160,height=120"
QUICK = TrainSettings(epochs=2, batch=16, learning_rate=1e-3, final_learning_rate=1e-4, threads=1)
TEMPORAL = TemporalSettings(
    TemporalConfig(features=1, classes=1, inputs="latent", layers=3, channels=8, step_s=2.0), epochs=2
)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return open_dataset(PHANTOM, rate_hz=0.5)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def videos(data: Dataset, cache: Path) -> list[LabelledVideo]:
    return open_videos([data], cache)


@pytest.fixture(scope="module")
def encoder(data: Dataset, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with an encoder and a decoder."""
    folder = tmp_path_factory.mktemp("encoder") / "start"
    options = PretrainOptions(gap_s=2.0, size="m0", decoder_width=16, decoder_rank=4, validation=())
    pretrain([data.select(["phantom-50"])], folder, options, replace(QUICK, epochs=1), cache=cache)
    return folder


# ---- augmentation ------------------------------------------------------------------------------------------


def test_augmentation_is_decided_by_the_generator_and_leaves_its_input(videos: list[LabelledVideo]) -> None:
    frames = np.array(videos[0].frames[:6])
    before = frames.copy()
    first, again = (augment(frames, np.random.default_rng(1)) for _ in range(2))
    assert np.array_equal(frames, before)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, augment(frames, np.random.default_rng(2)))
    assert all(np.abs(a.astype(int) - b).mean() > 5 for a, b in zip(first, frames, strict=True))


def test_relighting_keeps_the_picture_and_the_mask_only_its_middle(videos: list[LabelledVideo]) -> None:
    frame, rng = np.array(videos[0].frames[10]), np.random.default_rng(0)
    lit = relight(frame, rng, noise_for(frame, rng), strength=0.3)
    assert np.corrcoef(lit.ravel(), frame.ravel())[0, 1] > 0.9
    masked = scope_mask(np.full_like(frame, 200), rng)
    assert masked[112, 112].tolist() == [200, 200, 200]
    assert not masked[0, 0].any()
    assert not masked[-1, -1].any()


def test_a_long_video_does_not_outweigh_the_others() -> None:
    groups = np.repeat([0, 1, 2], [100, 8, 20])
    order = order_of_groups(groups, 10, np.random.default_rng(0))
    assert np.bincount(groups[order]).tolist() == [10, 8, 10]
    assert len(set(order.tolist())) == len(order)
    assert sorted(order_of_groups(groups, 0, np.random.default_rng(0)).tolist()) == list(range(128))
    assert set(order.tolist()) != set(order_of_groups(groups, 10, np.random.default_rng(1)).tolist())


# ---- distillation ------------------------------------------------------------------------------------------


def fake_teacher(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Mean colours of the 16 cells, of their halves: 6 features [n, 6, 4, 4]."""
    cells = images.reshape(len(images), 4, 2, 28, 4, 56, 3).astype(np.float32).mean((3, 5)) / 255.0
    return np.ascontiguousarray(np.moveaxis(cells, 2, 3).reshape(len(images), 4, 4, 6).transpose(0, 3, 1, 2))


@pytest.fixture(scope="module")
def student(data: Dataset, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder distilled from `fake_teacher`."""
    folder = tmp_path_factory.mktemp("student") / "student"
    settings = TrainSettings(
        epochs=6, batch=8, learning_rate=2e-3, final_learning_rate=1e-4, ema_half_life_steps=5.0, threads=1
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation, "open_teacher", lambda name: fake_teacher)
        distil([data], folder, settings, teacher="fake", validation=["phantom-52"], cache=cache)
    return folder


def test_a_student_learns_the_teachers_features_of_a_video_it_has_not_seen(student: Path) -> None:
    card = read_card(student)
    assert card.metrics["explained_variance"] > 0.2
    assert card.training["videos"] == ["phantom-50", "phantom-51"]
    assert load_gsvit(student).head is None


def test_the_target_is_mirrored_with_the_picture() -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (4, 4, 4, 3), dtype=np.uint8).repeat(56, 1).repeat(56, 2)
    features = np.stack([fake_teacher(frames)] * 3, 1).astype(np.float16)
    task = DistilTask(GSViT(GSViTConfig("m0", decoder=False)), [Distilled("v", frames, features)], [])
    task.training = [replace(task.training[0], name="v")]
    colours = (
        np.linalg.pinv(task.basis) if task.basis.shape[0] == task.basis.shape[1] else np.linalg.pinv(task.basis.T).T
    )
    found = 0
    for seed in range(40):
        batch = task.batch(np.array([0]), np.random.default_rng(seed))
        restored = np.einsum("ckhw,kf->cfhw", batch["target"].numpy(), colours)[0] + task.mean[:, None, None]
        picture = batch["bgr"].numpy()[0].reshape(3, 4, 56, 4, 56).mean((2, 4))
        plain, mirrored = fake_teacher(frames[:1])[0], fake_teacher(frames[:1, :, ::-1])[0]
        if np.abs(restored - plain).max() < 0.02 or np.abs(restored - mirrored).max() < 0.02:
            teacher_says = 0.5 * (restored[:3] + restored[3:])
            if np.corrcoef(teacher_says.ravel(), picture.ravel())[0, 1] > 0.7:
                found += 1
    assert found >= 8  # of about 13 whole views; the others show another part of the picture


def test_the_first_view_is_the_frame_itself_and_views_are_the_same_in_each_run() -> None:
    assert np.array_equal(view_matrix("a", 3, 0), [[1, 0, 0], [0, 1, 0]])
    assert np.array_equal(view_matrix("a", 3, 1), view_matrix("a", 3, 1))
    assert not np.array_equal(view_matrix("a", 3, 1), view_matrix("b", 3, 1))


def test_an_unknown_teacher_is_named() -> None:
    with pytest.raises(ValueError, match=r"unknown teacher 'resnet'.*efficientnet-lite0"):
        distillation.open_teacher("resnet")


# ---- phases ------------------------------------------------------------------------------------------------


def test_class_weights_are_median_frequency() -> None:
    phases = np.array([0] * 8 + [1] * 4 + [3] * 2 + [-1] * 5)
    assert class_weights(phases, 4).tolist() == [0.5, 1.0, 0.0, 2.0]


def coloured_videos(count: int) -> list[LabelledVideo]:
    """Videos whose phase is the brightness of a patch."""
    made = []
    for number in range(count):
        rng = np.random.default_rng(number)
        phases = np.repeat(np.arange(3), 12)
        frames = rng.integers(0, 60, (36, 224, 224, 3), dtype=np.uint8)
        frames[np.arange(36), 60:160, 60:160] = (phases * 90)[:, None, None, None]
        tools = np.full((36, 7), -1.0, np.float32)
        made.append(LabelledVideo(f"v{number}", frames, np.arange(36, dtype=np.float64), phases, tools))
    return made


def test_a_head_on_a_frozen_encoder_learns_and_the_encoder_stays(student: Path, tmp_path: Path) -> None:
    made = coloured_videos(3)
    options = PhaseOptions(
        start=student, frozen=True, head_hidden=(32,), validation=("v2",), views=0, label_smoothing=0.0
    )
    settings = replace(FROZEN, epochs=30, batch=16, learning_rate=3e-3, ema_half_life_steps=5.0, threads=1)
    trained = train_phase(made, 3, options, settings, tmp_path)
    for name, value in load_gsvit(student).encoder.state_dict().items():
        assert torch.equal(value, trained.model.encoder.state_dict()[name]), name
    (held_out,) = trained.validation
    assert held_out.video.name == "v2"
    assert np.array_equal(held_out.latents, latents_of(trained.model, made[2].frames))
    assert trained.model.head is not None
    found = trained.model.head(torch.from_numpy(held_out.latents)).argmax(1).numpy()
    assert (found == made[2].phases).mean() > 0.9
    assert float(trained.model.head.temperature) != 1.0


def test_frames_without_a_phase_or_tools_are_not_learned_from() -> None:
    video = coloured_videos(1)[0]
    phases, tools = video.phases.copy(), video.tools.copy()
    phases[5:20] = -1
    tools[:5] = 1.0
    video = replace(video, phases=phases, tools=tools)
    model = GSViT(GSViTConfig("m0", decoder=False, classes=3, head_hidden=(8,)))
    options = PhaseOptions(size="m0")
    latents = np.zeros((36, *model.latent_shape), np.float32)
    assert HeadTask(model, [VideoLatents(video, latents, ())], [], options).samples == 21
    task = EndToEndTask(model, [video], [], options)
    network = task.module
    assert isinstance(network, EndToEnd)
    assert task.samples == 21
    batch = task.batch(np.arange(21), np.random.default_rng(0))
    assert (batch["phase"] >= 0).all()
    # Without tools, the tool head has no gradient; with them it has one.
    for chosen, learns in (((batch["tools"] < 0).all(1), False), ((batch["tools"] >= 0).all(1), True)):
        assert bool(chosen.any())
        loss, _ = task.loss(task.module, {key: value[chosen] for key, value in batch.items()})
        task.module.zero_grad()
        loss.backward()
        gradient = network.tools.weight.grad
        assert gradient is not None
        assert bool(gradient.any()) is learns


def test_training_end_to_end_gives_a_model_folder_with_a_temporal_head(
    data: Dataset, cache: Path, encoder: Path, tmp_path: Path
) -> None:
    options = PhaseOptions(
        start=encoder, head_hidden=(16,), validation=("phantom-52",), views=1, temporal=TEMPORAL, frames_of_a_video=16
    )
    card = train_phase_model([data], tmp_path / "model", options, QUICK, cache=cache, weight_storage="fp16")
    assert card.labels.names == CHOLEC80_PHASES
    assert card.temporal is not None
    assert card.temporal.step_s == 2.0
    assert card.forecast is None  # its decoder reads the latents of the encoder as it was
    assert card.training["start_weights"].startswith("start@")
    assert set(card.metrics["validation"]["accuracy_temporal_head"]) == {"phantom-52"}
    card.verify()
    head = TemporalHead.open(card.temporal_path)
    latent = np.zeros(card.network.latent_shape, np.float32)
    assert head.step(latent, None, 0.0).shape == (7,)
    started, trained = load_gsvit(encoder), load_gsvit(tmp_path / "model")
    name = "patch_embed.conv1.conv.weight"
    assert not torch.equal(started.encoder.state_dict()[name], trained.encoder.state_dict()[name])


def test_a_frozen_encoder_keeps_its_forecast_and_one_can_be_added(
    data: Dataset, cache: Path, encoder: Path, tmp_path: Path
) -> None:
    options = PhaseOptions(start=encoder, frozen=True, head_hidden=(16,), views=0, temporal=TEMPORAL)
    card = train_phase_model([data], tmp_path / "frozen", options, replace(QUICK, epochs=1), cache=cache)
    assert card.forecast is not None
    assert card.forecast.gap_s == 2.0
    again = PretrainOptions(
        gap_s=4.0, start=tmp_path / "frozen", decoder_width=32, decoder_rank=4, validation=(), freeze_encoder=True
    )
    added = pretrain([data], tmp_path / "added", again, replace(QUICK, epochs=1), cache=cache)
    assert added.forecast is not None
    assert added.forecast.gap_s == 4.0
    assert added.temporal == card.temporal
    before, after = load_gsvit(tmp_path / "frozen"), load_gsvit(tmp_path / "added")
    frames = np.full((2, 224, 224, 3), 90, np.uint8)
    assert np.array_equal(latents_of(before, frames), latents_of(after, frames))
    assert before.head is not None
    assert after.head is not None
    assert torch.equal(before.head.state_dict()["mlp.0.weight"], after.head.state_dict()["mlp.0.weight"])


def test_what_cannot_be_trained_is_refused(videos: list[LabelledVideo], data: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="phantom-99"):
        train_phase(videos, 7, PhaseOptions(size="m0", validation=("phantom-99",)), QUICK, tmp_path)
    names = tuple(video.name for video in videos)
    with pytest.raises(ValueError, match="at least one other"):
        train_phase(videos, 7, PhaseOptions(size="m0", validation=names), QUICK, tmp_path)
    other = replace(data, phases=("A", "B"))
    with pytest.raises(ValueError, match="2 different sets of phases"):
        open_videos([data, other], tmp_path)
    with pytest.raises(ValueError, match="frozen encoder"):
        PretrainOptions(freeze_encoder=True)


# ---- label files -------------------------------------------------------------------------------------------


def donor(number: int) -> tuple[LatentSequence, NDArray[np.int8]]:
    """Latents that tell video, phase and tools."""
    phases = np.repeat([0, 1, 2], 10)
    tools = np.zeros((30, 7), np.int8)
    tools[::2, 0] = 1
    tools[20:, 6] = 1
    latents = np.stack([np.full(30, number), phases, tools[:, 0], tools[:, 6]], 1).astype(np.float32)
    return LatentSequence(latents, None, np.arange(30.0), phases, f"d{number}"), tools


def surgery(phases: Sequence[int], first_tool: int = 0) -> LabelledSurgery:
    tools = np.zeros((len(phases), 7), np.int8)
    tools[:, 0] = first_tool
    return LabelledSurgery("s", np.array(phases), tools)


def test_label_files_are_filled_with_frames_of_the_same_phase_and_tools() -> None:
    donors, tools = zip(*(donor(number) for number in range(3)), strict=True)
    wanted = surgery([0] * 20 + [1] * 30, first_tool=1)
    (made,) = resequence(donors, tools, [wanted], 4.0, np.random.default_rng(0), phase_blind=0.0)
    assert np.array_equal(made.phases, wanted.phases)
    assert np.array_equal(made.latents[:, 1], wanted.phases)
    assert (made.latents[:, 2] == 1).all()
    assert np.array_equal(made.times_s, 4.0 * np.arange(50))
    assert made.probabilities is None


def test_blind_to_the_phase_only_tools_agree() -> None:
    donors, tools = zip(*(donor(number) for number in range(3)), strict=True)
    (made,) = resequence(donors, tools, [surgery([1] * 60)], 4.0, np.random.default_rng(0), phase_blind=1.0)
    assert (made.latents[:, 2:] == 0).all()
    assert set(made.latents[:, 1]) == {0.0, 1.0}  # phase 2 has the bag, which is not in the labels


def test_tools_that_no_donor_has_leave_the_phase_to_decide() -> None:
    donors, tools = zip(*(donor(number) for number in range(2)), strict=True)
    wanted = LabelledSurgery("s", np.array([2] * 5), np.ones((5, 7), np.int8))
    (made,) = resequence(donors, tools, [wanted], 4.0, np.random.default_rng(0), phase_blind=0.0)
    assert (made.latents[:, 1] == 2).all()


def test_label_files_are_read_at_the_step_and_by_number(tmp_path: Path) -> None:
    for number in (7, 12):
        rows = "".join(f"{25 * s}\t{'Preparation' if s < 6 else 'CalotTriangleDissection'}\n" for s in range(12))
        (tmp_path / f"video{number:02d}-phase.txt").write_text("Frame\tPhase\n" + rows)
        names = "Grasper\tBipolar\tHook\tScissors\tClipper\tIrrigator\tSpecimenBag"
        rows = "".join(f"{25 * s}\t{int(s > 8)}\t0\t0\t0\t0\t0\t1\n" for s in range(12))
        (tmp_path / f"video{number:02d}-tool.txt").write_text(f"Frame\t{names}\n" + rows)
    (found,) = read_surgeries(tmp_path, 4.0, CHOLEC80_PHASES, range(10, 20))
    assert found.name == "video12"
    assert found.phases.tolist() == [0, 0, 1]
    assert found.tools[:, [0, 6]].tolist() == [[0, 1], [0, 1], [0, 1]]
    assert len(read_surgeries(tmp_path, 4.0, CHOLEC80_PHASES)) == 2
    with pytest.raises(DatasetError, match=r"no pair of videoNN-phase\.txt"):
        read_surgeries(tmp_path, 4.0, CHOLEC80_PHASES, [80])


def test_the_data_sets_own_label_files_are_read(shared_data: Path) -> None:
    found = read_surgeries(shared_data / "cholec80" / "labels", 4.0, CHOLEC80_PHASES, range(6, 41))
    assert len(found) == 35
    assert sum(len(one.phases) for one in found) == pytest.approx(74_000 / 4 * 1.0, rel=0.2)
    assert all(one.phases.min() >= 0 and one.phases.max() <= 6 for one in found)
