"""Writes replace what was there completely or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from stepdistill.errors import InputError
from stepdistill.files import check_place, replacing, set_aside


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


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_folder_set_aside_is_back_after_an_error_and_gone_without_one(error, tmp_path):
    put(tmp_path / "f", "one")
    with pytest.raises(error), set_aside(tmp_path / "f"):
        assert not (tmp_path / "f").exists()
        put(tmp_path / "f", "half")
        raise error
    assert (tmp_path / "f" / "a").read_text() == "one" and [*tmp_path.iterdir()] == [tmp_path / "f"]
    with set_aside(tmp_path / "f"):
        put(tmp_path / "f", "two")
    assert (tmp_path / "f" / "a").read_text() == "two" and [*tmp_path.iterdir()] == [tmp_path / "f"]


def test_a_folder_that_a_killed_process_had_set_aside_is_back_after_the_next_error(tmp_path):
    put(tmp_path / ".f.aside", "one")
    put(tmp_path / "f", "half")
    with pytest.raises(ValueError), set_aside(tmp_path / "f"):
        raise ValueError
    assert (tmp_path / "f" / "a").read_text() == "one" and [*tmp_path.iterdir()] == [tmp_path / "f"]


def test_a_place_that_cannot_be_written_is_known_before_anything_is_there(tmp_path, monkeypatch):
    check_place(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for place, what in (
        ("file", "which is a file; allowed"),
        ("file/x/y", f"which is below {tmp_path / 'file'}, a file"),
    ):
        with pytest.raises(InputError, match=what):
            check_place(tmp_path / place)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(InputError, match=f"a folder that can be written; {tmp_path} may not be"):
        check_place(tmp_path / "a" / "b")
