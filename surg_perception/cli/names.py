# SPDX-License-Identifier: Apache-2.0
"""Names of ROS as options of the command line."""

from __future__ import annotations

import argparse
import re


def namespace(text: str) -> str:
    """A namespace, "or1/ecm", without slashes around it; "" is the root.

    Raises:
        argparse.ArgumentTypeError: ROS takes no such name.
    """
    plain = text.strip("/")
    if plain and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*(/[A-Za-z_][A-Za-z0-9_]*)*", plain):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no namespace, expected words of letters, digits and _ with / between, such as or1/ecm"
        )
    return plain
