# SPDX-License-Identifier: Apache-2.0
"""Every node parameter, declared once.

The nodes declare from here (so `ros2 param describe` says what stands here); config/pipeline.yaml and
docs/parameters.md are written from here by scripts/write_parameter_files.py, and a test compares them.
This module imports no ROS.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from surg_perception.stream.image_decode import MAX_PIXELS

Value = bool | int | float | str

_NOT_OURS = ("use_sim_time", "start_type_description_service", "qos_overrides.", "diagnostic_updater.")


@dataclass(frozen=True)
class Parameter:
    """One parameter of a node.

    live: may be set while the node is configured. Any other parameter is read at configure, and setting it
    in the states inactive and active is refused with a reason, so that what runs is what the parameters say.
    """

    name: str
    default: Value
    description: str
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    live: bool = False

    def fault(self, value: object) -> str | None:
        """Why value cannot be used, or None. An int is taken for a float."""
        expected = type(self.default)
        fits = isinstance(value, expected) and not (expected is int and isinstance(value, bool))
        if expected is float and isinstance(value, int) and not isinstance(value, bool):
            fits = True
        if not fits:
            return f"{self.name} is {value!r} ({type(value).__name__}), expected {expected.__name__}"
        if self.choices and value not in self.choices:
            return f"{self.name} is {value!r}, expected one of: {', '.join(self.choices)}"
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            low = -math.inf if self.minimum is None else self.minimum
            high = math.inf if self.maximum is None else self.maximum
            if not low <= value <= high:
                return f"{self.name} is {value}, expected {low:g} to {high:g}"
        return None


@dataclass(frozen=True)
class ParameterTable:
    """The parameters of one node and the rules between them."""

    node: str
    parameters: tuple[Parameter, ...]
    ordered: tuple[tuple[str, str], ...] = ()
    """Pairs (a, b) of names for which a <= b must hold."""

    def __getitem__(self, name: str) -> Parameter:
        for parameter in self.parameters:
            if parameter.name == name:
                return parameter
        raise KeyError(name)

    def __contains__(self, name: str) -> bool:
        return any(parameter.name == name for parameter in self.parameters)

    @property
    def defaults(self) -> dict[str, Value]:
        """Name to default value, in the order of the table."""
        return {parameter.name: parameter.default for parameter in self.parameters}

    def unknown(self, names: Iterable[str]) -> list[str]:
        """What to say of each of these names that is no parameter of this node or of every ROS node."""
        texts = []
        for name in names:
            if name in self or name.startswith(_NOT_OURS):
                continue
            close = difflib.get_close_matches(name, self.defaults, n=1)
            texts.append(f"unknown parameter '{name}'" + (f"; did you mean '{close[0]}'?" if close else ""))
        return texts

    def with_defaults(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The full set of values of a node that is given these parameters.

        Raises:
            ValueError: every value that cannot be used, and why.
        """
        ours = {name: value for name, value in given.items() if name in self}
        faults = [fault for name, value in ours.items() if (fault := self[name].fault(value))]
        if not faults:
            values = {**self.defaults, **{name: type(self[name].default)(value) for name, value in ours.items()}}
            if (fault := self.fault(values)) is None:
                return values
            faults = [fault]
        raise ValueError("; ".join(faults))

    def fault(self, values: dict[str, Any]) -> str | None:
        """Why this full set of values cannot be used together, or None."""
        for parameter in self.parameters:
            reason = parameter.fault(values[parameter.name])
            if reason:
                return reason
        for low, high in self.ordered:
            if values[low] > values[high]:
                return f"{low} is {values[low]:g}, expected at most {high} ({values[high]:g})"
        return None


_TRANSPORT = Parameter(
    "input.transport",
    "raw",
    "Which topic to subscribe to: 'raw' is image (sensor_msgs/Image), 'compressed' is image/compressed "
    "(sensor_msgs/CompressedImage).",
    choices=("raw", "compressed"),
)
_RELIABILITY = Parameter(
    "input.reliability",
    "best_effort",
    "QoS of the image subscription. 'best_effort' connects to every publisher; 'match' takes that of the "
    "publisher found at activation (best_effort if there is none yet).",
    choices=("best_effort", "reliable", "match"),
)
_MAX_PIXELS = Parameter(
    "input.max_pixels",
    MAX_PIXELS,
    "Larger images are refused with an error (guards memory against a wrong header; 8K is 33 million).",
    minimum=1,
    maximum=2**31 - 1,
)

