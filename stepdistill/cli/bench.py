"""Measures models at several step counts: Frechet distance, CLIP score, attribute accuracy, latency by stage, NFE.

    stepdistill bench --model teacher=avatars,scheduler=ddim --model student=avatars,lora=out/lcm --out out/bench
    stepdistill bench --model teacher=FOLDER --model student=FOLDER,lora=STUDENT --data IMAGES

    stepdistill bench --model @sdxl --model @sdxl-turbo --protocol coco30k-256 --prompts FILE.txt --reference val2014

The first command uses the embedded images of 32 pixels, the second your own: IMAGES is a folder with metadata.jsonl, as
for training. The third measures published models under a published protocol, on your copy of its data. All models get
the same prompts and seeds. Rows are written to results.jsonl as they are measured: the same command resumes an
interrupted run and measures only what is new. report.md and report.html follow at the end. Several GPUs share the work:
accelerate launch --multi_gpu --num_processes 8 -m stepdistill bench ...

`stepdistill bench compare` compares two models, `stepdistill bench gate` checks figures against bounds.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from stepdistill.errors import InputError

if TYPE_CHECKING:
    from stepdistill.evaluation.protocols import Protocol
    from stepdistill.evaluation.spec import ModelSpec


@dataclass(frozen=True)
class Config:
    """Flags of `stepdistill bench`."""

    model: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A model, as SPEC or NAME=SPEC; repeat for more. A SPEC is path[,lora=DIR][,scheduler=..][,guidance=..], or a
    ready model such as @sdxl-turbo; see stepdistill --help."""
    list_models: bool = False
    """List the ready models, and exit."""
    data: Path | None = None
    """Folder of your own images with captions (metadata.jsonl, or a .txt next to each): prompts and reference."""
    protocol: str | None = None
    """A protocol by name, or a .yaml file; default: imagefolder with --data, else avatars-2k."""
    prompts: Path | None = None
    """Text file of prompts, one per line, for a protocol that does not include them."""
    reference: Path | None = None
    """Folder of real images, or their statistics (.npz, .safetensors), for a protocol that does not include them."""
    steps: tuple[int, ...] = ()
    """Step counts; default: a ready model's own, else the protocol's, else 1 2 4 8 50."""
    out: Path = Path("out/bench")
    """Folder for results.jsonl, the grids and the report."""
    n: int | None = None
    """Images per cell, in place of the protocol's; thousands give stable figures, and only equal n are comparable."""
    seed: Annotated[tuple[int, ...], tyro.conf.arg(aliases=("--seeds",))] = ()
    """Seed of the images' noise, in place of the protocol's; with several, each model has a row per seed, and tables
    show their mean."""
    batch: int | None = None
    """Images per batch; default: 64 up to 256 pixels, fewer above: 16 at 512, 4 at 1024."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    dtype: Literal["fp32", "fp16", "bf16"] | None = None
    """Dtype of the weights, for models whose SPEC sets none."""
    channels_last: bool = False
    """Use the channels-last memory format for the weights of UNets and autoencoders."""
    compile: bool = False
    """Time the compiled network, its first, compiling call reported separately; images are generated uncompiled."""
    latency_batch: int = 1
    """Images per call of a second timing, in addition to that of one image; 1 omits it."""
    latency_repeats: int | None = None
    """Timed calls; 0 omits latency. Default: 10, or fewer, at least 3, if they take more than 20 s."""
    keep_pictures: bool = True
    """Keep generated images in the cache, for cells up to 2 GiB or STEPDISTILL_PICTURES_GIB, so that they are not
    generated again for other metrics. Others are kept only until their cell is measured."""
    floor: bool = True
    """Also measure held-out real images, if there are any, and the autoencoder's reconstructions."""
    card: bool = False
    """Write the figures into the model cards of export folders among the models."""
    dry_run: bool = False
    """Print what would be measured, and exit."""


