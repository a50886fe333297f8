"""The training loop of the copywriter: schedules, accumulation, recomputed activations, early stopping, exact resumption, several processes.

Several GPUs, or two processes on a CPU: ``accelerate launch --num_processes 2 -m adlib.tuning pairs.csv adapter``.
Taught in notebooks/05_gpu_fine_tuning.ipynb, section 4.
"""

import argparse
import hashlib
import json
import math
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import peft
import torch
from accelerate import PartialState
from peft.helpers import disable_input_dtype_casting
from safetensors.torch import load_file, save_file
from torch import distributed
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from adlib import checkpoints, compute
from adlib.likelihood import perplexity, prompt, target_loss, token_pairs
from adlib.pretrained import length_batches, load_writer

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SCHEDULES = ("constant", "linear", "cosine")


def rate_share(step: int, steps: int, schedule: str = "linear", warm_up: float = 0.1) -> float:
    """Share of the highest learning rate that a step gets: it rises over the first ``warm_up`` of the steps, then follows the schedule.

    With t from 0 after the warm-up to 1 at the end: constant 1, linear 1 - t, cosine (1 + cos πt) / 2 (Loshchilov and Hutter 2017,
    arXiv 1608.03983).

    Parameters
    ----------
    step : number of steps made before this one, from 0. steps : all of them. warm_up : share of the steps, 0 to below 1.

    Raises
    ------
    ValueError
        For an unknown schedule.

    Taught in notebooks/05_gpu_fine_tuning.ipynb, section 4.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"There is no schedule {schedule!r}: choose one of {', '.join(SCHEDULES)}.")
    rising = max(1, int(warm_up * steps)) if warm_up else 0
    done = min(1.0, max(0.0, (step - rising) / max(1, steps - rising)))
    fall = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[schedule]
    return min((step + 1) / max(1, rising), 1.0) * fall


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    targets: Sequence[str],
    *,
    steps: int = 120,
    batch_size: int = 4,
    learning_rate: float = 8e-3,
    rank: int = 8,
    top_layers: float = 0.4,
    schedule: str = "linear",
    accumulate: int = 1,
    recompute: bool = False,
    held_out: tuple[Sequence[str], Sequence[str]] | None = None,
    evaluate_every: int = 20,
    patience: int | None = None,
    checkpoint: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> tuple[peft.PeftModel, pd.DataFrame]:
    """Teach a causal language model to continue prompts with targets, by low-rank adapters (LoRA: Hu et al. 2021, arXiv 2106.09685).

    Each chosen matrix W gets ΔW = 2·B·A with A: (rank, in), B: (out, rank), B = 0 at the start; W itself stays as it is. AdamW with a
    warm-up over the first tenth of the steps. Under ``accelerate launch`` each process takes its share of every batch.

    Parameters
    ----------
    model : a model, or one that already has an adapter, whose training then goes on. It is changed in place.
    prompts, targets : n texts each. steps : optimiser steps; 0 leaves the model as it was.
    learning_rate : the highest; schedule : see ``rate_share``. rank : of the adapters.
    top_layers : share of the layers, from the top, that get adapters.
    accumulate : parts in which a batch goes through the model; the gradient stays that of the whole batch, memory is that of a part.
    recompute : forget what happened inside the layers and compute it again on the way back: less memory, more time (Chen et al. 2016,
        arXiv 1604.06174).
    held_out : (prompts, targets) whose perplexity is measured before, every ``evaluate_every`` steps, and at the end.
    patience : stop after so many measurements without a new lowest perplexity, and return to the weights of the lowest.
    checkpoint : folder that gets the state of the training every ``evaluate_every`` steps; called again with it, training goes on
        from there exactly as if it had not been interrupted.

    Returns
    -------
    (model with adapter, history): history has one row a step: step, loss (nats a token), tokens_per_second (prompts and targets
    without padding), perplexity (of ``held_out``, missing where not measured).

    Raises
    ------
    ValueError
        For empty or unequal lists, empty or overlong texts, impossible settings, and a checkpoint of another training.
        checkpoints.DamagedFile for a damaged one. MemoryError with the batch size to try.

    Taught in notebooks/05_gpu_fine_tuning.ipynb, section 4.
    """
    _possible(steps, batch_size, rank, top_layers, accumulate, schedule, patience, held_out)
    pairs = token_pairs(tokenizer, prompts, targets)
    tuned = model if isinstance(model, peft.PeftModel) else _with_adapter(model, rank, top_layers, seed)
    run = Training(tuned, pairs, steps, batch_size, learning_rate, schedule, accumulate, tokenizer.pad_token_id, seed)
    measure = lambda: perplexity(tuned, tokenizer, *held_out)  # noqa: E731
    if not (checkpoint and run.resume(Path(checkpoint))) and held_out:
        run.note({"step": 0, "perplexity": measure()})
    bar = tqdm(total=steps, initial=run.step, desc="fine-tuning", disable=not progress)
    with bar, recomputing(tuned, recompute):
        for row in run if not run.weary(patience) else ():
            due = row["step"] % evaluate_every == 0 or row["step"] == steps
            run.note(row | {"perplexity": measure()} if held_out and due else row)
            bar.set_postfix_str(f"loss {row['loss']:.2f}, {row['tokens_per_second']:.0f} tokens/s", refresh=False)
            bar.update()
            if checkpoint and due:
                run.save(Path(checkpoint))
            if run.weary(patience):
                break
    if patience:
        run.return_to_best()
    return tuned.eval(), pd.DataFrame(run.history, columns=["step", "loss", "tokens_per_second", "perplexity"])


class Training:
    """A training that can be stopped between any two steps: iterate for the steps; ``save`` and ``resume`` keep all of its state."""

    def __init__(self, model, pairs, steps, batch_size, learning_rate, schedule, accumulate, pad, seed) -> None:
        self.model, self.pairs, self.steps, self.batch_size, self.pad = model, pairs, steps, batch_size, pad
        self.accumulate, self.step, self.queue, self.history, self.best = accumulate, 0, [], [], {}
        self.rng = np.random.default_rng(seed)
        self.weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.optimiser = torch.optim.AdamW(self.weights.values(), lr=learning_rate, weight_decay=0.0, fused=True)
        self.rate = lambda step: learning_rate * rate_share(step, steps, schedule)
        shapes = [(name, list(weight.shape)) for name, weight in self.weights.items()]
        settings = [steps, batch_size, learning_rate, schedule, accumulate, seed, shapes, pairs]
        self.key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()

    def __iter__(self) -> Iterator[dict]:
        """Make the steps that are left; yields step, loss and speed after each."""
        lengths = [len(pair.prompt) + len(pair.target) for pair in self.pairs]
        while self.step < self.steps:
            begin = time.perf_counter()
            self.model.train()
            self.queue = self.queue or [b.tolist() for b in length_batches(lengths, self.batch_size, self.rng)]
            batch = self.queue.pop()
            with compute.memory_guard(math.ceil(self.batch_size / self.accumulate)):
                loss, n = self._gradient([self.pairs[i] for i in batch])
            torch.nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
            self.optimiser.param_groups[0]["lr"] = self.rate(self.step)
            self.optimiser.step()
            self.optimiser.zero_grad()
            self.step += 1
            speed = sum(lengths[i] for i in batch) / (time.perf_counter() - begin)
            yield {"step": self.step, "loss": loss / n, "tokens_per_second": speed}

    def _gradient(self, batch: list) -> tuple[float, int]:
        """Gradient of the mean loss a token of the batch, part by part; returns the summed loss and the number of target tokens."""
        several = distributed.is_available() and distributed.is_initialized()
        here, of = (distributed.get_rank(), distributed.get_world_size()) if several else (0, 1)
        n, total = sum(len(pair.target) for pair in batch), 0.0
        for part in np.array_split(np.arange(len(batch))[here::of], self.accumulate):
            if len(part):
                loss, _ = target_loss(self.model, [batch[i] for i in part], self.pad)
                (loss / n).backward()
                total += loss.item()
        if several:  # the parts of the other processes; gradients are sums, so the result is that of one process
            flat = [w.grad if w.grad is not None else torch.zeros_like(w) for w in self.weights.values()]
            flat = torch.cat([torch.tensor([total], device=flat[0].device), *(part.flatten() for part in flat)])
            distributed.all_reduce(flat)
            total, *grads = flat.split([1, *(w.numel() for w in self.weights.values())])
            for weight, grad in zip(self.weights.values(), grads, strict=True):
                weight.grad = grad.view_as(weight).clone()
        return float(total), n

    # ---- early stopping ----

    def note(self, row: dict) -> None:
        """Add a row to the history, and keep the weights if its perplexity is the lowest so far."""
        known = [r["perplexity"] for r in self.history if "perplexity" in r]
        if "perplexity" in row and row["perplexity"] < min(known, default=math.inf):
            self.best = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.history.append(row)

    def weary(self, patience: int | None) -> bool:
        """Whether the last ``patience`` perplexities brought no new lowest one."""
        known = [r["perplexity"] for r in self.history if "perplexity" in r]
        return patience is not None and len(known) > patience and min(known[-patience:]) >= min(known[:-patience])

    @torch.no_grad()
    def return_to_best(self) -> None:
        """Put back the weights that had the lowest perplexity."""
        for name, weight in self.best.items():
            self.weights[name].copy_(weight)

    # ---- checkpoints ----

    def save(self, folder: Path) -> None:
        """Write weights, optimiser, order of the batches and history as ``step-000020`` into the folder, then drop the older ones."""
        tensors = {f"weight.{name}": weight.detach() for name, weight in self.weights.items()}
        tensors |= {f"best.{name}": weight for name, weight in self.best.items()}
        for name, weight in self.weights.items():
            tensors |= {f"{kind}.{name}": value for kind, value in self.optimiser.state[weight].items()}
        facts = {"key": self.key, "step": self.step, "queue": self.queue, "history": self.history}
        if not distributed.is_initialized() or distributed.get_rank() == 0:
            with checkpoints.whole_folder(folder / f"step-{self.step:06d}") as partial:
                save_file(
                    {name: tensor.contiguous() for name, tensor in tensors.items()}, partial / "state.safetensors"
                )
                (partial / "state.json").write_text(json.dumps(facts | {"rng": self.rng.bit_generator.state}))
            for older in sorted(folder.glob("step-*"))[:-1]:
                shutil.rmtree(older)

    @torch.no_grad()
    def resume(self, folder: Path) -> bool:
        """Take up the newest state in the folder; False if there is none."""
        found = sorted(folder.glob("step-*"))
        if not found:
            return False
        try:
            checkpoints.verify(found[-1])
        except checkpoints.DamagedFile as error:
            raise checkpoints.DamagedFile(
                f"Training cannot go on: {error} Delete {folder.name} and begin again."
            ) from error
        facts = json.loads((found[-1] / "state.json").read_text())
        if facts["key"] != self.key:
            raise checkpoints.OtherTraining(
                f"{folder.name} belongs to a training with other texts or settings: choose another folder."
            )
        tensors = load_file(found[-1] / "state.safetensors", device=str(self.model.device))
        take = lambda kind: {k.removeprefix(kind): v for k, v in tensors.items() if k.startswith(kind)}  # noqa: E731
        for name, weight in self.weights.items():
            weight.copy_(tensors[f"weight.{name}"])
            state = {kind: tensors[f"{kind}.{name}"] for kind in ("step", "exp_avg", "exp_avg_sq")}
            self.optimiser.state[weight] = state | {"step": state["step"].cpu()}
        self.rng.bit_generator.state, self.best = facts["rng"], take("best.")
        self.step, self.queue, self.history = facts["step"], facts["queue"], facts["history"]
        return True


def _possible(steps, batch_size, rank, top_layers, accumulate, schedule, patience, held_out) -> None:
    if steps < 0 or batch_size < 1 or rank < 1 or not 0 < top_layers <= 1 or accumulate < 1:
        raise ValueError("fine_tune needs steps ≥ 0, batch_size ≥ 1, rank ≥ 1, accumulate ≥ 1 and 0 < top_layers ≤ 1.")
    if patience is not None and (held_out is None or patience < 1):
        raise ValueError("Early stopping needs held_out texts to watch, and patience ≥ 1.")
    rate_share(0, 1, schedule)


@contextmanager
def recomputing(model: peft.PeftModel, on: bool = True) -> Iterator[None]:
    """Inside, the layers of a model in training keep only their inputs and compute the rest again on the way back, if ``on``."""
    base = model.get_base_model()
    with warnings.catch_warnings(), disable_input_dtype_casting(model, on):  # on the way back as on the way there
        warnings.simplefilter("ignore", FutureWarning)  # transformers 5 is about to rename it
        if on:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            yield
        finally:
            if on:
                base.gradient_checkpointing_disable()
                base.disable_input_require_grads()  # else all layers, adapted or not, keep their activations from then on


def upper_lora(model: PreTrainedModel, rank: int, top_layers: float) -> peft.LoraConfig:
    """Low-rank adapters for the matrices of the upper share ``top_layers`` of a model's layers, scaled by 2."""
    layers = model.config.num_hidden_layers
    return peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=list(LORA_TARGETS),
        layers_to_transform=list(range(layers - max(1, round(top_layers * layers)), layers)),
        task_type="CAUSAL_LM",
    )


