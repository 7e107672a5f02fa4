"""A SPEC is parsed as written, its errors are reported in one line, and it loads a plain diffusers pipeline."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline
from safetensors.torch import save_file

from stepdistill.errors import InputError
from stepdistill.evaluation import models, schedulers
from stepdistill.evaluation.generate import Sampler
from stepdistill.evaluation.latency import Stages
from stepdistill.evaluation.models import even_of, fingerprint, guidance_of, load
from stepdistill.evaluation.places import beside
from stepdistill.evaluation.protocols import SamplerSpec
from stepdistill.evaluation.spec import ModelSpec, as_models, parse
from stepdistill.export.adapters import load_whole


def lora(folder, pipe, *, alpha: int = 2, scheduler: bool = True):
    """An export folder: a LoRA with rank 4, a scheduler and the record of its training."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    config = LoraConfig(r=4, lora_alpha=alpha, target_modules=["to_q", "to_v"])
    pipe.unet.add_adapter(config)
    tiny.stir_adapter(pipe.unet, "default")
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
    type(pipe).save_lora_weights(folder, unet_lora_layers=state, unet_lora_adapter_metadata=config.to_dict())
    if scheduler:
        LCMScheduler.from_config(pipe.scheduler.config, original_inference_steps=50).save_pretrained(
            folder / "scheduler"
        )
    (folder / "config.json").write_text(
        json.dumps({"method": "lcm", "teacher": "T", "train_seconds": 7.5, "rank": 4, "seed": 3, "commit": "c0ffee"})
    )
    return folder


