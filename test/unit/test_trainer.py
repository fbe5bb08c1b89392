# SPDX-License-Identifier: Apache-2.0
"""The training loop: a broken run goes on as an unbroken one, and what can go wrong is said and loses nothing."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from rich.console import Console
from tiny_training import BATCH, SAMPLES, SETTINGS, STEPS, STEPS_PER_EPOCH, TinyTask, quiet
from torch import nn

from surg_perception.gsvit.trainer import (
    TrainingDiverged,
    TrainingError,
    TrainingStopped,
    TrainSettings,
    fit,
    follow,
    read_lines,
)

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("tiny_training.py")


def train(folder: Path, task: TinyTask | None = None, settings: TrainSettings = SETTINGS, **options: bool) -> nn.Module:
    return fit(task or TinyTask(), settings, folder, console=quiet(), **options)


def run_program(*arguments: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launcher, str(PROGRAM), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def assert_same_run(folder: Path, module: nn.Module, whole: Path, expected: nn.Module) -> None:
    """Bit for bit: averaged weights, and all that the state holds; and each step once in the losses."""
    for (name, value), wanted in zip(module.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(value, wanted), name
    found, wanted_state = (torch.load(f / "state.pt", weights_only=True) for f in (folder, whole))
    assert found.pop("identity") == wanted_state.pop("identity")
    torch.testing.assert_close(found, wanted_state, rtol=0, atol=0)
    assert (folder / "losses.jsonl").read_bytes() == (whole / "losses.jsonl").read_bytes()
    for name in ("epoch", "step", "loss"):
        made, wanted_lines = (read_lines(f / "metrics.jsonl") for f in (folder, whole))
        assert [line[name] for line in made] == [line[name] for line in wanted_lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """An unbroken run, which stays as it is."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(folder)


# ---- what a run leaves -------------------------------------------------------------------------------------


