# SPDX-License-Identifier: Apache-2.0
"""Does novelty rise when something happens that nothing announced? ROC AUC on phantom procedures, figures on a clip.

    .venv/bin/python benchmarks/bench_novelty.py                                held-out phantom procedures
    .venv/bin/python benchmarks/bench_novelty.py --model DIR --video FILE.mp4   a model on a clip

Into each phantom procedure, events are put at random times, drawn by the phantom's own renderer: a vessel that starts
to bleed where nothing bleeds by script, a cloud of smoke without cautery, the camera drawn back into its trocar, the
camera pulled out (a blank picture), the light going down. A judged image is positive if it lies in an event; negatives
are the images of the same procedures in no event and not within `AFTER_S` after one. Everything the phantom does by
itself, with its own smoke and blood, instruments and camera motion, is negative. The area under the ROC curve is
over all judged images of all procedures, for each kind against all negatives, and once more for the first two
seconds of each event alone.

A clip has no labels: the same pictures, and figures with and without the same kind of trouble put in (black frames).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from report import machine, write_json
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.metrics import roc_auc_score

from surg_perception.data.frames import open_source
from surg_perception.data.phantom_render import Renderer
from surg_perception.data.phantom_script import Bleed, SceneState, Script
from surg_perception.models import ModelCard, find_model
from surg_perception.runtime import Backend, open_backend
from surg_perception.runtime.forecast import ForecastBackend, open_forecast
from surg_perception.stream.forecast import HISTORY_S, Forecaster, ForecastSettings, Novelty
from surg_perception.stream.image_decode import resize_to_model_input
from surg_perception.stream.phase_pipeline import is_blank

ROOT = Path(__file__).resolve().parents[1]
FIRST_SEED = 6100
SIZE, DURATION_S, RATE_HZ = (480, 270), 150.0, 2.0
KINDS = ("bleeding", "smoke", "trocar", "camera out", "dark")
EVENTS, EVENT_S, FIRST_EVENT_S, AFTER_S = 5, 5.0, 25.0, 4.0
ONSET_S = 2.0
PLACES, SEEN_SHARE = 6, 0.05
SCORES = ("score", "error", "copy_error", "colour_copy_error", "frame_difference")
COLOURS = {
    "bleeding": "#d62728",
    "smoke": "#7f7f7f",
    "trocar": "#9467bd",
    "camera out": "#1f77b4",
    "dark": "#111111",
}


@dataclass(frozen=True)
class Event:
    """Something put into a procedure, from `start_s` to `end_s`."""

    kind: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Frame:
    """One picture of a stream, uint8 [H, W, 3] BGR."""

    time_s: float
    bgr: NDArray[np.uint8]


@dataclass(frozen=True)
class Judged:
    """One judged image: the stream's time, the novelty, and how much changed since the image before."""

    time_s: float
    novelty: Novelty
    frame_difference: float


