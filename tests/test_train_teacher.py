"""The teacher's training loop: exact resume, rejected checkpoints of another plan, the learning rate schedule."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file

from stepdistill.errors import InputError

SCRIPTS = Path(__file__).parents[1] / "train_scripts"
PLAN = {"dtype": "float16", "budget": {"updates": 12, "batch_size": 4, "learning_rate": 0.1, "warmup": 3}}


@pytest.fixture
def teacher(monkeypatch):
    """The script's modules, imported from the scripts' own folder."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import train_teacher
    from teacher import loop

    return {"script": train_teacher, "loop": loop}


def fit(loop, out: Path, *, plan=PLAN, seed: int = 0, stop_at: int | None = None) -> dict[str, torch.Tensor]:
    """Fits a line to y = 3 x - 1; with `stop_at`, is interrupted in that update."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(1, 1)
    seen = []

    def loss(generator: torch.Generator) -> torch.Tensor:
        seen.append(None)
        if len(seen) == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(4, 1, generator=generator)
        return (model(x).float() - (3 * x - 1)).square().mean()

    run = loop.Run(out, seed, checkpoint_every=5, plan=plan)
    return loop.train("line", model, loss, loop.Budget(**plan["budget"]), run)


def test_a_run_that_was_killed_goes_on_to_the_same_bits(teacher, tmp_path):
    whole = fit(teacher["loop"], tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(teacher["loop"], tmp_path / "cut", stop_at=8)
    again = fit(teacher["loop"], tmp_path / "cut")
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    saved = [load_file(tmp_path / name / "checkpoints" / "line.safetensors") for name in ("whole", "cut")]
    assert saved[0].keys() == saved[1].keys() and all(torch.equal(saved[0][k], saved[1][k]) for k in saved[0])
    logs = [(tmp_path / name / "line.jsonl").read_text() for name in ("whole", "cut")]  # its last update is logged
    assert logs[0] == logs[1] != ""


def test_a_checkpoint_of_another_plan_or_seed_is_refused_and_kept(teacher, tmp_path):
    fit(teacher["loop"], tmp_path)
    file = tmp_path / "checkpoints" / "line.safetensors"
    before = file.read_bytes()
    for change in ({"plan": PLAN | {"dtype": "float32"}}, {"seed": 1}):
        with pytest.raises(InputError, match="of another plan or seed; allowed: the same, to resume"):
            fit(teacher["loop"], tmp_path, **change)
    assert file.read_bytes() == before
    fit(teacher["loop"], tmp_path, plan=PLAN | {"budget": PLAN["budget"] | {"updates": 14}})  # longer is the same plan
    assert int(load_file(file)["update"]) == 14
    file.write_bytes(before[:100])
    with pytest.raises(InputError, match="which is broken"):
        fit(teacher["loop"], tmp_path)


def test_the_learning_rate_rises_stays_and_falls_to_zero(teacher):
    loop = teacher["loop"]
    budget = loop.Budget(updates=100, batch_size=1, learning_rate=2.0, warmup=10, decay=0.5)
    rates = [loop.learning_rate_at(update, budget) for update in (0, 4, 9, 30, 50, 75, 99)]
    assert rates == pytest.approx([0.2, 1.0, 2.0, 2.0, 2.0, 1.0, 0.04])


def test_a_plan_that_cannot_be_read_is_named(teacher, tmp_path):
    script = teacher["script"]
    with pytest.raises(InputError, match=r"--stages: got foo; allowed: vae, .*, unet, scorer, flow_text, flow"):
        script.read_plan(script.Config(out=tmp_path, stages=("foo",)))
    with pytest.raises(InputError, match=r"--config: got .*missing.yaml"):
        script.read_plan(script.Config(out=tmp_path, config=tmp_path / "missing.yaml"))
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump({"text": {"budget": {"update": 3}}}))
    with pytest.raises(InputError, match=r"unexpected keyword argument 'update'.*allowed: YAML"):
        script.read_plan(script.Config(out=tmp_path, config=wrong, stages=("text",)))
    shipped = script.read_plan(script.Config(out=tmp_path))
    assert list(shipped) == ["vae", "decoder", "text", "unet", "scorer", "flow_text", "flow"]


def test_one_token_that_counts_256_times_is_256_tokens_alike(teacher):
    """The flow teacher's shortcut for what Stable Diffusion 3 reads in place of an absent T5."""
    from diffusers import SD3Transformer2DModel
    from teacher import flow

    torch.manual_seed(0)
    network = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3, num_attention_heads=2,
        attention_head_dim=8, joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=6,
        pos_embed_max_size=4, qk_norm="rms_norm",
    ).eval()  # fmt: skip
    tiny.awaken(network, 0)
    x, text, pooled, t = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12), torch.randn(2, 6), torch.tensor([700.0, 30.0])

    def asked(absent: int) -> torch.Tensor:
        states = torch.nn.functional.pad(text, (0, 0, 0, absent))
        with torch.no_grad():
            return network(x, states, pooled, t, return_dict=False)[0]

    plain, few = asked(256), asked(1)
    network.set_attn_processor(flow.CountedAttention())
    counted = asked(1)
    torch.testing.assert_close(counted, plain, atol=1e-5, rtol=1e-5)
    assert (few - plain).abs().max() > 1e-2, "the count makes no difference here"


