"""The scorer: an open_clip model of images and captions, and linear probes of the attributes on its embedding."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file
from teacher.attributes import Heads, attribute_classes, attribute_labels
from teacher.loop import Budget, Figures, Run, images_of, to_unit, train
from teacher.text import load_text, tokenize
from torch import Tensor, nn

from stepdistill.data import avatars


def run_scorer(
    run: Run, model_cfg: dict, budget: Budget, attribute_weight: float, probe_weight_decay: float
) -> Figures:
    """Trains an open_clip model on images and captions, with an attribute loss on the image embedding; then probes.

    The probes are fitted to the frozen, normalised embedding of clean images, by L-BFGS.
    """
    import open_clip
    from open_clip.model import CLIP

    data = avatars.load("train")
    tokenizer, _ = load_text(run)
    model_cfg["text_cfg"] |= {
        "vocab_size": len(tokenizer), "context_length": tokenizer.model_max_length, "hf_tokenizer_name": "local",
    }  # fmt: skip
    classes = attribute_classes()
    clip = CLIP(**model_cfg)
    heads = Heads(model_cfg["embed_dim"], [len(values) for values in classes.values()])
    model = nn.ModuleDict({"clip": clip, "heads": heads}).to(run.device)
    ids, images = tokenize(tokenizer, data.captions, run.device), images_of("train", run.device)
    size = (model_cfg["vision_cfg"]["image_size"],) * 2

    def pixels(pictures: Tensor) -> Tensor:
        return nn.functional.interpolate(to_unit(pictures), size, mode="bicubic").clamp(-1, 1)

    labels = attribute_labels("train", mentioned_only=False).to(run.device)
    criterion = open_clip.ClipLoss()

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(ids), (budget.batch_size,), generator=generator)
        image, text, scale = clip(pixels(images[index]), ids[index])
        return criterion(image.float(), text.float(), scale) + attribute_weight * heads.loss(10 * image, labels[index])

    model.load_state_dict(train("scorer", model, loss, budget, run), strict=False)
    model.eval().requires_grad_(False)

    def embed(split: str) -> Tensor:
        batches = images_of(split, run.device).split(500)
        return torch.cat([clip.encode_image(pixels(batch), normalize=True).float() for batch in batches])

    features, held_out = embed("train"), embed("test")
    test_labels = attribute_labels("test", mentioned_only=False).to(run.device)
    probes = Heads(model_cfg["embed_dim"], [len(values) for values in classes.values()]).to(run.device)
    optimizer = torch.optim.LBFGS(probes.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty = sum(head.weight.square().sum() for head in probes.heads)
        value = probes.loss(features, labels) + probe_weight_decay * penalty
        value.backward()
        return value

    optimizer.step(closure)
    accuracy = dict(zip(classes, probes.accuracy(held_out, test_labels).tolist(), strict=True))
    folder = run.out / "scorer"
    folder.mkdir(parents=True, exist_ok=True)
    mean_std = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model_cfg, "preprocess_cfg": mean_std}, indent=2)
    )
    weights = {k: v.half() if v.is_floating_point() else v for k, v in clip.state_dict().items()}
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "open_clip_model.safetensors")
    tokenizer.save_pretrained(folder)
    fitted = {}
    for name, head in zip(classes, probes.heads, strict=True):
        fitted |= {f"{name}.weight": head.weight.detach(), f"{name}.bias": head.bias.detach()}
    save_file(fitted, folder / "probes.safetensors")
    (folder / "probes.json").write_text(json.dumps(classes, indent=2) + "\n")
    return {"held_out_accuracy": {name: round(share, 4) for name, share in accuracy.items()}}
