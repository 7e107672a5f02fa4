"""The benchmark uses the same noise for every model, resumes to the same figures, and survives failures."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil

import diffusers
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch import nn

from stepdistill import embedded, holds
from stepdistill.draws import Draws
from stepdistill.errors import InputError
from stepdistill.evaluation import generate, metrics, models, protocols, records, spec, suite
from stepdistill.evaluation import settings as settings_module
from stepdistill.evaluation.attributes import Probes
from stepdistill.evaluation.clip import ClipModel
from stepdistill.evaluation.features import Extractor
from stepdistill.evaluation.frame import Frame
from stepdistill.evaluation.frechet import Moments, frechet_distance
from stepdistill.evaluation.metrics import Instruments
from stepdistill.evaluation.protocols import ExtractorSpec, Protocol, SamplerSpec, load_protocol
from stepdistill.evaluation.records import FIELDS, read_rows
from stepdistill.evaluation.reference import origin_of, reference_statistics, statistics_name
from stepdistill.evaluation.sets import EvalSet, open_set
from stepdistill.evaluation.spec import ModelSpec
from stepdistill.evaluation.statistics import Origin, save_statistics

QUIET = suite.Settings(batch=3, latency_repeats=1, grid=2, progress=False)
PROMPTS = ["a red cat", "the green dog", "a <script> hat", "a face", "a blue hat"]


class Pools(nn.Module):
    """2 x 2 averages: twelve features."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, pixels):
        return nn.functional.adaptive_avg_pool2d(pixels, 2).flatten(1) * self.scale / 255


class Towers(nn.Module):
    """An image tower of channel means, a text tower of word lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def encode_image(self, pixels):
        return pixels.mean((2, 3)) * self.scale + 1.1

    def encode_text(self, ids):
        return ids.float() * self.scale


def words(prompts):
    return torch.tensor([[len(p), p.count("a") + 1, 1] for p in prompts])


def instruments() -> Instruments:
    """The instruments of the tiny protocol: five prompts, five images, and one-line networks."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (5, 3, 32, 32), generator=generator, dtype=torch.uint8)
    truth = [{"hat": "no" if i % 2 else "yes"} for i in range(5)]
    prompts = EvalSet("set", "k" * 64, 5, PROMPTS, lambda a, b: pictures[a:b], truth, [["hat"]] * 5)
    extractor = Extractor("pools", "Pools", Pools(), 12, 32, "nearest", "w")
    reference = Moments.of(torch.rand(40, 12, generator=generator))
    clip = ClipModel("towers", Towers(), words, None, (32, 32), (0.5,) * 3, (0.5,) * 3)
    probes = Probes({"hat": ["no", "yes"]}, {"hat": torch.zeros(2, 3)}, {"hat": torch.tensor([0.0, 1.0])})
    return Instruments(prompts, extractor, reference, clip, probes, (("prompts", "k"),))


TINY = Protocol("tiny", 5, "set", "set", ExtractorSpec("pools"), guidance=2.0)


@pytest.fixture
def tools() -> Instruments:
    return instruments()


@pytest.fixture
def protocol() -> Protocol:
    return TINY


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("suite") / "base")


def run(models, protocol, tools, out, steps=(1, 2), **options):
    return suite.evaluate(models, protocol, steps, out=out, settings=QUIET, instruments=tools, **options)


