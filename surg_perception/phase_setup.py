# SPDX-License-Identifier: Apache-2.0
"""The backend that the parameters of the node `phase` ask for, opened the same way by the node and by a replay."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from surg_perception.models import ModelCard
from surg_perception.runtime.backend import Backend, BackendUnavailable, open_backend
from surg_perception.runtime.engine_build import EngineBuilder
from surg_perception.runtime.model_repository import ModelServer


def open_phase_backend(
    values: Mapping[str, Any],
    card: ModelCard,
    backend: str,
    exclude: Collection[str] = (),
    builder: EngineBuilder | None = None,
    standby: bool = False,
) -> Backend:
    """A backend that has passed its check, as `open_backend` gives it.

    Args:
        values: parameters of the node `phase`.
        backend, exclude, builder, standby: as for `open_backend`.

    Raises:
        BackendUnavailable: nothing runs as asked, with every reason.
        ModelError: the graph is not one of this project's.
    """
    try:
        return open_backend(
            card,
            backend=backend,
            precision=values["runtime.precision"],
            allow_fallback=values["runtime.allow_fallback"],
            threads=values["runtime.threads"] or None,
            exclude=exclude,
            server=model_server(values),
            builder=builder,
            standby=standby,
        )
    except BackendUnavailable as error:
        if not error.unbuilt or values["engine.build"] != "background":
            raise
        raise BackendUnavailable(
            f"{error.unbuilt[0]} has not been built for {card.name}; engine.build is 'background', for which another "
            "backend must serve meanwhile, and runtime.allow_fallback is false: set engine.build to 'configure', or "
            f"run `surg-perception build-engine {card.folder} --precision {values['runtime.precision']}` first: {error}"
        ) from error


def model_server(values: Mapping[str, Any]) -> ModelServer | None:
    """The model server, where these parameters of the node `phase` ask for one."""
    if not values["runtime.server_url"] or values["runtime.backend"] not in ("auto", "triton"):
        return None
    timeout_s, version = values["runtime.server_timeout_s"], values["runtime.server_version"]
    return ModelServer(values["runtime.server_url"], timeout_s, version)
