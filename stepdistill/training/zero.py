"""Gradients and optimizer states sharded over the processes: DeepSpeed's ZeRO (Rajbhandari et al. 2020), stages 1, 2.

    accelerate launch --config_file train_scripts/configs/accelerate/deepspeed.yaml train_scripts/train_lcm.py ...

Every process keeps all weights; sharding.py shards those too. A DeepSpeed engine holds one network and one optimizer,
so each trained role gets an engine of its own. Trained weights are float32 and autocast computes in bf16, as without
DeepSpeed. Checkpoints hold full tensors, so a run can resume on more processes or fewer, with DeepSpeed or without.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stepdistill.errors import InputError
from stepdistill.training.sharding import YES

if TYPE_CHECKING:
    from stepdistill.training.config import TrainConfig

ALLOWED = "allowed: {}; or fsdp2.yaml of train_scripts/configs/accelerate/, which shards the weights too"


def asked_for() -> int:
    """The stage of ZeRO that `accelerate launch` requests; 0 for no DeepSpeed.

    Raises:
        InputError: it requests what this trainer does not support, or DeepSpeed is not installed.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() not in YES:
        return 0
    if importlib.util.find_spec("deepspeed") is None:
        fix = "pip install 'stepdistill[deepspeed]'"
        raise InputError(f"accelerate: got DEEPSPEED, which is not installed; {ALLOWED.format('no DeepSpeed')}; {fix}")
    if file := os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        raise InputError(f"accelerate: got deepspeed_config_file {file}; {ALLOWED.format('zero_stage')}")
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if stage not in ("1", "2"):
        raise InputError(f"accelerate: got zero_stage {stage}; {ALLOWED.format('1 or 2')}")
    for what in ("OPTIMIZER", "PARAM"):
        device = os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE", "none")
        if device != "none":
            raise InputError(f"accelerate: got offload_{what.lower()}_device {device}; {ALLOWED.format('none')}")
    return int(stage)


def check(config: TrainConfig) -> int:
    """`asked_for`, with a check of the configuration.

    Raises:
        InputError: see there; or the run's optimizer or precision does not support sharded states.
    """
    stage = asked_for()
    for name, bad, fix in (("optimizer", "adamw8bit", "adamw"), ("mixed_precision", "fp16", "bf16 or no")):
        if stage and getattr(config, name) == bad:
            raise InputError(f"{name}: got {bad} under DeepSpeed; allowed there: {fix}")
    return stage


def engine(network: nn.Module, optimizer: torch.optim.Optimizer, stage: int, config: TrainConfig) -> nn.Module:
    """A DeepSpeed engine around a network and its optimizer; called as the network is."""
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    settings = {
        "train_micro_batch_size_per_gpu": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation,
        "gradient_clipping": config.max_grad_norm,
        "zero_allow_untested_optimizer": True,  # torch's own AdamW
        # Its one gradient buffer needs each forward to precede its backward; another role's comes in between here.
        "zero_optimization": {"stage": stage, "contiguous_gradients": False, "overlap_comm": False},
        "steps_per_print": 2**62,
    }
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    return deepspeed.initialize(model=network, optimizer=optimizer, model_parameters=trained, config=settings)[0]


class ShardedOptimizer:
    """An engine's optimizer as torch's: a step, groups, and a state of full tensors by parameter number.

    Args:
        engine: see `engine`. parameters: those it trains, in the optimizer's order.
    """

    def __init__(self, engine: nn.Module, parameters: list[nn.Parameter]) -> None:
        self.engine, self.parameters = engine, parameters

    @property
    def _inner(self) -> torch.optim.Optimizer:
        """torch's optimizer, of this process's share of the flattened parameters."""
        return self.engine.optimizer.optimizer

    @property
    def param_groups(self) -> list[dict]:
        """See torch.optim.Optimizer."""
        return self._inner.param_groups

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a loss, of one of `gradient_accumulation` batches."""
        self.engine.backward(loss)

    def step(self) -> Tensor | None:
        """After the last of accumulated batches, clips the gradients, moves the parameters and returns the gradients'
        norm; None after the others."""
        last = self.engine.is_gradient_accumulation_boundary()
        self.engine.step()
        return torch.as_tensor(self.engine.get_global_grad_norm()) if last else None

    def state_dict(self) -> dict:
        """See torch.optim.Optimizer; on the CPU. All processes must call it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        groups[0]["params"] = list(range(len(self.parameters)))
        state = {}
        for flat in self._inner.state.values():
            for number, p in enumerate(self.parameters):
                moments = {k: safe_get_full_optimizer_state(p, k).cpu() for k, v in flat.items() if v.ndim}
                state[number] = {"step": flat["step"].clone(), **moments}
        return {"state": state, "param_groups": groups}

    @torch.no_grad()
    def load_state_dict(self, saved: dict) -> None:
        """See torch.optim.Optimizer. The parameters have their values already; the engine's copies take them on."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        state, zero = saved["state"], self.engine.optimizer
        for group, kept in zip(self.param_groups, saved["param_groups"], strict=True):
            group.update({k: v for k, v in kept.items() if k != "params"})
            for flat in group["params"] if state else ():
                self._inner.state[flat] = {
                    k: torch.zeros_like(flat) if v.ndim else v.clone() for k, v in state[0].items()
                }
        if state:
            zero._lazy_init_hp_params_optimizer_state()  # which a first step would do
        for number, p in enumerate(self.parameters):
            safe_set_full_fp32_param(p, p.detach())
            for name, value in state.get(number, {}).items():
                if value.ndim:
                    safe_set_full_optimizer_state(p, value.to(p.device), name)
