# SPDX-License-Identifier: Apache-2.0
"""A model server's side of a model: where the server is, which version a graph is there, the repository it reads.

The version of a model on a server is the number that the first 12 hex digits of its graph's sha256 spell. So a room
that asks for its own graph's version gets that graph or a refusal, rooms of the old and the new model can share a
server, and nobody has to hand out version numbers. 48 bits fit every server's integers, JSON's too.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from surg_perception.models import CARD_NAME, ModelCard, ModelError, sha256_of
from surg_perception.runtime.graph import FRAME_SHAPE, describe_graph

MAX_BATCH = 32
"""Frames in one request at most, and in one batch that the server makes of several rooms' requests."""
QUEUE_TIMEOUT_S = 1.0
"""A request that waited so long in the server's queue is refused there; its room has given up long before."""
MAX_QUEUE = 64
_DIGITS = 12
_CONFIG, _LABELS, _GRAPH = "config.pbtxt", "labels.txt", "model.onnx"
_VERSION = re.compile(r"[A-Za-z0-9._-]*")


@dataclass(frozen=True)
class ModelServer:
    """Where a model server is and how it is asked.

    Attributes:
        url: "grpc://host:port", plain, or "grpcs://host:port", over TLS.
        timeout_s: longest wait for the answer to one frame, in seconds; for N frames in one request N times that.
        version: of the model on the server; "" for the one of the graph (`repository_version`).

    Raises:
        ValueError: says what was found and expected.
    """

    url: str
    timeout_s: float = 0.25
    version: str = ""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        try:
            port = parts.port
        except ValueError:
            port = None
        complete = parts.scheme in ("grpc", "grpcs") and parts.hostname and port
        if not complete or parts.path or parts.query or parts.fragment or "@" in parts.netloc:
            raise ValueError(f"the model server's url is {self.url!r}, expected grpc://host:port or grpcs://host:port")
        if not (math.isfinite(self.timeout_s) and self.timeout_s > 0):
            raise ValueError(f"the model server's timeout is {self.timeout_s} s, expected more than 0")
        if not _VERSION.fullmatch(self.version):
            raise ValueError(f"the version on the model server is {self.version!r}, expected a number such as 3")

    @property
    def target(self) -> str:
        """host:port"""
        return urlsplit(self.url).netloc

    @property
    def secure(self) -> bool:
        """Whether TLS is spoken."""
        return urlsplit(self.url).scheme == "grpcs"


def repository_version(card: ModelCard) -> str:
    """The version that a server has the model's graph under, a decimal number below 2**48.

    Raises:
        ModelError: the card names no graph.
    """
    if card.graph is None:
        assert card.graph_path  # raises: says what to do
    assert card.graph is not None
    return str(int(card.graph.sha256[:_DIGITS], 16))


def write_repository(card: ModelCard, repository: str | Path, *, instances: int = 1) -> Path:
    """Put a model's graph into a model repository for Triton and OpenVINO Model Server; other models in it stay.

    Layout: NAME/config.pbtxt and labels.txt (Triton), NAME/<version>/model.onnx, NAME/model.yaml, the card; config.json
    (OpenVINO Model Server) and README.md for all models of the repository. A version is never changed: another graph
    is another version beside it. config.pbtxt that is there already is kept with whatever was tuned in it.

    Args:
        card: of a model with a graph, whose sha256 is checked here.
        repository: folder, made where it is missing.
        instances: copies of the model that Triton runs side by side.

    Returns:
        The folder of this version.

    Raises:
        ModelError: no graph, a damaged one, or one that cannot stand beside the versions that are there.
        ValueError: instances below 1.
    """
    if instances < 1:
        raise ValueError(f"instances is {instances}, expected at least 1")
    card.verify("graph")
    describe_graph(card.graph_path)
    assert card.graph is not None
    repository = Path(repository)
    model = repository / card.name
    model.mkdir(parents=True, exist_ok=True)
    tensors = _tensors(card)
    config, labels = model / _CONFIG, model / _LABELS
    label_text = "".join(f"{name}\n" for name in card.labels.names)
    if config.exists():
        kept = labels.read_text("utf-8") if labels.exists() else ""
        if tensors not in config.read_text("utf-8") or kept != label_text:
            raise ModelError(
                f"{model} holds versions with other phases or another latent than {card.model_id}, and a server has "
                f"one {_CONFIG} for all of them; expected in it:\n{tensors}\nExport into another repository, or give "
                "the model another name"
            )
    else:
        if label_text:
            labels.write_text(label_text, "utf-8")
        config.write_text(_config_text(card.name, tensors, instances), "utf-8")
    version = model / repository_version(card)
    if not version.exists():
        partial = model / f".{version.name}.partial"  # a server that watches the folder takes whole numbers only
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        shutil.copyfile(card.graph_path, partial / _GRAPH)
        partial.rename(version)
    found = sha256_of(version / _GRAPH)
    if found != card.graph.sha256:
        raise ModelError(
            f"{version / _GRAPH}: sha256 is {found}, expected {card.graph.sha256}; the file was damaged or replaced, "
            f"delete the folder {version} and export again"
        )
    (model / CARD_NAME).write_text(card.to_yaml(), "utf-8")
    _write_overview(repository)
    return version


