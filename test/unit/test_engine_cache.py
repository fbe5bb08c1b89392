# SPDX-License-Identifier: Apache-2.0
"""The engine cache: what an engine is found by, damage, strangers' files, two builders, killed ones, full disks."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from surg_perception.runtime.engine_cache import LIMIT_VARIABLE, CacheError, EngineCache, EngineKey

KEY = EngineKey(
    "ab" * 32, "tensorrt", "10.3.0", "Orin", ("sm87",), "fp16", {"frame": (1, 224, 224, 3)}, {"workspace_mib": 1024}
)
PATIENCE_S = 60.0


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineCache:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(LIMIT_VARIABLE, raising=False)
    return EngineCache()


class Builder:
    """Counts what it builds."""

    def __init__(self, content: bytes = b"engine") -> None:
        self.content, self.built = content, 0

    def __call__(self) -> tuple[bytes, Mapping[str, Any]]:
        self.built += 1
        return self.content + str(self.built).encode(), {"seconds": 1.5}


def test_an_engine_is_built_once_and_found_again(cache: EngineCache, tmp_path: Path) -> None:
    build = Builder()
    entry = cache.get(KEY, build)
    assert cache.get(KEY, build).read() == b"engine1"
    assert EngineCache().get(KEY, build).read() == b"engine1"
    assert build.built == 1
    assert cache.folder == tmp_path / "surg_perception" / "engines"
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    assert entry.path.stat().st_mode & 0o777 == 0o600
    side = json.loads(entry.path.with_suffix(".json").read_text())
    assert (side["key"]["version"], side["key"]["targets"], side["seconds"]) == ("10.3.0", ["sm87"], 1.5)
    assert cache.get(KEY, build, force=True).read() == b"engine2"
    assert not list(cache.folder.glob("*partial*"))


@pytest.mark.parametrize(
    "change",
    [
        {"graph_sha256": "cd" * 32},
        {"flavour": "tensorrt_rtx"},
        {"version": "10.4.0"},
        {"gpu": "Thor"},
        {"targets": ("sm110",)},
        {"precision": "fp32"},
        {"shapes": {"frame": (2, 224, 224, 3)}},
        {"options": {"workspace_mib": 512}},
        {"options": {}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_matters_makes_another_engine_and_is_named(cache: EngineCache, change: dict[str, Any]) -> None:
    build = Builder()
    cache.get(KEY, build)
    other = replace(KEY, **change)
    assert other.digest != KEY.digest
    entry, reason = cache.find(other)
    assert entry is None
    name = next(iter(change))
    assert "no engine of this model" in reason if name == "graph_sha256" else f"{name} is" in reason
    cache.get(other, build)
    assert build.built == 2


def test_an_engine_for_more_targets_serves_each_of_them(cache: EngineCache) -> None:
    ahead = replace(KEY, flavour="tensorrt_rtx", gpu="", targets=("sm86", "sm89"))
    cache.get(ahead, Builder())
    for targets, found in ((("sm86",), True), (("sm89",), True), (("sm86", "sm89"), True), (("sm120",), False)):
        assert (cache.find(replace(ahead, targets=targets))[0] is not None) is found, targets
    assert cache.find(replace(ahead, targets=("sm86",), precision="fp32"))[0] is None
    assert "targets is" in cache.find(replace(ahead, targets=("sm120",)))[1]


def damage_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damage_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[2] ^= 1
    path.write_bytes(content)


def damage_gone(path: Path) -> None:
    path.unlink()


def damage_link(path: Path) -> None:
    elsewhere = path.with_name("elsewhere")
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def damage_writable(path: Path) -> None:
    path.chmod(0o662)


def damage_side(path: Path) -> None:
    path.with_suffix(".json").write_text("{")


def damage_side_link(path: Path) -> None:
    damage_link(path.with_suffix(".json"))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damage_cut, "has 6 bytes, expected 7"),
        (damage_bit, "sha256"),
        (damage_gone, "missing"),
        (damage_link, "link"),
        (damage_writable, "others may write"),
        (damage_side, "no engine"),
        (damage_side_link, "no engine"),
    ],
)
def test_a_damaged_engine_is_built_again_with_the_reason(
    cache: EngineCache, damage: Any, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    build = Builder()
    damage(cache.get(KEY, build).path)
    with caplog.at_level("INFO", logger="surg_perception.runtime"):
        assert cache.get(KEY, build).read() == b"engine2"
    assert says in caplog.text
    assert cache.find(KEY)[0] is not None
    assert not cache.find(KEY)[0].path.is_symlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_is_no_engine(cache: EngineCache, monkeypatch: pytest.MonkeyPatch) -> None:
    build = Builder()
    entry = cache.get(KEY, build)
    os.chown(entry.path, 12345, 12345)
    assert "user 12345" in cache.find(KEY)[1]
    assert cache.get(KEY, build).read() == b"engine2"
    os.chown(cache.folder, 12345, 12345)
    with pytest.raises(CacheError, match="no safe folder"):
        EngineCache()


def test_a_folder_that_others_may_read_is_not_used(cache: EngineCache) -> None:
    cache.folder.chmod(0o755)
    with pytest.raises(CacheError, match="no safe folder"):
        EngineCache()


def test_a_full_disk_leaves_nothing_half_written(cache: EngineCache, monkeypatch: pytest.MonkeyPatch) -> None:
    old = cache.get(KEY, Builder())

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(CacheError, match=r"No space left.*make room or set XDG_CACHE_HOME"):
            cache.get(replace(KEY, precision="fp32"), Builder())
        cache.write_jit(old, b"kernels")
    assert cache.read_jit(old) is None
    assert not [path for path in cache.folder.iterdir() if "partial" in path.name]
    assert cache.find(replace(KEY, precision="fp32"))[0] is None
    assert cache.find(KEY)[0] is not None
    assert cache.get(replace(KEY, precision="fp32"), Builder()).read() == b"engine1"


def test_a_failed_build_leaves_no_engine_and_no_lock(cache: EngineCache) -> None:
    def fails() -> tuple[bytes, Mapping[str, Any]]:
        raise MemoryError("no memory")

    with pytest.raises(MemoryError):
        cache.get(KEY, fails)
    assert cache.get(KEY, Builder()).read() == b"engine1"


def test_engines_used_longest_ago_make_room(cache: EngineCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, "2.5")
    small = EngineCache()
    keys = [replace(KEY, version=str(number)) for number in range(3)]
    for age, key in zip((300, 200), keys, strict=False):
        side = small.get(key, Builder(b"x" * 2**20)).path.with_suffix(".json")
        os.utime(side, (time.time() - age,) * 2)
    assert small.find(keys[0])[0] is not None  # used again
    small.get(keys[2], Builder(b"x" * 2**20))
    assert [small.find(key)[0] is not None for key in keys] == [True, False, True]
    assert small.bytes_used() <= small.limit_bytes
    big = small.get(replace(KEY, version="big"), Builder(b"x" * 2**22))
    assert big.path.exists(), "what was just built stays, however large"
    assert [small.find(key)[0] for key in keys] == [None, None, None]
    monkeypatch.setenv(LIMIT_VARIABLE, "much")
    with pytest.raises(CacheError, match="expected a number of MiB"):
        EngineCache()


def test_kernels_lie_beside_their_engine_and_go_with_it(cache: EngineCache) -> None:
    entry = cache.get(KEY, Builder())
    assert cache.read_jit(entry) is None
    cache.write_jit(entry, b"kernels")
    assert cache.read_jit(entry) == b"kernels"
    entry.jit_path.chmod(0o666)
    assert cache.read_jit(entry) is None
    cache.get(KEY, Builder(), force=True)
    assert not entry.jit_path.exists(), "kernels of another engine"
    cache.write_jit(entry, b"kernels")
    cache.remove(entry)
    assert not entry.jit_path.exists()


def test_threads_build_an_engine_once(cache: EngineCache) -> None:
    build = Builder()
    told: list[str] = []

    def slow() -> tuple[bytes, Mapping[str, Any]]:
        time.sleep(0.5)
        return build()

    threads = [threading.Thread(target=lambda: EngineCache().get(KEY, slow, on_wait=told.append)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert build.built == 1
    assert len(told) == 2


BUILDER = """
import sys
sys.path.insert(0, sys.argv[1])
from test_engine_cache import KEY
from surg_perception.runtime.engine_cache import EngineCache

