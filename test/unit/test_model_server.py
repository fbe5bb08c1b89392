# SPDX-License-Identifier: Apache-2.0
"""Models on a server: the repository, a real Triton, and servers that answer what they should not."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx_graphs import CHANNELS, CLASSES, SmallNetwork, graph_of, write_folder
from triton_server import TritonServer, free_port

from surg_perception.cli.main import parser
from surg_perception.models import ModelCard, ModelError, find_model, sha256_of
from surg_perception.runtime import BackendUnavailable, InferenceError, available_backends, open_backend
from surg_perception.runtime.agreement import reference_frames
from surg_perception.runtime.model_repository import ModelServer, repository_version, write_repository

if TYPE_CHECKING:
    from impostor_server import Impostor

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("grpc", "tritonclient")),
    reason="tritonclient is not installed: make setup-test",
)

TIMEOUT_S = 30.0
"""Of a server that is meant to answer, on a loaded machine too."""


@pytest.fixture(scope="module")
def network() -> SmallNetwork:
    return SmallNetwork.random()


@pytest.fixture(scope="module")
def card(network: SmallNetwork, tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    return write_folder(tmp_path_factory.mktemp("models") / "small", graph_of(network))


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    """Another graph under the same name."""
    return write_folder(tmp_path_factory.mktemp("newer") / "small", graph_of(SmallNetwork.random(1)))


@pytest.fixture(scope="module")
def frames() -> NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (40, 224, 224, 3), np.uint8) // np.array([1, 2, 4], np.uint8)


# The repository -----------------------------------------------------------------------------------------------


def read_config(path: Path) -> Any:
    """A model's config.pbtxt as Triton's own `ModelConfig`."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())


def test_the_version_is_the_graphs_sha256(card: ModelCard, newer: ModelCard) -> None:
    version = int(repository_version(card))
    assert sha256_of(card.graph_path).startswith(f"{version:012x}")
    assert version < 2**48
    assert repository_version(newer) != repository_version(card)
    with pytest.raises(ModelError, match="surg-perception export onnx"):
        repository_version(replace(card, graph=None))