def _with_adapter(model: PreTrainedModel, rank: int, top_layers: float, seed: int) -> peft.PeftModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return checkpoints.peft_model(model, upper_lora(model, rank, top_layers))


def main(arguments: Sequence[str] | None = None) -> None:
    """Fine-tune a writer on a table of pairs, in as many processes as ``accelerate launch`` started, and write its adapter.

    ``accelerate launch --num_processes 2 -m adlib.tuning pairs.csv adapter --steps 120``; pairs.csv has the columns attributes,
    audience and copy.
    """
    parser = argparse.ArgumentParser(prog="adlib.tuning", description=main.__doc__.split("\n")[0])
    parser.add_argument("pairs", type=Path, help="CSV file with the columns attributes, audience and copy")
    parser.add_argument("out", type=Path, help="folder for the adapter")
    parser.add_argument("--model", default="smollm2", help="smollm2, a folder, or a name on the hub")
    for name, kind in {"steps": int, "batch-size": int, "accumulate": int, "seed": int, "learning-rate": float}.items():
        parser.add_argument(f"--{name}", type=kind, default=fine_tune.__kwdefaults__[name.replace("-", "_")])
    asked = vars(parser.parse_args(arguments))
    frame, out = pd.read_csv(asked.pop("pairs")), asked.pop("out")
    state = PartialState()
    model, tokenizer = load_writer(asked.pop("model"), device=str(state.device))
    prompts = [prompt(*row) for row in zip(frame["attributes"], frame["audience"], strict=True)]
    tuned, history = fine_tune(model, tokenizer, prompts, list(frame["copy"]), progress=state.is_main_process, **asked)
    if state.is_main_process:
        checkpoints.save_adapter(tuned, out)
        history.to_csv(out.with_suffix(".history.csv"), index=False)
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
