"""Data about the real images are computed once, cached by content, recomputed if damaged, and used by the metrics."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import types

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from test_measures import brute_prdc
from torch import nn

from stepdistill.errors import InputError
from stepdistill.evaluation import arrays, metrics
from stepdistill.evaluation.clip import ClipModel
from stepdistill.evaluation.features import Extractor
from stepdistill.evaluation.frechet import Moments, frechet_figure
from stepdistill.evaluation.frechet_limit import frechet_limit
from stepdistill.evaluation.kernel import gaussian, mmd_figure, polynomial, within
from stepdistill.evaluation.measures import METRICS, View, copies, diversity, frechet, preference
from stepdistill.evaluation.metrics import Instruments, Pass
from stepdistill.evaluation.protocols import ExtractorSpec, Protocol, load_protocol
from stepdistill.evaluation.real import RealPictures, small
from stepdistill.evaluation.reference import reference_statistics
from stepdistill.evaluation.sets import EvalSet, open_set
from stepdistill.evaluation.statistics import load_statistics


class Pools(nn.Module):
    """2 x 2 averages: twelve features; counts the images it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.seen = nn.Parameter(torch.ones(())), 0

    def forward(self, pixels):
        self.seen += len(pixels)
        return nn.functional.adaptive_avg_pool2d(pixels, 2).flatten(1) * self.scale / 255

    encode_image = forward


def pictures(n: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, 32, 32), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def real_of(found: torch.Tensor, folder, *, key: str = "k", few: int = 20, clip: ClipModel | None = None):
    reference = EvalSet("set", key, len(found), None, lambda a, b: found[a:b])
    extractor = Extractor("pools", "Pools", Pools(), 12, 32, "nearest", "w")
    return RealPictures(reference, extractor, few, len(found), clip, "c", 8, folder)


def test_features_are_made_once_and_found_again_under_their_content(tmp_path):
    found = pictures(30, 0)
    first = real_of(found, tmp_path)
    assert first.features.shape == (20, 12) and torch.equal(first.features, first.extractor(found[first.numbers]))
    again = real_of(found, tmp_path)
    assert torch.equal(again.features, first.features) and again.extractor.net.seen == 0
    assert torch.equal(again.pixels, found.flatten(1))
    for other in (
        real_of(found, tmp_path, key="other"),
        real_of(found, tmp_path, few=19),
        dataclasses.replace(again, extractor=dataclasses.replace(again.extractor, weights="v")),
    ):
        before = other.extractor.net.seen
        assert other.features is not None and other.extractor.net.seen > before


def test_embeddings_are_made_again_for_another_preprocessing_of_the_same_weights(tmp_path):
    found, seen = pictures(9, 0), []
    for setup in ("bicubic", "bilinear", "bicubic"):
        clip = ClipModel("pools", Pools(), None, None, (32, 32), (0.5,) * 3, (0.5,) * 3, setup=setup)
        assert real_of(found, tmp_path, few=9, clip=clip).embeddings is not None
        seen.append(clip.model.seen)
    assert seen == [9, 9, 0]


def test_which_real_pictures_are_looked_at_is_drawn_by_a_fixed_seed_and_not_by_their_order(tmp_path):
    found = pictures(300, 0)
    real = real_of(found, tmp_path, few=60)
    assert real.numbers == sorted(set(real.numbers)) and len(real.numbers) == 60
    assert real.numbers == torch.randperm(300, generator=torch.Generator().manual_seed(0))[:60].sort().values.tolist()
    assert 15 < sum(number < 100 for number in real.numbers) < 25  # a third of them from the first third
    assert real_of(found, tmp_path, few=300).numbers == list(range(300))


def test_pictures_of_any_numbers_are_those_of_a_folder_in_order(tmp_path):
    found = pictures(9, 3)
    for i, picture in enumerate(found):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    held = open_set(str(tmp_path))
    for numbers in ([0, 3, 4, 8], list(range(9)), [7]):
        assert torch.equal(torch.cat(list(held.some(3, numbers))), found[numbers])
    with pytest.raises(InputError, match="got 9 pictures; allowed: 10 or more"):
        list(held.some(3, [2, 9]))


@pytest.mark.parametrize("damage", ["a byte", "cut", "another file"])
def test_a_damaged_file_is_known_by_its_hash_and_made_again(tmp_path, damage):
    found = pictures(30, 0)
    want = real_of(found, tmp_path).features
    file = next(tmp_path.glob("features-*"))
    data = bytearray(file.read_bytes())
    if damage == "a byte":
        data[-5] ^= 1
    file.write_bytes(data[:-9] if damage == "cut" else b"{}" if damage == "another file" else data)
    with pytest.raises(InputError, match="damaged"):
        arrays.load(file)
    assert torch.equal(real_of(found, tmp_path).features, want)
    assert torch.equal(arrays.load(file)[0]["array"], want)


