# SPDX-License-Identifier: Apache-2.0
"""Reading GSViT weights: a released `GSViT.pkl`, its safetensors twin, or a model folder of this project.

All of them use one set of tensor names, the released one: `evit.<i>.…` for the encoder (0 is the patch
embedding, 1 to 3 are the stages of the original EfficientViT, each a flat sequence), `decoder.…`, and in this
project's files `head.…`. The released file with its decoder has 897 tensors: 828 of the encoder (among them
134 batch-norm counters and 8 attention index tables) and 69 of the decoder (9 counters).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from surg_perception.gsvit.network import GSViT, GSViTConfig, frame_decoder
from surg_perception.models import ModelError

_ANCHOR = "evit.0.0.c.weight"  # in every GSViT checkpoint; what stands before it is the prefix of a wrapper
_DERIVED = ("num_batches_tracked", "attention_bias_idxs", "ab")  # kinds that evaluation does not need
_NAMES_SHOWN = 12


class CheckpointError(ModelError):
    """A weight file that cannot be used: what was found, what was expected and what to do."""


def load_gsvit(path: str | Path, *, size: str | None = None, predict_change: bool = False) -> GSViT:
    """Open a GSViT in evaluation mode, float32, on the CPU.

    Args:
        path: a released checkpoint (`GSViT.pkl`, `GSViT-<Procedure>.pkl`: a `torch.save`d state dict, opened
            with `weights_only=True`, so that it can execute nothing), a `.safetensors` file of the same
            names, or a model folder of this project, whose weights are compared with the sha256 of its card.
        size: EfficientViT variant of a file, "m5" unless told. A folder's card says its own.
        predict_change: whether a file's decoder predicts the change to the next frame. A folder's card says
            its own.

    Returns:
        The encoder, and decoder and phase head where the file has their tensors.

    Raises:
        FileNotFoundError: no such file or folder.
        CheckpointError: not a dictionary of tensors, or tensors that are missing, extra, misshapen or not
            finite, which are named; a folder whose weights are not those of its card.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        from surg_perception.gsvit.model_folder import load_model_folder

        return load_model_folder(path)
    tensors = read_tensors(path)
    return build_gsvit(tensors, size=size or "m5", predict_change=predict_change, source=str(path))


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a weight file by their released names, without the prefix of a wrapper (`module.`, …).

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file is not a dictionary of tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no GSViT weights at {path}; expected a GSViT.pkl, a .safetensors or a model folder")
    if path.suffix == ".onnx":
        raise CheckpointError(f"{path} is a graph for running, not weights; give the model folder it lies in")
    content: object = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    while isinstance(content, Mapping) and len(content) == 1 and isinstance(next(iter(content.values())), Mapping):
        content = next(iter(content.values()))
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a state dict, names to tensors")
    strangers = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if strangers:
        raise CheckpointError(f"{path} is not a state dict: {_listed('entries that are no tensors', strangers)}")
    tensors = {str(name): value for name, value in content.items()}
    prefix = next((name[: -len(_ANCHOR)] for name in tensors if name.endswith("." + _ANCHOR)), "")
    return {name.removeprefix(prefix): value for name, value in tensors.items()}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no readable safetensors file ({error}); copy it again") from error


def _read_pickle(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # damaged bytes make the unpickler fail in every way there is
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"{path} was refused and nothing in it was executed: it is not a plain torch.save'd dictionary "
            f"of tensors ({type(error).__name__}: {reason[0] if reason else 'no reason given'}). Expected a "
            "state dict with names like 'evit.0.0.c.weight'; save a whole model again as model.state_dict()"
        ) from error


def build_gsvit(tensors: Mapping[str, Tensor], *, size: str, predict_change: bool, source: str) -> GSViT:
    """A GSViT in evaluation mode with the given weights, which it takes over rather than copies.

    Args:
        tensors: weights by released names. Decoder and phase head are built if there are tensors of theirs,
            the head with the widths that its matrices have.
        size: EfficientViT variant.
        predict_change: meaning of the decoder's output.
        source: what to call the weights in an error.

    Raises:
        CheckpointError: tensors that are missing, extra, misshapen or not finite.
    """
    widths = [value.shape[0] for name, value in sorted(_head_matrices(tensors))]
    decoder_width, decoder_rank = _decoder_shape(tensors)
    config = GSViTConfig(
        size=size,
        decoder=any(name.startswith("decoder.") for name in tensors),
        predict_change=predict_change,
        decoder_width=decoder_width,
        decoder_rank=decoder_rank,
        classes=widths[-1] if widths else 0,
        head_hidden=tuple(widths[:-1]),
    )
    model = GSViT(replace(config, decoder=False))
    if config.decoder:
        with torch.device("meta"):  # its 328 M random weights would take seconds to draw
            model.decoder = frame_decoder(config, model.latent_shape[0])
        model.config = config
    names = {released_name(name): name for name in model.state_dict()}
    _check(tensors, model, names, source)
    state = {
        name: tensors[released].to(torch.float32) if released in tensors else torch.zeros((), dtype=torch.int64)
        for released, name in names.items()
    }
    model.load_state_dict(state, assign=True)
    return model.eval()