def test_rows_have_every_field_and_the_figures_of_a_hand_computation(base, protocol, tools, tmp_path):
    results = run(f"teacher={base},scheduler=ddim", protocol, tools, tmp_path, command="bench it")
    assert [(r["model"], r["steps"]) for r in results.rows] == [
        ("real", 0),
        ("reconstruction", 0),
        ("teacher", 1),
        ("teacher", 2),
    ]
    row = results.rows[-1]
    assert set(row) == set(FIELDS) and read_rows(tmp_path / "results.jsonl") == results.rows
    assert row["nfe"] == 4 and row["guidance"] == 2.0 and row["n"] == 5
    assert (row["scheduler"], row["spacing"]) == ("DDIMScheduler", "trailing")
    assert row["method"] == "teacher" and row["command"] == "bench it" and row["fd_extractor"] == "Pools"
    assert set(row["latency_ms"]) >= {"text", "denoiser_step", "decode", "total_p50", "total_p90"}

    from stepdistill.evaluation import models, spec

    pipe = models.load(spec.parse(f"{base},scheduler=ddim"))
    images = pipe(PROMPTS, num_inference_steps=2, guidance_scale=2.0, generator=Draws.at(0, 0, 5).generators).images
    pictures = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    features = tools.extractor(pictures)
    assert row["fd"] == pytest.approx(frechet_distance(Moments.of(features), tools.reference), abs=2e-3)
    scores = 100 * torch.cosine_similarity(
        pictures.float().div(127.5).sub(1).mean((2, 3)) + 1.1, words(PROMPTS).float()
    )
    assert row["clip_score"] == pytest.approx(scores.clamp_min(0).mean().item(), abs=0.05)
    assert row["attribute_accuracy"] == 0.6
    told, whole = (row["metrics"][name] for name in ("attribute:hat", "attribute_accuracy"))
    assert told == whole and told["low"] < told["value"] == 0.6 < told["high"] and (told["n"], told["trials"]) == (5, 5)


@pytest.mark.parametrize("size", [2, 3])
def test_attributes_are_compared_with_the_truth_of_the_same_image_in_every_batch(tools, size):
    """The probes find a hat where an image is red and long hair where it is green; yellow is both."""
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [255, 255, 0], [0, 0, 255], [255, 0, 0]], dtype=torch.uint8)
    found = colours[:, :, None, None].expand(-1, -1, 32, 32)
    drawn = [("yes", "long"), ("yes", "long"), ("yes", "short"), ("no", "long"), ("no", "short")]
    truth = [{"hat": hat, "hair": hair} for hat, hair in drawn]
    mentioned = [["hat"], ["hat", "hair"], ["hair"], [], ["hat", "hair"]]
    classes = {"hat": ["no", "yes"], "hair": ["short", "long"]}
    weights = {"hat": torch.tensor([[0.0, 0, 0], [1, 0, 0]]), "hair": torch.tensor([[0.0, 0, 0], [0, 1, 0]])}
    probes = Probes(classes, weights, dict.fromkeys(classes, torch.tensor([0.5, 0.0])))
    prompts = dataclasses.replace(tools.prompts, attributes=truth, mentioned=mentioned)
    measured = metrics.Pass(dataclasses.replace(tools, prompts=prompts, probes=probes, metrics=("attributes",)))
    for start in range(0, 5, size):
        measured.add(start, found[start : start + size])
    figures = measured.figures()
    # right of asked: 1/1, 1/2, 0/1, 0/0, 1/2; the fourth is not counted, the others are asked 3/2 times on average
    assert {name: figure.value for name, figure in figures.items()} == pytest.approx(
        {"attribute_accuracy": 1 / 2, "attribute:hat": 1 / 3, "attribute:hair": 2 / 3}
    )
    assert {name: figure.influence.tolist() for name, figure in figures.items()} == {
        "attribute_accuracy": pytest.approx([1 / 3, 0, -1 / 3, 0]),
        "attribute:hat": pytest.approx([2 / 3, -1 / 3, -1 / 3]),
        "attribute:hair": pytest.approx([1 / 3, -2 / 3, 1 / 3]),
    }


def test_another_way_of_calling_a_pipeline_is_another_cell(base, protocol, tools, tmp_path):
    model = f"teacher={base},scheduler=lcm"
    ways = ("", ",timesteps=499", "")
    own, later, again = (run(model + way, protocol, tools, tmp_path, (1,)).rows[-1] for way in ways)
    assert own["call"] is None and later["call"] == {"timesteps": [499]}
    assert later["fd"] != own["fd"] and again == own


