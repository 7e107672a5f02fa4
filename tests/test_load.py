"""Teachers load from folders of safetensors; any other input ends in a one-line error."""

from __future__ import annotations

import json
import shutil
import warnings

import diffusers
import pytest
import tiny
import torch

from stepdistill.denoiser import load
from stepdistill.denoiser.load import as_teacher, load_teacher, open_pipeline
from stepdistill.errors import InputError
from stepdistill.training.lcm import LCMConfig
from stepdistill.training.run import open_teacher


def pictures(side: int = tiny.LATENT * tiny.FACTOR) -> torch.Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_a_teacher_is_its_pipeline_seen_as_a_denoiser(pipelines, family):
    teacher = load_teacher(pipelines[family])
    assert teacher.denoiser.backbone is teacher.source.unet
    assert teacher.sample_shape == (4, 8, 8)
    assert teacher.factor == 4
    assert teacher.image_size == (32, 32)
    assert teacher.denoiser.kind == "eps"
    assert not any(p.requires_grad for m in (teacher.source.unet, teacher.vae) for p in m.parameters())
    assert not teacher.source.unet.training


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_a_teacher_of_edms_process_is_refused_in_words_of_its_user(name):
    pipe = tiny.sd()
    pipe.scheduler = getattr(diffusers, name)()
    with pytest.raises(InputError, match=f"scheduler: got {name} in T, whose network was trained on EDM's process"):
        as_teacher(pipe, "T")


def test_the_plain_pipeline_shares_every_module_and_has_a_scheduler_of_its_own(pipelines, family):
    teacher = load_teacher(pipelines[family])
    pipe = teacher.pipeline()
    assert pipe.unet is teacher.denoiser.backbone
    assert pipe.vae is teacher.vae
    pipe.scheduler.set_timesteps(7)
    assert teacher.source.scheduler.num_inference_steps is None


def test_decoding_equals_the_pipelines_own(pipelines, family):
    teacher = load_teacher(pipelines[family])
    pipe = teacher.pipeline()
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "guidance_scale": 1.0}
    latents = pipe(tiny.PROMPTS, **options, generator=torch.manual_seed(0), output_type="latent").images
    theirs = pipe(tiny.PROMPTS, **options, generator=torch.manual_seed(0), output_type="pt").images
    ours = (teacher.decode(latents) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_encoding_is_the_posterior_mean_times_the_scaling_factor():
    teacher = as_teacher(tiny.sd(vae_options={"scaling_factor": 0.25, "shift_factor": 0.125}), "tiny")
    mean = teacher.vae.encode(pictures()).latent_dist.mean
    torch.testing.assert_close(teacher.encode(pictures()), (mean - 0.125) * 0.25)
    raw = teacher.vae.decode(mean).sample
    torch.testing.assert_close(teacher.decode((mean - 0.125) * 0.25), raw, atol=1e-5, rtol=1e-5)


def test_per_channel_latent_statistics_are_honoured():
    mean, std = [0.1, -0.2, 0.3, -0.4], [1.0, 2.0, 3.0, 4.0]
    options = {"latents_mean": mean, "latents_std": std, "scaling_factor": 0.5}
    teacher = as_teacher(tiny.sd(vae_options=options), "tiny")
    raw = teacher.vae.encode(pictures()).latent_dist.mean
    mean, std = (torch.tensor(v).view(1, 4, 1, 1) for v in (mean, std))
    expected = (raw - mean) * 0.5 / std
    torch.testing.assert_close(teacher.encode(pictures()), expected)
    torch.testing.assert_close(teacher.decode(expected), teacher.vae.decode(raw).sample, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("force", [True, False])
def test_a_half_autoencoder_that_overflows_is_run_in_float32_and_left_in_half(force):
    pipe = tiny.sdxl()
    pipe.vae.register_to_config(force_upcast=force)
    pipe.vae.half()
    teacher = as_teacher(pipe, "tiny")
    seen = []
    own = pipe.vae.decode
    pipe.vae.decode = lambda z, **options: seen.append((z.dtype, pipe.vae.dtype)) or own(z, **options)
    assert teacher.decode(torch.zeros(1, 4, 8, 8)).dtype == torch.float32
    assert seen == [(torch.float32,) * 2 if force else (torch.float16,) * 2]
    assert pipe.vae.dtype == torch.float16


def test_a_pixel_denoiser_may_have_its_network_wrapped():
    """As by DistributedDataParallel, whose wrapper has no config."""
    denoiser = as_teacher(tiny.pixel(), "tiny").denoiser
    x_t = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = denoiser(x_t, 500.0)

    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    denoiser.backbone = Wrapper(denoiser.backbone)
    assert torch.equal(denoiser(x_t, 500.0), plain)


@pytest.mark.parametrize("home", ["cpu", "meta"])
def test_the_autoencoder_is_on_a_device_for_a_while_and_then_where_it_was(pipelines, home, monkeypatch):
    teacher = load_teacher(pipelines["sd"])
    teacher.vae.to(home)  # adversarial training, which decodes, keeps it on the device
    moved = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, device: moved.append((module, device)) or module)
    with pytest.raises(KeyError), teacher.vae_on("cuda"):
        assert moved == [(teacher.vae, "cuda")]
        raise KeyError
    assert moved[1:] == [(teacher.vae, torch.device(home))]


def test_a_pixel_model_works_on_the_pictures_themselves(tmp_path):
    teacher = load_teacher(tiny.save(tmp_path / "pixel", "pixel", classes=3))
    assert teacher.vae is None
    assert teacher.image_size == (8, 8)
    x = pictures(8)
    assert torch.equal(teacher.decode(teacher.encode(x)), x)
    assert teacher.conditioner.encode(["2"])["labels"].tolist() == [2]


def test_weights_take_the_dtype_asked_for(pipelines):
    teacher = load_teacher(pipelines["sd"], dtype=torch.bfloat16)
    assert teacher.denoiser.dtype == teacher.vae.dtype == torch.bfloat16
    assert teacher.encode(pictures()).dtype == torch.float32


@pytest.mark.parametrize(("lora", "precision", "held"), [
    (True, "bf16", torch.bfloat16), (False, "bf16", torch.float32), (True, "no", torch.float32),
    (True, "fp16", torch.float32),
])  # fmt: skip
def test_the_network_under_an_adapter_is_loaded_in_what_it_is_kept_in(pipelines, lora, precision, held):
    """The result equals casting it later; encoders are float32 in every run, as their caches are."""
    run = LCMConfig(teacher=pipelines["sd"], lora=lora, mixed_precision=precision)
    teacher, whole = open_teacher(run, "cpu"), load_teacher(pipelines["sd"])
    for part in ("unet", "vae", "text_encoder"):
        dtype = held if part == "unet" else torch.float32
        weights = getattr(whole.source, part).state_dict()
        for name, weight in getattr(teacher.source, part).state_dict().items():
            if weight.is_floating_point():
                assert weight.dtype == dtype and torch.equal(weight, weights[name].to(dtype)), name


def test_without_text_the_towers_are_not_loaded(pipelines, family):
    teacher = load_teacher(pipelines[family], text=False)
    assert teacher.source.text_encoder is None and teacher.source.tokenizer is None
    with pytest.raises(InputError, match="text encoder: got a pipeline loaded without one"):
        teacher.conditioner.encode(["a cat"])


def test_code_of_the_repository_is_never_run_and_pickles_are_never_read(tmp_path, monkeypatch):
    path = tiny.save(tmp_path / "pipe")
    seen = {}
    from diffusers import DiffusionPipeline

    own = DiffusionPipeline.from_pretrained.__func__
    spy = classmethod(lambda cls, path, **options: seen.update(options) or own(cls, path, **options))
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", spy)
    load_teacher(path)
    assert seen["use_safetensors"] is True
    assert not seen.get("trust_remote_code")
    weights = path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(InputError, match="could not be loaded"):
        open_pipeline(path)


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message and len(message) < 500
    return message


def test_a_folder_that_is_no_pipeline(tmp_path):
    with pytest.raises(InputError, match=r"no model_index.json.*allowed: a diffusers pipeline folder") as error:
        load_teacher(tmp_path)
    one_line(error)


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "adapter_config.json"])
def test_a_folder_of_a_lora_is_named_as_such(tmp_path, name):
    (tmp_path / name).write_text("")
    with pytest.raises(InputError, match=r"a LoRA: give its base here and the LoRA as lora=") as error:
        load_teacher(tmp_path)
    one_line(error)


