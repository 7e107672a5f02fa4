"""GKD by trl's GKDTrainer, on the same samples, from the same student.

Its `lmbda` is λ in the sense of the paper and of this package, the share of updates on the student's own text (its code
draws `random() <= lmbda`; texts that have it the other way round are wrong), so it is passed on as it is. It draws its
own random numbers, one choice a batch and process. Where the student speaks it still divides by the tokens of the text,
which were counted before; the loop here divides by those that were said.
"""

from __future__ import annotations

import copy
import json
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor

from stepdistill import files
from stepdistill.baselines.language.data import Tokens
from stepdistill.baselines.language.models import Decoder
from stepdistill.files import replacing
from stepdistill.training import folder
from stepdistill.training.processes import on_cpu

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stepdistill.baselines.language.gkd import GKDConfig

IGNORED = -100  # trl's label of what does not count


def teach(config: GKDConfig, teacher: Decoder, student: PreTrainedModel, data: Tokens) -> float:
    """Trains the student in place, from trl's last checkpoint where there is one; returns the seconds that it took.

    Raises:
        InputError: the folder holds another run.
    """
    from accelerate import PartialState
    from transformers.trainer_utils import get_last_checkpoint

    state, out = PartialState(cpu=on_cpu()), Path(config.out)
    folder.claim(config, state.num_processes, write=state.is_main_process and not config.dry_run)
    weights = out / "weights"
    if folder.finished(config, weights) is None:
        started = time.time()
        trainer = make_trainer(config, teacher, student, data)
        last = get_last_checkpoint(str(out / "trl")) if (out / "trl").is_dir() else None
        trainer.train(resume_from_checkpoint=last)
        if config.dry_run:
            return 0.0
        if state.is_main_process:
            with replacing(weights) as path:
                save_model(student, str(path / "student.safetensors"))
            done = {"update": config.max_train_steps, "seconds": round(time.time() - started, 1)}
            files.write(out / "done.json", json.dumps(done) + "\n")
        state.wait_for_everyone()
    load_model(student, str(weights / "student.safetensors"))
    student.eval()
    return json.loads((out / "done.json").read_text())["seconds"]


def make_trainer(config: GKDConfig, teacher: Decoder, student: PreTrainedModel, data: Tokens):
    """trl's trainer with these settings."""
    from datasets import Dataset

    with warnings.catch_warnings():  # that it is experimental
        warnings.simplefilter("ignore")
        from trl.experimental.gkd import GKDConfig as Settings
        from trl.experimental.gkd import GKDTrainer

    settings = Settings(
        output_dir=str(config.out / "trl"), lmbda=config.lmbda, beta=config.beta, temperature=config.temperature,
        max_new_tokens=config.block - config.prompt, max_length=config.block,
        max_steps=1 if config.dry_run else config.max_train_steps, per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation, gradient_checkpointing=False,
        learning_rate=config.learning_rate, lr_scheduler_type=config.lr_scheduler, warmup_steps=config.lr_warmup,
        weight_decay=config.weight_decay, adam_beta1=config.adam_betas[0], adam_beta2=config.adam_betas[1],
        adam_epsilon=config.adam_epsilon, max_grad_norm=config.max_grad_norm, seed=config.seed,
        save_steps=config.checkpoint_every, save_total_limit=2, save_strategy="no" if config.dry_run else "steps",
        logging_steps=config.log_every, report_to=[], use_cpu=on_cpu(), disable_dropout=False,
        bf16=config.mixed_precision == "bf16", fp16=config.mixed_precision == "fp16",
    )  # fmt: skip
    tokenizer = copy.deepcopy(teacher.tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # for generation alone: what counts is said by masks

    def collate(rows: list[dict]) -> dict[str, Tensor]:
        return as_trl(data, [row["place"] for row in rows])

    places = Dataset.from_dict({"place": range(len(data))})
    return GKDTrainer(student, teacher.network, settings, data_collator=collate, train_dataset=places,
                      processing_class=tokenizer)  # fmt: skip


def as_trl(data: Tokens, indices: list[int]) -> dict[str, Tensor]:
    """Samples in trl's names; labels are the tokens that count, unshifted, as its loss shifts them."""
    rows = data.batch(indices)
    return {
        "input_ids": rows["ids"],
        "attention_mask": rows["attention"].long(),
        "labels": torch.where(rows["counts"], rows["ids"], IGNORED),
        "prompts": rows["ids"][:, : data.prompt],
        "prompt_attention_mask": rows["attention"][:, : data.prompt].long(),
    }