def test_moments_with_one_wrong_byte_are_made_again(tmp_path):
    real = real_of(pictures(30, 0), tmp_path)
    want = reference_statistics(real.extractor, real.reference, batch=8, folder=tmp_path)
    file = next(tmp_path.glob("statistics-*"))
    data = bytearray(file.read_bytes())
    data[-5] ^= 64
    file.write_bytes(data)
    assert torch.equal(reference_statistics(real.extractor, real.reference, batch=8, folder=tmp_path).mean, want.mean)
    assert load_statistics(file)[0].count == 30


def test_statistics_take_the_features_that_are_known_and_look_at_the_rest_alone(tmp_path):
    real = real_of(pictures(30, 0), tmp_path)
    plain = reference_statistics(real.extractor, real.reference, folder=tmp_path / "a")
    assert len(real.features) == 20
    real.extractor.net.seen = 0
    known = reference_statistics(real.extractor, real.reference, folder=tmp_path / "b", known=real)
    assert real.extractor.net.seen == 10 and known.count == 30
    assert torch.allclose(known.scatter, plain.scatter, rtol=1e-9, atol=1e-12)


def test_a_cache_that_cannot_be_written_is_said_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    real = real_of(pictures(9, 0), tmp_path / "file")
    with pytest.raises(InputError, match="STEPDISTILL_CACHE"):
        _ = real.pixels
    assert real.extractor.net.seen == 0


@pytest.fixture
def tools(tmp_path) -> Instruments:
    found = pictures(40, 1)
    clip = ClipModel("pools", Pools(), None, None, (32, 32), (0.5,) * 3, (0.5,) * 3)
    real = real_of(found, tmp_path, clip=clip)
    prompts = EvalSet("set", "k", 40, [f"a cat {i}" for i in range(40)])
    moments = Moments.of(real.extractor(found))
    names = ("fd", "fd_inf", "kid", "prdc", "cmmd", "copies", "diversity", "attributes")
    return Instruments(prompts, real.extractor, moments, clip, None, (), names, real)


def test_one_pass_gives_every_figure_that_the_instruments_allow_with_its_value_number_and_unit(tools):
    measured, found = Pass(tools), pictures(30, 2)
    for first in range(0, 30, 8):
        measured.add(first, found[first : first + 8])
    assert tools.extractor.net.seen == 40 + 30  # each image once, for five metrics
    figures = measured.figures()
    better = {name: way for metric in METRICS.values() for name, way in metric.better.items()}
    assert set(figures) - set(better) == {"copies"}  # fewer than expected are no better
    assert all((len(f.influence), f.unit) == (30, "pictures") for f in figures.values())
    known = pictures(40, 1)[tools.real.numbers]
    x, y = tools.extractor(found).double(), tools.extractor(known).double()
    a, b = tools.clip.images(found), tools.clip.images(known)
    pixels = pictures(40, 1).flatten(1).double()
    near, apart = (torch.cdist(z, pixels).sort().values for z in (found.flatten(1).double(), pixels))
    apart = apart[:, 1:]  # a real image is at 0 from itself
    nearness, limit = near[:, 0] / near.mean(1), (apart[:, 0] / apart.mean(1)).min()
    want = brute_prdc(x, y) | {
        "fd": frechet_figure(x, tools.reference).value, "fd_inf": frechet_limit(x, tools.reference).value,
        "kid": mmd_figure(x, y, polynomial, within(y, polynomial)).value,
        "cmmd": mmd_figure(a, b, gaussian, within(b, gaussian), 1000.0).value,
        "copies": (nearness <= limit).double().mean().item(),
    }  # fmt: skip
    assert {name: figure.value for name, figure in figures.items()} == pytest.approx(want, rel=1e-6)
    row = metrics.row_of(figures, tools)["metrics"]
    assert row["recall"]["n"] == 30 and row["recall"]["trials"] == 20
    assert row["kid"]["low"] < row["kid"]["value"] < row["kid"]["high"]
    assert row["fd_inf"]["bend"] == pytest.approx(figures["fd_inf"].bend, abs=1e-6) and "bend" not in row["fd"]


