# SPDX-License-Identifier: Apache-2.0
"""The set-up: what it skips, what it does again, and what it says when something is missing. No network."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


driver = load("setup_driver", ROOT / "scripts" / "setup.py")
underlay = driver.underlay
check_package_xml = load("check_package_xml", ROOT / "scripts" / "check_package_xml.py")


class Silent(driver.Progress):
    def _write(self, text: str) -> None:
        pass


# ------------------------------------------------------------------------------------- what is skipped and redone


class FourSteps(driver.Setup):
    """A set-up whose steps are: a; b, which builds on a; c, which builds on nothing; d, which builds on a."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, "demo", Silent())
        self.done: list[str] = []
        self.fails: str | None = None

    def find_ros(self) -> None:
        self.ros = None

    def current_venv(self) -> dict[str, str]:
        return {"root": str(self.root), "python": "3.11", "ros": "wheels"}

    def steps(self) -> list[driver.Step]:
        def step(name: str, after: list[str]) -> driver.Step:
            return driver.Step(name, name, lambda: self.do(name), [f"{name}.txt"], after)

        return [step("a", []), step("b", ["a"]), step("c", []), step("d", ["a"])]

    def do(self, name: str) -> None:
        if name == self.fails:
            raise driver.SetupError("no")
        self.done.append(name)


@pytest.fixture
def four_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FourSteps:
    monkeypatch.setattr(driver, "require_tools", lambda *_: None)
    for name in "abcd":
        (tmp_path / f"{name}.txt").write_text("1")
    return FourSteps(tmp_path)


def run_all(setup: FourSteps) -> list[str]:
    setup.done = []
    setup.execute(lambda text: None)
    return setup.done


def test_a_second_run_does_nothing(four_steps: FourSteps) -> None:
    assert run_all(four_steps) == ["a", "b", "c", "d"]
    assert run_all(four_steps) == []


def test_a_changed_input_redoes_its_step_and_what_builds_on_it(four_steps: FourSteps) -> None:
    run_all(four_steps)
    (four_steps.root / "a.txt").write_text("2")
    assert run_all(four_steps) == ["a", "b", "d"]
    (four_steps.root / "b.txt").write_text("2")
    assert run_all(four_steps) == ["b"]


@pytest.mark.parametrize("fails", ["a", "b"])
def test_a_step_that_fails_is_done_again_and_so_is_what_builds_on_it(four_steps: FourSteps, fails: str) -> None:
    run_all(four_steps)
    (four_steps.root / f"{fails}.txt").write_text("2")
    four_steps.fails = fails
    with pytest.raises(driver.SetupError):
        run_all(four_steps)
    (four_steps.root / f"{fails}.txt").write_text("1")  # even if the input is as it was at the last success
    four_steps.fails = None
    assert run_all(four_steps) == (["a", "b", "d"] if fails == "a" else ["b"])


def test_a_step_redone_alone_leaves_nothing_stale_when_the_next_is_cut_short(four_steps: FourSteps) -> None:
    run_all(four_steps)
    four_steps.stamps.remove("a")  # as if `a` had been interrupted
    four_steps.fails = "b"
    with pytest.raises(driver.SetupError):
        run_all(four_steps)
    four_steps.fails = None
    assert run_all(four_steps) == ["b", "d"]


def test_digest_sees_contents_names_and_facts_but_not_bytecode(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "launch").mkdir()
    (tmp_path / "src" / "x").write_text("1")
    (tmp_path / "launch" / "l.py").write_text("1")

    def digest(*facts: str) -> str:
        return driver.digest_of(tmp_path, ["src"], ["launch"], facts)

    first = digest("3.11")
    assert digest("3.12") != first
    (tmp_path / "launch" / "l.py").write_text("2")
    (tmp_path / "src" / "__pycache__").mkdir()
    (tmp_path / "src" / "__pycache__" / "x.pyc").write_text("1")
    assert digest("3.11") == first
    (tmp_path / "launch" / "new.py").write_text("")
    assert digest("3.11") != first
    (tmp_path / "launch" / "new.py").unlink()
    (tmp_path / "src" / "x").write_text("2")
    assert digest("3.11") != first


