"""Every method on every backbone, LoRA and full: two updates, and plain diffusers generates what the trainer does.

One fresh process, without stepdistill, loads and samples all the exports.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from stepdistill.denoiser.load import load_teacher
from stepdistill.draws import Draws
from stepdistill.errors import InputError
from stepdistill.export.folder import LORA_FILE, PEFT_FILE
from stepdistill.export.fused import save_fused
from stepdistill.export.kohya import save_kohya
from stepdistill.training.add import ADDConfig
from stepdistill.training.config import TrainConfig
from stepdistill.training.ladd import LADDConfig
from stepdistill.training.lcm import LCMConfig
from stepdistill.training.progressive import ProgressiveConfig, distil_chain
from stepdistill.training.run import distil
from stepdistill.training.trainer import Trainer
from stepdistill.training.validation import evaluating

PROMPT = "a red cat with a blue hat"
FAMILIES = ("sd", "sdxl", "sd3", "flux", "pixart", "sana", "pixel")
METHODS = ("lcm", "progressive", "add", "ladd")
CASES = [(method, family, lora) for method in METHODS for family in FAMILIES for lora in (True, False)]
BINNED = ("pixart", "sana")  # pipelines that would round the image size to one of their own
RANK, ALPHA = 4, 6.0
STEPS = {"lcm": (1, 4), "progressive": (2, 1), "add": (1, 4), "ladd": (1, 4)}  # what a student is sampled at

FRESH = """
import json, sys, torch, diffusers
from safetensors.torch import save_file
for case in json.load(open(sys.argv[1])):
    pipe = diffusers.DiffusionPipeline.from_pretrained(case["base"])
    pipe.set_progress_bar_config(disable=True)
    network = pipe.components[case["part"]]
    if case["lora"] and hasattr(pipe, "load_lora_weights"):
        pipe.load_lora_weights(case["export"])
    elif case["lora"]:
        from peft import PeftModel
        network = PeftModel.from_pretrained(network, case["export"]).base_model.model
        setattr(pipe, case["part"], network)
    if case["lora"]:
        scheduler = json.load(open(case["export"] + "/scheduler/scheduler_config.json"))["_class_name"]
        pipe.scheduler = getattr(diffusers, scheduler).from_pretrained(case["export"], subfolder="scheduler")
    got = {k: p.detach().contiguous() for k, p in network.named_parameters() if ".lora_" in k}
    got = {"lora:" + k.replace(".default_0.", ".").replace(".default.", "."): p for k, p in got.items()}
    if not case["lora"]:
        got |= {"full:" + k: v.contiguous() for k, v in network.state_dict().items()}
    if case["lora"]:
        config = next(iter(network.peft_config.values()))
        got["r_alpha"] = torch.tensor([config.r, config.lora_alpha])
    for steps in case["steps"]:
        torch.manual_seed(3)
        if case["prompt"] is None:
            drawn = pipe(1, num_inference_steps=steps, output_type="np").images
            got[str(steps)] = torch.from_numpy(drawn).contiguous()
        else:
            x_T = torch.randn(case["noise"])
            even = {"sigmas": [1 - i / steps for i in range(steps)]} if case["even"] else {}
            got[str(steps)] = pipe(case["prompt"], num_inference_steps=steps, latents=x_T, output_type="latent",
                                   **case["options"], **even).images
    save_file(got, case["result"])
