"""GKD with trl's GKDTrainer, on the same samples, from the same initial student.

Its `lmbda` is λ as in the paper and in this package, the share of updates on the student's own text (its code tests
`random() <= lmbda`; texts that state the reverse are wrong), so it is passed on unchanged. It draws its own random
numbers, one choice per batch and process. If the student generates, it still divides by the number of tokens of the
text, counted beforehand; the loop here divides by the number of generated tokens of the update.

Its checkpoints are <out>/checkpoints/checkpoint-N, each with the seconds up to it.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import tempfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.tracking import filter_trackers
from datasets import Dataset
from safetensors.torch import load_model, save_model
from torch import Tensor
from transformers.trainer_utils import get_last_checkpoint

from stepdistill import files
from stepdistill.baselines.language.models import Decoder
from stepdistill.baselines.language.tokens import Tokens
from stepdistill.baselines.language.trl_trainer import Record, Settings, Trainer, as_trl
from stepdistill.baselines.learner import unwrap
from stepdistill.baselines.less_memory import halved
from stepdistill.files import replacing
from stepdistill.training import folder
from stepdistill.training.processes import on_cpu, world

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stepdistill.baselines.language.gkd import GKDConfig

OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw8bit": "adamw_bnb_8bit"}  # trl's names


def teach(config: GKDConfig, teacher: Decoder, student: PreTrainedModel, data: Tokens) -> float:
    """Trains the student in place, from trl's last checkpoint if there is one; returns the seconds of training, earlier
    runs of the command included.

    Raises:
        InputError: the folder holds another run.
    """
    state, out = world(), Path(config.out)
    folder.claim(config, state.num_processes, write=state.is_main_process and not config.dry_run)
    weights = out / "weights"
    if config.dry_run:
        with tempfile.TemporaryDirectory() as place, halved(teacher.network, config.mixed_precision):
            make_trainer(dataclasses.replace(config, out=Path(place)), teacher, student, data).train()
        return 0.0
    if folder.finished(config, weights) is None:
        with halved(teacher.network, config.mixed_precision):
            seconds = _fit(config, make_trainer(config, teacher, student, data))
        gc.collect()  # the trainer refers to itself, and to the student and its optimizer, which leave the device
        for network in (student, teacher.network):  # measured in full precision, as if weights were only loaded
            unwrap(network)
        if state.is_main_process:
            with replacing(weights) as path:
                save_model(student, str(path / "student.safetensors"))
            done = {"update": config.max_train_steps, "seconds": seconds}
            files.write(out / "done.json", json.dumps(done) + "\n")
        state.wait_for_everyone()
    load_model(student, str(weights / "student.safetensors"))
    student.eval()
    return json.loads((out / "done.json").read_text())["seconds"]


def _fit(config: GKDConfig, trainer: Trainer) -> float:
    """Trains from the last checkpoint; returns the seconds, earlier runs included."""
    place = Path(config.out) / "checkpoints"
    last = get_last_checkpoint(str(place)) if place.is_dir() else None
    record = Record(trainer, config, last)
    trainer.add_callback(record)
    with closing(record.metrics):
        trainer.train(resume_from_checkpoint=last)
    return record.seconds


def make_trainer(config: GKDConfig, teacher: Decoder, student: PreTrainedModel, data: Tokens) -> Trainer:
    """Returns trl's trainer with these settings."""
    settings = Settings(
        output_dir=str(config.out / "checkpoints"), lmbda=config.lmbda, beta=config.beta,
        temperature=config.temperature, max_new_tokens=config.block - config.prompt, max_length=config.block,
        max_steps=1 if config.dry_run else config.max_train_steps, per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        gradient_checkpointing=config.gradient_checkpointing, optim=OPTIMIZERS[config.optimizer],
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