def _decoder_shape(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Width and rank that the decoder's first layers tell; those of the release where they tell nothing."""
    conv, bottleneck = tensors.get("decoder.conv1.weight"), tensors.get("decoder.fc.0.weight")
    width = conv.shape[0] if conv is not None and conv.ndim == 4 and conv.shape[0] % 16 == 0 else 0
    rank = bottleneck.shape[0] if bottleneck is not None and bottleneck.ndim == 2 else 0
    return width or GSViTConfig.decoder_width, rank


def _head_matrices(tensors: Mapping[str, Tensor]) -> list[tuple[int, Tensor]]:
    return [
        (int(name.split(".")[2]), value)
        for name, value in tensors.items()
        if name.startswith("head.mlp.") and name.endswith(".weight") and value.ndim == 2
    ]


def released_name(name: str) -> str:
    """The released checkpoint's name of a tensor of `GSViT.state_dict()`.

    timm's encoder has `patch_embed.conv<n>` and `stages.<s>.downsample|blocks`; the original has a Sequential
    of four children in which a stage's three downsampling modules come before its blocks. Decoder and head
    keep their names.
    """
    part, _, rest = name.partition(".")
    if part != "encoder":
        return name
    path = rest.split(".")
    if path[0] == "patch_embed":
        path[:2] = ["0", str(2 * (int(path[1].removeprefix("conv")) - 1))]
    else:
        stage = int(path[1])
        if path[2] == "downsample":
            index = ("res1", "patchmerge", "res2").index(path[3])
        else:
            index = int(path[3]) + (3 if stage > 0 else 0)
        path[:4] = [str(stage + 1), str(index)]
    return ".".join(["evit", *("c" if step == "conv" else step for step in path)])


def _check(tensors: Mapping[str, Tensor], model: GSViT, names: Mapping[str, str], source: str) -> None:
    state = model.state_dict()
    expected = {released: tuple(state[name].shape) for released, name in names.items()}
    tables = {
        released_name(f"encoder.{name}"): table
        for name, table in model.encoder.named_buffers()
        if name.endswith("attention_bias_idxs")
    }
    for name, table in tables.items():
        expected[name] = tuple(table.shape)
        heads = state[names[name.replace("attention_bias_idxs", "attention_biases")]].shape[0]
        expected[name.replace("attention_bias_idxs", "ab")] = (heads, *table.shape)

    # Derived tensors may be left out, but only all of a kind: a few missing ones mean a damaged file.
    present_kinds = {name.rpartition(".")[2] for name in tensors}
    optional = set(_DERIVED) - present_kinds
    missing = [name for name in expected if name not in tensors and name.rpartition(".")[2] not in optional]
    extra = [name for name in tensors if name not in expected]
    misshapen = [
        f"{name} is {list(value.shape)}, expected {list(expected[name])}"
        for name, value in tensors.items()
        if name in expected and tuple(value.shape) != expected[name]
    ]
    problems = [
        _listed(kind, entries)
        for kind, entries in (("missing", missing), ("not expected", extra), ("misshapen", misshapen))
        if entries
    ]
    if not problems:
        broken = [name for name, value in tensors.items() if not torch.isfinite(value).all()]
        broken += [name for name, table in tables.items() if name in tensors and not torch.equal(tensors[name], table)]
        problems = [_listed("holding NaN, infinity or a foreign attention index", broken)] if broken else []
    if problems:
        raise CheckpointError(
            f"{source} does not hold a GSViT of size {model.config.size!r}: {'; '.join(problems)}. Nothing "
            "was loaded; check that the file is complete and that its EfficientViT size is the one asked for"
        )


def _listed(kind: str, entries: list[str]) -> str:
    shown = ", ".join(entries[:_NAMES_SHOWN])
    rest = f" and {len(entries) - _NAMES_SHOWN} more" if len(entries) > _NAMES_SHOWN else ""
    return f"{len(entries)} {kind} ({shown}{rest})"
