"""One look for all figures: size, colours that colour-blind readers can tell apart, and a font with Chinese characters.

Taught in notebooks/00_start_here.ipynb.
"""

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import matplotlib as mpl
import numpy as np
from matplotlib import font_manager
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

# Okabe and Ito (2008), Color Universal Design; ordered so that the first ones stay apart on a projector, too
COLOURS = MappingProxyType(
    {
        "blue": "#0072B2",
        "orange": "#E69F00",
        "green": "#009E73",
        "vermilion": "#D55E00",
        "purple": "#CC79A7",
        "sky": "#56B4E9",
        "black": "#000000",
        "yellow": "#F0E442",
    }
)
CJK_FONT = Path(__file__).with_name("fonts") / "adlibCJK-Regular.otf"
LOOK = {
    "figure.figsize": (7.0, 4.0),  # inches; at 100 dpi as wide as a notebook's text
    "figure.dpi": 100,
    "savefig.dpi": 100,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "white",
    "font.size": 11,
    "font.family": ["DejaVu Sans", "adlib CJK"],  # the second is asked only for what the first lacks
    "axes.unicode_minus": True,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "figure.titlesize": 12,
    "figure.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "lines.linewidth": 2.0,
    "legend.frameon": False,
    "image.cmap": "cividis",  # even for colour-blind readers, and in grey
}


def style() -> None:
    """Set the look of all figures of this process.

    Sets matplotlib's defaults: 7 x 4 inches at 100 dpi, 11 pt type, the colours of `COLOURS` in order, and a Chinese font
    for the characters that DejaVu Sans lacks. The font travels with the package, so the machine needs none.

    Taught in notebooks/00_start_here.ipynb, section 1.
    """
    if "adlib CJK" not in font_manager.get_font_names():
        font_manager.fontManager.addfont(CJK_FONT)
        fonts = font_manager.fontManager.ttflist  # the one weight serves bold text too, or matplotlib logs a warning
        fonts.append(dataclasses.replace(fonts[-1], weight=700))
    mpl.rcParams.update(LOOK | {"axes.prop_cycle": mpl.cycler(color=list(COLOURS.values()))})


def interval_plot(
    labels: Sequence[str],
    estimates: Sequence[float],
    lows: Sequence[float],
    highs: Sequence[float],
    *,
    xlabel: str,
    reference: float | None = 0.0,
    title: str | None = None,
) -> Figure:
    """Draw estimates with their intervals, one row each, the first on top.

    Intervals that hold the reference value are grey and hollow: there, the data do not tell the two apart.

    Parameters
    ----------
    labels : n names
    estimates, lows, highs : n numbers
        In the unit that `xlabel` names; an estimate need not lie in the middle of its interval. A row with a missing
        number stays empty.
    xlabel : str
        What is measured, with its unit.
    reference : float, optional
        Value of no difference, drawn as a line; None for no line.
    title : str, optional
        The message of the figure, as a sentence.

    Raises
    ------
    ValueError
        The lengths differ, or an estimate lies outside its interval.

    Taught in notebooks/00_start_here.ipynb, section 3.
    """
    estimate, low, high = (np.asarray(values, float) for values in (estimates, lows, highs))
    if not len(labels) == len(estimate) == len(low) == len(high):
        sizes = f"{len(labels)} labels, {len(estimate)} estimates, {len(low)} lows and {len(high)} highs"
        raise ValueError(f"each label needs an estimate, a low and a high end; got {sizes}.")
    if (outside := (estimate < low) | (estimate > high)).any():
        raise ValueError(f'the estimate "{labels[int(np.argmax(outside))]}" lies outside its interval.')
    row = np.arange(len(labels))
    fig, ax = plt.subplots(figsize=(7.0, 1.3 + 0.42 * max(len(labels), 2)))
    if reference is not None:
        ax.axvline(reference, color="black", linewidth=1)
    tie = (low <= reference) & (reference <= high) if reference is not None else np.zeros(len(row), bool)
    for rows, colour, fill in ((~tie, COLOURS["blue"], COLOURS["blue"]), (tie, "#777777", "white")):
        reach = [(estimate - low)[rows], (high - estimate)[rows]]
        ax.errorbar(
            estimate[rows], row[rows], xerr=reach, fmt="o", color=colour, markerfacecolor=fill, capsize=4, markersize=7
        )
    ax.set_yticks(row, labels)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel(xlabel)
    _headline(fig, title)
    return fig


def curve_plot(curves: Mapping[str, Sequence], *, xlabel: str, ylabel: str, title: str | None = None) -> Figure:
    """Draw curves over a common axis, each told apart by colour and by line style, with a band where one is given.

    Parameters
    ----------
    curves : dict
        Name -> (x, y) or (x, y, low, high), arrays (n,) each.
    xlabel, ylabel : str
        What is drawn, with its unit.
    title : str, optional
        The message of the figure, as a sentence.

    Raises
    ------
    ValueError
        There are more curves than an eye can tell apart, which is eight.

    Taught in notebooks/00_start_here.ipynb, section 2.
    """
    if len(curves) > len(COLOURS):
        raise ValueError(f"{len(curves)} curves cannot be told apart; draw at most {len(COLOURS)}.")
    fig, ax = plt.subplots()
    looks = zip(COLOURS.values(), ("-", "--", "-.", ":") * 2, strict=True)
    for (name, (x, y, *band)), (colour, line) in zip(curves.items(), looks, strict=False):
        ax.plot(x, y, label=name, color=colour, linestyle=line)
        if band:
            ax.fill_between(x, *band, color=colour, alpha=0.15, linewidth=0)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if len(curves) > 1:
        ax.legend()
    _headline(fig, title)
    return fig


def _headline(fig: Figure, title: str | None) -> None:
    """Write the message over the whole width of the figure, in as many lines as it needs."""
    if title:
        fig.suptitle(textwrap.fill(title, 66), x=0.01, horizontalalignment="left")
