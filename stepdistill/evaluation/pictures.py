"""Cache of generated images: an interrupted benchmark resumes from it, and further metrics read it.

    <cache>/pictures/<key>/000000.png ...      one file per image, also for clean-fid and other tools
                           batch-000000.json   the hashes of a batch, and its number of network evaluations
                           cell.json           what the key is computed from

The key is a hash of the model, how it is sampled, the prompts, the seed, the batch size, the device and the libraries:
of everything that can change a bit. A batch exists once its manifest, which is written last, exists; a batch that does
not match its hashes is generated again. A cell is written to <cache>/drawing and moved once it is measured. What a
killed benchmark left there is resumed by the next one that needs it, and otherwise deleted by the next one into the
same --out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill import holds
from stepdistill.errors import InputError
from stepdistill.evaluation.generate import Drawn
from stepdistill.files import cache_folder

FORMAT = "pictures-1"  # raise it if the noise, the numbering or the storage of images changes
LIMIT, LIMIT_PLACE = 2.0, "STEPDISTILL_PICTURES_GIB"  # GiB; a larger cell is kept only until it is measured
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "stepdistill")
OWNER = ".owner"  # in an unfinished cell: the folder of the benchmark that wrote to it last
COMPRESSION = 1  # PNG level: the fastest, about 5 % larger than the default


def setup_of(pipeline, *, order: bool = True) -> str:
    """Hashes everything but the weights that determines a pipeline's output: every part's configuration, 16 hex digits.

    Args:
        order: include the memory format of the weights; channels_last rounds differently.
    """
    configs: dict[str, Any] = {}
    for name, part in {"": pipeline, **pipeline.components}.items():
        config = getattr(part, "config", None)
        if config is None:
            configs[name] = [type(part).__name__, getattr(part, "model_max_length", None)]
            continue
        settings = config if isinstance(config, Mapping) else config.to_dict()
        configs[name] = {k: v for k, v in settings.items() if not k.startswith("_") and k != "transformers_version"}
        if order and isinstance(part, torch.nn.Module):
            configs[f"{name} in order"] = all(weight.is_contiguous() for weight in part.parameters())
    return _hash(configs)[:16]


def limit() -> float:
    """Returns the largest size in bytes of a cell that is kept: STEPDISTILL_PICTURES_GIB GiB, by default 2.

    Raises:
        InputError: the variable is not a number, or is negative.
    """
    value = os.environ.get(LIMIT_PLACE) or LIMIT
    try:
        if not (size := float(value)) >= 0:
            raise ValueError
    except ValueError as error:
        raise InputError(f"{LIMIT_PLACE}: got {value!r}; allowed: GiB, 0 or more; 2 where it is not set") from error
    return size * 2**30


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


class Store:
    """The cached images of a benchmark's cells, and the threads that write them.

    Attributes:
        keep: keep measured cells. limit: largest size in bytes of a cell that is kept.
        owner: the benchmark's folder, recorded in unfinished cells.
        cells: the folders of the kept cells, by the names of their grids.
        broken: number of batches that did not match their hashes. why_not: why some could not be kept.
    """

    def __init__(self, keep: bool = True, out: str | Path | None = None) -> None:
        self.keep, self.limit = keep, limit()
        self.owner = str(Path(out).resolve()) if out is not None else None
        self.asked: set[str] = set()
        self.cells: dict[str, Path] = {}
        self.broken = 0
        self.why_not: str | None = None
        self.workers = min(4, os.cpu_count() or 1)
        self.pool = ThreadPoolExecutor(self.workers)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_) -> None:
        self.pool.shutdown()

    def cell(self, facts: Mapping[str, Any], n: int) -> Cell:
        """Returns the cell of n images that `facts` determine."""
        key, cache = _hash([FORMAT, dict(facts)])[:32], cache_folder()
        self.asked.add(key)
        measured = cache / "pictures" / key
        return Cell(self, measured if measured.is_dir() else cache / "drawing" / key, facts, n)

    def finish(self, name: str, cell: Cell, *, wrote: bool) -> None:
        """Keeps a measured cell if it is complete and not over the limit, and deletes it otherwise. One that was kept
        by an earlier run, of fewer images, is treated the same if images were added to it.

        Args:
            wrote: whether this run, in any of its processes, wrote to the cell.
        """
        place = cache_folder() / "pictures" / cell.folder.name
        if cell.folder.is_dir() and (wrote or cell.folder != place):
            try:
                sizes = _sizes(cell.folder)
                cut = cell.folder != place and len(sizes) < cell.n  # a kept one is whole for fewer images
                if not self.keep or cut or sum(sizes) > self.limit:
                    raise OSError("not to be kept")
                place.parent.mkdir(parents=True, exist_ok=True)
                cell.folder.rename(place)
            except OSError:  # or another benchmark has already moved it there
                _clear(cell.folder, own=True)
        if place.is_dir():
            self.cells[name] = place
            with holds.alone(place) as free:
                for left in (*place.glob(".*.new"), place / OWNER) if free else ():
                    left.unlink(missing_ok=True)

    def clear(self) -> None:
        """Deletes the cells that earlier runs of this benchmark left unfinished and this run did not need."""
        for mark in cache_folder().glob(f"drawing/*/{OWNER}") if self.owner else ():
            with contextlib.suppress(OSError):
                if mark.parent.name not in self.asked and mark.read_text() == self.owner:
                    _clear(mark.parent, own=False)

    def line(self) -> str | None:
        """Returns the final message; None if nothing is kept and nothing went wrong."""
        parts = []
        if self.cells:
            size = sum(sum(_sizes(folder)) for folder in self.cells.values()) / 1e6
            parts.append(f"{len(self.cells)} cells, {size:.1f} MB in {cache_folder() / 'pictures'}")
        if self.broken:
            parts.append(f"{self.broken} cached batches were damaged and generated again")
        if self.why_not:
            parts.append(f"some could not be cached ({self.why_not})")
        return f"images: {'; '.join(parts)}" if parts else None


def _clear(folder: Path, *, own: bool) -> None:
    """Deletes a folder that no live process holds; if that cannot be determined, only the process's own."""
    with holds.alone(folder) as free:
        if free or (own and free is None):
            shutil.rmtree(folder, ignore_errors=True)


