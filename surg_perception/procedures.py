# SPDX-License-Identifier: Apache-2.0
"""Which model serves which surgical procedure."""

from __future__ import annotations

import re

from surg_perception.data.labels import PROCEDURES
from surg_perception.models import ModelCard, ModelError, find_model, list_models


class UnknownProcedure(ModelError):
    """No model is known by this name, neither for a procedure nor by itself."""


def procedure_name(text: str) -> str | None:
    """The procedure's name as in `PROCEDURES`, whatever the case and the spaces or hyphens; None for another text."""
    names = {_letters(name): name for name in PROCEDURES}
    return names.get(_letters(text))


def find_procedure(name: str) -> ModelCard:
    """The model whose card names this procedure; of several versions of one model the highest.

    Args:
        name: as in `PROCEDURES`, whatever the case and the spaces or hyphens.

    Raises:
        UnknownProcedure: no such procedure, or no model for it.
        ModelError: several models serve it, which are listed.
    """
    procedure = procedure_name(name)
    if procedure is None:
        raise UnknownProcedure(f"no procedure {name!r}; expected one of {', '.join(PROCEDURES)}")
    cards = [card for card in list_models() if procedure_name(card.procedure) == procedure]
    if not cards:
        known = sorted({card.procedure for card in list_models() if card.procedure})
        raise UnknownProcedure(
            f"no model for {procedure}: no model card has 'procedure: {procedure}' (there are models for "
            f"{', '.join(known) or 'no procedure'}); put the model folder where `surg-perception models list` finds it"
        )
    newest: dict[str, list[ModelCard]] = {}
    for card in cards:
        best = newest.setdefault(card.name, [card])
        if _version(card.version) > _version(best[0].version):
            newest[card.name] = [card]
        elif card is not best[0] and card.version == best[0].version:
            best.append(card)
    found = [card for best in newest.values() for card in best]
    if len(found) > 1:
        listed = ", ".join(f"{card.name} {card.version} ({card.folder})" for card in found)
        raise ModelError(f"several models serve {procedure}: {listed}; choose one by name or path instead")
    return found[0]


def resolve_model(text: str) -> ModelCard:
    """The model that a text names: first as one of the ten procedures, then as `find_model` does (name or path).

    Raises:
        UnknownProcedure: neither.
        ModelError: found and not usable, or several.
    """
    if procedure_name(text):
        return find_procedure(text)
    try:
        return find_model(text)
    except ModelError as error:
        if str(error).startswith("no model "):
            raise UnknownProcedure(f"{error}; nor is it one of the procedures {', '.join(PROCEDURES)}") from error
        raise


def _letters(text: str) -> str:
    return re.sub(r"[\s_-]", "", text).casefold()


def _version(text: str) -> tuple[tuple[int, int, str], ...]:
    """Sorts "0.10" after "0.9", and a number after a word."""
    return tuple((1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"[.\-+]", text))
