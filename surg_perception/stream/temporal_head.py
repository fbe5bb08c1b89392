# SPDX-License-Identifier: Apache-2.0
"""Causal temporal head, streaming: phase probabilities of the newest frame from the whole history, without PyTorch.

The network is TeCNO's (Czempiel et al., arXiv 2003.10751): a multi-stage temporal convolutional network (MS-TCN,
arXiv 1903.01945) whose dilated convolutions see no later step. `surg_perception.gsvit.temporal` trains it.

`TemporalHead.step` and `TemporalHead.run` give the same bits. Sums are made of elementwise additions in an order
that depends on the number of terms alone (`_sum`). A BLAS library adds in another order for a matrix than for a
vector, and so does NumPy's own reduction once an array outgrows its buffer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from surg_perception.models import ModelError

INPUTS = ("latent", "probabilities", "latent+probabilities")
KERNEL = 3
PROBABILITY_FLOOR = 1e-4
"""Probabilities below are raised to it before the logarithm; what a frame head says below is noise."""
INPUT_LIMIT = 10.0
"""Standardised inputs are clipped to it either way, so that no picture can blow up the history."""
_MAX_LAYERS = 14
_ROWS_AT_ONCE = 16

Array = NDArray[np.float32]
_Affine = tuple[Array, Array]


@dataclass(frozen=True)
class TemporalConfig:
    """What a temporal head consists of. Checked when made: ValueError names what is wrong.

    Attributes:
        features: channels D of the latent, 192 for GSViT-M0, 384 for M5.
        classes: number of phases C.
        inputs: per step, "latent" (its spatial mean, [D]), "probabilities" (logarithms of the frame head's, [C])
            or "latent+probabilities".
        stages: the first sees the inputs, each further one the softmax of the one before.
        layers: dilated residual layers of a stage, with dilations 1, 2, 4, ….
        channels: width of a stage.
        dropout: share of a layer's output dropped in training.
        step_s: seconds between two steps of the history.
    """

    features: int
    classes: int
    inputs: str = "latent"
    stages: int = 2
    layers: int = 8
    channels: int = 32
    dropout: float = 0.5
    step_s: float = 1.0

    def __post_init__(self) -> None:
        for name, highest in (
            ("features", 65536),
            ("classes", 4096),
            ("stages", 16),
            ("layers", _MAX_LAYERS),
            ("channels", 4096),
        ):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= highest:
                raise ValueError(f"{name} is {value!r}; it must be a whole number from 1 to {highest}")
        if self.inputs not in INPUTS:
            raise ValueError(f"inputs is {self.inputs!r}; it must be one of {', '.join(INPUTS)}")
        if type(self.dropout) not in (int, float) or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout!r}; it must be from 0 to below 1")
        if type(self.step_s) not in (int, float) or not 0.0 < self.step_s <= 3600.0:
            raise ValueError(f"step_s is {self.step_s!r}; it must be above 0 and at most 3600 s")

    @property
    def uses_latent(self) -> bool:
        """Whether the latent is among the inputs."""
        return self.inputs != "probabilities"

    @property
    def uses_probabilities(self) -> bool:
        """Whether the frame head's probabilities are among the inputs."""
        return self.inputs != "latent"

    @property
    def input_width(self) -> int:
        """Inputs of one step."""
        return self.features * self.uses_latent + self.classes * self.uses_probabilities

    @property
    def receptive_steps(self) -> int:
        """Steps that an answer can depend on, the newest included."""
        return 1 + self.stages * (KERNEL - 1) * (2**self.layers - 1)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of a head's file; all are float32."""
        channels = self.channels
        shapes: dict[str, tuple[int, ...]] = {
            "mean": (self.input_width,),
            "std": (self.input_width,),
            "temperature": (),
        }
        for stage in range(self.stages):
            affine = {"inlet": (channels, self.classes if stage else self.input_width)}
            for layer in range(self.layers):
                affine[f"layers.{layer}.dilated"] = (channels, KERNEL * channels)
                affine[f"layers.{layer}.pointwise"] = (channels, channels)
            affine["outlet"] = (self.classes, channels)
            for name, shape in affine.items():
                shapes[f"stages.{stage}.{name}.weight"] = shape
                shapes[f"stages.{stage}.{name}.bias"] = shape[:1]
        return shapes


def pool_latents(latents: ArrayLike) -> Array:
    """Spatial mean of latents float [..., D, 4, 4], float32 [..., D]: the form in which to store them for training.

    The head pools with this function, so that stored and live latents agree to the bit.
    """
    values = np.asarray(latents, np.float32)
    values = values.reshape(*values.shape[:-2], values.shape[-2] * values.shape[-1])
    return np.ascontiguousarray(_sum(np.moveaxis(values, -1, 0))) / np.float32(values.shape[-1])


def _sum(terms: Array) -> Array:
    """Sum over the first axis: the second half is added to the first until one term is left."""
    while (count := len(terms)) > 1:
        half = count // 2
        odd = terms[2 * half :]
        terms = terms[:half] + terms[half : 2 * half]
        if count % 2:
            terms[0] += odd[0]
    return terms[0]


def temporal_inputs(config: TemporalConfig, latents: ArrayLike | None, probabilities: ArrayLike | None) -> Array:
    """What the network sees of n steps, before its standardisation.

    Args:
        config: says which of the two are used; the other is not looked at and may be None.
        latents: float [n, D, 4, 4], or pooled [n, D].
        probabilities: of the frame head, float [n, C].

    Returns:
        float32 [n, config.input_width]: pooled latents, then log-probabilities.

    Raises:
        ValueError: missing, of another width or length, or not finite.
    """
    parts: list[Array] = []
    if config.uses_latent:
        values = np.asarray(latents if latents is not None else np.empty((0, 0)), np.float32)
        width = values.shape[1] if values.ndim in (2, 4) else -1
        if latents is None or width != config.features:
            found = "are missing" if latents is None else f"have {width} features (shape {values.shape})"
            raise ValueError(
                f"the latents {found}, but the temporal head takes {config.features} features ([n, "
                f"{config.features}, 4, 4] or [n, {config.features}]); use a head that was trained on this encoder"
            )
        parts.append(np.ascontiguousarray(values) if values.ndim == 2 else pool_latents(values))
    if config.uses_probabilities:
        values = np.asarray(probabilities if probabilities is not None else np.empty(0), np.float32)
        if values.ndim != 2 or values.shape[1] != config.classes:
            found = "are missing" if probabilities is None else f"have shape {values.shape}"
            raise ValueError(f"the probabilities {found}, but the temporal head takes [n, {config.classes}]")
        # NaN stays NaN and is refused below.
        parts.append(np.log(np.maximum(np.ascontiguousarray(values), np.float32(PROBABILITY_FLOOR))))
    if len({len(part) for part in parts}) > 1:
        raise ValueError(f"{len(parts[0])} latents, but {len(parts[1])} rows of probabilities")
    inputs = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
    if not np.isfinite(inputs).all():
        step = int(np.flatnonzero(~np.isfinite(inputs).all(axis=1))[0])
        raise ValueError(f"latents or probabilities are not finite (row {step} of {len(inputs)})")
    return inputs


class StepClock:
    """Decides from the times of frames alone which of them join the history as steps.

    Steps are due on a grid of `step_s` from the first frame on, so that they do not drift against the clock. A
    frame joins when it is, as far as one can know without the next frame, the one nearest to the time that is
    due: from half the time since the frame before (at most half a step) ahead of it. It serves the point of the
    grid that it is nearest to; points that no frame came for are passed over. The second of two frames of one
    time never joins, nor does a frame that comes out of order by at most half a step. The history ends ("seek")
    at a frame further back, and ("gap") at one that comes more than `reset_gap_s` after the frame before.
    """

    def __init__(self, step_s: float, reset_gap_s: float) -> None:
        self._step_s, self._reset_gap_s = step_s, reset_gap_s
        self.reset()

    def reset(self) -> None:
        """Forget the past; the next frame joins as the first."""
        self._newest_s: float | None = None
        self._due_s = 0.0

    def take(self, time_s: float) -> tuple[str, bool]:
        """Frame at `time_s` seconds: why the history ends before it ("", "gap", "seek"), and whether it joins."""
        newest_s, step_s = self._newest_s, self._step_s
        reason = ""
        if newest_s is not None:
            if time_s < newest_s - step_s / 2:
                reason = "seek"
            elif time_s > newest_s + self._reset_gap_s:
                reason = "gap"
        if newest_s is None or reason:
            self._newest_s, self._due_s = time_s, time_s + step_s
            return reason, True
        if time_s <= newest_s:
            return "", False
        self._newest_s = time_s
        if time_s < self._due_s - min(time_s - newest_s, step_s) / 2:
            return "", False
        self._due_s += step_s * (1 + math.floor((time_s - self._due_s) / step_s + 0.5))
        return "", True


@dataclass(frozen=True)
class StepPlan:
    """Which of n frames join, and where each stands; made by `plan_steps`.

    Attributes:
        joins: bool [n].
        before: int64 [n], how many frames joined before this one, in all.
        first: int64 [n], how many of these belong to a history that has ended.
    """

    joins: NDArray[np.bool_]
    before: NDArray[np.int64]
    first: NDArray[np.int64]

    def rows_back(self, steps: int) -> NDArray[np.int64]:
        """Index of the frame that joined as the `steps`-th before each frame; n where there is none."""
        wanted = self.before - steps
        joined = np.append(np.flatnonzero(self.joins), len(self.joins))
        return joined[np.where(wanted >= self.first, wanted, len(joined) - 1)]


def default_reset_gap_s(step_s: float) -> float:
    """Pause in s after which a new history begins: 5 minutes, at least 10 steps.

    Shorter pauses are part of a surgery: the camera is cleaned, or the recording was stopped in between.
    """
    return max(300.0, 10.0 * step_s)


def plan_steps(times_s: ArrayLike, step_s: float, reset_gap_s: float | None = None) -> StepPlan:
    """What a `StepClock` says about the frames of a video at `times_s` float [n] seconds.

    Raises:
        ValueError: not one-dimensional, or not finite.
    """
    times = np.asarray(times_s, np.float64)
    if times.ndim != 1 or not np.isfinite(times).all():
        raise ValueError(f"times_s must be [n] finite seconds, found shape {times.shape}")
    clock = StepClock(step_s, default_reset_gap_s(step_s) if reset_gap_s is None else reset_gap_s)
    joins = np.zeros(len(times), np.bool_)
    before, first = np.zeros((2, len(times)), np.int64)
    count = start = 0
    for index, time_s in enumerate(times.tolist()):
        reason, joins[index] = clock.take(time_s)
        if reason:
            start = count
        before[index], first[index] = count, start
        count += int(joins[index])
    return StepPlan(joins, before, first)


def _affine(x: Array, weight_and_bias: _Affine) -> Array:
    """x [n, K], weight [K, 1, O], bias [O] to x W + b [n, O], a few rows at a time to stay within the caches."""
    weight, bias = weight_and_bias
    out = np.empty((len(x), len(bias)), np.float32)
    for start in range(0, len(x), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        out[rows] = _sum(x[rows].T[:, :, None] * weight)
    return out + bias


def _softmax(logits: Array) -> Array:
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / _sum(exponentials.T)[:, None]


@dataclass(frozen=True)
class _Stage:
    inlet: _Affine
    layers: tuple[tuple[_Affine, _Affine], ...]
    outlet: _Affine


class TemporalHead:
    """A trained temporal head, for one camera. Used by one thread at a time.

    The head was trained on steps `config.step_s` apart, while frames come at any rate. Every frame gets an
    answer at once: it is judged as if it were the newest step, after those that joined the history so far.
    `StepClock` says which frames join. Work and memory of a frame are constant: each dilated layer keeps its
    last 2 x dilation inputs in a ring.

    Attributes:
        config: what the network consists of.
        resets: how often the history ended by itself, by reason: "gap", "seek".
    """

    def __init__(
        self, config: TemporalConfig, tensors: Mapping[str, ArrayLike], *, reset_gap_s: float | None = None
    ) -> None:
        """Take over `tensors` (`TemporalConfig.tensor_shapes`); `reset_gap_s` None is `default_reset_gap_s`.

        Raises:
            ValueError: tensors that are missing, extra, misshapen or not finite; reset_gap_s not above 0.
        """
        self.config = config
        self.resets = {"gap": 0, "seek": 0}
        values = _checked(config, tensors)
        self._mean, self._std, self._temperature = values["mean"], values["std"], values["temperature"]

        def affine(name: str) -> _Affine:
            return np.ascontiguousarray(values[f"{name}.weight"].T[:, None, :]), values[f"{name}.bias"]

        self._stages = [
            _Stage(
                affine(f"stages.{stage}.inlet"),
                tuple(
                    (affine(f"stages.{stage}.layers.{k}.dilated"), affine(f"stages.{stage}.layers.{k}.pointwise"))
                    for k in range(config.layers)
                ),
                affine(f"stages.{stage}.outlet"),
            )
            for stage in range(config.stages)
        ]
        self.reset_gap_s = default_reset_gap_s(config.step_s) if reset_gap_s is None else reset_gap_s
        if not self.reset_gap_s > 0.0:
            raise ValueError(f"reset_gap_s is {self.reset_gap_s}; it must be above 0")
        self.multiply_adds = sum(value.size for name, value in values.items() if name.endswith(".weight"))
        self._clock = StepClock(config.step_s, self.reset_gap_s)
        self._rings = [
            [np.zeros((2 * 2**k, config.channels), np.float32) for k in range(config.layers)]
            for _ in range(config.stages)
        ]
        self._steps = 0

    @classmethod
    def open(cls, path: str | Path, *, reset_gap_s: float | None = None) -> TemporalHead:
        """The head in a file of `surg_perception.gsvit.temporal.save_temporal`.

        Raises:
            ModelError: no such file, or not a temporal head.
        """
        return cls(*read_temporal(path), reset_gap_s=reset_gap_s)

    @property
    def steps(self) -> int:
        """Steps in the history since it began."""
        return self._steps

    @property
    def state_bytes(self) -> int:
        """Memory of the history; it never changes."""
        return sum(ring.nbytes for rings in self._rings for ring in rings)

    def reset(self) -> None:
        """Forget the history, as for a new procedure; the next frame is judged as the first."""
        for rings in self._rings:
            for ring in rings:
                ring[:] = 0.0
        self._steps = 0
        self._clock.reset()

    def step(self, latent: ArrayLike | None, probabilities: ArrayLike | None, time_s: float) -> Array:
        """Calibrated phase probabilities float32 [C] of the frame at `time_s` seconds.

        Args:
            latent: float [D, 4, 4], or pooled [D].
            probabilities: of the frame head, float [C].
            time_s: by the image's stamp.

        Raises:
            ValueError: an input that is missing, of another width or not finite; the state is kept.
        """
        inputs = self._one(latent, probabilities)
        if not math.isfinite(time_s):
            raise ValueError(f"time_s is {time_s}; it must be a finite number of seconds")
        reason, joins = self._clock.take(time_s)
        if reason:
            self.resets[reason] += 1
            self.reset()
            self._clock.take(time_s)
        return self._judge(inputs, joins)

    def peek(self, latent: ArrayLike | None, probabilities: ArrayLike | None) -> Array:
        """What `step` would say of a frame that comes now; changes nothing."""
        return self._judge(self._one(latent, probabilities), joins=False)

    def run(self, latents: ArrayLike | None, probabilities: ArrayLike | None, times_s: ArrayLike) -> Array:
        """Calibrated probabilities float32 [n, C] of a whole video, layer by layer.

        The same bits as `step` on its frames one after another from a fresh head; the head's own history is
        neither used nor changed.

        Args:
            latents: float [n, D, 4, 4], or pooled [n, D].
            probabilities: of the frame head, float [n, C].
            times_s: float [n] seconds.

        Raises:
            ValueError: as `step`, or lengths that differ.
        """
        inputs = temporal_inputs(self.config, latents, probabilities)
        plan = plan_steps(times_s, self.config.step_s, self.reset_gap_s)
        if len(plan.joins) != len(inputs):
            raise ValueError(f"{len(plan.joins)} times, but latents or probabilities of {len(inputs)} frames")
        rows = [(plan.rows_back(2 * 2**k), plan.rows_back(2**k)) for k in range(self.config.layers)]
        nothing = np.zeros((1, self.config.channels), np.float32)

        def past(stage: int, layer: int, x: Array) -> tuple[Array, Array]:
            with_nothing = np.concatenate((x, nothing))
            return with_nothing[rows[layer][0]], with_nothing[rows[layer][1]]

        return self._network(inputs, past)

    def _one(self, latent: ArrayLike | None, probabilities: ArrayLike | None) -> Array:
        return temporal_inputs(
            self.config,
            None if latent is None else np.asarray(latent)[None],
            None if probabilities is None else np.asarray(probabilities)[None],
        )

    def _judge(self, inputs: Array, joins: bool) -> Array:
        slots: list[tuple[Array, Array]] = []

        def past(stage: int, layer: int, x: Array) -> tuple[Array, Array]:
            ring, dilation = self._rings[stage][layer], 2**layer
            oldest = self._steps % (2 * dilation)
            slots.append((ring[oldest], x[0]))
            return ring[None, oldest], ring[None, (oldest + dilation) % (2 * dilation)]

        answer = self._network(inputs, past)[0]
        if joins:
            for slot, x in slots:
                slot[:] = x
            self._steps += 1
        return answer

    def _network(self, inputs: Array, past: Callable[[int, int, Array], tuple[Array, Array]]) -> Array:
        """[n, C]; `past(stage, layer, x)`: inputs of the layer 2 and 1 dilations before x [n, channels]."""
        with np.errstate(over="ignore"):
            x = (inputs - self._mean) / self._std
        x = np.clip(x, np.float32(-INPUT_LIMIT), np.float32(INPUT_LIMIT))
        for number, stage in enumerate(self._stages):
            x = _affine(x if number == 0 else _softmax(x), stage.inlet)
            for layer, (dilated, pointwise) in enumerate(stage.layers):
                taps = np.concatenate((*past(number, layer, x), x), axis=1)
                x = x + _affine(np.maximum(_affine(taps, dilated), np.float32(0.0)), pointwise)
            x = _affine(x, stage.outlet)
        return _softmax(x / self._temperature)


def _checked(config: TemporalConfig, tensors: Mapping[str, ArrayLike]) -> dict[str, Array]:
    shapes = config.tensor_shapes()
    missing, extra = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
    if missing or extra:
        raise ValueError(f"tensors missing: {missing[:6]}, not expected: {extra[:6]}; the temporal head is {config}")
    values: dict[str, Array] = {}
    for name, shape in shapes.items():
        value = np.ascontiguousarray(tensors[name], np.float32).reshape(np.shape(tensors[name]))
        if value.shape != shape:
            raise ValueError(f"tensor {name} has shape {value.shape}, expected {shape} in {config}")
        if not np.isfinite(value).all():
            raise ValueError(f"tensor {name} is not finite; train the temporal head again")
        values[name] = value
    for name in ("std", "temperature"):
        if not (values[name] > 0.0).all():
            raise ValueError(f"tensor {name} has values that are not above 0; train the temporal head again")
    return values


def read_temporal(path: str | Path) -> tuple[TemporalConfig, dict[str, Array]]:
    """Configuration and tensors of a temporal head's file: safetensors, with the configuration in its metadata.

    Reads the format itself (https://github.com/huggingface/safetensors: length of the header, header as JSON,
    data): the names, shapes and type are known beforehand, and neither apt nor rosdep has the library for the
    systems that a robot runs.

    Raises:
        ModelError: no such file, or not a temporal head: what was found, what was expected.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"no temporal head at {path}: {error.strerror}; copy the model folder again, whole") from error
    try:
        data = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:data].decode("utf-8"))
        stored = json.loads(header.pop("__metadata__")["temporal_config"])
        config = TemporalConfig(**{field.name: stored[field.name] for field in fields(TemporalConfig)})
        tensors: dict[str, Array] = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            if entry["dtype"] != "F32" or not 0 <= begin <= end <= len(content) - data:
                raise ValueError(f"tensor {name} is {entry}, in a file of {len(content)} bytes; expected float32")
            tensors[name] = np.frombuffer(content[data + begin : data + end], "<f4").reshape(shape)
        return config, _checked(config, tensors)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"{path} is no temporal head ({type(error).__name__}: {error}); expected a safetensors file written by "
            "surg_perception.gsvit.temporal.save_temporal"
        ) from error
