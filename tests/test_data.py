"""Data: what each source yields, what a cache holds, and the errors if either is bad."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from stepdistill.cli.sample import Config as SampleConfig
from stepdistill.cli.sample import prompts_of
from stepdistill.conditioning.base import expand
from stepdistill.data import avatars, build
from stepdistill.data.broken import BrokenList
from stepdistill.data.build import FORMAT, picture_size, teacher_key
from stepdistill.data.cache import LatentCache, make_cache, open_data
from stepdistill.data.sources import PictureError, open_picture, open_source, to_tensor
from stepdistill.denoiser.load import as_teacher, load_teacher
from stepdistill.draws import Draws
from stepdistill.errors import InputError
from stepdistill.evaluation.sets import open_set
from stepdistill.sampling import sample
from stepdistill.training.lcm import LCMConfig
from stepdistill.training.run import open_samples, open_teacher

SIDE = tiny.LATENT * tiny.FACTOR


def picture(seed: int = 0, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def png(seed: int = 0) -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, "png")
    return file.getvalue()


def shard(path, members: dict[str, bytes], mode: str = "w"):
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def one_line(error: pytest.ExceptionInfo) -> None:
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.fixture(scope="module")
def teacher():
    return as_teacher(tiny.sd(), "tiny")


# --- sources ---------------------------------------------------------------------------------------------------------


def test_a_folder_with_metadata_keeps_its_order(tmp_path):
    (tmp_path / "sub").mkdir()
    picture(1).save(tmp_path / "b.png")
    picture(2).save(tmp_path / "sub" / "a.webp", lossless=True)
    rows = [{"file_name": "sub/a.webp", "text": "two"}, {"file_name": "b.png", "text": " one "}]
    (tmp_path / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    source = open_source(str(tmp_path))
    assert source.captions == ["two", "one"]
    assert np.array_equal(np.array(source.picture(0)), np.array(picture(2)))
    assert np.array_equal(np.array(source.picture(1)), np.array(picture(1)))


def test_captions_may_lie_beside_the_pictures(tmp_path):
    for i, name in enumerate(["b.JPG", "a.png"]):
        picture(i).save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(f"caption {i}\n")
    assert open_source(str(tmp_path)).captions == ["caption 1", "caption 0"]  # by name


def test_shards_give_pictures_and_captions_and_read_nothing_else(tmp_path):
    ignored = {"x/0001.pkl": b"never unpickled", "notes.md": b"?", ".txt": b"hidden"}
    shard(tmp_path / "s-0.tar", {"x/0001.png": png(1), "x/0001.txt": b"one"} | ignored)
    shard(tmp_path / "s-1.tar", {"0002.json": json.dumps({"caption": "two"}).encode(), "0002.PNG": png(2)})
    for spec in (f"{tmp_path}/s-{{0..1}}.tar", f"{tmp_path}/s-*.tar"):
        source = open_source(spec)
        assert source.captions == ["one", "two"]
        assert np.array_equal(np.array(source.picture(1)), np.array(picture(2)))


def test_a_datasets_folder_is_read_by_its_columns(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"image": [picture(i) for i in range(3)], "caption": ["a", "b", "c"]})
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "split"))
    for name in ("one", "split"):
        source = open_source(str(tmp_path / name))
        assert source.captions == ["a", "b", "c"]
        assert np.array_equal(np.array(source.picture(2)), np.array(picture(2)))
    table.rename_column("caption", "words").save_to_disk(str(tmp_path / "bad"))
    with pytest.raises(InputError, match=r"got columns image, words in .*; allowed: image and one of text"):
        open_source(str(tmp_path / "bad"))


def test_a_text_file_is_prompts_without_pictures(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red hat\n\n the cat \n")
    source = open_source(str(tmp_path / "prompts.txt"))
    assert source.captions == ["a red hat", "the cat"]
    assert source.picture is None


def test_only_a_line_end_ends_a_line(tmp_path):
    """str.splitlines also splits at separators that stand within a caption."""
    odd = "a red\u2028hat\x85 of\x0c felt"
    (tmp_path / "prompts.txt").write_text(f"\ufeff{odd}\r\nthe cat", encoding="utf-8")
    assert open_source(str(tmp_path / "prompts.txt")).captions == [odd, "the cat"]
    assert open_set(str(tmp_path / "prompts.txt")).prompts == [odd, "the cat"]
    assert prompts_of(SampleConfig(prompts=tmp_path / "prompts.txt")) == [odd, "the cat"]
    picture(1).save(tmp_path / "a.png")
    row = json.dumps({"file_name": "a.png", "text": odd}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_text(row, encoding="utf-8")
    assert open_source(str(tmp_path)).captions == [odd]


def test_avatars_is_the_embedded_training_set():
    source, data = open_source("avatars"), avatars.load("train")
    assert len(source) == len(data)
    assert source.captions[5] == data.captions[5]
    assert np.array_equal(source.picture(5), data.images[5])


def test_the_key_follows_the_content(tmp_path):
    picture(0).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("one")
    first = open_source(str(tmp_path)).key
    assert open_source(str(tmp_path)).key == first
    (tmp_path / "a.txt").write_text("two")
    assert open_source(str(tmp_path)).key != first


def test_pictures_are_turned_upright_cropped_in_the_centre_and_scaled_to_minus_one_to_one(tmp_path):
    wide = Image.new("RGB", (40, 20), "black")
    wide.paste("white", (10, 0, 30, 20))  # white is the centre square
    assert to_tensor(wide, (20, 20)).min() == 1.0
    assert to_tensor(Image.new("RGB", (7, 9), (0, 255, 51)), (4, 4))[:, 0, 0].tolist() == pytest.approx([-1, 1, -0.6])
    assert to_tensor(picture(3), (SIDE, SIDE)).shape == (3, SIDE, SIDE)
    assert to_tensor(picture(3), (8, 8), channels=1).shape == (1, 8, 8)
    turned = Image.new("RGB", (20, 20), "black")
    turned.paste("white", (0, 0, 20, 10))  # white above; orientation 6 turns it to the right
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "a.png", exif=exif)
    (tmp_path / "a.txt").write_text("a")
    seen = np.array(open_source(str(tmp_path)).picture(0))
    assert seen[:, 15:].min() == 255 and seen[:, :5].max() == 0
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert open_source(str(tmp_path)).picture(0).mode == "RGB"


# --- bad sources -----------------------------------------------------------------------------------------------------


def test_an_empty_folder_and_pictures_without_captions(tmp_path):
    with pytest.raises(InputError, match=r"which holds no pictures; allowed: .png") as error:
        open_source(str(tmp_path))
    one_line(error)
    picture().save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"captions: got none for .*a.png; allowed: metadata.jsonl") as error:
        open_source(str(tmp_path))
    one_line(error)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "a.png"}', "line 1: got .*allowed: .*file_name.*text"),
        ("not json", "line 1: got 'not json'; allowed"),
        ('{"file_name": "a.png", "text": 3}', "line 1: got .*; allowed"),
        ('{"file_name": "b.png", "text": "b"}', "got file_name b.png, which is not there"),
        ('{"file_name": "../a.png", "text": "b"}', "got file_name ../a.png, which leads out of the folder"),
        ('{"file_name": "/etc/passwd", "text": "b"}', "got file_name /etc/passwd, which leads out of the folder"),
    ],
)
def test_bad_metadata_names_the_line(tmp_path, line, message):
    picture().save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=message) as error:
        open_source(str(tmp_path))
    one_line(error)


@pytest.fixture(params=["folder", "shards", "datasets"])
def broken(request, tmp_path):
    """broken(*numbers): a source of six images, those with these numbers truncated."""

    def made(*numbers: int) -> str:
        contents = [png(i)[: 200 if i in numbers else None] for i in range(6)]
        name = tmp_path / f"{request.param}-{len(numbers)}"
        if request.param == "shards":
            members = {f"{i}.png": content for i, content in enumerate(contents)}
            return str(shard(name.with_suffix(".tar"), members | {f"{i}.txt": f"cat {i}".encode() for i in range(6)}))
        if request.param == "datasets":
            datasets = pytest.importorskip("datasets")
            rows = {"image": [{"bytes": content, "path": None} for content in contents]}
            kinds = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
            table = datasets.Dataset.from_dict(rows | {"text": [f"cat {i}" for i in range(6)]}, features=kinds)
            table.save_to_disk(str(name))
            return str(name)
        name.mkdir()
        for i, content in enumerate(contents):
            (name / f"{i}.png").write_bytes(content)
            (name / f"{i}.txt").write_text(f"cat {i}")
        return str(name)

    return made


def test_a_broken_picture_is_left_out_counted_and_named(tmp_path, teacher, broken, capsys, monkeypatch):
    monkeypatch.setattr(build, "SHARD", 2)
    monkeypatch.setattr("stepdistill.data.cache.SHARD", 2)
    monkeypatch.setattr(build, "BATCH", 1)
    cache = open_data(broken(3), teacher, cache_dir=tmp_path / "cache")
    assert (cache.captions, cache.manifest["broken"]) == ([f"cat {i}" for i in (0, 1, 2, 4, 5)], 1)
    whole = open_data(broken(), teacher, cache_dir=tmp_path / "cache")
    (x0, cond), (expected, expected_cond) = cache.batch(range(5)), whole.batch([0, 1, 2, 4, 5])
    assert torch.equal(x0, expected) and torch.equal(cond["text"], expected_cond["text"])
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "left out" in line]
    assert len(lines) == 1 and lines[0].endswith(
        "left out 1 of 6 images, which are broken; broken.jsonl in the cache lists them"
    )
    (line,) = next((tmp_path / "cache").glob("*/broken.jsonl")).read_text().splitlines()
    assert json.loads(line)["sample"] == 3 and "3" in json.loads(line)["picture"]
    assert whole.manifest["broken"] == 0


def test_more_broken_pictures_than_one_in_a_hundred_are_refused(tmp_path, teacher, broken):
    with pytest.raises(InputError, match=r"and 1 before it; allowed: 1 of 6; replace or remove them") as error:
        open_data(broken(1, 3), teacher, cache_dir=tmp_path / "cache")
    one_line(error)
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".lock"]  # nothing half-built is left


def test_how_many_may_be_broken():
    assert [BrokenList(Path("none"), count).most for count in (1, 2, 199, 200, 5000)] == [0, 1, 1, 2, 50]


def test_broken_pictures_found_before_a_build_was_cut_off_are_counted(tmp_path):
    first = BrokenList(tmp_path, 300)
    first.add(7, PictureError("7.png", EOFError()))
    again = BrokenList(tmp_path, 300)
    again.add(7, PictureError("7.png", EOFError()))
    again.add(8, PictureError("8.png", EOFError()))
    assert len(again) == 2
    with pytest.raises(InputError, match=r"picture: got 9.png, which is broken \(EOFError\), and 2 before it"):
        BrokenList(tmp_path, 200).add(9, PictureError("9.png", EOFError()))


def test_a_file_that_cannot_be_read_is_not_a_broken_picture(tmp_path):
    """Its storage may recover later; no sample is dropped for that."""
    with pytest.raises(InputError, match=r"picture: got a.png, which cannot be read \(No such file") as error:
        open_picture(tmp_path / "a.png", "a.png")
    assert not isinstance(error.value, PictureError)
    one_line(error)


@pytest.mark.parametrize("error", [struct.error("unpack requires 8 bytes"), EOFError(), zlib.error("incorrect header")])
def test_whatever_a_decoder_raises_the_picture_is_named(error, monkeypatch):
    def fails(*_):
        raise error

    monkeypatch.setattr(Image, "open", fails)
    with pytest.raises(
        InputError, match=r"picture: got a.png, which is broken \(\w+.*\); allowed: a whole one; replace or remove it"
    ) as caught:
        open_picture(io.BytesIO(), "a.png")
    one_line(caught)


@pytest.mark.parametrize("name", ["metadata.jsonl", "a.txt", "prompts.txt"])
def test_text_that_is_not_utf_8_is_named(tmp_path, name):
    picture().save(tmp_path / "a.png")
    (tmp_path / name).write_bytes('{"file_name": "a.png", "text": "caf\xe9"}'.encode("latin-1"))
    with pytest.raises(InputError, match=rf"text: got .*{name}, whose byte \d+ is 0xe9; allowed: UTF-8") as error:
        open_source(str(tmp_path / name if name == "prompts.txt" else tmp_path))
    one_line(error)


def test_home_is_expanded_in_patterns_too(tmp_path, monkeypatch):
    shard(tmp_path / "s-0.tar", {"1.png": png(1), "1.txt": b"one"})
    monkeypatch.setenv("HOME", str(tmp_path))
    for spec in ("~/s-0.tar", "~/s-*.tar", "~/s-{0..0}.tar"):
        assert open_source(spec).captions == ["one"]


def test_a_caption_may_be_empty(tmp_path, teacher):
    (tmp_path / "set").mkdir()
    picture().save(tmp_path / "set" / "a.png")
    (tmp_path / "set" / "a.txt").write_text("")
    assert open_data(str(tmp_path / "set"), teacher, cache_dir=tmp_path / "cache").captions == [""]


@pytest.mark.parametrize("name", ["../a.png", "/a.png", "x/../../a.txt"])
def test_a_shard_whose_members_lead_out_is_refused(tmp_path, name):
    file = shard(tmp_path / "s.tar", {name: png()})
    with pytest.raises(InputError, match=rf"shard .*got member {name}, which leads out of the archive") as error:
        open_source(str(file))
    one_line(error)


def test_bad_shards_are_named(tmp_path):
    with pytest.raises(InputError, match=r"of which .*s.tar is not there; allowed: local .tar"):
        open_source(str(tmp_path / "s.tar"))
    with pytest.raises(InputError, match="whose braces do not match"):
        open_source(str(tmp_path / "{0..9.tar"))
    with pytest.raises(InputError, match="of which nothing is not there"):
        open_source(str(tmp_path / "*.tar"))
    with pytest.raises(InputError, match=r"without a caption; allowed: a picture with a .txt"):
        open_source(str(shard(tmp_path / "a.tar", {"1.png": png()})))
    with pytest.raises(InputError, match="without a picture; allowed"):
        open_source(str(shard(tmp_path / "b.tar", {"1.txt": b"one"})))
    with pytest.raises(InputError, match="holds no pictures"):
        open_source(str(shard(tmp_path / "c.tar", {"readme.md": b"one"})))
    with pytest.raises(InputError, match=r"allowed: an uncompressed, whole .tar"):
        open_source(str(shard(tmp_path / "d.tar", {"1.png": png(), "1.txt": b"one"}, "w:gz")))
    link = tarfile.TarInfo("1.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(tmp_path / "e.tar", "w") as tar:
        tar.addfile(link)
    with pytest.raises(InputError, match="holds no pictures"):
        open_source(str(tmp_path / "e.tar"))


def test_what_names_nothing_is_told_what_would(tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "a.zip").write_text("")
    for spec, message in {
        str(tmp_path / "nowhere"): "which does not exist; allowed: an image folder",
        str(tmp_path / "a.zip"): "neither a folder, a .txt nor a .tar; allowed",
        str(tmp_path / "empty.txt"): "which has no prompts",
        "nobody/nothing": "could not be loaded as a dataset",
    }.items():
        with pytest.raises(InputError, match=message) as error:
            open_source(spec)
        one_line(error)


# --- the cache -------------------------------------------------------------------------------------------------------


def test_a_cache_holds_what_the_teacher_says_of_each_sample(tmp_path, pictures, family, pipelines):
    teacher = load_teacher(pipelines[family])
    cache = open_data(pictures, teacher, cache_dir=tmp_path)
    source = open_source(pictures)
    assert cache.captions == source.captions
    x0, cond = cache.batch([4, 1, 1])
    for row, i in enumerate([4, 1, 1]):
        latents = teacher.encode(to_tensor(source.picture(i), (SIDE, SIDE))[None])[0]
        torch.testing.assert_close(x0[row], latents, atol=1e-5, rtol=1e-5)
        expected = teacher.conditioner.encode([source.captions[i]], size=(SIDE, SIDE))
        assert cond.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(cond[key][row], value[0], atol=1e-5, rtol=1e-5)
    one = cache[-1]
    assert torch.equal(one["x0"], cache.batch([len(cache) - 1])[0][0])
    nothing = teacher.conditioner.unconditional(1, size=(SIDE, SIDE))
    assert all(torch.equal(cache.uncond[key], nothing[key]) for key in nothing)


def test_latents_are_bit_for_bit_those_of_images_decoded_one_by_one(tmp_path, teacher, broken, monkeypatch):
    monkeypatch.setattr(build, "BATCH", 2)
    data = broken(1)
    source, batches = open_source(data), ([0], [2, 3], [4, 5])
    images = [torch.stack([to_tensor(source.picture(i), (SIDE, SIDE)) for i in batch]) for batch in batches]
    cache = open_data(data, teacher, cache_dir=tmp_path / "cache")
    assert torch.equal(cache.batch(range(5))[0], torch.cat([teacher.encode(batch) for batch in images]))


def test_each_distinct_caption_is_encoded_once(tmp_path, pictures, teacher, monkeypatch):
    encoded: list[str] = []
    own = teacher.conditioner.encode
    monkeypatch.setattr(teacher.conditioner, "encode", lambda p, **options: encoded.extend(p) or own(p, **options))
    open_data(pictures, teacher, cache_dir=tmp_path)
    assert sorted(encoded) == sorted([*tiny.PROMPTS, ""])


def test_a_second_call_encodes_nothing_and_another_teacher_or_size_makes_another_cache(tmp_path, pictures, monkeypatch):
    teacher, other = as_teacher(tiny.sd(), "tiny"), as_teacher(tiny.sd(seed=1), "tiny")
    first = open_data(pictures, teacher, cache_dir=tmp_path)
    assert open_data(pictures, other, cache_dir=tmp_path).key != first.key
    small = open_data(pictures, teacher, cache_dir=tmp_path, resolution=16)
    assert small.key != first.key and small[0]["x0"].shape == (4, 4, 4)
    assert len(open_data(pictures, teacher, cache_dir=tmp_path, limit=2)) == 2
    monkeypatch.setattr(teacher.vae, "encode", lambda *_: pytest.fail("encoded again"))
    assert open_data(pictures, teacher, cache_dir=tmp_path).key == first.key


def test_an_adapter_does_not_change_the_teachers_key():
    teacher = as_teacher(tiny.sd(), "tiny")
    keys = [teacher_key(teacher, painting=p) for p in (False, True)]
    from peft import LoraConfig

    teacher.denoiser.backbone.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    assert [teacher_key(teacher, painting=p) for p in (False, True)] == keys
    with torch.no_grad():
        next(teacher.denoiser.backbone.parameters()).mul_(2)
    assert teacher_key(teacher) == keys[0]
    assert teacher_key(teacher, painting=True) != keys[1]


@pytest.mark.parametrize(
    "full_disk",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        SafetensorError("Error while serializing: I/O error: Disk quota exceeded (os error 122)"),
    ],
)
def test_an_interrupted_build_goes_on_where_it_stopped(tmp_path, pictures, teacher, monkeypatch, full_disk):
    whole = open_data(pictures, teacher, cache_dir=tmp_path / "whole")
    monkeypatch.setattr(build, "SHARD", 2)
    monkeypatch.setattr("stepdistill.data.cache.SHARD", 2)
    own, made = build.save_file, []

    def full(tensors, file):
        if "shards-00002" in str(file) and not made.count("full"):
            made.append("full")
            raise full_disk
        made.append(file.name)
        own(tensors, file)

    monkeypatch.setattr(build, "save_file", full)
    with pytest.raises(InputError, match=r"disk: got no space left .* what is done is kept; free some") as error:
        open_data(pictures, teacher, cache_dir=tmp_path / "cut")
    one_line(error)
    assert not list((tmp_path / "cut").glob("data-*"))
    resumed = open_data(pictures, teacher, cache_dir=tmp_path / "cut")
    assert made.count("shards-00000.safetensors.new") == 1
    assert resumed.captions == whole.captions
    for i in range(len(whole)):
        assert torch.equal(resumed[i]["x0"], whole[i]["x0"])
        assert torch.equal(resumed[i]["cond"]["text"], whole[i]["cond"]["text"])


def test_two_processes_at_once_make_one_cache(tmp_path, pictures, pipelines):
    code = """if True:
        import sys
        from stepdistill.data.cache import open_data
        from stepdistill.denoiser.load import load_teacher
        print(open_data(sys.argv[2], load_teacher(sys.argv[1]), cache_dir=sys.argv[3]).key)
    """
    command = [sys.executable, "-c", code, pipelines["sd"], pictures, str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env=environment, **pipes) for _ in range(2)]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert len(list(tmp_path.glob("data-*"))) == 1 and not list(tmp_path.glob(".*.building"))


def test_half_takes_half_the_disk_and_reads_as_float32(tmp_path, pictures):
    teacher = as_teacher(tiny.sdxl(), "tiny")
    whole = open_data(pictures, teacher, cache_dir=tmp_path)
    half = open_data(pictures, teacher, cache_dir=tmp_path, half=True)
    x0, cond = half.batch([0, 1])
    assert {v.dtype for v in (x0, *cond.values())} == {torch.float32}
    torch.testing.assert_close(x0, whole.batch([0, 1])[0], atol=2e-3, rtol=2e-3)
    assert torch.equal(cond["time_ids"], whole.batch([0, 1])[1]["time_ids"])
    assert half._latents[0].dtype == torch.float16


def test_a_training_run_may_keep_its_samples_in_half(tmp_path, teacher, pictures):
    for half in (False, True):
        run = LCMConfig(teacher="tiny", data=pictures, half=half, dry_run=True)
        assert open_samples(run, teacher, tmp_path / str(half))[0]["x0"].dtype == torch.float32
        (file,) = (tmp_path / str(half)).glob("*/shards-*")
        assert load_file(file)["x0"].dtype == (torch.float16 if half else torch.float32)


def test_prompts_alone_are_painted_by_the_guided_teacher(tmp_path, teacher):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join([*tiny.PROMPTS, tiny.PROMPTS[0]]))
    options = {"synthetic_steps": 3, "synthetic_guidance": 4.0, "cache_dir": tmp_path}
    cache = open_data(str(file), teacher, seed=7, **options)
    draws = Draws.at(7, 0, 3)
    cond, uncond = teacher.conditioner.encode(cache.captions), expand(teacher.conditioner.unconditional(1), 3)
    expected = sample(teacher.denoiser, draws.normal(4, 8, 8), cond, uncond, steps=3, guidance=4.0)
    torch.testing.assert_close(cache.batch([0, 1, 2])[0], expected, atol=1e-5, rtol=1e-5)
    assert (cache[0]["x0"] - cache[2]["x0"]).abs().max() > 0.1  # the same prompt, other noise
    assert open_data(str(file), teacher, seed=8, **options).key != cache.key
    assert cache.manifest["guidance"] == 4.0


def test_the_teacher_paints_in_the_precision_of_the_run(tmp_path, teacher):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(tiny.PROMPTS))
    options = {"synthetic_steps": 2, "synthetic_guidance": 3.0, "cache_dir": tmp_path}
    exact = open_data(str(file), teacher, **options)
    half = open_data(str(file), teacher, precision=torch.bfloat16, **options)
    draws = Draws.at(0, 0, 2)
    cond, uncond = teacher.conditioner.encode(half.captions), expand(teacher.conditioner.unconditional(1), 2)
    with torch.autocast("cpu", torch.bfloat16):
        expected = sample(teacher.denoiser, draws.normal(4, 8, 8), cond, uncond, steps=2, guidance=3.0)
    assert torch.equal(half.batch([0, 1])[0], expected)
    assert not torch.equal(exact.batch([0, 1])[0], expected)
    assert (exact.manifest["precision"], half.manifest["precision"]) == ("float32", "bfloat16")
    assert exact.key != half.key


def test_a_painted_cache_is_known_to_its_teacher_in_bfloat16_too(tmp_path, pipelines):
    """A run in bfloat16 loads the network in bfloat16; `stepdistill cache` in float32."""
    (tmp_path / "prompts.txt").write_text("a cat\n")
    make_cache(str(tmp_path / "prompts.txt"), load_teacher(pipelines["sd"]), tmp_path / "cache", synthetic_steps=1)
    half = load_teacher(pipelines["sd"], backbone_dtype=torch.bfloat16)
    assert len(open_data(str(tmp_path / "cache"), half)) == 1
    with torch.no_grad():
        next(half.denoiser.backbone.parameters()).mul_(1.02)
    with pytest.raises(InputError, match="made with another teacher"):
        open_data(str(tmp_path / "cache"), half)


def test_a_class_conditional_pixel_model_is_cached_without_an_unconditional(tmp_path):
    for i in range(3):
        picture(i, (8, 8)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(str(i))
    teacher = as_teacher(tiny.pixel(classes=3), "tiny")
    cache = open_data(str(tmp_path), teacher, cache_dir=tmp_path / "cache")
    x0, cond = cache.batch([2, 0])
    assert cond["labels"].tolist() == [2, 0]
    assert cache.uncond == {}
    torch.testing.assert_close(x0[0], to_tensor(picture(2, (8, 8)), (8, 8)))


def test_resolution_is_a_multiple_of_the_autoencoders_factor(teacher):
    assert picture_size(teacher, None) == (32, 32)
    assert picture_size(teacher, 64) == (64, 64)
    for wrong in (30, 2, 0, -4):
        with pytest.raises(InputError, match=rf"resolution: got {wrong}; allowed: multiples of 4 .*; try") as error:
            picture_size(teacher, wrong)
        one_line(error)
    with pytest.raises(InputError, match="resolution: got 16; allowed: 8, this pixel model's own"):
        picture_size(as_teacher(tiny.pixel(), "tiny"), 16)


def test_a_cache_folder_is_data_for_its_own_teacher_only(tmp_path, pictures, teacher):
    made = make_cache(pictures, teacher, tmp_path / "cache", resolution=16)
    assert open_data(str(tmp_path / "cache"), teacher).key == made.key
    assert make_cache(pictures, teacher, tmp_path / "cache", resolution=16).key == made.key
    with pytest.raises(InputError, match=r"made with another teacher .*; allowed: one made with this one"):
        open_data(str(tmp_path / "cache"), as_teacher(tiny.sd(seed=3), "other"))
    with pytest.raises(InputError, match=r"resolution: got 64 with the cache .* of 16"):
        open_data(str(tmp_path / "cache"), teacher, resolution=64)
    with pytest.raises(InputError, match=r"--out: got .*, which holds something else"):
        make_cache(pictures, teacher, tmp_path / "cache", resolution=32)
    with pytest.raises(InputError, match=r"--out: got .*, which holds something else"):
        make_cache(pictures, teacher, tmp_path)


def test_a_run_has_the_size_of_its_cache_and_no_other(tmp_path, pictures):
    base = tiny.save(tmp_path / "base")
    make_cache(pictures, load_teacher(base), tmp_path / "cache", resolution=16)
    run = LCMConfig(teacher=str(base), data=str(tmp_path / "cache"))
    teacher = open_teacher(run, "cpu")
    data = open_samples(run, teacher, tmp_path)
    assert teacher.image_size == (16, 16) and data[0]["x0"].shape == teacher.denoiser.sample_shape
    for wrong in (32, 64):  # the teacher's own, and neither's
        other = dataclasses.replace(run, resolution=wrong)
        with pytest.raises(InputError, match=rf"resolution: got {wrong} with the cache .* of 16"):
            open_samples(other, open_teacher(other, "cpu"), tmp_path)


def test_a_painted_cache_is_data_for_runs_at_its_guidance_only(tmp_path, pictures, teacher):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    painted, encoded = str(tmp_path / "painted"), str(tmp_path / "encoded")
    make_cache(str(tmp_path / "prompts.txt"), teacher, painted, synthetic_steps=1, synthetic_guidance=2.0)
    make_cache(pictures, teacher, encoded)
    with pytest.raises(
        InputError, match=r"guidance: got 7 with the cache .*, painted at 2; .*`stepdistill cache --guidance 7`"
    ) as error:
        open_data(painted, teacher, synthetic_guidance=7.0)
    one_line(error)
    for spec, guidance in ((painted, 2.0), (painted, None), (encoded, 7.0)):
        open_data(spec, teacher, synthetic_guidance=guidance, seed=5)


def test_silent_tokens_are_not_kept_and_come_back(tmp_path, pictures):
    """Stable Diffusion 3 without its T5 has 256 tokens of zeros per caption."""
    pipe = tiny.sd3()
    pipe.text_encoder_3 = None
    silent = as_teacher(pipe, "silent")
    cache = make_cache(pictures, silent, tmp_path / "cache")
    expected = silent.conditioner.encode(cache.captions)
    for i in range(len(cache)):
        assert torch.equal(cache[i]["cond"]["text"], expected["text"][i])
    (stored,) = (tmp_path / "cache").glob("conditions-*.safetensors")
    assert load_file(stored)["text"].shape[1] == expected["text"].shape[1] - 256
    states = torch.tensor([[[0.0], [1.0], [0.0]], [[2.0], [0.0], [0.0]]])
    assert torch.equal(build.without_silence(states), states[:, :2])
    assert build.without_silence(torch.zeros(2, 3, 1)).shape == (2, 1, 1)


@pytest.mark.parametrize("damage", ["cut", "gone", "manifest", "version"])
def test_a_damaged_cache_is_named(tmp_path, pictures, teacher, damage):
    make_cache(pictures, teacher, tmp_path / "cache")
    file = tmp_path / "cache" / "shards-00000.safetensors"
    manifest = tmp_path / "cache" / "manifest.json"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-10])
    elif damage == "gone":
        file.unlink()
    elif damage == "manifest":
        manifest.write_text("{")
    else:
        manifest.write_text(manifest.read_text().replace(f'"format": {FORMAT}', '"format": 1'))
    with pytest.raises(InputError, match=r"cache: got .*, which is damaged or no cache .*; remove it") as e:
        LatentCache(tmp_path / "cache")
    one_line(e)