class EventfulPhantom:
    """A phantom procedure with one event of each kind, in random order and at random times.

    Between two events lie at least `AFTER_S`. A bleed wells up within a second at a random place, stands until
    the event is over and then is taken away within two seconds; of several places the first is taken where blood can
    be seen, in a twentieth of the picture or more (tissue and instruments may hide it), else the one where most is.
    """

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng([seed, 99])
        self.script = Script(seed, DURATION_S)
        share_s = (DURATION_S - FIRST_EVENT_S - 0.1 * DURATION_S) / len(KINDS)
        self.events = [
            Event(str(kind), start_s, start_s + EVENT_S)
            for k, kind in enumerate(rng.permutation(KINDS))
            for start_s in [FIRST_EVENT_S + k * share_s + rng.uniform(0.0, share_s - EVENT_S - AFTER_S)]
        ]
        bleeding = next(event for event in self.events if event.kind == "bleeding")
        at = np.array(self.script.state(bleeding.start_s + 2.0).camera[:2])
        self._bleeds = tuple(
            Bleed((float(x), float(y)), size, bleeding.start_s, bleeding.end_s, bleeding.end_s + 2.0)
            for x, y in at + rng.uniform(-0.4, 0.4, (PLACES, 2))
            for size in [float(rng.uniform(0.35, 0.55))]
        )
        width, height = SIZE
        self._renderer = Renderer(width, height, seed, self.script.anatomy, (*self.script.bleeds, *self._bleeds))
        shown = [self._seen_share(place, bleeding.start_s + 2.0) for place in range(PLACES)]
        self._place = (
            int(np.argmax(np.array(shown) >= SEEN_SHARE)) if max(shown) >= SEEN_SHARE else int(np.argmax(shown))
        )
        self.bleeding_seen = shown[self._place]

    def _seen_share(self, place: int, time_s: float) -> float:
        """Share of the picture that blood at one of the places changes by more than 16 levels."""
        state = self.script.state(time_s)
        without, _ = self._renderer.draw(self._bleeding(state, time_s, None), 0)
        bled, _ = self._renderer.draw(self._bleeding(state, time_s, place), 0)
        return float((np.abs(bled.astype(np.int16) - without).max(axis=2) > 16).mean())

    def _bleeding(self, state: SceneState, time_s: float, place: int | None) -> SceneState:
        amounts = (bleed.amount(time_s) if k == place else 0.0 for k, bleed in enumerate(self._bleeds))
        return replace(state, bleeds=(*state.bleeds, *amounts))

    def _state(self, time_s: float) -> SceneState:
        state = self._bleeding(self.script.state(time_s), time_s, self._place)
        for event in self.events:
            if not event.start_s <= time_s < event.end_s:
                continue
            ease = min(1.0, (time_s - event.start_s) / 1.0, (event.end_s - time_s) / 1.0)
            if event.kind == "smoke":
                state = replace(state, smoke=max(state.smoke, 0.9 * ease))
            elif event.kind == "trocar":
                state = replace(state, trocar_view=max(state.trocar_view, 0.8 * ease))
            elif event.kind == "dark":
                state = replace(state, exposure=state.exposure * (1.0 - 0.7 * ease))
        return state

    def __iter__(self) -> Iterator[Frame]:
        for index in range(round(DURATION_S * RATE_HZ)):
            time_s = index / RATE_HZ
            bgr, _ = self._renderer.draw(self._state(time_s), index)
            out = any(e.kind == "camera out" and e.start_s <= time_s < e.end_s for e in self.events)
            yield Frame(time_s, np.zeros_like(bgr) if out else bgr)


def judge(frames: Iterator[Frame], backend: Backend, forecast: ForecastBackend, rate_hz: float) -> list[Judged]:
    """What the phase node would publish as novelty on these frames, beside how much changed since the frame before."""
    forecaster = Forecaster(forecast.predict, forecast.gap_s, ForecastSettings(rate_hz=rate_hz))
    last: NDArray[np.uint8] | None = None
    differences: dict[int, float] = {}
    found = []
    for frame in frames:
        picture = resize_to_model_input(frame.bgr, 224)
        latent = None if is_blank(picture) else backend.infer(picture)[1]
        stamp_ns = round(frame.time_s * 1e9)
        previous = picture if last is None else last
        differences[stamp_ns] = float(np.abs(picture.astype(np.int16) - previous).mean() / 255.0)
        last = picture
        for each in forecaster.update(picture, latent, stamp_ns):
            if isinstance(each, Novelty):
                found.append(Judged(each.stamp_ns * 1e-9, each, differences[each.stamp_ns]))
    return found


def values_of(judged: list[Judged]) -> dict[str, NDArray[np.float64]]:
    """Each of SCORES for each judged image."""
    return {
        "score": np.array([j.novelty.score for j in judged]),
        "error": np.array([j.novelty.error for j in judged]),
        "copy_error": np.array([j.novelty.copy_error for j in judged]),
        "colour_copy_error": np.array([j.novelty.colour_copy_error for j in judged]),
        "frame_difference": np.array([j.frame_difference for j in judged]),
    }


