"""What an ad says and whether it may: facts named, claims kept, policy, length, variety. Taught in notebooks/06_creative_text.ipynb.

A product is any mapping with some of brand, category, colour, material, features ("a|b"), price, title and description; what is missing, empty or
NaN is simply no fact.
"""

import functools
import html
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

import pandas as pd

GREEN = ("organic", "recycled", "vegan")  # what makes a claim to be green true
_GREEN_WORDS = "eco ecological sustainable sustainably sustainability planet footprint green climate responsible responsibly carbon"
_PROPERTY_WORDS = (
    "organic recycled vegan cashmere silk merino wool leather suede linen denim cotton bamboo corduroy flannel viscose canvas nylon cork rubber mesh "
    "hood belt lined cushioned reflective pleated handmade antibacterial breathable hypoallergenic windproof removable waterproof"
)
# Claims that are known to be made; one is kept if the product's own facts contain one of the words that support it.
CLAIMS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_GREEN_WORDS.split(), GREEN),
    **{word: (word,) for word in _PROPERTY_WORDS.split()},
    "water resistant": ("water repellent", "waterproof", "water resistant"),
}
_OFFERED = "shipping|delivery|returns?|gifts?|trial"
POLICY: dict[str, re.Pattern] = {
    "superlative or absolute promise": re.compile(
        r"(?i)\b(best|cheapest|number one|world'?s|unbeatable|perfect|ultimate|guaranteed?|miracle|cures?)\b|\bno\.? ?1\b|100 ?%"
    ),
    # "flicker-free", "crease free" and "free of PVC" are facts, "free" alone is an offer, and nothing is free here
    "free (nothing is free here)": re.compile(
        rf"(?i)(?<![-\w])(?<!crease )(?<!wrinkle )(?<!iron )(?<!feel )free(?:-(?={_OFFERED})|(?![-\w]))(?! from\b| of\b(?! charge))"
    ),
    "health claim": re.compile(r"(?i)\b(heals?|slimming|detox|anti-?ageing)\b"),
    "shouting": re.compile(r"!{2,}|\b[A-Z]{4,}\b|\b[A-Z]{2,}[ ,]+[A-Z]{2,}\b"),
}
LENGTH = (6, 30)  # words that fit on the shop's ad card
# Words that say nothing about a product: grammar and the small talk of ads. `neutral_vocabulary` adds what a shop's own copywriters use.
_PLAIN = """a about after again all also always am an and another any are around as at be because been before being both but by can come could did do
does done each either else ever every everyone few for from get go good great had has have he her here him his how i if in into is it its just let like
made make many may me might more most much must my need never next no not now of on once one only or other our out over own pair per put right same see
set shall she should so some someone something still such take than that the their them then there these they thing this those through to too two under
until up us very want was way we well were what when where whether which while who whose why will wish with within without would yes yet you your
ad add addition bring buy choice choose closet collection customer day daily deserve discover enjoy everyday everything explore feel find friend gift
give home item keep know life little look love meet moment morning night occasion offer online order outfit piece please price product purchase say
season shop shopper show start store style thank time today together tonight treat try use wait wardrobe wear week weekend welcome work year yuan"""
PLAIN_WORDS = frozenset(_PLAIN.split())


def attributes_of(product: Mapping) -> dict[str, str]:
    """Facts of a product that an ad can name.

    Parameters
    ----------
    product : mapping with any of brand, category, title, colour, material, features ("a|b").

    Returns
    -------
    dict from attribute to text; features become feature_1, feature_2, … Missing or empty facts are left out; a product without category is
    known by its title.
    """
    item = "category" if _present(product, "category") else "title"
    facts = {k: str(product[k]) for k in ("brand", item, "colour", "material") if _present(product, k)}
    features = str(product["features"]).split("|") if _present(product, "features") else []
    return facts | {f"feature_{i}": f.strip() for i, f in enumerate(features, start=1) if f.strip()}


