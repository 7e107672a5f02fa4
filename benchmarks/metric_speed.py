"""Images per second of the metric pass relative to torch-fidelity's on the same folders, network and device.

    python benchmarks/metric_speed.py --out benchmarks/results/metric_speed.json
    python benchmarks/metric_speed.py --quick

Both compute the Frechet distance, KID, precision and recall of a folder of images against one of real images, with
Inception and torch-fidelity's resize, timed from loading the weights to the figures. For torch-fidelity this is what
its command runs. Each is timed twice per round: `first` processes both folders, as torch-fidelity's command does by
default; `next` finds the real images' features in its cache, like all cells of a benchmark but the first. The four take
turns, so that a busy machine slows all alike. The goal is a ratio of 2 for `first`. In its time this package also
computes density, coverage and all intervals, hashes images and weights, and writes its cache; its KID is over all
images at once, torch-fidelity's over 100 subsets, its default. If Inception's weights are not available, random weights
are used, which cost the same.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from stepdistill.cli.bench import device_of
from stepdistill.cli.command import guard, parse
from stepdistill.errors import InputError
from stepdistill.evaluation import features, metrics, records, sets
from stepdistill.evaluation.protocols import ExtractorSpec, Protocol
from stepdistill.files import sha256

NAMES = {"fd": "frechet_inception_distance", "kid": "kernel_inception_distance_mean", "precision": "precision",
         "recall": "recall"}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Flags of benchmarks/metric_speed.py."""

    n: int = 512
    """Images in each of the two folders, from the embedded set."""
    batch: int = 64
    """Batch size of both tools."""
    rounds: int = 3
    """Rounds; each times all four once."""
    quick: bool = False
    """16 images and one round, to check that it runs."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    out: Path | None = None
    """JSON file for the figures."""


def random_inception(file: Path, seed: int = 0) -> Path:
    """Writes seeded random weights for FID's Inception that keep the features of different images distinct."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Empty(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_) -> None:
            """Keeps the initial weights."""

    torch.save({}, file)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Empty("random", ["2048"], str(file))
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
            elif isinstance(layer, nn.BatchNorm2d):
                for tensor in (layer.weight, layer.running_var):
                    tensor.uniform_(0.7, 1.3)
                for tensor in (layer.bias, layer.running_mean):
                    tensor.uniform_(-0.3, 0.3)
    torch.save(net.state_dict(), file)
    return file


def ours(model: Path, real: Path, config: Config, device: str, cache: Path) -> dict[str, float]:
    """Computes the figures of one cell, with the real images' features from the cache if it has them."""
    os.environ["STEPDISTILL_CACHE"] = str(cache)
    extractor = ExtractorSpec("inception", resize="torch-fidelity")
    protocol = Protocol("speed", config.n, str(model), str(real), extractor, metrics=("fd", "kid", "prdc"))
    tools = metrics.prepare(protocol, device=device, batch=config.batch)
    measured = metrics.Pass(tools)
    for first, pictures in tools.prompts.batches(config.batch, config.n):
        measured.add(first, pictures)
    return {name: figure.value for name, figure in measured.figures().items()}


def theirs(model: Path, real: Path, config: Config, device: str, weights: Path, **cache: str) -> dict[str, float]:
    """Computes the same with torch-fidelity. Its KID is over 100 subsets of 1,000, or of all images if fewer.

    Args:
        cache: its options of that name; without them it keeps nothing of a folder.
    """
    import torch_fidelity

    found = torch_fidelity.calculate_metrics(
        input1=str(model), input2=str(real), fid=True, kid=True, prc=True, feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights), kid_subset_size=min(1000, config.n), batch_size=config.batch,
        cuda=device.startswith("cuda"), verbose=False, **cache,
    )  # fmt: skip
    return {name: found[key] for name, key in NAMES.items()}


def compare(config: Config, device: str, folder: Path) -> dict[str, object]:
    """Returns medians over the rounds of images per second and of the ratios, with both tools' figures."""
    places = {name: folder / name for name in ("test", "train")}
    for name, place in places.items():
        place.mkdir()
        for i, picture in enumerate(sets.open_set(f"avatars:{name}").pictures(0, config.n)):
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(place / f"{i:06}.png")
    weights, real = Path(os.environ[features.INCEPTION_PLACE]), places["train"]
    cache = {"input2_cache_name": "real", "cache_root": str(folder / "theirs")}
    theirs(real, real, config, device, weights, input1_cache_name="real", **cache)  # fills it
    figures: dict[str, dict[str, float]] = {}
    taken: dict[str, list[float]] = {}
    for i in range(config.rounds):
        own = folder / f"ours-{i}"
        jobs: dict[str, Callable[[], dict[str, float]]] = {
            "first": lambda own=own: ours(*places.values(), config, device, own),
            "next": lambda own=own: ours(*places.values(), config, device, own),
            "torch_fidelity_first": lambda: theirs(*places.values(), config, device, weights),
            "torch_fidelity_next": lambda: theirs(*places.values(), config, device, weights, **cache),
        }
        for name in list(jobs) if i % 2 == 0 else [*list(jobs)[2:], *list(jobs)[:2]]:
            start = time.perf_counter()
            figures[name] = jobs[name]()
            taken.setdefault(name, []).append(time.perf_counter() - start)
    return {
        "pictures_per_second": {k: round(config.n / statistics.median(v), 3) for k, v in taken.items()},
        "ratio_first": _over(taken["torch_fidelity_first"], taken["first"]),
        "ratio_next_of_both": _over(taken["torch_fidelity_next"], taken["next"]),
        "figures": {k: {name: round(v, 6) for name, v in found.items()} for k, found in figures.items()},
    }


def _over(theirs: Sequence[float], ours: Sequence[float]) -> float:
    return round(statistics.median(t / o for t, o in zip(theirs, ours, strict=True)), 3)


def main(config: Config) -> None:
    """Measures, prints a line per timing, and writes the figures."""
    if config.quick:
        config = Config(n=16, batch=16, rounds=1, device=config.device, out=config.out)
    if config.n < 16 or config.rounds < 1 or config.batch < 1:
        raise InputError(
            f"got n={config.n}, rounds={config.rounds}, batch={config.batch}; allowed: 16 or more pictures, 1 or more "
            "of the others"
        )
    device = device_of(config.device)
    with tempfile.TemporaryDirectory() as folder:
        try:
            weights = features.inception_file()
        except InputError:
            weights = random_inception(Path(folder) / "random.pth")
        what = "FID's" if sha256(weights).startswith(features.INCEPTION_SHA256_PREFIX) else "random"
        os.environ[features.INCEPTION_PLACE] = str(weights)
        found = compare(config, device, Path(folder))
    for name, rate in found["pictures_per_second"].items():
        print(f"{name:>20}: {rate:8.2f} images/s")
    ratios = (
        f"{found['ratio_first']:.2f}, {found['ratio_next_of_both']:.2f} with the real images' features cached by both"
    )
    print(f"torch-fidelity's time / ours: {ratios}")
    if config.out is not None:
        record = {
            "what": "pictures per second, ours / torch-fidelity: fd, kid, precision, recall of a folder",
            "goal": {"ratio_first": 2.0},
            "n": config.n, "batch": config.batch, "rounds": config.rounds, "weights": what, **found,
        }  # fmt: skip
        records.write_record(config.out, record, device)


if __name__ == "__main__":
    sys.exit(guard(lambda: main(parse(Config, description=__doc__))))