def areas(runs: list[tuple[EventfulPhantom, list[Judged]]]) -> dict[str, Any]:
    """ROC AUC by kind of event and kind of score, with 95 % intervals over procedures drawn again (bootstrap)."""
    parts = []
    for procedure, (phantom, judged) in enumerate(runs):
        values = values_of(judged)
        for k, item in enumerate(judged):
            inside = [e for e in phantom.events if e.start_s <= item.time_s < e.end_s]
            near = [e for e in phantom.events if e.start_s <= item.time_s < e.end_s + AFTER_S]
            kind = inside[0].kind if inside else ("after" if near else "")
            onset = bool(inside) and item.time_s < inside[0].start_s + ONSET_S
            if not np.isnan(values["score"][k]):
                parts.append((procedure, kind, onset, *(values[name][k] for name in SCORES)))
    procedures = np.array([part[0] for part in parts])
    kinds = np.array([part[1] for part in parts])
    onsets = np.array([part[2] for part in parts])
    scores = {name: np.array([part[3 + k] for part in parts]) for k, name in enumerate(SCORES)}
    rng = np.random.default_rng(0)
    draws = [rng.integers(0, len(runs), len(runs)) for _ in range(200)]
    figures: dict[str, Any] = {"negatives": int((kinds == "").sum())}
    for kind in ("all", *KINDS):
        positive = (kinds == kind) if kind != "all" else (kinds != "") & (kinds != "after")
        for part, chosen in (("whole event", positive), ("first 2 s", positive & onsets)):
            used = chosen | (kinds == "")
            figures.setdefault(kind, {})[part] = {
                "positives": int(chosen.sum()),
                **{name: _area(chosen[used], scores[name][used], procedures[used], draws) for name in SCORES},
            }
    return figures


def _area(
    positive: NDArray[np.bool_], scores: NDArray[np.float64], procedures: NDArray[np.int64], draws: list[Any]
) -> dict[str, Any]:
    drawn = []
    for draw in draws:
        rows = np.concatenate([np.flatnonzero(procedures == procedure) for procedure in draw])
        if positive[rows].any() and not positive[rows].all():
            drawn.append(roc_auc_score(positive[rows], scores[rows]))
    low, high = np.percentile(drawn, (2.5, 97.5))
    return {
        "auc": round(float(roc_auc_score(positive, scores)), 4),
        "ci95": [round(float(low), 4), round(float(high), 4)],
    }