assert "stepdistill" not in sys.modules
"""


def packed(x: torch.Tensor) -> torch.Tensor:
    """Packs latents as FluxPipeline does."""
    from diffusers import FluxPipeline

    return FluxPipeline._pack_latents(x, *x.shape)


def unpacked(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    from diffusers import FluxPipeline

    return FluxPipeline._unpack_latents(x, 8 * shape[1], 8 * shape[2], 8)


class Given(Draws):
    """Draws that return the tensors of a list in order."""

    def __init__(self, noises: list[torch.Tensor]) -> None:
        super().__init__([0] * len(noises[0]))
        self.noises = iter(noises)

    def normal(self, *shape):
        return next(self.noises)


def name_of(method: str, family: str, lora: bool) -> str:
    return f"{method}-{family}-{'lora' if lora else 'full'}"


def settings_of(method: str, family: str) -> tuple[type, dict]:
    """The class of flags, and the values specific to this method."""
    scale = 1.0 if family == "pixel" else 2.0
    if method == "lcm":
        return LCMConfig, {"guidance": (scale,)}
    if method == "progressive":
        return ProgressiveConfig, {"guidance": (scale,), "start_steps": 4, "end_steps": 1, "final_factor": 1.0}
    if method == "add":
        return ADDConfig, {"guidance": scale, "feature_network": "efficientnet_lite2", "feature_resolution": 64}
    return LADDConfig, {"guidance": scale}


def distilled(method: str, config: TrainConfig) -> list[tuple[Path, Trainer, tuple[int, ...]]]:
    """Returns each export, the run that made it, and what it is sampled at; a chain's halvings have one each."""
    runs, finish = [], Trainer._finish
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_finish", lambda run: runs.append(run) or finish(run))
        export = distil_chain(config) if method == "progressive" else distil(config)
    if method != "progressive":
        return [(export, runs[-1], STEPS[method])]
    halvings = zip(STEPS[method], runs[-2:], strict=True)  # a run before them distils guidance, if there is any
    return [(config.out / f"steps-{steps}", run, (steps,)) for steps, run in halvings]


