"""Published models are sampled as their authors document: scheduler, times, evaluations and files, on tiny networks."""

from __future__ import annotations

import dataclasses
import math

import pytest
import tiny
import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PixArtAlphaPipeline,
    PNDMScheduler,
)
from oracle import BETAS
from safetensors.torch import save_file

from stepdistill.draws import Draws
from stepdistill.errors import InputError
from stepdistill.evaluation import departures, models, places
from stepdistill.evaluation.catalogue import catalogue, listed
from stepdistill.evaluation.generate import Sampler
from stepdistill.evaluation.latency import Stages
from stepdistill.evaluation.protocols import SamplerSpec, load_protocol
from stepdistill.evaluation.spec import parse, plan_of

TRAILING = {1: [999], 2: [999, 499], 4: [999, 749, 499, 249], 8: [999, 874, 749, 624, 499, 374, 249, 124]}
CONSISTENCY = {2: [999, 499], 4: [999, 759, 499, 259], 8: [999, 879, 759, 639, 499, 379, 259, 139]}
# SD3's pipeline leaves its shift of 3 to the scheduler, which applies it to an even grid from 1 to its own 1/1000
FLOW = [1000 * 3 * s / (1 + 2 * s) for s in torch.linspace(1, 0.003 / 1.002, 4).tolist()]
# Flux's pipeline shifts an even grid by exp(mu), mu linear in the tokens: 0.5 at 256, 1.15 at 4096; here there are 16
MU = 0.5 + (1.15 - 0.5) * (16 - 256) / (4096 - 256)
DEV = [math.exp(MU) / (math.exp(MU) + 1 / (1 - i / 50) - 1) for i in range(50)]
EVEN = {steps: [1 - i / steps for i in range(steps)] for steps in (1, 2, 4)}
SPRINT = {1: [math.pi / 2], 2: [math.pi / 2, 1.3], 4: [math.pi / 2 * (1 - i / 4) for i in range(4)]}


def pndm():
    return PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)


def with_scheduler(pipe, scheduler):
    pipe.scheduler = scheduler
    return pipe


def sd():
    return with_scheduler(tiny.sd(), pndm())


def sdxl():
    return with_scheduler(tiny.sdxl(), EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1))


def turbo():
    return with_scheduler(tiny.sdxl(), EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="trailing"))


def schnell():
    return with_scheduler(tiny.flux(guidance_embeds=False), FlowMatchEulerDiscreteScheduler(shift=1.0))


def delta():
    return with_scheduler(PixArtAlphaPipeline(**tiny.pixart().components), LCMScheduler(**BETAS))


def sprint():
    return tiny.sana(sprint=True)


def scm(times):
    return [math.sin(t) / (math.cos(t) + math.sin(t)) for t in times]


def own(count):
    """The times of PNDM, whose first step is taken twice."""
    gap = 1000 // count
    times = [gap * i + 1 for i in reversed(range(count))]
    return {count: [times[0], times[1], times[1], *times[2:]]}


