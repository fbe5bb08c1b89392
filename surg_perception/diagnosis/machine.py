# SPDX-License-Identifier: Apache-2.0
"""Looks at this machine without ROS: processes, environment, memory, models, engines. Changes nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from surg_perception.diagnosis.snapshot import (
    Answers,
    Engines,
    Machine,
    PhaseModel,
    Process,
    Profile,
    SharedMemory,
    profile_of,
)
from surg_perception.models import ModelError, find_model

OUR_COMMANDS = ("phase_node", "vqa_node", "overlay_node", "source_node", "gate_node")
ENGINE_LIMIT_S = 90.0
"""A driver that hangs must not hang the doctor: engines are tried in a process of its own, ended after so long."""
PACKAGES_OF_VQA = ("torch", "transformers", "peft", "safetensors")
_SHM = Path("/dev/shm")
_KEPT = re.compile(r"ROS_|RMW_|FASTDDS_|FASTRTPS_|CYCLONEDDS_|ZENOH_|SURG_PERCEPTION_|XDG_CACHE_HOME$")
_RMW = re.compile(r"/lib(rmw_(?:fastrtps|fastrtps_dynamic|cyclonedds|gurumdds|zenoh)_cpp|rmw_connextdds)\.so")
_RCL = re.compile(r"/librcl\.so")


def machine() -> Machine:
    """Everything but models and engines, which depend on what the nodes are asked to run."""
    environment = ros_environment(os.environ)
    found = tuple(processes())
    paths = {profile_of(environment), *(profile_of(process.environment) for process in found), shipped_profile()}
    return Machine(
        environment=environment,
        processes=found,
        shm=shared_memory(),
        profiles={path: read_profile(path) for path in paths if path},
        shipped_profile=shipped_profile(),
        memory_free=memory_free(),
        rmem_max=_rmem_max(),
        security_fault=security_fault(os.environ),
        cache_fault=_cache_fault(),
    )


def ros_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that decide about ROS 2 and its middleware; no others, which may hold secrets."""
    return {name: value for name, value in environment.items() if _KEPT.match(name)}


# Processes ----------------------------------------------------------------------------------------------------------


def processes() -> Iterator[Process]:
    """The processes of this user that have ROS 2 loaded, but for this one; what they were started with."""
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            if folder.stat().st_uid != os.geteuid():
                continue
            maps = (folder / "maps").read_text(errors="replace")
            if not _RCL.search(maps):
                continue
            words = (folder / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            pairs = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it ended, or may not be looked at
            continue
        if any("ros2cli.daemon" in word or "_ros2_daemon" in word for word in words):
            continue
        rmw = _RMW.search(maps)
        command = _command(words)
        yield Process(
            pid=int(folder.name),
            command=command,
            environment=ros_environment(dict(pair.partition("=")[::2] for pair in pairs if "=" in pair)),
            rmw=rmw.group(1) if rmw else "",
            node=_node_name(words),
            ours=command in OUR_COMMANDS,
            stopped=state in "Tt",
        )


def _command(words: list[str]) -> str:
    """The program's name; of a script, the script's."""
    names = [Path(word).name for word in words if word]
    if len(words) > 1 and words[1] in ("-c", "-m"):
        return " ".join([names[0], *words[1:3]])[:60]
    script = next((name for name, word in zip(names[1:], words[1:], strict=False) if not word.startswith("-")), "")
    return script if names and names[0].startswith("python") and script else (names or ["?"])[0]


def _node_name(words: list[str]) -> str:
    """`/namespace/name` from the remappings on a command line, "" if it names no node."""
    found = dict(word.split(":=", 1) for word in words if word.startswith(("__node:=", "__ns:=", "__name:=")))
    name = found.get("__node", found.get("__name", ""))
    return f"{found.get('__ns', '').rstrip('/')}/{name}" if name else ""


# Shared memory, memory, cache, security -----------------------------------------------------------------------------


def shared_memory() -> SharedMemory | None:
    """Size of /dev/shm, and whether files of Fast DDS in it belong to other users, whom it does not let in."""
    try:
        usage = shutil.disk_usage(_SHM)
        files = list(_SHM.glob("fast*_port*"))
    except OSError:
        return None
    foreign = 0
    for file in files:
        try:
            foreign += not os.access(file, os.R_OK | os.W_OK)
        except OSError:
            continue
    return SharedMemory(total=usage.total, free=usage.free, foreign_files=foreign)


def shipped_profile() -> str:
    """Path of the package's Fast DDS profile; "" where the package is not installed whole."""
    here = Path(__file__).resolve()
    places = [here.parents[2] / "config", *(p / "share" / "surg_perception" / "config" for p in here.parents[2:8])]
    prefixes = os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep)
    places += [Path(prefix) / "share" / "surg_perception" / "config" for prefix in prefixes if prefix]
    found = (place / "fastdds_large_images.xml" for place in places)
    return next((str(path) for path in found if path.is_file()), "")


def read_profile(path: str) -> Profile:
    """What a Fast DDS profile file offers to large images."""
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        return Profile(path, fault=str(error))
    sizes = [0]
    for transport in root.iter():
        if transport.tag.rpartition("}")[2] != "transport_descriptor":
            continue
        values = {item.tag.rpartition("}")[2]: (item.text or "").strip() for item in transport}
        if values.get("type") == "SHM":
            size = values.get("segment_size", "")
            sizes.append(int(size) if size.isdigit() else 0)
    return Profile(path, segment_bytes=max(sizes))


