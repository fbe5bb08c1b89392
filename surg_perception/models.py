# SPDX-License-Identifier: Apache-2.0
"""Model folders: the card `model.yaml`, where models are found, and whether their files are the ones named.

A model folder holds the card, the weights (safetensors) and the graph (ONNX). Reading one needs no PyTorch.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from surg_perception.data.labels import LABEL_SETS

CARD_NAME = "model.yaml"
SURGLLM = "surgllm"
"""`architecture` on the card of a SurgLLM."""
SEARCH_PATH_VARIABLE = "SURG_PERCEPTION_MODELS"
_PACKAGE = "surg_perception"
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_WEIGHT_SUFFIXES = (".pkl", ".pth", ".pt", ".safetensors")
_logger = logging.getLogger("surg_perception.models")


class ModelError(ValueError):
    """A model that cannot be found, read or trusted: what was found, what was expected and what to do."""


class OtherModel(ModelError):
    """A SurgLLM where a phase model was expected (`surgllm.model_folder.find_surgllm` opens it), or the other way."""


@dataclass(frozen=True)
class NetworkFacts:
    """The network behind the graph; `architecture` "onnx" and `size` "" where only a graph is known.

    Attributes:
        architecture: "gsvit", or "onnx" for a graph without a card.
        size: EfficientViT variant, "m0" to "m5".
        head_hidden: widths of the phase head's hidden layers.
        latent_shape: (D, 4, 4).
        decoder: whether the weights hold the next-frame decoder.
        predict_change: the decoder predicts the change to the next frame instead of the frame.
        decoder_width, decoder_rank: of the decoder (`gsvit.network.GSViTConfig`).
    """

    architecture: str
    size: str
    head_hidden: tuple[int, ...]
    latent_shape: tuple[int, int, int]
    decoder: bool
    predict_change: bool = False
    decoder_width: int = 1024
    decoder_rank: int = 0


@dataclass(frozen=True)
class InputFacts:
    """How a frame becomes the graph's input; only the values of GSViT's own pre-training are accepted."""

    size: int = 224
    channels: str = "BGR"
    scale: str = "0..1"
    resize: str = "bilinear"


@dataclass(frozen=True)
class LabelFacts:
    """What the classes are.

    Attributes:
        set: name of the label set, such as "cholec80".
        names: phase names in the order of the graph's `probabilities`; empty where it yields only `latent`.
    """

    set: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class TemporalFacts:
    """The causal temporal head in the file `files.temporal`.

    Attributes:
        stages, layers, channels: of the network (`gsvit.temporal.TemporalConfig`).
        inputs: what it sees of a frame: "latent", "probabilities" or "latent+probabilities".
        step_s: seconds between the frames of its history.
    """

    stages: int
    layers: int
    channels: int
    inputs: str
    step_s: float


@dataclass(frozen=True)
class ForecastFacts:
    """The frame decoder in the graph `files.forecast`, from a latent to the frame `gap_s` seconds later."""

    gap_s: float


@dataclass(frozen=True)
class ModelFile:
    """A file of a model folder: its bare name and its sha256 (64 lower-case hex digits)."""

    name: str
    sha256: str

    @classmethod
    def of(cls, path: str | Path) -> ModelFile:
        """The entry for an existing file."""
        return cls(Path(path).name, sha256_of(path))


@dataclass(frozen=True)
class ModelCard:
    """What `model.yaml` says, and the folder it says it about.

    Attributes:
        folder: where the files lie.
        name: the model's name, also its folder's under models/.
        version: of the model, not of this package.
        temperature: what the logits are divided by before the softmax; already inside the graph.
        metrics, training: what was measured and how the model came about; free form, for the reader.
        licence: SPDX id or the licence's name, with that of the training data.
        weights, graph: the two files; a folder may hold only one of them.
        procedure: what surgery the model is for, such as "Cholecystectomy"; "" for any.
        temporal, forecast: what the files `temporal_file` and `forecast_file` hold; None where there are none.
    """

    folder: Path
    name: str
    version: str
    network: NetworkFacts
    input: InputFacts
    labels: LabelFacts
    temperature: float
    metrics: dict[str, Any]
    training: dict[str, Any]
    licence: str
    intended_use: str
    weights: ModelFile | None
    graph: ModelFile | None
    procedure: str = ""
    temporal: TemporalFacts | None = None
    temporal_file: ModelFile | None = None
    forecast: ForecastFacts | None = None
    forecast_file: ModelFile | None = None

    @property
    def files(self) -> dict[str, ModelFile]:
        """The files that the card names, by what they are: weights, graph, temporal, forecast."""
        entries = {
            "weights": self.weights,
            "graph": self.graph,
            "temporal": self.temporal_file,
            "forecast": self.forecast_file,
        }
        return {kind: file for kind, file in entries.items() if file is not None}

    @property
    def model_id(self) -> str:
        """`name@<first 12 digits of the sha256>` of the graph, or of the weights where there is no graph."""
        file = self.graph or self.weights
        return f"{self.name}@{file.sha256[:12]}" if file else self.name

    @property
    def graph_path(self) -> Path:
        """Path of the ONNX graph.

        Raises:
            ModelError: the card names none.
        """
        if self.graph is None:
            raise ModelError(
                f"{self.folder / CARD_NAME}: files.graph is missing, so there is no ONNX graph to run; "
                f"make one from the weights with `surg-perception export onnx {self.folder}`"
            )
        return self.folder / self.graph.name

    @property
    def weights_path(self) -> Path:
        """Path of the weights.

        Raises:
            ModelError: the model has none.
        """
        if self.weights is None:
            raise ModelError(
                f"the model {self.name!r} in {self.folder} has no weights (files.weights), only a graph; "
                "give a model folder with weights, or choose a backend that runs the ONNX graph"
            )
        return self.folder / self.weights.name

    @property
    def temporal_path(self) -> Path:
        """Path of the temporal head's weights.

        Raises:
            ModelError: the model has none.
        """
        return self._optional_path("temporal", "causal temporal head; `surg-perception train phase` makes one")

    @property
    def forecast_path(self) -> Path:
        """Path of the forecast graph.

        Raises:
            ModelError: the model has none.
        """
        return self._optional_path("forecast", "frame decoder; `surg-perception train gsvit` makes one")

    def _optional_path(self, kind: str, what: str) -> Path:
        if kind not in self.files:
            raise ModelError(f"the model {self.name!r} in {self.folder} has no files.{kind}, that is no {what}")
        return self.folder / self.files[kind].name

    def verify(self, *which: str) -> None:
        """Compare files with their sha256.

        Args:
            which: "graph", "weights", "temporal", "forecast"; all that the card names unless told.

        Raises:
            ModelError: a file is missing or is not the one that the card names.
        """
        paths: dict[str, Path] = {kind: getattr(self, f"{kind}_path") for kind in which or self.files}
        for kind, path in paths.items():
            if not path.is_file():
                raise ModelError(
                    f"{self.folder / CARD_NAME}: files.{kind} names {path.name!r}, but there is no such file "
                    f"in {self.folder}; copy the model folder again, whole"
                )
        with ThreadPoolExecutor() as pool:  # a start waits for this
            hashes = list(pool.map(sha256_of, paths.values()))
        for (kind, path), found in zip(paths.items(), hashes, strict=True):
            expected = self.files[kind].sha256
            if found != expected:
                raise ModelError(
                    f"{path}: sha256 is {found}, expected {expected} (files.{kind}.sha256 of {CARD_NAME}). "
                    "The file is damaged or another one; copy the model folder again, whole, or correct the "
                    "card if you made the file"
                )

    def to_yaml(self) -> str:
        """The text of `model.yaml`."""
        return yaml.safe_dump(self._content(), sort_keys=False, allow_unicode=True, width=110)

    def _content(self) -> dict[str, Any]:
        network = asdict(self.network)
        if not self.network.decoder:
            del network["decoder_width"], network["decoder_rank"]
        optional: dict[str, Any] = {"procedure": self.procedure} if self.procedure else {}
        if self.temporal:
            optional["temporal"] = asdict(self.temporal)
        if self.forecast:
            optional["forecast"] = asdict(self.forecast)
        return {
            "name": self.name,
            "version": self.version,
            "network": {
                **network,
                "head_hidden": list(self.network.head_hidden),
                "latent_shape": list(self.network.latent_shape),
            },
            "input": asdict(self.input),
            "labels": {"set": self.labels.set, "names": list(self.labels.names)},
            "temperature": self.temperature,
            **optional,
            "metrics": self.metrics,
            "training": self.training,
            "licence": self.licence,
            "intended_use": self.intended_use,
            "files": {kind: asdict(file) for kind, file in self.files.items()},
        }

    def write(self) -> Path:
        """Write `model.yaml` into the folder, after checking that it would be read back; returns its path.

        Raises:
            ModelError: a value that a card cannot have.
        """
        path = self.folder / CARD_NAME
        _card_from(_Table(path, "", yaml.safe_load(self.to_yaml())), self.folder)
        path.write_text(self.to_yaml(), "utf-8")
        return path


def sha256_of(path: str | Path) -> str:
    """sha256 of a file's content, 64 hex digits."""
    path = Path(path)
    stamp = _stamp(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    _hashes[path] = stamp, digest.hexdigest()
    return digest.hexdigest()


def known_sha256(path: Path) -> str:
    """`sha256_of`, taken once in a process unless the file is replaced or written to. To find things by, no check."""
    stamp, digest = _hashes.get(path, ((), ""))
    return digest if stamp == _stamp(path) else sha256_of(path)


_hashes: dict[Path, tuple[tuple[int, ...], str]] = {}


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes when a file is replaced or written to."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def read_card(folder: str | Path) -> ModelCard:
    """The card of a model folder; its files are not looked at (`ModelCard.verify` does).

    Raises:
        ModelError: no card, not YAML, or a key that is missing, unknown or has a wrong value, which is named.
    """
    folder = Path(folder)
    path = folder / CARD_NAME
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder} is no model folder: it has no {CARD_NAME}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ModelError(f"{path} cannot be read as YAML: {error}") from error
    if isinstance(content, Mapping) and content.get("architecture") == SURGLLM:
        raise OtherModel(f"{folder} holds a SurgLLM, which answers questions (node vqa), and no phase model")
    return _card_from(_Table(path, "", content), folder)


