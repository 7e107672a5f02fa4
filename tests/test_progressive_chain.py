"""The chain of halvings: what each passes on, its samples in plain diffusers, and resuming after an interruption."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_trainer import ACCELERATE, environment, in_two_processes, killed_at

from stepdistill.cli.export import find_export
from stepdistill.denoiser.load import load_teacher
from stepdistill.draws import Draws
from stepdistill.errors import InputError
from stepdistill.evaluation.departures import of_steps
from stepdistill.evaluation.models import guidance_of, load
from stepdistill.evaluation.places import check_lora
from stepdistill.evaluation.protocols import load_protocol
from stepdistill.evaluation.spec import parse
from stepdistill.export.adapters import trained_weights
from stepdistill.export.folder import LORA_FILE, trained_steps
from stepdistill.training import progressive
from stepdistill.training.progressive import ProgressiveConfig, distil_chain, open_stage
from stepdistill.training.trainer import Trainer, build_models
from stepdistill.training.validation import evaluating

SCRIPT = Path(__file__).parent.parent / "train_scripts" / "train_progressive.py"
PROMPT = tiny.PROMPTS[0]
SIDE = tiny.LATENT * tiny.FACTOR
RANK, ALPHA = 4, 6.0
CASES = {  # family, LoRA, start steps, further flags
    "sd-lora": ("sd", True, 4, {"guidance": (2.0,)}),
    "sd-full": ("sd", False, 4, {"guidance": (2.0, 4.0), "embed_guidance": True}),
    "sd3-lora": ("sd3", True, 2, {"guidance": (2.0,)}),
    "sd3-full": ("sd3", False, 2, {"guidance": (2.0,), "teacher_solver": "heun"}),
}

FRESH = """
import json, sys, torch, diffusers
from safetensors.torch import save_file
drawn = {}
for case in json.load(open(sys.argv[1])):
    pipe = diffusers.DiffusionPipeline.from_pretrained(case["base"])
    pipe.set_progress_bar_config(disable=True)
    if case["lora"]:
        pipe.load_lora_weights(case["export"])
        scheduler = json.load(open(case["export"] + "/scheduler/scheduler_config.json"))["_class_name"]
        pipe.scheduler = getattr(diffusers, scheduler).from_pretrained(case["export"], subfolder="scheduler")
    torch.manual_seed(3)
    drawn[case["name"]] = pipe(
        case["prompt"], num_inference_steps=case["steps"], latents=torch.randn(1, 4, case["latent"], case["latent"]),
        output_type="latent", guidance_scale=case["guidance"], height=case["side"], width=case["side"],
    ).images.contiguous()
save_file(drawn, sys.argv[2])
assert "stepdistill" not in sys.modules
"""


@pytest.fixture(scope="module")
def chains(tmp_path_factory, pictures):
    """Every chain's configuration, and what plain diffusers samples with each of its exports."""
    root = tmp_path_factory.mktemp("chains")
    teachers = {family: str(tiny.save(root / family, family)) for family in ("sd", "sd3")}
    configs, cases = {}, []
    for name, (family, lora, start, flags) in CASES.items():
        config = ProgressiveConfig(
            teacher=teachers[family], data=pictures, out=root / name, start_steps=start, max_train_steps=2,
            batch_size=2, learning_rate=1e-2 if lora else 1e-3, rank=RANK, alpha=ALPHA, lora=lora, resolution=SIDE,
            log_every=1, **flags,
        )  # fmt: skip
        assert distil_chain(config) == root / name / "steps-1"
        configs[name] = config
        for steps in (start, *config.halvings):
            export = str(config.target(steps))
            cases.append({
                "name": f"{name}-{steps}", "base": teachers[family] if lora else export, "export": export, "lora": lora,
                "prompt": PROMPT, "steps": steps, "latent": tiny.LATENT, "side": SIDE,
                "guidance": 3.0 if config.embed_guidance else 1.0,
            })  # fmt: skip
    (root / "cases.json").write_text(json.dumps(cases))
    words = [sys.executable, "-c", FRESH, str(root / "cases.json"), str(root / "drawn.safetensors")]
    done = subprocess.run(words, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return configs, load_file(root / "drawn.safetensors")


def handed_on(config: ProgressiveConfig, steps: int):
    """The networks of a halving that would start from the student of this many steps."""
    kind = "v" if "sd-" in str(config.out) else "flow"
    teacher, start = open_stage(config.run(1), "cpu", config.target(steps), kind)
    assert teacher.denoiser.kind == kind
    return teacher, build_models(config.method(), teacher, config, {}, start)


@pytest.mark.parametrize("name", CASES)
def test_every_export_paints_in_plain_diffusers_what_the_next_halving_learns_from(chains, name):
    configs, drawn = chains
    config = configs[name]
    torch.manual_seed(3)
    x_T = torch.randn(1, 4, tiny.LATENT, tiny.LATENT)
    seen = []
    for steps in (config.start_steps, *config.halvings):
        teacher, models = handed_on(config, steps)
        cond, draws = teacher.conditioner.encode([PROMPT]), Draws.at(0, 0, 1)
        with models.shown() as student, evaluating(student.backbone):
            ours = config.method().sample(student, x_T, cond, steps=steps, draws=draws)
        theirs = config.method().sample(models.teacher, x_T, cond, steps=steps, draws=draws)
        for picture in (ours, theirs):
            assert (picture - drawn[f"{name}-{steps}"]).abs().max() < 1e-4
        seen.append(ours)
    base = load_teacher(config.teacher).resize((SIDE, SIDE))
    before = config.method().sample(base.denoiser, x_T, cond, steps=1, draws=draws)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(seen, [*seen[1:], before], strict=True))