def test_the_command_writes_a_repository(card: ModelCard, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tritonclient.grpc import model_config_pb2

    options = parser().parse_args(
        ["export", "triton", str(card.folder), "--out", str(tmp_path / "repo"), "--instances", "2"]
    )
    assert options.run(options) == 0
    version = tmp_path / "repo" / "small" / repository_version(card)
    assert str(version) in capsys.readouterr().out
    assert sha256_of(version / "model.onnx") == card.graph.sha256
    config = read_config(version.parent / "config.pbtxt")
    assert (config.name, config.backend, config.default_model_filename) == ("small", "onnxruntime", "model.onnx")
    assert [(t.name, t.data_type, list(t.dims)) for t in config.input] == [
        ("frame", model_config_pb2.TYPE_UINT8, [224, 224, 3])
    ]
    assert [(t.name, t.data_type, list(t.dims)) for t in config.output] == [
        ("probabilities", model_config_pb2.TYPE_FP32, [CLASSES]),
        ("latent", model_config_pb2.TYPE_FP32, [CHANNELS, 4, 4]),
    ]
    assert config.version_policy.HasField("all")
    (group,) = config.instance_group
    assert (group.kind, group.count) == (group.KIND_AUTO, 2)
    assert config.HasField("dynamic_batching")
    assert (version.parent / "labels.txt").read_text().split() == list(card.labels.names)
    assert find_model(version.parent).graph == card.graph
    served = json.loads((tmp_path / "repo" / "config.json").read_text())["model_config_list"]
    assert [(m["config"]["name"], m["config"]["model_version_policy"]) for m in served] == [("small", {"all": {}})]
    readme = (tmp_path / "repo" / "README.md").read_text()
    assert f"| small | {version.name} | {card.graph.sha256} |" in readme
    assert "tritonserver --model-repository" in readme


def test_versions_stand_side_by_side_and_are_never_changed(card: ModelCard, newer: ModelCard, tmp_path: Path) -> None:
    first = write_repository(card, tmp_path)
    config = tmp_path / "small" / "config.pbtxt"
    config.write_text(config.read_text().replace("count: 1", "count: 3"))
    second = write_repository(newer, tmp_path)
    assert write_repository(card, tmp_path) == first
    assert {path.name for path in (tmp_path / "small").iterdir() if path.is_dir()} == {first.name, second.name}
    assert "count: 3" in config.read_text(), "what was tuned is gone"
    write_repository(replace(card, name="another"), tmp_path)
    served = json.loads((tmp_path / "config.json").read_text())["model_config_list"]
    assert [model["config"]["name"] for model in served] == ["another", "small"]
    readme = (tmp_path / "README.md").read_text()
    assert all(f" {version.name} |" in readme for version in (first, second))

    (first / "model.onnx").write_bytes((second / "model.onnx").read_bytes())
    with pytest.raises(ModelError, match=rf"sha256 is {newer.graph.sha256}, expected {card.graph.sha256}"):
        write_repository(card, tmp_path)


def test_a_model_with_other_phases_cannot_stand_beside(card: ModelCard, network: SmallNetwork, tmp_path: Path) -> None:
    write_repository(card, tmp_path / "repo")
    without_head = write_folder(tmp_path / "small", graph_of(network, head=False), head=False)
    with pytest.raises(ModelError, match="other phases or another latent"):
        write_repository(without_head, tmp_path / "repo")
    renamed = replace(card, labels=replace(card.labels, names=tuple("abcde")))
    with pytest.raises(ModelError, match="other phases or another latent"):
        write_repository(renamed, tmp_path / "repo")
    write_repository(without_head, tmp_path / "other")
    config = read_config(tmp_path / "other/small/config.pbtxt")
    assert [output.name for output in config.output] == ["latent"]


def test_a_damaged_graph_is_not_exported(card: ModelCard, tmp_path: Path) -> None:
    shutil.copytree(card.folder, tmp_path / "small")
    with (tmp_path / "small" / "model.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ModelError, match="sha256"):
        write_repository(find_model(tmp_path / "small"), tmp_path / "repo")
    assert not (tmp_path / "repo").exists()
    with pytest.raises(ValueError, match="instances is 0"):
        write_repository(card, tmp_path / "repo", instances=0)


def test_export_onnx_makes_the_graph_of_a_folder_of_weights(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    original = find_model("gsvit_m0_phantom")
    weights_only = tmp_path / original.name
    weights_only.mkdir()
    for file in (original.folder / "model.yaml", original.weights_path):
        shutil.copy(file, weights_only)
    replace(
        original, folder=weights_only, graph=None, temporal=None, temporal_file=None, forecast=None, forecast_file=None
    ).write()
    options = parser().parse_args(["export", "onnx", str(weights_only)])
    assert options.run(options) == 0
    made = find_model(weights_only)
    made.verify()
    with open_backend(made, "onnxruntime") as new, open_backend(original, "onnxruntime") as old:
        for found, expected in zip(new.infer(reference_frames()[0]), old.infer(reference_frames()[0]), strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-3)
    with pytest.raises(ValueError, match="has a graph already"):
        options.run(options)


@pytest.mark.parametrize(
    "url", ["", "server:8001", "http://server:8001", "grpc://server", "grpc://server:x", "grpc://:8001", "grpc://a:1/b"]
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"expected grpc://host:port"):
        ModelServer(url)


def test_settings_that_make_no_sense_are_refused() -> None:
    for timeout_s in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="timeout"):
            ModelServer("grpc://server:8001", timeout_s)
    with pytest.raises(ValueError, match="version"):
        ModelServer("grpc://server:8001", version="1/2")
    assert ModelServer("grpcs://server:8001").secure
    assert ModelServer("grpc://[::1]:8001").target == "[::1]:8001"


# The choice ---------------------------------------------------------------------------------------------------


def test_no_frame_leaves_the_machine_without_an_address(card: ModelCard) -> None:
    assert available_backends()["triton"] is None
    with open_backend(card) as opened:
        assert opened.device == "CPU"
        assert not any("triton" in note for note in opened.notes)
    with pytest.raises(BackendUnavailable, match=r"no address of a model server is given; set runtime\.server_url"):
        open_backend(card, "triton", allow_fallback=False)
    with pytest.raises(BackendUnavailable, match="ask for fp32, not bf16"):
        open_backend(card, "triton", "bf16", allow_fallback=False, server=ModelServer("grpc://localhost:1"))


def test_a_server_that_is_not_there(card: ModelCard) -> None:
    nobody = ModelServer(f"grpc://127.0.0.1:{free_port()}")
    with pytest.raises(BackendUnavailable, match=rf"{nobody.url} is away .*is the server running"):
        open_backend(card, "triton", allow_fallback=False, server=nobody)
    with open_backend(card, "triton", server=nobody) as opened:
        assert opened.device == "CPU"
        assert any(f"{nobody.url} is away" in note for note in opened.notes)
    with open_backend(card, server=nobody) as opened:
        assert opened.device == "CPU"
        assert any(f"{nobody.url} is away" in note for note in opened.notes)


# A real server ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def triton(card: ModelCard, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A running server with the small model and the shipped one. Tests leave it as they found it."""
    server = TritonServer(tmp_path_factory.mktemp("triton"))
    write_repository(card, server.repository)
    write_repository(find_model("gsvit_m0_phantom"), server.repository)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def own_triton(card: ModelCard, tmp_path: Path) -> Iterator[TritonServer]:
    """A server that the test may stop, with the small model; not started."""
    server = TritonServer(tmp_path)
    write_repository(card, server.repository)
    yield server
    server.stop(kill=True)


@pytest.mark.parametrize("name", ["small", "gsvit_m0_phantom"])
def test_a_server_gives_the_numbers_of_this_machine(
    name: str, card: ModelCard, frames: NDArray[np.uint8], triton: TritonServer
) -> None:
    model = card if name == "small" else find_model(name)
    pictures = frames if name == "small" else reference_frames()[::5]
    with (
        open_backend(model, "auto", server=ModelServer(triton.url, TIMEOUT_S)) as remote,
        open_backend(model, "onnxruntime") as local,
    ):
        assert remote.name == "triton:REMOTE:fp32"
        assert any("agrees with openvino:CPU:fp32" in note for note in remote.notes)
        assert any(f"{name} version {repository_version(model)} at {triton.url}" in note for note in remote.notes)
        for found, expected in zip(remote.infer_batch(pictures), local.infer_batch(pictures), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=5e-5)
        mirrored = pictures[0][:, ::-1]
        for found, expected in zip(remote.infer(mirrored), local.infer(mirrored), strict=True):
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=5e-5)
            found[:] = 7  # the caller's own
        np.testing.assert_allclose(remote.infer(mirrored)[0], local.infer(mirrored)[0], atol=5e-5)
    with pytest.raises(InferenceError, match="is closed"):
        remote.infer(pictures[0])


def test_two_rooms_at_once_each_get_their_own_answers(
    card: ModelCard, frames: NDArray[np.uint8], triton: TritonServer
) -> None:
    with open_backend(card, "onnxruntime") as local:
        expected = local.infer_batch(frames)
    assert np.abs(expected[1][:, None] - expected[1][None]).max(axis=(2, 3, 4))[~np.eye(40, dtype=bool)].min() > 1e-3
    gate = threading.Barrier(2)

    def room(first: int) -> int:
        answers = 0
        with open_backend(card, "triton", allow_fallback=False, server=ModelServer(triton.url, TIMEOUT_S)) as opened:
            gate.wait(120)
            for _ in range(4):
                for index in range(first, 40, 2):
                    p, z = opened.infer(frames[index])
                    np.testing.assert_allclose(p, expected[0][index], atol=5e-5)
                    np.testing.assert_allclose(z, expected[1][index], atol=5e-5)
                    answers += 1
        return answers

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(room, (0, 1))) == [80, 80]


