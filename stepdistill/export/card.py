"""The model card of an export, and its section for measured figures."""

from __future__ import annotations

import json
import re
from pathlib import Path

from stepdistill.denoiser.families import even_sigmas

FIGURES_START, FIGURES_END = "<!-- figures -->", "<!-- /figures -->"

USE_LORA = """```python
import torch
from diffusers import DiffusionPipeline, {scheduler}

pipe = DiffusionPipeline.from_pretrained("{base}", torch_dtype=torch.{dtype}{files}){device}
pipe.load_lora_weights("{out}")
pipe.scheduler = {scheduler}.from_pretrained("{out}", subfolder="scheduler")
{draw}
```"""

USE_PEFT = """```python
import torch
from diffusers import DiffusionPipeline, {scheduler}
from peft import PeftModel

pipe = DiffusionPipeline.from_pretrained("{base}", torch_dtype=torch.{dtype}{files}){device}
pipe.{part} = PeftModel.from_pretrained(pipe.{part}, "{out}")
pipe.scheduler = {scheduler}.from_pretrained("{out}", subfolder="scheduler")
{draw}
```"""

USE_PIPELINE = """```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{out}", torch_dtype=torch.{dtype}){device}
{draw}
```"""

# DDPMPipeline has no argument for a class, and rejects a network that needs one
DRAW_CLASS = """labels = torch.tensor([0])  # class, 0 to {last}; the pipeline takes none, so its steps are run here
x = torch.randn(1, {channels}, {height}, {width})
pipe.scheduler.set_timesteps({steps})
with torch.no_grad():
    for t in pipe.scheduler.timesteps:
        x = pipe.scheduler.step(pipe.unet(x, t, labels).sample[:, :{channels}], t, x).prev_sample
image = pipe.numpy_to_pil((x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy())[0]"""


def hub_id(teacher: str) -> bool:
    """Whether this is a hub id, owner/name, and not a local path."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", teacher)) and not Path(teacher).exists()


def model_card(
    *,
    method: str,
    teacher: str,
    out: str,
    scheduler: str,
    lora: bool,
    prompt: str | None,
    settings: dict,
    grid: str | None,
    what: str = "A few-step student distilled with stepdistill.",
    guidance: float = 1.0,
    steps: int = 4,
    even: bool = False,
    side: int | None = None,
    base: str | None = None,
    peft_part: str | None = None,
    classes: int = 0,
    shape: tuple[int, ...] = (),
    dtype: str = "float32",
    variant: str | None = None,
) -> str:
    """Returns Markdown with the hub's front matter: what it is, how to load it, how it was trained.

    Args:
        prompt: of the example; None for a pipeline that takes neither prompt nor guidance. what: it is, in a sentence.
        guidance: the guidance_scale to sample the student with; diffusers' own default would be 7.5.
        steps: of the example. even: whether the pipeline must be passed even sigmas.
        side: of the images in pixels, if the pipeline must be passed it.
        base: where diffusers loads the teacher from; default: `teacher`.
        peft_part: the network that peft adds the LoRA to, if the pipeline cannot load one.
        classes: number of classes of a class-conditional network. shape: (C, H, W) of its samples.
        dtype: torch's name of the one to load in; unless float32, on a GPU. variant: of the teacher's weight files.
    """
    tags = ["diffusers", "step-distillation", method, *(["lora"] if lora else [])]
    head = ["---", *([f"base_model: {teacher}"] if hub_id(teacher) else []), "library_name: diffusers", "tags:"]
    front = "\n".join([*head, *(f"- {tag}" for tag in tags), "---"])
    call = f"num_inference_steps={steps}" + (f", sigmas={even_sigmas(steps)}" if even else "")
    call += f", height={side}, width={side}" if side else ""
    if prompt is not None:
        call = f"{json.dumps(prompt, ensure_ascii=False)}, {call}, guidance_scale={float(guidance)}"
    draw = f"image = pipe({call}).images[0]"
    if classes:
        channels, height, width = shape
        draw = DRAW_CLASS.format(last=classes - 1, channels=channels, height=height, width=width, steps=steps)
    template = USE_PIPELINE if not lora else USE_PEFT if peft_part else USE_LORA
    use = template.format(
        scheduler=scheduler, base=base or teacher, out=out, draw=draw, part=peft_part, dtype=dtype,
        device="" if dtype == "float32" else '.to("cuda")', files=f', variant="{variant}"' if variant else "",
    )  # fmt: skip
    kind = "LoRA" if lora else "pipeline"
    rows = "\n".join(f"| {key} | {str(value).replace('|', '/')} |" for key, value in settings.items())
    picture = f"\n![samples of the student: a row per prompt, at 1, 2, 4 and 8 steps]({grid})\n" if grid else ""
    return f"""{front}

# {method} {kind} of {teacher}

{what}
{picture}
## Figures

{FIGURES_START}
Not measured yet; `stepdistill bench --card` adds them.
{FIGURES_END}

## Use

{use}

## Training

| setting | value |
|---|---|
{rows}
"""


def put_figures(folder: Path, text: str) -> bool:
    """Replaces the figures in an export folder's card; returns False if it has no card, or no section for them."""
    card = Path(folder) / "README.md"
    old = card.read_text() if card.is_file() else ""
    before, start, rest = old.partition(FIGURES_START)
    _, end, after = rest.partition(FIGURES_END)
    if not start or not end:
        return False
    beside = card.with_name(card.name + ".partial")
    beside.write_text(f"{before}{start}\n{text.strip()}\n{end}{after}")
    beside.replace(card)
    return True
