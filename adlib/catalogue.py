"""What stands in the market's shop: words for ads and reviews, human copy to learn from, product pictures.

The vocabulary is planted in ``market.toml``. Taught in notebooks/00_start_here.ipynb and 05_gpu_fine_tuning.ipynb.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw

from adlib import assets, copywriting

TRUTH = tomllib.loads((Path(__file__).parent / "market.toml").read_text(encoding="utf-8"))
APPEALS: tuple[str, ...] = tuple(TRUTH["appeals"]["names"])
PERSONAS: tuple[SimpleNamespace, ...] = tuple(SimpleNamespace(**p) for p in TRUTH["personas"])
CATEGORIES: tuple[SimpleNamespace, ...] = tuple(SimpleNamespace(**c) for c in TRUTH["categories"])
PAIRS = ("trousers", "sandals", "sneakers", "ankle boots")
PAIR_COLUMNS = [
    "product_id",
    "brand",
    "category",
    "colour",
    "material",
    "features",
    "price",
    "attributes",
    "audience",
    "persona",
    "appeal",
    "copy",
]
EVERYBODY = "our shoppers"  # the audience of an ad that is written for nobody in particular
TONES: tuple[str, ...] = tuple(TRUTH["catalogue"]["tones"])


def by_persona(key: str) -> np.ndarray:
    """A planted number (or list) of every persona: (6,) or (6, m)."""
    return np.array([getattr(p, key) for p in PERSONAS], dtype=np.float64)


def stock(category: np.ndarray, price: np.ndarray, rng: np.random.Generator) -> pd.DataFrame:
    """Products table of goods whose category (n,), index into ``CATEGORIES``, and price (n,), in yuan, are given."""
    of = [CATEGORIES[c] for c in category]
    frame = pd.DataFrame({"product_id": [f"p{i:04d}" for i in range(len(of))], "category": [c.name for c in of]})
    frame["brand"] = rng.choice(TRUTH["catalogue"]["brands"], len(of))
    frame["price"] = price.round(0)
    frame["colour"] = rng.choice(TRUTH["catalogue"]["colours"], len(of))
    frame["material"] = [c.materials[j] for c, j in zip(of, rng.integers(0, 4, len(of)), strict=True)]
    frame["features"] = ["|".join(rng.choice(c.features, 3, replace=False)) for c in of]
    frame.insert(1, "title", frame.brand + " " + frame.colour + " " + frame.category)
    frame["description"] = [fact_sentence(p, 0) for p in frame.to_dict("records")]
    frame["image"] = [f"{c.replace(' ', '-').lower()}/{i:04d}" for i, c in enumerate(frame.category)]
    return frame


def fact_sentence(product: Mapping, style: int, features: int = 3, styles: str = "facts") -> str:
    """One sentence with the product's colour, material, first features and, with styles "facts", brand; "unsigned" leaves the brand out."""
    names = str(product["features"]).split("|")[:features]
    facts = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    item = _item(product)
    parts = {k: str(product[k]) for k in ("brand", "colour", "material")} | {"item": item, "facts": facts}
    starts = {f"{k}_start": parts[k][:1].upper() + parts[k][1:] for k in ("facts", "material")}
    text = TRUTH["copy"][styles][style].format(**parts, **starts)
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def appeal_sentence(product: Mapping, appeal: str, tone: str, rng: np.random.Generator) -> str:
    """One sentence that makes the appeal in the tone, with the product's price in yuan where the phrase has one."""
    return rng.choice(TRUTH["copy"][appeal][tone]).format(price=f"{float(product['price']):.0f}")


def audience_copy(product: Mapping, appeal: str, rng: np.random.Generator) -> str:
    """Copy by a careful copywriter: every fact of the product once, then one sentence that makes the appeal and is signed by the brand."""
    facts = fact_sentence(product, rng.integers(len(TRUTH["copy"]["unsigned"])), styles="unsigned")
    reason = appeal_sentence(product, appeal, rng.choice(TONES), rng)
    form = str(rng.choice(TRUTH["copy"]["signed"]))
    signed = form.format(brand=product["brand"], item=_item(product), appeal=reason[0].lower() + reason[1:])
    return f"{facts} {signed}"