def _sizes(folder: Path) -> list[int]:
    """Returns the size in bytes of each image in a folder."""
    return [file.stat().st_size for file in folder.glob("[0-9]*.png")]


class Cell:
    """The images of one model at one step count: reads those in the cache and writes new ones."""

    def __init__(self, store: Store, folder: Path, facts: Mapping[str, Any], n: int) -> None:
        self.store, self.folder, self.facts, self.n = store, folder, facts, n
        self.writing: list[Future] = []
        self.held: int | None = None
        self.begun, self.beginning = False, threading.Lock()  # begun: whether this process wrote to it

    def __enter__(self) -> Cell:
        with contextlib.suppress(OSError):
            if self.folder.is_dir():
                self.held = holds.hold(self.folder)
        return self

    def __exit__(self, *_) -> None:
        try:
            self.flush()
        finally:
            holds.release(self.held)
            self.held = None

    def flush(self) -> None:
        """Waits until all batches are on disk, before other processes are notified that this share is done."""
        while self.writing:
            self.writing.pop(0).result()

    def read(self, first: int, count: int) -> Drawn | None:
        """Returns images `first` to `first + count - 1`; None unless they are cached, intact, and from one batch."""
        file = self._manifest(first)
        if not file.is_file():
            return None
        try:
            manifest = json.loads(file.read_text())
            if manifest.pop("sha256") != _hash(manifest):
                raise ValueError("its hash does not fit")
            if manifest["count"] != count:  # the last batch of another n
                return None
            numbers = range(first, first + count)
            pictures = torch.stack(list(self.store.pool.map(self._picture, numbers, manifest["pictures"])))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self.store.broken += 1
            return None
        return Drawn(pictures, manifest["evaluations"])

    def keep(self, first: int, drawn: Drawn) -> None:
        """Writes a batch in the background, while the next one is generated."""
        self.writing.append(self.store.pool.submit(self._write, first, drawn))
        if len(self.writing) > 2 * self.store.workers:
            self.writing.pop(0).result()

    def _manifest(self, first: int) -> Path:
        return self.folder / f"batch-{first:06d}.json"

    def _picture(self, number: int, sha256: str) -> Tensor:
        from torchvision.io import decode_png

        data = (self.folder / f"{number:06d}.png").read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ValueError("its hash does not fit")
        return decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    def _write(self, first: int, drawn: Drawn) -> None:
        from torchvision.io import encode_png

        try:
            self._begin(drawn.pictures[0].nbytes)
            hashes = []
            for number, picture in enumerate(drawn.pictures, first):
                data = encode_png(picture, COMPRESSION).numpy()
                hashes.append(hashlib.sha256(data).hexdigest())
                (self.folder / f"{number:06d}.png").write_bytes(data)  # half-written: no manifest, or not its hash
            manifest = {"count": len(hashes), "evaluations": drawn.evaluations, "pictures": hashes}
            _write_atomically(self._manifest(first), json.dumps(manifest | {"sha256": _hash(manifest)}).encode())
        except OSError as error:  # the benchmark does not depend on it, and the next batch tries again
            self.store.why_not = str(error)

    def _begin(self, size: int) -> None:
        """Holds the folder and records its contents and owner; only on the first call.

        Args:
            size: bytes of an image.

        Raises:
            OSError: the folder cannot be written, or the disk lacks space for the images that are not in it yet.
        """
        with self.beginning:
            if self.begun:
                return
            if self.held is None:
                self.held = holds.hold(self.folder)
            missing = size * (self.n - len(_sizes(self.folder)))
            if missing > shutil.disk_usage(self.folder).free // 2:
                raise OSError(f"{self.folder} has not twice the room of {missing >> 20} MiB")
            if not (self.folder / "cell.json").is_file():
                _write_atomically(self.folder / "cell.json", json.dumps(self.facts, indent=1, default=str).encode())
            if self.store.owner is not None and self.folder.parent.name == "drawing":
                _write_atomically(self.folder / OWNER, self.store.owner.encode())
            self.begun = True


def _write_atomically(file: Path, data: Any) -> None:
    """Writes a file completely or not at all; hashes reveal one that a power cut left empty."""
    beside = file.with_name(f".{file.name}.{os.getpid()}-{threading.get_ident()}.new")
    try:
        beside.write_bytes(data)
        beside.replace(file)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