def covered(text: str, product: Mapping) -> dict[str, bool]:
    """Which facts of the product the text names, attribute by attribute; hyphens, case and a plural s do not matter."""
    plain = _plain(text)
    return {name: _phrase(value).search(plain) is not None for name, value in attributes_of(product).items()}


def coverage(text: str, product: Mapping) -> float:
    """Share of the product's facts that the text names, 0 to 1; 0 without facts. Taught in notebooks/06_creative_text.ipynb, section 2."""
    hits = covered(text, product)
    return sum(hits.values()) / len(hits) if hits else 0.0


def wrong_numbers(text: str, product: Mapping) -> tuple[str, ...]:
    """Numbers in the text that are neither the product's price (to the nearest yuan) nor among its facts."""
    found = dict.fromkeys(_NUMBER.findall(_plain(text)))
    if not found:
        return ()
    price = float(product["price"]) if _present(product, "price") else float("nan")
    facts = set(_NUMBER.findall(_facts(product)))
    return tuple(n for n in found if n not in facts and not abs(_value(n) - price) <= 0.5)


def unsupported_claims(text: str, product: Mapping) -> tuple[str, ...]:
    """Known claims (``CLAIMS``) and numbers in the text that the product's facts, price and description do not support.

    The product's own facts are taken out of the text first, so that "forest green" is a colour and "green without the lecture" a claim. A closed list
    sees only what is on it; ``unsupported_words`` goes further. The market's shoppers read ads through this function. Taught in
    notebooks/06_creative_text.ipynb, section 3.
    """
    plain = _plain(text)
    claims = dict.fromkeys(_CLAIM.findall(plain))
    if claims:
        left, facts = set(_CLAIM.findall(_without_facts(plain, product))), _facts(product)
        claims = [c for c in claims if c in left and not any(s in facts for s in CLAIMS[c])]
    return (*claims, *wrong_numbers(text, product))


def neutral_vocabulary(texts: Sequence[str], products: Sequence[Mapping], minimum: int = 3) -> frozenset[str]:
    """Words that human copywriters use whatever the product is, so that they are no property of a product.

    A word is neutral if it stands in ads for at least `minimum` different products among whose facts it is not, and if it is no known claim. "Wool" is
    only written of wool and stays a property; "back" in "shoppers keep coming back" is written of all sorts. What all copywriters invent alike looks
    neutral to this rule: that is its blind spot, and why known claims (``CLAIMS``) never become neutral.

    Parameters
    ----------
    texts, products : ads by people and the product of each, equally long. minimum : products that a word must be seen with.

    Returns
    -------
    frozenset of word stems, ``PLAIN_WORDS`` among them, for ``unsupported_words``.

    Raises
    ------
    ValueError : if texts and products differ in length. TypeError : if a text is none.

    Taught in notebooks/06_creative_text.ipynb, section 3.
    """
    seen = defaultdict(set)
    for text, product in _pairs(texts, products):
        for word in stems(text) - stems(_facts(product)):
            seen[word].add(tuple(attributes_of(product).values()))
    common = {word for word, of in seen.items() if len(of) >= minimum}
    return frozenset(common - stems(" ".join(CLAIMS)) | stems(" ".join(PLAIN_WORDS)))


def unsupported_words(text: str, product: Mapping, neutral: Collection[str]) -> tuple[str, ...]:
    """Everything in the text that neither the product's facts nor neutral ad language supports: known claims, wrong numbers, other words.

    The vocabulary is open: a word that nobody listed is suspect until the product or the copywriters' language vouches for it. The price are false
    alarms on harmless new words. Single words are looked at, so facts that are put together wrongly ("leather lining" of a leather shoe with a warm
    lining) pass. `neutral` comes from ``neutral_vocabulary``. Taught in notebooks/06_creative_text.ipynb, section 3.
    """
    facts = _facts(product)
    vouched = stems(facts) | set(neutral)
    suspects = [w for w in _WORD.findall(_plain(text)) if _stem(w) not in vouched]
    kept = {w for w in suspects if any(s in facts for s in CLAIMS.get(w, ()))}
    claims = unsupported_claims(text, product)
    named = {part for claim in claims for part in claim.split()}
    return (*claims, *dict.fromkeys(w for w in suspects if w not in kept | named))


