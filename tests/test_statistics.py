"""Statistics in files: stored bit-exactly with their origin; those of another origin, or invalid, are rejected."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from test_suite import PROMPTS, Pools

from stepdistill.errors import InputError
from stepdistill.evaluation import arrays, metrics
from stepdistill.evaluation.features import Extractor
from stepdistill.evaluation.frame import Frame
from stepdistill.evaluation.frechet import Moments, frechet_distance
from stepdistill.evaluation.protocols import ExtractorSpec, Protocol, load_protocol, with_data
from stepdistill.evaluation.records import check_same_protocol
from stepdistill.evaluation.statistics import Origin, framed, load_statistics, read_statistics, save_statistics

ORIGIN = Origin("pools:w:nearest@32", "as they are", "k", 30)
POOLS = Extractor("pools", "Pools", Pools(), 12, 32, "nearest", "w")


def draws(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_moments_are_kept_to_the_bit_with_what_they_are_of(tmp_path):
    moments = Moments.of(draws(30, 7))
    save_statistics(tmp_path / "m.safetensors", moments, ORIGIN)
    again, origin = load_statistics(tmp_path / "m.safetensors")
    assert (again.count, origin) == (30, ORIGIN) and torch.equal(again.mean, moments.mean)
    assert torch.equal(again.scatter.tril(), moments.scatter.tril()) and torch.equal(again.scatter, again.scatter.T)


def test_damaged_statistics_are_said_to_be(tmp_path):
    file = tmp_path / "m.safetensors"
    save_statistics(file, Moments.of(draws(30, 7)), ORIGIN)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(InputError, match="damaged"):
        load_statistics(file)
    for tensors, count, reason in (
        ({"mean": torch.zeros(3)}, "9", "no 'scatter'"),
        ({"mean": torch.zeros(3), "scatter": torch.zeros(5)}, "9", "do not fit"),
        ({"mean": torch.zeros(3), "scatter": torch.zeros(6)}, "-1", "count -1"),
        ({"mean": torch.zeros(3), "scatter": torch.zeros(6)}, "many", "invalid literal"),
    ):
        arrays.save(file, tensors, count=count)
        with pytest.raises(InputError, match=reason) as caught:
            load_statistics(file)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "other"),
    [("extractor", "pools:w:bilinear@32"), ("frame", framed(Frame(256))), ("count", 50), ("pictures", "j")],
)
def test_own_statistics_of_something_else_are_refused_with_what_it_is(tmp_path, field, other):
    file = tmp_path / "m.safetensors"
    save_statistics(file, Moments.of(draws(30, 7)), ORIGIN)
    assert read_statistics(file, ORIGIN, 7)[1]
    with pytest.raises(InputError, match=rf"whose {field} is .*; allowed: {other}; give those of this protocol"):
        read_statistics(file, dataclasses.replace(ORIGIN, **{field: other}), 7)
    assert read_statistics(file, Origin(ORIGIN.extractor), 7)[1]  # only the fields requested are checked


def test_statistics_of_an_npz_give_the_distance_of_their_pictures(tmp_path):
    real, drawn = draws(500, 6), draws(80, 6, 1)
    np.savez(tmp_path / "s.npz", mu=real.numpy().mean(0), sigma=np.cov(real.numpy(), rowvar=False))
    save_statistics(tmp_path / "s.safetensors", Moments.of(real), Origin("e"))
    wanted = frechet_distance(Moments.of(drawn), Moments.of(real))
    own = Origin("e", count=500)
    for file, count, said in (("s.npz", None, None), ("s.npz", 500, None), ("s.safetensors", None, own)):
        moments, origin = read_statistics(tmp_path / file, Origin("e", count=count), 6)
        assert frechet_distance(Moments.of(drawn), moments) == pytest.approx(wanted, rel=1e-10) and origin == said


def test_statistics_that_are_none_are_refused_in_one_line(tmp_path):
    skewed, negative, indefinite = np.eye(6), np.eye(6), np.eye(6)
    skewed[0, 1] = 0.01
    negative[2, 2] = -0.1
    indefinite[0, 1] = indefinite[1, 0] = 1.1  # every variance is positive, and the correlation is above one
    for name, arrays_of in {
        "half": {"mu": np.zeros(3)},
        "odd": {"mu": np.zeros(3), "sigma": np.zeros((2, 2))},
        "nan": {"mu": np.full(6, np.nan), "sigma": np.eye(6)},
        "infinite": {"mu": np.zeros(6), "sigma": np.full((6, 6), np.inf)},
        "pickle": {"mu": np.array([{}]), "sigma": np.eye(1)},
        "words": {"mu": np.array(["a"]), "sigma": np.eye(1)},
        "short": {"mu": np.zeros(3), "sigma": np.eye(3)},
        "skewed": {"mu": np.zeros(6), "sigma": skewed},
        "negative": {"mu": np.zeros(6), "sigma": negative},
        "indefinite": {"mu": np.zeros(6), "sigma": indefinite},
        "below": {"mu": np.zeros(6), "sigma": -np.eye(6)},
    }.items():
        np.savez(tmp_path / f"{name}.npz", **arrays_of)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "odd.npz").read_bytes()[:40])
    with open(tmp_path / "plain.npz", "wb") as file:
        np.save(file, np.zeros(3))
    for name, reason in (
        ("half", "sigma"), ("odd", "do not fit"), ("nan", "not finite"), ("infinite", "not finite"),
        ("pickle", "pickle"), ("words", "no statistics"), ("cut", "no statistics"), ("plain", "no statistics"),
        ("short", "length 3, for an extractor of 6"), ("gone", "does not exist"), ("skewed", "not symmetric"),
        ("negative", "eigenvalue of -0.1"), ("indefinite", "eigenvalue of -0.1"), ("below", "eigenvalue of -1"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=reason) as caught:
            read_statistics(tmp_path / f"{name}.npz", Origin("e"), 6)
        assert "\n" not in str(caught.value), name


def test_what_rounding_leaves_is_accepted(tmp_path):
    """Fewer images than features, in float32, summed one by one: eigenvalues of zero come out negative."""
    few = draws(40, 200).float().numpy()
    centred = few - few.mean(0)
    sigma = sum(np.outer(x, x) for x in centred) / np.float32(39)
    sigma[0, 1] += 1e-7
    assert np.linalg.eigvalsh(sigma)[0] < 0
    np.savez(tmp_path / "few.npz", mu=few.mean(0), sigma=sigma)
    assert len(read_statistics(tmp_path / "few.npz", Origin("e"), 200)[0].mean) == 200


def test_a_reference_of_statistics_is_part_of_the_hash_by_its_content_and_said_to_be_foreign(tmp_path, monkeypatch):
    for name, mean in (("a", 0.0), ("b", 1.0)):
        np.savez(tmp_path / f"{name}.npz", mu=np.full(12, mean), sigma=np.eye(12))
    save_statistics(tmp_path / "own.safetensors", Moments.of(draws(30, 12)), Origin(POOLS.identity, "1024"))
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    monkeypatch.setattr(metrics, "load_extractor", lambda *_, **__: POOLS)
    asked = dataclasses.replace(load_protocol("mlperf-sdxl-5k"), n=5, scorer=None)
    found = set()
    for name, foreign in (("a.npz", True), ("b.npz", True), ("own.safetensors", False)):
        protocol = with_data(asked, tmp_path / "p.txt", tmp_path / name)
        tools = metrics.prepare(protocol)
        assert tools.prompts.prompts == PROMPTS and ("statistics" in dict(tools.content)) is foreign
        found.add(protocol.hash(dict(tools.content)))
    assert len(found) == 3
    framed_otherwise = dataclasses.replace(protocol, frame=Frame(256))
    with pytest.raises(InputError, match="whose frame is 1024; allowed: 256 square lanczos"):
        metrics.prepare(framed_otherwise)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A protocol of eight images in a folder, by twelve features, and that of their statistics as kept in the cache."""
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(metrics, "load_extractor", lambda *_, **__: POOLS)
    (tmp_path / "p.txt").write_text("\n".join([*PROMPTS, "a hat"]))
    (tmp_path / "real").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    for i, picture in enumerate(noise):
        Image.fromarray(picture).save(tmp_path / "real" / f"{i}.png")
    protocol = Protocol("p", 6, str(tmp_path / "p.txt"), str(tmp_path / "real"), ExtractorSpec("pools"), size=32)
    metrics.prepare(protocol)
    (file,) = (tmp_path / "cache" / "statistics").glob("statistics-*")
    return protocol, dataclasses.replace(protocol, reference=str(file))


