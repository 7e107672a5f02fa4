"""The `stepdistill` command: finds the sub-command, parses its flags, runs it. Each sub-command is one file here."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module

from stepdistill import __version__
from stepdistill.cli.command import guard, parse
from stepdistill.errors import InputError

COMMANDS = {
    "demo": "distil the embedded teacher with four methods, measure them all, write the report",
    "train": "distil a teacher of your own by one method",
    "cache": "compute latents and text embeddings once",
    "sample": "generate an image grid from any model at any step count",
    "bench": "measure quality and latency of models by step count",
    "bench compare": "compare two models: better, worse or no difference found",
    "bench gate": "check a benchmark's figures against bounds; exit code 1 if one is missed",
    "report": "write report.md and a self-contained report.html of a benchmark",
    "baselines": "distil classifiers, language models and smaller UNets; list, run, sweep, eval",
    "export": "export a student for diffusers, for kohya, or fused into its teacher",
}
HELP = """stepdistill {version}: distils diffusion and flow pipelines of 25-50 steps into 1-8, and measures the cost

usage: stepdistill COMMAND [flags]          flags of a command: stepdistill COMMAND --help

{commands}

Start here; nothing is downloaded:
  stepdistill demo --quick

Train a student of your own, view its images, measure it:
  accelerate launch -m stepdistill train lcm-lora --teacher FOLDER --data IMAGES --out student
  stepdistill sample --model FOLDER,lora=student --prompt "a red hat" --steps 4 --out grid.png
  stepdistill bench --model teacher=FOLDER --model student=FOLDER,lora=student --data IMAGES

A model is a SPEC: a diffusers folder, a hub id, or avatars (the embedded teacher), followed by options,
separated by commas. A training run's folder stands for the student in it.
lora=DIR scheduler=ddim|lcm|tcd|dpmpp|euler|euler-a|heun|unipc guidance=1.5 variant=fp16 dtype=bf16 name=NAME
sigmas=even (for a flow: no step wasted at 1/1000) unet=FILE spacing=trailing timesteps=999+499 size=512 tokens=256
revision=NAME (of a hub repository) prediction=epsilon|v_prediction|sample (of unet=FILE, if it is not the pipeline's)
owner/name/file.safetensors is a file on the hub. Ready models, such as
@sdxl-turbo, are listed by stepdistill bench --list-models.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line, given without the program's name.

    Returns:
        The exit code: 0; 1 for a failed gate; 2 for rejected input or a failure; 130 for Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        commands = "\n".join(f"  {name:<13} {what}" for name, what in COMMANDS.items())
        print(HELP.format(version=__version__, commands=commands))
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"stepdistill {__version__}")
        return 0
    words = 2 if " ".join(argv[:2]) in COMMANDS else 1
    return guard(lambda: _command(" ".join(argv[:words]), argv[words:]))


def _command(name: str, argv: list[str]) -> int | None:
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"command: got {name!r}; allowed: {', '.join(COMMANDS)}{hint}")
    module_name = f"stepdistill.cli.{name.split()[-1]}"
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name:
            raise InputError(
                f"stepdistill {name}: needs the package {error.name}; pip install 'stepdistill[demo]'"
            ) from error
        raise InputError(f"command {name}: not in this version ({__version__}); take a newer stepdistill") from error
    try:
        if not hasattr(module, "Config"):  # it parses its own arguments
            return module.main(argv)
        return module.main(parse(module.Config, argv, prog=f"stepdistill {name}", description=module.__doc__))
    except SystemExit as stop:  # --help
        return int(stop.code or 0)


def entry() -> None:
    """The console script."""
    sys.exit(main())
