"""Multiply-adds of the toy models, by hand."""


def macs_of_tokens(tokens: int, width: int, ratio: float) -> float:
    """A transformer block: four square projections, two products of attention, an MLP."""
    return tokens * (4 + 2 * ratio) * width**2 + 2 * tokens**2 * width


def macs_of_backbone(units: int, width: int, depths: tuple[int, int, int]) -> float:
    """The toy's: units of 16 pixels, early MLPs of ratio 3, later ones of ratio 2."""
    quarter, half = width // 4, width // 2
    stem = units * 16 * (4 * 4 * 3) * quarter
    early = depths[0] * 16 * 2 * 3 * quarter**2 + depths[1] * 4 * 2 * 3 * half**2
    merges = 4 * 4 * quarter * half + 4 * half * width
    return stem + units * (early + merges) + depths[2] * macs_of_tokens(units, width, 2)


def macs_of_pyramid(width: int, pyramid: int) -> float:
    """Of one unit, at depth 1 and ratio 2."""
    level16 = width * pyramid + 4 * pyramid**2
    level8 = width * 4 * pyramid + 4 * (width // 2) * pyramid + 2 * 4 * 4 * pyramid**2
    level4 = 4 * pyramid * 4 * pyramid + 16 * (width // 4) * pyramid + 2 * 16 * 4 * pyramid**2
    return level16 + level8 + level4
