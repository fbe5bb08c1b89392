# SPDX-License-Identifier: Apache-2.0
"""How phases are shown wherever they are shown: one colour each, a readable name, a clock.

The overlay and the ribbon plot both take them from here: a phase looks the same on the monitor and on paper.
"""

from __future__ import annotations

import re

# Okabe and Ito, "Color Universal Design" (2008), without black, which is the background. Of all orders this
# one keeps phases that follow each other furthest apart to every eye: least CIELAB distance of neighbours 38,
# over normal, protan, deutan and tritan vision (Machado et al. 2009).
PHASE_COLOURS_RGB: tuple[tuple[int, int, int], ...] = (
    (86, 180, 233),  # sky blue
    (213, 94, 0),  # vermilion
    (0, 114, 178),  # blue
    (230, 159, 0),  # orange
    (0, 158, 115),  # bluish green
    (240, 228, 66),  # yellow
    (204, 121, 167),  # reddish purple
)
UNKNOWN_COLOUR_RGB = (128, 128, 128)


def phase_colour_rgb(phase_id: int) -> tuple[int, int, int]:
    """Colour of a phase, each channel 0..255; grey for the unknown phase (negative).

    Seven hues are as many as can be told apart with colour-blind eyes; phases beyond them repeat the hues in
    lighter tints (names in a legend keep them apart).
    """
    if phase_id < 0:
        return UNKNOWN_COLOUR_RGB
    tint, hue = divmod(phase_id, len(PHASE_COLOURS_RGB))
    white = 1.0 - 0.55 ** min(tint, 3)
    red, green, blue = (round(c + (255 - c) * white) for c in PHASE_COLOURS_RGB[hue])
    return red, green, blue


def readable_name(label: str) -> str:
    """A label of a data set as people write it: "CalotTriangleDissection" -> "Calot triangle dissection".

    Takes CamelCase, kebab-case, snake_case and plain words; abbreviations in capitals stay so.
    """
    words = re.sub(r"(?<=[a-z\d])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|[_\-\s]+", " ", label).split()
    text = " ".join(w if len(w) > 1 and w.isupper() else w.lower() for w in words)
    return text[:1].upper() + text[1:]


def clock(seconds: float) -> str:
    """Elapsed time as mm:ss, from one hour on h:mm:ss. Fractions are cut, negative times are 00:00."""
    minutes, secs = divmod(max(0, int(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes:02d}:{secs:02d}"


def tick_step_s(span_s: float, most: int) -> float:
    """Smallest round time step that divides a span into at most `most` parts (1 s to whole days)."""
    for step_s in (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800):
        if span_s <= step_s * most:
            return float(step_s)
    return 86400.0 * max(1, -int(-span_s // (86400.0 * most)))
