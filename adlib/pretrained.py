"""The two small language models, read from their assets, bigger ones by name, and what every use of them needs: batches, padding, number format.

Taught in notebooks/05_gpu_fine_tuning.ipynb, section 1.
"""

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import model_info, try_to_load_from_cache
from safetensors.torch import load_file, save_file
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.masking_utils import eager_mask
from transformers.utils import logging as transformers_logging

from adlib import assets, checkpoints, compute

MAX_TOKENS = 512  # of a prompt with its target; a compact prompt has about 40
ATTENTION = "grouped"  # of writers, see below: the fused kernel is slow on a CPU for short texts; on a GPU cuDNN's gives NaN behind padding


def load_smollm2(
    *, dtype: torch.dtype | None = None, device: str = "auto", cache: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load SmolLM2-135M-Instruct (Allal et al. 2025, arXiv 2502.02737) from the asset ``smollm2``.

    The first call decodes the 4-bit file. With ``cache`` the result is kept beside the assets (270 MB in bfloat16), and the
    next call reads that; a damaged copy is made anew.

    Parameters
    ----------
    dtype : number format of the weights; None: ``compute.dtype`` of the device.
    device : see ``compute.device``.

    Returns
    -------
    (model, tokenizer), the model in evaluation mode.

    Taught in notebooks/05_gpu_fine_tuning.ipynb, section 1.
    """
    place = compute.device(device)
    dtype = dtype or compute.dtype(place)
    source, registered = assets.path("smollm2"), assets.registry()["smollm2"].files[0].sha256
    digest = hashlib.sha256(f"{registered} {dtype}".encode()).hexdigest()[:12]
    folder = assets.cache_folder() / "converted" / f"smollm2-{digest}"
    try:
        if not cache:
            raise FileNotFoundError
        checkpoints.verify(folder)
        config, weights = LlamaConfig.from_pretrained(folder), load_file(folder / "model.safetensors")
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except (OSError, checkpoints.DamagedFile):
        metadata, tensors = checkpoints.read_gguf(source)
        config = checkpoints.llama_config(metadata, tied="output.weight" not in tensors)
        weights, tokenizer = checkpoints.llama_weights(tensors, config, dtype), checkpoints.gguf_tokenizer(metadata)
        if cache:
            _keep(folder, config, weights, tokenizer)
    model = checkpoints.llama_model(config, weights)
    model.name_or_path = "SmolLM2-135M-Instruct"
    model.set_attn_implementation(ATTENTION)
    return model.to(place), tokenizer


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **options,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention where several query heads share a key head (Ainslie et al. 2023, arXiv 2305.13245), without a copy of the keys for each.

    The heads of a group become rows of one product. query (b, heads, n, d), key and value (b, groups, m, d), mask (b, 1, n, m);
    returns (b, n, heads, d) and the weights (b, heads, n, m). A function for transformers' ``AttentionInterface``. Raises ValueError for
    models whose attention has more to it (capped scores, sinks).
    """
    if more := [name for name in ("softcap", "s_aux") if options.get(name) is not None]:
        raise ValueError(f"This model's attention uses {more[0]}: call model.set_attn_implementation('eager') first.")
    b, heads, n, d = query.shape
    rows = query.reshape(b, key.shape[1], -1, d)
    scores = (rows @ key.transpose(2, 3) * scaling).view(b, heads, n, -1)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    weights = torch.dropout(weights, dropout, module.training)
    mixed = weights.view(*rows.shape[:3], -1) @ value
    return mixed.view(b, heads, n, d).transpose(1, 2).contiguous(), weights


AttentionInterface.register("grouped", grouped_attention)
AttentionMaskInterface.register("grouped", eager_mask)


def _keep(folder: Path, config: LlamaConfig, weights: dict, tokenizer: PreTrainedTokenizerFast) -> None:
    try:
        with checkpoints.whole_folder(folder) as partial:
            config.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            save_file(weights, partial / "model.safetensors")
    except OSError as error:
        if not folder.is_dir():  # otherwise another process was faster, and its copy is as good
            warnings.warn(
                f"The decoded model could not be kept ({error}); it is decoded again next time.", stacklevel=3
            )


def load_writer(name: str = "smollm2", **options) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load a causal language model: "smollm2", a folder in transformers' format, or a name on the Hugging Face hub.

    Only weights in safetensors are read, and no code that comes with them. Before anything large is fetched, its need is compared
    with the free memory.

    Parameters
    ----------
    name : e.g. "smollm2" or "HuggingFaceTB/SmolLM2-1.7B-Instruct".
    options : dtype and device, as in ``load_smollm2``.

    Raises
    ------
    ValueError
        If the hub cannot be reached or has no such model. MemoryError if the weights alone are more than what is free.

    Taught in notebooks/05_gpu_fine_tuning.ipynb, section "On a GPU".
    """
    return load_smollm2(**options) if name == "smollm2" else _named(AutoModelForCausalLM, name, **options)


def load_reader(name: str = "minilm", **options) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load a BERT-like encoder: "minilm", a folder, or a name on the hub; see ``load_writer``."""
    return load_minilm(**options) if name == "minilm" else _named(AutoModel, name, dtype=torch.float32, **options)


def _named(kind, name: str, *, dtype: torch.dtype | None = None, device: str = "auto"):
    place = compute.device(device)
    dtype = dtype or compute.dtype(place)
    try:
        if not (Path(name).is_dir() or try_to_load_from_cache(name, "config.json")):
            _ask_hub(name)
        config = AutoConfig.from_pretrained(name)
        with torch.device("meta"):
            count = sum(weight.numel() for weight in kind.from_config(config).parameters())
        need, free = count * dtype.itemsize, compute.free_memory(place)
        if need > free:
            raise MemoryError(
                f"{name} has {count / 1e6:,.0f} million weights, {need / 2**30:.1f} GiB in {str(dtype).removeprefix('torch.')}, but "
                f"{place} has {free / 2**30:.1f} GiB free: choose a smaller model."
            )
        model = kind.from_pretrained(name, dtype=dtype, use_safetensors=True)
        if kind is AutoModelForCausalLM:
            model.set_attn_implementation(ATTENTION)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The model {name!r} is no folder here, and the hub did not give it ({str(error).splitlines()[0][:120]}). Check the name and "
            f"the network, fetch it once where there is one (hf download {name}), or take the model that comes with the course."
        ) from error
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model.eval().to(place), tokenizer


