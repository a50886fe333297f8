"""Model files: a 4-bit GGUF file becomes a transformers model; folders of weights carry the hashes of what is in them.

Taught in notebooks/05_gpu_fine_tuning.ipynb, section 1.
"""

import hashlib
import json
import math
import os
import shutil
import struct
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import peft
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

GGUF_NAMES = {  # llama.cpp's names of weights, and transformers'
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_output": "self_attn.o_proj",
    **{f"attn_{letter}": f"self_attn.{letter}_proj" for letter in "qkv"},
    **{f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
SCALARS = dict(
    zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True)
)  # GGUF's numbers of types, struct's letters
STRING, ARRAY = 8, 9


class OtherTraining(ValueError):
    """A checkpoint belongs to a training with other texts or settings."""


class DamagedFile(ValueError):
    """A model file is cut short, altered, or not what it should be."""


# ---- GGUF ------------------------------------------------------------------------------------------------------------


def read_gguf(path: str | Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Read a GGUF file: its metadata, and its tensors as float32 arrays with axes in PyTorch's order.

    The file is a header of key-value pairs, a table of tensors, then the tensors' bytes, most of them 4-bit blocks with a scale and
    an offset each: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.

    Raises
    ------
    DamagedFile
        If it is no GGUF file of version 2 or 3, or is cut short.

    Taught in notebooks/05_gpu_fine_tuning.ipynb, section 1.
    """
    data = Path(path).read_bytes()
    if data[:4] != b"GGUF" or data[4:8] not in (b"\2\0\0\0", b"\3\0\0\0"):
        raise DamagedFile(f"{Path(path).name} is not a GGUF file of version 2 or 3.")
    try:
        metadata, table, start = _header(data)
        return metadata, {name: _tensor(data, start, *entry) for name, *entry in table}
    except (struct.error, KeyError, ValueError) as error:
        raise DamagedFile(f"{Path(path).name} is damaged or cut short: {error}.") from error


def _header(data: bytes) -> tuple[dict, list[tuple], int]:
    position = 8

    def take(form: str) -> tuple:
        """The next values, by the letters of ``struct``."""
        nonlocal position
        values = struct.unpack_from("<" + form, data, position)
        position += struct.calcsize("<" + form)
        return values

    def text() -> str:
        """The next text: its length, then its UTF-8 bytes."""
        return take(f"{take('Q')[0]}s")[0].decode("utf-8")

    def value(kind: int):
        """The next value of a metadata type: a number, a text or a list of them."""
        if kind == STRING:
            return text()
        if kind != ARRAY:
            return take(SCALARS[kind])[0]
        kind, count = take("IQ")
        return list(take(f"{count}{SCALARS[kind]}")) if kind in SCALARS else [value(kind) for _ in range(count)]

    tensors, pairs = take("QQ")
    metadata = {text(): value(*take("I")) for _ in range(pairs)}
    table = [(text(), take(f"{take('I')[0]}Q")[::-1], *take("IQ")) for _ in range(tensors)]
    return metadata, table, position + -position % metadata.get("general.alignment", 32)


def _tensor(data: bytes, start: int, shape: tuple, number: int, offset: int) -> np.ndarray:
    kind = GGMLQuantizationType(number)
    block, size = GGML_QUANT_SIZES[kind]
    count = math.prod(shape) // block * size
    stored = np.frombuffer(data, np.uint8, count, start + offset)
    if kind == GGMLQuantizationType.F32:
        return stored.view(np.float32).reshape(shape).copy()
    return dequantize(stored.reshape(*shape[:-1], -1), kind)


# ---- Llama models ----------------------------------------------------------------------------------------------------


def llama_config(metadata: dict, tied: bool) -> LlamaConfig:
    """A transformers configuration from GGUF metadata; ``tied``: the output layer shares the input embeddings."""
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


def llama_weights(tensors: dict[str, np.ndarray], config: LlamaConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """GGUF tensors under transformers' names, in ``dtype``, with the rows of queries and keys in transformers' order.

    llama.cpp interleaves the two halves of each head that the rotary embedding turns against each other; transformers keeps them apart.
    """
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for name, array in tensors.items():
        *block, leaf, ending = name.split(".")
        if leaf in heads:
            array = array.reshape(heads[leaf], -1, 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        prefix = f"model.layers.{block[1]}." if block else ""
        weights[f"{prefix}{GGUF_NAMES[leaf]}.{ending}"] = torch.from_numpy(array).to(dtype)
    return weights


def llama_model(config: LlamaConfig, weights: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    """A model in evaluation mode around given weights, without first filling it with random ones.

    Raises
    ------
    DamagedFile
        If weights are missing or left over.
    """
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    missing = set(missing) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    if missing or unexpected:
        raise DamagedFile(
            f"The weights do not fit the model: missing {sorted(missing)[:3]}, left over {unexpected[:3]}."
        )
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(config)  # its buffers are computed, not stored
    model.config.dtype = weights["model.norm.weight"].dtype
    return model.eval()


def gguf_tokenizer(metadata: dict) -> PreTrainedTokenizerFast:
    """The tokenizer that GGUF metadata describes: byte-level BPE that splits digits ("smollm")."""
    fields = {key.split(".")[-1]: value for key, value in metadata.items() if key.startswith("tokenizer.")}
    words = fields["tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["merges"]]
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    control = [word for word, kind in zip(words, fields["token_type"], strict=True) if kind == 3]
    backend.add_special_tokens([AddedToken(word, normalized=False) for word in control])
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {role: words[fields[f"{key}_token_id"]] for role, key in roles.items()}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)
    tokenizer.chat_template = fields["chat_template"]
    return tokenizer


# ---- folders of weights ----------------------------------------------------------------------------------------------


def seal(folder: Path) -> None:
    """Write ``manifest.json`` with the sha256 of every file in the folder, last of all, so that an interrupt leaves none."""
    files = {
        path.name: _sha256(path) for path in sorted(folder.iterdir()) if path.is_file() and path.name != "manifest.json"
    }
    partial = folder / ".manifest.partial"
    partial.write_text(json.dumps(files, indent=1), encoding="utf-8")
    os.replace(partial, folder / "manifest.json")


def verify(folder: Path) -> None:
    """Hold the files of a sealed folder against its manifest.

    Raises
    ------
    DamagedFile
        If the manifest or a file is missing, or a file is not as it was written.
    """
    try:
        files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        changed = [name for name, digest in files.items() if _sha256(folder / Path(name).name) != digest]
    except (OSError, ValueError, AttributeError) as error:
        raise DamagedFile(f"{folder.name} is incomplete: {error}.") from error
    if changed:
        raise DamagedFile(f"{folder.name} is damaged: {', '.join(changed)} changed since it was written.")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to write into that is sealed and gets its name only when the block has ended without an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield partial
        seal(partial)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# ---- adapters -------------------------------------------------------------------------------------------------------


def save_adapter(model: peft.PeftModel, folder: str | Path) -> Path:
    """Write a model's adapter, a few MB, as safetensors with a manifest of hashes; returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "adapter_model.safetensors")
    model.peft_config["default"].save_pretrained(folder)
    seal(folder)
    return folder


def load_adapter(model: PreTrainedModel, folder: str | Path) -> peft.PeftModel:
    """Put a saved adapter on the model it was trained for; it can be used at once or trained further.

    Raises
    ------
    DamagedFile
        If a file is missing or was changed. ValueError if the adapter belongs to another model.
    """
    folder = Path(folder)
    try:
        verify(folder)
    except DamagedFile as error:
        raise DamagedFile(f"The adapter cannot be used: {error} Delete the folder and train it again.") from error
    config = peft.LoraConfig.from_pretrained(folder)
    if config.base_model_name_or_path != model.name_or_path:
        raise ValueError(
            f"This adapter was trained for {config.base_model_name_or_path}, not for {model.name_or_path}."
        )
    config.inference_mode = False
    tuned = peft_model(model, config)
    peft.set_peft_model_state_dict(tuned, load_file(folder / "adapter_model.safetensors"))
    return tuned.eval()


def peft_model(model: PreTrainedModel, config: peft.LoraConfig) -> peft.PeftModel:
    """The model with a new adapter of this configuration."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft still asks transformers under an old name
        return peft.get_peft_model(model, config)
