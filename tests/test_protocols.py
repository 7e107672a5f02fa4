"""Protocols of published data: what they do to a picture is what their tools do, and what differs is named."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from test_suite import PROMPTS, Pools, Towers, run, words
from torchvision import transforms

from stepdistill.errors import InputError
from stepdistill.evaluation import metrics, protocols, sets
from stepdistill.evaluation.clip import ClipModel, clip_scores
from stepdistill.evaluation.features import Extractor
from stepdistill.evaluation.frame import Frame
from stepdistill.evaluation.frechet import Moments
from stepdistill.evaluation.measures import View
from stepdistill.evaluation.metrics import Instruments
from stepdistill.evaluation.protocols import ExtractorSpec, Protocol, load_protocol, with_data
from stepdistill.evaluation.records import check_same_protocol

PUBLISHED = ("cifar10-50k", "coco30k-256", "coco10k-512", "coco10k-512-patch", "mjhq30k", "mlperf-sdxl-5k")
POOLS = Extractor("pools", "Pools", Pools(), 12, 32, "nearest", "w")


def picture(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def batch(given: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(given)).permute(2, 0, 1)[None]


@pytest.mark.parametrize(("width", "height"), [(64, 64), (90, 61), (47, 120), (33, 40)])
def test_frames_are_what_the_papers_code_does(width, height):
    """DMD2: CenterCropLongEdge, then Pillow's Lanczos; its patches: a centre crop. SANA: Resize, then CenterCrop."""
    given = picture(width, height)
    square = transforms.functional.center_crop(given, min(given.size)).resize((40, 40), Image.LANCZOS)
    cover = transforms.Compose([transforms.Resize(40), transforms.CenterCrop(40)])(given)
    large = width >= 40 and height >= 40
    crop = transforms.functional.center_crop(given, 40) if large else given.resize((40, 40), Image.BICUBIC)
    for wanted, frame in (
        (square, Frame(40, "square", "lanczos")),
        (cover, Frame(40, "cover", "bilinear")),
        (crop, Frame(40, "crop", "bicubic")),
    ):
        assert np.array_equal(np.asarray(frame(given)), np.asarray(wanted))
        assert torch.equal(frame.batch(batch(given)), batch(wanted))


def test_real_and_drawn_pictures_are_looked_at_in_one_frame(tmp_path):
    sides = [(64, 48), (40, 70), (50, 50)]
    for i, side in enumerate(sides):
        picture(*side).save(tmp_path / f"{i}.png")
    frame = Frame(32)
    real = sets.open_set(str(tmp_path), frame)
    assert real.key != sets.open_set(str(tmp_path), Frame(16)).key
    tools = Instruments(real, POOLS, Moments.empty(12), metrics=("fd",), frame=frame)
    for i, side in enumerate(sides):
        drawn = View(tools, i, batch(picture(*side)))
        assert torch.equal(drawn.pictures, real.pictures(i, i + 1))
        assert torch.equal(drawn.features, POOLS(real.pictures(i, i + 1)))


def test_the_embedded_pictures_are_looked_at_in_a_protocols_frame_too():
    plain, frame = sets.open_set("avatars:test"), Frame(24)
    real = sets.open_set("avatars:test", frame)
    assert real.key != plain.key and real.prompts == plain.prompts
    assert torch.equal(real.pictures(3, 5), frame.batch(plain.pictures(3, 5)))


def test_clip_is_scaled_and_framed_as_the_protocol_says():
    images, texts = torch.tensor([[0.6, 0.8], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert clip_scores(images, texts, 1.0).tolist() == pytest.approx([0.6, 0.0])
    assert clip_scores(images, texts).tolist() == pytest.approx([60.0, 0.0])
    plain = ClipModel("towers", Towers(), words, None, (32, 32), (0.5,) * 3, (0.5,) * 3)
    framed = dataclasses.replace(plain, frame=Frame(32))
    given = batch(picture(64, 48))
    assert torch.equal(framed.images(given), plain.images(Frame(32).batch(given)))


@pytest.mark.parametrize("caption", ["a red cat", "word " * 100])
def test_a_prefix_is_dmd2s_tokens(caption):
    """DMD2 puts the three tokens of the prefix after the start, cuts at 77 and ends with the end."""
    import open_clip

    tokenize = open_clip.get_tokenizer("ViT-g-14")
    prefix = load_protocol("coco30k-256").scorer.prefix
    tokens, front = tokenize([caption]), tokenize([prefix])[:, 1:4]
    wanted = torch.cat([tokens[:, :1], front, tokens[:, 1:]], 1)[:, :77]
    if wanted[0, 76] > 0:
        wanted[0, 76] = 49407
    assert torch.equal(tokenize([prefix + caption]), wanted)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_protocol_says_where_its_data_are(name, tmp_path):
    protocol = load_protocol(name)
    with pytest.raises(InputError, match=rf"protocol {name}: got no --(prompts|reference)") as caught:
        metrics.prepare(protocol)
    assert " ".join(protocol.where.split()) in str(caught.value) and "\n" not in str(caught.value)
    prompts = tmp_path / "p.txt" if protocol.prompts == protocols.PROMPTS else None
    placed = with_data(protocol, prompts, tmp_path)
    assert (placed.prompts, placed.reference) == (str(prompts or "none"), str(tmp_path))
    assert placed.hash({}) == protocol.hash({})


def test_data_that_a_protocol_names_itself_are_not_the_users_to_name():
    with pytest.raises(InputError, match="avatars-2k, which names its own prompts; leave it out"):
        with_data(load_protocol("avatars-2k"), "x.txt", None)


def test_what_two_protocols_differ_in_is_named_field_by_field():
    a = load_protocol("coco30k-256")
    b = dataclasses.replace(a, n=10, extractor=ExtractorSpec("inception", 128, "bilinear"), frame=Frame(512), seed=9)
    same = dataclasses.replace(a, description="x", where="y", seed=3)
    said = [{"protocol": p.name, "protocol_hash": p.hash({}), "settings": p.settings()} for p in (a, b, same)]
    with pytest.raises(InputError) as caught:
        check_same_protocol(said[0], said[1], "one", "two")
    differ = (
        "n 30000 and 10, extractor.size none and 128, extractor.resize clean-fid and bilinear, frame.size 256 and 512"
    )
    assert f"they differ in {differ}; figures" in str(caught.value)
    check_same_protocol(said[0], said[2], "one", "two")


def test_rows_of_another_protocol_are_refused_with_the_difference_named(tmp_path):
    pictures = torch.cat([batch(picture(32, 32))] * 5)
    prompts = sets.EvalSet("set", "k" * 64, 5, PROMPTS, lambda a, b: pictures[a:b])
    reference = Moments.of(torch.rand(40, 12, generator=torch.Generator().manual_seed(0)))
    tools = Instruments(prompts, POOLS, reference, content=(("prompts", "k"),), metrics=("fd",))
    protocol = Protocol("tiny", 5, "set", "set", ExtractorSpec("pools"), guidance=2.0, metrics=("fd",))
    pipe = {"p": tiny.sd()}
    run(pipe, protocol, tools, tmp_path, (1,))
    with pytest.raises(InputError, match=r"differ in n 5 and 4, guidance 2.0 and 3.0; .* choose another folder"):
        run(pipe, dataclasses.replace(protocol, guidance=3.0), tools, tmp_path, (1,), n=4)
    with pytest.raises(InputError, match=r"differ in content.prompts k and other; "):
        run(pipe, protocol, dataclasses.replace(tools, content=(("prompts", "other"),)), tmp_path, (1,))