def test_the_whole_is_decomposed_once_for_both_distances(tools, monkeypatch):
    measured, whole = Pass(dataclasses.replace(tools, metrics=("fd", "fd_inf"))), []
    measured.add(0, pictures(30, 2))
    monkeypatch.setattr(frechet, "frechet_figure", lambda *given: whole.append(given) or frechet_figure(*given))
    assert measured.figures()["fd"].value > 0 and len(whole) == 1


def test_fd_inf_is_left_out_where_its_features_are_too_long_for_n_and_that_is_said(capsys):
    few = dataclasses.replace(load_protocol("avatars-2k"), n=1919, metrics=("fd", "fd_inf"), scorer=None)
    assert metrics.prepare(few).metrics == ("fd",)
    said = capsys.readouterr().err
    assert said == (
        "fd_inf is omitted: got n=1919; it needs 1.5 images for each of EfficientNet-Lite2's 1280 features\n"
    )
    enough = dataclasses.replace(few, n=1920)
    assert metrics.prepare(enough).metrics == ("fd", "fd_inf") and not capsys.readouterr().err


def test_a_metric_whose_figures_changed_their_meaning_changes_the_hash():
    fd = dataclasses.replace(load_protocol("avatars-2k"), metrics=("fd",), scorer=None)
    both = dataclasses.replace(fd, metrics=("fd", "fd_inf"))
    assert "fd_inf revision" in dict(metrics.prepare(both).content)
    assert set(dict(metrics.prepare(fd).content)) == {"prompts", "reference", "extractor"}


def test_the_embedded_protocol_prepared_has_the_hash_of_its_recorded_rows(monkeypatch):
    """The reference's statistics ship, so no image is looked at; LPIPS, wherever it is present, changes the hash."""
    monkeypatch.setattr(diversity, "trunk", lambda: False)
    for n, recorded in ((2000, "2276370210f19163"), (1000, "f8a77a9b4e31e0e2")):
        protocol = dataclasses.replace(load_protocol("avatars-2k"), n=n)
        assert protocol.hash(dict(metrics.prepare(protocol).content)) == recorded


def test_a_reference_that_a_metric_has_too_few_pictures_of_is_refused_before_anything_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(
        metrics, "load_extractor", lambda *_, **__: Extractor("p", "P", Pools(), 12, 32, "bilinear", "w")
    )
    for i in range(3):
        Image.fromarray(np.full((32, 32, 3), 40 * i, dtype=np.uint8)).save(tmp_path / f"{i}.png")
    few = Protocol("few", 12, "avatars:test", str(tmp_path), ExtractorSpec("pools"), metrics=("fd", "prdc"))
    with pytest.raises(InputError, match="few: got a reference of 3 pictures with the metric prdc; allowed: 6 or more"):
        metrics.prepare(few)


def test_lpips_weights_are_in_the_hash(monkeypatch):
    assert METRICS["diversity"].prepare("cpu") == {}
    monkeypatch.setattr(diversity, "trunk", lambda: True)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        net = torch.nn.Linear(2, 2)
        monkeypatch.setattr(diversity, "_lpips", lambda device, net=net: net)
        found.append(METRICS["diversity"].prepare("cpu")["lpips"])
    assert found[0] == found[1] != found[2]


