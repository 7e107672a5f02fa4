"""Writes replace what was there completely or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from stepdistill.errors import InputError
from stepdistill.files import replacing


def put(final: Path, content: str) -> None:
    with replacing(final) as beside:
        (beside / "a").write_text(content)


def test_a_folder_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path):
    put(tmp_path / "f", "one")
    put(tmp_path / "f", "two")
    assert (tmp_path / "f" / "a").read_text() == "two" and [*tmp_path.iterdir()] == [tmp_path / "f"]
    with pytest.raises(KeyError), replacing(tmp_path / "f") as beside:
        (beside / "a").write_text("three")
        raise KeyError
    assert (tmp_path / "f" / "a").read_text() == "two" and [*tmp_path.iterdir()] == [tmp_path / "f"]


def test_the_folder_that_was_there_is_back_if_its_replacement_cannot_be_moved(tmp_path, monkeypatch):
    put(tmp_path / "f", "one")
    rename = Path.rename

    def full(self, target):
        if self.name == ".f.new":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(InputError, match=r"disk: got no space left .*; what was there is kept"):
        put(tmp_path / "f", "two")
    assert (tmp_path / "f" / "a").read_text() == "one" and [*tmp_path.iterdir()] == [tmp_path / "f"]


def test_what_a_process_killed_between_the_renames_left_is_put_back(tmp_path):
    put(tmp_path / "f", "one")
    (tmp_path / "f").rename(tmp_path / ".f.old")
    with pytest.raises(KeyError), replacing(tmp_path / "f"):
        raise KeyError
    assert (tmp_path / "f" / "a").read_text() == "one" and [*tmp_path.iterdir()] == [tmp_path / "f"]