def policy_violations(text: str, product: Mapping | None = None) -> tuple[str, ...]:
    """Names of the advertising rules that the text breaks, in the order of ``POLICY``; with a product, its facts are never a violation.

    Taught in notebooks/06_creative_text.ipynb, section 4.
    """
    text = unicodedata.normalize("NFKC", str(text)).replace("\u2019", "'")
    for value in attributes_of(product).values() if product is not None else ():
        text = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", "it", text, flags=re.IGNORECASE)
    return tuple(name for name, pattern in POLICY.items() if pattern.search(text))


def words(text: str) -> int:
    """Number of words of a text."""
    return len(re.findall(r"[\w'-]+", text))


def scorecard(
    texts: Sequence[str],
    products: Sequence[Mapping],
    neutral: Collection[str],
    *,
    minimum_coverage: float = 1.0,
    length: tuple[int, int] = LENGTH,
) -> pd.DataFrame:
    """All checks of all texts, one row a text.

    Parameters
    ----------
    texts, products : ads and the product of each, equally long. neutral : from ``neutral_vocabulary``.
    minimum_coverage : share of the facts that an ad must name. length : fewest and most words.

    Returns
    -------
    DataFrame: coverage (0-1), unsupported, violations (tuples of what was found), faithful, policy_ok, length_ok, passes (all four; bool).

    Raises
    ------
    ValueError : if texts and products differ in length. TypeError : if a text is none.

    Taught in notebooks/06_creative_text.ipynb, section 5.
    """
    pairs = _pairs(texts, products)
    frame = pd.DataFrame({"coverage": [coverage(*pair) for pair in pairs]}, dtype=float)
    frame["unsupported"] = [unsupported_words(*pair, neutral) for pair in pairs]
    frame["violations"] = [policy_violations(*pair) for pair in pairs]
    frame["faithful"], frame["policy_ok"] = (frame[c].map(len).eq(0) for c in ("unsupported", "violations"))
    frame["length_ok"] = [length[0] <= words(t) <= length[1] for t in texts]
    frame["passes"] = frame[["faithful", "policy_ok", "length_ok"]].all(axis=1) & (frame.coverage >= minimum_coverage)
    return frame


def sentences(text: str) -> list[str]:
    """Sentences of a text, each with its closing mark."""
    return [s for s in re.split(r"(?<=[.!?])\s+", text.strip()) if s]


def distinct(texts: Iterable[str], n: int = 2) -> float:
    """Share of different n-grams of words among all n-grams of the texts, 0 to 1 (distinct-n, Li et al. 2016, arXiv 1510.03055); 0 without any.

    It falls as the number of texts grows, so compare sets of the same size. Taught in notebooks/06_creative_text.ipynb, section 5.
    """
    tokens = [_WORD.findall(_plain(text)) for text in texts]
    grams = [gram for t in tokens for gram in zip(*(t[i:] for i in range(n)), strict=False)]
    return len(set(grams)) / len(grams) if grams else 0.0


def verbatim_share(texts: Iterable[str], reference: Iterable[str]) -> float:
    """Share of the texts' sentences that stand word for word in the reference texts, 0 to 1; taught as ``distinct``."""
    known = {_plain(s) for text in reference for s in sentences(text)}
    own = [_plain(s) in known for text in texts for s in sentences(text)]
    return sum(own) / len(own) if own else 0.0


def headline_and_body(text: str) -> tuple[str, str]:
    """Split a text for an ad card: the last sentence, where the appeal is made, becomes the headline; what goes before is the body."""
    parts = sentences(text)
    return (parts[-1], " ".join(parts[:-1])) if parts else ("", "")


