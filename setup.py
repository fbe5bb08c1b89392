# SPDX-License-Identifier: Apache-2.0
"""Build of the ament_python package; colcon calls it."""

from pathlib import Path

from setuptools import find_packages, setup

NAME = "surg_perception"
ROOT = Path(__file__).resolve().parent


def share(folder: str) -> list[tuple[str, list[str]]]:
    """Every file below folder, to be installed at the same place below share/surg_perception."""
    places: dict[str, list[str]] = {}
    for file in sorted((ROOT / folder).rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            place = f"share/{NAME}/{file.parent.relative_to(ROOT)}"
            places.setdefault(place, []).append(str(file.relative_to(ROOT)))
    return list(places.items())


setup(
    name=NAME,
    version="0.1.0",
    description="Surgical phase, latent features and answers to questions from an endoscope's images, for ROS 2",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=[NAME, f"{NAME}.*"]),
    package_data={NAME: ["runtime/sample_frames.png"]},
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (f"share/{NAME}", ["package.xml"]),
        *share("launch"),
        *share("config"),
        *share("models"),
    ],
    install_requires=["setuptools"],
    extras_require={"test": ["pytest"]},  # tells `colcon test` to run pytest
    zip_safe=False,
    entry_points={
        "console_scripts": [
            "surg-perception = surg_perception.cli.main:main",
            "source_node = surg_perception.nodes.source_node:main",
            "phase_node = surg_perception.nodes.phase_node:main",
            "gate_node = surg_perception.nodes.gate_node:main",
            "monitor = surg_perception.nodes.monitor:main",
            "overlay_node = surg_perception.nodes.overlay_node:main",
            "vqa_node = surg_perception.nodes.vqa_node:main",
        ],
        # The name is the module's, so that pytest takes `-p surg_perception.testing` for the same plugin.
        "pytest11": ["surg_perception.testing = surg_perception.testing"],
    },
)