def test_a_version_that_the_server_does_not_have_is_refused(
    card: ModelCard, newer: ModelCard, triton: TritonServer
) -> None:
    server = ModelServer(triton.url, TIMEOUT_S)
    found, expected = repository_version(card), repository_version(newer)
    text = rf"'small' versions {found}, expected version {expected}, the graph of {newer.model_id}"
    with pytest.raises(BackendUnavailable, match=text):
        open_backend(newer, "triton", allow_fallback=False, server=server)
    with open_backend(newer, "triton", server=server) as opened:
        assert opened.device == "CPU"
    with pytest.raises(BackendUnavailable, match=rf"versions {found}, expected version 3;"):
        open_backend(card, "triton", allow_fallback=False, server=replace(server, version="3"))
    with pytest.raises(BackendUnavailable, match="'nobodys' no such model"):
        open_backend(replace(card, name="nobodys"), "triton", allow_fallback=False, server=server)
    # The right number over the wrong graph: only the outputs tell.
    with pytest.raises(BackendUnavailable, match="disagrees with openvino:CPU:fp32"):
        open_backend(newer, "triton", allow_fallback=False, server=replace(server, version=found))


def test_a_room_with_the_card_alone(
    card: ModelCard, frames: NDArray[np.uint8], triton: TritonServer, tmp_path: Path
) -> None:
    shutil.copy(card.folder / "model.yaml", tmp_path)
    thin = find_model(tmp_path)
    server = ModelServer(triton.url, TIMEOUT_S)
    with open_backend(thin, "triton", allow_fallback=False, server=server) as remote, open_backend(card) as local:
        assert any("only with itself" in note and "model.onnx is not here" in note for note in remote.notes)
        np.testing.assert_allclose(remote.infer(frames[0])[0], local.infer(frames[0])[0], atol=5e-5)
    numbered = replace(server, version=repository_version(card))
    with pytest.raises(BackendUnavailable, match="does not say which graph it is"):
        open_backend(thin, "triton", allow_fallback=False, server=numbered)