def test_the_real_steps_name_existing_inputs() -> None:
    setup = driver.Setup(ROOT, "test", Silent())
    setup.chosen = driver.Python("python3", (3, 11, 7), True, True, False)
    steps = setup.steps()
    names = [step.name for step in steps]
    for step in steps:
        assert set(step.after) <= set(names[: names.index(step.name)])
        for name in [*step.inputs, *step.names_only]:
            assert (ROOT / name).exists(), f"{step.name}: {name}"


def test_a_sourced_ros_is_used_and_none_is_downloaded() -> None:
    setup = driver.Setup(ROOT, "test", Silent())
    setup.ros = driver.Ros("jazzy", ("/opt/ros/jazzy",))
    setup.chosen = driver.Python(sys.executable, sys.version_info[:3], True, True, True)
    names = [step.name for step in setup.steps()]
    assert names == ["venv", "python", "workspace", "surgllm", "base-models", "test"]
    assert "constraints" not in " ".join(setup.requirements("runtime"))


# ------------------------------------------------------------------------------------------ questions about the image


class Running(driver.Setup):
    """Commands are noted, not run."""

    def __init__(self, root: Path, level: str = "demo") -> None:
        super().__init__(root, level, Silent())
        self.chosen = driver.Python("python3", (3, 11, 7), True, True, False)
        self.commands: list[list[str]] = []

    def run(self, step: str, *command: object) -> str:
        self.commands.append([str(word) for word in command])
        return ""


def test_the_demo_level_brings_what_questions_need_and_the_test_level_no_second_torch(tmp_path: Path) -> None:
    levels = {level: [step.name for step in Running(ROOT, level).steps()] for level in ("demo", "test")}
    assert levels["demo"][-2:] == ["surgllm", "base-models"]
    assert levels["test"] == [*levels["demo"], "test"]
    pinned = {path.stem: path.read_text() for path in FILES}
    assert [name for name, text in pinned.items() if re.search("^torch==", text, re.M)] == ["surgllm"]
    setup = Running(tmp_path)
    setup.step_surgllm()
    with_dependencies, without = setup.commands
    assert "requirements/surgllm.txt" in with_dependencies
    assert "requirements/constraints.txt" in with_dependencies
    assert without[-3:] == ["--no-deps", "-r", "requirements/surgllm-no-deps.txt"]


def test_the_test_level_brings_a_model_server_and_tensorrt_rtx(tmp_path: Path) -> None:
    setup = Running(tmp_path, "test")
    setup.step_test()
    with_dependencies, without = setup.commands
    assert {"requirements/test.txt", "requirements/model-server.txt"} <= set(with_dependencies)
    assert "--no-deps" not in with_dependencies
    assert without[-5:] == [
        "--no-deps",
        "-r",
        "requirements/test-no-deps.txt",
        "-r",
        "requirements/model-server-no-deps.txt",
    ]
    (step,) = [step for step in Running(ROOT, "test").steps() if step.name == "test"]
    assert {word for word in (*with_dependencies, *without) if "model-server" in word} <= set(step.inputs)


def test_base_models_are_fetched_to_where_they_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from surg_perception.cli.main import parser
    from surg_perception.surgllm import base_models

    setup = Running(tmp_path)
    setup.step_base_models()
    (command,) = setup.commands
    assert str(setup.bin / "python") in command
    module = command.index("surg_perception.cli.main")
    options = parser().parse_args(command[module + 1 :])
    fetched: list[tuple[str, Path]] = []
    monkeypatch.setattr(base_models, "fetch", lambda name, into, say: fetched.append((name, into)))
    assert options.run(options) == 0
    assert [name for name, _ in fetched] == list(base_models.BASE_MODELS)
    monkeypatch.setattr(sys, "prefix", str(setup.venv))
    assert {into for _, into in fetched} == {base_models.environment_folder()}


