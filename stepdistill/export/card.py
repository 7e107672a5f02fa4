"""The model card of an export."""

from __future__ import annotations

USE_LORA = """```python
import torch
from diffusers import DiffusionPipeline, {scheduler}

pipe = DiffusionPipeline.from_pretrained("{teacher}")
pipe.load_lora_weights("{out}")
pipe.scheduler = {scheduler}.from_pretrained("{out}", subfolder="scheduler")
image = pipe("{prompt}", num_inference_steps=4, guidance_scale=1.0).images[0]
```"""

USE_PIPELINE = """```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{out}")
image = pipe("{prompt}", num_inference_steps=4).images[0]
```"""


def model_card(
    *,
    method: str,
    teacher: str,
    out: str,
    scheduler: str,
    lora: bool,
    prompt: str,
    settings: dict,
    grid: str | None,
) -> str:
    """Markdown with the hub's front matter: what it is, how to load it, how it was trained."""
    tags = ["diffusers", "step-distillation", method, *(["lora"] if lora else [])]
    head = ["---", f"base_model: {teacher}", "library_name: diffusers", "tags:"]
    front = "\n".join([*head, *(f"- {tag}" for tag in tags), "---"])
    use = (USE_LORA if lora else USE_PIPELINE).format(
        scheduler=scheduler, teacher=teacher, out=out, prompt=prompt.replace('"', "'")
    )
    kind = "LoRA" if lora else "pipeline"
    rows = "\n".join(f"| {key} | {str(value).replace('|', '/')} |" for key, value in settings.items())
    picture = f"\n![samples of the student, four steps]({grid})\n" if grid else ""
    return f"""{front}

# {method} {kind} of {teacher}

A few-step student distilled with [stepdistill](https://pypi.org/project/stepdistill/). No figures are given here that
were not measured: `stepdistill bench` makes them.
{picture}
## Use

{use}

## Training

| setting | value |
|---|---|
{rows}
"""
