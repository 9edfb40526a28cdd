"""The report's colours, each with its partner for dark screens.

Method colours stay apart for readers with protanopia and deuteranopia (nearest pair of the first
five: 12 in OKLab x 100) and reach 3:1 on the paper; shape and dash say the same once more.
Figures are drawn in the light ones; the page swaps them by `DARK`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PAPER = "#fdfcfa"
INK = "#1d2126"
MUTED = "#5b626d"
GRID = "#e7e4dc"
SOFT = "#b9bdc4"
WARN = "#b3261e"

_METHODS = (  # light, dark
    ("#2f5fc5", "#5cacfc"),
    ("#d56500", "#ef8a2f"),
    ("#119887", "#3fd6a8"),
    ("#8b3378", "#c486b4"),
    ("#734f00", "#f2c037"),
    ("#208dcf", "#8fe2fb"),
    ("#451b75", "#9a86ea"),
    ("#712233", "#ec8695"),
)
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star")
_DASHES = ("solid", "dash", "dot", "dashdot")

# From "held but never used" to "used most"; a cell without a colour is not held at all.
USE_SCALE = ("#dbe6f5", "#9dbde8", "#5b8fd6", "#2c5bb8", "#172b63")
_USE_DARK = ("#1c2b43", "#26497c", "#3f78c4", "#7db4f5", "#deedff")
# From few experts to many.
HELD_SCALE = ("#f1e5ec", "#d6aecb", "#a9629b", "#64285c")
_HELD_DARK = ("#35212f", "#6d3c65", "#b575a6", "#f3d8ea")

DARK = {
    PAPER: "#15171a",
    INK: "#e9e6e0",
    MUTED: "#a2a7af",
    GRID: "#2c3036",
    SOFT: "#565c66",
    WARN: "#ff8f86",
    **dict(_METHODS),
    **dict(zip(USE_SCALE, _USE_DARK, strict=True)),
    **dict(zip(HELD_SCALE, _HELD_DARK, strict=True)),
}


@dataclass(frozen=True)
class Style:
    """How one method looks in every figure."""

    color: str
    symbol: str
    dash: str


def method_styles(methods: Sequence[str]) -> dict[str, Style]:
    """A look for each method; colours repeat after eight, with another symbol and dash."""
    n = len(_METHODS)
    return {
        method: Style(
            _METHODS[i % n][0],
            _SYMBOLS[(i + i // n) % len(_SYMBOLS)],
            _DASHES[(i // n) % len(_DASHES)],
        )
        for i, method in enumerate(methods)
    }


def scale(colors: Sequence[str]) -> list[list[float | str]]:
    """Colours as a continuous scale for a figure."""
    return [[i / (len(colors) - 1), color] for i, color in enumerate(colors)]