def test_deleted_base_models_are_fetched_again(tmp_path: Path) -> None:
    setup = Running(tmp_path)
    assert setup.is_gone("base-models")
    for name in driver.BASE_MODELS:
        assert setup.is_gone("base-models")
        (setup.base_models / name).mkdir(parents=True)
        (setup.base_models / name / "base_model.json").write_text("{}")
    assert not setup.is_gone("base-models")


# ----------------------------------------------------------------------------------------------- virtual environment


def test_packages_that_pip_left_half_installed_are_forgotten(tmp_path: Path) -> None:
    site = tmp_path / ".venv" / "lib" / "python3.11" / "site-packages"
    for name, whole in (("good-1.dist-info", True), ("half-1.dist-info", False)):
        (site / name).mkdir(parents=True)
        (site / name / "METADATA").write_text("")
        if whole:
            (site / name / "INSTALLER").write_text("pip")
    (site / "~umpy").mkdir()
    driver.Setup(tmp_path, "demo", Silent()).remove_half_installed()
    assert sorted(p.name for p in site.iterdir()) == ["good-1.dist-info"]


def make_fake_venv(root: Path, version: str) -> None:
    """A virtual environment as far as the check looks: its `python` prints the version."""
    binaries = root / ".venv" / "bin"
    pip = root / ".venv" / "lib" / f"python{version}" / "site-packages" / "pip"
    for folder in (binaries, pip):
        folder.mkdir(parents=True, exist_ok=True)
    (pip / "__init__.py").write_text("")
    (binaries / "pip").write_text(f"#!{binaries}/python\n")
    (binaries / "python").write_text(f"#!/bin/sh\necho {version}\n")
    (binaries / "python").chmod(0o755)


def test_a_broken_virtual_environment_is_not_taken_for_a_good_one(tmp_path: Path) -> None:
    setup = driver.Setup(tmp_path, "demo", Silent())
    identity = {"root": str(tmp_path), "python": "3.11", "ros": "wheels"}
    assert setup.current_venv() is None
    make_fake_venv(tmp_path, "3.11")
    assert setup.current_venv() == identity
    driver.write_atomically(setup.state / "venv.json", json.dumps(identity))
    assert setup.current_venv() == identity
    make_fake_venv(tmp_path, "3.12")  # the system's Python was upgraded under it
    assert setup.current_venv() is None
    (tmp_path / ".venv" / "bin" / "python").unlink()  # or removed
    assert setup.current_venv() is None


# ------------------------------------------------------------------------------------------------- Python and tools


def python(version: str, *, venv: bool = True, headers: bool = True, rclpy: bool = False) -> driver.Python:
    numbers = tuple(int(n) for n in version.split("."))
    return driver.Python(f"/usr/bin/python{numbers[0]}.{numbers[1]}", numbers, venv, headers, rclpy)


def test_the_first_complete_supported_python_is_chosen() -> None:
    old, bare, good = python("3.9.2"), python("3.12.1", venv=False), python("3.10.4")
    assert driver.choose_python([good, bare], None) == (good, None)
    chosen, remark = driver.choose_python([old, bare, good], None)
    assert chosen == good
    assert remark
    assert "Python 3.9.2 (/usr/bin/python3.9)" in remark
    assert "3.10, 3.11 or 3.12" in remark
    assert "using Python 3.10.4" in remark


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([], ["no Python", "3.10, 3.11 or 3.12", "apt install"]),
        ([python("3.9.2"), python("3.13.0")], ["Python 3.9.2", "Python 3.13.0", "3.10, 3.11 or 3.12"]),
        ([python("3.11.2", venv=False)], ["lacks the modules venv and ensurepip", "apt install python3.11-venv"]),
        ([python("3.11.2", headers=False)], ["Python.h", "apt install python3.11-dev"]),
        ([python("3.11.2", venv=False, headers=False)], ["apt install python3.11-venv python3.11-dev"]),
    ],
)
def test_no_fitting_python_says_what_is_missing(found: list[driver.Python], expected: list[str]) -> None:
    with pytest.raises(driver.SetupError) as error:
        driver.choose_python(found, None)
    for text in expected:
        assert text in str(error.value)