class Hps(torch.nn.Module):
    """A network in the form of HPSv2's: the cosine is that of the mean colour and three numbers of the prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.calls = torch.nn.Parameter(torch.zeros(3)), 0

    def forward(self, pictures, texts):
        self.calls += 1
        image, text = pictures.mean((2, 3)) * self.scale, texts.float()
        return {"image_features": image / image.norm(dim=1, keepdim=True),
                "text_features": text / text.norm(dim=1, keepdim=True)}  # fmt: skip


def letters(prompts):
    return torch.tensor([[len(p), 1, ord(p[-1]) - 45] for p in prompts])


@pytest.fixture
def hps(tmp_path, monkeypatch):
    """A module in the place of the package hpsv2; records what was loaded and asked for."""
    import huggingface_hub

    names = ("hpsv2", "hpsv2.img_score", "hpsv2.utils", "hpsv2.src", "hpsv2.src.open_clip")
    fake = {name: types.ModuleType(name) for name in names}
    package, score = fake["hpsv2"], fake["hpsv2.img_score"]
    package.img_score, package.asked, package.built = score, [], 0
    fake["hpsv2.utils"].hps_version_map = {"v2.1": "HPS_v2.1_compressed.pt"}
    fake["hpsv2.src.open_clip"].get_tokenizer = lambda name: letters
    score.model_dict = {}

    def initialize_model():
        package.built += 1
        as_floats = lambda picture: torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255  # noqa: E731
        score.model_dict.update(model=Hps(), preprocess_val=as_floats)

    score.initialize_model = initialize_model
    for name, module in fake.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(preference, "find_spec", lambda name: name)
    weights = tmp_path / "weights"
    torch.save({"state_dict": {"scale": torch.tensor([1.0, 2.0, 0.5])}}, weights)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *what: package.asked.append(what) or weights)
    preference._loaded.cache_clear()
    yield package
    preference._loaded.cache_clear()


def test_hpsv2_is_loaded_once_and_scores_a_batch_at_a_time_with_the_published_weights(hps, tools, tmp_path):
    metric, found = METRICS["hpsv2"], pictures(5, 4)
    content = metric.prepare("cpu")
    kept = torch.cat([metric.see(View(tools, first, found[first : first + 2])) for first in (0, 2, 4)])
    model = hps.img_score.model_dict["model"]
    assert (hps.built, model.calls) == (1, 3) and hps.asked == [("xswu/HPSv2", "HPS_v2.1_compressed.pt")]
    image = found.float().mean((2, 3)) / 255 * torch.tensor([1.0, 2.0, 0.5])
    want = torch.cosine_similarity(image, letters([f"a cat {i}" for i in range(5)]).float())
    assert torch.allclose(kept, want, atol=1e-6) and kept.std() > 0
    assert content == {"hpsv2": hashlib.sha256((tmp_path / "weights").read_bytes()).hexdigest()}
    assert not model.training


def test_weights_that_are_not_hpsv2s_are_refused(hps, tmp_path):
    torch.save({"state_dict": {"other": torch.zeros(3)}}, tmp_path / "weights")
    with pytest.raises(InputError, match=r"hpsv2: got no model of xswu/HPSv2 v2.1 .*check the network") as caught:
        METRICS["hpsv2"].prepare("cpu")
    assert "\n" not in str(caught.value)


def test_imagereward_is_loaded_once_and_scores_each_image_with_its_own_prompt(tools, monkeypatch):
    loaded, fake = [], types.ModuleType("ImageReward")

    class Reward(torch.nn.Linear):
        def score(self, prompt, picture):
            return len(prompt) + np.asarray(picture).mean().item() / 255

    fake.load = lambda name, device: loaded.append((name, device)) or Reward(1, 1)
    monkeypatch.setitem(sys.modules, "ImageReward", fake)
    monkeypatch.setattr(preference, "find_spec", lambda name: name)
    preference._loaded.cache_clear()
    metric, found = METRICS["imagereward"], pictures(4, 4)
    content = metric.prepare("cpu")
    kept = torch.cat([metric.see(View(tools, first, found[first : first + 2])) for first in (0, 2)])
    preference._loaded.cache_clear()
    assert loaded == [("ImageReward-v1.0", "cpu")] and len(content["imagereward"]) == 64
    want = [len(f"a cat {i}") + found[i].double().mean().item() / 255 for i in range(4)]
    assert kept.tolist() == pytest.approx(want, rel=1e-5)


def test_an_imagereward_that_does_not_load_is_refused_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "ImageReward", types.ModuleType("ImageReward"))  # without `load`
    monkeypatch.setattr(preference, "find_spec", lambda name: name)
    preference._loaded.cache_clear()
    with pytest.raises(
        InputError, match=r"imagereward: got no model ImageReward-v1.0 .*; check the network and the pa"
    ):
        METRICS["imagereward"].prepare("cpu")


def test_every_metric_says_what_it_cannot_be_measured_without(tools):
    silent = dataclasses.replace(tools.prompts, prompts=None)
    for name, change, words in (
        ("fd", {"real": None, "clip": None}, None),
        ("kid", {}, None),
        ("kid", {"real": None}, "statistics as the reference"),
        ("copies", {"real": None}, "statistics as the reference"),
        ("cmmd", {}, None),
        ("cmmd", {"real": None}, "statistics as the reference"),
        ("cmmd", {"clip": None, "real": None}, "without a scorer"),
        ("clip", {"clip": None}, "without a scorer"),
        ("clip", {"clip": None, "prompts": silent}, "without prompts"),
        ("attributes", {}, "without probes"),
        ("attributes", {"clip": None, "prompts": silent}, "without prompts"),
        ("diversity", {}, None),
        ("diversity", {"prompts": silent}, "without prompts"),
        ("pickscore", {"prompts": silent}, "without prompts"),
    ):
        why = METRICS[name].lacks(dataclasses.replace(tools, **change))
        assert why is None if words is None else words in why, (name, change)


def test_without_the_real_pictures_metrics_that_need_them_are_left_out(tools):
    measured = Pass(dataclasses.replace(tools, real=None))
    assert [metric.name for metric in measured.metrics] == ["fd", "fd_inf"]


def test_a_model_that_learnt_by_heart_is_found_out_and_one_that_did_not_is_as_expected(tmp_path):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(1500, 4, generator=generator) @ torch.randn(4, 3072, generator=generator) * 20 + 128
    drawn = drawn.clamp(0, 255).to(torch.uint8).view(-1, 3, 32, 32)  # images of few dimensions, as real ones are
    real = real_of(drawn[:500], tmp_path)
    limit = copies.threshold(real)
    spacing = copies.nearness(real.pixels, real.pixels, but_itself=True)
    assert (spacing < limit).double().mean() < 0.01 <= (spacing <= limit).double().mean() < 0.014  # two are a pair
    fresh = copies.nearness(small(drawn[500:]), real.pixels) <= limit
    assert fresh.double().mean().item() == pytest.approx(0.01, abs=0.01)
    noisy = (drawn[:500].int() + torch.randint(-1, 2, (500, 3, 32, 32), generator=generator)).clamp(0, 255).byte()
    assert (copies.nearness(small(noisy), real.pixels) <= limit).all()
    blurred = drawn[:500].float().lerp(drawn.float().mean(0), 0.9).byte()  # near to all images, a copy of none
    assert (copies.nearness(small(blurred), real.pixels) > limit).all()


def test_diversity_is_of_the_extractors_features_where_lpips_trunk_is_not_here(tools, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    metric = METRICS["diversity"]
    assert (metric.each, metric.prompts) == (4, 64)
    kept = metric.see(View(tools, 0, pictures(8, 3)))
    figure = metric.figures(kept, tools)["diversity_features"]
    assert (figure.unit, len(figure.influence)) == ("prompts", 2) and figure.value > 0


@pytest.fixture
def pickscore(tmp_path, monkeypatch):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    torch.manual_seed(0)
    words = tiny.tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": len(words), "max_position_embeddings": 16, "eos_token_id": words.eos_token_id}
    config = CLIPConfig(text_config=text, vision_config=sizes | {"image_size": 24, "patch_size": 8}, projection_dim=8)
    CLIPModel(config).save_pretrained(tmp_path / "pick")
    side = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    CLIPProcessor(CLIPImageProcessor(**side), words).save_pretrained(tmp_path / "pick")
    monkeypatch.setenv(preference.PICKSCORE_PLACE, str(tmp_path / "pick"))
    preference._loaded.cache_clear()
    yield tmp_path / "pick"
    preference._loaded.cache_clear()


def test_pickscore_is_its_clips_scaled_cosine_of_each_picture_and_its_prompt(pickscore, tools):
    from transformers import CLIPModel, CLIPProcessor

    metric = METRICS["pickscore"]
    content = metric.prepare("cpu")
    found = pictures(3, 4)
    kept = torch.cat([metric.see(View(tools, first, found[first : first + 2])) for first in (0, 2)])
    model, processor = CLIPModel.from_pretrained(pickscore), CLIPProcessor.from_pretrained(pickscore)
    for i in range(3):
        picture = Image.fromarray(np.asarray(found[i].permute(1, 2, 0)))
        inputs = processor(text=[f"a cat {i}"], images=[picture], return_tensors="pt")
        with torch.no_grad():
            out = model(**inputs)
        want = model.logit_scale.exp() * torch.cosine_similarity(out.image_embeds, out.text_embeds)
        assert kept[i].item() == pytest.approx(want.item(), rel=1e-4)
    assert metric.figures(kept, tools)["pickscore"].value == pytest.approx(kept.mean().item(), rel=1e-6)
    assert len(content["pickscore"]) == 64


def test_a_preference_model_that_is_not_here_is_said_with_what_to_install(monkeypatch, tmp_path):
    preference._loaded.cache_clear()
    monkeypatch.setenv(preference.PICKSCORE_PLACE, str(tmp_path))
    with pytest.raises(InputError, match=r"pickscore: got .*could not be loaded"):
        METRICS["pickscore"].prepare("cpu")
    monkeypatch.setattr(preference, "find_spec", lambda name: None)
    for name, package in (("hpsv2", "hpsv2"), ("imagereward", "image-reward")):
        with pytest.raises(InputError, match=f"pip install {package}"):
            METRICS[name].prepare("cpu")