def test_an_answer_that_comes_late_is_never_taken_for_a_later_frames(
    card: ModelCard, frames: NDArray[np.uint8], own_triton: TritonServer
) -> None:
    own_triton.start()
    delay = own_triton.repository / "small" / "delay_s"
    with (
        open_backend(card, "triton", allow_fallback=False, server=ModelServer(own_triton.url, 5.0)) as opened,
        open_backend(card, "onnxruntime") as local,
    ):
        delay.write_text("30")
        started_s = time.monotonic()
        # 10 s where the machine is so slow that the connection is checked first, with two frames.
        with pytest.raises(InferenceError, match=rf"no answer from {own_triton.url} within (5|10) s"):
            opened.infer(frames[0])
        assert time.monotonic() - started_s < 25
        delay.unlink()
        end_s = time.monotonic() + 120
        while True:
            try:
                found = opened.infer(frames[1])
                break
            except InferenceError:
                assert time.monotonic() < end_s
        np.testing.assert_allclose(found[1], local.infer(frames[1])[1], atol=5e-5)


def test_a_server_that_dies_restarts_and_changes(
    card: ModelCard, newer: ModelCard, frames: NDArray[np.uint8], own_triton: TritonServer
) -> None:
    own_triton.start()
    folder = own_triton.repository / "small"
    server = ModelServer(own_triton.url, TIMEOUT_S)
    with open_backend(card, "onnxruntime") as local:
        expected = [local.infer(frame)[1] for frame in frames[:4]]
    with open_backend(card, "triton", allow_fallback=False, server=server) as opened:
        np.testing.assert_allclose(opened.infer(frames[0])[1], expected[0], atol=5e-5)

        # Dies with the request under way.
        (folder / "delay_s").write_text("600")
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(opened.infer, frames[1])
            end_s = time.monotonic() + TIMEOUT_S
            while not (folder / "running").exists() and time.monotonic() < end_s:
                time.sleep(0.05)
            started_s = time.monotonic()
            own_triton.stop(kill=True)
            with pytest.raises(InferenceError, match=f"triton:REMOTE:fp32: .*{own_triton.url} is away"):
                answer.result(TIMEOUT_S)
            assert time.monotonic() - started_s < 15, "the loss was seen by the timeout only"
        (folder / "delay_s").unlink()
        with pytest.raises(InferenceError, match="is away"):
            opened.infer(frames[1])

        # Comes back.
        own_triton.start()
        np.testing.assert_allclose(opened.infer(frames[2])[1], expected[2], atol=5e-5)

        # Restarts between two frames.
        own_triton.stop()
        own_triton.start()
        np.testing.assert_allclose(opened.infer(frames[3])[1], expected[3], atol=5e-5)

        # Comes back with another graph under the same number, between two frames.
        own_triton.stop()
        graph = folder / repository_version(card) / "model.onnx"
        graph.write_bytes(newer.graph_path.read_bytes())
        own_triton.start()
        for _ in range(2):
            with pytest.raises(InferenceError, match="has come back with another model"):
                opened.infer(frames[0])

        # And with the right one again, but under another number alone.
        own_triton.stop()
        shutil.rmtree(graph.parent)
        write_repository(newer, own_triton.repository)
        own_triton.start()
        with pytest.raises(InferenceError, match=f"expected version {repository_version(card)}"):
            opened.infer(frames[0])

    # What a node does that may fall back.
    with open_backend(card, "auto", exclude=[opened.name], server=server) as fallen:
        assert fallen.device == "CPU"
        assert f"{opened.name}: excluded" in fallen.notes


