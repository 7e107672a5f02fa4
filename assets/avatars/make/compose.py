"""Composes the embedded set: two pixel-art people on a patterned background, a caption, exact attributes.

    python assets/avatars/make/compose.py            # rewrites assets/avatars/{train,test}-*.webp and *.jsonl.gz

A caption names two to five of an image's fifteen attributes; the rest is left open, and this ambiguity is what blurs
a teacher's few-step samples. An attribute is named only if it is visible.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
SIZE = 32
TILE = 16
SHEET_COLUMNS = 100
SHEET_IMAGES = 10_000
SPLITS = {"train": (20_000, 1), "test": (2_500, 2)}  # images, seed

HAIR_COLORS = {
    "cab188": "blond", "603a14": "brown", "83623b": "brown", "28150a": "black",
    "009bbd": "blue", "bd1700": "red", "91cb15": "green",
}  # fmt: skip
CLOTHES_COLORS = {
    "5bc0de": "blue", "428bca": "blue", "03396c": "blue", "88d8b0": "green", "44c585": "green", "00b159": "green",
    "ff6f69": "red", "d11141": "red", "ae0001": "red", "ffeead": "yellow", "ffd969": "yellow", "ffc425": "yellow",
}  # fmt: skip
BACKGROUND_COLORS = {
    "white": (236, 236, 232), "gray": (138, 140, 146), "purple": (136, 92, 178),
    "orange": (238, 142, 62), "teal": (46, 138, 134), "pink": (240, 164, 190),
}  # fmt: skip
PATTERNS = ("plain", "vertical stripes", "horizontal stripes", "checks", "dots")
EVERY = 3  # of each part's variants one in this many is used, so that a small network can generate them sharply
GRID = 2  # people and patterns are placed on multiples of it, the grid of an autoencoder that halves the image
VISIBLE = 6  # an attribute of hair or clothes can be named if at least this many of its pixels are visible


class Parts:
    """The atlas, as float RGBA tiles by (part, variant, colour)."""

    def __init__(self) -> None:
        atlas = np.asarray(Image.open(HERE / "parts.png").convert("RGBA"), np.float32) / 255
        self.tiles: dict[tuple[str, str, str], np.ndarray] = {}
        for i, (part, variant, color) in enumerate(json.loads((HERE / "parts.json").read_text())):
            row, column = divmod(i, atlas.shape[1] // TILE)
            self.tiles[part, variant, color] = atlas[row * TILE :, column * TILE :][:TILE, :TILE]
        # Straps and stubble show too little colour to name.
        least = {"clothing": 18, "hair": 14}
        self.choices: dict[str, list[tuple[str, str]]] = {}
        for (part, variant, color), tile in self.tiles.items():
            number = int(variant[-2:]) if variant[-1].isdigit() else 1
            if number % EVERY == 1 and (tile[..., 3] > 0.5).sum() >= least.get(part, 1):
                self.choices.setdefault(part, []).append((variant, color))

    def pick(self, rng: np.random.Generator, part: str, where=lambda variant, color: True) -> tuple[str, str]:
        options = [vc for vc in self.choices[part] if where(*vc)]
        return options[rng.integers(len(options))]


def over(canvas: np.ndarray, tile: np.ndarray) -> None:
    """Composites an RGBA tile over an RGBA canvas, in place (Porter and Duff 1984)."""
    a = tile[..., 3:]
    below = canvas[..., 3:] * (1 - a)
    alpha = a + below
    canvas[..., :3] = np.where(alpha > 0, (tile[..., :3] * a + canvas[..., :3] * below) / np.maximum(alpha, 1e-6), 0)
    canvas[..., 3:] = alpha


def person(rng: np.random.Generator, parts: Parts) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
    """One person on a 16x16 tile: RGBA, a map of visible parts (1 hair, 2 clothes), attributes."""
    hair_color = str(rng.choice(sorted(set(HAIR_COLORS.values()))))
    clothes = str(rng.choice(sorted(set(CLOTHES_COLORS.values()))))
    length = str(rng.choice(["long", "short"]))
    wears = {"hat": rng.random() < 0.3, "glasses": rng.random() < 0.4, "beard": rng.random() < 0.3}
    hair = parts.pick(rng, "hair", lambda v, c: v.startswith(length) and HAIR_COLORS[c] == hair_color)
    layers = [
        ("skin", parts.pick(rng, "skin")),
        ("clothing", parts.pick(rng, "clothing", lambda v, c: CLOTHES_COLORS[c] == clothes)),
        ("eyes", parts.pick(rng, "eyes")),
    ]
    if wears["glasses"]:
        layers.append(("glasses", parts.pick(rng, "glasses")))
    if wears["beard"]:
        layers.append(("beard", parts.pick(rng, "beard", lambda v, c: c == hair[1])))
    layers += [("mouth", parts.pick(rng, "mouth")), ("hair", hair)]
    if wears["hat"]:
        layers.append(("hat", parts.pick(rng, "hat")))
    canvas, shows = np.zeros((TILE, TILE, 4), np.float32), np.zeros((TILE, TILE), np.uint8)
    for part, (variant, color) in layers:
        tile = parts.tiles[part, variant, color]
        over(canvas, tile)
        shows[tile[..., 3] > 0.5] = {"hair": 1, "clothing": 2}.get(part, 0)
    attributes = {"hair": length, "hair color": hair_color, "clothes": clothes}
    attributes |= {name: "yes" if worn else "no" for name, worn in wears.items()}
    return canvas, shows, attributes


def background(rng: np.random.Generator) -> tuple[np.ndarray, dict[str, str]]:
    """A patterned background, (32, 32, 3) in [0, 1], with its pattern and colour."""
    color = str(rng.choice(list(BACKGROUND_COLORS)))
    pattern = str(rng.choice(PATTERNS))
    base = np.asarray(BACKGROUND_COLORS[color], np.float32) / 255
    shade = 0.72 * base if color == "white" or rng.random() < 0.5 else 0.5 + 0.5 * base
    width, phase_x, phase_y = GRID * rng.integers((1, 0, 0), (3, 4, 4))
    y, x = np.mgrid[:SIZE, :SIZE]
    columns, rows = (x + phase_x) // width % 2, (y + phase_y) // width % 2
    second = {
        "plain": np.zeros_like(x),
        "vertical stripes": columns,
        "horizontal stripes": rows,
        "checks": columns ^ rows,
        "dots": ((x + phase_x) % (2 * width) < 2) & ((y + phase_y) % (2 * width) < 2),
    }[pattern]
    picture = np.where(second[..., None] == 1, shade, base).clip(0, 1).astype(np.float32)
    return picture, {"pattern": pattern, "background": color}


def scene(rng: np.random.Generator, parts: Parts) -> tuple[np.ndarray, dict[str, str], list[str]]:
    """An image (32, 32, 3) uint8, its attributes, and the names of the visible ones."""
    picture, attributes = background(rng)
    top_left, top_right = GRID * rng.integers(2, 8, 2)
    top_right = top_left if rng.random() < 0.1 else top_right
    attributes["taller"] = "same" if top_left == top_right else "left" if top_left < top_right else "right"
    places = [("left", GRID * rng.integers(0, 3), top_left), ("right", GRID * rng.integers(6, 9), top_right)]
    if rng.random() < 0.5:
        places.reverse()  # the last one stands in front
    shows = np.zeros((SIZE, SIZE), np.uint8)
    for code, (side, left, top) in enumerate(places):
        figure, figure_shows, worn = person(rng, parts)
        down = np.minimum(np.arange(SIZE - top), TILE - 1)  # the last row repeats to the bottom of the image
        first, last = max(left, 0), min(left + TILE, SIZE)
        figure, figure_shows = (
            figure[down][:, first - left : last - left],
            figure_shows[down][:, first - left : last - left],
        )
        a = figure[..., 3:]
        region = picture[top:, first:last]
        region[:] = figure[..., :3] * a + region * (1 - a)
        shows[top:, first:last][a[..., 0] > 0.5] = 0
        marked = figure_shows > 0
        shows[top:, first:last][marked] = figure_shows[marked] + 10 * (code + 1)
        attributes |= {f"{side} {name}": value for name, value in worn.items()}
    hidden = set()
    for code, (side, _, _) in enumerate(places):
        if (shows == 10 * (code + 1) + 1).sum() < VISIBLE:
            hidden |= {f"{side} hair", f"{side} hair color"}
        if (shows == 10 * (code + 1) + 2).sum() < VISIBLE:
            hidden.add(f"{side} clothes")
    return (picture * 255).round().astype(np.uint8), attributes, [name for name in attributes if name not in hidden]


def caption(rng: np.random.Generator, attributes: dict[str, str], visible: list[str]) -> tuple[str, list[str]]:
    """A sentence that names two to five visible attributes, and their names."""
    # Absent attributes are named less often.
    weight = np.array(
        [0.3 if attributes[n] == "no" or (n == "taller" and attributes[n] == "same") else 1.0 for n in visible]
    )
    count = int(rng.integers(2, 6))
    mentioned = [visible[i] for i in rng.choice(len(visible), count, replace=False, p=weight / weight.sum())]
    say = {name: attributes[name] for name in mentioned}

    def person_phrase(side: str) -> str:
        own = {name.removeprefix(f"{side} "): value for name, value in say.items() if name.startswith(f"{side} ")}
        phrases = []
        hair = " ".join(own[k] for k in ("hair", "hair color") if k in own)
        if hair:
            phrases.append(f"{rng.choice(['with', 'who has'])} {hair} hair")
        if "clothes" in own:
            shirt = f"{own['clothes']} {rng.choice(['shirt', 'top', 'clothes'])}"
            shirt = shirt if shirt.endswith("clothes") else f"a {shirt}"
            phrases.append(f"{rng.choice(['in', 'wearing'])} {shirt}")
        for thing, article in (("hat", "a hat"), ("glasses", "glasses"), ("beard", "a beard")):
            if thing in own:
                phrases.append(f"with {article}" if own[thing] == "yes" else f"without {article}")
        rng.shuffle(phrases)
        who = rng.choice(
            [f"the person on the {side}", f"the {side} person", f"the one on the {side}", f"on the {side} someone"]
        )
        return f"{who} {' and '.join(phrases)}" if phrases else ""

    sentences = [p for p in (person_phrase("left"), person_phrase("right")) if p]
    if "taller" in say:
        side = say["taller"]
        sentences.append(
            str(rng.choice(["both equally tall", "two people of the same height"]))
            if side == "same"
            else str(rng.choice([f"the {side} person is taller", f"the taller one stands on the {side}"]))
        )
    if "pattern" in say or "background" in say:
        color, pattern = say.get("background", ""), say.get("pattern", "")
        if pattern and pattern != "plain":
            sentences.append(f"{rng.choice(['in front of', 'against'])} {f'{color} {pattern}'.strip()}")
        else:
            words = " ".join(w for w in (pattern, color) if w)
            article = "an" if words.startswith("orange") else "a"
            sentences.append(f"{rng.choice(['on', 'against'])} {article} {words} background")
    rng.shuffle(sentences)
    opening = rng.choice(["", "two people, ", "a picture of two people, ", "pixel art, "])
    return f"{opening}{', '.join(sentences)}", sorted(mentioned)


def write_split(out: Path, split: str, count: int, seed: int, parts: Parts) -> None:
    """Writes the split's lossless WebP sheets and its lines of text and attributes, gzipped without a time stamp."""
    rng = np.random.Generator(np.random.PCG64(seed))
    images, lines = [], []
    for _ in range(count):
        image, attributes, visible = scene(rng, parts)
        text, mentioned = caption(rng, attributes, visible)
        images.append(image)
        lines.append(json.dumps({"text": text, "attributes": attributes, "mentioned": mentioned}))
    for sheet, start in enumerate(range(0, count, SHEET_IMAGES)):
        chunk = np.stack(images[start : start + SHEET_IMAGES])
        rows = len(chunk) // SHEET_COLUMNS
        picture = chunk.reshape(rows, SHEET_COLUMNS, SIZE, SIZE, 3).transpose(0, 2, 1, 3, 4).reshape(rows * SIZE, -1, 3)
        Image.fromarray(picture).save(out / f"{split}-{sheet}.webp", lossless=True, method=6)
    with open(out / f"{split}.jsonl.gz", "wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0) as file:
        file.write(("\n".join(lines) + "\n").encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE.parent, help="folder to write (default: assets/avatars)")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    parts = Parts()
    for split, (count, seed) in SPLITS.items():
        write_split(out, split, count, seed, parts)


if __name__ == "__main__":
    main()
