# SPDX-License-Identifier: Apache-2.0
"""The command surg-perception, as a user types it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from phantom_bags import write_phantom_bag

from surg_perception.cli.main import parser
from surg_perception.gsvit import GSViT, GSViTConfig
from surg_perception.gsvit.checkpoint import released_name
from surg_perception.models import find_model
from surg_perception.runtime import PRECISIONS


def command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "surg_perception.cli.main", *words],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
    )


def test_help_needs_nothing_heavy() -> None:
    script = (
        "import sys, surg_perception.cli.main as m\n"
        "try: m.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'openvino', 'onnxruntime', 'rclpy', 'numpy', 'cv2', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    shown = subprocess.run([sys.executable, "-c", script, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "demo" in shown.stdout
    assert "models" in shown.stdout


def test_help_names_every_precision() -> None:
    shown = command("evaluate", "phase", "--help", COLUMNS="200")
    words = shown.stdout[shown.stdout.rindex("--precision") :].split("--device")[0]
    assert set(PRECISIONS) <= set(re.findall(r"[\w-]+", words))


@pytest.mark.parametrize("name", ["gsvit_m0_phantom", "surgllm_small_phantom"])
def test_models_are_listed_shown_and_verified(name: str) -> None:
    assert name in command("models", "list", COLUMNS="200").stdout
    assert "intended_use:" in command("models", "show", name).stdout
    verified = command("models", "verify", name)
    assert verified.returncode == 0
    assert f"{name}@" in verified.stdout


def test_an_unknown_model_is_a_clear_error() -> None:
    failed = command("models", "show", "no_such_model")
    assert failed.returncode == 2
    assert "no_such_model" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_a_released_checkpoint_becomes_a_model_folder_that_gives_its_latents(tmp_path: Path) -> None:
    model = GSViT(GSViTConfig(decoder=False)).eval()
    released = {released_name(name): tensor for name, tensor in model.state_dict().items()}
    torch.save(released, tmp_path / "GSViT.pkl")
    done = command("models", "import", str(tmp_path / "GSViT.pkl"), str(tmp_path / "mine"))
    assert done.returncode == 0, done.stderr
    card = find_model(tmp_path / "mine")
    assert card.name == "mine"
    assert card.labels.names == ()
    assert card.network.latent_shape == (384, 4, 4)

    from surg_perception.runtime.backend import open_backend

    frame = torch.randint(0, 256, (224, 224, 3), dtype=torch.uint8)
    with open_backend(card, "onnxruntime", allow_fallback=False) as backend, torch.inference_mode():
        probabilities, latent = backend.infer(frame.numpy())
        expected = model.encode((frame.flip(2).permute(2, 0, 1)[None]).float() / 255)[0].numpy()
    assert probabilities.size == 0
    assert latent == pytest.approx(expected, abs=1e-3)


def test_the_demo_says_what_it_needs_where_ros_is_not_sourced() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "AMENT_PREFIX_PATH"}
    failed = subprocess.run(
        [sys.executable, "-m", "surg_perception.cli.main", "demo"], capture_output=True, text=True, env=environment
    )
    assert failed.returncode == 2
    assert "setup.bash" in failed.stdout


@pytest.mark.parametrize("package", ["rosbags", "mcap"])
def test_replay_says_what_to_install(package: str, tmp_path: Path) -> None:
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(
        f"raise ModuleNotFoundError(\"No module named '{package}'\", name='{package}')"
    )
    write_phantom_bag(tmp_path / "bag", duration_s=12.0)
    done = command(
        "replay", str(tmp_path / "bag"), PYTHONPATH=f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    )
    assert done.returncode == 2
    assert done.stderr.endswith("pip install rosbags mcap\n"), done.stderr


def test_a_namespace_is_one_that_ros_takes(capsys: pytest.CaptureFixture[str]) -> None:
    verbs = (["ask", "What?"], ["record", "--out", "bag"], ["replay", "bag"])
    for verb in verbs:
        for text, plain in (("/or1/ecm/", "or1/ecm"), ("surg_perception", "surg_perception"), ("", "")):
            assert parser().parse_args([*verb, "--namespace", text]).namespace == plain
        for text in ("or 1", "1st", "or1//ecm", "or-1"):
            with pytest.raises(SystemExit):
                parser().parse_args([*verb, "--namespace", text])
            assert "is no namespace" in capsys.readouterr().err
