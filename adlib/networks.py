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


class RowSums:
    """Sums the gradients of a batch by table row, in buffers that stay as large as the table and are zero between two batches."""

    def __init__(self, *tables: torch.Tensor):
        self.buffers = [torch.zeros_like(table) for table in tables]
        self.touched = torch.zeros(len(tables[0]), dtype=torch.bool, device=tables[0].device)

    def rows(self, used: torch.Tensor) -> torch.Tensor:
        """Return the different ones (u,) among slots (k,) int64, in order; a mark and a scan take a tenth of the time of a sort."""
        self.touched[used] = True
        rows = self.touched.nonzero().squeeze(1)
        self.touched[rows] = False
        return rows

    @torch.no_grad()
    def __call__(self, used: torch.Tensor, rows: torch.Tensor, *gradients: torch.Tensor) -> list[torch.Tensor]:
        """Sums (u, …) for the different rows, one for each table, of gradients (k, …) for slots (k,) that may repeat."""
        sums = []
        for buffer, gradient in zip(self.buffers, gradients, strict=True):
            buffer.index_put_((used,), gradient, accumulate=True)
            sums.append(buffer.index_select(0, rows))
            buffer.index_fill_(0, rows, 0.0)
        return sums


class RowAdagrad:
    """Adagrad with one accumulator a table row, which reads and writes only the rows that a batch needs.

    G_r ← G_r + mean(g_r²), row_r ← row_r − rate · g_r / √G_r, with g_r the summed gradient of row r. A large starting value
    of G works like a prior: a row that was seen a few times moves little.
    Duchi, Hazan, Singer (2011), JMLR 12; one accumulator a row: Gupta et al. (2014), arXiv 1409.4842.
    """

    def __init__(self, table: torch.Tensor, initial: float):
        self.table = table
        self.accumulated = torch.full(table.shape[:1], float(initial), device=table.device)

    @torch.no_grad()
    def step(self, rows: torch.Tensor, gradient: torch.Tensor, rate: float) -> None:
        """Move the different rows (u,) int64 against their summed gradients (u, dim) or (u,)."""
        square = gradient.square() if gradient.dim() == 1 else gradient.square().mean(1)
        accumulated = self.accumulated[rows] + square
        self.accumulated[rows] = accumulated
        factor = accumulated.rsqrt() if gradient.dim() == 1 else accumulated.rsqrt()[:, None]
        self.table.index_copy_(0, rows, self.table.index_select(0, rows).addcmul_(gradient, factor, value=-rate))


class RowAdam:
    """Adam on the whole table, as most libraries train embeddings: each step moves every row that has any momentum.

    Kingma, Ba (2015), ICLR. Here to be compared with: it learns rare values by heart in the second epoch.
    """

    def __init__(self, table: torch.Tensor, initial: float = 0.0):
        self.table = table
        self.adam = torch.optim.Adam([table], fused=True)

    @torch.no_grad()
    def step(self, rows: torch.Tensor, gradient: torch.Tensor, rate: float) -> None:
        """Apply one batch; arguments as in ``RowAdagrad.step``."""
        self.adam.param_groups[0]["lr"] = rate
        self.table.grad = torch.zeros_like(self.table).index_copy_(0, rows, gradient)
        self.adam.step()
        self.table.grad = None


class Network(nn.Module):
    """Logit of a click from embeddings V (n, f, dim), weights w (n, f) and numbers x (n, m).

    "lr": b + Σ w + <r, x>. "fm" adds Σ_{i<j} <v_i, v_j>, a number taking part with v = x · R. "dnn" adds a perceptron of all
    v and x instead; "deepfm" adds both. "dcnv2" puts a cross network beside the perceptron: two layers
    c_{l+1} = c_0 ∘ (W c_l + b) + c_l. Each starts at the base rate: whatever is added begins at (nearly) zero.

    The pairs are (|s|² − Σ_i |v_i|²) / 2 with s = Σ_i v_i. As s is linear in V and x, it is computed as more units of the first
    layer; the squares belong to single rows and come in from outside (``own``), so that V is read and written once.

    Rendle (2010), ICDM; Guo et al. (2017), IJCAI; Wang et al. (2021), DCN V2, WWW.
    """

    def __init__(self, architecture: str, fields: int, numbers: int, dim: int, hidden, dropout: float, bias: float):
        super().__init__()
        self.architecture, self.bias = architecture, nn.Parameter(torch.tensor(float(bias)))
        self.weights = nn.Parameter(torch.zeros(numbers))
        self.fields, self.dim, self.paired = fields, dim, architecture in ("fm", "deepfm")
        width = fields * dim + numbers
        if self.paired:
            self.rows = nn.Parameter(0.01 * torch.randn(numbers, dim))
        if architecture in ("dnn", "deepfm", "dcnv2"):
            steps = itertools.pairwise([width, *hidden])
            layers = [layer for a, b in steps for layer in (nn.Linear(a, b), nn.ReLU(), nn.Dropout(dropout))]
            self.mlp = nn.Sequential(*(layer for layer in layers if dropout or not isinstance(layer, nn.Dropout)))
            self.crosses = nn.ModuleList(nn.Linear(width, width) for _ in range(2 * (architecture == "dcnv2")))
            self.out = nn.Linear(hidden[-1] + (width if architecture == "dcnv2" else 0), 1, bias=False)
            nn.init.zeros_(self.out.weight)

    def start(self, V: torch.Tensor, x: torch.Tensor, dtype=torch.float32) -> torch.Tensor:
        """What the layers read, (n, f · dim + m) in ``dtype``: all embeddings V (n, f, dim), then the numbers x (n, m)."""
        width = self.fields * self.dim
        out = torch.empty(len(x), width + x.shape[1], dtype=dtype, device=x.device)
        out[:, :width], out[:, width:] = V.flatten(1), x
        return out

    def own(self, V: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """What single rows say, (n,): Σ w, less half their squares where pairs are counted. V (n, f, dim), w (n, f)."""
        return w.sum(1) - 0.5 * torch.linalg.vector_norm(V.flatten(1), dim=1).square() if self.paired else w.sum(1)

    def forward(self, start: torch.Tensor, own: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Logits (n,) in float32; the layers are computed in the number format of ``start``."""
        logit = self.bias + own + x @ self.weights
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=start.dtype == torch.bfloat16):
            if self.paired:
                sums = torch.cat([torch.eye(self.dim, device=x.device).repeat(1, self.fields), self.rows.T], dim=1)
            if self.architecture == "fm":
                total = nn.functional.linear(start, sums)
            elif self.architecture == "deepfm":
                first = self.mlp[0]
                bias = torch.cat([first.bias, first.bias.new_zeros(self.dim)])
                units = nn.functional.linear(start, torch.cat([first.weight, sums]), bias)
                top, total = units.split([len(first.bias), self.dim], dim=1)
                logit = logit + self.out(self.mlp[1:](top)).squeeze(1).float()
            elif self.architecture in ("dnn", "dcnv2"):
                top, crossed = self.mlp(start), start
                for layer in self.crosses:
                    crossed = start * layer(crossed) + crossed
                top = torch.cat([top, crossed], dim=1) if len(self.crosses) else top
                logit = logit + self.out(top).squeeze(1).float()
        if self.paired:  # a number forms no pair with itself
            logit = logit + 0.5 * (total.float().square().sum(1) - x.square() @ self.rows.square().sum(1))
        return logit
