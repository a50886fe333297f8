"""Cards that a marketer can read: what makes a group of shoppers differ from the shop's average, and what not to assume.

Taught in notebooks/02_audience_clustering.ipynb, section 5.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adlib.plots import COLOURS


@dataclass(frozen=True)
class PersonaCard:
    """One group as a marketer reads it; every text comes from the group's statistics."""

    group: object
    name: str
    size: int
    share: float
    traits: tuple[str, ...]
    favourites: tuple[str, ...]
    sentence: str
    caution: str


# column of `features` → (name, clause of a sentence) for more of it and for less of it; None: not worth a word
_WORDS = {
    "log_events": (("busy", "visits often"), ("quiet", "visits seldom")),
    "log_spend": (("high spending", "spends much"), ("low spending", "spends little")),
    "log_days_since": (("away", "has not been here lately"), ("recent", "was here lately")),
    "relative_price": (("dear choices", "takes the dearer of two"), ("cheap choices", "takes the cheaper of two")),
    "event=purchase": (("buying", "decides quickly"), None),
    "event=cart": (("basket filling", "fills the basket"), None),
    "event=favourite": (("list keeping", "saves things for later"), None),
    "event=view": (("browsing", ""), None),
}


def traits(features: pd.DataFrame, labels: np.ndarray) -> pd.DataFrame:
    """Hold each group's mean against the shop's, in standard deviations between shoppers: (k, d), 0 is the average.

    Taught in notebooks/02_audience_clustering.ipynb, section 5.
    """
    spread = features.std(ddof=0)
    z = (features - features.mean()) / spread.where(spread > 1e-9, np.inf)
    return z.groupby(np.asarray(labels)).mean().rename_axis("group")


def persona_cards(features: pd.DataFrame, labels: np.ndarray, *, n_traits: int = 4) -> list[PersonaCard]:
    """Write a card for each group from its means: name, size, strongest traits, favourites, one sentence, one caution.

    `features` is (n, d) with the column names of `features(tables)` (others are shown as they are), `labels` (n,).
    Raises ValueError if the lengths differ. Taught in notebooks/02_audience_clustering.ipynb, section 5.
    """
    labels = np.asarray(labels)
    if len(labels) != len(features):
        raise ValueError(f"there are {len(features)} shoppers but {len(labels)} labels")
    table = traits(features, labels)
    return [_card(group, features[labels == group], features, z, n_traits) for group, z in table.iterrows()]


def _card(group: object, members: pd.DataFrame, shop: pd.DataFrame, z: pd.Series, n_traits: int) -> PersonaCard:
    n, shop = len(shop), shop.mean()
    inside, liked = members.mean(), z.filter(like="category=").nlargest(3)
    # of shares that sum to one the strongest gain says enough: whoever comes in the evening comes less in the morning
    strong = z[(z >= 0.2) | ((z <= -0.2) & ~z.index.str.contains("="))].sort_values(key=np.abs, ascending=False).index
    strong = strong[~strong.str.replace("=.*", "", regex=True).duplicated()]
    words = [word for column in strong if (word := _word(column, z[column]))]
    favourites = tuple(column.partition("=")[2] for column in liked[liked > 0].index)
    clauses = [clause for _, clause in words if clause][:2]
    if favourites:
        clauses.append(f"looks at {' and '.join(favourites[:2])} more than others")
    caution = "Age, gender, income and motives were not measured: do not write as if they were known."
    if len(strong):
        off = (np.sign(members[strong[0]] - shop[strong[0]]) != np.sign(z[strong[0]])).mean()
        caution = f"{off:.0%} of them lie on the other side of the shop's average even in the first trait. {caution}"
    return PersonaCard(
        group=group,
        name=" · ".join([name for name, _ in words][:2]) or "close to average",
        size=len(members),
        share=len(members) / n,
        traits=tuple(_phrase(column, inside[column], shop[column]) for column in strong[:n_traits]),
        favourites=favourites,
        sentence=f"Write for someone who {', '.join(clauses)}." if clauses else "Keep the general copy.",
        caution=caution,
    )


def _word(column: str, z: float) -> tuple[str, str] | None:
    if column in _WORDS:
        return _WORDS[column][int(z < 0)]
    kind, _, value = column.partition("=")
    clauses = {"hour": f"is here in the {value} more than others", "device": f"is often on {value}"}
    return (value, clauses.get(kind, "")) if value else None


def _phrase(column: str, inside: float, shop: float) -> str:
    if column.startswith("log_"):
        return f"{column[4:].replace('_', ' ')}: typically {np.expm1(inside):,.1f} (shop {np.expm1(shop):,.1f})"
    if column == "relative_price":
        return f"price within the category: {np.expm1(inside):+.0%} (shop {np.expm1(shop):+.0%})"
    if "=" in column:
        return f"{column.replace('=', ' ')}: {inside:.0%} (shop {shop:.0%})"
    return f"{column}: {inside:.3g} (shop {shop:.3g})"


