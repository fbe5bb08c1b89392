# SPDX-License-Identifier: Apache-2.0
"""A SurgLLM model folder: the card, our weights, the adapters, the router. Base models are not in it.

model.yaml              the card
surgllm.safetensors     encoder, Q-Former, projection (float16)
adapters.safetensors    joint and task adapters, `<adapter>/<matrix>` (float16)
router.safetensors, router.json
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from surg_perception.models import (
    CARD_NAME,
    SURGLLM,
    ModelError,
    ModelFile,
    OtherModel,
    search_folders,
    sha256_of,
)
from surg_perception.surgllm.config import JOINT, SurgLLMConfig

if TYPE_CHECKING:
    from torch import Tensor

    from surg_perception.surgllm.model import SurgLLM
    from surg_perception.surgllm.router import Router

WEIGHTS, ADAPTERS = "surgllm.safetensors", "adapters.safetensors"
_TYPES: dict[str, Any] = {
    "name": str,
    "version": str,
    "config": dict,
    "tasks": list,
    "base_models": dict,
    "metrics": dict,
    "training": dict,
    "licence": str,
    "intended_use": str,
    "files": dict,
}
_EXPECTED: dict[Any, str] = {str: "text (in quotes if it looks like a number)", dict: "a mapping", list: "a list"}
_FILES = ("weights", "adapters", "router_json", "router_safetensors")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SurgLLMCard:
    """What `model.yaml` says of a SurgLLM.

    Attributes:
        folder: where the files lie.
        name, version: of the model.
        config: its shapes.
        tasks: with an adapter of their own.
        base_models: sha256 of the weights of each base model that it was trained on.
        metrics, training: for the reader.
        licence, intended_use: as in any card.
        files: every other file of the folder.
    """

    folder: Path
    name: str
    version: str
    config: SurgLLMConfig
    tasks: tuple[str, ...]
    base_models: dict[str, str]
    metrics: dict[str, Any]
    training: dict[str, Any]
    licence: str
    intended_use: str
    files: dict[str, ModelFile] = field(default_factory=dict)

    @property
    def model_id(self) -> str:
        """`name@<first 12 digits of the sha256>` of the adapters, which change with every training."""
        return f"{self.name}@{self.files['adapters'].sha256[:12]}"

    def verify(self) -> None:
        """Compare every file with its sha256.

        Raises:
            ModelError: a file is missing or is not the one that the card names.
        """
        for kind, file in self.files.items():
            path = self.folder / file.name
            if not path.is_file():
                raise ModelError(f"{self.folder / CARD_NAME}: files.{kind} names {file.name!r}, which is not there")
            if (found := sha256_of(path)) != file.sha256:
                raise ModelError(
                    f"{path}: sha256 is {found}, expected {file.sha256}. The file is damaged or another one; "
                    "copy the model folder again, whole"
                )

    def to_yaml(self) -> str:
        """The text of `model.yaml`."""
        content = {
            "architecture": SURGLLM,
            "name": self.name,
            "version": self.version,
            "config": self.config.to_dict(),
            "tasks": list(self.tasks),
            "base_models": self.base_models,
            "metrics": self.metrics,
            "training": self.training,
            "licence": self.licence,
            "intended_use": self.intended_use,
            "files": {kind: {"name": file.name, "sha256": file.sha256} for kind, file in self.files.items()},
        }
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110)


def find_surgllm(name_or_path: str | Path) -> SurgLLMCard:
    """The card of a SurgLLM given by folder or by name (`models.find_model` says where names are looked for).

    Raises:
        ModelError: nothing there, a model of another kind, or a card that is wrong.
    """
    path = Path(name_or_path).expanduser()
    if (path / CARD_NAME).is_file():
        return read_surgllm_card(path)
    for folder in search_folders():
        if (folder / str(name_or_path) / CARD_NAME).is_file():
            return read_surgllm_card(folder / str(name_or_path))
    known = sorted(card.name for card in list_surgllm())
    raise ModelError(
        f"no SurgLLM {str(name_or_path)!r}: neither a model folder nor a name among {', '.join(known) or 'none'} "
        f"(looked in {', '.join(map(str, search_folders())) or 'no folder'})"
    )


def list_surgllm() -> list[SurgLLMCard]:
    """The SurgLLMs that are found by name; unreadable cards are logged and left out."""
    cards: dict[str, SurgLLMCard] = {}
    for folder in search_folders():
        for path in sorted(folder.glob(f"*/{CARD_NAME}")):
            try:
                cards.setdefault(path.parent.name, read_surgllm_card(path.parent))
            except OtherModel:
                continue
            except ModelError as error:
                _logger.warning("%s", error)
    return list(cards.values())


def read_surgllm_card(folder: str | Path) -> SurgLLMCard:
    """The card of a SurgLLM folder; its files are not looked at.

    Raises:
        OtherModel: a card of another architecture.
        ModelError: no card, not YAML, or a key that is missing or wrong.
    """
    folder = Path(folder)
    path = folder / CARD_NAME
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ModelError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(content, Mapping) or content.get("architecture") != SURGLLM:
        raise OtherModel(f"{path} is not the card of a SurgLLM (architecture: {SURGLLM})")
    if missing := [key for key in _TYPES if key not in content]:
        raise ModelError(f"{path}: {', '.join(missing)} missing")
    for key, kind in _TYPES.items():
        if not isinstance(content[key], kind):
            raise ModelError(f"{path}: {key} is {content[key]!r}, expected {_EXPECTED[kind]}")
    try:
        files = {kind: ModelFile(str(file["name"]), str(file["sha256"])) for kind, file in content["files"].items()}
        if wrong := [file.name for file in files.values() if Path(file.name).name != file.name]:
            raise ValueError(f"files named {wrong}, expected bare file names")
        if missing := [kind for kind in _FILES if kind not in files]:
            raise ValueError(f"files: {', '.join(missing)} missing")
        return SurgLLMCard(
            folder=folder,
            config=SurgLLMConfig.from_dict(content["config"]),
            tasks=tuple(map(str, content["tasks"])),
            files=files,
            **{key: content[key] for key in _TYPES if key not in ("config", "tasks", "files")},
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: {error}") from error


def save_surgllm(
    model: SurgLLM, adapters: Mapping[str, Mapping[str, Tensor]], router: Router, card: SurgLLMCard
) -> SurgLLMCard:
    """Write the whole folder `card.folder`; returns the card with the files' names and sha256.

    Args:
        model: its encoder, Q-Former and projection are stored.
        adapters: `LanguageModel.adapter_weights` by adapter, JOINT among them.
        router: over the tasks' names.
        card: `files` and `tasks` are filled in.
    """
    import torch
    from safetensors.torch import save_file

    folder = card.folder
    folder.mkdir(parents=True, exist_ok=True)

    def half(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {k: (v.to(torch.float16) if v.is_floating_point() else v).contiguous() for k, v in weights.items()}

    save_file(half(model.stored_weights()), folder / WEIGHTS)
    named = {f"{name}/{key}": value for name, weights in adapters.items() for key, value in weights.items()}
    save_file(half(named), folder / ADAPTERS)
    router.save(folder)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)  # safetensors makes files that only their owner can read
    files = {"weights": WEIGHTS, "adapters": ADAPTERS}
    files |= {path.name.replace(".", "_"): path.name for path in sorted(folder.glob("router.*"))}
    card = replace(
        card,
        tasks=tuple(name for name in adapters if name != JOINT),
        files={kind: ModelFile.of(folder / name) for kind, name in files.items()},
    )
    (folder / CARD_NAME).write_text(card.to_yaml(), "utf-8")
    return card


def load_weights(card: SurgLLMCard) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Stored weights and adapters of a model folder, after comparing sha256.

    Raises:
        ModelError: a file is missing, damaged or another one, or a task has no adapter.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    card.verify()
    try:
        stored = load_file(card.folder / card.files["weights"].name)
        matrices = load_file(card.folder / card.files["adapters"].name)
    except SafetensorError as error:
        raise ModelError(f"{card.folder}: the weights cannot be read as safetensors: {error}") from error
    adapters: dict[str, dict[str, Tensor]] = {}
    for key, value in matrices.items():
        name, _, matrix = key.partition("/")
        adapters.setdefault(name, {})[matrix] = value.float()
    if set(adapters) != {JOINT, *card.tasks}:
        raise ModelError(
            f"{card.folder}: adapters {', '.join(sorted(adapters)) or 'none'} found, expected {JOINT} and one for each "
            f"task of the card: {', '.join(card.tasks)}"
        )
    return stored, adapters


def licence_of(sources: Sequence[str]) -> str:
    """Licence that a model trained on these sources carries: ours for the phantom alone.

    All else carries that of CholecT50's and Cholec80's frames; for other data the caller says which.
    """
    return "Apache-2.0" if all(source.startswith("phantom:") for source in sources) else "CC BY-NC-SA 4.0"
