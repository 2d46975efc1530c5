"""Colours that tell classes apart."""

import colorsys

Colour = tuple[int, int, int]

PER_TONE = 7
TONES = ((0.52, 0.68), (0.36, 0.60), (0.71, 0.70))
"""Lightness and saturation."""


def class_colour(label: int) -> Colour:
    """Always the same: one class and the next lie far apart on the circle of hues, and every seven classes
    are of another lightness."""
    golden = (5**0.5 - 1) / 2
    red, green, blue = colorsys.hls_to_rgb(
        (0.58 + label * golden) % 1, *TONES[label // PER_TONE % len(TONES)]
    )
    return round(255 * red), round(255 * green), round(255 * blue)