@pytest.fixture(scope="module")
def matrix(tmp_path_factory, pictures):
    """Outputs of our sampler and of plain diffusers, by case; and the folder of the runs."""
    root = tmp_path_factory.mktemp("matrix")
    teachers = {f: str(tiny.save(root / f, f, **({"kind": "sample"} if f == "pixel" else {}))) for f in FAMILIES}
    cases, ours = [], {}
    for method, family, lora in CASES:
        name = name_of(method, family, lora)
        kind, own = settings_of(method, family)
        side = tiny.LATENT * (1 if family == "pixel" else tiny.FACTOR)
        config = kind(
            teacher=teachers[family], data=pictures, out=root / name, max_train_steps=2, batch_size=2, resolution=side,
            learning_rate=1e-2 if lora else 1e-3, lr_scheduler="constant", rank=RANK, alpha=ALPHA, lora=lora, **own,
        )  # fmt: skip
        base = load_teacher(teachers[family]).resize((side, side)).denoiser
        for export, run, sampled in distilled(method, config):
            cond = {} if family == "pixel" else run.teacher.conditioner.encode([PROMPT])
            shape = (1, *run.teacher.sample_shape)
            like = packed(torch.zeros(shape)) if family == "flux" else torch.zeros(shape)
            with run.models.shown() as student, evaluating(student.backbone):
                for steps in sampled:
                    torch.manual_seed(3)
                    noises = [torch.randn(like.shape) for _ in range(steps)]
                    if family == "flux":
                        noises = [unpacked(noise, shape[1:]) for noise in noises]
                    for network, painted in ((student, name), (base, f"{name}-base")):
                        given = Given(noises[1:] or noises)
                        ours[painted, steps] = run.method.sample(network, noises[0], cond, steps=steps, draws=given)
            options = {"guidance_scale": 2.0 if family == "flux" else 1.0, "height": side, "width": side}
            options |= {"use_resolution_binning": False} if family in BINNED else {}
            cases.append({
                "base": teachers[family] if lora else str(export), "export": str(export), "lora": lora,
                "part": run.teacher.part, "prompt": None if family == "pixel" else PROMPT, "steps": sampled,
                "even": json.loads((export / "config.json").read_text()).get("sigmas") == "even",
                "options": options, "noise": list(like.shape),
                "result": str(root / f"{name}.{sampled[-1]}.safetensors"),
            })  # fmt: skip
            ours[name, "export"], ours[name, "shape"] = export, shape
            ours[name, "noise"], ours[name, "cond"] = noises[0], cond
    spec = root / "cases.json"
    spec.write_text(json.dumps(cases))
    done = subprocess.run([sys.executable, "-c", FRESH, str(spec)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs: dict[str, dict[str, torch.Tensor]] = {}
    for case in cases:  # in order: of a chain, the last export's tensors are kept
        theirs.setdefault(Path(case["result"]).name.split(".")[0], {}).update(load_file(case["result"]))
    return ours, theirs, root


@pytest.mark.parametrize(("method", "family", "lora"), CASES)
def test_plain_diffusers_paints_what_the_trainer_paints(matrix, method, family, lora):
    ours, theirs, _ = matrix
    name = name_of(method, family, lora)
    for steps in STEPS[method]:
        mine, drawn = ours[name, steps], theirs[name][str(steps)]
        if family == "flux":
            drawn = unpacked(drawn, ours[name, "shape"][1:])
        if family == "pixel":
            mine, drawn = (mine / 2 + 0.5).clamp(0, 1), drawn.permute(0, 3, 1, 2)
            assert ((mine > 0) & (mine < 1)).float().mean() > 0.1
        # PixArt's untrained eps becomes an x0 in the hundreds, where float32 itself rounds by 6e-5
        assert (mine - drawn).abs().max() < (1e-6 * mine.abs().max() if family == "pixart" else 1e-4)
        assert (ours[name, steps] - ours[f"{name}-base", steps]).abs().max() > 1e-3


@pytest.mark.parametrize(("method", "family"), [(method, family) for method, family, lora in CASES if lora])
def test_every_tensor_of_a_lora_is_loaded_with_its_rank_and_alpha(matrix, method, family):
    ours, theirs, _ = matrix
    name = name_of(method, family, lora=True)
    export = ours[name, "export"]
    saved = load_file(export / (LORA_FILE if (export / LORA_FILE).is_file() else PEFT_FILE))
    loaded = {k.removeprefix("lora:"): v for k, v in theirs[name].items() if k.startswith("lora:")}
    plain = {k.removeprefix("base_model.model.").split(".", 1 if k.startswith(("unet.", "transformer.")) else 0)[-1]: v
             for k, v in saved.items()}  # fmt: skip
    assert loaded.keys() == plain.keys() and len(loaded) > 0
    assert all(torch.equal(loaded[k], plain[k]) for k in loaded)
    assert theirs[name]["r_alpha"].tolist() == [RANK, ALPHA]


@pytest.mark.parametrize(("method", "family"), [(method, family) for method, family, lora in CASES if not lora])
def test_every_tensor_of_a_full_student_is_loaded(matrix, method, family):
    ours, theirs, _ = matrix
    name = name_of(method, family, lora=False)
    files = [*ours[name, "export"].glob("unet/*.safetensors"), *ours[name, "export"].glob("transformer/*.safetensors")]
    saved = {key: value for file in files for key, value in load_file(file).items()}
    loaded = {k.removeprefix("full:"): v for k, v in theirs[name].items() if k.startswith("full:")}
    assert loaded.keys() == saved.keys() and len(loaded) > 0
    assert all(torch.equal(loaded[k], saved[k]) for k in loaded)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_fused_into_its_teacher_paints_the_same(matrix, tmp_path, family):
    ours, _, root = matrix
    name = name_of("lcm", family, lora=True)
    out = save_fused(root / name / "export", tmp_path / "fused", teacher=str(root / family))
    student = load_teacher(out).resize((tiny.LATENT * (1 if family == "pixel" else tiny.FACTOR),) * 2)
    assert not any(".lora_" in key for key in student.denoiser.backbone.state_dict())
    kind, own = settings_of("lcm", family)
    given = Given([ours[name, "noise"]])
    with torch.no_grad():
        drawn = (
            kind(**own).method().sample(student.denoiser, ours[name, "noise"], ours[name, "cond"], steps=1, draws=given)
        )
    assert (drawn - ours[name, 1]).abs().max() < 1e-4 * drawn.abs().max().clamp(min=1)
    card = (out / "README.md").read_text()
    assert "load_lora_weights" not in card and "PeftModel" not in card and str(out) in card


def test_a_transformers_lora_has_no_kohya_form(matrix, tmp_path):
    with pytest.raises(InputError, match=r"kohya: got .*, a LoRA of a transformer; allowed: one of a UNet"):
        save_kohya(matrix[2] / "lcm-flux-lora" / "export", tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())
