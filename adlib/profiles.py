"""Profiles that are learnt: shoppers from the texts they read, a variational autoencoder, and a GAN on rows of features.

Taught in notebooks/02_audience_clustering.ipynb, section 7.
"""

import copy
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from scipy import sparse
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from adlib.audience import PRIOR, finite_matrix


def pool(
    vectors: np.ndarray,
    item: np.ndarray,
    row: np.ndarray,
    n: int,
    weight: np.ndarray | None = None,
    prior: float = PRIOR,
) -> np.ndarray:
    """Describe each shopper by the vectors of what the shopper touched, drawn to the average of all.

    ``x_i = (Σ_j w_ij v_j + prior · v̄) / (Σ_j w_ij + prior)``, with v̄ the weighted mean over all shoppers: the weighted sum of
    `audience.features`, for vectors of any kind, such as the embedded titles of products.

    Parameters
    ----------
    vectors : (m, d), one row an item (a title, a sentence).
    item : (events,) int, row of `vectors` that an event touched; −1: an item without a vector, which is passed over.
    row : (events,) int, the shopper of an event, 0 … n − 1; −1 is passed over.
    n : shoppers; who touched nothing gets v̄.
    weight : (events,) ≥ 0; default: 1 each. An event listed twice counts twice.

    Returns (n, d) float64, finite. Raises ValueError if vectors are not a finite matrix, an index lies outside, or no event touches
    a known item. Taught in notebooks/02_audience_clustering.ipynb, section 7.
    """
    vectors, item, row = finite_matrix(vectors), np.asarray(item), np.asarray(row)
    weight = np.ones(len(item)) if weight is None else np.asarray(weight, float)
    if not len(item) == len(row) == len(weight):
        raise ValueError(
            f"item, row and weight must list the same events; they list {len(item)}, {len(row)}, {len(weight)}"
        )
    known = (item >= 0) & (row >= 0)
    if not (known & (weight > 0)).any():
        raise ValueError("no event touches an item that has a vector: there is nothing to describe shoppers by")
    if item.max() >= len(vectors) or row.max() >= n:
        raise ValueError(
            f"item must lie below {len(vectors)} and row below {n}; the largest are {item.max()}, {row.max()}"
        )
    touched = sparse.csr_array((weight[known], (row[known], item[known])), shape=(n, len(vectors)))
    mass = np.asarray(touched.sum(1))
    mean = touched.sum(0) @ vectors / mass.sum()
    return (touched @ vectors + prior * mean) / (mass + prior)[:, None]