def main(config: Config) -> int:
    """Runs the benchmark; returns 2 if a cell failed. Inputs are checked before anything is measured: a missing model
    is reported at once, and the others are measured."""
    from stepdistill import files
    from stepdistill.evaluation import departures, places, records, spec, suite
    from stepdistill.processes import is_rank_zero

    if config.list_models:
        from stepdistill.evaluation.catalogue import listed

        print(listed())
        return 0
    models, steps = spec.as_models(config.model), suite.check_steps(config.steps) if config.steps else None
    models = {k: dataclasses.replace(m, dtype=m.dtype or config.dtype) for k, m in models.items()}
    device = device_of(config.device)
    settings = suite.Settings(
        batch=config.batch,
        device=device,
        latency_batch=config.latency_batch,
        latency_repeats=config.latency_repeats,
        keep=config.keep_pictures,
        compiled=config.compile,
        channels_last=config.channels_last,
        floor=config.floor,
    )
    plan = spec.plan_of(models, steps, suite.STEPS)
    absent = places.absent(((name, model) for name, model, _ in plan), remote=not config.dry_run)
    if len(absent) < len(models):
        records.check_folder(config.out)
        protocol = protocol_of(config, {name: model for name, model in models.items() if name not in absent})
    for name, why in absent.items() if is_rank_zero() else ():
        print(f"failed: {name}: {why}", file=sys.stderr)
    if len(absent) == len(models):
        return 2
    if config.dry_run:
        plan = spec.plan_of(models, steps, protocol.steps or suite.STEPS)
        cells = sum(len(counts) for _, _, counts in plan) * max(len(set(config.seed)), 1)
        print(f"{protocol.name}: {protocol.n} images per cell, {cells} cells, into {config.out}")
        for name, model, counts in plan:
            print(f"  {name}: {model} at {' '.join(map(str, counts))} steps")
        lines = departures.of_specs(plan, protocol) + departures.of_steps(plan, protocol, steps is not None)
        for line in lines:
            print(f"  {line}")
        return 2 if absent else 0
    results = suite.evaluate(models, protocol, steps, out=config.out, seed=config.seed or None, settings=settings)
    if not results.main:
        return 0
    resolved = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()} | {
        "device": device, "pictures": {name: str(folder) for name, folder in results.store.cells.items()},
    }  # fmt: skip
    files.write(config.out / "bench.json", json.dumps(resolved, indent=2) + "\n")
    if results.rows:
        from stepdistill.evaluation.report import write_report
        from stepdistill.evaluation.summary import print_table

        print_table(results.rows, results.folder)
        if config.card:
            from stepdistill.evaluation.cards import write_cards

            for folder in write_cards(results.rows, results.folder):
                print(f"card: {folder / 'README.md'}")
        print(f"report: {write_report(config.out)}")
    if line := results.store.line():
        print(line)
    for failure in results.failed:
        if failure.steps is not None or failure.model not in absent:  # those were reported at once
            at = f" at {failure.steps} step{'s' * (failure.steps > 1)}" if failure.steps else ""
            print(f"failed: {failure.model}{at}: {failure.reason}", file=sys.stderr)
    return 2 if results.failed else 0


def protocol_of(config: Config, models: dict[str, ModelSpec]) -> Protocol:
    """Returns the protocol of a command line, on the user's own images if it names some.

    Raises:
        InputError: no such protocol, it does not support --data, or its image size differs from the models'.
    """
    from stepdistill.evaluation import features, places, protocols

    protocol = protocols.load_protocol(config.protocol or ("imagefolder" if config.data else "avatars-2k"))
    protocol = protocols.with_data(protocol, config.prompts, config.reference)
    if config.data is not None:
        size = common_size(models, remote=not config.dry_run)
        protocol, captioned = protocols.on_folder(protocol, config.data, size)
        if not captioned and not config.dry_run and any(map(takes_prompts, models.values())):
            raise InputError(
                f"--data: got {config.data}, which has no captions, for a text-to-image model; allowed: metadata.jsonl "
                "with file_name and text, or a .txt beside each picture; write one"
            )
        if config.protocol is None and not config.dry_run:
            extractor = protocols.ExtractorSpec(features.default_extractor())
            protocol = dataclasses.replace(protocol, extractor=extractor)
    elif protocol.prompts == protocols.DATA:
        raise InputError(f"protocol {protocol.name}: got no pictures; allowed: a folder of them; give --data FOLDER")
    for name, model in models.items() if protocol.side else ():
        protocol.check_side(name, model.size or places.picture_size(model.path, remote=not config.dry_run))
    return dataclasses.replace(protocol, n=config.n) if config.n is not None else protocol


def common_size(models: dict[str, ModelSpec], remote: bool) -> int | None:
    """Returns the side in pixels of the models' images; None if no model states it and the hub is not queried.

    Raises:
        InputError: their sizes differ, or the hub is queried and no model states one.
    """
    from stepdistill.evaluation import places

    sizes = {name: m.size or places.picture_size(m.path, remote=remote) for name, m in models.items()}
    stated = {size for size in sizes.values() if size}
    summary = ", ".join(f"{name} {size or 'unknown'}" for name, size in sizes.items())
    if len(stated) > 1:
        raise InputError(f"--model: got pictures of several sizes ({summary}); allowed: one; measure them apart")
    if not stated and remote:
        raise InputError(
            f"--model: got pipelines that do not say how large they draw ({summary}); allowed: a sample_size in "
            "the config.json of the unet or transformer, or size= in the SPEC; add one"
        )
    return next(iter(stated), None)


def takes_prompts(model: ModelSpec) -> bool:
    """Whether a SPEC's pipeline is text-to-image."""
    import diffusers

    from stepdistill.denoiser.load import class_of

    kind = getattr(diffusers, class_of(model.path), None)
    return kind is not None and "prompt" in inspect.signature(kind.__call__).parameters


def device_of(name: str) -> str:
    """Resolves a device name; auto is cuda if there is a GPU, else cpu.

    Raises:
        InputError: a GPU is requested but there is none, or the name is no device.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise InputError(f"--device: got {name!r}; allowed: auto, cpu, cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device: got {name}, and this machine has no usable GPU; take cpu")
    return name
