"""Optimizers and learning rates, as functions of the update."""

from __future__ import annotations

import math

import torch
from torch import nn

from stepdistill.training.config import LoopConfig


def build_optimizer(parameters: list[nn.Parameter], config: LoopConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019), or bitsandbytes' 8-bit version."""
    options = {
        "lr": config.peak_rate, "betas": config.adam_betas, "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }  # fmt: skip
    if config.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **options)
    return torch.optim.AdamW(parameters, fused=True, **options)


def learning_rate_at(update: int, config: LoopConfig) -> float:
    """The learning rate of an update: a linear warm-up, then constant, or falling to zero at `max_train_steps`."""
    if update < config.lr_warmup:
        return config.peak_rate * (update + 1) / config.lr_warmup
    done = (update - config.lr_warmup) / max(1, config.max_train_steps - config.lr_warmup)
    share = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[config.lr_scheduler]
    return config.peak_rate * share