def _tensors(card: ModelCard) -> str:
    def entry(name: str, data_type: str, sizes: tuple[int, ...], more: str = "") -> str:
        return f'  {{ name: "{name}" data_type: {data_type} dims: [ {", ".join(map(str, sizes))} ]{more} }}'

    outputs = [entry("latent", "TYPE_FP32", card.network.latent_shape)]
    if card.labels.names:
        label = f' label_filename: "{_LABELS}"'
        outputs.insert(0, entry("probabilities", "TYPE_FP32", (len(card.labels.names),), label))
    inputs = entry("frame", "TYPE_UINT8", FRAME_SHAPE)
    return f"input [\n{inputs}\n]\noutput [\n" + ",\n".join(outputs) + "\n]"


def _config_text(name: str, tensors: str, instances: int) -> str:
    size = ", ".join(map(str, FRAME_SHAPE))
    return f"""\
# Triton's configuration of all versions of this model. Written once by `surg-perception export triton`, which keeps
# your changes; input and output must stay as they are.
name: "{name}"
backend: "onnxruntime"
default_model_filename: "{_GRAPH}"
max_batch_size: {MAX_BATCH}
{tensors}

# Versions are numbers made of the graph's sha256, so "latest" would mean nothing: rooms ask for theirs.
version_policy {{ all {{ }} }}

# KIND_AUTO: on each GPU where there is one, else on the CPU.
instance_group [ {{ kind: KIND_AUTO count: {instances} }} ]

# Frames of several rooms that wait at the same time run as one batch; none waits for others to come.
dynamic_batching {{
  max_queue_delay_microseconds: 0
  default_queue_policy {{
    timeout_action: REJECT
    default_timeout_microseconds: {round(QUEUE_TIMEOUT_S * 1e6)}
    max_queue_size: {MAX_QUEUE}
  }}
}}

# TF32 would round products to 10 bits; the rooms compare with fp32.
optimization {{ execution_accelerators {{ gpu_execution_accelerator [
  {{ name: "cuda" parameters {{ key: "use_tf32" value: "0" }} }}
] }} }}

model_warmup [ {{
  name: "one frame" batch_size: 1
  inputs {{ key: "frame" value {{ data_type: TYPE_UINT8 dims: [ {size} ] zero_data: true }} }}
}} ]
"""


def _write_overview(repository: Path) -> None:
    """config.json and README.md, made from the folders that are there."""
    names = sorted(path.parent.name for path in repository.glob(f"*/{_CONFIG}"))
    models = [
        {
            "config": {
                "name": name,
                "base_path": name,
                "model_version_policy": {"all": {}},
                "plugin_config": {"INFERENCE_PRECISION_HINT": "f32"},  # a CPU with bf16 uses it unless told
            }
        }
        for name in names
    ]
    (repository / "config.json").write_text(json.dumps({"model_config_list": models}, indent=2) + "\n", "utf-8")
    lines = []
    for name in names:
        versions = sorted(path.parent for path in (repository / name).glob(f"[0-9]*/{_GRAPH}"))
        lines += [f"| {name} | {version.name} | {sha256_of(version / _GRAPH)} |" for version in versions]
    table = "\n".join(lines)
    (repository / "README.md").write_text(f"{_README}{table}\n", "utf-8")


_README = """\
# Model repository of surg_perception

Made by `surg-perception export triton`. Start one of these in this folder; both speak KServe v2 over gRPC.

Triton (add `--gpus all` where there is a GPU; take a tag that your driver supports):

```
docker run --rm -p 8001:8001 -v "$PWD":/models:ro nvcr.io/nvidia/tritonserver:<tag>-py3 \\
  tritonserver --model-repository=/models
```

OpenVINO Model Server:

```
docker run --rm -p 8001:8001 -v "$PWD":/models:ro openvino/model_server:latest \\
  --config_path /models/config.json --port 8001
```

Rooms: `runtime.backend: triton`, `runtime.server_url: grpc://<this machine>:8001`. Plain gRPC sends endoscope images,
which are patient data, unencrypted: only on a network of its own, else with TLS (`grpcs://`).

A version is the number that the first 12 hex digits of the graph's sha256 spell. Do not replace a file inside a
version's folder; export the new model beside the old one, move the rooms over, then delete the old folder.

| model | version | sha256 of the graph |
|---|---|---|
"""
