"""Every command in the documentation and in the recipes is one that the program takes."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
import torch

from stepdistill import cli
from stepdistill.baselines import BASELINES, get
from stepdistill.baselines.sweep import parse_over, variants
from stepdistill.cli import baselines, train
from stepdistill.cli.command import parse
from stepdistill.cli.training import parse_training
from stepdistill.training.lcm import FullLCMConfig, LCMConfig
from stepdistill.training.plans import FLAGS

ROOT = Path(__file__).parents[1]
PLACES = ("README.md", "docs/*.md", "benchmarks/README.md", "assets/*/README.md", "train_scripts/configs/**/*.yaml",
          "train_scripts/*.py", "stepdistill/**/*.py")  # fmt: skip
COMMAND = re.compile(r"^[\s#$]*((?:stepdistill|accelerate launch|torchrun) .*)$", re.MULTILINE)
CONFIGS = {f"train_{method}.py": getattr(import_module(module), name) for method, (module, name) in FLAGS.items()}
CONFIGS |= {"train_lcm.py": FullLCMConfig, "train_lcm_lora.py": LCMConfig}


def documented() -> list[str]:
    """All commands, continuation lines joined."""
    files = sorted(file for place in PLACES for file in ROOT.glob(place))
    texts = [re.sub(r"\\+\n\s*#?\s*", "", file.read_text()) for file in files]
    return list(dict.fromkeys(command for text in texts for command in COMMAND.findall(text)))


@pytest.mark.parametrize("command", documented())
def test_a_documented_command_is_parsed(command, monkeypatch):
    monkeypatch.chdir(ROOT)  # a --config is relative to it
    told = command.replace("--model ...", "--model avatars").replace("my/protocol.yaml", "avatars-2k")
    words = [word for word in shlex.split(told, comments=True) if word != "..."]
    if scripts := [word for word in words if re.fullmatch(r"train_scripts/\w+\.py", word)]:
        argv, name = words[words.index(scripts[0]) + 1 :], Path(scripts[0]).name
        assert (ROOT / scripts[0]).is_file()
        if name == "train_baseline.py":
            baselines.flags(argv[0], argv[1:])
        else:
            parse_training(CONFIGS[name], None, argv)
        return
    argv = words[words.index("stepdistill") + 1 :]
    name = " ".join(argv[: 2 if " ".join(argv[:2]) in cli.COMMANDS else 1])
    argv = argv[len(name.split()) :]
    assert name in cli.COMMANDS
    if name == "train":
        train.flags(argv[0], argv[1:])
    elif name != "baselines":
        parse(import_module(f"stepdistill.cli.{name.split()[-1]}").Config, argv)
    elif argv[0] in ("run", "sweep"):
        over = []
        if "--over" in argv:
            at = argv.index("--over")
            over = [parse_over(argv[at + 1], get(argv[1]).config)]
            del argv[at : at + 2]
        config = baselines.flags(argv[1], argv[2:])
        assert all(variants(config, *each) for each in over)
    else:
        assert argv[0] in baselines.VERBS


def test_there_are_commands_to_parse():
    assert len(documented()) > 120


@pytest.mark.parametrize("name", BASELINES)
def test_help_names_recipes_that_exist_in_place_of_flags_that_no_test_parses(name):
    told = get(name).config.__doc__
    for recipe in re.findall(r"\w+\.yaml", told):
        assert (ROOT / "train_scripts/configs/baselines" / recipe).is_file()
    assert not re.search(r"--(teacher|student|data)\s", told)


def test_the_python_in_the_readme_runs(tmp_path, pictures, monkeypatch):
    """With fewer images, real ones too, and one update."""
    monkeypatch.chdir(tmp_path)
    protocol = (ROOT / "benchmarks" / "protocols" / "avatars-2k.yaml").read_text()
    (tmp_path / "small.yaml").write_text(f"{protocol}reference_n: 400\n")
    (text,) = re.findall(r"## Use from Python\n(.*?)\n## ", (ROOT / "README.md").read_text(), re.DOTALL)
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    fewer = {
        "max_train_steps=300": "max_train_steps=1, batch_size=2",
        "n=300": "n=8",
        'data="avatars"': f"data={pictures!r}",
        '"avatars-2k"': repr(str(tmp_path / "small.yaml")),
    }
    for there, here in fewer.items():
        assert code.count(there) == 1
        code = code.replace(there, here)
    exec(code, found := {})
    assert (tmp_path / "out" / "lcm" / "export").is_dir()
    students = [row for row in found["results"].rows if row["model"] == "student"]
    assert [row["steps"] for row in students] == [1, 2, 4] and all(row["fd"] > 0 for row in students)
    alpha, sigma = found["schedule"].coeffs(500)
    torch.testing.assert_close(found["v"], (alpha * found["noise"] - sigma * found["x0"]).float(), atol=1e-5, rtol=1e-5)
    assert found["image"].shape == (1, 3, 32, 32)
