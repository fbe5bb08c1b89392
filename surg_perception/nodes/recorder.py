# SPDX-License-Identifier: Apache-2.0
"""Records a live graph into a bag: one thread receives bytes, another one encodes, blanks and writes."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions

from surg_perception.data.bag_writer import BagWriter, Qos
from surg_perception.data.bags import IMAGE_TYPES
from surg_perception.data.deidentify import Rectangle, Shown
from surg_perception.data.recorded_messages import EPOCH_NS, PrivateMessages, SharedMessages

try:
    from rclpy.event_handler import SubscriptionEventCallbacks, UnsupportedEventTypeError
except ImportError:  # Humble
    from rclpy.qos_event import SubscriptionEventCallbacks, UnsupportedEventTypeError

TOPICS = {
    "image": "",
    "phase": "phase/phase",
    "labels": "phase/labels",
    "latent": "phase/latent",
    "novelty": "phase/novelty",
    "answers": "vqa/answered",
    "truth": "source/truth",
}
"""Short names of what can be recorded, with the topic in the nodes' namespace; the image's is looked for."""
NOT_SHARED = ("latent", "answers")
"""Short names that are left out of a shared recording unless they are asked for."""

_DISCOVERY_S = 0.2
_PROGRESS_S = 0.2
_FLUSH_S = 1.0
_IMAGE_QUEUE_BYTES, _OTHER_QUEUE_BYTES = 256 << 20, 256 << 20
_QUEUE_MESSAGES = 20_000
_IMAGE_DEPTH, _DEPTH = 10, 100


@dataclass(frozen=True)
class RecordOptions:
    """What to record and how.

    Attributes:
        folder: of the new bag.
        namespace: of the nodes.
        topics: short names (TOPICS) and full topic names.
        image: the image topic; empty: the one that the nodes take.
        seconds: end so long after the first image; 0: at Ctrl-C.
        jpeg_quality: of images that come raw, 1 to 100; 0 writes them as they are.
        max_bytes, split_bytes: size of the bag and of each file; 0: no limit.
        min_free_bytes: of the disk that stay free.
        share, rectangles, shift_times: as SharedMessages; without share nothing is changed.
    """

    folder: Path
    namespace: str = "surg_perception"
    topics: tuple[str, ...] = tuple(TOPICS)
    image: str = ""
    seconds: float = 0.0
    jpeg_quality: int = 90
    max_bytes: int = 0
    split_bytes: int = 1 << 30
    min_free_bytes: int = 2 << 30
    share: bool = False
    rectangles: tuple[Rectangle, ...] = ()
    shift_times: bool = True


@dataclass
class Progress:
    """What has been recorded so far.

    Attributes:
        seconds: since the first image (the first message, where no image is wanted).
        bytes: in the bag.
        messages: written, by topic in the bag.
        images: written.
        dropped: messages that came faster than they could be encoded and written.
        lost: messages that did not reach the recorder, as far as the middleware reports it.
        unreadable: messages and images that could not be decoded, by the reason.
        shown: images of a shared recording by what became of them; empty otherwise.
        refused: topics that cannot be recorded, with the reason.
        missing: topics that were wanted and from which nothing came.
        waiting_for: what has no publisher yet; empty when images come.
        stopped_because: why it ended.
        failed: whether that was a fault: the disk is full or takes nothing.
    """

    seconds: float = 0.0
    bytes: int = 0
    messages: dict[str, int] = field(default_factory=dict)
    images: int = 0
    dropped: int = 0
    lost: int = 0
    unreadable: dict[str, int] = field(default_factory=dict)
    shown: dict[Shown, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    waiting_for: str = ""
    stopped_because: str = ""
    failed: bool = False


def record(options: RecordOptions, on_progress: Callable[[Progress], None] = lambda progress: None) -> Progress:
    """Record until the time is over, a limit is reached, or Ctrl-C or SIGTERM.

    Args:
        on_progress: called a few times a second.

    Raises:
        ValueError: folder is there already, too little of the disk is free, or a topic cannot be recorded.
        OSError: the folder cannot be made.
    """
    with _noted_signals() as signals, ExitStack() as undo:
        sink = _Sink(options)
        undo.callback(sink.close)
        context = rclpy.Context()
        # Ctrl-C must leave time to write what waits; rclpy's own handler would take the connection down first.
        rclpy.init(context=context, signal_handler_options=SignalHandlerOptions.NO)
        undo.callback(rclpy.shutdown, context=context)
        node = rclpy.create_node(f"record_{os.getpid()}", namespace=options.namespace, context=context)
        undo.callback(node.destroy_node)
        executor = SingleThreadedExecutor(context=context)
        undo.callback(executor.shutdown, timeout_sec=1.0)
        executor.add_node(node)
        receiver = _Receiver(node, options, sink)
        next_look_s = next_progress_s = 0.0
        while not (why := _why_end(signals, options, sink)):
            executor.spin_once(timeout_sec=0.05)
            now_s = time.monotonic()
            if now_s >= next_look_s:
                next_look_s = now_s + _DISCOVERY_S
                receiver.look()
            if now_s >= next_progress_s:
                next_progress_s = now_s + _PROGRESS_S
                on_progress(_progress(sink, receiver))
        receiver.stop()
        sink.close()
        progress = _progress(sink, receiver)
        progress.stopped_because, progress.failed = sink.fault or why, bool(sink.fault)
        progress.waiting_for = ""
        return progress


def _why_end(signals: list[int], options: RecordOptions, sink: _Sink) -> str:
    if signals:
        return signal.Signals(signals[0]).name
    if sink.fault:
        return sink.fault
    if options.seconds and sink.seconds >= options.seconds:
        return f"{options.seconds:g} s are over"
    if sink.full:
        return f"the bag has reached {options.max_bytes / 1e6:.0f} MB (--max-size)"
    return ""


def _progress(sink: _Sink, receiver: _Receiver) -> Progress:
    shown = sink.messages.shown if isinstance(sink.messages, SharedMessages) else {}
    return Progress(
        seconds=sink.seconds,
        bytes=sink.bytes,
        messages=dict(sink.counts),
        images=sink.images,
        dropped=sink.dropped,
        lost=receiver.lost,
        unreadable=dict(sink.messages.unreadable),
        shown=shown,
        refused=dict(receiver.refused),
        missing=receiver.missing,
        waiting_for=receiver.waiting_for,
    )


@contextmanager
def _noted_signals() -> Iterator[list[int]]:
    """A list that grows with each SIGINT and SIGTERM; from the second Ctrl-C on they raise as usual."""
    noted: list[int] = []

    def note(number: int, frame: object) -> None:
        noted.append(number)
        if len(noted) > 1 and number == signal.SIGINT:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield noted  # they never arrive there
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Sink:
    """The bag, and the thread that encodes and writes to it.

    Attributes:
        messages: what changes messages on their way.
        fault: why writing ended; empty while it goes on.
    """

    def __init__(self, options: RecordOptions) -> None:
        self.messages: PrivateMessages | SharedMessages
        if options.share:
            self.names: dict[str, str] = {}
            self.messages = SharedMessages(
                self.names,
                jpeg_quality=options.jpeg_quality,
                rectangles=options.rectangles,
                shift_times=options.shift_times,
            )
        else:
            self.messages = PrivateMessages(options.jpeg_quality)
        self.fault = ""
        self.full = False
        self.images = self.dropped = self.bytes = 0
        self.counts: dict[str, int] = {}
        self._options = options
        self._first_s: float | None = None
        self._last_s = 0.0
        self._queue: deque[tuple[str, str, int, bytes] | tuple[str, str, Sequence[Qos]]] = deque()
        self._queued_bytes = [0, 0]
        """Of images [1] and of all else [0], so that neither takes the other's room."""
        self._changed = threading.Condition()
        self._closed = False
        self._check_disk(options.folder.expanduser().absolute())
        if self.fault:
            raise ValueError(f"not started: {self.fault}")
        self._bag = BagWriter(options.folder.expanduser(), split_bytes=options.split_bytes)
        self._thread = threading.Thread(target=self._work, name="bag writer", daemon=True)
        self._thread.start()

    @property
    def seconds(self) -> float:
        """Since the first image, or message."""
        return 0.0 if self._first_s is None else (self._last_s if self._closed else time.monotonic()) - self._first_s

    # The executor's thread ------------------------------------------------------------------------------------------

    def announce(self, topic: str, msgtype: str, qos: Sequence[Qos]) -> None:
        """Say what the publishers of a topic in the bag offer, before its first message."""
        with self._changed:
            self._queue.append((topic, msgtype, qos))
            self._changed.notify()

    def take(self, topic: str, msgtype: str, raw: bytes) -> None:
        """Take a message that has just come."""
        log_ns = time.time_ns()
        image = msgtype in IMAGE_TYPES
        with self._changed:
            if self._closed or self.fault or self.full:
                return
            waiting, limit = self._queued_bytes[image], _IMAGE_QUEUE_BYTES if image else _OTHER_QUEUE_BYTES
            if (waiting and waiting + len(raw) > limit) or len(self._queue) >= _QUEUE_MESSAGES:
                self.dropped += 1
                return
            self._queue.append((topic, msgtype, log_ns, raw))
            self._queued_bytes[image] += len(raw)
            if self._first_s is None and (image or "image" not in self._options.topics):
                self._first_s = time.monotonic()
            self._changed.notify()

    def close(self) -> None:
        """Write what waits and finish the bag; a bag in which nothing is is taken away."""
        with self._changed:
            if self._closed:
                return
            self._last_s = time.monotonic()
            self._closed = True
            self._changed.notify()
        self._thread.join()

    # The writer's thread --------------------------------------------------------------------------------------------

    def _work(self) -> None:
        flushed_s = time.monotonic()
        try:
            while (item := self._next()) is not None:
                if item and not self.full:
                    self._write(item)
                if time.monotonic() - flushed_s >= _FLUSH_S:
                    flushed_s = time.monotonic()
                    self._bag.flush()
                    self._check_disk(self._bag.folder)
                self.bytes = self._bag.bytes_written
                self.full = self.full or bool(self._options.max_bytes and self.bytes >= self._options.max_bytes)
                if self.fault:
                    break
        except OSError as error:
            self.fault = f"{self._bag.folder} cannot be written: {error.strerror or error}"
        except Exception as error:  # a message that is not what its type says must not leave the bag unfinished
            self.fault = f"a message could not be written: {type(error).__name__}: {error}"
        finally:
            self._finish()

    def _next(self) -> tuple[Any, ...] | None:
        """What is next in the queue; () when nothing came for a while, None when there will be nothing more."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed, timeout=_FLUSH_S)
            if not self._queue:
                return None if self._closed else ()
            item = self._queue.popleft()
            if len(item) == 4:
                self._queued_bytes[item[1] in IMAGE_TYPES] -= len(item[3])
            return item

    def _write(self, item: tuple[Any, ...]) -> None:
        if len(item) == 3:
            self._bag.add_topic(*item)
            return
        recorded = self.messages(*item)
        if recorded is not None:
            self._bag.write(recorded.topic, recorded.msgtype, recorded.log_ns, recorded.raw)
            self.counts[recorded.topic] = self.counts.get(recorded.topic, 0) + 1
            self.images += recorded.msgtype in IMAGE_TYPES

    def _finish(self) -> None:
        try:
            self._bag.close()
            if self._options.share and self._options.shift_times:
                for path in (*self._bag.folder.iterdir(), self._bag.folder):  # an archive would tell their dates
                    os.utime(path, ns=(EPOCH_NS, EPOCH_NS))
        except OSError as error:
            self.fault = self.fault or f"{self._bag.folder} cannot be finished: {error.strerror or error}"
        self.bytes = self._bag.bytes_written
        if not self.counts:
            shutil.rmtree(self._bag.folder, ignore_errors=True)

    def _check_disk(self, folder: Path) -> None:
        while not folder.exists():
            folder = folder.parent
        free, least = shutil.disk_usage(folder).free, self._options.min_free_bytes
        if free < least:
            self.fault = (
                f"the disk of {folder} has {free / 1e6:.0f} MB free, {least / 1e6:.0f} MB must stay free (--min-free)"
            )


@dataclass
class _Wanted:
    """A topic to be recorded, and its subscription once somebody publishes there."""

    topic: str
    msgtype: str = ""
    qos: QoSProfile | None = None
    subscription: Any = None
    came: int = 0


class _Receiver:
    """Subscriptions as raw bytes, each as its publishers offer; looks again for publishers that come later."""

    def __init__(self, node: Node, options: RecordOptions, sink: _Sink) -> None:
        self.refused: dict[str, str] = {}
        self.lost = 0
        self._node, self._options, self._sink = node, options, sink
        self._wanted: dict[str, _Wanted] = {}
        for name in options.topics:
            if name == "image":
                if options.image:
                    self._wanted[name] = _Wanted(node.resolve_topic_name(options.image))
            else:
                topic = TOPICS.get(name, name)
                self._wanted[name] = _Wanted(node.resolve_topic_name(topic))
        self._announced: Counter[str] = Counter()

    @property
    def missing(self) -> list[str]:
        """Short names and topics from which nothing came."""
        return [name for name in self._options.topics if name not in self._wanted or not self._wanted[name].came]

    @property
    def waiting_for(self) -> str:
        """What the image, or else everything, waits for; empty when something comes."""
        if "image" in self._options.topics:
            image = self._wanted.get("image")
            if image is None or not image.came:
                return f"an image on {image.topic}" if image else f"an image in /{self._options.namespace.strip('/')}"
            return ""
        return "" if any(wanted.came for wanted in self._wanted.values()) else "a first message"

    def look(self) -> None:
        """Subscribe to what has publishers by now, and anew where what they offer has changed."""
        if "image" in self._options.topics and "image" not in self._wanted:
            topic = self._find_image()
            if topic:
                self._wanted["image"] = _Wanted(topic)
        for name, wanted in self._wanted.items():
            if wanted.topic in self.refused:
                continue
            publishers = self._node.get_publishers_info_by_topic(wanted.topic)
            if publishers:
                self._subscribe(name, wanted, publishers)

    def stop(self) -> None:
        """Take no more."""
        for wanted in self._wanted.values():
            if wanted.subscription is not None:
                self._node.destroy_subscription(wanted.subscription)

    def _find_image(self) -> str:
        """The image topic that the nodes of the namespace take, or the namespace's own with a publisher."""
        namespace = self._node.get_namespace()
        here = [name for name, space in self._node.get_node_names_and_namespaces() if space == namespace]
        for name in [node for node in ("phase", "vqa", "overlay") if node in here]:
            try:
                topics = self._node.get_subscriber_names_and_types_by_node(name, namespace)
            except RuntimeError:  # it has gone meanwhile
                continue
            for topic, types in topics:
                if set(types) & set(IMAGE_TYPES):
                    return topic
        for topic in ("image", "image/compressed"):
            full = self._node.resolve_topic_name(topic)
            if self._node.get_publishers_info_by_topic(full):
                return full
        return ""

    def _subscribe(self, name: str, wanted: _Wanted, publishers: Sequence[Any]) -> None:
        msgtype = publishers[0].topic_type
        qos = _matching(publishers, _IMAGE_DEPTH if msgtype in IMAGE_TYPES else _DEPTH)
        if wanted.subscription is not None and qos == wanted.qos:
            return
        try:
            self._announce(name, wanted.topic, msgtype, publishers)
            message_class = _message_class(msgtype)
        except (ValueError, ImportError, AttributeError) as error:
            self.refused[wanted.topic] = str(error)
            return
        if wanted.subscription is not None:
            self._node.destroy_subscription(wanted.subscription)

        def take(raw: bytes) -> None:
            wanted.came += 1
            self._sink.take(wanted.topic, msgtype, raw)

        wanted.msgtype, wanted.qos = msgtype, qos
        arguments = (message_class, wanted.topic, take, qos)
        try:
            events = SubscriptionEventCallbacks(message_lost=self._count_lost)
            wanted.subscription = self._node.create_subscription(*arguments, event_callbacks=events, raw=True)
        except UnsupportedEventTypeError:
            wanted.subscription = self._node.create_subscription(*arguments, raw=True)

    def _count_lost(self, event: Any) -> None:
        self.lost += event.total_count_change

    def _announce(self, name: str, topic: str, msgtype: str, publishers: Sequence[Any]) -> None:
        if self._announced[topic]:
            return
        if self._options.share:
            self._sink.names[topic] = self._shared_name(name)
        outgoing, kept_type = self._sink.messages.outgoing(topic, msgtype)
        offered = {
            Qos(
                reliable=publisher.qos_profile.reliability == ReliabilityPolicy.RELIABLE,
                transient_local=publisher.qos_profile.durability == DurabilityPolicy.TRANSIENT_LOCAL,
            ): None
            for publisher in publishers
        }
        self._sink.announce(outgoing, kept_type, tuple(offered))
        self._announced[topic] = 1

    def _shared_name(self, name: str) -> str:
        if name in TOPICS:
            return f"/surg_perception/{TOPICS[name] or name}"
        return f"/surg_perception/topic_{self._options.topics.index(name) + 1}"  # its own name can name somebody


def _matching(publishers: Sequence[Any], depth: int) -> QoSProfile:
    """The strictest QoS that each of the publishers fits."""
    reliable = all(p.qos_profile.reliability == ReliabilityPolicy.RELIABLE for p in publishers)
    latched = all(p.qos_profile.durability == DurabilityPolicy.TRANSIENT_LOCAL for p in publishers)
    return QoSProfile(
        depth=depth,
        reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT,
        durability=DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE,
    )


def _message_class(msgtype: str) -> Any:
    package, kind, name = msgtype.split("/")
    return getattr(importlib.import_module(f"{package}.{kind}"), name)