def adapted(pipe, targets: list[str], part: str = "unet") -> dict[str, torch.Tensor]:
    """Adds an adapter to a part of a pipeline, and returns its tensors under peft's own names."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    module = getattr(pipe, part)
    module.add_adapter(LoraConfig(r=2, target_modules=targets))
    tiny.stir_adapter(module, "default")
    return get_peft_model_state_dict(module)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("spec") / "base")


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return lora(tmp_path_factory.mktemp("student"), tiny.sd())


def test_a_spec_is_read_with_all_its_options():
    found = parse("mine=some/model,lora=out/x,scheduler=lcm,guidance=1.5,variant=fp16,dtype=bf16")
    assert found == ModelSpec("some/model", "mine", "out/x", "lcm", 1.5, "fp16", dtype="bf16")
    assert str(found) == "some/model,lora=out/x,scheduler=lcm,guidance=1.5,variant=fp16,dtype=bf16"


def test_a_name_is_taken_from_the_lora_or_the_path():
    assert parse("a/b").name == "b" and parse("a/b,lora=out/c").name == "c" and parse("a/b,name=d").name == "d"


def test_a_path_may_hold_an_equals_sign_and_a_spec_reads_back_as_it_was():
    assert (parse("out/lr=1e-4/b").name, parse("out/lr=1e-4/b").path) == ("b", "out/lr=1e-4/b")
    named = parse("s=out/lr=1e-4/b,guidance=2")
    assert (named.name, named.path) == ("s", "out/lr=1e-4/b") and parse(str(named)).path == named.path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no path"),
        ("lora=x", "where the path belongs"),
        ("m,schedular=ddim", r"did you mean scheduler=\?"),
        ("m,scheduler=dimm", r"did you mean ddim\?"),
        ("m,guidance=0.5", "1.0"),
        ("m,guidance=much", "a number"),
        ("m,guidance=nan", "1.0"),
        ("m,dtype=int8", "fp32"),
        ("m,lora=", "no value"),
    ],
)
def test_what_is_wrong_in_a_spec_is_said_in_one_line(text, words):
    with pytest.raises(InputError, match=words) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


def test_two_models_of_one_name_and_none_are_refused():
    with pytest.raises(InputError, match="twice"):
        as_models(["a/x", "b/x"])
    with pytest.raises(InputError, match="got none"):
        as_models([])
    assert list(as_models({"n": "a/x"})) == ["n"]


def test_ddim_is_trailing_and_lands_at_the_clean_end(base):
    pipe = load(parse(f"{base},scheduler=ddim"))
    assert type(pipe).__name__ == "StableDiffusionPipeline" and pipe.scheduler.config.timestep_spacing == "trailing"
    pipe.scheduler.set_timesteps(4)
    assert pipe.scheduler.timesteps.tolist() == [999, 749, 499, 249]
    assert pipe.scheduler.final_alpha_cumprod == 1 and not pipe.scheduler.config.clip_sample


@pytest.mark.parametrize("name", sorted(set(schedulers.SCHEDULERS) - set(schedulers.FLOWS)))
def test_every_scheduler_keeps_the_models_own_noise_and_samples(base, name):
    pipe = load(parse(f"{base},scheduler={name}"))
    assert type(pipe.scheduler).__name__ == schedulers.SCHEDULERS[name][0]
    assert pipe.scheduler.config.beta_end == 0.012 and pipe.scheduler.config.prediction_type == "epsilon"
    images = pipe("a cat", num_inference_steps=4, guidance_scale=1.0, output_type="pt").images
    assert torch.isfinite(images).all()


@pytest.mark.parametrize("name", schedulers.FLOWS)
def test_flow_schedulers_are_for_flows_and_keep_their_shift(base, tmp_path, name):
    with pytest.raises(InputError, match=f"scheduler: got {name} .*; allowed: ddim, lcm"):
        load(parse(f"{base},scheduler={name}"))
    flow = tiny.save(tmp_path / "sd3", "sd3")
    scheduler = load(parse(f"{flow},scheduler={name}")).scheduler
    assert type(scheduler).__name__ == schedulers.SCHEDULERS[name][0] and scheduler.config.shift == 3.0
    with pytest.raises(InputError, match=r"scheduler: got ddim .*; allowed: flow-euler, flow-lcm"):
        load(parse(f"{flow},scheduler=ddim"))


def test_a_flow_can_be_asked_for_even_sigmas_and_its_students_ask_for_them(base, tmp_path):
    flow = tiny.save(tmp_path / "sd3", "sd3")
    (tmp_path / "sd3" / "config.json").write_text(json.dumps({"sigmas": "even"}))
    pipe = load(parse(f"{flow},scheduler=flow-lcm"))
    said = {text: even_of(parse(f"{flow}{text}"), pipe) for text in ("", ",sigmas=own", ",sigmas=even")}
    assert said == {"": True, ",sigmas=own": False, ",sigmas=even": True}
    noise = []
    pipe.transformer.register_forward_pre_hook(lambda _, a, k: noise.append(k["timestep"][0].item()), with_kwargs=True)
    for even, times in ((True, [1000, 900, 750, 500]), (False, [1000, 857.7, 602, 8.9])):
        noise.clear()
        Sampler(pipe, 1.0, even=even)({"prompt": ["a cat"]}, first=0, count=1, steps=4)
        assert noise == pytest.approx(times, rel=1e-2)
    with pytest.raises(InputError, match=r"sigmas: got even for StableDiffusionPipeline with .*; leave it out"):
        even_of(parse(f"{base},sigmas=even"), load(parse(str(base))))
    assert not even_of(parse(str(base)), load(parse(str(base))))


@pytest.mark.parametrize("name", [None, *schedulers.SCHEDULERS])
def test_a_spacing_moves_the_times_of_a_scheduler_or_is_refused(name):
    """DDIM is the pipeline's own."""
    pipe = tiny.sd3() if name in schedulers.FLOWS else tiny.sd()
    times = []
    for spacing in schedulers.SPACINGS:
        asked = parse(f"x,spacing={spacing}" + f",scheduler={name}" * bool(name))
        if name in (*schedulers.FLOWS, "lcm", "tcd"):
            with pytest.raises(InputError, match=f"spacing: got {spacing} for .*Scheduler, which has times of its own"):
                schedulers.scheduler_of(pipe, asked)
            continue
        scheduler = schedulers.scheduler_of(pipe, asked)
        scheduler.set_timesteps(4)
        times.append(tuple(scheduler.timesteps.tolist()))
    assert len(set(times)) == len(times)


@pytest.mark.parametrize("name", sorted(set(schedulers.SCHEDULERS) - {"tcd"}))
def test_a_scheduler_told_that_x0_is_predicted_ends_at_it_or_is_refused(name):
    """TCD's would end at the least noise instead, whatever is predicted."""
    pipe, x0 = tiny.sd3() if name in schedulers.FLOWS else tiny.sd(), torch.linspace(-1, 1, 12).reshape(1, 3, 2, 2)
    asked = parse(f"x,prediction=sample,scheduler={name}")
    if name in (*schedulers.FLOWS, "euler-a", "heun"):
        with pytest.raises(InputError, match=r"prediction: got sample for .*Scheduler"):
            schedulers.scheduler_of(pipe, asked)
        return
    scheduler = schedulers.scheduler_of(pipe, asked)
    scheduler.set_timesteps(4)
    x_t = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scheduler.scale_model_input(x_t, t)
        x_t = scheduler.step(x0, t, x_t).prev_sample
    torch.testing.assert_close(x_t, x0, atol=1e-5, rtol=1e-5)