def test_a_setting_that_weights_do_not_know_is_another_models_and_rows_of_before_it_was_told_still_count(
    protocol, tools, tmp_path, monkeypatch
):
    place, file = tmp_path / "base", tmp_path / "out" / "results.jsonl"
    tiny.save(place)
    first = run(f"t={place},scheduler=ddim", protocol, tools, tmp_path / "out", (1,)).rows[-1]
    config = place / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0.25}))
    row = run(f"t={place},scheduler=ddim", protocol, tools, tmp_path / "out", (1,)).rows[-1]
    assert row["weights"] == first["weights"] and row["fd"] != first["fd"]
    assert records.grid_name(row) != records.grid_name(first)
    file.write_text(json.dumps({k: v for k, v in row.items() if k != "setup"}) + "\n")  # as earlier versions wrote
    monkeypatch.setattr(generate.Series, "draw", None)
    again = run(f"t={place},scheduler=ddim", protocol, tools, tmp_path / "out", (1,)).rows[-1]
    assert again["fd"] == row["fd"] and "setup" not in again


def test_larger_pictures_are_drawn_fewer_at_a_time_where_nobody_says_how_many(
    base, protocol, tools, tmp_path, monkeypatch
):
    assert [suite.Settings().batch_of(side) for side in (None, 32, 256, 512, 1024, 4096)] == [64, 64, 64, 16, 4, 1]
    assert suite.Settings(batch=3).batch_of(1024) == 3
    monkeypatch.setattr(settings_module, "SIDE", 8)  # this model's images are of 32
    own = dataclasses.replace(QUIET, batch=None)
    results = suite.evaluate(f"t={base}", protocol, (1,), out=tmp_path, settings=own, instruments=tools)
    assert [(row["model"], row["batch"]) for row in results.rows] == [("real", 64), ("reconstruction", 4), ("t", 4)]


def test_a_model_of_another_size_than_the_protocol_compares_is_refused(base, tools, tmp_path):
    frameless = dataclasses.replace(TINY, size=64)
    (failure,) = run(f"t={base}", frameless, tools, tmp_path / "a", (1,)).failed
    assert "--model t: got a model of 32 pixels, and tiny has 64" in failure.reason
    assert not run(f"t={base}", dataclasses.replace(TINY, size=32), tools, tmp_path / "b", (1,)).failed
    assert not run(f"t={base}", dataclasses.replace(frameless, frame=Frame(64)), tools, tmp_path / "c", (1,)).failed


