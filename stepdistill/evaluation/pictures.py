"""Drawn pictures are kept, by what they depend on: a benchmark that was cut goes on, and other metrics read them.

    <cache>/pictures/<key>/000000.png ...      one a picture, for clean-fid and other tools too
                           batch-000000.json   the hashes of a batch, and the network evaluations it took
                           cell.json           what the key is made of

The key is a hash of the model, the way it is sampled, the prompts, the seed, the batch, the device and the libraries:
of all that can change a bit. A batch is there once its manifest is, which is written last; one whose hashes do not fit
is drawn again. A cell is drawn in <cache>/drawing, and moves when it is measured. What a killed benchmark left there is
taken up by the next one that asks for it, and cleared by the next one into the same --out that does not.
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

from stepdistill.errors import InputError
from stepdistill.evaluation import holds
from stepdistill.evaluation.generate import Drawn
from stepdistill.evaluation.metrics import cache_folder

FORMAT = "pictures-1"  # to be raised when pictures are drawn from other noise, numbered or kept in another way
LIMIT, LIMIT_PLACE = 2.0, "STEPDISTILL_PICTURES_GIB"  # GiB; a cell that has more is kept only until it is measured
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "stepdistill")
OWNER = ".owner"  # in an unfinished cell: the folder of the benchmark that drew in it last
COMPRESSION = 1  # of PNG: the fastest, some 5 % larger than the usual


def setup_of(pipeline, *, order: bool = True) -> str:
    """16 hex digits of what a pipeline draws by beside its weights: every part's configuration.

    Args:
        order: whether its weights lie in memory in another order, as channels_last, which rounds otherwise, counts too.
    """
    told: dict[str, Any] = {}
    for name, part in {"": pipeline, **pipeline.components}.items():
        config = getattr(part, "config", None)
        if config is None:
            told[name] = [type(part).__name__, getattr(part, "model_max_length", None)]
            continue
        settings = config if isinstance(config, Mapping) else config.to_dict()
        told[name] = {k: v for k, v in settings.items() if not k.startswith("_") and k != "transformers_version"}
        if order and isinstance(part, torch.nn.Module):
            told[f"{name} in order"] = all(weight.is_contiguous() for weight in part.parameters())
    return _hash(told)[:16]


def limit() -> float:
    """Bytes of a cell that is kept: as many GiB as STEPDISTILL_PICTURES_GIB says, else 2.

    Raises:
        InputError: it says no number, or one below 0.
    """
    told = os.environ.get(LIMIT_PLACE) or LIMIT
    try:
        if not (size := float(told)) >= 0:
            raise ValueError
    except ValueError as error:
        raise InputError(f"{LIMIT_PLACE}: got {told!r}; allowed: GiB, 0 or more; 2 where it is not set") from error
    return size * 2**30


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


class Store:
    """The kept pictures of a benchmark's cells, and the threads that write them.

    Attributes:
        keep: keep what is measured. limit: bytes of a cell that is kept at most.
        owner: the benchmark's folder, which unfinished cells are marked with.
        cells: the folders of the cells that stay, by the names of their grids.
        broken: batches whose hashes did not fit. why_not: why some were not kept, where they should have been.
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
        """The cell of n pictures that depends on `facts`."""
        key, cache = _hash([FORMAT, dict(facts)])[:32], cache_folder()
        self.asked.add(key)
        measured = cache / "pictures" / key
        return Cell(self, measured if measured.is_dir() else cache / "drawing" / key, facts, n)

    def finish(self, name: str, cell: Cell) -> None:
        """A cell is measured: it stays where all of it is there and is to be kept, or goes."""
        place = cache_folder() / "pictures" / cell.folder.name
        if cell.folder != place and cell.folder.is_dir():
            try:
                sizes = _sizes(cell.folder)
                if not self.keep or len(sizes) < cell.n or sum(sizes) > self.limit:
                    raise OSError("not to be kept")
                place.parent.mkdir(parents=True, exist_ok=True)
                cell.folder.rename(place)
            except OSError:  # or another benchmark was first
                _clear(cell.folder, own=True)
        if place.is_dir():
            self.cells[name] = place
            with holds.alone(place) as free:
                for left in (*place.glob(".*.new"), place / OWNER) if free else ():
                    left.unlink(missing_ok=True)

    def clear(self) -> None:
        """Clears what earlier runs of this benchmark left unfinished and this one had no use for."""
        for mark in cache_folder().glob(f"drawing/*/{OWNER}") if self.owner else ():
            with contextlib.suppress(OSError):
                if mark.parent.name not in self.asked and mark.read_text() == self.owner:
                    _clear(mark.parent, own=False)

    def line(self) -> str | None:
        """What there is to say in the end; None where nothing is kept and nothing was wrong."""
        said = []
        if self.cells:
            size = sum(sum(_sizes(folder)) for folder in self.cells.values()) / 1e6
            said.append(f"{len(self.cells)} cells, {size:.1f} MB in {cache_folder() / 'pictures'}")
        if self.broken:
            said.append(f"{self.broken} kept batches were broken and were drawn again")
        if self.why_not:
            said.append(f"some could not be kept ({self.why_not})")
        return f"pictures: {'; '.join(said)}" if said else None