def test_a_prediction_is_heeded_with_a_spacing_and_where_an_export_recorded_its_scheduler(base, tmp_path):
    student = lora(tmp_path / "lcm", tiny.sd())
    for text, spacing in ((f"{base},scheduler=euler,spacing=trailing", "trailing"), (f"{base},lora={student}", None)):
        own, told = load(parse(text)).scheduler, load(parse(f"{text},prediction=v_prediction")).scheduler
        differ = {k for k in own.config if own.config[k] != told.config[k]}
        assert type(own) is type(told) and differ == {"prediction_type"}
        assert told.config.prediction_type == "v_prediction" and spacing in (None, told.config.timestep_spacing)
    with pytest.raises(InputError, match=r"got prediction=samples; allowed: epsilon, .*; did you mean sample\?"):
        parse("x,prediction=samples")


def test_the_spacing_of_a_spec_is_heeded_where_an_export_recorded_its_scheduler(base, tmp_path):
    for kind, folder in ((DDIMScheduler, "ddim"), (LCMScheduler, "lcm")):
        student = lora(tmp_path / folder, tiny.sd(), scheduler=False)
        own = kind.from_config(tiny.sd().scheduler.config, beta_end=0.013, timestep_spacing="leading")
        own.save_pretrained(student / "scheduler")
    for named in ("", ",scheduler=ddim"):
        spaced = load(parse(f"{base},lora={tmp_path / 'ddim'},spacing=trailing{named}")).scheduler
        spaced.set_timesteps(4)
        assert spaced.timesteps.tolist() == [999, 749, 499, 249] and spaced.config.beta_end == 0.013
        kept = load(parse(f"{base},lora={tmp_path / 'ddim'}{named}")).scheduler
        assert (kept.config.timestep_spacing, kept.config.beta_end) == ("leading", 0.013)
    other = load(parse(f"{base},lora={tmp_path / 'ddim'},spacing=trailing,scheduler=euler")).scheduler
    assert type(other).__name__ == "EulerDiscreteScheduler" and other.config.beta_end == 0.012
    with pytest.raises(InputError, match="spacing: got trailing for LCMScheduler, which has times of its own"):
        load(parse(f"{base},lora={tmp_path / 'lcm'},spacing=trailing"))


def test_options_that_nothing_would_heed_are_refused(base):
    flow = tiny.sd3()
    for text, words in (
        ("x,scheduler=euler,spacing=trailing,timesteps=999+499", "timesteps=999\\+499, which are the times; leave it"),
        ("x,scheduler=flow-euler,spacing=trailing", "FlowMatchEulerDiscreteScheduler, which has times of its own"),
        ("x,scheduler=euler,spacing=trailing", "scheduler: got euler for a flow model; allowed: flow-euler"),
    ):
        with pytest.raises(InputError, match=words):
            schedulers.scheduler_of(tiny.sd() if "999" in text else flow, parse(text))
    with pytest.raises(InputError, match="sigmas: got even with timesteps; allowed: one of the two"):
        even_of(parse("x,sigmas=even,timesteps=999+499"), flow)
    schnell = tiny.flux(guidance_embeds=False)
    for pipe in (tiny.pixel(), schnell):
        with pytest.raises(InputError, match=r"guidance: got 3.5 for a \w+ whose network takes none; leave it out"):
            guidance_of(parse("x,guidance=3.5"), pipe)
        assert guidance_of(parse("x,guidance=1"), pipe) == guidance_of(parse("x"), pipe, 8.0) == 1.0
    assert guidance_of(parse("x,guidance=3.5"), tiny.flux()) == 3.5 and guidance_of(parse("x"), tiny.flux(), 8.0) == 8.0
    with pytest.raises(InputError, match="no such modeling files"):
        load(parse(f"{base},variant=fp16"))


