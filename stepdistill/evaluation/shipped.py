"""The protocols, gates and ready models that ship: inside the package in a wheel, under benchmarks/ in a checkout."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def places(name: str) -> list[Path]:
    """Returns the paths of `protocols`, `gates` or `models.yaml`; pyproject.toml puts them into the wheel."""
    return [place for place in (PACKAGE / name, PACKAGE.parent / "benchmarks" / name) if place.exists()]


def names(kind: str) -> list[str]:
    """Returns the names of the files of a kind that ship, without .yaml."""
    return sorted({file.stem for folder in places(kind) for file in folder.glob("*.yaml")})


def find(kind: str, name: str | Path) -> Path:
    """Returns a file by the name it ships under, or by its path, which need not exist."""
    file = Path(name)
    if file.suffix in (".yaml", ".yml"):
        return file
    return next((f for folder in places(kind) if (f := folder / f"{name}.yaml").is_file()), file)
