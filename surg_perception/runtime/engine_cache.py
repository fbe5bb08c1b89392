# SPDX-License-Identifier: Apache-2.0
"""Built engines on disk, found by everything that they depend on.

An engine `<sha256 of the key>.engine` lies beside `<…>.json`, which holds the key in plain words, the engine's own
sha256 and how it was built, and, from TensorRT-RTX, `<…>.jit`, the kernels compiled on this GPU. An engine is loaded
as code: the folder is the user's alone, and a file that is a link, another user's or writable by others is no engine.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from surg_perception.runtime.user_cache import cache_folder

FORMAT = 1
LIMIT_VARIABLE = "SURG_PERCEPTION_ENGINE_CACHE_MIB"
DEFAULT_LIMIT_MIB = 2048
_LOCK_POLL_S = 0.1
_logger = logging.getLogger("surg_perception.runtime")


class CacheError(RuntimeError):
    """The cache cannot be used or written; says where and why."""


@dataclass(frozen=True)
class EngineKey:
    """Everything that an engine depends on; two engines with the same key are interchangeable.

    Attributes:
        graph_sha256: of the model's ONNX file.
        flavour, version: the library that builds and runs it ("tensorrt", "tensorrt_rtx", "openvino"), its version.
        gpu: name of the GPU that the engine was tuned on; "" for an engine built ahead of time.
        targets: compute capabilities that it runs on, sorted: ("sm86", "sm89"); of OpenVINO, the CPU's name.
        precision: of the arithmetic, one of `backend.PRECISIONS`.
        shapes: of the inputs, by name.
        options: of the builder, and the version of our own changes to the graph.
    """

    graph_sha256: str
    flavour: str
    version: str
    gpu: str
    targets: tuple[str, ...]
    precision: str
    shapes: Mapping[str, tuple[int, ...]]
    options: Mapping[str, Any] = field(default_factory=dict)

    def content(self) -> dict[str, Any]:
        """The key as JSON has it."""
        found: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **asdict(self)}))
        return found

    @property
    def digest(self) -> str:
        """sha256 over the whole key, 64 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.content(), sort_keys=True).encode()).hexdigest()

    def served_by(self, other: Mapping[str, Any]) -> bool:
        """Whether an engine with that key (as JSON has it) is one for this: equal, or for more targets."""
        mine = self.content()
        targets = other.get("targets")
        return (
            isinstance(targets, list)
            and set(mine.pop("targets")) <= set(targets)
            and mine == {name: value for name, value in other.items() if name != "targets"}
        )

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """How another key (as JSON has it) differs, in words."""
        mine = self.content()
        return [
            f"{name} is {_short(other.get(name))} there, {_short(value)} here"
            for name, value in mine.items()
            if other.get(name) != value and not (name == "targets" and set(value) <= set(other.get(name) or ()))
        ]


@dataclass(frozen=True)
class Entry:
    """An engine in the cache whose file is whole.

    Attributes:
        path: of the engine.
        facts: its side file: `key`, `sha256`, `bytes`, and what the builder noted.
        content: of the file, if it has just been read to see that it is whole.
    """

    path: Path
    facts: Mapping[str, Any]
    content: bytes | None = field(default=None, repr=False)

    def read(self) -> bytes:
        """The engine."""
        return self.path.read_bytes() if self.content is None else self.content

    @property
    def jit_path(self) -> Path:
        """Where kernels compiled at run time are kept."""
        return self.path.with_suffix(".jit")


