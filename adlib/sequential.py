"""Neural recommenders in plain PyTorch: SASRec, which reads a history in order, and a GAN, which imitates whole histories.

Taught in notebooks/04_recommendation.ipynb, section 5.
"""

import math

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from adlib import compute
from adlib.ranking import Interactions
from adlib.recommendation import Recommender


class _Block(nn.Module):
    """Causal self-attention and a perceptron, each after a layer norm and added to what came in."""

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.before, self.between = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.perceptron = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * dim, dim)
        )

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """(n, length, dim) to the same shape; position t sees positions up to t only."""
        n, length, dim = h.shape
        qkv = self.qkv(self.before(h)).view(n, length, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(*qkv, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        h = h + F.dropout(self.out(seen.transpose(1, 2).reshape(n, length, dim)), self.dropout, self.training)
        return h + F.dropout(self.perceptron(self.between(h)), self.dropout, self.training)


class _Attention(nn.Module):
    """Item and position vectors, blocks, and the same item vectors again as output weights."""

    def __init__(self, n_items: int, length: int, dim: int, blocks: int, heads: int, dropout: float):
        super().__init__()
        self.items, self.dropout = nn.Embedding(n_items + 1, dim, padding_idx=n_items), dropout  # the last row: no item
        self.positions = nn.Parameter(torch.zeros(length, dim))
        self.blocks, self.norm = nn.Sequential(*(_Block(dim, heads, dropout) for _ in range(blocks))), nn.LayerNorm(dim)
        self.bias = nn.Parameter(torch.zeros(n_items))
        nn.init.normal_(self.items.weight, std=0.02)  # small: the first thing learnt is popularity, through the bias
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Histories (n, t), filled on the right, to states (n, t, dim)."""
        h = self.items(rows) + self.positions[: rows.shape[1]]
        return self.norm(self.blocks(F.dropout(h, self.dropout, self.training)))

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """States (m, dim) to scores of all items (m, items)."""
        return h @ self.items.weight[:-1].T + self.bias


class SASRec(Recommender):
    """Self-attentive sequential recommendation: read the last `length` items in order and predict the next.

    h = blocks(e_item + e_position); score of item i after h_t: h_t·e_i + b_i. Trained by cross-entropy over *all* items at every position: no
    negative is sampled (Klenitskiy and Vasilev 2023: that is what makes SASRec strong). AdamW, warm-up, linear decay.

    Parameters
    ----------
    dim, blocks, heads, dropout, length : width, layers, attention heads, share of units left out, items of history read.
    epochs, batch_size, learning_rate, weight_decay : of the training. seed : of everything random. device : see ``compute.device``.

    Attributes
    ----------
    losses_ : (epochs,) mean cross-entropy, nats.

    Kang and McAuley (2018), ICDM. Taught in notebooks/04_recommendation.ipynb, section 5.
    """

    def __init__(
        self,
        dim=48,
        *,
        blocks=1,
        heads=1,
        dropout=0.2,
        length=50,
        epochs=4,
        batch_size=16,
        learning_rate=8e-3,
        weight_decay=0.01,
        seed=0,
        device="auto",
        progress=False,
    ):
        self.dim, self.blocks, self.heads, self.dropout, self.length = dim, blocks, heads, dropout, length
        self.epochs, self.batch_size, self.learning_rate, self.weight_decay = (
            epochs,
            batch_size,
            learning_rate,
            weight_decay,
        )
        self.seed, self.device, self.progress = seed, device, progress

    def _fit(self, interactions: Interactions) -> None:
        self._place, self._none = compute.device(self.device), len(interactions.items)
        with torch.random.fork_rng(devices=[]), compute.fast_cpu(place=self._place):
            torch.manual_seed(self.seed)
            sizes = self.length, self.dim, self.blocks, self.heads, self.dropout
            self.network_ = _Attention(self._none, *sizes).to(self._place)
            self._train(self._windows(interactions.sequences))
        self.network_.eval()

    def _windows(self, sequences: list[np.ndarray]) -> torch.Tensor:
        """Histories cut into pieces of length + 1 from the end; neighbours share one item, so each transition is learnt once an epoch."""
        pieces = []
        for s in sequences:
            for end in range(len(s), 1, -self.length):
                piece = s[max(end - self.length - 1, 0) : end]
                pieces.append(np.pad(piece, (0, self.length + 1 - len(piece)), constant_values=self._none))
        return torch.from_numpy(np.array(pieces, int).reshape(len(pieces), self.length + 1))

    def _train(self, windows: torch.Tensor) -> None:
        steps = self.epochs * math.ceil(len(windows) / self.batch_size)
        optimiser = torch.optim.AdamW(
            self.network_.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay, betas=(0.9, 0.98)
        )
        shape = lambda step: min((step + 1) / max(1, steps // 10), (steps - step) / max(1, steps))  # noqa: E731
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, shape)
        rng, self.losses_ = np.random.default_rng(self.seed), []
        self.network_.train()
        for _ in tqdm(range(self.epochs), desc="SASRec", disable=not self.progress):
            total = count = 0.0
            order = torch.from_numpy(rng.permutation(len(windows)))
            for rows in order.split(self.batch_size):
                batch = windows[rows].to(self._place)
                known = batch[:, 1:] != self._none
                logits = self.network_.logits(self.network_(batch[:, :-1])[known])
                loss = F.cross_entropy(logits, batch[:, 1:][known])
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.network_.parameters(), 1.0)
                optimiser.step()
                schedule.step()
                total, count = total + loss.item() * len(logits), count + len(logits)
            self.losses_.append(total / max(count, 1))

    def read(self, interactions: Interactions) -> "SASRec":
        """Recommend from other, say later, histories of people over the same items; nothing is learnt, so this takes no time.

        Raises ValueError if the items are others.
        """
        check_is_fitted(self, "network_")
        if not interactions.items.equals(self.interactions_.items):
            raise ValueError("these histories are over other items than those that the network knows")
        self._remember(interactions)
        return self

    @torch.inference_mode()
    def _scores(self, users: np.ndarray) -> np.ndarray:
        ends = [self.interactions_.sequences[u][-self.length :] for u in users]
        last = torch.tensor([max(len(s) - 1, 0) for s in ends], device=self._place)
        rows = np.array([np.pad(s, (0, self.length - len(s)), constant_values=self._none) for s in ends], int)
        with compute.fast_cpu(place=self._place):
            h = self.network_(torch.from_numpy(rows.reshape(len(ends), self.length)).to(self._place))
            return self.network_.logits(h[torch.arange(len(ends), device=self._place), last]).cpu().numpy()


class GAN(Recommender):
    """A generator that completes histories so that a discriminator takes them for real ones (as CFGAN: whole vectors, no sampled items).

    G(c) = σ(MLP(c)) is a vector over all items for the history c of a user, of which a random part is hidden; D(c, v) = σ(MLP(c, v)) says how
    real v looks beside c. G minimises adversary · log(1 − D(c, G(c) ∘ m)) + BCE(G(c), r) over items and a random part of the others, which a
    mask m keeps. With adversary = 0 it is a denoising autoencoder of the same size: what the adversary adds is the difference.

    Parameters
    ----------
    hidden : width; epochs, batch_size, learning_rate : of both networks; hide : share of a history that G does not see;
    adversary : weight of the discriminator's opinion.

    Attributes
    ----------
    losses_ : (epochs, 2) mean losses of generator and discriminator.

    Chae, Kang, Kim, Lee (2018), CFGAN, CIKM; Goodfellow et al. (2014), NIPS. Taught in notebooks/04_recommendation.ipynb, section 5.
    """

    def __init__(
        self,
        hidden=128,
        *,
        epochs=15,
        batch_size=128,
        learning_rate=2e-3,
        hide=0.3,
        adversary=1.0,
        seed=0,
        device="auto",
    ):
        self.hidden, self.epochs, self.batch_size, self.learning_rate = hidden, epochs, batch_size, learning_rate
        self.hide, self.adversary, self.seed, self.device = hide, adversary, seed, device

    def _fit(self, interactions: Interactions) -> None:
        self._place, n = compute.device(self.device), len(interactions.items)
        with torch.random.fork_rng(devices=[]), compute.fast_cpu(place=self._place):
            torch.manual_seed(self.seed)
            layers = nn.Linear(n, self.hidden), nn.Tanh(), nn.Dropout(0.2), nn.Linear(self.hidden, n)
            self.generator_ = nn.Sequential(*layers).to(self._place)
            judge = nn.Linear(2 * n, self.hidden), nn.ReLU(), nn.Linear(self.hidden, 1)
            self.discriminator_ = nn.Sequential(*judge).to(self._place)
            self._train((interactions.matrix[self._active] > 0).astype(np.float32))
        self.generator_.eval()

    def _train(self, touched) -> None:
        networks = self.generator_, self.discriminator_
        optimisers = [torch.optim.Adam(net.parameters(), lr=self.learning_rate, weight_decay=1e-5) for net in networks]
        rng, self.losses_ = np.random.default_rng(self.seed), []
        for _ in range(self.epochs):
            order, told = rng.permutation(touched.shape[0]), []
            for start in range(0, len(order), self.batch_size):
                real = torch.from_numpy(touched[order[start : start + self.batch_size]].toarray()).to(self._place)
                told.append(self._step(real, *optimisers))
            self.losses_.append(np.mean(told, axis=0))

    def _step(
        self, real: torch.Tensor, of_g: torch.optim.Optimizer, of_d: torch.optim.Optimizer
    ) -> tuple[float, float]:
        condition = F.dropout(real, self.hide) * (1 - self.hide)  # the history with some items hidden
        mask = real + (1 - real) * (
            torch.rand_like(real) < 0.5
        )  # touched items, and half of the others as "not touched"
        logits, judged = self.generator_(condition), 0.0
        fake = torch.sigmoid(logits) * mask
        if self.adversary:
            pairs = torch.cat([condition, real], 1), torch.cat([condition, fake.detach()], 1)
            true, false = (self.discriminator_(pair) for pair in pairs)
            loss_d = F.softplus(-true).mean() + F.softplus(false).mean()
            of_d.zero_grad()
            loss_d.backward()
            of_d.step()
            judged = F.softplus(-self.discriminator_(torch.cat([condition, fake], 1))).mean()
        fit = F.binary_cross_entropy_with_logits(logits, real, weight=mask, reduction="sum") / len(real)
        loss_g = fit + self.adversary * judged
        of_g.zero_grad()
        loss_g.backward()
        of_g.step()
        return loss_g.item(), loss_d.item() if self.adversary else 0.0

    @torch.inference_mode()
    def _scores(self, users: np.ndarray) -> np.ndarray:
        known = (self.interactions_.matrix[users] > 0).astype(np.float32).toarray()
        with compute.fast_cpu(place=self._place):
            return self.generator_(torch.from_numpy(known * (1 - self.hide)).to(self._place)).cpu().numpy()