def test_a_halving_keeps_its_teacher_while_its_student_moves(chains):
    config = chains[0]["sd-lora"]
    teacher, models = handed_on(config, 2)
    cond = teacher.conditioner.encode([PROMPT])
    x, t = torch.randn(1, 4, tiny.LATENT, tiny.LATENT), 499.0
    before = models.teacher(x, t, cond)
    with torch.no_grad():
        assert torch.allclose(models.student(x, t, cond), before, atol=1e-5)
        for parameter in models.trained["student"].values():
            parameter.add_(0.05)
        assert torch.equal(models.teacher(x, t, cond), before)
        assert not torch.allclose(models.student(x, t, cond), before, atol=1e-3)


def test_an_adapter_is_read_under_the_names_of_the_parameters(chains, tmp_path):
    config = chains[0]["sd-lora"]
    _, models = handed_on(config, 1)
    stored = load_file(config.target(1) / LORA_FILE)
    assert len(stored) == len(models.trained["student"]) > 0
    for name, parameter in models.trained["student"].items():
        assert torch.equal(parameter, stored["unet." + name.replace(".default.", ".")])
    with pytest.raises(
        InputError, match=r"lora: got .*, which holds no .safetensors file; allowed: the folder of a run"
    ):
        trained_weights(tmp_path)


def test_an_export_is_sampled_without_guidance_and_with_its_own_scheduler(chains):
    configs, _ = chains
    asked = parse(f"{configs['sd-lora'].teacher},lora={configs['sd-lora'].target(2)}")
    pipe = load(asked)
    assert guidance_of(asked, pipe, 5.0) == 1.0
    assert (type(pipe.scheduler).__name__, pipe.scheduler.config.prediction_type) == ("DDIMScheduler", "v_prediction")
    guided = parse(str(configs["sd-full"].target(1)))
    assert guidance_of(guided, load(guided), 5.0) == 3.0
    card = (configs["sd-lora"].target(2) / "README.md").read_text()
    assert "num_inference_steps=2, guidance_scale=1.0" in card


def test_what_a_student_cost_is_what_its_chain_cost(chains, tmp_path):
    whole = chains[0]["sd-lora"]
    config = dataclasses.replace(whole, out=tmp_path / "chain")
    shutil.copytree(whole.out, config.out)
    shutil.rmtree(config.target(1)), shutil.rmtree(config.run(1).out)
    done = config.run(2).out / "done.json"
    done.write_text(json.dumps(json.loads(done.read_text()) | {"seconds": 1000.0}))
    record = json.loads((distil_chain(config) / "config.json").read_text())
    assert record["method"] == "progressive-lora" and 1000 <= record["train_seconds"] < 1100
    rates = [json.loads(line)["learning_rate"] for line in (config.run(2).out / "metrics.jsonl").open()]
    assert rates == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2])  # linear, restarted in each halving


