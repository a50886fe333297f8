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
    """This process's rows of a batch (n,): every size-th one. A last batch smaller than the group is taken whole by all."""
    return batch if len(batch) < size() else batch[: len(batch) - len(batch) % size()][rank() :: size()]


def exchange(network: torch.nn.Module, used: torch.Tensor, *gradients: torch.Tensor) -> list[torch.Tensor]:
    """Sum the dense gradients over all processes, and gather slots (k,) and row gradients (k, …) of all.

    Each process then makes the same step on its own copy of the model, so the copies stay equal.
    """
    if size() == 1:
        return [used, *gradients]
    flat = torch.cat([p.grad.flatten() for p in network.parameters()])
    waiting = [distributed.all_reduce(flat, async_op=True)]
    found = []
    for mine in (used, *gradients):
        whole = mine.new_empty((size() * len(mine), *mine.shape[1:]))
        waiting.append(distributed.all_gather_into_tensor(whole, mine.contiguous(), async_op=True))
        found.append(whole)
    for work in waiting:
        work.wait()
    for p, part in zip(network.parameters(), flat.split([p.numel() for p in network.parameters()]), strict=True):
        p.grad.copy_(part.view_as(p))
    return found