def test_a_lack_of_memory_is_said_with_what_to_lower(base, protocol, tools, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(generate.Series, "draw", full)
    (failure,) = run(f"t={base},guidance=9", protocol, tools, tmp_path, (1,)).failed  # its images are not cached yet
    assert failure.reason == "memory: got no room for 3 pictures at a time; allowed: fewer; lower --batch"


def test_what_was_measured_is_kept_where_the_timing_fails(base, protocol, tools, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("stepdistill.evaluation.latency.measure", fails)
    results = run(f"teacher={base},scheduler=ddim", protocol, tools, tmp_path, (1,))
    assert results.rows[-1]["fd"] > 0 and results.rows[-1]["latency_ms"] is None
    assert [(f.steps, f.reason) for f in results.failed] == [(1, "RuntimeError: out of memory")]
    assert read_rows(tmp_path / "results.jsonl") == results.rows


def test_a_model_that_is_not_sampled_as_its_protocol_says_is_said_once(base, protocol, tools, capsys):
    asked = dataclasses.replace(protocol, sampler=SamplerSpec("ddim", "leading"))
    shown = dataclasses.replace(QUIET, progress=True, latency_repeats=0, floor=False)
    ddim = ("scheduler", "ddim")
    parts = ModelSpec(str(base), "parts", changes=((1, (ddim,)), (2, (ddim, ("guidance", 2.0)))))
    specs = {"as-asked": str(base), "parts": parts, "other": f"{base},scheduler=euler,guidance=3"}
    assert not suite.evaluate(specs, asked, (1, 2), settings=shown, instruments=tools).failed
    said = [line for line in capsys.readouterr().err.splitlines() if "differs" in line]
    assert said == [
        "parts differs from tiny: spacing trailing instead of leading",
        "other differs from tiny: scheduler EulerDiscreteScheduler instead of DDIMScheduler, spacing trailing instead "
        "of leading, guidance 3 instead of 2",
    ]


def test_a_folder_that_another_benchmark_writes_to_is_refused(base, protocol, tools, tmp_path):
    with holds.claimed(tmp_path), pytest.raises(InputError, match="another process is writing to; allowed: one"):
        run(f"t={base}", protocol, tools, tmp_path, (1,))
    assert not run(f"t={base}", protocol, tools, tmp_path, (1,)).failed


def test_rows_are_read_once_no_other_process_can_add_any(base, protocol, tools, tmp_path, monkeypatch):
    """Rows that another process added in between would be lost when the file is written again."""
    read, told = records.read_rows, []

    def spy(file):
        with holds.alone(file.parent) as free:
            told.append(free)
        return read(file)

    run(f"t={base}", protocol, tools, tmp_path, (1,))
    monkeypatch.setattr(records, "read_rows", spy)
    run(f"t={base}", protocol, tools, tmp_path, (1,))
    assert told == [False]


def test_too_few_pictures_for_a_metric_are_refused_before_any_is_drawn():
    few = dataclasses.replace(load_protocol("avatars-2k"), n=5)
    with pytest.raises(InputError, match=r"got n=5 with the metric prdc; allowed: 6 or more; raise n"):
        metrics.prepare(few)


def test_diversity_is_that_of_four_more_pictures_of_each_prompt(base, protocol, tools, tmp_path, monkeypatch):
    monkeypatch.setattr("stepdistill.evaluation.measures.diversity.trunk", lambda: False)
    several = dataclasses.replace(tools, metrics=("fd", "diversity"))
    row = run(f"teacher={base},scheduler=ddim", protocol, several, tmp_path, (1,)).rows[-1]
    pipe = models.load(spec.parse(f"{base},scheduler=ddim"))
    total = 0.0
    for i, prompt in enumerate(PROMPTS):  # the five images of the cell have noise 0 to 4
        options = {"num_inference_steps": 1, "guidance_scale": 2.0, "output_type": "pt"}
        images = pipe([prompt] * 4, generator=Draws.at(0, 5 + 4 * i, 4).generators, **options).images
        features = tools.extractor(generate.to_uint8(images)).double()
        cosines = torch.nn.functional.cosine_similarity(features[:, None], features[None], dim=-1)
        total += (1 - cosines).triu(1).sum().item() / 6
    figure = row["metrics"]["diversity_features"]
    assert figure["value"] == pytest.approx(total / 5, rel=1e-3) and figure["n"] == 5 and figure["of"] == "prompts"
    assert row["metrics"]["fd"]["n"] == 5 and row["nfe"] == 2 and "diversity_features" not in run(
        f"teacher={base},scheduler=ddim", protocol, tools, tmp_path / "without", (1,)
    ).rows[-1]["metrics"]  # fmt: skip


def test_every_step_count_starts_from_the_same_latents(base, protocol, tools, tmp_path, monkeypatch):
    from diffusers import StableDiffusionPipeline

    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path))
    seen: dict[int, list] = {}
    original = StableDiffusionPipeline.prepare_latents

    def spy(self, *args, **kwargs):
        latents = original(self, *args, **kwargs)
        seen.setdefault(len(latents), []).append(latents.clone())
        return latents

    monkeypatch.setattr(StableDiffusionPipeline, "prepare_latents", spy)
    run({"a": f"{base},scheduler=ddim", "b": f"{base},scheduler=lcm"}, protocol, tools, None)
    for batch in (3, 2):
        assert len(seen[batch]) >= 4 and all(torch.equal(x, seen[batch][0]) for x in seen[batch])


def test_a_second_run_measures_nothing_again_and_a_cut_one_gets_the_same_figures(
    base, protocol, tools, tmp_path, monkeypatch
):
    model = f"t={base},scheduler=ddim"
    first = run(model, protocol, tools, tmp_path).rows
    file = tmp_path / "results.jsonl"
    whole = file.read_text()

    def never(*_, **__):
        raise AssertionError("drawn again")

    with monkeypatch.context() as patch:
        patch.setattr(generate.Sampler, "__call__", never)
        assert run(model, protocol, tools, tmp_path).rows == first
    assert file.read_text() == whole
    file.write_text("".join(line + "\n" for line in whole.splitlines()[:3]))
    again = run(model, protocol, tools, tmp_path).rows
    quality = (
        "model",
        "steps",
        "fd",
        "fd_low",
        "fd_high",
        "clip_score",
        "attribute_accuracy",
        "weights",
        "protocol_hash",
    )
    assert [[r[k] for k in quality] for r in again] == [[r[k] for k in quality] for r in first]


