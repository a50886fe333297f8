"""What the literature offers beside DeepFM, tried on the benchmark's log; what did not pay stays here and out of the package.

Each option is a way to build a model: FinalMLP (Mao et al. 2023, AAAI), gated crosses (GDCN, Wang et al. 2023, CIKM), dropout of
embeddings, a moving average of the dense weights, and crossed columns. DCN-v2 and bins of numbers are options of `CTRModel`.
"""

import itertools

import numpy as np
import pandas as pd
import torch
from click_log import SIZES
from torch import nn

from adlib import ctr, networks


class Gated(networks.Network):
    """DCN-v2 whose crosses pass a gate: c_{l+1} = c_0 ∘ (W c_l + b) ∘ σ(G c_l) + c_l."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        width = self.crosses[0].in_features
        self.gates = nn.ModuleList(nn.Linear(width, width) for _ in self.crosses)

    def forward(self, start, own, x):
        logit = self.bias + own + x @ self.weights
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=start.dtype == torch.bfloat16):
            top, crossed = self.mlp(start), start
            for layer, gate in zip(self.crosses, self.gates, strict=True):
                crossed = start * layer(crossed) * torch.sigmoid(gate(crossed)) + crossed
            return logit + self.out(torch.cat([top, crossed], 1)).squeeze(1).float()


class TwoStreams(networks.Network):
    """FinalMLP: two perceptrons a, b of the same input, joined by u·a + v·b + aᵀ W b; ``gated`` chooses features for each."""

    gated = False

    def __init__(self, architecture, fields, numbers, dim, hidden, dropout, bias):
        super().__init__("lr", fields, numbers, dim, hidden, dropout, bias)
        width, (first, last) = fields * dim + numbers, hidden

        def stream():
            return nn.Sequential(nn.Linear(width, first), nn.ReLU(), nn.Linear(first, last), nn.ReLU())

        self.streams, self.heads = nn.ModuleList([stream(), stream()]), nn.Linear(2 * last, 1, bias=False)
        self.choices = nn.ModuleList(nn.Linear(width, width) for _ in range(2 * self.gated))
        self.join = nn.Parameter(0.01 * torch.randn(last, last))
        nn.init.zeros_(self.heads.weight)

    def forward(self, start, own, x):
        logit = self.bias + own + x @ self.weights
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=start.dtype == torch.bfloat16):
            seen = [start * 2 * torch.sigmoid(choice(start)) for choice in self.choices] or [start, start]
            a, b = (stream(s) for stream, s in zip(self.streams, seen, strict=True))
            return logit + (self.heads(torch.cat([a, b], 1)).squeeze(1) + ((a @ self.join) * b).sum(1)).float()


class TwoGatedStreams(TwoStreams):
    """FinalMLP with its feature selection."""

    gated = True


class DroppedEmbeddings(networks.Network):
    """DeepFM that leaves out a tenth of all entries of the embeddings in each training step."""

    def forward(self, start, own, x):
        if not self.training:
            return super().forward(start, own, x)
        width = self.fields * self.dim
        kept = nn.functional.dropout(start[:, :width], 0.1)
        squares = start[:, :width].float().square().sum(1) - kept.float().square().sum(
            1
        )  # `own` took those of all entries
        return super().forward(torch.cat([kept, start[:, width:]], 1), own + 0.5 * squares, x)


class WithNetwork(ctr.CTRModel):
    """A click model around another network."""

    network = networks.Network

    def _start(self, encoder, base_rate):
        ours, ctr.Network = ctr.Network, self.network
        try:
            super()._start(encoder, base_rate)
        finally:
            ctr.Network = ours


class Averaged(ctr.CTRModel):
    """A click model that predicts with a moving average of its dense weights over about a hundred steps."""

    def _step(self, *arguments):
        saved = super()._step(*arguments)
        now = self.network_.state_dict()
        self._mean = getattr(self, "_mean", None) or {name: value.clone() for name, value in now.items()}
        for name, value in now.items():
            self._mean[name].lerp_(value, 0.01)
        return saved

    def _settle_bias(self, slots, x):
        self.network_.load_state_dict(self._mean)
        super()._settle_bias(slots, x)


def around(network):
    """The class of click models around a network."""
    return type(network.__name__ + "Model", (WithNetwork,), {"network": network})


def crossed(frame: pd.DataFrame, fields: int = 8, most: int = 600) -> pd.DataFrame:
    """The table with a column for each pair of the first fields that has at most so many values."""
    pairs = [(a, b) for a, b in itertools.combinations(range(fields), 2) if SIZES[a] * SIZES[b] <= most]
    codes = {j: frame[f"c{j}"].cat.codes.to_numpy(np.int64) for j in range(fields)}
    return frame.assign(**{f"c{a} and c{b}": pd.Categorical(codes[a] * SIZES[b] + codes[b]) for a, b in pairs})


OPTIONS = {  # name: (class, further parameters, what to do with the columns)
    "deepfm": (ctr.CTRModel, {}, None),
    "deepfm, numbers not binned": (ctr.CTRModel, {"bins": None}, None),
    "dcnv2": (ctr.CTRModel, {"architecture": "dcnv2"}, None),
    "gated crosses (GDCN)": (around(Gated), {"architecture": "dcnv2"}, None),
    "two streams (FinalMLP)": (around(TwoStreams), {}, None),
    "two gated streams (FinalMLP)": (around(TwoGatedStreams), {}, None),
    "embedding dropout": (around(DroppedEmbeddings), {}, None),
    "unit dropout": (ctr.CTRModel, {"dropout": 0.1}, None),
    "feature dropout": (ctr.CTRModel, {"feature_dropout": 0.05}, None),
    "average of weights": (Averaged, {}, None),
    "crossed columns": (ctr.CTRModel, {}, crossed),
}