def _ask_hub(name: str) -> None:
    """Ask once whether the hub has a model: transformers alone would try for many seconds."""
    try:
        model_info(name, timeout=10)
    except Exception as error:  # of whichever library the hub's client speaks HTTP with
        raise OSError(str(error) or type(error).__name__) from error


def load_minilm(*, device: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load all-MiniLM-L6-v2 (Wang et al. 2020, arXiv 2002.10957; Reimers and Gurevych 2019) in float32 from the asset ``minilm``.

    Returns
    -------
    (model, tokenizer), the model in evaluation mode.

    Taught in notebooks/05_gpu_fine_tuning.ipynb, section 2.
    """
    place, folder = compute.device(device), assets.path("minilm")
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    tokenizer.backend_tokenizer.no_padding()  # the file asks for 128 columns whatever the texts
    return model.eval().to(place), tokenizer


# ---- texts and batches -----------------------------------------------------------------------------------------------


def checked_texts(texts: Sequence[str], what: str) -> list[str]:
    """The texts as a list; ValueError, naming `what` they are, if there are none or one of them is empty."""
    if isinstance(texts, str):
        raise ValueError(f"The {what} must be a list of texts, not one text.")
    if len(texts) == 0:
        raise ValueError(f"There are no {what}: the list is empty.")
    for i, text in enumerate(texts := list(texts)):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"Text {i} of the {what} is empty or not a text: {text!r}. Remove it first.")
    return texts


def length_batches(lengths: Sequence[int], size: int, rng: np.random.Generator | None = None) -> list[np.ndarray]:
    """Batches of row numbers with similar lengths, so that little is padded; in random order if a generator is given."""
    lengths = np.asarray(lengths)
    order = np.arange(len(lengths)) if rng is None else rng.permutation(len(lengths))
    window = len(lengths) if rng is None else 8 * size  # sorted as a whole, every epoch would have the same batches
    windows = np.split(order, range(window, len(order), window))
    order = np.concatenate([w[np.argsort(lengths[w], kind="stable")] for w in windows])
    batches = np.split(order, range(size, len(order), size))
    return batches if rng is None else [batches[i] for i in rng.permutation(len(batches))]


def padded(
    rows: Sequence[list[int]], pad: int, place: torch.device, *, left: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of rows of unequal length, (n, longest) int64 both."""
    width = max(map(len, rows))
    fill = (
        (lambda row, value: [value] * (width - len(row)) + row)
        if left
        else (lambda row, value: row + [value] * (width - len(row)))
    )
    ids, mask = [fill(row, pad) for row in rows], [fill([1] * len(row), 0) for row in rows]
    return torch.tensor(ids, device=place), torch.tensor(mask, device=place)


@contextmanager
def arithmetic(place: torch.device, number: torch.dtype) -> Iterator[None]:
    """Matrix products in bfloat16 where the weights are (adapters stay float32), else in the fast float32 of the CPU."""
    with compute.fast_cpu(place=place), torch.autocast(place.type, torch.bfloat16, enabled=number == torch.bfloat16):
        yield