def build():
    print("building", flush=True)
    sys.stdin.readline()
    return b"engine", {}

EngineCache().get(KEY, build, on_wait=lambda text: print(text, flush=True))
print("done", flush=True)
"""


def builder() -> subprocess.Popen[str]:
    """A process that builds until it reads a line."""
    command = [sys.executable, "-c", BUILDER, str(Path(__file__).parent)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_two_processes_build_an_engine_once(cache: EngineCache) -> None:
    first = builder()
    assert first.stdout.readline() == "building\n"
    second = builder()
    assert second.stdout.readline() == "another process builds this engine; waiting for it\n"
    assert first.communicate("\n", timeout=PATIENCE_S)[0] == "done\n"
    assert second.communicate(timeout=PATIENCE_S)[0] == "done\n"


def test_a_killed_builder_holds_up_nobody_and_its_half_file_goes(cache: EngineCache) -> None:
    first = builder()
    assert first.stdout.readline() == "building\n"
    half = cache.folder / f".{KEY.digest}.engine.{first.pid}.partial"
    half.write_bytes(b"half")
    first.send_signal(signal.SIGKILL)
    first.wait(PATIENCE_S)
    first.communicate()
    assert cache.find(KEY)[0] is None
    assert cache.get(KEY, Builder()).read() == b"engine1"
    assert not half.exists()