def test_the_flow_stages_write_a_pipeline_that_reads_text_as_they_did(teacher, tmp_path, monkeypatch):
    from diffusers import StableDiffusion3Pipeline
    from teacher import flow
    from teacher.text import load_tokenizer, tokenize

    from stepdistill import embedded, load_teacher
    from stepdistill.data import avatars

    def few(split: str, whole=avatars.load):
        data = whole(split)
        return avatars.AvatarSet(data.images[:24], data.captions[:24], data.attributes[:24], data.mentioned[:24])

    monkeypatch.setattr(avatars, "load", few)
    for part in ("vae", "tokenizer"):
        shutil.copytree(embedded.path("teacher") / part, tmp_path / part)
    plan = yaml.safe_load((SCRIPTS / "configs" / "avatars_teacher.yaml").read_text())
    for stage, run_stage in (("flow_text", flow.run_flow_text), ("flow", flow.run_flow)):
        section = plan[stage] | {"budget": plan[stage]["budget"] | {"updates": 2, "batch_size": 4}}
        budget = teacher["loop"].Budget(**section.pop("budget"))
        if stage == "flow":
            section["sizes"] |= {"num_layers": 1, "num_attention_heads": 2, "caption_projection_dim": 32}
        monkeypatch.setattr(teacher["loop"], "last_loss", lambda *_: 0.0)
        monkeypatch.setattr(flow, "last_loss", lambda *_: 0.0)  # two updates log none
        run_stage(teacher["loop"].Run(tmp_path, plan=section), budget=budget, **section)

    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path / "flow-teacher", torch_dtype=torch.float32)
    assert pipe.scheduler.config.shift == 1.0
    captions = avatars.load("test").captions[:3]
    run = teacher["loop"].Run(tmp_path)
    text, pooled = flow.load_towers(run)(tokenize(load_tokenizer(run), captions, "cpu"))
    cond = load_teacher(tmp_path / "flow-teacher").conditioner.encode(captions)
    torch.testing.assert_close(cond["pooled"], pooled, atol=2e-2, rtol=2e-2)  # the towers are saved in half precision
    torch.testing.assert_close(cond["text"][:, : text.shape[1]], text, atol=2e-2, rtol=2e-2)
    assert cond["text"].shape[1] == text.shape[1] + flow.SILENT and not cond["text"][:, text.shape[1] :].any()
    picture = pipe(captions[0], num_inference_steps=2, output_type="np").images[0]
    assert picture.shape == (32, 32, 3)