def test_what_an_export_on_the_hub_records_is_read_there(base, student, monkeypatch):
    from huggingface_hub.errors import EntryNotFoundError

    def download(repository, name):
        assert repository == "owner/student"
        if not (student / name).is_file():
            raise EntryNotFoundError(name)
        return str(student / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(models, "_load_lora", lambda *_: None)
    asked = parse(f"{base},lora=owner/student")
    assert type(load(asked).scheduler).__name__ == "LCMScheduler"
    assert models.training_record(asked)["train_seconds"] == 7.5
    assert beside("owner/student", "nothing.json") is None and beside(str(student), "nothing.json") is None


def test_a_protocols_sampler_that_does_not_fit_a_model_is_named_as_such(tmp_path):
    flow = tiny.save(tmp_path / "sd3", "sd3")
    with pytest.raises(InputError, match=r"got euler for a flow model.*this is the protocol's sampler"):
        load(parse(str(flow)), sampler=SamplerSpec("euler", "leading"))


def test_an_export_brings_its_scheduler_and_no_guidance(base, student):
    asked = parse(f"{base},lora={student}")
    pipe = load(asked)
    assert type(pipe.scheduler).__name__ == "LCMScheduler" and guidance_of(asked, pipe, 3.0) == 1.0
    assert pipe.unet.peft_config["default_0"].lora_alpha == 2
    assert models.training_record(asked) == {"method": "lcm", "teacher": "T", "train_seconds": 7.5}
    row = models.model_fields(asked, Sampler(pipe))
    assert (row["method"], row["train_seconds"], row["train_seed"]) == ("lcm", 7.5, 3)
    assert row["train_commit"] == "c0ffee"


def test_the_hash_of_a_students_settings_is_that_of_its_method_not_of_its_seed(base, student):
    def hashed(**changed) -> str:
        (student / "config.json").write_text(json.dumps(record | changed))
        return models.training_fields(parse(f"{base},lora={student}"))["train_settings"]

    record = json.loads((student / "config.json").read_text())
    assert hashed() == hashed(seed=4, train_seconds=9.0, out="elsewhere", commit="ba5eba11") != hashed(rank=8)


def test_guidance_is_the_specs_then_the_protocols_then_the_pipelines(base):
    pipe = load(parse(str(base)))
    assert guidance_of(parse(f"{base},guidance=2"), pipe, 3.0) == 2.0
    assert guidance_of(parse(str(base)), pipe, 3.0) == 3.0
    assert guidance_of(parse(str(base)), pipe) == 7.5
    assert guidance_of(parse("x"), tiny.pixel(), 3.0) == 1.0


def test_a_student_told_its_guidance_gets_the_middle_of_its_range_and_no_second_call(tmp_path):
    told = tiny.sd(unet_options={"time_cond_proj_dim": 8})
    told.scheduler = LCMScheduler.from_config(told.scheduler.config)
    told.save_pretrained(tmp_path / "run" / "export")
    asked = parse(str(tmp_path / "run"))  # the run's folder stands for its export
    assert asked == ModelSpec(str(tmp_path / "run" / "export"), "run")
    pipe = load(asked)
    assert guidance_of(asked, pipe, 3.0) == 3.0 and guidance_of(asked, pipe) == 7.5
    for recorded, scale in (([4.0, 16.0], 10.0), ([6.0], 6.0), (5.0, 5.0)):
        (tmp_path / "run" / "export" / "config.json").write_text(json.dumps({"guidance": recorded}))
        assert guidance_of(asked, pipe, 3.0) == scale
    assert guidance_of(parse(f"{asked},guidance=8"), pipe, 3.0) == 8.0

    def drawn(guidance):
        sampler = Sampler(pipe, guidance)
        condition = sampler.encode(["a red cat"])
        assert "negative_prompt_embeds" not in condition
        with Stages(pipe) as stages:
            pictures = sampler(condition, first=0, count=1, steps=2)
        assert stages.evaluations == 2
        return pictures

    assert not torch.equal(drawn(1.0), drawn(10.0))


def test_a_runs_folder_stands_for_its_export(base, student, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(student, run / "export")
    (run / "config.json").write_text("{}")
    (run / "export-kohya.safetensors").write_bytes(b"")  # as `stepdistill export` names it
    asked = parse(f"{base},lora={run}")
    assert asked == ModelSpec(str(base), "run", str(run / "export"))
    assert models.training_record(asked)["train_seconds"] == 7.5
    assert fingerprint(load(asked)) == fingerprint(load(parse(f"{base},lora={student}")))
    assert parse(f"{base},lora={run / 'export'}").lora == str(run / "export")
    (tmp_path / "cut" / "checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match="allowed: a run that has ended"):
        load(parse(f"{base},lora={tmp_path / 'cut'}"))


def test_a_lora_of_which_a_part_loads_is_refused(base, tmp_path):
    """Attention under diffusers' old names, the rest under peft's: diffusers silently drops one half."""
    from diffusers.utils import convert_state_dict_to_diffusers

    state = adapted(tiny.sd(), ["to_q", "to_v", "proj_in"])
    mixed = {k: v for k, v in state.items() if "proj_in" in k}
    mixed |= convert_state_dict_to_diffusers({k: v for k, v in state.items() if "proj_in" not in k})
    assert len(mixed) == len(state)
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=mixed)
    few = sum("proj_in" in k for k in state)
    with pytest.raises(InputError, match=f"{few} of {len(state)} tensors"):
        load(parse(f"{base},lora={tmp_path}"))


def test_tensors_of_text_encoders_and_kohyas_alphas_are_counted_for_what_they_are(base, tmp_path):
    from diffusers.utils import convert_state_dict_to_kohya

    pipe = tiny.sd()
    denoiser, text = adapted(pipe, ["to_q", "conv1"]), adapted(pipe, ["q_proj", "v_proj"], "text_encoder")
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=denoiser, text_encoder_lora_layers=text)
    assert load_whole(tiny.sd(), tmp_path) == len(denoiser) + len(text)
    kohya = convert_state_dict_to_kohya({f"unet.{name}": value for name, value in denoiser.items()})
    assert len(kohya) == len(denoiser) // 2 * 3
    save_file({k: v.contiguous() for k, v in kohya.items()}, tmp_path / "kohya.safetensors")
    assert load_whole(load(parse(str(base))), tmp_path / "kohya.safetensors") == len(denoiser)


def test_the_fingerprint_changes_with_weights_adapter_and_scheduler(base, student):
    plain = fingerprint(load(parse(str(base))))
    assert plain == fingerprint(load(parse(str(base))))
    others = {fingerprint(load(parse(f"{base},{o}"))) for o in ("scheduler=ddim", "dtype=bf16", f"lora={student}")}
    assert len(others | {plain}) == 4


def test_the_fingerprint_sees_alpha(base, tmp_path, student):
    other = lora(tmp_path, tiny.sd(), alpha=8)
    assert fingerprint(load(parse(f"{base},lora={other}"))) != fingerprint(load(parse(f"{base},lora={student}")))


def test_the_fingerprint_sees_what_each_layer_is_scaled_by():
    from peft import LoraConfig

    def scaled(weight: float = 1.0, **options) -> str:
        pipe = tiny.sd()
        pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "to_v"], **options))
        tiny.stir_adapter(pipe.unet, "default")
        pipe.unet.set_adapters("default", weight)
        return fingerprint(pipe)

    assert scaled() == scaled()
    assert len({scaled(), scaled(alpha_pattern={"to_v": 3}), scaled(use_rslora=True), scaled(0.5)}) == 4


def test_models_that_cannot_be_had_are_said_in_one_line(base, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "pytorch_lora_weights.safetensors").write_bytes(b"nothing")
    for text, words in (
        (str(tmp_path), "pipeline"),
        (str(tmp_path / "nowhere"), "does not exist"),
        ("nobody/no-such-model", "network"),
        (f"{base},lora={tmp_path / 'gone'}", "does not exist"),
        (f"{base},lora={tmp_path / 'empty'}", "no .safetensors"),
        (f"{base},lora={tmp_path / 'broken'}", "could not be loaded"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            load(parse(text))
        assert "\n" not in str(caught.value)


def test_a_revision_is_what_is_asked_of_the_hub(monkeypatch):
    class AskedError(Exception):
        pass

    def hub(path, **options):
        raise AskedError(path, options["revision"])

    monkeypatch.setattr("stepdistill.denoiser.load.open_pipeline", hub)
    for spec, revision in (("some/model,revision=v2", "v2"), ("some/model", None)):
        with pytest.raises(AskedError) as asked:
            load(parse(spec))
        assert asked.value.args == ("some/model", revision)
    assert str(parse("some/model,revision=v2")) == "some/model,revision=v2"
