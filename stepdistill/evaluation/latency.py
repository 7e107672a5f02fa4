"""Latency per image, stage by stage, measured inside the plain pipeline's own calls, and network evaluations.

    timing = measure(sampler, prompts, steps=4, batch=1)
    timing.text, timing.denoiser_step, timing.decode, timing.total_p50, timing.total_p90      # ms for the batch

On a CPU all times are wall-clock; on a GPU stages are timed by CUDA events and the whole call by the wall clock,
synchronised at both ends. With `compiled` the network is compiled for timing only; the first call, which compiles, is
reported separately.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from stepdistill.errors import InputError
from stepdistill.evaluation.generate import Sampler, backbone, evaluated

REPEATS, SECONDS = 10, 20.0  # default number of timed calls, and limit on their total time


class Stages:
    """Context manager that times the text encoders, every call of the denoiser, and the decoder.

    Attributes:
        evaluations: samples that went through the denoiser, including guidance's second half; divided by the number of
            generated images, it is the NFE.
    """

    def __init__(self, pipeline) -> None:
        self.pipeline = pipeline
        self.network = backbone(pipeline)
        self.device = self.network.device
        self.evaluations = 0
        self._marks: list[tuple[str, Any, Any]] = []
        self._undo: list[Callable[[], None]] = []

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _hook(self, module: torch.nn.Module, stage: str) -> None:
        started: list[Any] = []

        def before(_module, args, kwargs) -> None:
            if stage == "denoiser_step":
                self.evaluations += evaluated(args, kwargs)
            started.append(self._now())

        def after(*_) -> None:
            self._marks.append((stage, started.pop(), self._now()))

        handles = module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)
        self._undo += [handle.remove for handle in handles]

    def __enter__(self) -> Stages:
        self._hook(self.network, "denoiser_step")
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            if (module := getattr(self.pipeline, name, None)) is not None:
                self._hook(module, "text")
        if (vae := getattr(self.pipeline, "vae", None)) is not None:
            decode = vae.decode

            def timed(*args, **kwargs):
                start = self._now()
                result = decode(*args, **kwargs)
                self._marks.append(("decode", start, self._now()))
                return result

            vae.decode = timed
            self._undo.append(lambda: vae.__dict__.pop("decode", None))
        return self

    def __exit__(self, *_) -> None:
        for undo in self._undo:
            undo()
        self._undo.clear()

    def milliseconds(self) -> dict[str, list[float]]:
        """Returns stage -> the duration of each call since this was last called."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found: dict[str, list[float]] = {}
        for stage, start, end in self._marks:
            taken = start.elapsed_time(end) if self.device.type == "cuda" else 1000 * (end - start)
            found.setdefault(stage, []).append(taken)
        self._marks.clear()
        return found


@dataclass(frozen=True)
class Timing:
    """Milliseconds for one batch; medians unless a quantile is named.

    Attributes:
        text: all text encoders, including guidance's empty prompt. denoiser_step: one call of the network.
        decode: latents to pixels. total_p50, total_p90, total_p99: prompt to pixels.
        quantiles: stage -> (p50, p90, p99), over network calls for denoiser_step, over whole calls for the others.
        first: the warm-up call before the timed ones, compilation included. nfe: network evaluations per image.
        batch, repeats: batch size, number of timed calls. clock: wall or cuda events. compiled: whether compiled.
        pipeline_memory_mb: peak GPU memory of the pipeline's weights and calls; None on a CPU.
    """

    text: float
    denoiser_step: float
    decode: float
    total_p50: float
    total_p90: float
    total_p99: float
    quantiles: dict[str, tuple[float, float, float]]
    first: float | None
    nfe: float
    batch: int
    repeats: int
    clock: str
    compiled: bool
    pipeline_memory_mb: float | None

    def row(self) -> dict[str, Any]:
        """The `latency_ms` entry of a benchmark row."""
        fields = asdict(self)
        del fields["nfe"]
        fields["quantiles"] = {stage: [round(v, 3) for v in values] for stage, values in self.quantiles.items()}
        return {k: round(v, 3) if isinstance(v, float) else v for k, v in fields.items()}