PHASE = ParameterTable(
    "phase",
    (
        Parameter(
            "model.path",
            "gsvit_m0_phantom",
            "Model: a name that `surg-perception models list` shows, a model folder, or a path to an ONNX file.",
        ),
        Parameter(
            "model.verify",
            True,
            "Check the model file's sha256 against its card at configure.",
        ),
        Parameter(
            "runtime.backend",
            "auto",
            "Inference engine; 'auto' takes the best that truly runs on this machine and says which.",
            choices=("auto", "tensorrt", "openvino", "onnxruntime", "torch", "triton"),
        ),
        Parameter(
            "runtime.precision",
            "fp32",
            "Arithmetic of the network, checked against fp32 on sample frames at configure. fp16, and fp16-mixed with "
            "norms and softmax in fp32: TensorRT only. fp32-w8 and bf16-w8, with the phase head's weights in int8: "
            "OpenVINO on the CPU only.",
            choices=("fp32", "bf16", "fp16", "fp16-mixed", "fp32-w8", "bf16-w8"),
        ),
        Parameter(
            "runtime.allow_fallback",
            True,
            "Where the asked backend or precision does not run or does not agree with fp32: true takes the next "
            "best and warns, false makes configure fail.",
        ),
        Parameter(
            "engine.build",
            "background",
            "Where TensorRT would run and its engine has not been built yet (minutes, once): 'configure' builds it "
            "before configure ends, 'background' lets the next best backend serve meanwhile and switches over between "
            "two images (needs runtime.allow_fallback), 'never' leaves it to `surg-perception build-engine`.",
            choices=("configure", "background", "never"),
        ),
        Parameter(
            "runtime.threads",
            0,
            "CPU threads of the backend; 0 leaves the choice to the runtime.",
            minimum=0,
            maximum=256,
        ),
        Parameter(
            "runtime.server_url",
            "",
            "Model server of the backend 'triton', as 'grpc://host:port', or 'grpcs://host:port' over TLS; where it is "
            "given, 'auto' tries it first. Images leave this machine then. Empty: none.",
        ),
        Parameter(
            "runtime.server_timeout_s",
            0.25,
            "Longest wait for the model server's answer to an image; after it the image's state is FAULT.",
            minimum=0.01,
            maximum=60.0,
        ),
        Parameter(
            "runtime.server_retry_s",
            10.0,
            "Where another backend serves while the model server is away (runtime.allow_fallback): pause before the "
            "server is tried again in the background; each further one is twice as long, up to 120 s. Once it passes "
            "the check of configure it takes over between two images. 0: not before the next configure.",
            minimum=0.0,
            maximum=3600.0,
        ),
        Parameter(
            "runtime.server_version",
            "",
            "Version of the model on the server, where `surg-perception export triton` did not put it there; empty: "
            "the one made of the graph's sha256.",
        ),
        _TRANSPORT,
        _RELIABILITY,
        Parameter(
            "input.depth",
            4,
            "Images that the middleware may hold for the node; the mailbox behind it keeps the newest one only, "
            "so this adds no delay.",
            minimum=1,
            maximum=100,
        ),
        _MAX_PIXELS,
        Parameter(
            "input.warn_after_s",
            5.0,
            "Warn when no image has arrived for so long, naming topic, type and QoS of what publishes there.",
            minimum=0.5,
            maximum=3600.0,
            live=True,
        ),
        Parameter(
            "filter.time_constant_s",
            1.0,
            "Time constant of the causal smoothing of the phase probabilities; 0 turns it off.",
            minimum=0.0,
            maximum=600.0,
            live=True,
        ),
        Parameter(
            "filter.switch_margin",
            0.1,
            "Hysteresis: a new phase must exceed the published one by this probability to replace it.",
            minimum=0.0,
            maximum=1.0,
            live=True,
        ),
        Parameter(
            "filter.hold_s",
            0.5,
            "Hysteresis: for so long without a break, before the published phase changes.",
            minimum=0.0,
            maximum=600.0,
            live=True,
        ),
        Parameter(
            "filter.reset_gap_s",
            10.0,
            "A gap between image stamps longer than this starts the filter anew.",
            minimum=0.1,
            maximum=86400.0,
            live=True,
        ),
        Parameter(
            "state.uncertain_below",
            0.5,
            "State UNCERTAIN when the confidence is below this.",
            minimum=0.0,
            maximum=1.0,
            live=True,
        ),
        Parameter(
            "state.max_age_s",
            0.5,
            "State STALE when the image is older than this at publication, by the node's clock, or stamped further "
            "ahead of that clock.",
            minimum=0.001,
            maximum=3600.0,
            live=True,
        ),
        Parameter(
            "state.no_signal_after_s",
            0.5,
            "State NO_SIGNAL when no image has been processed for so long. Set it above the longest interval "
            "between images.",
            minimum=0.05,
            maximum=3600.0,
            live=True,
        ),
        Parameter(
            "output.deadline_s",
            1.0,
            "Deadline that the phase publisher offers; NO_SIGNAL is repeated so that it holds while the node "
            "lives. A controller that asks for the same deadline is told when the node falls silent.",
            minimum=0.1,
            maximum=3600.0,
        ),
        Parameter("latent.publish", True, "Publish the latent features.", live=True),
        Parameter(
            "latent.pooled",
            False,
            "Publish the mean over the 4x4 grid (one value per channel) instead of the whole latent.",
            live=True,
        ),
        Parameter(
            "latent.max_rate_hz",
            0.0,
            "Publish latents at most this often, by image stamp; 0: with every phase.",
            minimum=0.0,
            maximum=1000.0,
            live=True,
        ),
        Parameter(
            "forecast.enabled",
            "auto",
            "Forecast the picture and publish forecast and novelty: 'auto' while somebody subscribes to either, "
            "'always', or 'never'. Needs a model with a forecast graph; 'always' makes configure fail without one.",
            choices=("auto", "always", "never"),
        ),
        Parameter(
            "forecast.rate_hz",
            2.0,
            "At most so many forecasts a second, by image stamps.",
            minimum=0.1,
            maximum=30.0,
            live=True,
        ),
        Parameter(
            "diagnostics.slow_frame_ms",
            100.0,
            "A frame whose time from reception to publication exceeds this is slow: diagnostics show WARN for one, "
            "ERROR for a run of them.",
            minimum=1.0,
            maximum=60000.0,
            live=True,
        ),
    ),
    ordered=(("state.no_signal_after_s", "output.deadline_s"),),
)

