"""Click models on disk: a JSON file with what the columns mean, and a safetensors file with the weights. No pickle.

The JSON file holds the hash of the other, so that files of two models are not taken for one.

Taught in notebooks/03_ctr_modeling.ipynb, section "Own rows, larger than memory".
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sklearn.feature_extraction.text import TfidfVectorizer

from adlib.encoding import Encoder

FORMAT, FACTS, WEIGHTS = "adlib click model 1", "model.json", "model.safetensors"
PLAIN = ("numeric_", "categorical_", "vectors_", "text_", "n_features_in_")
ARRAYS = ("offsets_", "flagged_", "centre_", "scale_")


def write(folder, facts: dict, tensors: dict[str, torch.Tensor]) -> Path:
    """Write a model's facts and tensors. Neither file is ever half written, and an old one beside a new one is refused later."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, folder / (WEIGHTS + ".new"))
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    facts = {"format": FORMAT, **facts, "shapes": shapes, "weights": _hash(folder / (WEIGHTS + ".new"))}
    text = json.dumps(facts, ensure_ascii=False, default=_plain)
    (folder / (FACTS + ".new")).write_text(text, encoding="utf-8")
    for name in (WEIGHTS, FACTS):
        os.replace(folder / (name + ".new"), folder / name)
    return folder


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plain(value):
    return value.item() if isinstance(value, np.generic) else str(value)  # str: a torch device, a path


def read(folder) -> tuple[dict, dict[str, torch.Tensor]]:
    """Read facts and tensors back.

    Raises
    ------
    ValueError : a file is missing, cut off or of another format, or the two files do not belong together.
    """
    folder = Path(folder)
    if lost := [name for name in (FACTS, WEIGHTS) if not (folder / name).is_file()]:
        raise ValueError(
            f"{folder} holds no click model: {' and '.join(lost)} missing. Save one with model.save(folder)."
        )
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / FACTS} is damaged ({error}): copy it again or save the model anew.") from None
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged or cut off ({error}): copy it again or save anew.") from None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        found = facts.get("format") if isinstance(facts, dict) else type(facts).__name__
        raise ValueError(f"{folder / FACTS} is of the format {found!r}; this version reads {FORMAT!r}.")
    if lost := [name for name in ("params", "encoder", "base_rate", "shapes", "weights") if name not in facts]:
        raise ValueError(f"{folder / FACTS} is damaged ({', '.join(lost)} missing): copy it again or save anew.")
    shapes, said = {name: list(tensor.shape) for name, tensor in tensors.items()}, facts["shapes"]
    if odd := sorted(k for k in shapes.keys() | said.keys() if shapes.get(k) != said.get(k)):
        raise ValueError(f"{FACTS} and {WEIGHTS} in {folder} are not of one model: {', '.join(odd)} differ.")
    if _hash(folder / WEIGHTS) != facts["weights"]:
        raise ValueError(f"{FACTS} and {WEIGHTS} in {folder} are not of one model: the hash of the weights differs.")
    return facts, tensors


def encoder_state(encoder: Encoder) -> tuple[dict, dict[str, torch.Tensor]]:
    """All that an encoder has learnt, as plain facts and tensors."""
    facts = {name: getattr(encoder, name) for name in PLAIN} | {"params": encoder.get_params()}
    facts["feature_names_in_"] = [str(name) for name in encoder.feature_names_in_]
    facts["values_"] = {name: list(values) for name, values in encoder.values_.items()}
    facts["words_"] = {name: {w: int(i) for w, i in v.vocabulary_.items()} for name, (v, _) in encoder.words_.items()}
    tensors = {f"encoder.{name}": torch.from_numpy(getattr(encoder, name)) for name in ARRAYS}
    tensors |= {f"edges.{name}": torch.from_numpy(edges) for name, edges in encoder.edges_.items()}
    for name, (vectorizer, directions) in encoder.words_.items():
        tensors |= {
            f"idf.{name}": torch.from_numpy(vectorizer.idf_),
            f"directions.{name}": torch.from_numpy(directions),
        }
    return facts, tensors


def encoder_from(facts: dict, tensors: dict[str, torch.Tensor]) -> Encoder:
    """The encoder whose state this is."""
    encoder = Encoder(**facts["params"])
    for name in PLAIN:
        setattr(encoder, name, facts[name])
    for name in ARRAYS:
        setattr(encoder, name, tensors[f"encoder.{name}"].numpy())
    encoder.feature_names_in_ = np.array(facts["feature_names_in_"], dtype=object)
    encoder.values_ = {name: pd.Index(values, dtype=object) for name, values in facts["values_"].items()}
    found = [name.removeprefix("edges.") for name in tensors if name.startswith("edges.")]
    encoder.edges_ = {name: tensors[f"edges.{name}"].numpy() for name in encoder.numeric_ if name in found}
    encoder.words_ = {}
    for name, vocabulary in facts["words_"].items():
        vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b", vocabulary=vocabulary)
        vectorizer.idf_ = tensors[f"idf.{name}"].numpy()
        encoder.words_[name] = vectorizer, tensors[f"directions.{name}"].numpy()
    return encoder