def test_a_sourced_ros_needs_the_python_it_was_built_for() -> None:
    ros = driver.Ros("jazzy", ("/home/me/ws/install/x", "/opt/ros/jazzy"))
    first, with_rclpy = python("3.11.7"), python("3.12.3", rclpy=True)
    chosen, remark = driver.choose_python([first, with_rclpy], ros)
    assert chosen == with_rclpy
    assert remark
    assert "rclpy does not import there" in remark
    with pytest.raises(driver.SetupError, match=r"jazzy is sourced \(/opt/ros/jazzy\).*\n.*ros-jazzy-ros-base"):
        driver.choose_python([first], ros)


def test_probe_reads_an_interpreter_and_survives_one_that_does_not_run(tmp_path: Path) -> None:
    found = driver.probe_python(sys.executable)
    assert found is not None
    assert found.version == sys.version_info[:3]
    assert not Path(found.executable).is_relative_to(ROOT / ".venv"), "the base, not a virtual environment"
    shim = tmp_path / "python3.12"
    shim.write_text("#!/bin/sh\necho 'pyenv: python3.12: command not found' >&2\nexit 127\n")
    shim.chmod(0o755)
    assert driver.probe_python(str(shim)) is None


def test_missing_compilers_and_other_machines_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)

    def which(*there: str):
        return lambda name: f"/usr/bin/{name}" if name in there else None

    driver.require_tools(None, "x86_64", which("cc", "c++", "make"))
    driver.require_tools(None, "x86_64", which("gcc", "g++", "make"))
    with pytest.raises(driver.SetupError, match=r"Not found: g\+\+;.*\n.*apt install g\+\+"):
        driver.require_tools(None, "x86_64", which("gcc", "make"))
    with pytest.raises(driver.SetupError, match=r"aarch64.*\n.*ROS 2 from apt"):
        driver.require_tools(None, "aarch64", which("gcc", "g++", "make"))
    driver.require_tools(driver.Ros("jazzy", ("/opt/ros/jazzy",)), "aarch64", which("gcc", "g++", "make"))


def test_a_missing_compiler_stops_the_real_command_with_a_message(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "scripts", checkout / "scripts", ignore=shutil.ignore_patterns("*.egg-info"))
    shutil.copytree(ROOT / "requirements", checkout / "requirements")
    for name in ("surg_perception_msgs", "launch", "config", "models", "resource"):
        (checkout / name).mkdir()
    for name in ("package.xml", "setup.py", "setup.cfg", "colcon_defaults.yaml"):
        (checkout / name).write_text("")
    base = driver.probe_python(sys.executable)
    assert base is not None
    only_python = tmp_path / "bin"  # its own folder may be /usr/bin, where the compiler is
    only_python.mkdir()
    (only_python / Path(base.executable).name).symlink_to(base.executable)
    environment = {"PATH": str(only_python), "HOME": str(tmp_path)}
    command = [base.executable, "scripts/setup.py"]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "Not found: gcc, g++, make" in done.stderr
    assert "sudo apt install gcc g++ make" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (checkout / ".venv").exists()


def test_what_this_checkout_put_on_the_paths_is_no_sourced_ros() -> None:
    root = Path("/home/me/surg")
    own = {"ROS_DISTRO": "jazzy", "AMENT_PREFIX_PATH": "/home/me/surg/install/a:/home/me/surg/.venv"}
    assert driver.sourced_ros(own, root) is None
    assert driver.sourced_ros({"ROS_DISTRO": "jazzy"}, root) is None
    sourced = {"ROS_DISTRO": "humble", "AMENT_PREFIX_PATH": "/home/me/surg/install/a:/home/me/ws:/opt/ros/humble"}
    assert driver.sourced_ros(sourced, root) == driver.Ros("humble", ("/home/me/ws", "/opt/ros/humble"))


