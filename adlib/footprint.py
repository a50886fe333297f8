"""The memory of a training step: predicted by a formula, measured, and compared with what is free.

Taught in notebooks/05_gpu_fine_tuning.ipynb, sections 1 and 4.
"""

import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig, PreTrainedModel

from adlib.likelihood import ROWS


def predicted(
    config: PreTrainedConfig,
    *,
    weights: int,
    trained: int,
    adapted: int,
    dtype: torch.dtype,
    batch_size: int,
    tokens: int,
    targets: int,
    rank: int = 8,
    accumulate: int = 1,
    recompute: bool = False,
) -> dict[str, float]:
    """Bytes that a step of LoRA with AdamW takes on a Llama-like model, by part, and the highest sum.

    What each adapted layer keeps for the way back, for each token (h: width, k: width of the keys, i: inner width, a: heads, T: tokens a
    text), is 4·(6h + 2k + 4i + aT + 7r) bytes in float32; in bfloat16 16h + 4k + 8i + 6aT + 14r, and a bfloat16 copy of the adapters.
    The words take their logits and the gradient of these, and ``likelihood.ROWS`` rows of them in float32, twice, or three times if
    they are bfloat16. Recomputation keeps only each layer's input, and one layer's rest at a time. Compare Korthikanti et al. (2022),
    arXiv 2205.05198.

    Parameters
    ----------
    config : of the model. weights : number of all weights, adapters included; trained : those in the adapters.
    adapted : number of layers with adapters. batch_size : texts a step. tokens, targets : those read of a text (all but its last)
        and those of its target.
    rank, accumulate, recompute : see ``tuning.fine_tune``.

    Returns
    -------
    dict of bytes: weights, optimiser, gradients, activations, words, and peak, the most that is held at one time.

    Taught in notebooks/05_gpu_fine_tuning.ipynb, section 4.
    """
    h, i, a, texts = (
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        -(-batch_size // accumulate),
    )
    k = h * config.num_key_value_heads // a
    if dtype == torch.float32:
        token, copy = 4 * (6 * h + 2 * k + 4 * i + a * tokens + 7 * rank), 0
        work = 2 * 4 * ROWS
    else:
        token, copy = 16 * h + 4 * k + 8 * i + 6 * a * tokens + 14 * rank, 2 * trained
        work = 3 * 4 * ROWS
    layer, number = texts * tokens * token, dtype.itemsize
    found = {
        "weights": (weights - trained) * number + 4 * trained,
        "optimiser": 8 * trained,
        "gradients": 4 * trained,
        "activations": texts * tokens * h * number * config.num_hidden_layers if recompute else layer * adapted + copy,
        "words": config.vocab_size * (2 * number * targets * texts + work),
    }
    kept = found["activations"]
    rest = max(kept + found["words"], kept + layer if recompute else 0, found["gradients"])
    return found | {"peak": found["weights"] + found["optimiser"] + rest}


def largest_batch(config: PreTrainedConfig, free: float, batch_size: int, **facts) -> int:
    """The largest batch size up to ``batch_size`` whose predicted peak leaves a tenth of ``free`` bytes.

    Raises
    ------
    MemoryError
        If not even one text fits: what it needs and what is free, in GiB.
    """
    need = lambda size: predicted(config, batch_size=size, **facts)["peak"]  # noqa: E731
    fitting = [size for size in range(batch_size, 0, -1) if need(size) <= 0.9 * free]
    if not fitting:
        raise MemoryError(
            f"Fine-tuning needs {need(1) / 2**30:.1f} GiB even with batch_size=1, but {free / 2**30:.1f} GiB are free: choose a smaller model."
        )
    return fitting[0]


def measured(model: PreTrainedModel, loss: Callable[[], torch.Tensor]) -> dict[str, float]:
    """Bytes and seconds that a training step really takes: ``loss()``, the way back, AdamW with a learning rate of 0.

    On CUDA PyTorch's own count, elsewhere the sum of all tensors alive; what a matrix product needs inside is not in it.

    Returns
    -------
    dict: weights, peak (weights included; bytes), seconds (of the second step; the first one makes the optimiser's state).

    Taught in notebooks/05_gpu_fine_tuning.ipynb, section 4.
    """
    held = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    optimiser = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=0.0, weight_decay=0.0)
    cuda, tally = model.device.type == "cuda", _Tally(model)
    before = torch.cuda.memory_allocated() if cuda else 0
    for _ in range(2):
        begin, tally.peak = time.perf_counter(), tally.now
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        with nullcontext() if cuda else tally:
            loss().backward()
            optimiser.step()
            optimiser.zero_grad()
    peak = torch.cuda.max_memory_allocated() - before if cuda else tally.peak
    return {"weights": held, "peak": held + peak, "seconds": time.perf_counter() - begin}


class _Tally(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside and still alive, and the most there ever were (``peak``)."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive = {id(weight.untyped_storage()): None for weight in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and id(store := tensor.untyped_storage()) not in self.alive:
                key, size = id(store), store.nbytes()
                self.alive[key] = weakref.ref(store, lambda _, key=key, size=size: self._gone(key, size))
                self.now += size
                self.peak = max(self.peak, self.now)
        return out

    def _gone(self, key: int, size: int) -> None:
        self.alive.pop(key, None)
        self.now -= size