def test_a_model_that_fails_is_reported_and_the_others_finish(base, protocol, tools, tmp_path, monkeypatch):
    shutil.copytree(base, tmp_path / "bad")
    (tmp_path / "bad" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"nothing")
    models = [f"bad={tmp_path / 'bad'}", f"good={base},scheduler=ddim"]
    results = run(models, protocol, tools, tmp_path / "out", (1,))
    assert [(f.model, f.steps) for f in results.failed] == [("bad", None)]
    assert "could not be loaded" in results.failed[0].reason
    assert [r["model"] for r in results.rows] == ["real", "reconstruction", "good"]


def test_a_folder_closed_to_the_user_is_that_models_failure_alone(base, protocol, tools, tmp_path, monkeypatch):
    own = models.load

    def load(spec, **options):
        if spec.name != "good":
            raise PermissionError(errno.EACCES, "Permission denied", "/closed")
        return own(spec, **options)

    monkeypatch.setattr("stepdistill.evaluation.bench.load", load)
    parts = ModelSpec("closed", "bad", changes=((1, ()), (2, (("guidance", 3.0),))))
    results = run({"bad": parts, "good": spec.parse(f"{base},name=good")}, protocol, tools, tmp_path)
    said = "PermissionError: [Errno 13] Permission denied: '/closed'"
    assert [(f.model, f.steps, f.reason) for f in results.failed] == [("bad", None, said)]  # once for both its parts
    assert [(row["model"], row["steps"]) for row in results.rows[-2:]] == [("good", 1), ("good", 2)]


def test_a_cell_that_fails_is_reported_and_the_other_steps_finish(protocol, tools):
    results = run({"p": tiny.sd()}, protocol, tools, None, steps=(1, 2000))
    assert [f.steps for f in results.failed] == [2000] and "1000" in results.failed[0].reason
    assert [r["steps"] for r in results.rows] == [0, 0, 1]


@pytest.mark.parametrize("scheduler", ["LCMScheduler", "TCDScheduler"])
def test_default_steps_beyond_a_schedulers_grid_are_left_out_and_named_ones_fail(protocol, tools, scheduler, capsys):
    pipe = tiny.sd()
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, original_inference_steps=10)
    shown = dataclasses.replace(QUIET, progress=True)
    results = suite.evaluate({"s": pipe}, protocol, settings=shown, instruments=tools)
    assert [r["steps"] for r in results.rows if r["steps"]] == [1, 2, 4, 8] and not results.failed
    assert "s: skipped at 50 steps; its scheduler has 10" in capsys.readouterr().err
    results = run({"s": pipe}, protocol, tools, None, steps=(2, 11))
    assert [(f.steps, f.reason) for f in results.failed] == [
        (11, "steps: got 11; allowed: 1 to 10, the time grid of its scheduler")
    ]


def test_a_disk_that_is_full_or_closed_ends_the_run_and_is_no_models_failure(protocol, tools, tmp_path, monkeypatch):
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):

        def refuse(*_, code=code):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(records.Book, "add", refuse)
        with pytest.raises(OSError, match=os.strerror(code)):
            run({"p": tiny.sd()}, protocol, tools, tmp_path, (1,))


def test_a_student_told_its_guidance_is_no_teacher_and_costs_one_call_a_step(protocol, tools):
    pipe = tiny.sd(unet_options={"time_cond_proj_dim": 8})
    row = run({"s": pipe}, protocol, tools, None, (2,)).rows[-1]
    assert (row["method"], row["nfe"], row["guidance"]) == ("student", 2, 2.0)


