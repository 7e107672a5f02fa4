"""Computes the statistics of a protocol's reference images and stores them with the assets, in float32.

    python benchmarks/ship_statistics.py --protocol avatars-2k

They are looked up by a hash of the images, the extractor's weights, the resize and the size; after a change to any of
these, run this again and remove the old file.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

from stepdistill import embedded
from stepdistill.cli.command import guard, parse
from stepdistill.evaluation.features import load_extractor
from stepdistill.evaluation.progress import ReferenceBar
from stepdistill.evaluation.protocols import load_protocol
from stepdistill.evaluation.reference import origin_of, reference_statistics, statistics_name
from stepdistill.evaluation.sets import open_set
from stepdistill.evaluation.statistics import save_statistics


@dataclass(frozen=True)
class Config:
    """Flags of benchmarks/ship_statistics.py."""

    protocol: str = "avatars-2k"
    """A protocol by name, or a .yaml file."""


def main(config: Config) -> None:
    """Computes the statistics, or reads them from the cache, and writes them."""
    protocol = load_protocol(config.protocol)
    reference = open_set(protocol.reference)
    settings = protocol.extractor
    extractor = load_extractor(settings.name, size=settings.size, resize=settings.resize)
    count = protocol.reference_n or reference.count
    moments = reference_statistics(extractor, reference, count=count, progress=ReferenceBar(True))
    file = embedded.path("avatars") / statistics_name(extractor, reference, count)
    save_statistics(file, moments, origin_of(extractor, reference, count), torch.float32)
    print(file)


if __name__ == "__main__":
    sys.exit(guard(lambda: main(parse(Config, description=__doc__))))
