"""Makes a task for `stepdistill baselines run tinybert` from a WikiText file: which article is a paragraph from?

    python benchmarks/articles.py wiki.valid.tokens out/articles

Writes train.tsv and test.tsv, one title, tab and paragraph per line; every fifth paragraph of an article is for test.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

EVERY = 5


def paragraphs(lines: Iterable[str]) -> Iterator[tuple[str, int, str]]:
    """Yields each paragraph's article title, its number within the article, and its text."""
    title, number = "", 0
    for line in map(str.strip, lines):
        if line.startswith("= "):
            if not line.startswith("= ="):
                title, number = line.strip("= "), 0
        elif line and title:
            yield title, number, line
            number += 1


def main(text: Path, out: Path) -> None:
    """Writes both files."""
    out.mkdir(parents=True, exist_ok=True)
    rows = list(paragraphs(text.read_text(encoding="utf-8").splitlines()))
    for name, test in (("train", False), ("test", True)):
        kept = [f"{title}\t{line}\n" for title, n, line in rows if (n % EVERY == EVERY - 1) == test]
        (out / f"{name}.tsv").write_text("".join(kept), encoding="utf-8")
        print(f"{len(kept):,} paragraphs: {out / name}.tsv")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