def elbo_terms(
    x: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor, decoded: torch.Tensor, log_noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the two halves of the evidence lower bound of each row, in nats: ``ELBO = reconstruction − KL``.

    ``reconstruction = −½ Σ_j [log 2πσ² + (x_j − x̂_j)² / σ²]`` estimates E_q[log p(x|z)] with the one z that was drawn and decoded,
    ``KL = ½ Σ_l (m_l² + s_l² − log s_l² − 1)`` is the distance of q(z|x) = N(m, diag s²) from p(z) = N(0, 1).

    Shapes: x, decoded (n, d); mean m and log_variance log s² (n, latent); log_noise log σ², one number; the result (n,) each.
    Kingma and Welling (2014), arXiv 1312.6114. Taught in notebooks/02_audience_clustering.ipynb, section 7.
    """
    reconstruction = -0.5 * (math.log(2 * math.pi) + log_noise + (x - decoded) ** 2 / log_noise.exp()).sum(1)
    kl = 0.5 * (mean**2 + log_variance.exp() - log_variance - 1).sum(1)
    return reconstruction, kl


class _Profile(TransformerMixin, BaseEstimator):
    """What both networks share: checks, batches, seeds, and a transform of whole tables."""

    def __init__(self, n_latent=8, *, hidden=64, epochs=60, batch_size=128, learning_rate=2e-3, seed=0, progress=True):
        self.n_latent, self.hidden, self.epochs, self.batch_size = n_latent, hidden, epochs, batch_size
        self.learning_rate, self.seed, self.progress = learning_rate, seed, progress

    def fit(self, X: np.ndarray, y: object = None) -> "_Profile":
        """Train on the rows of X (n, d), finite numbers on comparable scales (standardise first); y is ignored.

        Raises ValueError if X is not a finite matrix of two rows or more, or n_latent, epochs or batch_size is below 1.
        """
        values = finite_matrix(X)
        if len(values) < 2:
            raise ValueError(f"a network needs at least two shoppers to learn from; X has {len(values)}")
        for name in ("n_latent", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; it is {getattr(self, name)}")
        self.n_features_in_ = values.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self._build(values.shape[1])
            self._train(torch.tensor(values, dtype=torch.float32))
        return self

    def _batches(self, X: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (epoch, rows of X) in random order, with a bar."""
        for epoch in tqdm(range(self.epochs), desc=type(self).__name__, disable=not self.progress, leave=False):
            for batch in torch.randperm(len(X)).split(self.batch_size):
                yield epoch, X[batch]

    def _ready(self, X: np.ndarray, width: int | None = None) -> torch.Tensor:
        check_is_fitted(self, "n_features_in_")
        values, width = finite_matrix(X), width or self.n_features_in_
        if values.shape[1] != width:
            raise ValueError(f"this profile has {width} columns, the table given has {values.shape[1]}")
        return torch.tensor(values, dtype=torch.float32)


class ProfileVAE(_Profile):
    """A variational autoencoder on profiles: z ~ N(0, 1), x = decoder(z) + σ · noise, and an encoder that guesses z from x.

    Trained by the evidence lower bound of `elbo_terms`, with one learnt noise σ² for all columns.

    Parameters
    ----------
    n_latent : numbers in the learnt profile.
    hidden : width of the one hidden layer of encoder and decoder; 0: both linear, which is probabilistic PCA.
    epochs, batch_size, learning_rate : of Adam, the rate falling to 0.

    Attributes
    ----------
    history_ : (epochs, 2), mean reconstruction and KL of each epoch, nats a shopper; their difference is the ELBO.
    noise_ : σ².

    Kingma and Welling (2014), arXiv 1312.6114; Lucas et al. (2019), arXiv 1911.02469 (the linear case).
    Taught in notebooks/02_audience_clustering.ipynb, section 7.
    """

    def _build(self, d: int) -> None:
        self.encoder_, self.decoder_ = _mlp(d, self.hidden, 2 * self.n_latent), _mlp(self.n_latent, self.hidden, d)
        self._log_noise = nn.Parameter(torch.zeros(()))

    def _train(self, X: torch.Tensor) -> None:
        weights = [*self.encoder_.parameters(), *self.decoder_.parameters(), self._log_noise]
        step = _adam(weights, self.learning_rate, self.epochs * math.ceil(len(X) / self.batch_size))
        history = np.zeros((self.epochs, 2))
        for epoch, x in self._batches(X):
            reconstruction, kl = self._terms(x)
            step((kl - reconstruction).mean())
            with torch.no_grad():  # a table without any variation would drive the noise to zero and its logarithm to −∞
                self._log_noise.clamp_(min=-8.0)
            history[epoch] += [reconstruction.sum().item() / len(X), kl.sum().item() / len(X)]
        self.history_, self.noise_ = history, self._log_noise.exp().item()

    def _terms(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_variance = self.encoder_(x).chunk(2, dim=1)
        z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        return elbo_terms(x, mean, log_variance, self.decoder_(z), self._log_noise)

    @torch.inference_mode()
    def encode(self, X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return what the encoder guesses of z for the rows of X: means m and variances s², (n, n_latent) each."""
        x = self._ready(X)  # first: it says so if the network was not trained
        mean, log_variance = self.encoder_(x).double().chunk(2, dim=1)
        return mean.numpy(), log_variance.exp().numpy()

    def transform(self, X: np.ndarray) -> np.ndarray:
        """Return the encoder's means m for the rows of X: (n, n_latent)."""
        return self.encode(X)[0]

    @torch.inference_mode()
    def inverse_transform(self, Z: np.ndarray) -> np.ndarray:
        """Decode profiles Z (n, n_latent): (n, d)."""
        z = self._ready(Z, self.n_latent)
        return self.decoder_(z).double().numpy()

    @torch.inference_mode()
    def elbo(self, X: np.ndarray, draws: int = 20) -> np.ndarray:
        """Return the evidence lower bound of each row, (n,) nats, averaged over `draws` of z; log p(x) is at least that."""
        x = self._ready(X)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            values = [reconstruction - kl for reconstruction, kl in (self._terms(x) for _ in range(draws))]
        return torch.stack(values).mean(0).double().numpy()

    @torch.inference_mode()
    def sample(self, n: int, seed: int = 0) -> np.ndarray:
        """Draw n profiles of shoppers who do not exist, with the learnt noise: (n, d)."""
        check_is_fitted(self, "n_features_in_")
        noise = torch.Generator().manual_seed(seed)
        x = self.decoder_(torch.randn(n, self.n_latent, generator=noise))
        return (x + (0.5 * self._log_noise).exp() * torch.randn(x.shape, generator=noise)).double().numpy()


class ProfileGAN(_Profile):
    """Two networks play: a generator invents profiles, a discriminator tells them from real ones; its last layer is a profile.

    The discriminator maximises ``log D(x) + log(1 − D(G(z)))``, the generator ``log D(G(z))``. No encoder is trained, so a shopper's
    profile is what the discriminator sees just before it decides: `n_latent` numbers (Radford et al. 2016). Three things keep the
    game steady: as many noise numbers as columns, noise on all that the discriminator sees, and a generator averaged over its steps.

    Parameters
    ----------
    n_latent : numbers in the learnt profile.
    hidden : width of the hidden layer of both players.
    epochs, batch_size, learning_rate : of Adam, the rate falling to 0; the generator learns at half of it.

    Attributes
    ----------
    history_ : (epochs, 2), mean loss of discriminator and generator, nats; 2 log 2 and log 2 where neither can win.

    Goodfellow et al. (2014), arXiv 1406.2661; Radford et al. (2016), arXiv 1511.06434; Sønderby et al. (2017), arXiv 1610.04490 (noise).
    Taught in notebooks/02_audience_clustering.ipynb, section 7.
    """

    blur, memory = 0.3, 0.99  # standard deviation of that noise; share of the average that a step keeps

    def __init__(self, n_latent=8, *, hidden=128, epochs=60, batch_size=128, learning_rate=2e-3, seed=0, progress=True):
        super().__init__(n_latent, hidden=hidden, epochs=epochs, batch_size=batch_size)
        self.learning_rate, self.seed, self.progress = learning_rate, seed, progress

    def _build(self, d: int) -> None:
        self.generator_ = _mlp(d, self.hidden, d)
        self.features_ = nn.Sequential(_mlp(d, self.hidden, self.n_latent), nn.LeakyReLU(0.2))
        self.verdict_ = nn.Linear(self.n_latent, 1)

    def _train(self, X: torch.Tensor) -> None:
        rounds, betas = self.epochs * math.ceil(len(X) / self.batch_size), (0.0, 0.99)
        judge = [*self.features_.parameters(), *self.verdict_.parameters()]
        step_judge = _adam(judge, self.learning_rate, rounds, betas)
        step_generator = _adam(self.generator_.parameters(), self.learning_rate / 2, rounds, betas)
        average = copy.deepcopy(self.generator_)
        history = np.zeros((self.epochs, 2))
        for epoch, x in self._batches(X):
            invented = self.generator_(torch.randn_like(x))
            real, fake = self._logit(torch.cat([x, invented.detach()])).split(len(x))
            loss = F.softplus(-real).mean() + F.softplus(fake).mean()
            step_judge(loss)
            fooled = F.softplus(-self._logit(invented)).mean()
            step_generator(fooled)
            with torch.no_grad():
                for kept, now in zip(average.parameters(), self.generator_.parameters(), strict=True):
                    kept.lerp_(now, 1 - self.memory)
            history[epoch] += np.array([loss.item(), fooled.item()]) * len(x) / len(X)
        self.generator_, self.history_ = average, history

    def _logit(self, x: torch.Tensor) -> torch.Tensor:
        return self.verdict_(self.features_(x + self.blur * torch.randn_like(x)))[:, 0]

    @torch.inference_mode()
    def transform(self, X: np.ndarray) -> np.ndarray:
        """Return the discriminator's last layer for the rows of X: (n, n_latent)."""
        x = self._ready(X)
        return self.features_(x).double().numpy()

    @torch.inference_mode()
    def sample(self, n: int, seed: int = 0) -> np.ndarray:
        """Draw n profiles of shoppers who do not exist: (n, d)."""
        check_is_fitted(self, "n_features_in_")
        noise = torch.randn(n, self.n_features_in_, generator=torch.Generator().manual_seed(seed))
        return self.generator_(noise).double().numpy()


def _mlp(width: int, hidden: int, out: int) -> nn.Module:
    if not hidden:
        return nn.Linear(width, out)
    return nn.Sequential(nn.Linear(width, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, out))


def _adam(weights, rate: float, steps: int, betas=(0.9, 0.999)) -> Callable[[torch.Tensor], None]:
    """Return a function that takes one step down a loss, at a rate that falls to 0 over `steps` steps."""
    weights = list(weights)
    optimiser = torch.optim.Adam(weights, rate, betas=betas)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 1e-3, steps)

    def step(loss: torch.Tensor) -> None:
        """Make one step down the gradient of the loss."""
        gradients = torch.autograd.grad(loss, weights)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        optimiser.step()
        schedule.step()

    return step
