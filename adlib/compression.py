"""Lighter models: weights in 8 bits. (A smaller student is taught by ``SentimentClassifier.distil``.)

Taught in notebooks/05_gpu_fine_tuning.ipynb, section 8.
"""

import copy
import warnings

import torch
from torch import nn

from adlib.reading import SentimentClassifier


def int8(model: nn.Module) -> nn.Module:
    """A copy of a model whose linear layers multiply in 8-bit whole numbers on the CPU (Jacob et al. 2018, arXiv 1712.05877).

    A weight w becomes round(w / s) with one scale s = max|w| / 127 for each row of W; the inputs get one scale when they arrive, so
    no data is needed beforehand. Everything else stays float32.

    Parameters
    ----------
    model : any model without adapters (merge them first); it is not changed.

    Raises
    ------
    ValueError
        If the model is not on the CPU: PyTorch has these products only there.

    Taught in notebooks/05_gpu_fine_tuning.ipynb, section 8.
    """
    place = next(model.parameters()).device
    if place.type != "cpu":
        raise ValueError(f"8-bit products run on the CPU, but the model is on {place}: move it with model.to('cpu').")
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # its announced successor, torchao, gained nothing on a CPU when this was written
        rows = {nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig}
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model).float().eval(), rows)


def int8_reader(reader: SentimentClassifier) -> SentimentClassifier:
    """A copy of a fitted classifier whose encoder is ``int8``."""
    light = copy.copy(reader)
    light.encoder_, light.exact_ = int8(reader.encoder_), True
    return light


def size(model: nn.Module) -> int:
    """Bytes of all numbers that a model holds, in whatever format."""
    found, seen = 0, set()
    for value in model.state_dict().values():
        parts = value if isinstance(value, tuple) else (value,)
        for tensor in (part for part in parts if isinstance(part, torch.Tensor)):
            place = tensor.data_ptr() if not tensor.is_quantized else id(tensor)
            found += 0 if place in seen else tensor.numel() * tensor.element_size()
            seen.add(place)
    return found