def measure(
    sampler: Sampler,
    prompts: Sequence[str],
    *,
    steps: int,
    batch: int = 1,
    warmup: int = 1,
    repeats: int = REPEATS,
    seconds: float = math.inf,
    compiled: bool = False,
) -> Timing:
    """Times whole calls of the pipeline, text encoding included.

    Args:
        prompts: repeated to fill the batch. warmup: calls before the first timed one. repeats: timed calls; fewer, but
            at least three, if they exceed `seconds` in total. compiled: compile the network for these calls.
    """
    if batch < 1 or repeats < 1:
        raise InputError(f"latency: got batch={batch}, repeats={repeats}; allowed: 1 or more")
    chosen = [prompts[i % len(prompts)] for i in range(batch)] if prompts else []
    condition = {"prompt": chosen} if sampler.takes_prompts else {}

    def once() -> float:
        start = time.perf_counter()  # the call returns images on the CPU, so it is synchronised at both ends
        sampler(condition, first=0, count=batch, steps=steps)
        return 1000 * (time.perf_counter() - start)

    network = backbone(sampler.pipeline)
    totals: list[float] = []
    taken: dict[str, list[float]] = {"text": [], "denoiser_step": [], "decode": []}
    memory = PipelineMemory(sampler.pipeline)
    with compiled_network(network) if compiled else nullcontext():
        first = [once() for _ in range(warmup)][:1]
        memory.reset()
        with Stages(sampler.pipeline) as stages:
            while len(totals) < repeats and (len(totals) < 3 or sum(totals) < 1000 * seconds):
                totals.append(once())
                found = stages.milliseconds()
                taken["denoiser_step"] += found.get("denoiser_step", [])
                for stage in ("text", "decode"):
                    taken[stage].append(sum(found.get(stage, [])))
    quantiles = {
        stage: tuple(quantile(values, q) for q in (0.5, 0.9, 0.99))
        for stage, values in (taken | {"total": totals}).items()
    }
    return Timing(
        *(quantiles[stage][0] for stage in taken), *quantiles["total"], quantiles, first[0] if first else None,
        stages.evaluations / batch / len(totals), batch, len(totals),
        "cuda events" if stages.device.type == "cuda" else "wall", compiled, memory.read(),
    )  # fmt: skip


@contextmanager
def compiled_network(network: torch.nn.Module) -> Iterator[None]:
    """Context in which a network's forward is compiled, anew per shape; its hooks, which read the clock, are not."""
    before = network.__dict__.get("forward")  # such as the one that offloading installs
    torch._dynamo.reset()  # dynamo compiles a function at most eight times, then silently runs it in eager mode
    network.forward = torch.compile(network.forward, dynamic=False)
    try:
        yield
    finally:
        if before is None:
            del network.forward
        else:
            network.forward = before
        torch._dynamo.reset()


def channels_last(pipeline) -> None:
    """Converts a pipeline's UNet or transformer, and its autoencoder, to the channels_last memory format."""
    for part in (backbone(pipeline), getattr(pipeline, "vae", None)):
        if part is not None:
            part.to(memory_format=torch.channels_last)


def quantile(values: Sequence[float], q: float) -> float:
    """Returns the q-quantile, interpolated linearly between order statistics."""
    return float(torch.quantile(torch.tensor(values, dtype=torch.float64), q))


class PipelineMemory:
    """Peak GPU memory of a pipeline: its weights, and what its calls need.

    What else is allocated when this is created, such as extractors and other models, is subtracted. On a CPU nothing is
    measured: a process's memory there says little about one pipeline.
    """

    def __init__(self, pipeline) -> None:
        self.device = backbone(pipeline).device
        self.others = 0
        if self.device.type == "cuda":
            self.others = torch.cuda.memory_allocated(self.device) - resident(pipeline, self.device)

    def reset(self) -> None:
        """Resets the peak."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def read(self) -> float | None:
        """Returns the peak in megabytes (2^20 bytes); None on a CPU."""
        if self.device.type != "cuda":
            return None
        return round((torch.cuda.max_memory_allocated(self.device) - self.others) / 2**20, 1)


def resident(pipeline, device: torch.device) -> int:
    """Returns the bytes of a pipeline's weights and buffers on a device; shared storage counts once."""
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers()) if t.device == device]
    storages = [t.untyped_storage() for t in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