def test_nan_pictures_fail_their_cell_with_a_clear_line(protocol, tools):
    pipe = tiny.sd()
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(float("nan"))
    results = run(pipe, protocol, tools, None, (1,))
    assert "NaN" in results.failed[0].reason and "dtype=fp32" in results.failed[0].reason


def test_a_figure_that_is_not_finite_fails_its_cell_and_the_others_finish(base, protocol, tools, tmp_path, monkeypatch):
    own, count = metrics.METRICS["clip"].figures, iter(range(9))

    def broken(kept, tools):
        found = own(kept, tools)["clip_score"]
        return {"clip_score": dataclasses.replace(found, value=float("nan")) if next(count) == 1 else found}

    monkeypatch.setattr(metrics.METRICS["clip"], "figures", staticmethod(broken))
    quiet = dataclasses.replace(QUIET, floor=False)
    models = f"{base},scheduler=ddim"
    results = suite.evaluate(models, protocol, (1, 2, 4), out=tmp_path, settings=quiet, instruments=tools)
    assert [row["steps"] for row in read_rows(tmp_path / "results.jsonl")] == [1, 4]
    (failure,) = results.failed
    assert failure.steps == 2 and failure.reason.startswith("metric clip_score: got nan ± ")
    assert "allowed: finite numbers" in failure.reason and "\n" not in failure.reason


def test_an_autoencoder_that_half_overflows_reconstructs_as_in_full_precision():
    whole, half = tiny.sdxl(), tiny.sdxl()
    for pipe in (whole, half):
        with torch.no_grad():
            pipe.vae.decoder.conv_in.weight.mul_(4e4)  # its output exceeds 65504; a norm follows
        pipe.vae.half()
    whole.vae.float()
    pictures = instruments().prompts.pictures(0, 2)
    half.vae.register_to_config(force_upcast=False)
    with pytest.raises(InputError, match="got NaN"):
        generate.reconstruct(half, pictures)
    half.vae.register_to_config(force_upcast=True)
    assert torch.equal(generate.reconstruct(half, pictures), generate.reconstruct(whole, pictures))
    assert half.vae.dtype == torch.float16


def test_rows_of_another_protocol_are_not_mixed_in(base, protocol, tools, tmp_path):
    run(f"t={base}", protocol, tools, tmp_path, (1,))
    with pytest.raises(InputError, match=r"differ in n 5 and 4; .*cannot be compared"):
        run(f"t={base}", protocol, tools, tmp_path, (1,), n=4)


def test_seeds_of_one_protocol_go_into_one_file(base, protocol, tools, tmp_path):
    a = run(f"t={base}", protocol, tools, tmp_path, (1,)).rows[-1]
    b = run(f"t={base}", protocol, tools, tmp_path, (1,), seed=1).rows[-1]
    assert len(read_rows(tmp_path / "results.jsonl")) == 4  # the floors have no seed, and are there once
    assert a["protocol_hash"] == b["protocol_hash"] and (a["seed"], b["seed"]) == (0, 1) and a["fd"] != b["fd"]


def test_grids_are_kept_with_small_pictures_enlarged_pixel_by_pixel(base, protocol, tools, tmp_path):
    run(f"t={base}", protocol, tools, tmp_path, (1,))
    real = next((tmp_path / "grids").glob("real_0_*.png"))
    strip = np.asarray(Image.open(real))
    assert strip.shape == (96, 2 * 96, 3)
    assert (strip[:3, :3] == tools.prompts.pictures(0, 1)[0, :, 0, 0].numpy()).all()
    assert json.loads((tmp_path / "grids" / "prompts.json").read_text()) == PROMPTS[:2]


def test_a_pixel_model_is_measured_without_prompts(protocol, tools):
    plain = dataclasses.replace(tools, prompts=EvalSet("none", "k" * 64, 5), clip=None, probes=None)
    results = run({"p": tiny.pixel()}, protocol, plain, None, (1, 2))
    assert [r["nfe"] for r in results.rows] == [1, 2] and results.rows[0]["clip_score"] is None and not results.failed