def memory_free() -> int | None:
    """Memory that new allocations can have, in bytes: of the machine, or of the container where that is less."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    match = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    free = int(match.group(1)) * 1024 if match else None
    try:
        limit, used = (Path("/sys/fs/cgroup", name).read_text().strip() for name in ("memory.max", "memory.current"))
        if limit.isdigit() and free is not None:
            free = min(free, int(limit) - int(used))
    except (OSError, ValueError):
        pass
    return free


def security_fault(environment: Mapping[str, str]) -> str:
    """Why SROS 2 cannot work as the environment asks; "" if it can, or is not asked for."""
    if environment.get("ROS_SECURITY_ENABLE", "").lower() != "true":
        return ""
    keystore = environment.get("ROS_SECURITY_KEYSTORE", "")
    if not keystore:
        return "ROS_SECURITY_ENABLE is true and ROS_SECURITY_KEYSTORE is not set"
    folder = Path(keystore) / "enclaves"
    if not folder.is_dir():
        return f"ROS_SECURITY_KEYSTORE is {keystore}, which is no keystore: it has no folder enclaves"
    enclave = environment.get("ROS_SECURITY_ENCLAVE_OVERRIDE", "").strip("/")
    if enclave and not (folder / enclave).is_dir():
        return f"the keystore {keystore} has no enclave /{enclave} (ROS_SECURITY_ENCLAVE_OVERRIDE)"
    return ""


def _rmem_max() -> int:
    try:
        return int(Path("/proc/sys/net/core/rmem_max").read_text())
    except (OSError, ValueError):
        return 0


def _cache_fault() -> str:
    from surg_perception.runtime.user_cache import cache_fault

    return cache_fault("engines")


# Models and engines -------------------------------------------------------------------------------------------------


def phase_model(asked: str) -> PhaseModel:
    """The phase model of that name or path: found, whole, with phases?"""
    try:
        card = find_model(asked)
    except (ModelError, OSError) as error:
        return PhaseModel(asked, fault="missing", text=str(error))
    try:
        card.verify()
    except (ModelError, OSError) as error:
        return PhaseModel(asked, card.model_id, len(card.labels.names), "hash", str(error))
    return PhaseModel(asked, card.model_id, len(card.labels.names))


def answers(asked: str) -> Answers:
    """What is missing for the node vqa with the model of that name or path. Loads nothing."""
    from surg_perception.surgllm.base_models import BaseModelMissing, fetch_command, find_base_model
    from surg_perception.surgllm.model_folder import find_surgllm

    packages = tuple(name for name in PACKAGES_OF_VQA if importlib.util.find_spec(name) is None)
    try:
        card = find_surgllm(asked)
        card.verify()
    except (ModelError, OSError) as error:
        return Answers(asked, model_fault=str(error), missing_packages=packages)
    missing = []
    for name in card.base_models:
        try:
            find_base_model(name)
        except BaseModelMissing:
            missing.append(fetch_command(name))
    return Answers(asked, missing_base=tuple(missing), missing_packages=packages)


def engines(model: str, backend: str, precision: str, trial: bool) -> Engines:
    """Which inference engines run here, found out in a process of its own.

    Args:
        model, backend, precision: as the parameters of the node `phase`.
        trial: whether to run the model as they ask; else only what is installed is looked at.
    """
    command = [sys.executable, "-m", __name__, json.dumps([model, backend, precision, trial])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ENGINE_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return Engines(fault=f"looking for inference engines took over {ENGINE_LIMIT_S:.0f} s: a driver may hang")
    try:
        found = json.loads(done.stdout.splitlines()[-1])
        return Engines(found["refusals"], found["name"], tuple(found["notes"]), found["fault"], found["gpu"])
    except (IndexError, ValueError, KeyError):
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return Engines(fault=f"looking for inference engines ended with exit status {done.returncode}: {last}")


def _try_engines(model: str, backend: str, precision: str, trial: bool) -> dict[str, object]:
    """In the process of its own."""
    from surg_perception.runtime.backend import BACKENDS, BackendUnavailable, available_backends, open_backend

    os.nice(10)
    from surg_perception.runtime.backend import has_cuda_device

    # Importing PyTorch takes seconds: only where it is asked for.
    kinds: Iterable[str] = [kind for kind in BACKENDS if kind != "torch" or backend == "torch"]
    refusals = available_backends(kinds)
    if "torch" not in refusals:
        refusals["torch"] = None if importlib.util.find_spec("torch") else "not installed"
    name, notes, fault = "", [], ""
    if trial:
        try:
            with open_backend(find_model(model), backend, precision) as engine:
                name, notes = engine.name, engine.notes
        except (BackendUnavailable, ModelError, ValueError) as error:
            fault = str(error)
    return {"refusals": refusals, "name": name, "notes": notes, "fault": fault, "gpu": has_cuda_device()}


if __name__ == "__main__":
    print(json.dumps(_try_engines(*json.loads(sys.argv[1]))))