def find_model(name_or_path: str | Path) -> ModelCard:
    """The card of a model given by name or by path.

    Args:
        name_or_path: a model folder; an ONNX file (its folder's card if that names it, else a card made from
            the graph, whose phases are those of its metadata key `phases` (a JSON list) or "phase 0" and so
            on); or a name, looked for in the folders of $SURG_PERCEPTION_MODELS, the source tree's models/
            and the installed share/surg_perception/models, in this order.

    Raises:
        ModelError: nothing there, not usable, or a card that is wrong. Weights without a card, such as a
            released GSViT.pkl, must be imported first.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir() and (path / CARD_NAME).exists():
        return read_card(path)
    if path.is_file() and path.name == CARD_NAME:
        return read_card(path.parent)
    if path.suffix in _WEIGHT_SUFFIXES:
        raise ModelError(
            f"{path} holds weights; the running pipeline needs a model folder with a graph and no PyTorch. "
            f"Make one with `surg-perception models import {path}`"
        )
    if path.suffix == ".onnx":
        return _card_of_graph(path)
    if path.is_dir():
        raise ModelError(f"{path} is no model folder: it has no {CARD_NAME}")
    name = str(name_or_path)
    for folder in search_folders():
        if _MODEL_NAME.fullmatch(name) and (folder / name / CARD_NAME).is_file():
            return read_card(folder / name)
    known = sorted({folder.name for folder in _model_folders()})
    raise ModelError(
        f"no model {name!r}: neither a model folder nor an .onnx file at that path, nor a name among "
        f"{', '.join(known) or 'none'} (looked in {', '.join(map(str, search_folders())) or 'no folder'}; "
        f"${SEARCH_PATH_VARIABLE} adds folders)"
    )


def list_models() -> list[ModelCard]:
    """The phase models that `find_model` finds by name, in its order; unreadable cards are logged and left out."""
    cards: dict[str, ModelCard] = {}
    for folder in _model_folders():
        try:
            cards.setdefault(folder.name, read_card(folder))
        except OtherModel:
            continue
        except ModelError as error:
            _logger.warning("%s", error)
    return list(cards.values())


def search_folders() -> list[Path]:
    """Existing folders in which models are looked for by name, first one first."""
    here = Path(__file__)
    folders = [
        Path(entry).expanduser() for entry in os.environ.get(SEARCH_PATH_VARIABLE, "").split(os.pathsep) if entry
    ]
    source = here.resolve().parents[1]
    if (source / "package.xml").is_file():
        folders.append(source / "models")
    folders += [prefix / "share" / _PACKAGE / "models" for prefix in here.parents[2:7]]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def _model_folders() -> Iterator[Path]:
    for folder in search_folders():
        yield from sorted(
            path.parent for path in folder.glob(f"*/{CARD_NAME}") if _MODEL_NAME.fullmatch(path.parent.name)
        )


def _card_of_graph(path: Path) -> ModelCard:
    from surg_perception.runtime.graph import describe_graph

    if not path.is_file():
        raise ModelError(f"no ONNX graph at {path}")
    if (path.parent / CARD_NAME).is_file():
        card = read_card(path.parent)
        if card.graph is not None and card.graph.name == path.name:
            return card
    graph = describe_graph(path)
    return ModelCard(
        folder=path.parent,
        name=path.stem,
        version="",
        network=NetworkFacts("onnx", "", (), graph.latent_shape, decoder=False),
        input=InputFacts(),
        labels=LabelFacts("", graph.phases),
        temperature=1.0,
        metrics={},
        training={},
        licence="unknown",
        intended_use="",
        weights=None,
        graph=ModelFile.of(path),
    )


class _Table:
    """A mapping of the card, read key by key; what is wrong is named with file, key, found and expected."""

    def __init__(self, path: Path, prefix: str, content: object) -> None:
        self.path, self.prefix = path, prefix
        if not isinstance(content, Mapping):
            raise self.error("", content, "a mapping")
        self.content = dict(content)
        self.seen: set[str] = set()

    def error(self, key: str, found: object, expected: str) -> ModelError:
        where = f"{self.prefix}{key}".rstrip(".") or "the file"
        return ModelError(f"{self.path}: {where} is {found!r}, expected {expected}")

    def take(self, key: str, expected: str, accepts: Any, *default: Any) -> Any:
        self.seen.add(key)
        if key not in self.content:
            if default:
                return default[0]
            raise ModelError(f"{self.path}: {self.prefix}{key} is missing, expected {expected}")
        value = self.content[key]
        if not accepts(value):
            raise self.error(key, value, expected)
        return value

    def text(self, key: str, expected: str = "text (in quotes if it looks like a number)") -> str:
        return str(self.take(key, expected, lambda value: isinstance(value, str)))

    def one_of(self, key: str, *choices: Any) -> Any:
        def is_choice(value: object) -> bool:
            return any(value == choice and type(value) is type(choice) for choice in choices)

        return self.take(key, " or ".join(map(repr, choices)), is_choice)

    def table(self, key: str) -> _Table:
        return _Table(self.path, f"{self.prefix}{key}.", self.take(key, "a mapping", lambda value: True))

    def mapping(self, key: str) -> dict[str, Any]:
        return dict(self.take(key, "a mapping, {} if empty", lambda value: isinstance(value, Mapping)))

    def done(self) -> None:
        unknown = [key for key in self.content if key not in self.seen]
        if unknown:
            names = ", ".join(f"{self.prefix}{key}" for key in unknown)
            raise ModelError(f"{self.path}: unknown: {names}; expected only {', '.join(sorted(self.seen))}")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _count(value: object) -> bool:
    return (value == 0 and not isinstance(value, bool)) or _whole(value)


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0


def _whole_numbers(value: object) -> bool:
    return isinstance(value, list) and all(map(_whole, value))


def _latent_shape(value: object) -> bool:
    return isinstance(value, list) and _whole_numbers(value) and value[1:] == [4, 4]


def _sha256(value: object) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _names(value: object) -> bool:
    return (
        isinstance(value, list)
        and all(isinstance(name, str) and name.strip() for name in value)
        and len(set(value)) == len(value)
    )


def _file_name(value: object) -> bool:
    return isinstance(value, str) and _MODEL_NAME.fullmatch(value) is not None


def _card_from(root: _Table, folder: Path) -> ModelCard:
    name = root.take("name", "letters, digits, '.', '_' and '-'", _file_name)
    version = root.text("version")

    network = root.table("network")
    network_facts = NetworkFacts(
        architecture=network.one_of("architecture", "gsvit"),
        size=network.one_of("size", *(f"m{i}" for i in range(6))),
        head_hidden=tuple(network.take("head_hidden", "a list of positive whole numbers", _whole_numbers)),
        latent_shape=tuple(network.take("latent_shape", "[D, 4, 4]", _latent_shape)),
        decoder=network.one_of("decoder", True, False),
        predict_change=network.take("predict_change", "true or false", lambda v: isinstance(v, bool), False),
        decoder_width=network.take("decoder_width", "a positive whole number", _whole, NetworkFacts.decoder_width),
        decoder_rank=network.take("decoder_rank", "0 or a positive whole number", _count, NetworkFacts.decoder_rank),
    )
    network.done()

    image = root.table("input")
    input_facts = InputFacts(
        size=image.one_of("size", InputFacts.size),
        channels=image.one_of("channels", InputFacts.channels),
        scale=image.one_of("scale", InputFacts.scale),
        resize=image.one_of("resize", InputFacts.resize),
    )
    image.done()

    labels = root.table("labels")
    label_set = labels.text("set")
    phases = tuple(labels.take("names", "a list of different names, [] for no phase head", _names))
    if phases and phases != LABEL_SETS.get(label_set, phases):
        raise labels.error("names", list(phases), f"{list(LABEL_SETS[label_set])} for the set {label_set!r}")
    labels.done()

    files = root.table("files")
    entries: dict[str, ModelFile | None] = {}
    suffixes = {"weights": ".safetensors", "graph": ".onnx", "temporal": ".safetensors", "forecast": ".onnx"}
    for kind, suffix in suffixes.items():
        if kind not in files.content:
            entries[kind] = files.take(kind, "", None, None)
            continue
        entry = files.table(kind)
        entries[kind] = ModelFile(
            entry.take(
                "name",
                f"a bare file name ending in {suffix!r}, without a folder",
                lambda value, suffix=suffix: _file_name(value) and value.endswith(suffix),
            ),
            entry.take("sha256", "64 lower-case hex digits", _sha256),
        )
        entry.done()
    if not entries["weights"] and not entries["graph"]:
        raise files.error("", {}, "weights, graph or both")
    files.done()

    temporal_facts, forecast_facts = None, None
    for kind in ("temporal", "forecast"):
        if (kind in root.content) != (entries[kind] is not None):
            raise root.error(kind, root.content.get(kind), f"a mapping where files.{kind} is given, else nothing")
    if entries["temporal"]:
        temporal = root.table("temporal")
        temporal_facts = TemporalFacts(
            stages=temporal.take("stages", "a positive whole number", _whole),
            layers=temporal.take("layers", "a positive whole number", _whole),
            channels=temporal.take("channels", "a positive whole number", _whole),
            inputs=temporal.one_of("inputs", "latent", "probabilities", "latent+probabilities"),
            step_s=float(temporal.take("step_s", "seconds > 0", _number)),
        )
        temporal.done()
    if entries["forecast"]:
        forecast = root.table("forecast")
        forecast_facts = ForecastFacts(float(forecast.take("gap_s", "seconds > 0", _number)))
        forecast.done()

    card = ModelCard(
        folder=folder,
        name=name,
        version=version,
        network=network_facts,
        input=input_facts,
        labels=LabelFacts(label_set, phases),
        temperature=float(root.take("temperature", "a number > 0", _number)),
        metrics=root.mapping("metrics"),
        training=root.mapping("training"),
        licence=root.text("licence"),
        intended_use=root.text("intended_use"),
        weights=entries["weights"],
        graph=entries["graph"],
        procedure=root.take("procedure", "text", lambda value: isinstance(value, str), ""),
        temporal=temporal_facts,
        temporal_file=entries["temporal"],
        forecast=forecast_facts,
        forecast_file=entries["forecast"],
    )
    root.done()
    return card