# Servers that answer what they should not ---------------------------------------------------------------------


@pytest.fixture
def impostor(card: ModelCard, network: SmallNetwork) -> Iterator[tuple[Impostor, ModelServer]]:
    from impostor_server import Impostor, serving

    servicer = Impostor(network, repository_version(card))
    with serving(servicer) as port:
        yield servicer, ModelServer(f"grpc://127.0.0.1:{port}", TIMEOUT_S)


def _set(**fields: Any) -> Callable[[Any], None]:
    def spoil(reply: Any) -> None:
        for name, value in fields.items():
            setattr(reply, name, value)

    return spoil


def _first_output(**fields: Any) -> Callable[[Any], None]:
    def spoil(reply: Any) -> None:
        for name, value in fields.items():
            if name == "shape":
                reply.outputs[0].shape[:] = value
            else:
                setattr(reply.outputs[0], name, value)

    return spoil


def _values(change: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> Callable[[Any], None]:
    def spoil(reply: Any) -> None:
        reply.raw_output_contents[1] = change(np.frombuffer(reply.raw_output_contents[1], np.float32)).tobytes()

    return spoil


ANSWERS: dict[str, tuple[Callable[[Any], None], str]] = {
    "another request's": (_set(id="room 2"), r"answers with id 'room 2', expected '\w+-\d+'"),
    "no request's": (_set(id=""), "answers with id ''"),
    "another model's": (_set(model_name="other"), "answers with model_name 'other', expected 'small'"),
    "another version's": (_set(model_version="7"), r"answers with model_version '7', expected '\d+'"),
    "of another type": (_first_output(datatype="FP64"), r"'probabilities' FP64 \[., 5\] in .0 bytes, expected FP32"),
    "of another shape": (
        _first_output(shape=[5, 1]),
        r"'probabilities' FP32 \[5, 1\] in .0 bytes, expected FP32 \[., 5",
    ),
    "cut short": (
        _values(lambda values: values[:-1]),
        r"'latent' FP32 \[., 8, 4, 4\] in (508|1020) bytes, expected FP32",
    ),
    "nameless": (_first_output(name="scores"), r"'probabilities' nothing, expected FP32 \[., 5\]"),
    "not finite": (_values(lambda values: values * np.float32(np.nan)), "NaN or infinity"),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_a_wrong_answer_is_thrown_away(
    kind: str, card: ModelCard, frames: NDArray[np.uint8], impostor: tuple[Impostor, ModelServer]
) -> None:
    servicer, server = impostor
    spoil, text = ANSWERS[kind]
    with open_backend(card, "triton", allow_fallback=False, server=server) as opened:
        good = opened.infer(frames[0])[0]
        servicer.answer = spoil
        with pytest.raises(InferenceError, match=text):
            opened.infer(frames[0])
        servicer.answer = lambda reply: None
        np.testing.assert_array_equal(opened.infer(frames[0])[0], good)
    servicer.answer = spoil
    with pytest.raises(BackendUnavailable, match=text):
        open_backend(card, "triton", allow_fallback=False, server=server)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda reply: reply.outputs.pop(), "outputs are probabilities, expected latent and"),
        (lambda reply: _set(datatype="FP32")(reply.inputs[0]), r"input 'frame' is float32 .*expected uint8"),
        (lambda reply: _set(name="image")(reply.inputs[0]), "inputs are image, expected frame"),
        (lambda reply: reply.outputs[0].shape.__setitem__(1, 7), "number of phases is 7, but the card says 5"),
        (lambda reply: reply.versions.__setitem__(0, "7"), r"versions 7, expected version \d+"),
    ],
    ids=["no latent", "float input", "another input", "other phases", "another version"],
)
def test_a_model_that_does_not_keep_the_contract_is_refused(
    card: ModelCard, impostor: tuple[Impostor, ModelServer], spoil: Callable[[Any], None], text: str
) -> None:
    servicer, server = impostor
    servicer.metadata = spoil
    with pytest.raises(BackendUnavailable, match=text):
        open_backend(card, "triton", allow_fallback=False, server=server)


