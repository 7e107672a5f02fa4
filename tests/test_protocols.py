"""Protocols on published data: they process an image as the original tools do, and differences are named."""

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
from stepdistill.evaluation.protocols import ExtractorSpec, Protocol, ScorerSpec, load_protocol, with_data
from stepdistill.evaluation.records import check_same_protocol
from stepdistill.methods.feature_networks import LITE2_SHA256

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
    """DMD2 inserts the prefix's three tokens after the start token, truncates to 77 and ends with the end token."""
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
    placed = with_data(protocol, prompts, tmp_path / "r.npz")
    assert (placed.prompts, placed.reference) == (str(prompts or "none"), str(tmp_path / "r.npz"))
    assert placed.hash({}) == protocol.hash({})


def test_a_folder_that_is_not_what_a_protocol_compares_with_is_refused(tmp_path):
    for i in range(3):
        picture(32, 32).save(tmp_path / f"{i}.png")
    mjhq = load_protocol("mjhq30k")
    with pytest.raises(
        InputError, match=rf"reference: got {tmp_path} of 3 pictures; allowed: 30000, "
    ):  # half unzipped
        with_data(mjhq, tmp_path / "p.txt", tmp_path)
    assert load_protocol("coco30k-256").reference_n == 40504  # all of val2014
    whole = with_data(dataclasses.replace(mjhq, reference_n=3), tmp_path / "p.txt", tmp_path)
    assert whole.reference == str(tmp_path)
    cifar, sdxl = dataclasses.replace(load_protocol("cifar10-50k"), reference_n=3), load_protocol("mlperf-sdxl-5k")
    assert with_data(cifar, None, tmp_path).reference == str(tmp_path)
    with pytest.raises(InputError, match=r"0.png of 32 x 32; allowed: 1024 x 1024"):
        with_data(sdxl, tmp_path / "p.txt", tmp_path)
    picture(64, 64).save(tmp_path / "2.png")
    with pytest.raises(InputError, match=r"2.png of 64 x 64; allowed: 32 x 32"):
        with_data(cifar, None, tmp_path)


def test_the_embedded_protocol_keeps_its_hash():
    """Recorded rows are compared with new ones by this hash; the values it depends on are those in a recorded row."""
    content = {
        "cmmd revision": "2", "fd_inf revision": "2", "kid revision": "2", "prdc revision": "2",
        "extractor": f"efficientnet_lite2:{LITE2_SHA256}:bilinear@128",
        "probes": "3a7634e62737fdd6367f30a61f5645a4fbe3aff52943f9c6551543fcdc7d28ad",
        "prompts": "9a362ec3edaf235a4b974f35a014ce3f47f2757c327349a010b2f386bcc01a5f",
        "reference": "25d6590dcd858084bf1a169e2ff32c5eac06dd49396fdfb200038f55e17e4844",
        "scorer": "eda80078ff86d9f1d5cdb7b67bf20b83dcb276052bf6d7516a653df7545770ab",
    }  # fmt: skip
    assert load_protocol("avatars-2k").hash(content) == "2276370210f19163"


def test_where_a_scorer_lies_is_not_in_the_hash(tmp_path):
    plain, placed = load_protocol("mjhq30k"), []
    for name in ("a", "b"):
        file = tmp_path / name / "clip.bin"
        file.parent.mkdir()
        file.write_bytes(b"weights")
        placed += [dataclasses.replace(plain, scorer=ScorerSpec("ViT-L-14", str(file)))]
        placed += [dataclasses.replace(plain, scorer=ScorerSpec(f"local-dir:{file.parent}"))]
    assert placed[0].hash({}) == placed[2].hash({}) and placed[1].hash({}) == placed[3].hash({})
    assert len({plain.hash({}), placed[0].hash({}), placed[1].hash({})}) == 3


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