def cards_html(cards: Sequence[PersonaCard]) -> str:
    """Lay persona cards out as self-contained HTML without scripts; every text is escaped.

    Taught in notebooks/02_audience_clustering.ipynb, section 5.
    """
    box, parts = "border:1px solid #999;border-radius:6px;padding:.6em .9em;width:19em;font-size:90%", []
    for card in cards:
        items = "".join(f"<li>{escape(trait)}</li>" for trait in card.traits)
        parts.append(
            f'<section style="{box}"><h4 style="margin:0">{escape(card.name)}</h4>'
            f"<div>Group {escape(str(card.group))}: {card.size:,} shoppers, {card.share:.0%}</div><ul>{items}</ul>"
            f"<p><b>Favourites:</b> {escape(', '.join(card.favourites) or 'none above average')}</p>"
            f"<p><b>Copy:</b> {escape(card.sentence)}</p><p><b>Careful:</b> {escape(card.caution)}</p></section>"
        )
    return f'<div style="display:flex;flex-wrap:wrap;gap:.8em">{"".join(parts)}</div>'


def flow_plot(snapshots: Mapping[str, Sequence], *, order: Sequence | None = None, title: str | None = None) -> Figure:
    """Draw who moves from segment to segment: a column a snapshot, a ribbon as thick as the number of shoppers who take that way.

    Parameters
    ----------
    snapshots : name → segment of each shopper (n,), the same shoppers in the same order each time; two or more.
    order : segments from bottom to top; default: sorted. One without members takes no room.
    title : the message of the figure.

    Raises ValueError if there are fewer than two snapshots, they differ in length, a segment is not in `order`, or there are more
    than eight. Taught in notebooks/02_audience_clustering.ipynb, section 6.
    """
    table = [np.asarray(labels) for labels in snapshots.values()]
    if len(table) < 2 or len({len(labels) for labels in table}) > 1:
        raise ValueError(f"a flow needs two or more snapshots of the same shoppers; got {[len(t) for t in table]}")
    order = sorted(set(np.concatenate(table).tolist())) if order is None else list(order)
    if unknown := set(np.concatenate(table).tolist()) - set(order):
        raise ValueError(f"{len(unknown)} segments are not in the order given: {sorted(map(str, unknown))}")
    if len(order) > len(COLOURS):
        raise ValueError(f"{len(order)} segments cannot be told apart; draw at most {len(COLOURS)}")
    fig, ax = plt.subplots(figsize=(max(5.0, 1.5 + 2.4 * (len(table) - 1)), 4))
    codes, colours = [pd.Index(order).get_indexer(labels) for labels in table], list(COLOURS.values())
    sizes = [np.bincount(code, minlength=len(order)) for code in codes]
    for x, size in enumerate(sizes):
        floor = np.cumsum(size) - size
        ax.bar([x] * len(order), size, 0.14, bottom=floor, color=colours[: len(order)], edgecolor="white", zorder=3)
        for g in np.flatnonzero(size > 0.04 * size.sum()):
            share, patch = f"{size[g] / size.sum():.0%}", {"facecolor": "white", "alpha": 0.8, "lw": 0, "pad": 1}
            ax.text(x, floor[g] + size[g] / 2, share, ha="center", va="center", size=8, zorder=4, bbox=patch)
    for x, (before, after) in enumerate(pairwise(codes)):
        _ribbons(ax, x, np.bincount(before * len(order) + after, minlength=len(order) ** 2).reshape(len(order), -1))
    ax.set(xticks=range(len(table)), xticklabels=list(snapshots), ylabel="shoppers", title=title or "")
    ax.grid(visible=False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours[: len(order)]]
    ax.legend(handles[::-1], [str(name) for name in order[::-1]], loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def _ribbons(ax: Axes, x: int, moves: np.ndarray) -> None:
    """Join two neighbouring columns by ribbons; moves (segments, segments) counts shoppers from row to column."""
    t = np.linspace(0, 1, 40)
    bend = t * t * (3 - 2 * t)
    left = (np.cumsum(moves) - moves.ravel()).reshape(
        moves.shape
    )  # rows lie on each other in the order of the segments
    right = (np.cumsum(moves.T) - moves.T.ravel()).reshape(moves.T.shape).T
    for (g, h), n in np.ndenumerate(moves):
        if n:
            low = left[g, h] + (right[g, h] - left[g, h]) * bend
            colour = list(COLOURS.values())[g]
            ax.fill_between(x + 0.07 + 0.86 * t, low, low + n, color=colour, alpha=0.35, linewidth=0)
