"""GKD with trl's GKDTrainer, on the same samples, from the same initial student.

Its `lmbda` is λ as in the paper and in this package, the share of updates on the student's own text (its code tests
`random() <= lmbda`; texts that state the reverse are wrong), so it is passed on unchanged. It draws its own random
numbers, one choice per batch and process. If the student generates, it still divides by the number of tokens of the
text, counted beforehand; the loop here divides by the number of generated tokens.

Its checkpoints are <out>/checkpoints/checkpoint-N, each with the seconds up to it.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from accelerate.tracking import filter_trackers
from datasets import Dataset
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from stepdistill import files
from stepdistill.baselines.base import unwrap
from stepdistill.baselines.language.models import Decoder, positions
from stepdistill.baselines.language.tokens import Tokens
from stepdistill.files import replacing
from stepdistill.training import folder
from stepdistill.training.processes import on_cpu
from stepdistill.training.trackers import Metrics

with warnings.catch_warnings():  # trl warns that it is experimental
    warnings.simplefilter("ignore")
    from trl.experimental.gkd import GKDConfig as Settings
    from trl.experimental.gkd import GKDTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stepdistill.baselines.language.gkd import GKDConfig

IGNORED = -100  # trl's label of tokens that do not count


def teach(config: GKDConfig, teacher: Decoder, student: PreTrainedModel, data: Tokens) -> float:
    """Trains the student in place, from trl's last checkpoint if there is one; returns the seconds of training, earlier
    runs of the command included.

    Raises:
        InputError: the folder holds another run.
    """
    state, out = PartialState(cpu=on_cpu()), Path(config.out)
    folder.claim(config, state.num_processes, write=state.is_main_process and not config.dry_run)
    weights = out / "weights"
    if config.dry_run:
        with tempfile.TemporaryDirectory() as place:
            make_trainer(dataclasses.replace(config, out=Path(place)), teacher, student, data).train()
        return 0.0
    if folder.finished(config, weights) is None:
        trainer = make_trainer(config, teacher, student, data)
        last = get_last_checkpoint(str(out / "checkpoints")) if (out / "checkpoints").is_dir() else None
        record = Record(trainer, config, last)
        trainer.add_callback(record)
        with closing(record.metrics):
            trainer.train(resume_from_checkpoint=last)
        for network in (student, teacher.network):  # measured in full precision, as if weights were only loaded
            unwrap(network)
        if state.is_main_process:
            with replacing(weights) as path:
                save_model(student, str(path / "student.safetensors"))
            done = {"update": config.max_train_steps, "seconds": record.seconds}
            files.write(out / "done.json", json.dumps(done) + "\n")
        state.wait_for_everyone()
    load_model(student, str(weights / "student.safetensors"))
    student.eval()
    return json.loads((out / "done.json").read_text())["seconds"]


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


def make_trainer(config: GKDConfig, teacher: Decoder, student: PreTrainedModel, data: Tokens) -> Trainer:
    """Returns trl's trainer with these settings."""
    settings = Settings(
        output_dir=str(config.out / "checkpoints"), lmbda=config.lmbda, beta=config.beta,
        temperature=config.temperature, max_new_tokens=config.block - config.prompt, max_length=config.block,
        max_steps=1 if config.dry_run else config.max_train_steps, per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        gradient_checkpointing=config.gradient_checkpointing,
        learning_rate=config.learning_rate, lr_scheduler_type=config.lr_scheduler, warmup_steps=config.lr_warmup,
        weight_decay=config.weight_decay, adam_beta1=config.adam_betas[0], adam_beta2=config.adam_betas[1],
        adam_epsilon=config.adam_epsilon, max_grad_norm=config.max_grad_norm, seed=config.seed,
        save_steps=config.checkpoint_every, save_total_limit=2, save_strategy="no" if config.dry_run else "steps",
        logging_steps=config.log_every, report_to=[], use_cpu=on_cpu(),
        bf16=config.mixed_precision == "bf16", fp16=config.mixed_precision == "fp16",
    )  # fmt: skip
    tokenizer = copy.deepcopy(teacher.tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # for generation only: masks define what counts

    def collate(rows: list[dict]) -> dict[str, Tensor]:
        return as_trl(data, [row["place"] for row in rows])

    places = Dataset.from_dict({"place": range(len(data))})
    trainer = Trainer(student, teacher.network, settings, data_collator=collate, train_dataset=places,
                      processing_class=tokenizer)  # fmt: skip
    # transformers passes its accelerator no trackers, having its own; Metrics needs them there
    trainer.accelerator.project_configuration.set_directories(str(config.out))
    trainer.accelerator.log_with = filter_trackers(list(config.trackers), config.out)
    return trainer


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