def test_an_earlier_sourced_ros_is_sourced_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = tmp_path / "ros"
    prefix.mkdir()
    (prefix / "setup.bash").write_text(f"export ROS_DISTRO=jazzy AMENT_PREFIX_PATH={prefix}\n")
    for name in ("ROS_DISTRO", "AMENT_PREFIX_PATH"):
        monkeypatch.delenv(name, raising=False)
    setup = driver.Setup(tmp_path / "checkout", "demo", Silent())
    setup.find_ros()
    assert setup.ros is None
    monkeypatch.setenv("ROS_DISTRO", "jazzy")
    monkeypatch.setenv("AMENT_PREFIX_PATH", str(prefix))
    setup.find_ros()
    assert not (setup.state / "ros_setup_file").exists(), "only once an environment was made for it"
    setup.remember_ros()
    monkeypatch.delenv("ROS_DISTRO")
    monkeypatch.delenv("AMENT_PREFIX_PATH")
    setup.ros = None
    setup.find_ros()
    assert setup.ros == driver.Ros("jazzy", (str(prefix),))


# -------------------------------------------------------------------------------------------------- commands and lock


@pytest.mark.parametrize(
    ("output", "advice"),
    [
        ("NewConnectionError('<pip>: Failed to establish a new connection')", "Cannot reach the package index"),
        ("ProxyError('Cannot connect to proxy.')\nERROR: No matching distribution found", "Cannot reach"),
        ("SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED]'))", "certificate"),
        ("ERROR: No matching distribution found for ros-jazzy-rclpy==7.1.6", "does not offer this version"),
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("fatal error: Python.h: No such file or directory", "apt install python3-dev"),
        ("something else", "the log has the whole story"),
    ],
)
def test_failures_say_what_to_do(output: str, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX", raising=False)
    assert advice in driver.explain(output)


def test_a_forgotten_no_index_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert "PIP_NO_INDEX is set" in driver.explain("ERROR: No matching distribution found for pip==26.0")


def test_a_failed_command_shows_the_lines_that_matter(tmp_path: Path) -> None:
    script = (
        "print('\\n'.join(f'chatter {i}' for i in range(99))); print('fatal error: rosidl broke'); raise SystemExit(3)"
    )
    log = tmp_path / "logs" / "x.log"
    with pytest.raises(driver.SetupError) as error:
        driver.run([sys.executable, "-c", script], log, Silent(), dict(os.environ))
    assert "exit status 3" in str(error.value)
    assert "fatal error: rosidl broke" in str(error.value)
    assert "chatter 50" not in str(error.value)
    assert "chatter 50" in log.read_text()
    assert driver.run([sys.executable, "-c", "print('ok')"], log, Silent(), dict(os.environ)).strip() == "ok"


def test_an_interrupted_command_does_not_live_on(tmp_path: Path) -> None:
    marker = tmp_path / "pid"
    script = (
        f"import os, time; open({str(marker)!r}, 'w').write(str(os.getpid())); print('up', flush=True); time.sleep(60)"
    )

    class Interrupting(Silent):
        def note(self, activity: str) -> None:
            if marker.exists() and marker.read_text():
                raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        driver.run([sys.executable, "-c", script], tmp_path / "log", Interrupting(), dict(os.environ))
    assert time.monotonic() - started < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int(marker.read_text()), signal.SIGCONT)


def test_a_second_set_up_waits_for_the_first(tmp_path: Path) -> None:
    said: list[str] = []
    order: list[str] = []

    def second() -> None:
        with driver.locked(tmp_path / "lock", said.append):
            order.append("second")

    with driver.locked(tmp_path / "lock", said.append):
        assert said == []
        thread = threading.Thread(target=second)
        thread.start()
        while not said:
            time.sleep(0.01)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    assert f"process {os.getpid()}" in said[0]


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("  Downloading openvino-2026.4.1-cp311-cp311-manylinux.whl (60 MB)", "Downloading openvino"),
        ("Progress 66500000 of 133245632", "66 of 133 MB"),
        ("Progress 1000 of 2000", None),
        ("[ 45%] Building CXX object x.o", "[ 45%] Building"),
        ("Converting smollm2-135m-instruct to safetensors, once: about a minute", "Converting smollm2"),
        ("Requirement already satisfied: numpy", None),
    ],
)
def test_progress_tells_what_happens(line: str, shown: str | None) -> None:
    activity = driver.activity_of(line)
    assert activity is None if shown is None else activity is not None and activity.startswith(shown)