def _clear(folder: Path, *, own: bool) -> None:
    """Removes a folder that no live process holds; one's own also where that cannot be known."""
    with holds.alone(folder) as free:
        if free or (own and free is None):
            shutil.rmtree(folder, ignore_errors=True)


def _sizes(folder: Path) -> list[int]:
    """Bytes of each picture in a folder."""
    return [file.stat().st_size for file in folder.glob("[0-9]*.png")]


class Cell:
    """The pictures of one model at one number of steps: those that are there, and those that come."""

    def __init__(self, store: Store, folder: Path, facts: Mapping[str, Any], n: int) -> None:
        self.store, self.folder, self.facts, self.n = store, folder, facts, n
        self.writing: list[Future] = []
        self.held: int | None = None
        self.begun, self.beginning = False, threading.Lock()

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
        """Waits until all that was kept is on the disk: before others are told that this share is done."""
        while self.writing:
            self.writing.pop(0).result()

    def read(self, first: int, count: int) -> Drawn | None:
        """Pictures number `first` to `first + count - 1`, where they are there, drawn in one batch, and whole."""
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
        """Has a batch written, while the next is drawn."""
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
            self._begin(drawn.pictures[0].nbytes * self.n)
            hashes = []
            for number, picture in enumerate(drawn.pictures, first):
                data = encode_png(picture, COMPRESSION).numpy()
                hashes.append(hashlib.sha256(data).hexdigest())
                _place(self.folder / f"{number:06d}.png", data)
            manifest = {"count": len(hashes), "evaluations": drawn.evaluations, "pictures": hashes}
            _place(self._manifest(first), json.dumps(manifest | {"sha256": _hash(manifest)}).encode())
        except OSError as error:  # a benchmark can do without, and the next batch is tried again
            self.store.why_not = str(error)

    def _begin(self, size: int) -> None:
        """Holds the folder and says what is drawn in it, and for whom; once.

        Args:
            size: bytes of all its pictures.

        Raises:
            OSError: it cannot be written, or there is no room for it.
        """
        with self.beginning:
            if self.begun:
                return
            if self.held is None:
                self.held = holds.hold(self.folder)
            if not (self.folder / "cell.json").is_file():
                if size > shutil.disk_usage(self.folder).free // 2:
                    raise OSError(f"{self.folder} has not twice the room of {size >> 20} MiB")
                _place(self.folder / "cell.json", json.dumps(self.facts, indent=1, default=str).encode())
            if self.store.owner is not None and self.folder.parent.name == "drawing":
                _place(self.folder / OWNER, self.store.owner.encode())
            self.begun = True


def _place(file: Path, data: Any) -> None:
    """Writes a file whole or not at all; hashes tell of one that a power cut left empty."""
    beside = file.with_name(f".{file.name}.{os.getpid()}-{threading.get_ident()}.new")
    try:
        beside.write_bytes(data)
        beside.replace(file)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
