# SPDX-License-Identifier: Apache-2.0
"""pytest plugin for tests of your own recordings: the fixture `replay_bag` and the option --update-golden-replays.

Registered by the package where it is installed; elsewhere `pytest -p surg_perception.testing`. See docs/replay.md.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from surg_perception.replay.run import Outcome


def pytest_addoption(parser: pytest.Parser) -> None:
    """The plugin's option."""
    group = parser.getgroup("surg_perception")
    group.addoption(
        "--update-golden-replays", action="store_true", help="let replay_bag rewrite golden files instead of comparing"
    )


@pytest.fixture
def replay_bag(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Outcome]:
    """`replay_bag(BAG, golden=FILE, …)` replays a bag offline and fails where the results are not those of the file.

    Further arguments are those of `surg_perception.replay.run.run_replay`; `out` is a folder of the test unless told.
    Returns its Outcome: `.replayed.frames`, `.replayed.answers`, `.replayed.problems`, `.comparison`, `.out`.
    """
    calls = 0

    def replay(bag: str | Path, golden: str | Path | None = None, **options: Any) -> Outcome:
        from surg_perception.replay.run import run_replay

        nonlocal calls
        calls += 1
        out = Path(options.pop("out", tmp_path / f"replay_{calls}"))
        update = bool(request.config.getoption("--update-golden-replays"))
        file = Path(golden) if golden is not None else None
        outcome = run_replay(Path(bag), out, golden=file, update=update and file is not None, **options)
        if outcome.comparison is not None and outcome.comparison.differences:
            lines = [str(difference) for difference in outcome.comparison.differences[:20]]
            pytest.fail(
                "\n".join([outcome.comparison.summary, *lines, f"pictures and all of it: {out}"]), pytrace=False
            )
        return outcome

    return replay