# name: (its original pipeline, the scheduler it is sampled with, steps -> the times its network is called at, guidance;
# 1 stands for none, guidance_scale=0 in model cards)
PUBLISHED = {
    "sd15": (sd, "PNDM", own(50), 7.5),
    "sdxl": (sdxl, "EulerDiscrete", {50: [20 * i + 1 for i in reversed(range(50))]}, 5),
    "sd15-lcm-lora": (sd, "LCM", CONSISTENCY, 1),
    "sdxl-lcm-lora": (sdxl, "LCM", CONSISTENCY, 1),
    "sdxl-turbo": (turbo, "EulerAncestralDiscrete", {k: TRAILING[k] for k in (1, 2, 4)}, 1),
    "sdxl-lightning": (sdxl, "EulerDiscrete", TRAILING, 1),
    "sdxl-lightning-lora": (sdxl, "EulerDiscrete", {k: TRAILING[k] for k in (2, 4, 8)}, 1),
    "hyper-sd15": (sd, {1: "TCD", 2: "DDIM", 4: "DDIM", 8: "DDIM"}, TRAILING, 1),
    "hyper-sdxl": (sdxl, {1: "LCM", 2: "DDIM", 4: "DDIM", 8: "DDIM"}, TRAILING | {1: [800]}, 1),
    "dmd2-sdxl": (sdxl, "LCM", {4: TRAILING[4]}, 1),
    "sd35-large-turbo": (tiny.sd3, "FlowMatchEulerDiscrete", {4: FLOW}, 1),
    "flux-schnell": (schnell, "FlowMatchEulerDiscrete", EVEN, 1),
    "flux-dev": (tiny.flux, "FlowMatchEulerDiscrete", {50: DEV}, 3.5),
    "pixart-delta": (delta, "LCM", {k: CONSISTENCY[k] for k in (2, 4)}, 1),
    "sana-sprint": (sprint, "SCM", {k: scm(t) for k, t in SPRINT.items()}, 4.5),
    "sana-sprint-0.6b": (sprint, "SCM", {k: scm(t) for k, t in SPRINT.items()}, 4.5),
    "bk-sdm-base": (sd, "PNDM", own(25), 7.5),
    "bk-sdm-small": (sd, "PNDM", own(25), 7.5),
    "bk-sdm-tiny": (sd, "PNDM", own(25), 7.5),
}
PREDICTED = {("sdxl-lightning", 1): "sample"}  # where it is not what the pipeline's network predicts
GUIDED = {"sd15", "sdxl", "bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny"}  # by a second evaluation
TOLD = {"flux-dev": 3.5, "sana-sprint": 0.45, "sana-sprint-0.6b": 0.45}  # the network's input, Sana's a tenth of it


@pytest.fixture
def opened(monkeypatch):
    """load() with a tiny pipeline in place of the published one; returns it and the files it requested."""
    asked: list[str] = []
    monkeypatch.setattr(models, "_load_lora", lambda _, lora: asked.append(lora))
    monkeypatch.setattr(models, "_load_unet", lambda _, unet: asked.append(unet))

    def load(spec, make, sampler=None):
        asked.clear()
        monkeypatch.setattr("stepdistill.denoiser.load.open_pipeline", lambda *_, **__: make())
        return models.load(dataclasses.replace(spec, size=32), sampler=sampler), list(asked)

    return load


def test_every_ready_model_that_is_no_teacher_names_one():
    assert [
        entry.name for entry in catalogue().values() if (entry.method == "teacher") != (entry.teacher is None)
    ] == []


