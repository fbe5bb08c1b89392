# SPDX-License-Identifier: Apache-2.0
"""A model over a data set, from the command line to report and pictures; what runs is the pipeline itself."""

from __future__ import annotations

import argparse
import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from surg_perception.cli import evaluate as verb
from surg_perception.data.datasets import Dataset, Video, open_dataset
from surg_perception.data.frame_readers import FrameReader
from surg_perception.data.label_files import DatasetError
from surg_perception.data.labels import AUTOLAPARO_PHASES, CHOLEC80_PHASES
from surg_perception.gsvit import phase_evaluation
from surg_perception.gsvit.phase_evaluation import Evaluation, evaluate_folders, evaluate_model
from surg_perception.gsvit.phase_labels_io import read_phase_folder, write_phase_file
from surg_perception.gsvit.phase_metrics import MODES, VideoPhases, evaluate
from surg_perception.gsvit.phase_report import PAPER_ROWS, summary_table, warnings, write_report
from surg_perception.models import ModelError, ModelFile, TemporalFacts, find_model
from surg_perception.runtime import open_backend
from surg_perception.stream.phase_pipeline import PhasePipeline
from surg_perception.stream.temporal_head import TemporalConfig, TemporalHead

MODEL = "gsvit_m0_phantom"
DATA = "phantom:seeds=3000-3001,duration_s=24,width=320,height=180"


def run(*arguments):
    parser = argparse.ArgumentParser()
    verb.add_parser(parser.add_subparsers())
    options = parser.parse_args(["evaluate", "phase", *map(str, arguments)])
    return options.run(options)


class Pictures(FrameReader):
    """Frames kept in memory."""

    def __init__(self, frames):
        self.frames = frames

    def read(self, indices):
        for index in indices:
            if self.frames[index] is None:
                raise DatasetError(f"frame {index} cannot be read")
            yield self.frames[index]

    def fingerprint(self):
        return "in memory"


@pytest.fixture(scope="module")
def pictures():
    """24 frames of the phantom at 1 fps, with their phases."""
    video = open_dataset(DATA).videos[0]
    return list(video.frames()), video.phases


@pytest.fixture(scope="module")
def engine():
    with open_backend(MODEL, threads=1) as backend:
        yield backend


@pytest.fixture
def ready(engine, monkeypatch):
    """Evaluations take an engine that is open already."""
    monkeypatch.setattr(phase_evaluation, "open_backend", lambda *args, **options: nullcontext(engine))