OVERLAY = ParameterTable(
    "overlay",
    (
        _TRANSPORT,
        _RELIABILITY,
        _MAX_PIXELS,
        Parameter(
            "max_rate_hz",
            10.0,
            "Draw at most so many pictures a second; the rest are skipped before they cost anything.",
            minimum=0.1,
            maximum=120.0,
            live=True,
        ),
        Parameter(
            "max_width",
            1280,
            "Wider images are scaled down before drawing.",
            minimum=64,
            maximum=7680,
        ),
        Parameter("jpeg_quality", 80, "JPEG quality of the overlay topic.", minimum=1, maximum=100, live=True),
        Parameter(
            "record.video_path",
            "",
            "Write the overlay to this MP4 file; empty: nothing is written. Video is patient data.",
        ),
        Parameter(
            "record.image_path",
            "",
            "Write the newest overlay that shows an image to this PNG file, once a second and at deactivation; empty: "
            "nothing is written. Video is patient data.",
        ),
    ),
)

SOURCE = ParameterTable(
    "source",
    (
        Parameter(
            "source",
            "phantom",
            "What to publish: 'phantom' (or 'phantom:seed=3,duration_s=60'), a video file, or a folder of images.",
        ),
        Parameter(
            "output.transport",
            "raw",
            "Publish image (raw), image/compressed (JPEG), or both.",
            choices=("raw", "compressed", "both"),
        ),
        Parameter(
            "output.encoding",
            "bgr8",
            "Encoding of raw images.",
            choices=("bgr8", "rgb8", "bgra8", "rgba8", "mono8"),
        ),
        Parameter(
            "output.reliability",
            "reliable",
            "QoS of the image publisher; a reliable publisher serves best-effort subscribers too.",
            choices=("reliable", "best_effort"),
        ),
        Parameter("output.jpeg_quality", 90, "JPEG quality of image/compressed.", minimum=1, maximum=100),
        Parameter("width", 0, "Picture width in pixels; 0: as the source has it (phantom: 854).", 0, 7680),
        Parameter("height", 0, "Picture height in pixels; 0: as the source has it (phantom: 480).", 0, 4320),
        Parameter(
            "rate_hz",
            0.0,
            "Pictures a second; 0: as the source has it (phantom: 25, folder of images: 1).",
            minimum=0.0,
            maximum=240.0,
        ),
        Parameter("duration_s", 120.0, "Length of the phantom's procedure.", minimum=1.0, maximum=86400.0),
        Parameter("seed", 0, "Which phantom patient.", minimum=0, maximum=2**31 - 1),
        Parameter("loop", False, "Start again at the end; stamps go on."),
        Parameter("frame_id", "endoscope", "frame_id of the published images."),
    ),
)