def test_the_folder_of_a_chain_is_answered_with_its_students(chains):
    with pytest.raises(InputError, match=r"a chain of students; allowed: one of steps-1, steps-2, steps-4; give .*-1"):
        check_lora(str(chains[0]["sd-lora"].out))
    with pytest.raises(InputError, match=r"folder: got .*a chain of students; allowed: one of steps-1"):
        find_export(chains[0]["sd-lora"].out)


def test_a_student_is_sampled_at_its_own_step_count_and_others_are_remarked_on(chains):
    lora = str(chains[0]["sd-lora"].target(2))
    assert trained_steps(lora) == 2 and trained_steps(None) is None and trained_steps("org/none") is None
    spec = parse(f"avatars,lora={lora}")
    protocol = load_protocol("avatars-2k")
    assert of_steps([("student", spec, (2,))], protocol, True) == []
    (line,) = of_steps([("student", spec, (1, 2))], protocol, True)
    assert line.startswith("student: a progressive student for 2 steps")


def test_a_finished_chain_is_not_run_again_and_a_longer_one_goes_on(chains, tmp_path, pictures, capsys):
    config = chains[0]["sd-lora"]
    assert distil_chain(config) == config.target(1)
    assert "already done" in capsys.readouterr().out
    short = ProgressiveConfig(
        teacher=config.teacher, data=pictures, out=tmp_path, start_steps=4, end_steps=2, max_train_steps=2,
        batch_size=2, learning_rate=1e-2, rank=RANK, alpha=ALPHA, resolution=SIDE, log_every=1, guidance=(2.0,),
    )  # fmt: skip
    distil_chain(short)
    assert not (tmp_path / "steps-1").exists()
    first = (tmp_path / "steps-2" / LORA_FILE).stat().st_mtime_ns
    distil_chain(config_at(short, end_steps=1))
    assert (tmp_path / "steps-2" / LORA_FILE).stat().st_mtime_ns == first
    assert same(tmp_path, config.out)
    with pytest.raises(InputError, match=r"--out: got .*steps-4, which holds a run with seed = 0 \(now 1\)"):
        distil_chain(config_at(short, end_steps=1, seed=1))


def config_at(config: ProgressiveConfig, **changed) -> ProgressiveConfig:
    return ProgressiveConfig(**(vars(config) | changed))


def same(a: Path, b: Path, steps: tuple[int, ...] = (4, 2, 1)) -> bool:
    """Whether two chains' LoRAs are bit-identical."""
    pairs = [(load_file(a / f"steps-{n}" / LORA_FILE), load_file(b / f"steps-{n}" / LORA_FILE)) for n in steps]
    return all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in pairs)


@pytest.mark.parametrize("lora", [True, False])
def test_the_networks_of_a_stage_are_gone_when_the_next_opens(chains, tmp_path, monkeypatch, lora):
    """Without waiting for Python's collector, which does not know how much memory they hold."""
    built, alive = [], []
    own = Trainer.__init__

    def build(self, *args, **options):
        own(self, *args, **options)
        built.extend(weakref.ref(network) for network in (self.backbone, self.models.teacher.backbone))

    monkeypatch.setattr(Trainer, "__init__", build)
    monkeypatch.setattr(
        progressive, "open_stage", lambda *rest: alive.append([r() is not None for r in built]) or open_stage(*rest)
    )
    gc.disable()
    try:
        distil_chain(config_at(chains[0]["sd-lora"], out=tmp_path / "out", lora=lora, end_steps=2))
    finally:
        gc.enable()
    assert alive == [[], [False, False]]


def test_a_dry_run_does_one_update_and_leaves_nothing(chains, tmp_path, capsys):
    distil_chain(config_at(chains[0]["sd-lora"], out=tmp_path / "out", dry_run=True))
    assert not (tmp_path / "out").exists()
    assert '"start_steps": 4' in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "warned"), [({"guidance": (1.0,)}, True), ({}, False)])
def test_updates_for_guidance_that_is_not_distilled_are_said_to_be_unused(tmp_path, pictures, capsys, flags, warned):
    teacher = str(tiny.save(tmp_path / "sd3", "sd3"))
    config = ProgressiveConfig(
        teacher=teacher, data=pictures, out=tmp_path / "out", resolution=SIDE, start_steps=2, guide_updates=5, rank=2,
        batch_size=2, dry_run=True,
    )  # fmt: skip
    distil_chain(config_at(config, **flags))
    line = "guide_updates: 5 not used; this chain starts with its first halving"
    assert (line in capsys.readouterr().out) == warned


