"""Ads that answer: a quiz and a wheel of fortune, each one HTML page without scripts. Taught in notebooks/06_creative_text.ipynb, section 14.

Every text is escaped, nothing is loaded from elsewhere, and both work with the keyboard alone: the answers are ordinary radio buttons, the wheel a
checkbox. What chance decides is decided before the page is written, where the shop can log it.
"""

import re
from collections.abc import Mapping, Sequence
from html import escape
from itertools import product

import numpy as np

from adlib.plots import COLOURS

_LOOK = "font:15px/1.4 system-ui,sans-serif;color:#111;background:#fff;max-width:420px;padding:14px;border:1px solid #ccc;border-radius:8px"
_FOCUS = "outline:3px solid #0072B2;outline-offset:2px"


def _checked_name(name: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9-]{0,30}", name):
        raise ValueError(f"An ad's name has small letters, digits and hyphens and begins with a letter, not {name!r}.")
    return name


def _text(value: object, what: str) -> str:
    if not str(value).strip():
        raise ValueError(f"The {what} is empty.")
    return escape(str(value))


def quiz_ad(
    title: str,
    questions: Sequence[tuple[str, Sequence[str]]],
    results: Mapping[tuple[int, ...], str],
    *,
    name: str = "quiz",
) -> str:
    """A quiz whose answers lead to a recommendation, as one piece of HTML without scripts.

    Parameters
    ----------
    title : what the ad promises. questions : (question, two to five answers), one to three of them.
    results : the text for each combination of answers, by their numbers from 0, e.g. ``{(0, 1): "…"}``; all must be there.
    name : unique on a page.

    Raises
    ------
    ValueError : for too many or too few questions or answers, a missing or superfluous combination, an empty text, a name of other signs.

    Taught in notebooks/06_creative_text.ipynb, section 14.
    """
    name, sizes = _checked_name(name), [len(answers) for _, answers in questions]
    if not 1 <= len(questions) <= 3 or not all(2 <= size <= 5 for size in sizes):
        raise ValueError("A quiz has one to three questions with two to five answers each.")
    every = set(product(*map(range, sizes)))
    if wrong := sorted(every ^ set(results)):
        fault = "has no result" if wrong[0] in every else "does not exist"
        raise ValueError(
            f"The combination of answers {wrong[0]} {fault}: give one result for each of the {len(every)}."
        )
    fields, rules = [], [f".{name} .result{{display:none}}", f".{name} label:focus-within{{{_FOCUS}}}"]
    for q, (question, answers) in enumerate(questions):
        options = "".join(
            f'<label style="display:block;padding:4px"><input type="radio" name="{name}-{q}" id="{name}-{q}-{a}"> '
            f"{_text(answer, 'answer')}</label>"
            for a, answer in enumerate(answers)
        )
        legend = f'<legend style="font-weight:600">{_text(question, "question")}</legend>'
        fields.append(f'<fieldset style="border:0;padding:6px 0;margin:0">{legend}{options}</fieldset>')
    shown = []
    for combination in sorted(every):
        chosen = "".join(f":has(#{name}-{q}-{a}:checked)" for q, a in enumerate(combination))
        number = "-".join(map(str, combination))
        rules.append(f".{name}{chosen} .r-{number}{{display:block}}")
        shown.append(f'<p class="result r-{number}"><b>{_text(results[combination], "result")}</b></p>')
    head = f'<p style="font-size:18px;margin:0 0 6px"><b>{_text(title, "title")}</b></p>'
    body = "".join(fields) + f'<div aria-live="polite">{"".join(shown)}</div>'
    return f'<form class="{name}" style="{_LOOK}"><style>{"".join(rules)}</style>{head}{body}</form>'


def draw_prize(chances: Mapping[str, float], seed: int | Sequence[int]) -> str:
    """Draw one prize with the chances that the ad states; `seed` is kept in the log, so that a draw can be proved.

    Raises ValueError unless there are two to eight prizes with chances above zero that sum to one.
    """
    names, share = list(chances), np.array(list(chances.values()), float)
    if not 2 <= len(names) <= 8 or not (share > 0).all() or abs(share.sum() - 1) > 1e-9:
        raise ValueError("A wheel has two to eight prizes whose chances are above zero and sum to one.")
    return str(np.random.default_rng(seed).choice(names, p=share))


def wheel_ad(title: str, chances: Mapping[str, float], prize: str, *, name: str = "wheel", turns: int = 4) -> str:
    """A wheel of fortune that turns to a prize drawn before (``draw_prize``), as one piece of HTML without scripts.

    Sectors are as wide as the chances, and these are written below: a wheel that shows eight equal sectors and pays one of them in a hundred
    is a lie in a picture. Who has asked for less motion sees no turning.

    Parameters
    ----------
    title : what the ad promises. chances : prize → probability, two to eight, summing to one. prize : the one drawn.
    name : unique on a page. turns : full turns before it stops.

    Raises
    ------
    ValueError : for chances as in ``draw_prize``, a prize that is not on the wheel, an empty text, a name of other signs.

    Taught in notebooks/06_creative_text.ipynb, section 14.
    """
    name = _checked_name(name)
    draw_prize(chances, 0)  # the same checks
    if prize not in chances:
        raise ValueError(f"The prize {prize!r} is not on the wheel; it has {', '.join(chances)}.")
    edges = 360 * np.cumsum([0.0, *chances.values()])
    colours = list(COLOURS.values())
    sectors = ",".join(f"{colours[i]} {edges[i]:.1f}deg {edges[i + 1]:.1f}deg" for i in range(len(chances)))
    at = list(chances).index(prize)
    angle = 360 * int(turns) - (edges[at] + edges[at + 1]) / 2  # the middle of its sector stops under the pointer
    wheel = f"width:170px;height:170px;border-radius:50%;margin:6px auto;background:conic-gradient({sectors});transition:transform 3s ease-out"
    rules = (
        f".{name} .won{{visibility:hidden}}.{name}:has(#{name}-go:checked) .won{{visibility:visible;transition:visibility 0s 3s}}"
        f".{name}:has(#{name}-go:checked) .disc{{transform:rotate({angle:.1f}deg)}}.{name} label:focus-within{{{_FOCUS}}}"
        f"@media (prefers-reduced-motion:reduce){{.{name} .disc,.{name} .won{{transition:none!important}}}}"
    )
    listed = "".join(
        f'<li><span aria-hidden="true" style="color:{colour}">■</span> {_text(text, "prize")}: {chance:.0%}</li>'
        for (text, chance), colour in zip(chances.items(), colours, strict=False)
    )
    button = f'<label style="display:block;text-align:center;padding:4px"><input type="checkbox" id="{name}-go"> Turn the wheel</label>'
    won = f'<p class="won" aria-live="polite" style="text-align:center"><b>You drew: {escape(prize)}</b></p>'
    head = f'<p style="font-size:18px;margin:0"><b>{_text(title, "title")}</b></p><div aria-hidden="true" style="text-align:center">▼</div>'
    disc = f'<div class="disc" aria-hidden="true" style="{wheel}"></div>'
    return f'<form class="{name}" style="{_LOOK}"><style>{rules}</style>{head}{disc}{button}{won}<ul style="columns:2">{listed}</ul></form>'


def page(title: str, *ads: str) -> str:
    """A whole page around ads, allowed to load and run nothing (content security policy), to open or send as a file."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'none'"
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}"><meta name="viewport" content="width=device-width">'
    return f'<!doctype html><html lang="en"><head>{head}<title>{escape(title)}</title></head><body>{"".join(ads)}</body></html>'