def draw(path: Path, judged: list[Judged], events: list[Event], title: str) -> None:
    """Novelty over time with the events shaded, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    times_s = np.array([j.time_s for j in judged])
    silences = np.flatnonzero(np.diff(times_s) > 1.5 * np.median(np.diff(times_s))) + 1
    values = {name: np.insert(series, silences, np.nan) for name, series in values_of(judged).items()}
    times_s = np.insert(times_s, silences, np.nan)
    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(9.0, 4.4), sharex=True, layout="constrained")
    top.plot(times_s, values["score"], color="#333333", linewidth=1.0)
    top.set_yscale("symlog", linthresh=3.0)
    top.set_yticks([-3, 0, 3, 10, 30], ["-3", "0", "3", "10", "30"])
    top.set_ylabel("novelty score")
    bottom.plot(times_s, values["error"], color="#d62728", linewidth=1.0, label="error of the forecast")
    bottom.plot(times_s, values["copy_error"], color="#1f77b4", linewidth=1.0, label="error of copying the last image")
    bottom.set_ylabel("mean |difference|, 0..1")
    bottom.set_xlabel("time, s")
    bottom.legend(loc="upper right", fontsize=8)
    for axes in (top, bottom):
        for event in events:
            axes.axvspan(event.start_s, event.end_s, color=COLOURS.get(event.kind, "#888888"), alpha=0.18, linewidth=0)
    for event in events:
        top.text(
            0.5 * (event.start_s + event.end_s), 0.98, event.kind, ha="center", va="top", fontsize=8,
            transform=top.get_xaxis_transform(),
        )  # fmt: skip
    top.set_title(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def on_phantom(
    backend: Backend, forecast: ForecastBackend, procedures: int, rate_hz: float, picture: Path
) -> dict[str, Any]:
    """Figures over many procedures, and a picture of the first."""
    runs = []
    for seed in track(range(FIRST_SEED, FIRST_SEED + procedures), description="phantom procedures"):
        phantom = EventfulPhantom(seed)
        runs.append((phantom, judge(iter(phantom), backend, forecast, rate_hz)))
    phantom, judged = runs[0]
    draw(picture, judged, phantom.events, f"phantom procedure {FIRST_SEED}, {forecast.card.model_id}")
    return {
        "seeds": [FIRST_SEED, FIRST_SEED + procedures - 1],
        "procedure": {"duration_s": DURATION_S, "size": list(SIZE), "rate_hz": RATE_HZ},
        "events": {"kinds": list(KINDS), "length_s": EVENT_S, "excluded_after_s": AFTER_S},
        "auc": areas(runs),
    }


def on_video(backend: Backend, forecast: ForecastBackend, video: Path, rate_hz: float, picture: Path) -> dict[str, Any]:
    """Figures on a video, with the camera pulled out (black) for the last but one of six equal parts, 3 s long."""
    with open_source(video, rate_hz=RATE_HZ) as source:
        frames = [Frame(frame.time_s, frame.bgr) for frame in source]
    start_s = frames[-1].time_s * 4 / 6
    event = Event("camera out", start_s, start_s + 3.0)
    shown = [Frame(f.time_s, np.zeros_like(f.bgr)) if event.start_s <= f.time_s < event.end_s else f for f in frames]
    judged = judge(iter(shown), backend, forecast, rate_hz)
    draw(picture, judged, [event], f"{video.name} with black frames put in, {forecast.card.model_id}")
    values = values_of(judged)
    inside = np.array([event.start_s <= j.time_s < event.end_s for j in judged])
    near = np.array([event.start_s <= j.time_s < event.end_s + AFTER_S for j in judged])
    known = ~np.isnan(values["score"])
    return {
        "video": video.name,
        "judged": len(judged),
        "median": {name: round(float(np.nanmedian(values[name][~near])), 4) for name in SCORES},
        "camera_out_auc": {
            name: round(float(roc_auc_score(inside[used], values[name][used])), 4)
            for name in SCORES
            for used in [known & (inside | ~near)]
        },
    }


def table(figures: dict[str, Any]) -> Table:
    """ROC AUC for a reader."""
    shown = Table("event", "part", "images", *SCORES, title="ROC AUC")
    for kind in ("all", *KINDS):
        for part, values in figures[kind].items():
            shown.add_row(
                kind,
                part,
                str(values["positives"]),
                *(
                    f"{values[name]['auc']:.3f} ({'–'.join(f'{v:.2f}' for v in values[name]['ci95'])})"
                    for name in SCORES
                ),
            )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gsvit_m0_phantom", help="a model with a forecast: name or folder")
    parser.add_argument("--video", type=Path, help="a video instead of the phantom")
    parser.add_argument("--procedures", type=int, default=24, help="phantom procedures")
    parser.add_argument("--rate-hz", type=float, default=2.0, help="forecasts a second")
    parser.add_argument("--out", type=Path, help="JSON file; default in benchmarks/results/ (phantom), out/ (video)")
    parser.add_argument(
        "--picture", type=Path, help="PNG file; default docs/images/novelty_phantom.png, or beside --out"
    )
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    card: ModelCard = find_model(arguments.model)
    about = machine()
    with open_backend(card, threads=arguments.threads) as backend:
        forecast = open_forecast(card, backend.kind, arguments.threads)
        content = {
            "model_id": card.model_id,
            "backend": [backend.name, forecast.name],
            "gap_s": forecast.gap_s,
            "forecasts_per_s": arguments.rate_hz,
            "history_s": HISTORY_S,
            "machine": about,
        }
        if arguments.video:
            out = arguments.out or ROOT / "out" / f"novelty_{arguments.video.stem}.json"
            picture = arguments.picture or out.with_suffix(".png")
            content |= on_video(backend, forecast, arguments.video, arguments.rate_hz, picture)
        else:
            out = arguments.out or ROOT / "benchmarks" / "results" / "novelty_phantom.json"
            picture = arguments.picture or ROOT / "docs" / "images" / "novelty_phantom.png"
            content |= on_phantom(backend, forecast, arguments.procedures, arguments.rate_hz, picture)
            Console().print(table(content["auc"]))
    write_json(out, content)
    Console().print(f"{out}, {picture}")


if __name__ == "__main__":
    main()
