"""Odd or broken images, captions, models and caches: read correctly, or reported in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from test_cli_bench import pools, refused, run  # noqa: F401, pools is a fixture

from stepdistill.data.sources import open_picture
from stepdistill.errors import InputError
from stepdistill.evaluation import sets
from stepdistill.evaluation.records import read_rows

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOURS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def grey(levels: np.ndarray) -> np.ndarray:
    return np.repeat(levels[..., None], 3, -1)


def picture(array: np.ndarray, mode: str | None = None) -> Image.Image:
    return Image.fromarray(array) if mode is None else Image.fromarray(array).convert(mode)


OPAQUE, CLEAR = np.full((16, 16, 1), 255, np.uint8), np.zeros((16, 16, 1), np.uint8)
TWO = {"save_all": True, "append_images": [picture(255 - COLOURS)]}
MODES = {
    "grey.png": (picture(GREY), {}, grey(GREY)),
    "grey16.png": (picture(GREY.astype(np.uint16) * 257), {}, grey(GREY)),
    "grey16-half.png": (picture(GREY.astype(np.uint16) * 256 + GREY // 2 + 64), {}, grey(GREY)),
    "grey-alpha.png": (picture(GREY, "LA"), {}, grey(GREY)),
    "one-bit.png": (picture(GREY > 99), {}, grey(np.where(GREY > 99, 255, 0).astype(np.uint8))),
    "palette.png": (picture(GREY).convert("P"), {}, grey(GREY)),
    "opaque.png": (picture(np.concatenate([COLOURS, OPAQUE], -1)), {}, COLOURS),
    "clear.png": (picture(np.concatenate([COLOURS, CLEAR], -1)), {}, COLOURS),
    "animated.png": (picture(COLOURS), TWO, COLOURS),
    "animated.webp": (picture(COLOURS), TWO | {"lossless": True}, COLOURS),
    "print.jpg": (Image.new("CMYK", (16, 16), (0, 255, 255, 0)), {}, np.full((16, 16, 3), (255, 0, 0), np.uint8)),
}


@pytest.mark.parametrize("name", MODES)
def test_a_picture_of_any_mode_is_seen_in_its_colours(name, tmp_path):
    """Pillow alone turns 16-bit grey into white wherever it is above 255 of 65,535."""
    made, options, wanted = MODES[name]
    made.save(tmp_path / name, **options)
    seen = np.asarray(open_picture(tmp_path / name, name))
    assert seen.dtype == np.uint8 and np.abs(seen.astype(int) - wanted).max() <= (2 if name == "print.jpg" else 0)
    as_set = sets.open_set(str(tmp_path)).pictures(0, 1)[0].permute(1, 2, 0).numpy()
    assert np.array_equal(as_set, seen)


def test_a_mark_of_byte_order_is_no_part_of_a_prompt_or_caption(tmp_path):
    (tmp_path / "p.txt").write_text("a cat\na dog\n", encoding="utf-8-sig")
    assert sets.open_set(str(tmp_path / "p.txt")).prompts == ["a cat", "a dog"]
    for name, text in (("beside/0.txt", "a cat"), ("listed/metadata.jsonl", '{"file_name": "0.png", "text": "a cat"}')):
        file = tmp_path / name
        file.parent.mkdir()
        picture(COLOURS).save(file.parent / "0.png")
        file.write_text(text, encoding="utf-8-sig")
        assert sets.open_set(str(file.parent)).prompts == ["a cat"]


def test_floating_point_pixels_have_no_known_range(tmp_path):
    picture(GREY.astype(np.float32) / 255).save(tmp_path / "f.tiff")
    with pytest.raises(InputError, match=r"f.tiff, which is broken \(pixels of floating point\)"):
        open_picture(tmp_path / "f.tiff", "f.tiff")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Six captioned images, a .txt beside each."""
    path = tmp_path / "pictures"
    path.mkdir()
    rng = np.random.default_rng(1)
    for i in range(6):
        picture(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path / f"{i}.png")
        (path / f"{i}.txt").write_text(tiny.PROMPTS[i % 2])
    return path


