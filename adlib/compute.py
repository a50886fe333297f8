"""Where the numbers are crunched: device, number format, threads, seeds and memory. Taught in notebooks/05_gpu_fine_tuning.ipynb."""

import os
import platform
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import torch

DEVICES = ("auto", "cpu", "cuda", "mps")


def device(prefer: str = "auto") -> torch.device:
    """Choose where tensors live: a CUDA GPU if there is one, else Apple's MPS, else the CPU.

    Parameters
    ----------
    prefer : "auto", "cpu", "cuda", "cuda:1" or "mps".

    Raises
    ------
    ValueError
        If the name is unknown or this machine has no such device.

    Taught in notebooks/05_gpu_fine_tuning.ipynb, section 1.
    """
    here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    name, _, index = prefer.partition(":")
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if here[kind]))
    if name not in here or (index and not index.isdigit()):
        raise ValueError(f"Unknown device {prefer!r}. Choose one of {', '.join(DEVICES)} (or cuda:1 for a second GPU).")
    if not here[name]:
        raise ValueError(f'This machine has no {name} device that PyTorch can use. Choose "auto" or "cpu".')
    if name == "cuda" and index and int(index) >= torch.cuda.device_count():
        raise ValueError(
            f"There is no {prefer}: PyTorch sees {torch.cuda.device_count()} CUDA device(s), counted from 0."
        )
    return torch.device(prefer)


def dtype(place: torch.device | str = "cpu") -> torch.dtype:
    """Number format for language models on a device: bfloat16 where the hardware multiplies it, else float32.

    bfloat16 keeps float32's range with 8 instead of 24 bits of precision: half the memory, and about twice the speed on
    a CPU with AVX512-BF16 or AMX. Where it would be emulated, it is slower than float32 and therefore not chosen.

    Taught in notebooks/05_gpu_fine_tuning.ipynb, section 1.
    """
    kind = torch.device(place).type
    if kind == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif kind == "cpu":
        able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        native = any(able.get(name, False) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))
    else:
        native = False  # MPS: float32 works on every macOS version that PyTorch supports
    return torch.bfloat16 if native else torch.float32


def threads(n: int | None = None) -> int:
    """Set (or, with None, only read) how many CPU threads PyTorch computes with; returns the number in force."""
    if n is not None:
        if n < 1:
            raise ValueError(f"threads must be at least 1, got {n}.")
        torch.set_num_threads(n)
    return torch.get_num_threads()


def seed_everything(seed: int) -> np.random.Generator:
    """Seed Python, NumPy and PyTorch, and return a NumPy generator that starts from the same seed.

    Raises
    ------
    ValueError
        If the seed is not an integer from 0 to 2**32 - 1.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be an integer from 0 to 4294967295, got {seed!r}.")
    seed = int(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 -- libraries that still read the global state
    torch.manual_seed(seed)
    return np.random.default_rng(seed)


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Seed PyTorch inside the block and leave its CPU generator as it was found."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def free_memory(place: torch.device | str = "cpu") -> int:
    """Bytes that a device can still give: GPU memory, or what this machine or its container leaves free."""
    place = torch.device(place)
    if place.type == "cuda":
        return torch.cuda.mem_get_info(place)[0]
    if place.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    free = psutil.virtual_memory().available
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()).isdigit():
        free = min(free, max(int(text) - int(used.read_text()), 0))
    return free


def describe(prefer: str = "auto") -> str:
    """One line for the top of a page: device, threads, number format, free memory, PyTorch version."""
    place = device(prefer)
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else platform.machine()
    cores = f", {threads()} of {os.cpu_count()} threads" if place.type == "cpu" else ""
    number = str(dtype(place)).removeprefix("torch.")
    return f"{place} ({name}{cores}), {number}, {free_memory(place) / 2**30:.1f} GiB free, PyTorch {torch.__version__}"


@contextmanager
def fast_cpu(exact: bool = False, place: torch.device | str = "cpu") -> Iterator[None]:
    """Let float32 matrix products on the CPU go through oneDNN instead of MKL, which is slow on some processors.

    PyTorch calls this precision "medium": oneDNN *may* multiply in bfloat16, and does so on processors with AMX and on some with
    ARM's bfloat16; on others it computes in full float32, only faster. ``exact=True`` changes nothing on the former, so the
    products are float32 everywhere. The setting is put back at the end of the block. On another ``place`` than the CPU nothing changes:
    a CUDA GPU would take the setting as leave to round float32 to TF32.
    """
    if torch.device(place).type != "cpu":
        yield
        return
    before = torch.get_float32_matmul_precision()
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    full = able.get("architecture") == "x86_64" and not able.get("amx_bf16", False)
    torch.set_float32_matmul_precision("medium" if full or not exact else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def memory_guard(batch_size: int) -> Iterator[None]:
    """Turn an out-of-memory error inside the block into one sentence with the batch size to try.

    Raises
    ------
    MemoryError
        Instead of PyTorch's error, on CPU, CUDA and MPS.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        words = str(error).lower()
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not (
            "out of memory" in words or "can't allocate memory" in words or "not enough memory" in words
        ):
            raise
        advice = f"Try batch_size={batch_size // 2}." if batch_size > 1 else "Try shorter texts or a smaller model."
        raise MemoryError(f"Out of memory with batch_size={batch_size}. {advice}") from error