def dataset_of(frames, phases, *, times_s=None, names=CHOLEC80_PHASES, label_set="cholec80"):
    times_s = np.arange(len(frames), dtype=float) if times_s is None else times_s
    video = Video("video01", "", times_s, np.asarray(phases, np.int64), None, Pictures(frames))
    return Dataset(Path("somewhere"), "videos", label_set, tuple(names), (video,))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder of a run from the command line."""
    out = tmp_path_factory.mktemp("evaluation")
    assert run("--model", MODEL, "--data", DATA, "--out", out, "--threads", 1) == 0
    return out


def test_the_command_writes_metrics_report_and_pictures(finished):
    metrics = json.loads((finished / "metrics.json").read_text(), parse_constant=pytest.fail)
    for mode in MODES:
        for name in ("accuracy", "precision", "recall", "jaccard"):
            assert set(metrics[mode][name]) == {"mean", "std"}
        assert list(metrics[mode]["per_video"]) == ["phantom-3000", "phantom-3001"]
        assert 0 <= metrics[mode]["per_video"]["phantom-3000"]["accuracy"] <= 100
    assert metrics["model"].startswith(f"{MODEL}@")
    assert metrics["samples"] == 48
    assert set(metrics["variants"]) == {"single_frame"}
    # The phantom's own model knows the phantom; a broken order of phases or channels would not.
    assert metrics["variants"]["single_frame"]["strict"]["accuracy"]["mean"] > 75
    assert sum(entry["count"] for entry in metrics["calibration"]["bins"]) == 48
    for name in ("ribbons_1", "confusion", "reliability"):
        picture = cv2.imread(str(finished / "pictures" / f"{name}.png"))
        assert picture.shape[0] > 300
        assert picture.std() > 10
    report = (finished / "report.md").read_text()
    assert "Not the usual test set" in report
    assert report.count("quoted from the GSViT paper") == len(PAPER_ROWS) == 5
    assert report.count("**measured here**") == 4
    for link in ("ribbons_1", "confusion", "reliability"):
        assert f"(pictures/{link}.png)" in report


def test_predictions_on_disk_give_the_same_metrics(finished, tmp_path):
    assert (
        run("--labels", finished / "truth", "--predictions", finished / "predictions_published", "--out", tmp_path) == 0
    )
    direct, again = (json.loads((folder / "metrics.json").read_text()) for folder in (finished, tmp_path))
    for key in (*MODES, "segmental", "confusion", "samples"):
        assert again[key] == direct[key]
    assert again["calibration"] is None
    assert not (tmp_path / "pictures" / "reliability.png").exists()


def test_what_is_evaluated_is_what_the_pipeline_says(engine, finished):
    video = open_dataset(DATA).videos[1]
    pipeline = PhasePipeline(engine, CHOLEC80_PHASES)
    results = [
        pipeline.process_frame(frame, round(time_s * 1e9))
        for frame, time_s in zip(video.frames(), video.times_s, strict=True)
    ]
    for folder, field in (("predictions_published", "phase_id"), ("predictions_single_frame", "raw_phase_id")):
        written = read_phase_folder(finished / folder)["phantom-3001"].entries
        assert list(written) == [CHOLEC80_PHASES[getattr(result, field)] for result in results]
    with np.load(finished / "probabilities" / "phantom-3001.npz") as kept:
        np.testing.assert_allclose(kept["smoothed"], [result.smoothed for result in results], atol=1e-5)
        np.testing.assert_allclose(kept["confidence"], [result.confidence for result in results], atol=1e-5)
        np.testing.assert_array_equal(kept["truth"], video.phases)


def test_a_run_goes_on_where_it_ended(ready, finished, tmp_path, monkeypatch):
    shutil.copytree(finished / "probabilities", tmp_path / "probabilities")
    (tmp_path / "probabilities" / "phantom-3001.npz").unlink()
    read = []
    frames = Video.frames
    monkeypatch.setattr(Video, "frames", lambda video: (read.append(video.name), frames(video))[1])
    evaluation = evaluate_model(MODEL, open_dataset(DATA), tmp_path, threads=1)
    assert read == ["phantom-3001"]
    expected = json.loads((finished / "metrics.json").read_text())
    assert evaluation.metrics["strict"] == expected["strict"]
    # Other samples are another run.
    evaluate_model(MODEL, open_dataset(DATA, rate_hz=0.5).select(["phantom-3000"]), tmp_path, threads=1)
    assert read == ["phantom-3001", "phantom-3000"]


def test_a_run_that_was_interrupted_leaves_no_half_video(ready, pictures, tmp_path):
    frames, phases = pictures
    broken = dataset_of([*frames[:5], None, *frames[6:]], phases)
    with pytest.raises(DatasetError, match="frame 5"):
        evaluate_model(MODEL, broken, tmp_path)
    assert not list((tmp_path / "probabilities").iterdir())


def test_a_blank_picture_keeps_the_last_phase(ready, pictures, tmp_path):
    frames, phases = pictures
    black = np.zeros_like(frames[0])
    shown = [black, black, *frames[2:10], black, *frames[11:]]
    evaluation = evaluate_model(MODEL, dataset_of(shown, phases), tmp_path, threads=1)
    (video,) = evaluation.videos
    assert video.prediction[:2].tolist() == [0, 0]
    assert video.prediction[10] == video.prediction[9]
    assert np.flatnonzero(np.isnan(video.confidence)).tolist() == [0, 1, 10]
    assert video.notes == ("3 blank pictures, for which the last phase stays",)
    assert sum(entry["count"] for entry in evaluation.metrics["calibration"]["bins"]) == len(shown) - 3


def test_irregular_frames_are_evaluated_as_they_are(ready, pictures, tmp_path):
    frames, phases = pictures
    times_s = np.cumsum([0, 4, 4, 8, 4, 4, 4, 2, 4, 4], dtype=float)
    evaluation = evaluate_model(MODEL, dataset_of(frames[:10], phases[:10], times_s=times_s), tmp_path, threads=1)
    one = evaluation.metrics["per_video"]["video01"]
    assert (one["samples"], one["step_s"], one["relaxed_window_samples"]) == (10, 4.0, 2)
    assert one["notes"] == ["one sample every 4 s"]
    assert any("Not at 1 fps" in text for text in warnings(evaluation.metrics, evaluation.videos))
    again = evaluate_folders(tmp_path / "truth", tmp_path / "predictions_published")
    assert again.metrics["relaxed_official"] == evaluation.metrics["relaxed_official"]


def test_phases_are_matched_by_name_and_not_by_number(ready, pictures, tmp_path):
    frames, phases = pictures
    usual = evaluate_model(MODEL, dataset_of(frames, phases), tmp_path / "usual", threads=1).metrics
    turned = evaluate_model(
        MODEL,
        dataset_of(frames, 6 - phases, names=CHOLEC80_PHASES[::-1], label_set="own"),
        tmp_path / "turned",
        threads=1,
    ).metrics
    assert turned["strict"]["accuracy"] == usual["strict"]["accuracy"]
    assert np.array_equal(np.array(turned["confusion"])[::-1, ::-1], usual["confusion"])


def test_a_temporal_head_of_the_model_folder_is_used(engine, pictures, tmp_path):
    from safetensors.numpy import save_file

    frames, phases = pictures
    config = TemporalConfig(features=192, classes=7, stages=1, layers=3, channels=4, step_s=1.0)
    rng = np.random.default_rng(0)
    tensors = {
        name: np.asarray(rng.normal(0, 0.5, shape), np.float32) for name, shape in config.tensor_shapes().items()
    }
    tensors |= {
        name: np.ones(shape, np.float32)
        for name, shape in config.tensor_shapes().items()
        if name in ("std", "temperature")
    }
    folder = tmp_path / "model"
    shutil.copytree(find_model(MODEL).folder, folder)
    stored = {field: getattr(config, field) for field in TemporalConfig.__dataclass_fields__}
    save_file(tensors, folder / "temporal.safetensors", metadata={"temporal_config": json.dumps(stored)})
    card = replace(
        find_model(folder),
        temporal=TemporalFacts(1, 3, 4, "latent", 1.0),
        temporal_file=ModelFile.of(folder / "temporal.safetensors"),
    )
    evaluation = evaluate_model(card, dataset_of(frames, phases), tmp_path / "out", threads=1)
    assert set(evaluation.metrics["variants"]) == {"temporal_head", "single_frame"}
    probabilities, latents = engine.infer_batch(np.stack([cv2.resize(frame, (224, 224)) for frame in frames]))
    expected = TemporalHead(config, tensors).run(latents, probabilities, np.arange(len(frames)))
    with np.load(tmp_path / "out" / "probabilities" / "video01.npz") as kept:
        np.testing.assert_allclose(kept["smoothed"], expected, atol=1e-3)
        np.testing.assert_allclose(kept["frame_probabilities"], probabilities, atol=1e-3)
    report = write_report(evaluation, tmp_path / "out").read_text()
    assert "temporal_head: the most probable phase of the temporal head" in report


def test_models_and_data_that_do_not_fit_are_refused(pictures, tmp_path):
    frames, phases = pictures
    with pytest.raises(ModelError, match="labelled with Preparation, Dividing"):
        evaluate_model(MODEL, dataset_of(frames, phases, names=AUTOLAPARO_PHASES, label_set="autolaparo"), tmp_path)
    with pytest.raises(DatasetError, match="none of its 1 videos has phase labels"):
        evaluate_model(MODEL, dataset_of(frames, np.full(len(frames), -1)), tmp_path)
    card = find_model(MODEL)
    headless = replace(card, labels=replace(card.labels, names=()))
    with pytest.raises(ModelError, match="no phase head"):
        evaluate_model(headless, dataset_of(frames, phases), tmp_path)


def test_the_command_says_what_is_missing_or_too_much(tmp_path):
    with pytest.raises(ValueError, match="--data missing"):
        run("--model", MODEL, "--out", tmp_path)
    with pytest.raises(ValueError, match="--labels missing"):
        run("--predictions", tmp_path, "--out", tmp_path)
    with pytest.raises(ValueError, match="--model given beside --predictions"):
        run("--model", MODEL, "--predictions", tmp_path, "--labels", tmp_path, "--out", tmp_path)


def simple_evaluation(numbers, truth, prediction, label_set="cholec80", phases=CHOLEC80_PHASES):
    videos = [
        VideoPhases(f"video{number:02d}", np.arange(len(truth), dtype=float), np.array(truth), np.array(prediction))
        for number in numbers
    ]
    metrics = evaluate(videos, phases, label_set) | {"notes": []}
    return Evaluation(metrics, videos, tuple(phases), "a test")


EVERY_PHASE = np.repeat(np.arange(7), 3)


def test_the_usual_test_set_is_not_warned_about():
    evaluation = simple_evaluation(range(41, 81), EVERY_PHASE, EVERY_PHASE)
    assert warnings(evaluation.metrics, evaluation.videos) == []
    evaluation = simple_evaluation(range(40, 80), EVERY_PHASE, EVERY_PHASE)
    assert "Not the usual test set" in warnings(evaluation.metrics, evaluation.videos)[0]


def test_what_makes_figures_misleading_is_said():
    evaluation = simple_evaluation(range(41, 81), EVERY_PHASE[3:], np.minimum(EVERY_PHASE[3:], 5))
    found = warnings(evaluation.metrics, evaluation.videos)
    assert "Absent from the truth of every video: Preparation" in found[0]
    assert "Never predicted: Preparation, Gallbladder retraction" in found[1]
    evaluation = simple_evaluation([1], [0, 1], [0, 1], label_set="own", phases=("one", "two"))
    assert "No relaxed figures" in warnings(evaluation.metrics, evaluation.videos)[0]


def test_reports_of_what_is_not_defined_and_of_many_videos(tmp_path):
    evaluation = simple_evaluation(range(41, 81), EVERY_PHASE[3:], EVERY_PHASE[3:])
    report = write_report(evaluation, tmp_path).read_text()
    assert "| official relaxed | 100.0 ± 0.0 | 100.0 ± 0.0 | – | – | – |" in report
    assert report.count("pictures/ribbons_") == 4
    assert json.loads((tmp_path / "metrics.json").read_text())["relaxed_official"]["recall"]["mean"] is None
    assert summary_table(evaluation).row_count == 3
    # Fewer videos: no picture of an earlier report is left.
    write_report(simple_evaluation([41], [0, 1], [0, 1], label_set="own", phases=("one", "two")), tmp_path)
    assert len(list((tmp_path / "pictures").glob("ribbons_*"))) == 1


def test_frames_from_the_cache_give_the_same_answers(ready, pictures, tmp_path):
    frames, phases = pictures
    data = dataset_of(frames[:6], phases[:6])
    direct = evaluate_model(MODEL, data, tmp_path / "direct", threads=1)
    cached = evaluate_model(MODEL, data, tmp_path / "cached", threads=1, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir())
    np.testing.assert_array_equal(cached.videos[0].confidence, direct.videos[0].confidence)


def test_real_surgeries_in_data_set_form(ready, shared_data, tmp_path):
    data = open_dataset(shared_data / "cholec80", rate_hz=1.0)
    video = data.videos[0]
    few = replace(
        video,
        times_s=video.times_s[:40],
        phases=video.phases[:40],
        tools=None,
    )
    evaluation = evaluate_model(MODEL, replace(data, videos=(few,)), tmp_path, threads=1)
    print(f"ran on 40 frames of {video.name} of {shared_data.name}/cholec80")
    assert evaluation.metrics["samples"] == 40
    assert evaluation.metrics["per_video"][video.name]["step_s"] == 4.0
    labels = shared_data / "cholec80" / "labels" / "phase_1fps"
    written = read_phase_folder(tmp_path / "truth")[video.name]
    track = read_phase_folder(labels, [video.name])[video.name]
    official = dict(zip(track.frames.tolist(), track.entries, strict=True))
    assert [official[frame] for frame in written.frames.tolist()] == list(written.entries)


def test_predictions_of_another_tool_with_numbers(finished, tmp_path):
    """The format of other projects' predictions: counters and numbers instead of frames and names."""
    (tmp_path / "theirs").mkdir()
    for name, track in read_phase_folder(finished / "predictions_published").items():
        rows = [
            f"{frame // 25}\t{CHOLEC80_PHASES.index(entry)}"
            for frame, entry in zip(track.frames, track.entries, strict=True)
        ]
        (tmp_path / "theirs" / f"{name}.txt").write_text("\n".join(rows))
    theirs = evaluate_folders(finished / "truth", tmp_path / "theirs", first_number=0).metrics
    assert (
        theirs["strict"] == evaluate_folders(finished / "truth", finished / "predictions_published").metrics["strict"]
    )


def test_written_files_are_whole_or_absent(tmp_path):
    write_phase_file(tmp_path / "video01.txt", [0.0, 1.0], [0, 1], CHOLEC80_PHASES)
    assert [path.name for path in tmp_path.iterdir()] == ["video01.txt"]
