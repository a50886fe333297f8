"""One page a case, and one picture of all cases: the same seven headings for the course's cases and a reader's own, with their cost.

Taught in notebooks/12_case_studies.ipynb, sections 9 to 12.
"""

import html
from dataclasses import dataclass

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from adlib.cases import DRAWBACKS, NOT_TESTED, SCOPES, Case
from adlib.evaluation import VERDICTS
from adlib.plots import COLOURS

COLOUR_OF = dict(zip(VERDICTS, (COLOURS["green"], COLOURS["blue"], COLOURS["vermilion"], "#777777"), strict=True))
HEADINGS = ("Background", "Plan", "What was done", "What was measured", "Advantages", "Drawbacks", "Verdict")


@dataclass(frozen=True)
class Cost:
    """What a thousand made ads (or lists, or decisions) cost: seconds of one core and joules, yuan, and of these yuan a reader's."""

    seconds: float
    joules: float
    yuan: float
    reading: float
    unit: str

    def __str__(self) -> str:
        reader = f", {self.reading:,.0f} of them for the person who reads" if self.reading else ""
        return f"per thousand {self.unit}: {in_digits(self.seconds)} s, {in_digits(self.joules)} J, {in_digits(self.yuan)} yuan{reader}"


def cost_per_thousand(
    seconds: float,
    ads: float,
    *,
    watts: float = 15.0,
    yuan_per_kwh: float = 0.8,
    yuan_per_hour: float = 0.25,
    reading_seconds: float = 0.0,
    wage: float = 60.0,
    unit: str = "ads",
) -> Cost:
    r"""Energy and money for a thousand ads: :math:`J = s \cdot W`, yuan = energy (3.6 MJ are 1 kWh) + machine + reader.

    Parameters
    ----------
    seconds, ads : measured seconds of one core, and how many ads (lists, decisions) they made, training included.
    watts : power of a busy core with its share of memory, supply and cooling. Assumed; a laptop draws about this, a graphics card 300-700.
    yuan_per_kwh : price of energy. Assumed: about what a business in a Chinese city pays.
    yuan_per_hour : rent of one core. Assumed: order of the list prices of cloud machines. The energy is counted beside it, so this is an upper end.
    reading_seconds, wage : a person's time an ad before it runs, and yuan an hour. Assumed.

    Raises ValueError: ads not above 0, anything negative. Taught in section 9.
    """
    if not ads > 0 or min(seconds, watts, yuan_per_kwh, yuan_per_hour, reading_seconds, wage) < 0:
        raise ValueError(f"a cost needs ads above 0 and nothing negative, got {ads} ads in {seconds} s")
    each = 1000 * seconds / ads
    joules, reading = each * watts, 1000 * reading_seconds / 3600 * wage
    return Cost(each, joules, joules / 3.6e6 * yuan_per_kwh + each / 3600 * yuan_per_hour + reading, reading, unit)


def in_digits(value: float) -> str:
    """A number with two digits, and without powers of ten for what is next to nothing. Taught in section 12."""
    return "below 0.001" if value < 0.001 else f"{value:.2g}" if value < 100 else f"{value:,.0f}"


def as_text(table: pd.DataFrame) -> pd.DataFrame:
    """The table of `judge` as it is read: claim, found, interval, traffic needed, verdict (and whether it is a loss), speaks about. Taught in section 12."""
    tested = table["found"].notna()
    percent = lambda column: [f"{v:+.1%}" if t else "" for v, t in zip(table[column], tested, strict=True)]  # noqa: E731
    low, high = percent("low"), percent("high")
    needed = [f"{v:,.0f} {u}" if t else "" for v, u, t in zip(table.traffic_needed, table.unit, tested, strict=True)]
    return pd.DataFrame(
        {
            "claim": [
                f"{what} {c:+.1%}".replace(".0%", "%") for what, c in zip(table.claim, table.claimed, strict=True)
            ],
            "by": table.by.to_numpy(),
            "found": percent("found"),
            "interval": [f"{a} to {b}" if a else "" for a, b in zip(low, high, strict=True)],
            "traffic needed": needed,
            "verdict": (table.verdict + (table.high < 0).map({True: ", a loss", False: ""})).to_numpy(),
            "speaks about": table.speaks_about.str.partition(":")[0].to_numpy(),
        },
        index=pd.Index(table["case"].to_numpy(), name="case"),
    )