class EngineCache:
    """The engines of this user, in `$XDG_CACHE_HOME/surg_perception/<name>`.

    Beyond $SURG_PERCEPTION_ENGINE_CACHE_MIB, else 2048, the engines used longest ago are removed.

    Args:
        name: of the folder; each library that finds its engines by itself has one of its own.
        holds: what it holds, for messages.

    Raises:
        CacheError: the folder is not this user's alone, or cannot be made.
    """

    def __init__(self, name: str = "engines", holds: str = "built engines") -> None:
        folder = cache_folder(name, holds)
        if folder is None:
            raise CacheError(f"there is no safe folder for {holds} (the warning before says why)")
        self.folder = folder
        text = os.environ.get(LIMIT_VARIABLE, str(DEFAULT_LIMIT_MIB))
        try:
            self.limit_bytes = int(float(text) * 2**20)
        except (ValueError, OverflowError):
            raise CacheError(f"${LIMIT_VARIABLE} is {text!r}, expected a number of MiB") from None

    def find(self, key: EngineKey) -> tuple[Entry | None, str]:
        """The engine for a key, and why there is none ("" if there is)."""
        own = self._facts(self.folder / f"{key.digest}.json")
        exact = [] if own is None else [(self.folder / f"{key.digest}.json", own)]
        reasons = []
        for side_file, facts in exact or self._side_files():
            if not key.served_by(facts["key"]):
                continue
            path = side_file.with_suffix(".engine")
            content, fault = _whole(path, facts)
            if fault:
                reasons.append(fault)
                _logger.warning("engine %s is not used: %s", path, fault)
                continue
            _touch(side_file)
            return Entry(path, facts, content), ""
        if reasons:
            return None, "; ".join(reasons)
        near = [
            key.differences(facts["key"])
            for _, facts in self._side_files()
            if facts["key"].get("graph_sha256") == key.graph_sha256
        ]
        if near:
            return None, f"the nearest engine of this model differs: {'; '.join(sorted(near, key=len)[0])}"
        return None, "no engine of this model has been built yet"

    def get(
        self,
        key: EngineKey,
        build: Callable[[], tuple[bytes, Mapping[str, Any]]],
        force: bool = False,
        on_wait: Callable[[str], None] = lambda text: None,
    ) -> Entry:
        """The engine for a key; built if it is missing, damaged or `force` says so.

        Of several builders of one key, in whatever processes, one builds and the others wait and take its engine.

        Args:
            key: what is wanted.
            build: gives the engine and what to note beside it.
            force: build even if there is one.
            on_wait: told once why nothing happens.

        Raises:
            CacheError: the engine could not be written.
            Exception: whatever `build` raises.
        """
        with self._locked(key, on_wait) as waited:
            if not force or waited:
                entry, reason = self.find(key)
                if entry is not None:
                    return entry
                _logger.info("an engine is built: %s", reason)
            else:
                _logger.info("an engine is built: it was asked for")
            engine, notes = build()
            return self._store(key, engine, notes)

    def remove(self, entry: Entry) -> None:
        """Take an engine out."""
        for path in (entry.path.with_suffix(".json"), entry.path, entry.jit_path):
            path.unlink(missing_ok=True)

    def note(self, entry: Entry, **notes: Any) -> Entry:
        """Add to an engine's side file."""
        facts = {**entry.facts, **notes}
        self._write(entry.path.with_suffix(".json"), _json(facts))
        return replace(entry, facts=facts)

    def write_jit(self, entry: Entry, kernels: bytes) -> None:
        """Keep kernels that were compiled at run time, for the next start; a failure is only a warning."""
        try:
            if entry.jit_path.is_file() and entry.jit_path.read_bytes() == kernels:
                return
            self._write(entry.jit_path, kernels)
        except CacheError as error:
            _logger.warning("%s", error)

    def read_jit(self, entry: Entry) -> bytes | None:
        """Kernels compiled at run time by an earlier start, if they may be trusted."""
        if not entry.jit_path.exists() or _unsafe(entry.jit_path):
            return None
        return entry.jit_path.read_bytes()

    def bytes_used(self) -> int:
        """Size of all engines with what lies beside them."""
        return sum(_size(path) for path in self.folder.iterdir() if path.suffix in (".engine", ".json", ".jit"))

    # Inside -----------------------------------------------------------------------------------------------------

    def _store(self, key: EngineKey, engine: bytes, notes: Mapping[str, Any]) -> Entry:
        path = self.folder / f"{key.digest}.engine"
        facts = {
            "key": key.content(),
            "sha256": hashlib.sha256(engine).hexdigest(),
            "bytes": len(engine),
            "built": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **notes,
        }
        # Without its side file an engine does not count, so a side file is never there before its engine.
        path.with_suffix(".json").unlink(missing_ok=True)
        path.with_suffix(".jit").unlink(missing_ok=True)
        self._write(path, engine)
        self._write(path.with_suffix(".json"), _json(facts))
        self._make_room(path)
        return Entry(path, json.loads(_json(facts)))

    def _write(self, path: Path, content: bytes) -> None:
        """Write in one step; the lock makes this process the only writer of this name."""
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            partial.unlink(missing_ok=True)
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            with open(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(descriptor)
            os.replace(partial, path)
        except OSError as error:
            raise CacheError(
                f"could not write {path} ({len(content) / 2**20:.0f} MiB): {error}; make room or set XDG_CACHE_HOME"
            ) from error
        finally:
            partial.unlink(missing_ok=True)

    def _make_room(self, keep: Path) -> None:
        engines = sorted(self._side_files(), key=lambda item: _mtime(item[0]))
        used = self.bytes_used()
        for side_file, _ in engines:
            if used <= self.limit_bytes:
                return
            path = side_file.with_suffix(".engine")
            if path != keep:
                entry = Entry(path, {})
                used -= sum(_size(file) for file in (side_file, path, entry.jit_path))
                self.remove(entry)
                _logger.info("engine %s was used longest ago and made room", path.name)

    def _side_files(self) -> Iterator[tuple[Path, Mapping[str, Any]]]:
        for path in sorted(self.folder.glob("*.json")):
            facts = self._facts(path)
            if facts is not None:
                yield path, facts

    def _facts(self, path: Path) -> Mapping[str, Any] | None:
        try:
            if _unsafe(path):
                return None
            facts = json.loads(path.read_bytes())
        except (OSError, ValueError):
            return None
        return facts if isinstance(facts, dict) and isinstance(facts.get("key"), dict) else None

    @contextmanager
    def _locked(self, key: EngineKey, on_wait: Callable[[str], None]) -> Iterator[bool]:
        """Be the only builder of this key; whether another one had to be waited for.

        The kernel drops the lock of a process that dies, so a killed builder holds up nobody; what it left half
        written goes when the next one has the lock.
        """
        path = self.folder / f"{key.digest}.lock"
        waited = False
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise CacheError(f"could not lock {path}: {error}") from error
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not waited:
                        on_wait("another process builds this engine; waiting for it")
                        waited = True
                    time.sleep(_LOCK_POLL_S)
            for left in self.folder.glob(f".{key.digest}.*.partial"):
                left.unlink(missing_ok=True)
            yield waited
        finally:
            os.close(descriptor)


def _whole(path: Path, facts: Mapping[str, Any]) -> tuple[bytes, str]:
    """An engine's content, and what is wrong with its file; "" if it is whole."""
    if not path.exists() and not path.is_symlink():
        return b"", "its file is missing"
    unsafe = _unsafe(path)
    if unsafe:
        return b"", unsafe
    content = path.read_bytes()
    if len(content) != facts.get("bytes"):
        return content, f"it has {len(content)} bytes, expected {facts.get('bytes')}; it is damaged"
    if hashlib.sha256(content).hexdigest() != facts.get("sha256"):
        return content, "its sha256 is not the one noted when it was built; it is damaged or another one"
    return content, ""


def _unsafe(path: Path) -> str:
    """Why a file is not trusted: it is a link, no plain file, another user's, or others may write it."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        return "it is a link or no plain file"
    if status.st_uid != os.geteuid():
        return f"it belongs to user {status.st_uid}, not to this one ({os.geteuid()})"
    if status.st_mode & 0o022:
        return f"others may write it (mode {stat.S_IMODE(status.st_mode):o})"
    return ""


def _json(facts: Mapping[str, Any]) -> bytes:
    return (json.dumps(facts, indent=2) + "\n").encode()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0


def _mtime(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:
        return 0.0


def _touch(path: Path) -> None:
    """Note that an engine was used just now; not where the folder is read-only."""
    try:
        os.utime(path)
    except OSError as error:
        _logger.debug("%s: %s", path, error)