VQA = ParameterTable(
    "vqa",
    (
        Parameter(
            "model.path",
            "surgllm_small_phantom",
            "Model that answers: a name that `surg-perception models list` shows, or a model folder. Loaded in the "
            "background; where it is missing, every question is answered with NOT_AVAILABLE and the reason.",
        ),
        Parameter(
            "runtime.threads",
            0,
            "CPU threads of PyTorch in this process; 0 leaves the choice to PyTorch.",
            minimum=0,
            maximum=256,
        ),
        Parameter(
            "runtime.niceness",
            10,
            "Niceness of the threads that load and run the model, so that they give way to other nodes; images are "
            "taken at the process's own.",
            minimum=0,
            maximum=19,
        ),
        Parameter(
            "runtime.cpus",
            "",
            "Cores that the threads of the model may run on, such as '1' or '0,2-3'; empty: all.",
        ),
        _TRANSPORT,
        _RELIABILITY,
        _MAX_PIXELS,
        Parameter(
            "buffer.rate_hz",
            1.0,
            "So many images a second are kept, by image stamps. The models are trained at 1.",
            minimum=0.1,
            maximum=30.0,
        ),
        Parameter(
            "buffer.length_s",
            64.0,
            "Images are kept for so long, and forgotten then.",
            minimum=1.0,
            maximum=3600.0,
        ),
        Parameter(
            "window.default_s",
            8.0,
            "A question that names no window is about so many last seconds.",
            minimum=0.1,
            maximum=3600.0,
            live=True,
        ),
        Parameter(
            "deadline_s",
            10.0,
            "An answer that is not complete so long after its question is cut, with TIMEOUT and the text so far.",
            minimum=0.1,
            maximum=3600.0,
            live=True,
        ),
        Parameter(
            "queue.depth",
            0,
            "So many questions may wait while one is being answered; further ones are refused at once with BUSY.",
            minimum=0,
            maximum=100,
            live=True,
        ),
    ),
    ordered=(("window.default_s", "buffer.length_s"),),
)

GATE = ParameterTable(
    "gate",
    (
        Parameter(
            "input.deadline_s",
            1.0,
            "Silence on the phase topic for longer than this ends trust; asked of the publisher as deadline and as "
            "liveliness lease, and watched by the steady clock too. At least the phase node's output.deadline_s, or "
            "nothing is received.",
            minimum=0.1,
            maximum=3600.0,
        ),
        Parameter(
            "max_age_s",
            0.5,
            "A phase whose stamp is older than this is not trusted, by the node's clock.",
            minimum=0.001,
            maximum=3600.0,
            live=True,
        ),
        Parameter(
            "max_ahead_s",
            0.05,
            "So far may a stamp be ahead of the node's clock: how well the clocks of camera and controller agree.",
            minimum=0.0,
            maximum=60.0,
            live=True,
        ),
        Parameter(
            "confidence.leave_below",
            0.6,
            "Confidence below this ends trust.",
            minimum=0.0,
            maximum=1.0,
            live=True,
        ),
        Parameter(
            "confidence.return_above",
            0.7,
            "Confidence below this does not count towards new trust.",
            minimum=0.0,
            maximum=1.0,
            live=True,
        ),
        Parameter(
            "hold_s",
            1.0,
            "For so long, by image stamps, a phase must hold without a fault before it is trusted.",
            minimum=0.0,
            maximum=3600.0,
            live=True,
        ),
        Parameter(
            "hold_messages",
            5,
            "And over so many messages in a row.",
            minimum=1,
            maximum=10000,
            live=True,
        ),
        Parameter(
            "model.id",
            "",
            "The only model to be trusted, as model_id of the phase messages says it (name@sha256 prefix). Empty: the "
            "first one that is trusted after activation. Set it to accept another model while running.",
            live=True,
        ),
        Parameter(
            "latent.required",
            False,
            "Trust only while latent features of the same model, not older than max_age_s, come too.",
        ),
        Parameter(
            "output.deadline_s",
            0.5,
            "Deadline that the trust publisher offers; it publishes at every change and five times in this time.",
            minimum=0.05,
            maximum=3600.0,
        ),
    ),
    ordered=(("confidence.leave_below", "confidence.return_above"),),
)

TABLES = {table.node: table for table in (PHASE, OVERLAY, SOURCE, VQA, GATE)}
