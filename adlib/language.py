"""Language models for ads: SmolLM2 writes, MiniLM reads. Loading, fine-tuning, sampling. Taught in notebooks/05_gpu_fine_tuning.ipynb."""

import hashlib
import json
import math
import mmap
import os
import re
import shutil
import struct
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import peft
import platformdirs
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from adlib import assets, compute, lesson

MAX_TOKENS = 512  # prompt and target together; a compact prompt has about 40
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attn_{k}": f"self_attn.{k}_proj" for k in "qkv"},
    "attn_output": "self_attn.o_proj",
    **{f"ffn_{k}": f"mlp.{k}_proj" for k in ("gate", "up", "down")},
}


# ---- SmolLM2 from its GGUF file --------------------------------------------------------------------------------------


def read_gguf(path: str | Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Read a GGUF file: its metadata, and its tensors as float32 arrays with axes in PyTorch's order.

    The file is a header of key–value pairs, a table of tensors, then the tensors' bytes, 4-bit blocks for the most part:
    https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.

    Raises
    ------
    ValueError
        If the file is no GGUF file of version 2 or 3, or is cut short.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF" or struct.unpack_from("<I", data, 4)[0] not in (2, 3):
            raise ValueError(f"{Path(path).name} is not a GGUF file of version 2 or 3.")
        try:
            metadata, table, start = _gguf_header(data)
            return metadata, {name: _gguf_tensor(data, start, *entry) for name, *entry in table}
        except (struct.error, IndexError, ValueError) as error:
            raise ValueError(f"{Path(path).name} is damaged or cut short ({error}).") from error


def _gguf_header(data: mmap.mmap) -> tuple[dict, list[tuple], int]:
    position = 8

    def take(form: str) -> tuple:
        nonlocal position
        values = struct.unpack_from("<" + form, data, position)
        position += struct.calcsize("<" + form)
        return values

    def text() -> str:
        (length,) = take("Q")
        return take(f"{length}s")[0].decode("utf-8")

    scalar = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))  # GGUF's numbers for struct's letters

    def value(kind: int):
        if kind == 8:
            return text()
        if kind != 9:
            return take(scalar[kind])[0]
        kind, count = take("IQ")
        return list(take(f"{count}{scalar[kind]}")) if kind in scalar else [value(kind) for _ in range(count)]

    tensors, pairs = take("QQ")
    metadata = {text(): value(*take("I")) for _ in range(pairs)}
    table = [(text(), take(f"{take('I')[0]}Q")[::-1], *take("IQ")) for _ in range(tensors)]
    return metadata, table, position + -position % metadata.get("general.alignment", 32)