def _item(product: Mapping) -> str:
    return f"pair of {product['category']}" if product["category"] in PAIRS else str(product["category"])


def human_creatives(products: pd.DataFrame, each: int, rng: np.random.Generator) -> pd.DataFrame:
    """Ads as the shop's copywriters write them: `each` per product, of mixed appeal, tone and care; some claim too much."""
    rows = []
    for product in products.to_dict("records"):
        appeals = rng.permutation(np.resize(rng.permutation(APPEALS), each))
        for appeal in appeals:
            tone, style, named = rng.choice(TONES), rng.integers(len(TRUTH["copy"]["facts"])), int(rng.integers(0, 4))
            body = (
                fact_sentence(product, style, named)
                if named
                else f"The {product['colour']} {product['category']} is here."
            )
            rows.append((product["product_id"], appeal_sentence(product, appeal, tone, rng), body, appeal, tone))
    ads = pd.DataFrame(rows, columns=["product_id", "headline", "body", "appeal", "tone"]).assign(origin="human")
    return complete(ads, products)


def complete(creatives: pd.DataFrame, products: pd.DataFrame | None = None) -> pd.DataFrame:
    """Fill what a creatives table leaves open: creative_id (in row order), body, appeal, tone, image, origin."""
    ads = creatives.reset_index(drop=True).copy()
    if "creative_id" not in ads:
        ads.insert(0, "creative_id", [f"c{i:05d}" for i in range(len(ads))])
    if products is not None and "image" not in ads:
        ads["image"] = ads.product_id.map(products.set_index("product_id").image)
    for column, value in {"body": "", "appeal": "", "tone": "", "image": "", "origin": "unknown"}.items():
        if column not in ads:
            ads[column] = value
    return ads


def attribute_line(product: Mapping, features: int = 2) -> str:
    """The product's facts as one compact line for a prompt: ``brand: …; item: …; …; features: …; price: …``."""
    named = ", ".join(str(product["features"]).split("|")[:features])
    return f"brand: {product['brand']}; item: {product['category']}; colour: {product['colour']}; material: {product['material']}; features: {named}; price: {float(product['price']):.0f}"


def training_pairs(products: pd.DataFrame, n: int, seed: int = 0, brands: list[str] | None = None) -> pd.DataFrame:
    """Pairs of (attributes, audience) and the human copy for them, to teach a language model the shop.

    The copywriter names every attribute given and makes the appeal that the audience likes most; a sustainability appeal is only made
    where the product keeps it, else the second-best appeal is taken. Of eight pairs one is for ``EVERYBODY``, with any appeal that the
    product keeps, and two are for green shoppers, whose appeal hangs on the product and takes more examples to learn.

    Parameters
    ----------
    products : products table. n : pairs. seed : decides products, audiences and words.
    brands : only products of these brands (hold some brands out to test on).

    Returns
    -------
    DataFrame: product_id, brand, category, colour, material, features ("a|b", the two that the prompt names), price, attributes, audience,
    persona (index; -1: everybody), appeal, copy.

    Raises
    ------
    ValueError : if no product is of these brands.
    """
    rng = np.random.default_rng([seed, 11])
    stock = products if brands is None else products[products.brand.isin(brands)]
    if stock.empty:
        raise ValueError(f"No product is of the brands {brands}; the shop has {sorted(set(products.brand))}.")
    green = next(k for k, persona in enumerate(PERSONAS) if persona.audience == "green shoppers")
    turns = [*range(len(PERSONAS)), green, -1]  # whose turn it is; -1: everybody
    rows = []
    for i, product in enumerate(
        stock.sample(n, replace=n > len(stock), random_state=int(rng.integers(2**31))).to_dict("records")
    ):
        persona = turns[i % len(turns)]
        names = rng.permutation(product["features"].split("|"))[:2]
        product = {**product, "features": "|".join(names)}
        if persona >= 0:
            told = {"persona": persona, "audience": PERSONAS[persona].audience, "appeal": best_appeal(product, persona)}
        else:
            kept = [a for a in APPEALS if a != "sustainability" or is_green(product["features"])]
            told = {"persona": persona, "audience": EVERYBODY, "appeal": str(rng.choice(kept))}
        rows.append({**product, **told, "copy": audience_copy(product, told["appeal"], rng)})
    frame = pd.DataFrame(rows)
    frame["attributes"] = [attribute_line(p) for p in rows]
    return frame[PAIR_COLUMNS]


