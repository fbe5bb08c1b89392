# SPDX-License-Identifier: Apache-2.0
"""ROS fixtures: every test has a ROS domain of its own, on this machine only."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

rclpy = pytest.importorskip("rclpy", reason="ROS 2 is not in the environment: `source setup.bash` first")

from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rclpy.executors import SingleThreadedExecutor
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile

_DOMAINS = itertools.count()


@pytest.fixture
def domain() -> Iterator[int]:
    """A ROS domain that no other test on this machine uses while this one runs, and not the one of the test before.

    A node that was killed is seen for 20 s, and one that a failed test's traceback refers to until the end.
    """
    for _ in range(90):
        number = 10 + next(_DOMAINS) % 90
        with socket.socket() as guard:
            try:
                guard.bind(("127.0.0.1", 42000 + number))
            except OSError:
                continue
            before = {name: os.environ.get(name) for name in ("ROS_DOMAIN_ID", "ROS_AUTOMATIC_DISCOVERY_RANGE")}
            os.environ.update(ROS_DOMAIN_ID=str(number), ROS_AUTOMATIC_DISCOVERY_RANGE="LOCALHOST")
            yield number
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
            return
    pytest.fail("no free ROS domain from 10 to 99: are other tests hanging on this machine?")


class Graph:
    """Nodes under test in this process, and a client node beside them."""

    def __init__(self, domain: int) -> None:
        self.domain = domain
        self.closing: list[Callable[[], None]] = []
        """Called when nothing spins any more, before the nodes are destroyed."""
        self._strangers: list[Any] = []
        self._clients: dict[str, Any] = {}
        self.context = rclpy.Context()
        rclpy.init(context=self.context, domain_id=domain)
        self.client = rclpy.create_node("test_client", namespace="surg_perception", context=self.context)
        self._nodes = [self.client]
        self._executors = [SingleThreadedExecutor(context=self.context)]
        self._executors[0].add_node(self.client)
        self._threads = [self._spin(self._executors[0])]

    @staticmethod
    def _spin(executor: Any) -> threading.Thread:
        thread = threading.Thread(target=executor.spin, daemon=True)
        thread.start()
        return thread

    def start(self, node_class: type, **parameters: Any) -> Any:
        """Make a node with these parameters ('__' for '.') and spin it in a thread of its own."""
        overrides = [Parameter(name.replace("__", "."), value=value) for name, value in parameters.items()]
        node = node_class(context=self.context, namespace="surg_perception", parameter_overrides=overrides)
        executor = SingleThreadedExecutor(context=self.context)
        executor.add_node(node)
        self._nodes.append(node)
        self._executors.append(executor)
        self._threads.append(self._spin(executor))
        return node

    def stranger(self) -> Any:
        """A node of another participant, as another process would have."""
        context = rclpy.Context()
        rclpy.init(context=context, domain_id=self.domain)
        self._strangers.append(rclpy.create_node("stranger", namespace="surg_perception", context=context))
        return self._strangers[-1]

    def transition(self, node: Any, *names: str) -> bool:
        """Ask for lifecycle transitions by service, as a manager would; whether the last one succeeded."""
        name = f"{node.get_fully_qualified_name()}/change_state"
        # One client a service for the whole test, waited for once: a new one for each request meets DDS discovery each
        # time, and while an earlier test's node of the same name is forgotten the graph can call a service unready
        # that answers.
        if name not in self._clients:
            self._clients[name] = self.client.create_client(ChangeState, name)
            assert self._clients[name].wait_for_service(timeout_sec=30.0), f"no service {name}"
        client = self._clients[name]
        for wanted in names:
            number = getattr(Transition, f"TRANSITION_{wanted.upper()}")
            future = client.call_async(ChangeState.Request(transition=Transition(id=number)))
            wait_until(future.done, 60.0, f"transition {wanted}")
            success = future.result().success
        return success

    def collect(self, message_type: type, topic: str, qos: Any = 100) -> list[Any]:
        """A list that fills with what is published on topic from now on."""
        messages: list[Any] = []
        profile = qos if isinstance(qos, QoSProfile) else QoSProfile(depth=qos)
        self.client.create_subscription(message_type, topic, messages.append, profile)
        return messages

    def close(self) -> None:
        for node in self._nodes[1:]:
            node.deactivate()
            node.cleanup()
        for executor in self._executors:
            executor.shutdown(timeout_sec=2.0)
        for thread in self._threads:
            thread.join(5.0)
        for close in self.closing:
            close()
        for node in self._nodes:
            node.destroy_node()
        rclpy.shutdown(context=self.context)
        for stranger in self._strangers:
            stranger.destroy_node()
            rclpy.shutdown(context=stranger.context)
        self.__dict__.clear()


@pytest.fixture
def graph(domain: int) -> Iterator[Graph]:
    """An empty ROS graph of the test's own."""
    graph = Graph(domain)
    yield graph
    graph.close()
    # A node that something still refers to stays in the ROS graph.
    gc.collect()


def wait_until(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """Wait for condition to hold and return its value; fail naming what was waited for."""
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    pytest.fail(f"waited {timeout_s:g} s in vain for: {what}")


class Spoken:
    """What nodes of this process have logged to stderr so far in the test."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd
        self._text = ""

    def lines(self, *words: str) -> list[str]:
        """Log lines that hold all of these words."""
        self._text += self._capfd.readouterr().err
        return [line for line in self._text.splitlines() if all(word in line for word in words)]


@pytest.fixture
def spoken(capfd: pytest.CaptureFixture[str]) -> Spoken:
    """The log of the nodes under test."""
    return Spoken(capfd)


class Launched:
    """`ros2 launch surg_perception pipeline.launch.py` in a process group of its own."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.log = log
        self._file = log.open("w")
        self.process = subprocess.Popen(
            ["ros2", "launch", "surg_perception", "pipeline.launch.py", *arguments],
            stdout=self._file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )

    def text(self) -> str:
        return self.log.read_text()

    def pids(self, executable: str) -> list[int]:
        """Processes of this launch that run a node's executable."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                command = (folder / "cmdline").read_bytes()
                if executable.encode() in command and os.getsid(int(folder.name)) == self.process.pid:
                    found.append(int(folder.name))
            except (OSError, ProcessLookupError):
                continue
        return found

    def stop(self) -> int:
        """End it as Ctrl-C does; returns its exit status."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)  # as a terminal does: launch and its nodes
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
                pytest.fail(f"the launch did not end on SIGINT:\n{self.text()}")
        self._file.close()
        return self.process.returncode


@pytest.fixture
def launched(tmp_path: Path, domain: int) -> Iterator[Any]:
    """Start the launch file with arguments, without vqa unless they name it; stopped at the end of the test."""
    running: list[Launched] = []

    def start(*arguments: str) -> Launched:
        vqa = () if any(argument.startswith("vqa") for argument in arguments) else ("vqa:=false",)
        running.append(Launched(tmp_path / f"launch{len(running)}.log", *arguments, *vqa))
        return running[-1]

    yield start
    for one in running:
        one.stop()