def test_a_chain_of_32_to_1_killed_in_the_middle_of_halvings_ends_with_the_same_bits(tmp_path, pipelines, pictures):
    """Killed twice, so that an interrupted chain passes on both kinds of export: those of 32 and 16 steps, and of 4."""
    flags = ["--start-steps", "32", "--max-train-steps", "8", "--final-factor", "1", "--checkpoint-every", "3"]
    flags += ["--rank", "2", "--batch-size", "2", "--guidance", "2", "--learning-rate", "1e-3", "--lora-dropout", "0.1"]
    words = [sys.executable, str(SCRIPT), "--teacher", pipelines["sd"], "--data", pictures, "--log-every", "1", *flags]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run([*words, "--out", str(whole)], env=environment(), check=True, capture_output=True)
    again = [*words, "--out", str(cut)]
    for steps, kind in ((16, "DPMSolverMultistepScheduler"), (2, "DDIMScheduler")):
        run, before = cut / "runs" / f"steps-{steps}", cut / f"steps-{2 * steps}"
        assert killed_at(run / "metrics.jsonl", 5, again)
        assert json.loads((before / "scheduler" / "scheduler_config.json").read_text())["_class_name"] == kind
        assert not (cut / f"steps-{steps}").exists()
        assert [folder.parent for folder in (cut / "runs").glob("*/checkpoints")] == [run], "finished stages keep none"
    subprocess.run(again, env=environment(), check=True, capture_output=True)
    assert same(whole, cut, (32, 16, 8, 4, 2, 1))
    assert not list((cut / "runs").glob("*/checkpoints"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--start-steps", "24"], "start_steps: got 24; allowed: a power of two, as each halving needs; try 32"),
        (["--embed-guidance"], "embed_guidance: got it for a LoRA; allowed: a full student (--no-lora)"),
        (["--target-modules", "to_z"], "target modules: got to_z, which match no layer; allowed: endings such"),
        (["--teacher", "{empty}"], "pipeline: got {empty} (no model_index.json); allowed: a diffusers pipeline folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(tmp_path, tmp_path_factory, pipelines, pictures, flags, message):
    empty = str(tmp_path_factory.mktemp("empty"))
    words = [sys.executable, str(SCRIPT), "--teacher", pipelines["sd"], "--data", pictures, "--out", str(tmp_path)]
    words += [flag.format(empty=empty) for flag in flags]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {message.format(empty=empty)}"), done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("stages", "student"), [((4, 2, 1), ["--rank", "2"]), ((2, 1), ["--no-lora", "--embed-guidance"])],
    ids=["lora", "full"],
)  # fmt: skip
def test_two_processes_have_the_losses_of_one_at_the_same_global_batch(tmp_path, pipelines, pictures, stages, student):
    """In every stage of a chain: guidance, then halvings, each from the export of the one before.

    Adam's epsilon is raised: if a gradient is pure rounding error, Adam takes full steps of its sign.
    """
    words = [
        sys.executable, str(SCRIPT), "--teacher", pipelines["sd"], "--data", pictures, "--guidance", "2",
        *student, "--start-steps", str(stages[0]), "--max-train-steps", "10", "--final-factor", "1", "--log-every", "1",
        "--learning-rate", "1e-3", "--adam-epsilon", "1e-3",
    ]  # fmt: skip
    in_two_processes([*words, "--out", str(tmp_path / "two"), "--batch-size", "2"], by=ACCELERATE)
    one = [*words, "--out", str(tmp_path / "one"), "--batch-size", "4"]
    subprocess.run(one, env=environment(), check=True, capture_output=True)
    for stage in stages:
        logs = [
            [json.loads(line) for line in log.read_text().splitlines()]
            for log in (tmp_path / name / "runs" / f"steps-{stage}" / "metrics.jsonl" for name in ("one", "two"))
        ]
        assert len(logs[0]) == len(logs[1]) == 10
        for mine, theirs in zip(*logs, strict=True):
            assert theirs["distillation"] == pytest.approx(mine["distillation"], rel=1e-5), (stage, mine["update"])
