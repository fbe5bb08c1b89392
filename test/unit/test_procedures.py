# SPDX-License-Identifier: Apache-2.0
"""Which model serves a procedure: by card, newest version, one only; and how a request's text is understood."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from onnx_graphs import SmallNetwork, graph_of, write_folder

from surg_perception import models
from surg_perception.data.labels import PROCEDURES
from surg_perception.models import ModelError
from surg_perception.procedures import UnknownProcedure, find_procedure, procedure_name, resolve_model

GRAPH = graph_of(SmallNetwork.random())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder in which models are found."""
    monkeypatch.setattr(models, "search_folders", lambda: [tmp_path])
    return tmp_path


def add(folder: Path, name: str, procedure: str = "", version: str = "1", card_name: str | None = None) -> None:
    card = write_folder(folder / name, GRAPH)
    replace(card, procedure=procedure, version=version, name=card_name or name).write()


def test_names_are_those_of_the_paper_whatever_the_spelling() -> None:
    assert len(set(PROCEDURES)) == 10
    assert procedure_name("cholecystectomy") == "Cholecystectomy"
    assert procedure_name("hernia-repair") == procedure_name("HERNIA REPAIR") == "Hernia Repair"
    assert procedure_name("gsvit_m0_phantom") is None
    assert procedure_name("") is None


def test_the_model_whose_card_names_it_in_its_newest_version(folder: Path) -> None:
    add(folder, "any")
    add(folder, "colon", "colectomy")
    add(folder, "chole-9", "Cholecystectomy", "0.9", "chole")
    add(folder, "chole-10", "Cholecystectomy", "0.10", "chole")
    add(folder, "chole-8", "Cholecystectomy", "0.8.7", "chole")
    assert find_procedure("Cholecystectomy").version == "0.10"
    assert find_procedure("Colectomy").name == "colon", "the card's spelling does not matter either"


def test_none_and_several_are_said_with_their_names(folder: Path) -> None:
    add(folder, "colon", "Colectomy")
    with pytest.raises(UnknownProcedure, match=r"no model for Hepatectomy.*models for Colectomy"):
        find_procedure("Hepatectomy")
    with pytest.raises(UnknownProcedure, match=r"no procedure 'Tonsillectomy'.*Appendectomy"):
        find_procedure("Tonsillectomy")
    add(folder, "bowel", "Colectomy")
    with pytest.raises(ModelError, match=r"several models serve Colectomy: .*bowel.*colon") as error:
        find_procedure("Colectomy")
    assert not isinstance(error.value, UnknownProcedure)
    add(folder, "twin-a", "Colostomy", "1", "twin")
    add(folder, "twin-b", "Colostomy", "1", "twin")
    with pytest.raises(ModelError, match=r"twin-a.*twin-b"):
        find_procedure("Colostomy")


def test_a_text_is_a_procedure_first_then_a_name_or_a_path(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    add(folder, "Colectomy", "", "named like a procedure")
    add(folder, "colon", "Colectomy")
    assert resolve_model("Colectomy").name == "colon"
    assert resolve_model("colon").name == "colon"
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    add(elsewhere, "mine")
    assert resolve_model(str(elsewhere / "mine")).name == "mine"
    with pytest.raises(UnknownProcedure, match=r"no model 'nothing'.*procedures Appendectomy"):
        resolve_model("nothing")
    (elsewhere / "broken").mkdir()
    (elsewhere / "broken" / "model.yaml").write_text("name: 3")
    with pytest.raises(ModelError) as error:
        resolve_model(str(elsewhere / "broken"))
    assert not isinstance(error.value, UnknownProcedure)