# -------------------------------------------------------------------------------------------------- ROS 2 from wheels


class Fetching(driver.Setup):
    """Downloads are files of the given contents, in turn."""

    def __init__(self, root: Path, *contents: bytes) -> None:
        super().__init__(root, "demo", Silent())
        self.contents = list(contents)
        self.commands: list[str] = []

    def run(self, step: str, *command: object) -> str:
        words = [str(word) for word in command]
        self.commands.append(" ".join(words))
        (Path(words[words.index("--dest") + 1]) / "tools.whl").write_bytes(self.contents.pop(0))
        return ""


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    content = b"the whole wheel"
    (tmp_path / "reference").write_bytes(content)
    monkeypatch.setattr(underlay, "WHEEL_SHA256", underlay.sha256_of(tmp_path / "reference"))
    return content


def test_a_damaged_download_is_fetched_again_past_pips_cache(tmp_path: Path, whole: bytes) -> None:
    setup = Fetching(tmp_path, whole[:5], whole)
    assert setup.fetch_wheel().read_bytes() == whole
    assert ["--no-cache-dir" in command for command in setup.commands] == [False, True]


def test_a_truncated_wheel_from_an_earlier_run_is_fetched_again(tmp_path: Path, whole: bytes) -> None:
    cache = tmp_path / ".cache" / "ros2"
    (cache / "partial").mkdir(parents=True)
    (cache / "tools.whl").write_bytes(whole[:-1])
    (cache / "partial" / "left-over.whl").write_bytes(b"half")
    setup = Fetching(tmp_path, whole)
    assert setup.fetch_wheel().read_bytes() == whole
    assert Fetching(tmp_path).fetch_wheel().read_bytes() == whole, "a whole one is not fetched again"


def test_a_file_that_is_not_the_tested_one_is_refused(tmp_path: Path, whole: bytes) -> None:
    setup = Fetching(tmp_path, b"other", b"other")
    with pytest.raises(driver.SetupError, match=r"tools.whl has the sha256 .* expected"):
        setup.fetch_wheel()
    assert not list((tmp_path / ".cache" / "ros2").glob("*.whl"))


def make_wheel(path: Path, leave_out: str = "") -> None:
    root = underlay.WHEEL_ROOT
    with zipfile.ZipFile(path, "w") as archive:
        for package in underlay.PACKAGES:
            if package != leave_out:
                archive.writestr(f"{root}rclpy/{package}/__init__.py", package)
                archive.writestr(f"{root}rclpy/{package}-1.0-py3.12.egg-info/PKG-INFO", "Metadata-Version: 2.1")
                archive.writestr(f"{root}share/{package}/package.xml", "<package/>")
                archive.writestr(f"{root}share/{package}/hook/path.sh", "no")
                archive.writestr(f"{root}share/ament_index/resource_index/packages/{package}", "")
        for package in underlay.INTERFACES:
            archive.writestr(f"{root}share/{package}/srv/Load.srv", "---")
            archive.writestr(f"{root}share/{package}/package.xml", "<package/>")
            archive.writestr(f"{root}rclpy/{package}/_compiled.so", "no")
        archive.writestr(f"{root}rclpy/rclpy/__init__.py", "no: this one comes from the ros-jazzy wheels")
        archive.writestr("isaacsim/exts/something/else.py", "no")


