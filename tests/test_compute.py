"""Device, number format, threads, seeds and memory."""

import random

import numpy as np
import pytest
import torch

from adlib import compute


def test_auto_takes_a_device_that_works():
    place = compute.device()
    assert torch.ones(2, device=place).sum().item() == 2
    assert compute.device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "tpu"])
def test_an_unknown_device_is_named_with_the_choices(name):
    with pytest.raises(ValueError, match=r"Unknown device .*Choose one of auto, cpu, cuda, mps"):
        compute.device(name)


def test_a_device_that_is_not_here_says_what_to_choose(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r'no cuda device that PyTorch can use. Choose "auto" or "cpu"'):
        compute.device("cuda")


def test_a_second_gpu_that_is_not_here_is_counted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert compute.device("auto") == torch.device("cuda")
    with pytest.raises(ValueError, match=r"no cuda:1: PyTorch sees 1 CUDA device"):
        compute.device("cuda:1")


@pytest.mark.parametrize(
    ("able", "expected"),
    [({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True}, torch.bfloat16), ({"avx2": True}, torch.float32)],
)
def test_bfloat16_only_where_the_processor_multiplies_it(monkeypatch, able, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert compute.dtype("cpu") == expected


def test_threads_are_set_and_read():
    before = compute.threads()
    try:
        assert compute.threads(1) == 1 == torch.get_num_threads()
    finally:
        compute.threads(before)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        compute.threads(0)


def test_one_seed_for_all_generators():
    def draw():
        rng = compute.seed_everything(7)
        return rng.random(), random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002 -- the global state is tested

    assert draw() == draw()


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, True, "3"])
def test_an_impossible_seed_is_refused(seed):
    with pytest.raises(ValueError, match="seed must be an integer from 0 to 4294967295"):
        compute.seed_everything(seed)


def test_free_memory_and_description():
    assert 2**20 < compute.free_memory("cpu") < 2**50
    line = compute.describe("cpu")
    assert line.startswith("cpu (") and "GiB free" in line and torch.__version__ in line and "\n" not in line


def test_fast_cpu_is_put_back_and_stays_close():
    before = torch.get_float32_matmul_precision()
    a, b = torch.randn(64, 128), torch.randn(128, 96)
    exact = a @ b
    with compute.fast_cpu():
        assert torch.get_float32_matmul_precision() == "medium"
        torch.testing.assert_close(a @ b, exact, rtol=0.02, atol=0.2)
    with compute.fast_cpu(exact=True):
        assert torch.equal(a @ b, exact)
    with compute.fast_cpu(place="cuda"):  # there the setting would mean TF32
        assert torch.get_float32_matmul_precision() == before
    with pytest.raises(KeyError), compute.fast_cpu():
        raise KeyError
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("MPS backend out of memory"),
    ],
)
def test_out_of_memory_says_which_batch_size_to_try(error):
    with (
        pytest.raises(MemoryError, match=r"Out of memory with batch_size=32. Try batch_size=16."),
        compute.memory_guard(32),
    ):
        raise error
    with (
        pytest.raises(MemoryError, match=r"batch_size=1. Try shorter texts or a smaller model."),
        compute.memory_guard(1),
    ):
        raise error


def test_other_errors_pass_the_memory_guard():
    with pytest.raises(RuntimeError, match="shapes"), compute.memory_guard(8):
        raise RuntimeError("shapes do not match")
