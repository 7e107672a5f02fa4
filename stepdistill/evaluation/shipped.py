"""The protocols, gates and ready models that ship: inside the package in a wheel, under benchmarks/ in a checkout."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def places(name: str) -> list[Path]:
    """Where `protocols`, `gates` or `models.yaml` lies; pyproject.toml puts it into the wheel."""
    return [place for place in (PACKAGE / name, PACKAGE.parent / "benchmarks" / name) if place.exists()]


def names(kind: str) -> list[str]:
    """The files of a kind that ship, without their .yaml."""
    return sorted({file.stem for folder in places(kind) for file in folder.glob("*.yaml")})


def found(kind: str, name: str | Path) -> Path:
    """A file by the name it ships under, or by its path, which need not exist."""
    file = Path(name)
    if file.suffix in (".yaml", ".yml"):
        return file
    return next((f for folder in places(kind) if (f := folder / f"{name}.yaml").is_file()), file)
