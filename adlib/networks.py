"""The parts of a click model: what follows the table of embeddings, and how the rows of that table learn.

Taught in notebooks/03_ctr_modeling.ipynb, section 4.
"""

import itertools

import torch
from torch import nn

ARCHITECTURES = ("lr", "fm", "dnn", "deepfm", "dcnv2")


def bias_shift(logits: torch.Tensor, rate: float) -> torch.Tensor:
    """What to add to logits (n,) so that their mean probability is a rate: the last noisy steps leave it some percent off."""
    shift = torch.zeros((), dtype=logits.dtype)
    for _ in range(5):  # Newton
        p = torch.sigmoid(logits + shift)
        shift += (rate - p.mean()) / (p * (1 - p)).mean()
    return shift


class RowAdagrad:
    """Adagrad with one accumulator a table row, which reads and writes only the rows that a batch needs.

    G_r ← G_r + mean(g_r²), row_r ← row_r − rate · g_r / √G_r, with g_r the summed gradient of row r. A large starting value
    of G works like a prior: a row that was seen a few times moves little.
    Duchi, Hazan, Singer (2011), JMLR 12; one accumulator a row: Gupta et al. (2014), arXiv 1409.4842.
    """

    def __init__(self, table: torch.Tensor, initial: float):
        self.table, self.gradient = table, torch.zeros_like(table)
        self.accumulated = torch.full(table.shape[:1], float(initial), device=table.device)

    @torch.no_grad()
    def step(self, slots: torch.Tensor, rows: torch.Tensor, gradient: torch.Tensor, rate: float) -> None:
        """Apply one batch; slots (k,) int64 may repeat, rows are the different ones, gradient (k, dim) or (k,)."""
        self.gradient.index_put_((slots,), gradient, accumulate=True)
        g = self.gradient[rows]
        self.gradient[rows] = 0.0
        square = g.square() if g.dim() == 1 else g.square().mean(1)
        accumulated = self.accumulated[rows] + square
        self.accumulated[rows] = accumulated
        step = -rate * accumulated.rsqrt()
        self.table[rows] = self.table[rows] + g * (step if g.dim() == 1 else step[:, None])


class RowAdam:
    """Adam on the whole table, as most libraries train embeddings: each step moves every row that has any momentum.

    Kingma, Ba (2015), ICLR. Here to be compared with: it learns rare values by heart in the second epoch.
    """

    def __init__(self, table: torch.Tensor, initial: float = 0.0):
        self.table = table
        self.adam = torch.optim.Adam([table], fused=True)

    @torch.no_grad()
    def step(self, slots: torch.Tensor, rows: torch.Tensor, gradient: torch.Tensor, rate: float) -> None:
        """Apply one batch; arguments as in ``RowAdagrad.step``."""
        self.adam.param_groups[0]["lr"] = rate
        self.table.grad = torch.zeros_like(self.table).index_put_((slots,), gradient, accumulate=True)
        self.adam.step()
        self.table.grad = None


class Pairs(torch.autograd.Function):
    """Σ_{i<j} <v_i, v_j> of the rows of V (n, f, dim) and one more summand e (n, dim) whose own square the caller handles.

    = (|Σ_i v_i + e|² − Σ_i |v_i|²) / 2, with gradient s − v_i for v_i, s = Σ v + e. By hand: it saves autograd three passes over V.
    """

    @staticmethod
    def forward(ctx, V: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        """Sum (n,) over the pairs."""
        total, flat = V.sum(1) + e, V.flatten(1)
        ctx.save_for_backward(V, total)
        return 0.5 * (torch.linalg.vecdot(total, total) - torch.linalg.vecdot(flat, flat))

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        """Gradients of V and e, from that of the sum (n,)."""
        V, total = ctx.saved_tensors
        inner = gradient[:, None] * total
        return torch.addcmul(inner[:, None], V, gradient[:, None, None], value=-1), inner


class Network(nn.Module):
    """Logit of a click from embeddings V (n, f, dim), weights w (n, f) and numbers x (n, m).

    "lr": b + Σ w + <r, x>. "fm" adds Σ_{i<j} <v_i, v_j>, a number taking part with v = x · R. "dnn" adds a perceptron of all
    v and x instead; "deepfm" adds both. "dcnv2" puts a cross network beside the perceptron: two layers
    c_{l+1} = c_0 ∘ (W c_l + b) + c_l. Each starts at the base rate: whatever is added begins at (nearly) zero.

    Rendle (2010), ICDM; Guo et al. (2017), IJCAI; Wang et al. (2021), DCN V2, WWW.
    """

    def __init__(self, architecture: str, fields: int, numbers: int, dim: int, hidden, dropout: float, bias: float):
        super().__init__()
        self.architecture, self.bias = architecture, nn.Parameter(torch.tensor(float(bias)))
        self.weights = nn.Parameter(torch.zeros(numbers))
        width = fields * dim + numbers
        if architecture in ("fm", "deepfm"):
            self.rows = nn.Parameter(0.01 * torch.randn(numbers, dim))
        if architecture in ("dnn", "deepfm", "dcnv2"):
            steps = itertools.pairwise([width, *hidden])
            layers = [layer for a, b in steps for layer in (nn.Linear(a, b), nn.ReLU(), nn.Dropout(dropout))]
            self.mlp = nn.Sequential(*(layer for layer in layers if dropout or not isinstance(layer, nn.Dropout)))
            self.crosses = nn.ModuleList(nn.Linear(width, width) for _ in range(2 * (architecture == "dcnv2")))
            self.out = nn.Linear(hidden[-1] + (width if architecture == "dcnv2" else 0), 1, bias=False)
            nn.init.zeros_(self.out.weight)

    def forward(self, V: torch.Tensor, w: torch.Tensor, x: torch.Tensor, dtype=torch.float32) -> torch.Tensor:
        """Logits (n,) in float32; the perceptron and the crosses are computed in ``dtype``."""
        logit = self.bias + w.sum(1) + x @ self.weights
        if self.architecture in ("fm", "deepfm"):
            own = x.square() @ self.rows.square().sum(1)  # a number forms no pair with itself
            logit = logit + Pairs.apply(V, x @ self.rows) - 0.5 * own
        if self.architecture in ("dnn", "deepfm", "dcnv2"):
            with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                start = torch.cat([V.flatten(1).to(dtype), x.to(dtype)], dim=1)
                top, crossed = self.mlp(start), start
                for layer in self.crosses:
                    crossed = start * layer(crossed) + crossed
                top = torch.cat([top, crossed], dim=1) if len(self.crosses) else top
                logit = logit + self.out(top).squeeze(1).float()
        return logit
