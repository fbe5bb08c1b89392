# SPDX-License-Identifier: Apache-2.0
"""SurgLLM's configurations: the published sizes, files of them, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from surg_perception.surgllm.config import CONFIGS, EncoderConfig, QFormerConfig, SurgLLMConfig
from surg_perception.surgllm.encoder import VideoEncoder
from surg_perception.surgllm.model import QFormer, SurgLLM

DOCS = Path(__file__).parents[2] / "docs" / "surgllm.md"


@pytest.fixture(scope="module")
def paper() -> SurgLLM:
    with torch.device("meta"):
        return SurgLLM(CONFIGS["paper"])


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_paper_has_the_giant_encoder(paper: SurgLLM) -> None:
    width, mlp, patch = 1408, 6144, 3 * 2 * 14 * 14
    block = 4 * width**2 + 3 * width + 2 * width * mlp + mlp + width + 4 * width  # no bias of keys
    assert count(paper.encoder) == 40 * block + patch * width + width + 2 * width
    assert count(paper.encoder) / 1e6 == pytest.approx(1011.6, abs=0.1)  # VideoMAE V2's giant: 1011 M


def test_the_papers_q_former_has_the_size_of_instruct_blips(paper: SurgLLM) -> None:
    words = paper.qformer.network.get_input_embeddings().weight.numel()
    assert words == 30523 * 768
    assert count(paper.qformer) / 1e6 == pytest.approx(188, abs=3)  # Li et al., arXiv 2301.12597, section 3.1: 188 M
    assert paper.qformer.queries.shape == (1, 32, 768)
    crossing = [hasattr(layer, "crossattention") for layer in paper.qformer.network.encoder.layer]
    assert crossing == [True, False] * 6


def test_the_papers_language_model_has_vicunas_size(paper: SurgLLM) -> None:
    assert count(paper.language_model) == 6_738_415_616  # LLaMA-7B's, Touvron et al., arXiv 2302.13971: 6.7 B
    assert paper.project.weight.shape == (4096, 768)
    # 32 layers, two matrices of 4096 x 8 each for queries and values
    paper.language_model.add_adapter("joint")
    assert sum(p.numel() for p in paper.language_model.adapter_parameters("joint")) == 32 * 2 * 2 * 4096 * 8


def test_the_papers_segment_has_512_tokens() -> None:
    encoder = CONFIGS["paper"].encoder
    assert (encoder.grid, encoder.tokens(CONFIGS["paper"].segment_frames)) == (16, 512)
    assert CONFIGS["small"].encoder.tokens(4) == 288
    with pytest.raises(ValueError, match="3 frames found, expected a multiple of the tubelet's 2"):
        encoder.tokens(3)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_comes_back_from_yaml(name: str) -> None:
    config = CONFIGS[name]
    assert SurgLLMConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("part", "key", "value", "text"),
    [
        ("", "colour", 1, "colour"),
        ("encoder", "depth", 12, "depth"),
        ("encoder", "layers", "many", "layers 'many' found"),
        ("encoder", "layers", 0, "layers 0 found"),
        ("encoder", "layers", True, "layers True found"),
        ("encoder", "patch_size", 0, "patch_size 0 found"),
        ("encoder", "image_size", 30, "30 is no multiple of patch size 8"),
        ("encoder", "heads", 3, "width 32 and 3 heads"),
        ("encoder", "stem", "resnet", "stem 'resnet'"),
        ("qformer", "heads", 5, "width 32 and 5 heads"),
        ("", "segment_frames", 3, "segments of 3 frames"),
        ("", "label_first", "yes", "label_first 'yes' found"),
        ("", "encoder", 7, "not a SurgLLM configuration"),
    ],
)
def test_what_cannot_be_used_is_told(part: str, key: str, value: object, text: str) -> None:
    content = CONFIGS["tiny"].to_dict()
    (content[part] if part else content)[key] = value
    with pytest.raises(ValueError, match=text):
        SurgLLMConfig.from_dict(content)


def test_a_missing_part_is_told() -> None:
    content = CONFIGS["tiny"].to_dict()
    del content["qformer"]
    with pytest.raises(ValueError, match="not a SurgLLM configuration: KeyError: 'qformer'"):
        SurgLLMConfig.from_dict(content)


def test_the_convolutional_stem_has_patches_of_its_stride() -> None:
    with pytest.raises(ValueError, match="patch size 8 found; the stem efficientnet_lite0 has stride 16"):
        EncoderConfig(image_size=64, patch_size=8, stem="efficientnet_lite0")


def test_small_uses_minilms_shape() -> None:
    small = CONFIGS["small"].qformer
    assert small == replace(QFormerConfig(), width=384, layers=3, mlp=1536, queries=16, start="all-minilm-l6-v2")


def documented(row: str) -> dict[str, str]:
    """A row of the table in docs/surgllm.md: name of the configuration to what its cell begins with."""
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in DOCS.read_text().splitlines()]
    [cells] = [cells[1:] for cells in table if len(cells) == 4 and cells[0] == row]
    return dict(zip(CONFIGS, (cell.split()[0].rstrip(",").replace(",", "") for cell in cells), strict=True))


def test_the_docs_have_the_configurations_numbers() -> None:
    numbers = {name: (c.encoder.tokens(4), c.qformer.queries, c.max_segments) for name, c in CONFIGS.items()}
    rows = ("tokens of a segment of 4 frames", "visual tokens of a segment", "segments of a window, at most")
    written = [documented(row) for row in rows]
    assert {name: tuple(int(row[name]) for row in written) for name in CONFIGS} == numbers


@pytest.mark.parametrize("name", CONFIGS)
def test_the_docs_count_parameters_right(name: str, request: pytest.FixtureRequest) -> None:
    config = CONFIGS[name]
    if config.qformer.start:
        request.getfixturevalue("sentence_model")
    with torch.device("meta"):
        encoder, qformer = VideoEncoder(config.encoder), QFormer(config.qformer, config.encoder.width)
    assert count(encoder) == int(documented("**parameters**: encoder")[name])
    assert count(qformer) == int(documented("Q-Former, with word embeddings")[name])
