"""The training scripts' interface: help, flags, YAML files and the shipped settings."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from stepdistill.cli.training import parse_training
from stepdistill.errors import InputError
from stepdistill.training import plans
from stepdistill.training.add import ADDConfig
from stepdistill.training.config import TrainConfig
from stepdistill.training.from_yaml import from_yaml
from stepdistill.training.ladd import LADDConfig
from stepdistill.training.lcm import FullLCMConfig, LCMConfig
from stepdistill.training.progressive import ProgressiveConfig

ROOT = Path(__file__).parent.parent
FLAGS = {
    "train_lcm": FullLCMConfig, "train_lcm_lora": LCMConfig, "train_progressive": ProgressiveConfig,
    "train_add": ADDConfig, "train_ladd": LADDConfig,
}  # fmt: skip
CONFIGS = [f for f in sorted((ROOT / "train_scripts" / "configs").glob("*.yaml")) if f.stem != "avatars_teacher"]


def script(name: str, folder: str = "train_scripts"):
    spec = importlib.util.spec_from_file_location(name, ROOT / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def method_of(file: Path) -> str:
    """lcm, progressive, add or ladd, from a settings file's name."""
    return next(part for part in file.stem.split("_") if part in plans.FLAGS)


def kind_of(file: Path) -> type[TrainConfig]:
    if file.stem.endswith("_lcm"):
        return FullLCMConfig
    module, name = plans.FLAGS[method_of(file)]
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("name", FLAGS)
def test_help_opens_with_the_command_and_says_what_every_flag_does(name, capsys):
    module = script(name)
    assert f"accelerate launch train_scripts/{name}.py --" in module.__doc__.split("\n\n")[1]
    with pytest.raises(SystemExit) as stop:
        parse_training(FLAGS[name], module.__doc__, ["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "accelerate launch" in text and "resumes" in text
    lines = [line.strip("│ ") for line in text.splitlines()]
    for field in dataclasses.fields(FLAGS[name]):
        flag = "--" + field.name.replace("_", "-")
        at = next(i for i, line in enumerate(lines) if line.startswith(flag))
        description = " ".join(lines[at : at + 3]).replace(flag, "").split("(default")[0]
        words = re.sub(r"\{.*?\}|\[.*?\]|--\S+", "", description)
        assert re.search(r"[A-Z]?[a-z]{4,}", words), f"{flag}: {description}"


@pytest.mark.parametrize("name", FLAGS)
def test_the_script_is_thin_and_an_unknown_flag_is_one_line_with_the_nearest(name):
    file = ROOT / "train_scripts" / f"{name}.py"
    assert len(file.read_text().splitlines()) < 45
    done = subprocess.run(
        [sys.executable, str(file), "--lerning-rate", "1"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and "--learning-rate" in done.stderr


def test_hyphens_and_underscores_are_the_same():
    flags = ["--max-train-steps", "3", "--learning_rate", "1e-3", "--gradient_accumulation", "2", "--no-lora"]
    config = parse_training(LCMConfig, None, flags)
    assert (config.max_train_steps, config.learning_rate, config.gradient_accumulation) == (3, 1e-3, 2)
    assert not config.lora


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.stem)
def test_shipped_settings_are_read_name_their_command_and_mark_their_estimates(file):
    kind = kind_of(file)
    config, text = from_yaml(file, kind), file.read_text()
    config.check()
    assert config.lora == ("lora" in file.stem) and config.method().name == method_of(file)
    stem = f"train_{method_of(file)}{'_lora' * (kind is LCMConfig)}.py"
    assert f"--config train_scripts/configs/{file.name}" in text and f"accelerate launch train_scripts/{stem}" in text
    for key, value in yaml.safe_load(text).items():
        got = getattr(config, key)
        got = list(got) if isinstance(got, tuple) else str(got) if isinstance(got, Path) else got
        assert got == pytest.approx(value) if isinstance(value, float) else got == value
    if "avatars" in file.stem:
        assert config.teacher in ("avatars", "avatars-flow") and "estimate" in text
    else:
        assert re.search(r"# Memory \(estimate\): ", text) and re.search(r"# Time \(estimate\): ", text)
        samples = config.batch_size * config.gradient_accumulation
        assert f"{samples} samples an update" in text or f"updates of {samples} samples" in text


# per family: numbers cached per caption (tokens times width, and pooled), latent channels, pixels per latent
KEPT = {
    "sd15": (77 * 768 + 768, 4, 8), "sdxl": (77 * 2048 + 1280, 4, 8), "sd35": ((77 + 256) * 4096 + 2048, 16, 8),
    "flux_dev": (512 * 4096 + 768, 16, 8), "pixart_sigma": (300 * 4096, 4, 8), "sana": (300 * 2304, 32, 32),
}  # fmt: skip


@pytest.mark.parametrize("file", [f for f in CONFIGS if "avatars" not in f.stem], ids=lambda f: f.stem)
def test_the_disk_that_samples_take_is_what_their_numbers_take(file):
    config = from_yaml(file, kind_of(file))
    text, channels, factor = next(sizes for family, sizes in KEPT.items() if file.stem.startswith(family))
    taken = (2 if config.half else 4) * (text + channels * (config.resolution // factor) ** 2)
    found = re.search(
        r"# Disk \(estimate\): ([\d.]+) MB a sample with a caption of its own, (\d+) GB for 100,000; (.*)\.",
        file.read_text(),
    )
    assert float(found[1]) == pytest.approx(taken / 1e6, rel=0.05)
    assert int(found[2]) == pytest.approx(taken / 1e4, rel=0.05)
    assert found[3] == ("twice that with --no-half" if config.half else "--half halves it")


def test_the_table_of_memory_is_what_the_files_say():
    """The training column of docs/recipes.md lists the files of a row in order, the start column what all LoRAs say."""
    rows = re.findall(r"^\|.*`\w+_ladd_lora`.*\|$", (ROOT / "docs" / "recipes.md").read_text(), re.MULTILINE)
    names_by_row = {row: re.findall(r"`(\w+)`", row) for row in rows if "avatars" not in row}
    assert len(names_by_row) == len(KEPT)
    for row, names in names_by_row.items():
        *_, training, start, _ = (cell.strip() for cell in row.split("|"))
        texts = {f.stem: f.read_text().replace("\n# ", " ") for f in CONFIGS if f.stem in names}
        names = [
            *(n for n in names if n.endswith("_lora")),
            *(n for n in names if not n.endswith("_lora")),
        ]  # full last
        assert re.findall(r"\d+", training) == [re.search(r"(\d+) GB in training", texts[n])[1] for n in names]
        loras = [text for name, text in texts.items() if name.endswith("_lora")]
        at_start = {re.search(r"at the start (\d+), or (\d+) if", text).groups() for text in loras}
        assert at_start == {tuple(re.findall(r"\d+", start))}, row


def call_on_meta(name: str) -> None:
    """One forward of a recipe's network at its resolution, on torch's meta device."""
    import diffusers
    from torch import empty

    if name == "sd15":
        diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768)(
            empty(1, 4, 64, 64), empty(1), empty(1, 77, 768)
        )
    elif name == "sdxl":
        network = diffusers.UNet2DConditionModel(
            sample_size=128, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280), transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20), cross_attention_dim=2048, use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        )  # fmt: skip
        added = {"text_embeds": empty(1, 1280), "time_ids": empty(1, 6)}
        network(empty(1, 4, 128, 128), empty(1), empty(1, 77, 2048), added_cond_kwargs=added)
    elif name == "sd35":
        diffusers.SD3Transformer2DModel(
            sample_size=128, num_layers=24, attention_head_dim=64, num_attention_heads=24, joint_attention_dim=4096,
            caption_projection_dim=1536, pooled_projection_dim=2048, pos_embed_max_size=384, qk_norm="rms_norm",
            dual_attention_layers=tuple(range(13)),
        )(empty(1, 16, 128, 128), empty(1, 333, 4096), empty(1, 2048), empty(1))  # fmt: skip
    elif name == "flux_dev":
        diffusers.FluxTransformer2DModel(guidance_embeds=True)(
            empty(1, 4096, 64), empty(1, 512, 4096), empty(1, 768), empty(1), empty(4096, 3), empty(512, 3), empty(1)
        )
    elif name == "pixart_sigma":
        network = diffusers.PixArtTransformer2DModel(
            sample_size=128, use_additional_conditions=False, caption_channels=4096
        )
        network(empty(1, 4, 128, 128), empty(1, 300, 4096), empty(1))
    else:
        diffusers.SanaTransformer2DModel()(empty(1, 32, 32, 32), empty(1, 300, 2304), empty(1))


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd35", "flux_dev", "pixart_sigma", "sana"])
def test_the_hours_of_painting_are_what_the_forwards_take(name):
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    text = next(file for file in CONFIGS if file.stem == f"{name}_ladd_lora").read_text()
    wanted = r"about ([\d.]+) hours? of one ([AH])100 for 5000 prompts \((\d+) forwards each"
    hours, gpu, forwards = re.search(wanted, text).groups()
    assert int(forwards) == (50 if name == "flux_dev" else 100)  # 50 steps; guidance doubles, unless it is an input
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as count:
        call_on_meta(name)
    peak = {"A": 312e12, "H": 989e12}[gpu]
    taken = 5000 * int(forwards) * count.get_total_flops() / (0.4 * peak) / 3600
    assert float(hours) == pytest.approx(taken, rel=0.15)


def test_there_are_settings_of_every_method_for_every_family():
    families = ("avatars", "sd15", "sdxl", "sd35", "flux_dev", "pixart_sigma", "sana")
    named = {f"{family}_{method}_lora" for family in families for method in ("lcm", "progressive", "add", "ladd")}
    assert {f.stem for f in CONFIGS} >= named


def networks():
    """Each family's denoiser class, and its sizes."""
    import diffusers

    down, up = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
    xl = {"block_out_channels": (320, 640, 1280), "down_block_types": ("DownBlock2D", down, down),
          "up_block_types": (up, up, "UpBlock2D"), "cross_attention_dim": 2048}  # fmt: skip
    return {
        "sd15": (diffusers.UNet2DConditionModel, {}), "sdxl": (diffusers.UNet2DConditionModel, xl),
        "sd35": (diffusers.SD3Transformer2DModel, {"num_layers": 24}),
        "flux_dev": (diffusers.FluxTransformer2DModel, {}),
        "pixart_sigma": (diffusers.PixArtTransformer2DModel, {}), "sana": (diffusers.SanaTransformer2DModel, {}),
    }  # fmt: skip


@pytest.mark.parametrize("file", [f for f in CONFIGS if "_ladd" in f.stem and "avatars" not in f.stem], ids=str)
def test_the_judged_blocks_are_in_networks_of_that_size(file):
    import torch

    from stepdistill.features import check_blocks

    network, sizes = networks()[file.stem.split("_ladd")[0]]
    with torch.device("meta"):
        backbone = network(**sizes)
    assert len(check_blocks(backbone, from_yaml(file, LADDConfig).blocks)) == 4


def test_yaml_values_become_the_fields_types(tmp_path):
    file = tmp_path / "run.yaml"
    lines = ["learning-rate: 1e-3", "guidance: 4", "alpha: null", "mixed_precision: no", "out: a/b", "trackers: []"]
    file.write_text("\n".join([*lines, "target_modules: [to_q]", "adam_betas: [0.9, 0.95]"]))
    config = from_yaml(file, LCMConfig)
    assert (config.learning_rate, config.guidance, config.alpha, config.mixed_precision) == (1e-3, (4.0,), None, "no")
    assert (config.out, config.target_modules, config.adam_betas) == (Path("a/b"), ("to_q",), (0.9, 0.95))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank: lots", "--config .*run.yaml: got rank: 'lots'; allowed: a whole number"),
        ("learning_rate: high", "got learning_rate: 'high'; allowed: a number"),
        ("compile: 3", "got compile: 3; allowed: true or false"),
        ("loss: l1", "got loss: 'l1'; allowed: huber, l2"),
        ("adam_betas: [0.9]", "got adam_betas: .*; allowed: a list of 2"),
        ("student-steps: 4\nreconstruction-weight: 1", "whose settings are of ladd; .* stepdistill train ladd"),
        ("lerning-rate: 1", r"got the field 'lerning_rate'; .*; did you mean learning_rate\?"),
        ("- rank", r"got \['rank'\]; allowed: fields with values"),
        ("rank: [", "no YAML .*; allowed: names and values in UTF-8"),
        ("rank: 4\nrank: 8", "rank stands there twice"),
    ],
)
def test_bad_yaml_is_named(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        from_yaml(file, LCMConfig)


def test_a_yaml_file_that_is_not_there_is_named():
    with pytest.raises(InputError, match=r"--config: got .*nothing.yaml"):
        parse_training(LCMConfig, None, ["--config", "nothing.yaml"])


def test_the_speed_benchmark_measures_both_ways_and_writes_what_it_ran_on(tmp_path, monkeypatch, capsys):
    speed = script("training_speed", "benchmarks")
    shapes = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    network = shapes | blocks | {"cross_attention_dim": 16, "attention_head_dim": 2}
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setitem(speed.UNETS, "avatars", network)
    monkeypatch.setitem(
        speed.VAES, "avatars", {"block_out_channels": (8, 8), "latent_channels": 4, "norm_num_groups": 4}
    )
    monkeypatch.setitem(speed.TEXTS, "avatars", text | {"max_position_embeddings": 8, "vocab_size": 32})
    out = tmp_path / "speed.json"
    speed.main(speed.Config(batch=2, rank=2, rounds=2, memory=False, out=out))
    record = json.loads(out.read_text())
    figures = record["figures"]
    for name in ("step", "teacher", "target", "student", "script", "pictures"):
        assert figures[f"{name}_ms"] > 0
    assert set(figures["script_over_step"]) == {"median", "quartiles"}
    assert {"device", "commit", "versions", "command", "seed", "batch", "mixed_precision"} <= record.keys()
    assert "our re-implementation of the public scripts' step / our step" in record["what"]
    assert "public scripts' step, our re-implementation" in capsys.readouterr().out


@pytest.mark.parametrize("page", ["LCM: ", "Progressive ", "ADD: ", "LADD: "])
def test_the_page_of_a_method_says_what_an_update_costs_and_when_to_choose_it(page):
    pages = (ROOT / "docs" / "methods.md").read_text().split("\n## ")
    (text,) = (each for each in pages if each.startswith(page))
    assert re.search(r"An update\s+(costs|decodes)", text) and re.search(r"Choose it\s+\w", text)