def test_only_the_listed_packages_are_taken_out_of_the_wheel(tmp_path: Path) -> None:
    make_wheel(tmp_path / "w.whl")
    venv, site, sources = tmp_path / "venv", tmp_path / "venv" / "site", tmp_path / "sources"
    underlay.extract(tmp_path / "w.whl", venv, site, sources)
    files = [p for p in tmp_path.rglob("*") if p.is_file() and p.name != "w.whl"]
    assert not [p for p in files if p.read_text().startswith("no")]
    assert (site / "launch" / "__init__.py").read_text() == "launch"
    assert (site / "ros2cli-1.0-py3.12.egg-info" / "PKG-INFO").is_file(), "plugins are found by entry points"
    assert (venv / "share" / "ament_index" / "resource_index" / "packages" / "launch_ros").is_file()
    assert (sources / "composition_interfaces" / "srv" / "Load.srv").is_file()
    assert (sources / "composition_interfaces" / "CMakeLists.txt").is_file()


def test_a_wheel_without_a_package_is_an_error_that_names_it(tmp_path: Path) -> None:
    make_wheel(tmp_path / "w.whl", leave_out="launch_yaml")
    with pytest.raises(KeyError, match=r"w\.whl: launch_yaml"):
        underlay.extract(tmp_path / "w.whl", tmp_path / "v", tmp_path / "v" / "site", tmp_path / "s")


def test_paths_of_the_build_machine_are_replaced(tmp_path: Path) -> None:
    cmake = tmp_path / "share" / "std_msgs" / "cmake" / "export.cmake"
    cmake.parent.mkdir(parents=True)
    cmake.write_text(
        'A "/opt/python/cp312-cp312/include/python3.12;'
        '/opt/python/cp312-cp312/lib/python3.12/site-packages/numpy/_core/include"'
    )
    assert underlay.fix_cmake_paths(tmp_path, "/usr/include/python3.12", "/v/numpy/include") == 1
    assert cmake.read_text() == 'A "/usr/include/python3.12;/v/numpy/include"'
    assert underlay.fix_cmake_paths(tmp_path, "/usr/include/python3.12", "/v/numpy/include") == 0


# ------------------------------------------------------------------------------------------------------ files to source