def template_copy(product: Mapping) -> str:
    """The shop's fixed template, the baseline of every comparison: brand, colour, item and price, the same for everybody."""
    price = f" for {float(product['price']):.0f} yuan" if _present(product, "price") else ""
    facts = attributes_of(product)
    named = [facts[k] for k in ("brand", "colour", "category", "title") if k in facts]
    return f"{' '.join(named) or 'New in the shop'}{price}. Shop now."


def ad_card(headline: str, body: str, *, label: str = "", picture: str = "", width: int = 230) -> str:
    """One ad as HTML without scripts: every text is escaped, so a title that holds HTML is shown and not run.

    Parameters
    ----------
    label : line above the ad, e.g. its audience. picture : data URI of a PNG or JPEG, or nothing. width : pixels.

    Raises
    ------
    ValueError : if `picture` is something else.

    Taught in notebooks/06_creative_text.ipynb, section 7.
    """
    if picture and not re.fullmatch(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+", picture):
        raise ValueError("An ad card embeds its picture as a data URI of a PNG or JPEG.")
    frame = f"display:inline-block;vertical-align:top;width:{int(width)}px;margin:6px;padding:12px;border:1px solid #ccc;border-radius:8px"
    image = f'<img src="{picture}" alt="" style="height:84px;display:block;margin:0 auto 8px">' if picture else ""
    above = f'<div style="font-size:11px;color:#555;margin-bottom:6px">{html.escape(label)}</div>' if label else ""
    text = f'<div style="font-weight:600;margin-bottom:4px">{html.escape(headline)}</div><div>{html.escape(body)}</div>'
    return f'<div style="{frame};background:#fff;color:#111;font:13px/1.35 system-ui,sans-serif">{above}{image}{text}</div>'


# -- words and facts -----------------------------------------------------------------------------------------------------------

_NUMBER = re.compile(r"(?<!\w)\d+(?:[.,]\d+)*")
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
_CLAIM = re.compile(rf"\b({'|'.join(sorted(CLAIMS, key=len, reverse=True))})\b")


def _pairs(texts: Sequence[str], products: Sequence[Mapping]) -> list[tuple[str, Mapping]]:
    if len(texts) != len(products):
        raise ValueError(f"{len(texts)} texts do not match {len(products)} products.")
    return list(zip(texts, products, strict=True))


def stems(text: str) -> set[str]:
    """The different words of a text, in small letters and without a plural or possessive s."""
    return {_stem(word) for word in _WORD.findall(_plain(text))}


def _stem(word: str) -> str:
    word = word.removesuffix("'s")
    if len(word) < 4 or not word.endswith("s") or word.endswith("ss"):
        return word
    return word[:-2] if word.endswith(("sses", "shes", "ches", "xes")) else word[:-1]


def _value(number: str) -> float:
    plain = re.sub(r",(?=\d{3}(?!\d))", "", number).replace(",", ".")  # 1,299.00 and 89,90
    return float(plain) if plain.count(".") < 2 else float("nan")


def _present(product: Mapping, key: str) -> bool:
    value = product.get(key)
    return not pd.isna(value) and str(value).strip() != ""


def _plain(text: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"An ad is a text, not {text!r}.")
    text = unicodedata.normalize("NFKC", text).replace("\u2019", "'").lower()
    return re.sub(r"[\s\-\u2010-\u2015]+", " ", text).strip()


def _facts(product: Mapping) -> str:
    """All that is known of a product, as one plain text."""
    more = [str(product[k]) for k in ("title", "description") if _present(product, k)]
    return _plain(" | ".join([*attributes_of(product).values(), *more]))


def _without_facts(plain: str, product: Mapping) -> str:
    for value in sorted(attributes_of(product).values(), key=len, reverse=True):
        plain = _phrase(value).sub(" | ", plain)
    return plain


@functools.lru_cache(maxsize=4096)
def _phrase(value: str) -> re.Pattern:
    # ASCII boundaries, since languages without spaces have no others
    return re.compile(rf"(?<![a-z0-9]){re.escape(_plain(value))}s?(?![a-z0-9])")
