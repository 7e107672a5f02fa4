"""Human preference as predicted by models: PickScore, HPSv2, ImageReward.

A protocol lists them by name. PickScore is loaded through transformers, from the hub or from the folder that
STEPDISTILL_PICKSCORE names; the others need their own packages, which are not installed with this one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor

from stepdistill.errors import InputError
from stepdistill.evaluation import hashes
from stepdistill.evaluation.figures import Figure
from stepdistill.evaluation.measures.base import NO_PROMPTS, Metric, View
from stepdistill.evaluation.precision import full_float32
from stepdistill.files import sha256

Score = Callable[[Sequence[Image.Image], Sequence[str]], Tensor]  # images, their prompts -> (B,)
HPSV2, HPSV2_VERSION = "xswu/HPSv2", "v2.1"
IMAGEREWARD = "ImageReward-v1.0"
PICKSCORE, PICKSCORE_PLACE = "yuvalkirstain/PickScore_v1", "STEPDISTILL_PICKSCORE"


class Preference(Metric):
    """The mean score of images for their prompts. To add a model, subclass with `load`."""

    load: ClassVar[Callable[[str], tuple[Score, str]]]  # device -> the scorer, and a hash of its weights

    @classmethod
    def prepare(cls, device: torch.device | str) -> dict[str, str]:
        return {cls.name: _loaded(cls, str(device))[1]}

    @classmethod
    def lacks(cls, tools) -> str | None:
        return NO_PROMPTS if tools.prompts.prompts is None else None

    @classmethod
    def see(cls, view: View) -> Tensor:
        score, _ = _loaded(cls, str(view.tools.extractor.device))
        pictures = [Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()) for picture in view.pictures]
        return score(pictures, view.prompts).float().cpu()

    @classmethod
    def figures(cls, kept: Tensor, tools) -> dict[str, Figure]:
        return {cls.name: Figure.mean(kept)}


@lru_cache(maxsize=4)
def _loaded(metric: type[Preference], device: str) -> tuple[Score, str]:
    return metric.load(device)


class PickScore(Preference):
    """`pickscore`: CLIP's scaled cosine, after training on choices (Kirstain et al. 2023)."""

    name, keeps, better = "pickscore", "pickscore", {"pickscore": "higher"}

    @staticmethod
    def load(device: str) -> tuple[Score, str]:
        from transformers import CLIPModel, CLIPProcessor

        source = os.environ.get(PICKSCORE_PLACE) or PICKSCORE
        try:
            model = CLIPModel.from_pretrained(source, use_safetensors=True).eval().to(device)
            processor = CLIPProcessor.from_pretrained(source)
        except Exception as error:  # the hub, files and configurations each raise their own types
            reason = " ".join(str(error).split())[:160]
            raise InputError(
                f"pickscore: got {source}, which could not be loaded ({reason}); check the network, or name a folder "
                f"in {PICKSCORE_PLACE}"
            ) from error

        @torch.inference_mode()
        def score(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
            inputs = processor(
                text=list(prompts), images=list(pictures), padding=True, truncation=True,
                max_length=model.config.text_config.max_position_embeddings, return_tensors="pt",
            )  # fmt: skip
            return model(**inputs.to(device)).logits_per_image.diagonal()

        return score, hashes.of_module(model)


class Hpsv2(Preference):
    """`hpsv2`: Human Preference Score, version 2.1 (Wu et al. 2023), the cosine of the package's ViT-H/14.

    The package's own `score` loads the checkpoint anew for each image, on a device of its choice, and computes in half
    precision on a GPU; here it is loaded once and computes in float32.
    """

    name, keeps, better = "hpsv2", "hpsv2", {"hpsv2": "higher"}

    @staticmethod
    def load(device: str) -> tuple[Score, str]:
        _installed("hpsv2", "hpsv2", "hpsv2")
        from huggingface_hub import hf_hub_download

        try:
            from hpsv2 import img_score
            from hpsv2.src.open_clip import get_tokenizer
            from hpsv2.utils import hps_version_map

            file = hf_hub_download(HPSV2, hps_version_map[HPSV2_VERSION])  # the package's own source
            img_score.initialize_model()
            model, preprocess = (img_score.model_dict[name] for name in ("model", "preprocess_val"))
            model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True)["state_dict"])
        except Exception as error:  # offline, gated, no such file, or a package without one of its own
            reason = " ".join(str(error).split())[:160]
            raise InputError(
                f"hpsv2: got no model of {HPSV2} {HPSV2_VERSION} ({reason}); check the network and the package"
            ) from error
        model, tokenize = model.float().eval().to(device), get_tokenizer("ViT-H-14")

        @torch.inference_mode()
        @full_float32()
        def score(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
            seen = torch.stack([preprocess(picture) for picture in pictures]).to(device)
            found = model(seen, tokenize(list(prompts)).to(device))
            return (found["image_features"] * found["text_features"]).sum(1)

        return score, sha256(file)


class ImageReward(Preference):
    """`imagereward`: ImageReward-v1.0 (Xu et al. 2023)."""

    name, keeps, better = "imagereward", "imagereward", {"imagereward": "higher"}

    @staticmethod
    def load(device: str) -> tuple[Score, str]:
        _installed("imagereward", "ImageReward", "image-reward")
        try:
            import ImageReward as Package

            model = Package.load(IMAGEREWARD, device=device)
        except Exception as error:  # offline, or a package that does not fit the installed transformers or timm
            reason = " ".join(str(error).split())[:160]
            raise InputError(
                f"imagereward: got no model {IMAGEREWARD} ({reason}); check the network and the package"
            ) from error

        @torch.inference_mode()
        def score(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
            return torch.tensor([float(model.score(t, p)) for p, t in zip(pictures, prompts, strict=True)])

        return score, hashes.of_module(model)


def _installed(metric: str, module: str, package: str) -> None:
    if find_spec(module) is None:
        raise InputError(f"metric {metric}: got no package {package}; allowed: with it; pip install {package}")