def best_appeal(product: Mapping, persona: int) -> str:
    """The appeal that moves this persona most and that this product keeps."""
    green = is_green(str(product["features"]))
    order = np.argsort(PERSONAS[persona].appeal)[::-1]
    return next(APPEALS[a] for a in order if APPEALS[a] != "sustainability" or green)


def is_green(features: str) -> bool:
    """Whether one of the features makes a sustainability claim true."""
    return any(feature in features for feature in TRUTH["catalogue"]["green_features"])


def reviews(market, n: int, seed: int = 0) -> pd.DataFrame:
    """n reviews of the shop's buyers: stars follow the product's quality, words follow the stars and the reviewer's interests."""
    rng = np.random.default_rng([market.seed, seed, 12])
    words, stock = TRUTH["reviews"], market.products.to_dict("records")
    users = rng.integers(0, market.n_users, n)
    likes = market.affinity[users]
    chosen = (likes + rng.gumbel(size=likes.shape)).argmax(1)
    stars = np.clip(np.rint(4.0 + 0.7 * market.quality[chosen] + rng.normal(0, 0.7, n)), 1, 5).astype(np.int64)
    texts = []
    for user, p, star in zip(users, chosen, stars, strict=True):
        product = {**stock[p], "item": stock[p]["category"], "feature": rng.choice(stock[p]["features"].split("|"))}
        mood = [
            w
            for side, k in (("good", star - 1), ("bad", 5 - star))
            for w in rng.choice(words[side], min(2, (k + 1) // 2), replace=False)
        ]
        lines = [rng.choice(words["openers"]), *mood, rng.choice(words["interest"][market.persona[user]])]
        texts.append(" ".join(lines).format(**product))
    start = np.datetime64(TRUTH["context"]["start"], "us") - np.timedelta64(TRUTH["context"]["history_days"], "D")
    when = start + (rng.random(n) * TRUTH["context"]["history_days"] * 86_400_000_000).astype("timedelta64[us]")
    frame = {
        "user_id": market.users.user_id.to_numpy()[users],
        "product_id": market.products.product_id.to_numpy()[chosen],
    }
    return pd.DataFrame(
        {**frame, "rating": stars, "text": texts, "timestamp": pd.DatetimeIndex(when).tz_localize("UTC")}
    )


@dataclass(frozen=True)
class CopyReading:
    """What the market's shoppers read in a text; see ``read_copy``."""

    coverage: float
    appeals: dict[str, float]
    false_claims: tuple[str, ...]
    words: int


def read_copy(text: str, product: Mapping) -> CopyReading:
    """Read free text the way the market's shoppers do; open and deterministic, so copy by any model can be served.

    Coverage is the share of the product's facts named. An appeal's intensity is 1 − 0.4^h for h different phrases of its lexicon
    (``market.toml``); if the intensities add up to more than 1.2 they are scaled down to it, since a text that appeals to everything
    convinces nobody. False claims are properties that the product's facts do not support.

    Returns
    -------
    CopyReading with coverage (0–1), appeals (name → 0–1), false_claims (words), words (count).
    """
    plain = " ".join(re.findall(r"[a-z0-9']+", text.lower()))
    hits = [len(pattern.findall(plain)) for pattern in _lexicon().values()]
    intensity = 1 - TRUTH["effects"]["appeal_saturation"] ** np.array(hits, float)
    intensity *= min(1.0, TRUTH["effects"]["appeal_budget"] / max(intensity.sum(), 1e-9))
    return CopyReading(
        coverage=copywriting.coverage(text, product),
        appeals=dict(zip(APPEALS, intensity.round(6).tolist(), strict=True)),
        false_claims=copywriting.unsupported_claims(text, product),
        words=copywriting.words(text),
    )


@cache
def _lexicon() -> dict[str, re.Pattern]:
    def one(phrase: str) -> str:
        """Return the pattern of a phrase."""
        words = re.escape(phrase.rstrip("*"))
        return rf"\b{words}" + (r"\w*" if phrase.endswith("*") else r"\b")

    return {a: re.compile("|".join(one(p) for p in TRUTH["lexicon"][a])) for a in APPEALS}


# -- pictures ------------------------------------------------------------------------------------------------------------------

_BODY = [(9, 6), (19, 6), (19, 25), (9, 25)]
_OUTLINES: dict[str, list[list[tuple[int, int]]]] = {  # on a 28 x 28 grid
    "t-shirt": [_BODY, [(9, 6), (4, 10), (6, 14), (10, 11)], [(19, 6), (24, 10), (22, 14), (18, 11)]],
    "trousers": [[(9, 3), (19, 3), (21, 26), (16, 26), (14, 9), (12, 26), (7, 26)]],
    "pullover": [_BODY, [(9, 6), (3, 22), (6, 23), (10, 12)], [(19, 6), (25, 22), (22, 23), (18, 12)]],
    "dress": [[(11, 3), (17, 3), (17, 11), (22, 26), (6, 26), (11, 11)]],
    "coat": [
        [(9, 4), (19, 4), (21, 26), (7, 26)],
        [(9, 4), (3, 21), (6, 22), (10, 11)],
        [(19, 4), (25, 21), (22, 22), (18, 11)],
    ],
    "sandals": [
        [(3, 20), (25, 20), (25, 23), (3, 23)],
        [(6, 20), (11, 13), (13, 13), (10, 20)],
        [(17, 20), (20, 11), (22, 11), (21, 20)],
    ],
    "shirt": [_BODY, [(9, 6), (4, 20), (7, 21), (10, 11)], [(19, 6), (24, 20), (21, 21), (18, 11)]],
    "sneakers": [[(3, 14), (9, 13), (13, 10), (16, 12), (25, 18), (25, 22), (3, 22)]],
    "bag": [
        [(5, 12), (23, 12), (25, 25), (3, 25)],
        [(9, 12), (11, 5), (17, 5), (19, 12), (17, 12), (16, 7), (12, 7), (11, 12)],
    ],
    "ankle-boots": [[(8, 5), (16, 5), (16, 14), (24, 19), (24, 23), (8, 23)]],
}
_RGB = {
    "sky blue": "#87b5d9",
    "forest green": "#2d5a3d",
    "mustard": "#d0a02d",
    "rose": "#d99aa5",
    "burgundy": "#6d1a36",
    "beige": "#d8c9ae",
    "brown": "#6b4a2f",
}


def picture(product: Mapping, size: int = 112) -> tuple[Image.Image, str]:
    """Picture of a product and what it is.

    Returns
    -------
    (RGB image of size × size pixels, "photograph (Fashion-MNIST)" or "drawn"): a photograph of the product's category where that asset
    is here, else a drawn garment in the product's colour.
    """
    kind, _, number = str(product["image"]).partition("/")
    if kind not in _OUTLINES:
        raise ValueError(f"No picture for {product['image']!r}; the shop has {', '.join(_OUTLINES)}.")
    if assets.available("fashion_mnist"):
        images, labels = assets.read("fashion_mnist", split="test")
        mine = np.flatnonzero(labels == list(_OUTLINES).index(kind))
        photo = Image.fromarray(255 - images[mine[int(number) % len(mine)]])
        return photo.convert("RGB").resize((size, size), Image.Resampling.LANCZOS), "photograph (Fashion-MNIST)"
    image = Image.new("RGB", (size * 4, size * 4), "white")
    fill = _RGB.get(str(product["colour"]), str(product["colour"]))
    for outline in _OUTLINES[kind]:
        points = [(x * size * 4 / 28, y * size * 4 / 28) for x, y in outline]
        ImageDraw.Draw(image).polygon(points, fill=fill, outline="#444444", width=size // 14)
    return image.resize((size, size), Image.Resampling.LANCZOS), "drawn"