def test_every_ready_model_has_a_published_way_here():
    assert set(PUBLISHED) == set(catalogue())
    assert all(tuple(PUBLISHED[name][2]) == tuple(catalogue()[name].steps) for name in PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_ready_model_is_sampled_as_its_authors_write(name, opened):
    make, scheduler, times, guidance = PUBLISHED[name]
    for part, counts in ((m, c) for _, m, c in plan_of({name: parse(f"@{name}")}, None, ())):
        pipe, _ = opened(part, make)
        wanted = scheduler if isinstance(scheduler, str) else scheduler[counts[0]]
        assert type(pipe.scheduler).__name__ == f"{wanted}Scheduler"
        spec = dataclasses.replace(part, size=32)
        own = make().scheduler.config.get("prediction_type")
        assert pipe.scheduler.config.get("prediction_type") == PREDICTED.get((name, *counts), own)
        sampler = Sampler(pipe, models.guidance_of(spec, pipe), call=models.call_of(spec, pipe))
        network = getattr(pipe, "transformer", None) or pipe.unet
        for steps in counts:
            seen: list[float] = []
            told: set[float | None] = set()

            def note(_, args, kwargs, seen=seen, told=told):
                time = args[1] if len(args) > 1 else kwargs["timestep"]
                seen.append(float(torch.as_tensor(time).flatten()[0]))
                given = kwargs.get("guidance")
                told.add(None if given is None else round(float(given.flatten()[0]), 3))

            hook = network.register_forward_pre_hook(note, with_kwargs=True)
            with Stages(pipe) as stages:
                sampler(sampler.encode(["a red cat"]), first=0, count=1, steps=steps)
            hook.remove()
            assert len(seen) == steps + (wanted == "PNDM")
            assert stages.evaluations == len(seen) * (2 if name in GUIDED else 1)
            assert seen == pytest.approx(times[steps], abs=1e-5 if max(seen) <= 1 else 0.01)
            assert (sampler.guidance, told) == (guidance, {TOLD.get(name)})


def test_a_file_a_step_count_is_the_file_of_that_step_count(opened):
    for name in ("sdxl-lightning", "sdxl-lightning-lora", "hyper-sd15", "hyper-sdxl"):
        for _, part, (steps,) in plan_of({name: parse(f"@{name}")}, None, ()):
            (file,) = opened(part, PUBLISHED[name][0])[1]
            owner, path = places.hub_file(file)
            assert owner in ("ByteDance/SDXL-Lightning", "ByteDance/Hyper-SD") and f"{steps}step" in path


def test_what_the_user_says_goes_before_what_the_catalogue_says():
    spec = parse("fast=@hyper-sdxl,dtype=fp32,scheduler=euler")
    assert (spec.name, spec.at(2).dtype, spec.at(1).scheduler, spec.at(4).scheduler) == ("fast", "fp32", *["euler"] * 2)
    assert spec.at(1).timesteps == (800,) and spec.at(2).timesteps is None
    assert models.training_record(spec.at(1))["method"] == "hyper-sd"


def test_steps_a_model_is_not_for_are_refused_and_others_are_free():
    for text, steps, words in (
        ("@hyper-sdxl", 3, "got 3 for hyper-sdxl, which is for 1 2 4 8"),
        ("m,timesteps=999+499", 4, "which is for 2"),
    ):
        with pytest.raises(InputError, match=words):
            parse(text).at(steps)
    assert parse("@sdxl-lcm-lora").at(1).scheduler == "lcm" and parse("m").at(7) == parse("m")
    with pytest.raises(InputError, match="did you mean @sdxl-turbo"):
        parse("@sdxl-turb")
    assert listed().count("@") >= len(catalogue())


def test_what_a_model_says_in_place_of_a_protocol_is_said():
    protocol = load_protocol("mlperf-sdxl-5k")
    models = {
        "sdxl": parse("@sdxl"), "as-asked": parse("sdxl=@sdxl,guidance=8"), "silent": parse("folder"),
        "euler": parse("some/sdxl,scheduler=euler,guidance=8"), "student": parse("some/sdxl,lora=x/y,scheduler=lcm"),
    }  # fmt: skip
    plan = plan_of(models, None, protocol.steps)
    assert departures.of_specs(plan, protocol) == [
        "sdxl differs from mlperf-sdxl-5k: guidance 5 instead of 8",
        "euler differs from mlperf-sdxl-5k: spacing trailing instead of leading",
        "student differs from mlperf-sdxl-5k: scheduler LCMScheduler instead of EulerDiscreteScheduler",
    ]
    steps = "{}: its own steps 50 override mlperf-sdxl-5k's 20; --steps 20 selects those"
    assert departures.of_steps(plan, protocol, False) == [steps.format("sdxl"), steps.format("as-asked")]
    assert departures.of_steps(plan_of(models, (20,), protocol.steps), protocol, True) == []


@pytest.mark.parametrize(
    ("options", "spacing", "said"),
    [
        ("", "leading", None),
        (",scheduler=euler,spacing=leading,guidance=8", "leading", None),
        (",scheduler=euler,guidance=8", "trailing", "spacing trailing instead of leading"),
        (",spacing=linspace,guidance=5", "linspace", "scheduler DDIMScheduler instead of EulerDiscreteScheduler, "
         "spacing linspace instead of leading, guidance 5 instead of 8"),
        (",scheduler=lcm", None, "scheduler LCMScheduler instead of EulerDiscreteScheduler, spacing none instead of "
         "leading, guidance 1 instead of 8"),
        (",scheduler=euler,guidance=8,timesteps=999+499", None, "spacing none instead of leading"),
    ],
)  # fmt: skip
def test_where_a_loaded_model_is_sampled_otherwise_than_its_protocol_says_is_said(options, spacing, said, opened):
    """LCM has a timestep_spacing in its configuration, of which it makes no use."""
    protocol, spec = load_protocol("mlperf-sdxl-5k"), parse(f"x{options}")
    pipe, _ = opened(spec, tiny.sdxl, protocol.sampler)
    sampler = Sampler(pipe, models.guidance_of(spec, pipe, protocol.guidance), call=models.call_of(spec, pipe))
    line = said and f"m differs from mlperf-sdxl-5k: {said}"
    assert (sampler.spacing, departures.of_loaded("m", sampler, protocol)) == (spacing, line)
    assert departures.of_loaded("m", sampler, load_protocol("cifar10-50k")) is None


def test_models_take_the_asked_steps_then_their_own_then_the_default():
    asked = {"t": parse("some/model"), "h": parse("@sdxl-turbo")}
    assert [(name, counts) for name, _, counts in plan_of(asked, None, (50,))] == [("t", (50,)), ("h", (1, 2, 4))]
    assert [counts for _, _, counts in plan_of(asked, (4,), (50,))] == [(4,), (4,)]


def test_a_unet_of_a_file_takes_the_place_of_the_pipelines(tmp_path, monkeypatch):
    base, other = tiny.save(tmp_path / "base"), tiny.sd(seed=1).unet
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / "wrong.safetensors")
    got = models.load(parse(f"{base},unet={tmp_path / 'other.safetensors'}")).unet.state_dict()
    assert all(torch.equal(value, got[name]) for name, value in other.state_dict().items())
    with pytest.raises(InputError, match="do not fit the pipeline's UNet"):
        models.load(parse(f"{base},unet={tmp_path / 'wrong.safetensors'}"))
    wanted = []

    def download(*asked):
        wanted.append(asked)
        return str(tmp_path / "other.safetensors")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    got = models.load(parse(f"{base},unet=owner/name/sub/x.safetensors")).unet.state_dict()
    assert wanted == [("owner/name", "sub/x.safetensors")]
    assert torch.equal(got["conv_in.weight"], other.state_dict()["conv_in.weight"])