@pytest.mark.usefixtures("pools")
def test_what_cannot_be_read_or_drawn_for_is_told_in_one_line(folder, tmp_path, pipelines, capsys):
    command = ["bench", "--model", pipelines["sd"], "--steps", 1, "--out", tmp_path / "out", "--batch", 2, "--data"]
    whole = (folder / "3.png").read_bytes()
    for name, content, words in (
        ("3.png", b"", "3.png, which is broken (cannot identify image file"),
        ("3.png", b"GIF89a no picture", "3.png, which is broken ("),
        ("3.png", whole[: len(whole) // 2], "3.png, which is broken (image file is truncated)"),
        ("3.txt", b" \n\t", "3.png with an empty caption, and 0 more; allowed: words for each picture"),
        ("3.txt", b"\xff\xfe", "3.txt, whose byte 0 is 0xff; allowed: UTF-8"),
        ("3.txt", None, "captions: got none for"),
        ("metadata.jsonl", b'{"file_name": "3.png", "text": ""}\n', "3.png with an empty caption"),
        ("metadata.jsonl", b'{"file_name": "3.png"}\n', "add the caption"),
        ("metadata.jsonl", b'{"file_name": "3.png", "text": 5}\n', "add the caption"),
        ("metadata.jsonl", b'{"file_name": "gone.png", "text": "a"}\n', "gone.png, which is not there"),
        ("metadata.jsonl", b'{"file_name": "3.png", "text": "a"}\n', "which holds 1 picture; allowed: 2 or more"),
        ("metadata.jsonl", b"no json\n", "add the caption"),
        ("metadata.jsonl", b"", "got no pictures"),
    ):
        changed = tmp_path / "changed"
        shutil.copytree(folder, changed)
        (changed / name).unlink(missing_ok=True)
        if content is not None:
            (changed / name).write_bytes(content)
        line = refused(capsys, *command, changed)
        assert words in line and "allowed: " in line, line
        shutil.rmtree(changed)
    assert not (tmp_path / "out").exists()


def damaged(whole: bytes, how: str) -> bytes:
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    return {"empty": b"", "cut": whole[: len(whole) // 2], "a bit": bytes(flipped), "another": b"[1]"}[how]


@pytest.mark.usefixtures("pools")
def test_a_model_that_draws_nan_fails_alone_and_a_damaged_cache_changes_no_figure(
    folder, tmp_path, pipelines, capsys, monkeypatch
):
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))
    bad = tiny.sd()
    torch.nn.init.constant_(bad.unet.conv_out.bias, torch.nan)
    bad.save_pretrained(tmp_path / "bad")
    capsys.readouterr()
    command = ["bench", "--data", folder, "--steps", 1, "--latency-repeats", 0, "--batch", 4, "--model"]
    good = [*command, f"good={pipelines['sd']}", "--out"]
    both = [*command, tmp_path / "bad", "--model", f"good={pipelines['sd']}", "--out", tmp_path / "first"]
    code, _, lines = run(capsys, *both)
    assert code == 2 and len(lines) == 1 and lines[0].startswith("failed: bad at 1 step: pictures: got NaN"), lines
    figures = [row["metrics"] for row in read_rows(tmp_path / "first" / "results.jsonl")]
    assert len(figures) == 2

    kept = sorted(file for file in (tmp_path / "cache").rglob("*") if file.is_file())
    arrays = [file for file in kept if file.suffix == ".safetensors"]
    whole = {file: file.read_bytes() for file in kept}
    kinds = {file.name.partition("-")[0] for file in kept}
    assert {"statistics", "features", "pixels", "nearness", "batch", "000005.png", "cell.json"} <= kinds
    for how in ("empty", "cut", "a bit", "another"):
        for file in kept:
            file.write_bytes(damaged(whole[file], how))
        code, said, lines = run(capsys, *good, tmp_path / how)
        assert code == 0 and [row["metrics"] for row in read_rows(tmp_path / how / "results.jsonl")] == figures
        assert "2 cached batches were damaged and generated again" in said
        lines = [line.strip() for line in lines if line.strip()]  # clearing a progress bar leaves blanks
        assert all(line.endswith("computing it again") for line in lines), lines
        assert all(any(str(file) in line for line in lines) for file in arrays)


@pytest.mark.usefixtures("pools")
def test_a_damaged_book_or_unit_file_is_told_in_one_line(folder, tmp_path, pipelines, capsys):
    out = tmp_path / "out"
    command = ["bench", "--data", folder, "--latency-repeats", 0, "--model", f"m={pipelines['sd']}", "--out", out]
    assert run(capsys, *command, "--steps", 1, 2)[0] == 0
    unit = next((out / "units").glob("m_1_*"))
    whole = unit.read_bytes()
    unit.write_bytes(whole[:50])
    line = refused(capsys, "bench", "compare", out, "--steps-a", 1, "--steps-b", 2)
    assert str(unit) in line and "damaged" in line
    unit.write_bytes(whole)
    rows = (out / "results.jsonl").read_text()
    for damage, words in (
        ("{broken", "no benchmark row"),
        (json.dumps(json.loads(rows.splitlines()[0]) | {"steps": "one"}), "got steps: one; allowed: a whole number"),
    ):
        (out / "results.jsonl").write_text(rows + damage + "\n")
        line = refused(capsys, "report", out)
        assert words in line and f"line {len(rows.splitlines()) + 1}" in line