def bash(script: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(cwd)}
    return subprocess.run(["bash", "-uc", script], cwd=cwd, env=environment, capture_output=True, text=True, timeout=30)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "a checkout"
    (root / "install").mkdir(parents=True)
    (root / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(ROOT / "setup.bash", root)
    underlay.write_local_setup(root / ".venv", has_ros=True)
    (root / "install" / "setup.bash").write_text(f'[ -z "$UNSET_AS_IN_ROS" ] && . "{root}/.venv/local_setup.bash"\n')
    return root


def test_one_file_to_source_from_anywhere_twice_and_with_nounset(checkout: Path, tmp_path: Path) -> None:
    source = f'. "{checkout}/setup.bash"; '
    done = bash(f'{source}{source}echo "$-|$PATH|$AMENT_PREFIX_PATH|$ROS_DISTRO|${{_surg_root-gone}}"', tmp_path)
    assert done.stderr == ""
    flags, path, prefixes, distro, helper = done.stdout.strip().split("|")
    assert "u" in flags, "nounset is as it was"
    assert path == f"{checkout}/.venv/bin:/usr/bin:/bin"
    assert prefixes == f"{checkout}/.venv"
    assert (distro, helper) == ("jazzy", "gone")


def test_sourcing_before_set_up_says_so(checkout: Path, tmp_path: Path) -> None:
    (checkout / "install" / "setup.bash").unlink()
    done = bash(f'. "{checkout}/setup.bash" || echo "status $?"', tmp_path)
    assert done.stdout == "status 1\n"
    assert "is not set up yet: run 'make -C" in done.stderr


def test_a_sourced_ros_keeps_its_own_prefix_first(checkout: Path, tmp_path: Path) -> None:
    underlay.write_local_setup(checkout / ".venv", has_ros=False)
    done = bash(f'. "{checkout}/setup.bash"; echo "$PATH|${{AMENT_PREFIX_PATH-none}}|${{ROS_DISTRO-none}}"', tmp_path)
    assert done.stdout.strip() == f"{checkout}/.venv/bin:/usr/bin:/bin|none|none"


# -------------------------------------------------------------------------------------------- files of the repository

FILES = sorted((ROOT / "requirements").glob("*.txt"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_requirements_are_pinned_once_for_every_python_and_name_no_index(path: Path) -> None:
    lines = [line.split(" #")[0].strip() for line in path.read_text().splitlines()]
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert requirements
    assert not re.search(r"https?://|--(extra-)?index-url|--find-links", path.read_text())
    for requirement in requirements:
        assert [clause.operator for clause in requirement.specifier] == ["=="], str(requirement)
        assert requirement.url is None
    for version in ("3.10", "3.11", "3.12"):
        environment = {"python_version": version, "python_full_version": f"{version}.0"}
        names = [r.name for r in requirements if r.marker is None or r.marker.evaluate(environment)]
        assert len(names) == len(set(names)), f"a package twice for Python {version}"
        if path.stem != "constraints":  # a package may come along on some Pythons only
            assert set(names) == {r.name for r in requirements}, f"a package is missing for Python {version}"


lock = load("lock", ROOT / "scripts" / "lock.py")


def constrained() -> list[Requirement]:
    lines = (ROOT / "requirements" / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


def test_what_a_requirements_file_pins_is_not_constrained_too() -> None:
    assert not {requirement.name for requirement in constrained()} & lock.direct_names(), "run scripts/lock.py"


@pytest.mark.skipif(not list(metadata.distributions(name="ros-jazzy-rclpy")), reason="ROS 2 is not from wheels here")
def test_constraints_hold_whatever_the_requirements_bring_along() -> None:
    def needed(requirement: Requirement, extras: str = "") -> bool:
        return requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in extras.split(","))

    pinned = {requirement.name for requirement in constrained() if needed(requirement)} | lock.direct_names()
    left = [(name, "") for name in lock.direct_names()]
    seen = set(left)
    for name, extras in left:
        try:
            asked = [Requirement(text) for text in metadata.requires(name) or ()]
        except metadata.PackageNotFoundError:  # of another machine
            continue
        for requirement in asked:
            brought = lock.canonical(requirement.name), ",".join(sorted(requirement.extras))
            if needed(requirement, extras) and brought not in seen and not lock.LEFT_TO_PYTORCH.fullmatch(brought[0]):
                assert brought[0] in pinned, f"{name} brings {brought[0]}: run scripts/lock.py"
                seen.add(brought)
                left.append(brought)
    assert len(seen) > 150


def test_the_set_up_starts_on_old_pythons_to_say_that_they_are_too_old() -> None:
    for path in (ROOT / "scripts" / "setup.py", ROOT / "scripts" / "ros_underlay" / "underlay.py"):
        tree = ast.parse(path.read_text(), feature_version=(3, 7))
        assert any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body)


@pytest.mark.parametrize("path", ["package.xml", "surg_perception_msgs/package.xml"])
def test_package_xml_is_valid(path: str) -> None:
    assert check_package_xml.problems(ROOT / path) == []


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        (("<version>0.1.0</version>", ""), "version"),
        (("<license>Apache-2.0</license>", ""), "license"),
        (("</package>", ""), ""),
        (("<name>surg_perception</name>", "<name>Surg Perception</name>"), "name"),
    ],
)
def test_a_broken_package_xml_is_found(tmp_path: Path, broken: tuple[str, str], problem: str) -> None:
    path = tmp_path / "package.xml"
    text = (ROOT / "package.xml").read_text()
    assert broken[0] in text
    path.write_text(text.replace(*broken))
    assert any(problem in found for found in check_package_xml.problems(path))


def test_ci_runs_the_same_command_as_a_developer() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-1] == "make test"


def test_make_without_a_target_lists_the_targets() -> None:
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not installed")
    done = subprocess.run([make, "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, timeout=30)
    for target in ("demo", "test", "lint", "bench", "clean", "setup", "help"):
        assert re.search(rf"^  make {target}\b", done.stdout, re.M), target