@pytest.mark.parametrize("steps", [(), (0,), (4, -1), (1.5,)])
def test_steps_below_one_are_refused(protocol, tools, steps):
    with pytest.raises(InputError, match="steps: got"):
        run("avatars", protocol, tools, None, steps=steps)


def test_the_shipped_protocol_loads_and_its_hash_covers_settings_and_content_but_not_words_or_seed():
    found = load_protocol("avatars-2k")
    assert found.n == 2000 and found.extractor.name == "efficientnet_lite2" and "avatars-2k" in protocols.names()
    same = dataclasses.replace(found, description="other words", seed=7)
    assert found.hash({"a": "1"}) == same.hash({"a": "1"})
    others = {found.hash({"a": "2"}), dataclasses.replace(found, n=1999).hash({"a": "1"}), found.hash({"a": "1"})}
    assert len(others) == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: x", "no 'n'"),
        ("- a\n- b", "allowed: fields"),
        ("name: x\nn: 1\nprompts: a\nreference: b\nextractor: {name: c}", "n=1"),
        ("name: x\nn: 9\nprompts: a\nreference: b\nextractor: {name: c}\nguidence: 2", "guidence"),
        ("name: x\nn: 9\nprompts: a\nreference: b\nextractor: {nome: c}", "nome"),
        ("name: x\nn: 9\nprompts: a\nreference: b\nextractor: {name: c}\nguidance: 0", "guidance=0"),
        ("name: [", "no YAML"),
    ],
)
def test_a_broken_protocol_is_said_in_one_line(tmp_path, text, words):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(InputError, match=words) as caught:
        load_protocol(tmp_path / "p.yaml")
    assert "\n" not in str(caught.value)


def test_an_unknown_protocol_and_too_few_prompts_are_refused(tmp_path):
    with pytest.raises(InputError, match="avatars-2k"):
        load_protocol("coco")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    few = Protocol("few", 3, str(tmp_path / "prompts.txt"), "avatars:test", ExtractorSpec("efficientnet_lite2"))
    with pytest.raises(InputError, match="got 2 prompts for n=3"):
        metrics.prepare(few)


def test_statistics_are_cached_by_content_and_rebuilt_when_damaged(pictures, tmp_path, tools):
    reference = open_set(pictures)
    assert reference.count == 6 and reference.prompts[0] == "a red cat with a blue hat"
    told: list[int] = []

    def make():
        return reference_statistics(
            tools.extractor, reference, batch=4, folder=tmp_path, progress=lambda done, _: told.append(done)
        )

    first = make()
    assert told == [4, 2] and first.count == 6
    again = make()
    assert told == [4, 2] and torch.equal(again.mean, first.mean)
    kept = next(tmp_path.glob("statistics-*.safetensors"))
    kept.write_bytes(kept.read_bytes()[:100])
    assert torch.equal(make().mean, first.mean) and told == [4, 2, 4, 2]
    save_statistics(kept, Moments.of(torch.rand(9, 12)), Origin("other"))  # of another protocol, under this one's name
    assert torch.equal(make().mean, first.mean) and told == [4, 2] * 3
    other = dataclasses.replace(tools.extractor, resize="bilinear")
    assert statistics_name(other, reference, 6) != statistics_name(tools.extractor, reference, 6)


def test_shipped_statistics_of_another_protocol_are_refused(tmp_path, tools, monkeypatch):
    monkeypatch.setattr(embedded, "path", lambda _: tmp_path)
    reference = dataclasses.replace(tools.prompts, name="avatars:train")
    file = tmp_path / statistics_name(tools.extractor, reference, 5)
    origin = origin_of(tools.extractor, reference, 5)
    save_statistics(file, Moments.of(torch.rand(9, 12)), origin)
    with pytest.raises(InputError, match=f"got {file}, whose count is 9; allowed: 5; delete it"):
        reference_statistics(tools.extractor, reference)


def test_sets_that_are_none_are_refused(tmp_path):
    with pytest.raises(InputError, match="avatars:train"):
        open_set("nothing")
    with pytest.raises(InputError, match="no pictures"):
        open_set(str(tmp_path))
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="which is broken"):
        open_set(str(tmp_path)).pictures(0, 1)
