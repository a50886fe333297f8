"""One click model, trained by several processes that each take a share of every batch (started by ``torchrun``).

Taught in notebooks/03_ctr_modeling.ipynb, section "Own rows, larger than memory".
"""

import torch
from torch import distributed


def size() -> int:
    """How many processes train together; 1 without ``torchrun``."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return distributed.get_rank() if size() > 1 else 0


def share(batch: torch.Tensor) -> torch.Tensor:
    """This process's rows of a batch (n,): every size-th one; up to size − 1 last rows are left out, so that all have equally many.

    A last batch smaller than the group is taken whole by each, so its few rows count that many times.
    """
    return batch if len(batch) < size() else batch[: len(batch) - len(batch) % size()][rank() :: size()]


class Exchange:
    """Sums the gradients of a step over all processes. Made before the step is computed, so that row numbers travel meanwhile.

    Each process then makes the same move on its own copy of the model, so the copies stay equal.
    """

    def __init__(self, rows: torch.Tensor, most: int):
        """Announce this process's table rows (u,) int64, at most ``most`` of them, which must be the same number everywhere."""
        padded = torch.full((most,), -1, dtype=rows.dtype, device=rows.device)
        padded[: len(rows)] = rows
        self.rows = padded.new_empty(size(), most)
        self.travelling = distributed.all_gather_into_tensor(self.rows.view(-1), padded, async_op=True)

    def __call__(
        self, network: torch.nn.Module, vectors: torch.Tensor, numbers: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Sum the dense gradients in place; return the rows of all processes with their gradients (k, dim) and (k,).

        A row that several processes touched comes back several times.
        """
        flat = torch.cat([p.grad.flatten() for p in network.parameters()])
        dense = distributed.all_reduce(flat, async_op=True)
        self.travelling.wait()
        known = self.rows >= 0
        longest = int(known.sum(1).max())
        mine = vectors.new_zeros(longest, vectors.shape[1] + 1)
        mine[: len(numbers), :-1], mine[: len(numbers), -1] = vectors, numbers
        whole = mine.new_empty(size(), *mine.shape)
        distributed.all_gather_into_tensor(whole.view(-1, mine.shape[1]), mine)
        dense.wait()
        for p, part in zip(network.parameters(), flat.split([p.numel() for p in network.parameters()]), strict=True):
            p.grad.copy_(part.view_as(p))
        sums = whole[known[:, :longest]]
        return self.rows[known], sums[:, :-1], sums[:, -1]