def test_a_file_that_the_hub_does_not_give_is_said_in_one_line(tmp_path, monkeypatch):
    def offline(*_):
        raise OSError("no network\nsecond line")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(
        InputError, match=r"x.safetensors of owner/name, which could not be downloaded \(no network\)"
    ) as caught:
        models.load(parse(f"{tiny.save(tmp_path / 'base')},lora=owner/name/x.safetensors"))
    assert "\n" not in str(caught.value)


def test_what_a_pipeline_does_not_take_is_refused():
    for text, pipe, word in (("x,tokens=9", tiny.sd(), "max_sequence_length"), ("x,size=64", tiny.pixel(), "height")):
        with pytest.raises(InputError, match=f"which takes no {word}"):
            models.call_of(parse(text), pipe)


def test_a_protocols_sampler_is_for_models_that_say_nothing(tmp_path):
    base = tiny.save(tmp_path / "base")
    fixed = SamplerSpec("euler", "leading")
    euler = models.load(parse(str(base)), sampler=fixed).scheduler
    assert type(euler).__name__ == "EulerDiscreteScheduler" and euler.config.timestep_spacing == "leading"
    said = models.load(parse(f"{base},scheduler=ddim"), sampler=fixed).scheduler
    assert type(said).__name__ == "DDIMScheduler"


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl, tiny.sd3])
def test_guidance_leads_away_from_the_negative_prompt(make):
    pipe, prompts = make(), ["a red cat", "the green dog"]
    ours = Sampler(pipe, 3.0, call={"height": 32, "width": 32}, negative="a hat")
    drawn = ours(ours.encode(prompts), first=0, count=2, steps=2)
    timed = ours({"prompt": prompts}, first=0, count=2, steps=2)
    theirs = pipe(
        prompts, negative_prompt=["a hat"] * 2, guidance_scale=3.0, num_inference_steps=2, output_type="pt", height=32,
        width=32, generator=Draws.at(0, 0, 2).generators,
    ).images  # fmt: skip
    wanted = theirs.clamp(0, 1).mul(255).round().to(torch.uint8)
    assert (drawn.int() - wanted.int()).abs().max() <= 1 and (timed.int() - wanted.int()).abs().max() <= 1
    plain = Sampler(pipe, 3.0, call={"height": 32, "width": 32})
    assert not torch.equal(drawn, plain(plain.encode(prompts), first=0, count=2, steps=2))