def page(case: Case, table: pd.DataFrame, cost: Cost | None = None, note: str = "") -> str:
    """The page of a case as HTML: the seven `HEADINGS` in their order, every text escaped, without scripts.

    Parameters
    ----------
    table : from `judge`. cost : from `cost_per_thousand`, shown among the drawbacks. note : a sentence on what was measured, numbers included.

    Taught in section 9.
    """
    if cost is None and case.cost:
        cost = cost_per_thousand(**case.cost)
    say = lambda text: f"<p>{html.escape(' '.join(str(text).split()) or 'Not stated.')}</p>"  # noqa: E731
    told = {name: case.drawbacks.get(name, "not stated.") for name in DRAWBACKS}
    told["cost"] += f" Measured here, {cost}." if cost else ""
    planned = ", ".join(f"{name} {share:.0%}" for name, share in case.shares.items())
    verdicts = [f"{r.claim}: {r.verdict}; {r.reason}." for r in table.itertuples()]
    about = sorted(set(table.loc[table.verdict != NOT_TESTED, "speaks_about"]))
    parts = (
        say(case.background),
        say(f"{case.plan} Planned shares of people: {planned}. Sample ratio first, then the rule."),
        say(case.done),
        as_text(table).to_html(index=False, escape=True, border=0, justify="left") + (say(note) if note else ""),
        say(case.advantages),
        _list([f"{name.capitalize()}: {text}" for name, text in told.items()]),
        _list([*verdicts, f"Speaks about {'; and '.join(about) or 'nothing'}."]),
    )
    body = "".join(f"<h5>{heading}</h5>{part}" for heading, part in zip(HEADINGS, parts, strict=True))
    box = "border:1px solid #999;border-radius:6px;padding:.4em 1em;max-width:60em"
    return f'<section style="{box}"><h4>{html.escape(case.name)}</h4>{body}</section>'


def forest(table: pd.DataFrame, title: str | None = None) -> Figure:
    """Draw every tested claim of `judge` tables: the interval, the estimate, and a diamond at the claimed lift.

    Colours say the verdict; a claim that was judged on real people says so. Raises ValueError if nothing was tested. Taught in section 12.
    """
    shown = table[table["found"].notna()].reset_index(drop=True)
    if shown.empty:
        raise ValueError("no claim of this table was tested, so there is nothing to draw")
    fig, ax = plt.subplots(figsize=(9.5, 1.6 + 0.25 * len(shown)))
    for y, row in enumerate(shown.itertuples()):
        ax.plot([row.low, row.high], [y, y], lw=4, color=COLOUR_OF[row.verdict], solid_capstyle="butt")
        ax.plot(row.found, y, "o", color=COLOUR_OF[row.verdict], markersize=5)
    ax.plot(shown.claimed, range(len(shown)), "D", color="black", markerfacecolor="none", markersize=5, lw=0)
    ax.axvline(0, color="black", lw=1)
    short = shown["case"].str.partition(",")[0]
    real = (shown["speaks_about"] == SCOPES["world"]).map({True: " (real people)", False: ""})
    ax.set_yticks(range(len(shown)), short + ": " + shown["claim"] + real, fontsize=9)
    ax.set_ylim(len(shown) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:+.0%}")
    ax.set_xlabel("relative lift with 95 % interval; the diamond is the claim")
    handles = [plt.Line2D([], [], color=COLOUR_OF[v], lw=4, label=v) for v in VERDICTS if (shown.verdict == v).any()]
    fig.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9)
    fig.suptitle(title or "", x=0.01, ha="left")
    return fig


def _list(items: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(' '.join(item.split()))}</li>" for item in items) + "</ul>"
