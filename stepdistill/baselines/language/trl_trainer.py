"""trl's GKDTrainer on this package's samples, and its lines of metrics.jsonl."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from stepdistill import files
from stepdistill.baselines.language.models import positions
from stepdistill.baselines.language.tokens import Tokens
from stepdistill.training.trackers import Metrics

with warnings.catch_warnings():  # trl warns that it is experimental
    warnings.simplefilter("ignore")
    from trl.experimental.gkd import GKDConfig as Settings
    from trl.experimental.gkd import GKDTrainer

if TYPE_CHECKING:
    from stepdistill.baselines.language.gkd import GKDConfig

IGNORED = -100  # trl's label of tokens that do not count


@contextmanager
def placed(network: nn.Module) -> Iterator[None]:
    """Context in which a language model called without position_ids gets those of `positions`."""

    def hook(module: nn.Module, args: tuple, given: dict) -> tuple[tuple, dict]:
        if given.get("position_ids") is None:
            given = {**given, "position_ids": positions(given["attention_mask"])}
        return args, given

    handle = network.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class Trainer(GKDTrainer):
    """trl's, with positions counted from the first attended token, and a loss for each kind of text in its logs."""

    def __init__(self, *args: object, **settings: object) -> None:
        super().__init__(*args, **settings)
        self.losses: dict[str, list[Tensor]] = {}  # since the last line, by kind of text

    def compute_loss(self, model: nn.Module, *args: object, **settings: object) -> Tensor:
        """See GKDTrainer; without position_ids, learnt positions are wrong for padded prompts."""
        with placed(self.accelerator.unwrap_model(model)), placed(self.accelerator.unwrap_model(self.teacher_model)):
            return super().compute_loss(model, *args, **settings)

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch: Tensor | None = None) -> Tensor:
        """See GKDTrainer, which replaces the text by the student's."""
        text = inputs["input_ids"]
        loss = super().training_step(model, inputs, num_items_in_batch)
        name = "jsd_text" if inputs["input_ids"] is text else "jsd_own"
        self.losses.setdefault(name, []).append(loss.detach() * self.current_gradient_accumulation_steps)
        return loss


class Record(TrainerCallback):
    """Writes a trainer's lines of metrics.jsonl, and the seconds so far with each checkpoint.

    Args:
        last: the checkpoint that training resumes from, if any.
    """

    def __init__(self, trainer: Trainer, config: GKDConfig, last: str | None) -> None:
        self.trainer, self.started = trainer, time.time()
        self.first = 0 if last is None else int(last.rpartition("-")[2])
        spent = Path(last or "") / "seconds.json"
        self.before = json.loads(spent.read_text()) if last and spent.exists() else 0.0
        self.metrics = Metrics(config.out, trainer.accelerator, config.record(), self.first)

    @property
    def seconds(self) -> float:
        """Seconds so far, earlier runs included."""
        return round(self.before + time.time() - self.started, 1)

    def on_step_end(self, args: Settings, state, control, **_: object) -> None:
        """Has the last update logged, too."""
        control.should_log = control.should_log or state.global_step >= state.max_steps

    def on_log(self, args: Settings, state, control, logs: dict[str, float], **_: object) -> None:
        """Writes a line; the last log of a training, which holds only timings, is skipped."""
        if "loss" not in logs:
            return
        terms = {name: torch.stack(values).mean().item() for name, values in self.trainer.losses.items()}
        self.trainer.losses = {}
        pace = (time.time() - self.started) / (state.global_step - self.first)
        more = {"learning_rate": logs["learning_rate"], "seconds_per_update": round(pace, 4)}
        self.metrics.log(state.global_step, terms | more)

    def on_save(self, args: Settings, state, control, **_: object) -> None:
        """Writes the seconds beside the weights."""
        if state.is_world_process_zero:
            path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / "seconds.json"
            files.write(path, json.dumps(self.seconds))


def as_trl(data: Tokens, indices: list[int]) -> dict[str, Tensor]:
    """Samples under trl's names; labels are the tokens that count, unshifted, as its loss shifts them."""
    rows = data.batch(indices)
    return {
        "input_ids": rows["ids"],
        "attention_mask": rows["attention"].long(),
        "labels": torch.where(rows["counts"], rows["ids"], IGNORED),
        "prompts": rows["ids"][:, : data.prompt],
        "prompt_attention_mask": rows["attention"][:, : data.prompt].long(),
    }