def _gguf_tensor(data: mmap.mmap, start: int, shape: tuple, kind: int, offset: int) -> np.ndarray:
    kind = GGMLQuantizationType(kind)
    block, size = GGML_QUANT_SIZES[kind]
    stored = np.frombuffer(data, np.uint8, math.prod(shape) // block * size, start + offset)
    if kind == GGMLQuantizationType.F32:
        return stored.view(np.float32).reshape(shape).copy()
    return dequantize(stored.reshape(*shape[:-1], -1), kind)


def load_smollm2(
    *, dtype: torch.dtype | None = None, device: str = "auto", cache: bool = True
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Load SmolLM2-135M-Instruct (Allal et al. 2025, arXiv 2502.02737) from the asset ``smollm2``.

    The first call decodes the 4-bit file. With ``cache`` the result is kept beside the assets (270 MB in bfloat16), and the
    next call only maps it into memory; a damaged copy is written anew.

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
    source = assets.path("smollm2")
    root = Path(os.environ.get("ADLIB_CACHE") or platformdirs.user_cache_dir("adlib"))
    digest = hashlib.sha256(f"{assets.registry()['smollm2'].files[0].sha256} {dtype}".encode()).hexdigest()[:12]
    folder = root / "converted" / f"smollm2-{digest}"
    if cache and folder.is_dir():
        try:
            config, weights = LlamaConfig.from_pretrained(folder), load_file(folder / "model.safetensors")
            return _llama(config, weights, place), PreTrainedTokenizerFast.from_pretrained(folder)
        except (OSError, ValueError, RuntimeError, SafetensorError):
            shutil.rmtree(folder, ignore_errors=True)
    metadata, tensors = read_gguf(source)
    config, tokenizer = _llama_config(metadata, tied="output.weight" not in tensors), _gguf_tokenizer(metadata)
    weights = _llama_weights(tensors, config, dtype)
    if cache:
        with _whole_folder(folder) as partial:
            config.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            save_file(weights, partial / "model.safetensors")
    return _llama(config, weights, place), tokenizer


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A folder that appears under its name only when the block is through."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as partial:
        inner = Path(partial) / "files"
        inner.mkdir()
        yield inner
        with suppress(OSError):  # another process was faster: its copy is as good
            os.replace(inner, folder)


def _llama_config(metadata: dict, tied: bool) -> LlamaConfig:
    get = {key.removeprefix("llama."): value for key, value in metadata.items()}.__getitem__
    return LlamaConfig(
        vocab_size=get("vocab_size"),
        hidden_size=get("embedding_length"),
        intermediate_size=get("feed_forward_length"),
        num_hidden_layers=get("block_count"),
        num_attention_heads=get("attention.head_count"),
        num_key_value_heads=get("attention.head_count_kv"),
        max_position_embeddings=get("context_length"),
        rms_norm_eps=get("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": get("rope.freq_base")},
        bos_token_id=get("tokenizer.ggml.bos_token_id"),
        eos_token_id=get("tokenizer.ggml.eos_token_id"),
        pad_token_id=get("tokenizer.ggml.padding_token_id"),
        tie_word_embeddings=tied,
    )


def _llama_weights(tensors: dict[str, np.ndarray], config: LlamaConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for name, array in tensors.items():
        *block, leaf, ending = name.split(".")
        if leaf in heads:  # the file interleaves the two halves that rotary embedding turns; transformers keeps them apart
            array = array.reshape(heads[leaf], -1, 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        prefix = f"model.layers.{block[1]}." if block else ""
        weights[f"{prefix}{GGUF_NAMES[leaf]}.{ending}"] = torch.from_numpy(array).to(dtype)
    return weights


def _llama(config: LlamaConfig, weights: dict[str, torch.Tensor], place: torch.device) -> LlamaForCausalLM:
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced anyway
        model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"The model file does not fit: missing {sorted(missing)[:3]}, unexpected {unexpected[:3]}.")
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(config)  # a buffer that is not stored
    model.config.dtype = weights["model.norm.weight"].dtype
    model.name_or_path = "SmolLM2-135M-Instruct"
    if place.type == "cpu":  # the fused kernel's backward pass is slow on short sequences there
        model.set_attn_implementation("eager")
    return model.eval().to(place)


def _gguf_tokenizer(metadata: dict) -> PreTrainedTokenizerFast:
    fields = {key.removeprefix("tokenizer.").removeprefix("ggml."): v for key, v in metadata.items() if key.startswith("tokenizer.")}
    words = fields["tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["merges"]]
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(w, normalized=False) for w, kind in zip(words, fields["token_type"], strict=True) if kind == 3])
    names = (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        **{name: words[fields[f"{key}_token_id"]] for name, key in names},
    )
    tokenizer.chat_template = fields["chat_template"]
    return tokenizer


# ---- MiniLM: texts as vectors ----------------------------------------------------------------------------------------


def load_minilm(*, device: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load all-MiniLM-L6-v2 (Wang et al. 2020, arXiv 2002.10957; Reimers and Gurevych 2019) in float32 from the asset ``minilm``.

    Returns
    -------
    (model, tokenizer), the model in evaluation mode.

    Taught in notebooks/05_gpu_fine_tuning.ipynb, section 4.
    """
    place, folder = compute.device(device), assets.path("minilm")
    config = BertConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = BertModel(config, add_pooling_layer=False)
    return model, AutoTokenizer.from_pretrained(folder)


# ---- prompts and pairs -----------------------------------------------------------------------------------------------


def prompt(attributes: str | Mapping[str, object], audience: str) -> str:
    """The compact prompt, about 40 tokens, on which the copywriter of lessons 05 and 06 is trained and asked.

    Line breaks, control characters and the model's own control tokens are removed from what comes from data, so that a product
    cannot end the prompt and start another.

    Parameters
    ----------
    attributes : "brand: Okaro; colour: navy; …", or a mapping of them.
    audience : for whom, e.g. "bargain hunters".

    Raises
    ------
    ValueError
        If either is empty.

    Taught in notebooks/05_gpu_fine_tuning.ipynb, section 2.
    """
    if isinstance(attributes, Mapping):
        attributes = "; ".join(f"{name}: {value}" for name, value in attributes.items())
    facts, audience = _plain(attributes), _plain(audience)
    if not facts or not audience:
        raise ValueError("A prompt needs attributes and an audience, but one of them is empty.")
    return f"Product: {facts}\nAd for {audience}:"


def _plain(text: object) -> str:
    return " ".join(re.sub(r"<\|.*?\|>|[\x00-\x1f\x7f]", " ", str(text)).split())


class _Pair(NamedTuple):
    prompt: list[int]
    target: list[int]


def _pairs(tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], targets: Sequence[str]) -> list[_Pair]:
    """Token ids of prompts and targets; a target starts with a space and ends with the end-of-text token."""
    prompts, targets = list(prompts), list(targets)
    if len(prompts) != len(targets):
        raise ValueError(f"{len(prompts)} prompts do not match {len(targets)} targets.")
    _need_texts(prompts, "prompts")
    _need_texts(targets, "targets")
    asked = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    written = tokenizer([f" {t.strip()}" for t in targets], add_special_tokens=False)["input_ids"]
    pairs = [_Pair(p, [*t, tokenizer.eos_token_id]) for p, t in zip(asked, written, strict=True)]
    for i, pair in enumerate(pairs):
        if len(pair.prompt) + len(pair.target) > MAX_TOKENS:
            raise ValueError(
                f"Pair {i} has {len(pair.prompt) + len(pair.target)} tokens, more than {MAX_TOKENS}: shorten its description."
            )
    return pairs


def _need_texts(texts: Sequence[str], what: str) -> None:
    if len(texts) == 0:
        raise ValueError(f"There are no {what}: the list is empty.")
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"Text {i} of the {what} is empty or not a text: {text!r}. Remove it first.")


def _batches(rows: list, size: int, rng: np.random.Generator | None = None) -> list[np.ndarray]:
    """Index batches of rows of similar length, so that little is padded; shuffled if a generator is given."""
    lengths = np.array([sum(map(len, row)) if isinstance(row, _Pair) else len(row) for row in rows])
    order = np.arange(len(rows)) if rng is None else rng.permutation(len(rows))
    window = len(rows) if rng is None else 8 * size  # sorting all rows would make every epoch the same
    order = np.concatenate([w[np.argsort(lengths[w], kind="stable")] for w in np.split(order, range(window, len(order), window))])
    batches = np.split(order, range(size, len(order), size))
    return batches if rng is None else [batches[i] for i in rng.permutation(len(batches))]


def _left_pad(rows: Sequence[list[int]], pad: int, place: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=place)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=place)
    return ids, mask


def _target_loss(model: PreTrainedModel, batch: list[_Pair], pad: int) -> tuple[torch.Tensor, int]:
    """Summed negative log likelihood of the targets, and their number of tokens.

    Rows are padded on the left, so all targets end in the last column and logits are needed for the last few columns only:
    the output layer (49,152 words) is the dearest of all.
    """
    whole = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    ids, mask = _left_pad([pair.prompt + pair.target for pair in batch], pad, model.device)
    longest = max(len(pair.target) for pair in batch)
    labels = torch.tensor([[-100] * (longest - len(pair.target)) + pair.target for pair in batch], device=model.device)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16):
        hidden = whole.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        hidden = hidden[:, -longest - 1 : -1]  # position i predicts token i + 1
        logits = whole.get_output_embeddings()(hidden[labels != -100])
    return F.cross_entropy(logits.float(), labels[labels != -100], reduction="sum"), len(logits)


# ---- fine-tuning -----------------------------------------------------------------------------------------------------


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    targets: Sequence[str],
    *,
    steps: int = 60,
    batch_size: int = 8,
    learning_rate: float = 2e-3,
    rank: int = 8,
    layers: float = 1.0,
    held_out: tuple[Sequence[str], Sequence[str]] | None = None,
    evaluate_every: int = 10,
    seed: int = 0,
    progress: bool = True,
) -> tuple[peft.PeftModel, pd.DataFrame]:
    pairs = _pairs(tokenizer, prompts, targets)
    rng = np.random.default_rng(seed)
    tuned = _with_lora(model, rank, layers, seed)
    weights = [p for p in tuned.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    warm_up = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda s: min((s + 1) / warm_up, (steps - s) / max(1, steps - warm_up)))
    history, queue = [], []
    with tqdm(total=steps, desc="fine-tuning", disable=not progress) as bar, compute.memory_guard(batch_size):
        for step in range(1, steps + 1):
            queue = queue or _batches(pairs, batch_size, rng)
            batch = [pairs[i] for i in queue.pop()]
            begin = time.perf_counter()
            loss, n = _target_loss(tuned, batch, tokenizer.pad_token_id)
            (loss / n).backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
            speed = sum(len(p.prompt) + len(p.target) for p in batch) / (time.perf_counter() - begin)
            row = {"step": step, "loss": loss.item() / n, "tokens_per_second": speed}
            if held_out and (step % evaluate_every == 0 or step == steps):
                row["perplexity"] = perplexity(tuned, tokenizer, *held_out)
            history.append(row)
            bar.update()
            bar.set_postfix(loss=f"{row['loss']:.2f}", tokens_per_second=f"{speed:.0f}")
    tuned.eval()
    return tuned, pd.DataFrame(history, columns=["step", "loss", "tokens_per_second", "perplexity"])


def _with_lora(model, rank, layers, seed):
    n = model.config.num_hidden_layers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(LORA_TARGETS), task_type="CAUSAL_LM",
            layers_to_transform=list(range(n - round(layers * n), n)))
        return peft.get_peft_model(model, config)


@torch.inference_mode()
def perplexity(model, tokenizer, prompts, targets, *, batch_size: int = 16) -> float:
    pairs = _pairs(tokenizer, prompts, targets)
    with compute.memory_guard(batch_size):
        sums = [_target_loss(model, [pairs[i] for i in batch], tokenizer.pad_token_id) for batch in _batches(pairs, batch_size)]
    return math.exp(sum(float(loss) for loss, _ in sums) / sum(n for _, n in sums))


# ---- sampling --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def generate(model, tokenizer, prompts, *, n=1, temperature=0.8, top_p=0.95, max_new_tokens=60, seed=0, batch_size=32, progress=False):
    _need_texts(prompts, "prompts")
    rows = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    random = torch.Generator(model.device).manual_seed(seed)
    texts = [None] * len(rows)
    with compute.memory_guard(batch_size):
        for batch in tqdm(_batches(rows, max(1, batch_size // n)), desc="writing", disable=not progress):
            ids, mask = _left_pad([rows[i] for i in batch], tokenizer.pad_token_id, model.device)
            written = _sample(model, ids, mask, n, tokenizer.eos_token_id, max_new_tokens, temperature, top_p, random)
            written = [t.strip() for t in tokenizer.batch_decode(written, skip_special_tokens=True)]
            for k, i in enumerate(batch):
                texts[i] = written[k * n : (k + 1) * n]
    return [t[0] for t in texts] if n == 1 else texts


def _sample(model, ids, mask, n, stop, max_new_tokens, temperature, top_p, random):
    cache = DynamicCache(config=model.config)
    def forward(ids, positions):
        return model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1).logits[:, -1].float()
    logits = forward(ids, (mask.cumsum(1) - 1).clamp(min=0)).repeat_interleave(n, 0)
    cache.batch_repeat_interleave(n)
    mask = mask.repeat_interleave(n, 0)
    rows = torch.arange(len(mask))
    written = [[] for _ in rows]
    for _ in range(max_new_tokens):
        token = _pick(logits, temperature, top_p, random)
        for row, t in zip(rows.tolist(), token.tolist()):
            written[row].append(t)
        on = (token != stop).nonzero()[:, 0]
        if len(on) == 0:
            break
        if len(on) < len(rows):
            cache.batch_select_indices(on)
            rows, mask, token = rows[on.cpu()], mask[on], token[on]
        mask = F.pad(mask, (0, 1), value=1)
        logits = forward(token[:, None], mask.sum(1, keepdim=True) - 1)
    return written


def _pick(logits, temperature, top_p, random):
    if temperature == 0:
        return logits.argmax(-1)
    likely, tokens = (logits / temperature).topk(64)
    p = likely.softmax(-1)
    p[p.cumsum(-1) - p >= top_p] = 0
    return tokens.gather(1, torch.multinomial(p, 1, generator=random))[:, 0]