def test_a_server_that_gives_other_numbers_is_refused(card: ModelCard, impostor: tuple[Impostor, ModelServer]) -> None:
    servicer, server = impostor
    servicer.answer = _values(lambda values: values + 0.1 * np.sin(np.arange(values.size, dtype=np.float32)))
    with pytest.raises(BackendUnavailable, match="disagrees with openvino:CPU:fp32 on 16 sample frames"):
        open_backend(card, "triton", allow_fallback=False, server=server)


def test_tls_checks_who_the_server_is(card: ModelCard, network: SmallNetwork, tmp_path: Path) -> None:
    from impostor_server import Impostor, serving

    if shutil.which("openssl") is None:
        pytest.skip("no openssl here to make a certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*request, *names], check=True, capture_output=True)
    script = (
        "import sys\n"
        "from surg_perception.runtime import open_backend\n"
        "from surg_perception.runtime.model_repository import ModelServer\n"
        f"server = ModelServer('grpcs://localhost:' + sys.argv[1], {TIMEOUT_S})\n"
        f"print(open_backend({str(card.folder)!r}, 'triton', allow_fallback=False, server=server).name)\n"
    )
    known = {**os.environ, "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(certificate)}
    unknown = {name: value for name, value in os.environ.items() if name != "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH"}
    with serving(Impostor(network, repository_version(card)), (key.read_bytes(), certificate.read_bytes())) as port:
        command = [sys.executable, "-c", script, str(port)]
        trusted = subprocess.run(command, capture_output=True, text=True, env=known)
        assert trusted.stdout.strip() == "triton:REMOTE:fp32", trusted.stderr
        refused = subprocess.run(command, capture_output=True, text=True, env=unknown)
        assert refused.returncode != 0
        assert "is away" in refused.stderr
        assert "CERTIFICATE_VERIFY_FAILED" in refused.stderr