def test_a_path_that_does_not_exist(tmp_path):
    for path in (tmp_path / "nowhere", "./nowhere", "nowhere", "a/b/c"):
        with pytest.raises(InputError, match="does not exist; allowed") as error:
            load_teacher(path)
        one_line(error)


def test_a_hub_id_without_a_network_says_so_at_once(capfd):
    with pytest.raises(InputError, match=r"got nobody/nothing, .*hub cannot be reached.*check the id") as error:
        load_teacher("nobody/nothing")
    one_line(error)
    output = capfd.readouterr()
    assert output.out + output.err == ""


@pytest.mark.parametrize("name", ["AuraFlowPipeline", "NoSuchPipeline", ["mine", "Custom"]])
def test_a_pipeline_class_without_a_denoiser_is_refused_before_its_weights_are_read(tmp_path, monkeypatch, name):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    monkeypatch.setattr(load, "open_pipeline", lambda *a, **k: pytest.fail("weights were read"))
    with pytest.raises(InputError, match=r"pipeline class: got .*; allowed: StableDiffusionPipeline") as error:
        load_teacher(tmp_path)
    one_line(error)


@pytest.mark.parametrize("damage", ["index", "cut", "missing", "variant", "flow"])
def test_a_broken_pipeline_says_what_is_wrong(tmp_path, damage):
    path = tiny.save(tmp_path / "pipe")
    weights = path / "unet" / "diffusion_pytorch_model.safetensors"
    options = {}
    if damage == "index":
        (path / "model_index.json").write_text("{half a file")
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "missing":
        weights.unlink()
    elif damage == "variant":
        options["variant"] = "fp16"
    else:
        config = path / "scheduler" / "scheduler_config.json"
        config.write_text(config.read_text().replace('"epsilon"', '"flow_prediction"'))
    match = "prediction_type: got 'flow_prediction'" if damage == "flow" else "could not be loaded .*; check the folder"
    with pytest.raises(InputError, match=match) as error:
        load_teacher(path, **options)
    one_line(error)


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer", "scheduler", "unet"])
def test_a_pipeline_without_one_of_its_parts_is_one_line(tmp_path, part):
    path = tiny.save(tmp_path / "pipe")
    shutil.rmtree(path / part)
    with pytest.raises(
        InputError, match=rf"whose {part} \(\w+\) lacks the folder; allowed: all that model_index"
    ) as error:
        load_teacher(path)
    one_line(error)


def test_loading_says_nothing(pipelines, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_teacher(pipelines["sdxl"])
    output = capfd.readouterr()
    assert output.out + output.err == ""