def test_a_run_writes_every_step_and_every_validation(whole: tuple[Path, nn.Module]) -> None:
    folder, module = whole
    lines = read_lines(folder / "losses.jsonl")
    assert [line["step"] for line in lines] == list(range(STEPS))
    assert [line["epoch"] for line in lines] == [step // STEPS_PER_EPOCH for step in range(STEPS)]
    assert [line["lr"] for line in lines] == [SETTINGS.learning_rate_at(step, STEPS) for step in range(STEPS)]
    metrics = read_lines(folder / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [STEPS_PER_EPOCH * k for k in (1, 2, 3)]
    losses = [line["loss"] for line in metrics]
    assert losses[-1] < losses[0]
    assert not module.training
    assert next(module.parameters()).device.type == "cpu"


def test_tensorboard_has_scalars_and_the_pictures_of_the_task(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    picture = np.full((8, 10, 3), (250, 0, 10), np.uint8)

    class Draws(TinyTask):
        def end_of_epoch(self, epoch: int, module: nn.Module, folder: Path) -> dict[str, float]:
            assert cv2.imwrite(str(folder / "prediction.png"), picture)
            return {"figure": float(epoch)}

    train(tmp_path, Draws(), replace(SETTINGS, validate_every_steps=5))
    at = sorted({*range(5, STEPS + 1, 5), *range(STEPS_PER_EPOCH, STEPS + 1, STEPS_PER_EPOCH)})
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == at
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == [f"step_{step:07d}" for step in at]
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    losses = [line["loss"] for line in read_lines(tmp_path / "losses.jsonl")]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses)
    assert [event.step for event in events.Scalars("validation/figure")] == at
    assert len(events.Scalars("train/largest_logit")) == STEPS
    assert [event.step for event in events.Images("prediction")] == at
    drawn = cv2.imdecode(np.frombuffer(events.Images("prediction")[0].encoded_image_string, np.uint8), 1)
    np.testing.assert_array_equal(drawn, picture)


def test_progress_says_loss_speed_and_figures(tmp_path: Path) -> None:
    console = Console(record=True, file=open(os.devnull, "w"), width=120)  # noqa: SIM115
    fit(TinyTask(), SETTINGS, tmp_path, console=console)
    text = console.export_text()
    assert re.search(r"epoch 3 of 3, step 21: training loss 1\.\d+, \d+ images/s", text)
    assert re.search(r"\nloss 1\.\d+\n", text)


def test_averaging_off_gives_the_last_weights(tmp_path: Path) -> None:
    task = TinyTask()
    module = train(tmp_path, task, replace(SETTINGS, ema_half_life_steps=0.0))
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["average"] is None
    torch.testing.assert_close(dict(module.state_dict()), dict(state["module"]), rtol=0, atol=0)


def test_the_average_follows_weights_and_statistics_and_keeps_tables() -> None:
    torch.manual_seed(0)
    module = TinyTask().module
    average = TinyTask().module
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
        module.norm.running_mean.add_(1.0)
        module.table.add_(7)
    for _ in range(10):
        follow(average, module, 0.5**0.1)
    for (name, kept), new in zip(average.named_parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(kept, new - 0.5, rtol=1e-5, atol=1e-5, msg=name)
    torch.testing.assert_close(average.norm.running_mean, module.norm.running_mean - 0.5)
    assert torch.equal(average.table, module.table)


def test_precision_and_layout_change_rounding_only(whole: tuple[Path, nn.Module], tmp_path: Path) -> None:
    train(tmp_path, settings=replace(SETTINGS, precision="bf16", channels_last=True))
    found, expected = ([line["loss"] for line in read_lines(f / "losses.jsonl")] for f in (tmp_path, whole[0]))
    assert found != expected
    assert found == pytest.approx(expected, rel=0.05)


# ---- resuming ----------------------------------------------------------------------------------------------


# Step 5: in the first epoch, one step after a checkpoint. 7: the first of an epoch. 18: deep in the last one.
@pytest.mark.parametrize("kill_at", [5, STEPS_PER_EPOCH, 18])
def test_a_killed_run_goes_on_to_the_same_losses_and_weights(
    kill_at: int, whole: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    killed = run_program(str(tmp_path), "--kill-at", str(kill_at))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [line["step"] for line in read_lines(tmp_path / "losses.jsonl")] == list(range(kill_at))
    done = torch.load(tmp_path / "state.pt", weights_only=True)["done"]
    assert done == max(step for step in (4, 7, 8, 12, 14, 16) if step <= kill_at)
    with (tmp_path / "losses.jsonl").open("a") as file:
        file.write('{"epoch": 0, "st')  # what a power cut may leave
    task = TinyTask()
    module = train(tmp_path, task)
    assert task.step == STEPS - done
    assert_same_run(tmp_path, module, *whole)


def test_a_run_killed_before_its_first_checkpoint_begins_again(whole: tuple[Path, nn.Module], tmp_path: Path) -> None:
    def stop(step: int) -> None:
        if step == 2:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        train(tmp_path, TinyTask(stop))
    assert not (tmp_path / "state.pt").exists()
    assert len(read_lines(tmp_path / "losses.jsonl")) == 2
    assert_same_run(tmp_path, train(tmp_path), *whole)


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGINT")])
def test_a_signal_ends_the_run_after_the_step_and_says_how_to_go_on(
    number: signal.Signals, name: str, whole: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    before = signal.getsignal(number)
    console = Console(record=True, file=open(os.devnull, "w"), width=300)  # noqa: SIM115

    def stop(step: int) -> None:
        if step == 9:
            os.kill(os.getpid(), number)

    with pytest.raises(TrainingStopped) as stopped:
        fit(TinyTask(stop), SETTINGS, tmp_path, console=console)
    assert stopped.value.code == 128 + number
    assert signal.getsignal(number) is before
    assert f"stopped by {name} after step 10 of 21; start the same command again" in console.export_text()
    assert torch.load(tmp_path / "state.pt", weights_only=True)["done"] == 10
    assert_same_run(tmp_path, train(tmp_path), *whole)


def test_a_validation_that_was_cut_off_is_made_up_for(whole: tuple[Path, nn.Module], tmp_path: Path) -> None:
    class Cut(TinyTask):
        def end_of_epoch(self, epoch: int, module: nn.Module, folder: Path) -> dict[str, float]:
            if epoch == 1:
                raise RuntimeError("power cut")
            return super().end_of_epoch(epoch, module, folder)

    with pytest.raises(RuntimeError, match="power cut"):
        train(tmp_path, Cut())
    task = TinyTask()
    module = train(tmp_path, task)
    assert task.validated == [1, 2]
    assert_same_run(tmp_path, module, *whole)


def test_a_finished_run_is_not_done_again(whole: tuple[Path, nn.Module], tmp_path: Path) -> None:
    train(tmp_path)
    task = TinyTask()
    module = train(tmp_path, task)
    assert task.step == 0
    assert task.validated == []
    assert_same_run(tmp_path, module, *whole)


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    def stop(step: int) -> None:
        if step == 6:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        train(tmp_path, TinyTask(stop))
    state = (tmp_path / "state.pt").read_bytes()
    other = replace(SETTINGS, batch=5, learning_rate=2e-2)
    with pytest.raises(TrainingError, match=r"batch was 6 and is now 5; learning_rate was 0\.01 and is now 0\.02"):
        train(tmp_path, settings=other)
    with pytest.raises(TrainingError, match="data was 'noise' and is now 'cholec80'"):
        train(tmp_path, TinyTask(data="cholec80"))
    wider = TinyTask()
    wider.module.out = nn.Linear(6, 5)
    with pytest.raises(TrainingError, match=r"another network(.|\n)*out\.weight"):
        train(tmp_path, wider)
    assert (tmp_path / "state.pt").read_bytes() == state
    task = TinyTask()
    train(tmp_path, task, replace(SETTINGS, loader_threads=3, checkpoint_every_steps=0, threads=0))
    assert task.step == STEPS - 4


def test_a_state_from_before_a_setting_was_introduced_goes_on_with_its_default(
    whole: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    def stop(step: int) -> None:
        if step == 6:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        train(tmp_path, TinyTask(stop))
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["identity"].pop("betas") == [0.9, 0.999]
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(TrainingError, match=r"betas was \[0\.9, 0\.999\] and is now \[0\.9, 0\.95\]"):
        train(tmp_path, settings=replace(SETTINGS, betas=(0.9, 0.95)))
    assert_same_run(tmp_path, train(tmp_path), *whole)


def test_restarting_forgets_the_earlier_run(tmp_path: Path) -> None:
    train(tmp_path, settings=replace(SETTINGS, epochs=1, seed=9))
    task = TinyTask()
    train(tmp_path, task, resume=False)
    assert task.step == STEPS
    assert [line["step"] for line in read_lines(tmp_path / "losses.jsonl")] == list(range(STEPS))


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    train(tmp_path, settings=replace(SETTINGS, epochs=1))
    state = tmp_path / "state.pt"
    state.write_bytes(state.read_bytes()[:-1000])
    with pytest.raises(TrainingError, match=r"cannot be read as a training's state.*--restart"):
        train(tmp_path, settings=replace(SETTINGS, epochs=1))


def test_loader_threads_change_nothing(whole: tuple[Path, nn.Module], tmp_path: Path) -> None:
    assert_same_run(tmp_path, train(tmp_path, settings=replace(SETTINGS, loader_threads=4)), *whole)


# ---- what goes wrong ---------------------------------------------------------------------------------------


def test_a_nan_loss_stops_and_names_the_batch(tmp_path: Path) -> None:
    task = TinyTask()
    bad = int(np.random.default_rng([SETTINGS.seed, 1]).permutation(SAMPLES)[2 * BATCH])  # in epoch 1, step 7 + 2
    clean = task.images[bad].clone()

    def spoil(step: int) -> None:
        if step == 7:
            task.images[bad] = torch.nan

    task.hook = spoil
    # One batch ahead, so the spoilt sample is seen in step 9, its first turn after step 7.
    with pytest.raises(TrainingDiverged) as diverged:
        train(tmp_path, task)
    error = diverged.value
    assert (error.epoch, error.step) == (1, 9)
    assert "the loss is not finite in epoch 1, step 9" in str(error)
    assert bad in error.indices
    assert len(error.indices) == BATCH
    assert str(error.indices.tolist()) in str(error)
    assert f"{tmp_path / 'state.pt'}, is kept" in str(error)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["done"] == 8
    assert all(torch.isfinite(value).all() for value in state["module"].values())
    assert len(read_lines(tmp_path / "losses.jsonl")) == 9
    task = TinyTask()
    assert torch.equal(task.images[bad], clean)
    train(tmp_path, task)
    assert task.step == STEPS - 8


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path: Path) -> None:
    class Root(TinyTask):
        def loss(self, module: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
            loss, figures = super().loss(module, batch)
            return (loss + (0.0 * loss).sqrt() if self.step == 6 else loss), figures

    task = Root()
    with pytest.raises(TrainingDiverged, match="the gradient is not finite in epoch 0, step 5"):
        train(tmp_path, task)
    assert all(torch.isfinite(parameter).all() for parameter in task.module.parameters())


def test_a_full_disk_during_a_checkpoint_keeps_the_old_one(whole: tuple[Path, nn.Module], tmp_path: Path) -> None:
    """The partial file is on a device where every write fails with ENOSPC."""

    def fill(step: int) -> None:
        if step == 5:
            (tmp_path / ".state.pt.partial").symlink_to("/dev/full")

    with pytest.raises(
        TrainingError, match=r"could not be written \(.*No space left.*the one before is intact"
    ) as full:
        train(tmp_path, TinyTask(fill))
    assert "MB are free" in str(full.value)
    assert torch.load(tmp_path / "state.pt", weights_only=True)["done"] == 4
    assert not list(tmp_path.glob(".*partial"))
    assert_same_run(tmp_path, train(tmp_path), *whole)


def test_a_full_disk_elsewhere_is_explained_too(tmp_path: Path) -> None:
    class Full(TinyTask):
        def end_of_epoch(self, epoch: int, module: nn.Module, folder: Path) -> dict[str, float]:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(TrainingError, match="no room left for the training"):
        train(tmp_path, Full())


def test_an_empty_training_set_is_refused(tmp_path: Path) -> None:
    task = TinyTask()
    task.samples = 0
    with pytest.raises(TrainingError, match="the training set is empty"):
        train(tmp_path, task)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("batch", 0),
        ("learning_rate", float("nan")),
        ("schedule", "cosine"),
        ("precision", "int8"),
        ("betas", (0.9, 1.0)),
        ("betas", (0.9,)),
    ],
)
def test_settings_out_of_range_are_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{name} {re.escape(repr(value))} \(expected"):
        TrainSettings(**{**asdict(SETTINGS), name: value})


# ---- schedules and processes -------------------------------------------------------------------------------


def test_schedules() -> None:
    linear = TrainSettings()
    assert (linear.learning_rate, linear.final_learning_rate, linear.schedule) == (1e-3, 1e-5, "linear")
    rates = [linear.learning_rate_at(step, 101) for step in range(101)]
    assert rates[0] == 1e-3
    assert rates[50] == pytest.approx(0.5 * (1e-3 + 1e-5))
    assert rates[100] == pytest.approx(1e-5)
    assert np.ptp(np.diff(rates)) < 1e-12
    exponential = replace(linear, schedule="exponential")
    rates = [exponential.learning_rate_at(step, 101) for step in range(101)]
    assert rates[::100] == pytest.approx([1e-3, 1e-5])
    assert np.ptp(np.diff(np.log(rates))) < 1e-9
    cycle = replace(linear, schedule="one_cycle")
    rates = [cycle.learning_rate_at(step, 101) for step in range(101)]
    assert (rates[0], rates[15], rates[100]) == pytest.approx((4e-5, 1e-3, 1e-5))
    assert int(np.argmax(rates)) == 15
    assert linear.learning_rate_at(0, 1) == 1e-3


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Each takes half of every batch; without batch norm and augmentation the sum is the same training."""
    done = run_program(str(tmp_path / "two"), "--plain", processes=2)
    assert done.returncode == 0, done.stderr
    train(tmp_path / "one", TinyTask(plain=True))
    found, expected = (read_lines(tmp_path / name / "losses.jsonl") for name in ("two", "one"))
    assert [line["step"] for line in found] == list(range(STEPS))
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=1e-4)
    assert [path.name for path in sorted((tmp_path / "two").glob("*.pt"))] == ["state.pt"]
    two, one = (torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("two", "one"))
    assert two["done"] == STEPS
    torch.testing.assert_close(two["average"], one["average"], rtol=1e-3, atol=1e-5)