def told(protocol: Protocol, tools: metrics.Instruments) -> dict:
    """A row's fields about its protocol."""
    settings = protocol.settings() | {"content": dict(tools.content)}
    return {"protocol": "p", "protocol_hash": protocol.hash(dict(tools.content)), "settings": settings}


def test_statistics_of_a_folder_give_rows_that_are_comparable_with_the_folders_and_name_what_they_leave_out(
    folder, capsys
):
    names, unseen = ("fd", "kid", "clip", "prdc", "copies"), ("kid", "prdc", "copies")
    pictures, statistics = (dataclasses.replace(protocol, metrics=names) for protocol in folder)
    whole = metrics.prepare(pictures)
    no_scorer = "clip is omitted: got a protocol without a scorer; it needs one\n"
    assert whole.metrics == ("fd", "kid", "prdc", "copies") and capsys.readouterr().err == no_scorer
    tools = metrics.prepare(statistics)
    why = "is omitted: got statistics as the reference; it needs the real images"
    lines = [f"{name} {why}" for name in unseen]
    lines.insert(1, no_scorer.strip())
    assert tools.metrics == ("fd",) and capsys.readouterr().err.splitlines() == lines
    assert torch.equal(tools.reference.mean, whole.reference.mean)
    assert torch.equal(tools.reference.scatter, whole.reference.scatter)
    content = dict(tools.content)
    assert content.pop("omitted") == "copies kid prdc" and not any("revision" in name for name in content)
    assert content == {name: value for name, value in whole.content if "revision" not in name}
    rows = told(pictures, whole), told(statistics, tools)
    check_same_protocol(*rows, "one", "two")
    assert rows[0]["protocol_hash"] != rows[1]["protocol_hash"]  # or a row without kid would be taken for one with it
    rows[1]["settings"]["content"]["extractor"] = "another"
    with pytest.raises(InputError, match=r"differ in content\.extractor"):
        check_same_protocol(*rows, "one", "two")


def test_statistics_of_a_folder_have_its_hash_where_nothing_is_left_out(folder, tmp_path):
    pictures, statistics = (dataclasses.replace(protocol, metrics=("fd",)) for protocol in folder)
    hashes = {protocol.hash(dict(metrics.prepare(protocol).content)) for protocol in (pictures, statistics)}
    Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8)).save(tmp_path / "real" / "0.png")
    assert len(hashes) == 1 and pictures.hash(dict(metrics.prepare(pictures).content)) not in hashes
