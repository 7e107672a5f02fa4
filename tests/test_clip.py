"""CLIP scores equal open_clip's own and are clamped image by image; probes count what prompts name."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file

from stepdistill.errors import InputError
from stepdistill.evaluation.attributes import Probes, load_probes
from stepdistill.evaluation.clip import clip_scores, load_clip
from stepdistill.evaluation.measures.attributes import Attributes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random open_clip model with its own tokenizer, stored like the scorer."""
    from open_clip.model import CLIP

    path = tmp_path_factory.mktemp("scorer")
    words = tiny.tokenizer()
    config = {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": len(words), "width": 16, "heads": 2, "layers": 1,
                     "hf_tokenizer_name": "local"},
    }  # fmt: skip
    torch.manual_seed(0)
    model = CLIP(**config)
    (path / "open_clip_config.json").write_text(
        json.dumps(
            {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}}
        )
    )
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path / "open_clip_model.safetensors")
    words.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def clip(folder):
    return load_clip(f"local-dir:{folder}")


def test_how_pictures_are_brought_to_a_local_model_is_in_its_setup(folder, clip, tmp_path):
    shutil.copytree(folder, tmp_path / "moved")
    assert load_clip(f"local-dir:{tmp_path / 'moved'}").setup == clip.setup
    file = tmp_path / "moved" / "open_clip_config.json"
    file.write_text(file.read_text().replace("bicubic", "bilinear"))
    assert load_clip(f"local-dir:{tmp_path / 'moved'}").setup != clip.setup


def test_scores_equal_open_clips_own_computation(folder, clip):
    import open_clip

    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3), dtype=np.uint8)
    prompts = ["a red cat", "the green dog", "a hat"]
    with torch.no_grad():
        image = model.eval().encode_image(torch.stack([transform(Image.fromarray(p)) for p in pixels]))
        text = model.encode_text(tokenizer(prompts))
    want = 100 * torch.cosine_similarity(image, text).clamp_min(0)
    found = clip_scores(clip.images(torch.from_numpy(pixels).permute(0, 3, 1, 2)), clip.texts(prompts))
    assert torch.allclose(found, want, atol=1e-4)


def test_pictures_of_the_models_own_size_skip_the_transform_with_the_same_result(clip):
    pictures = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        by_hand = torch.stack([clip.transform(Image.fromarray(p.permute(1, 2, 0).numpy())) for p in pictures])
        want = torch.nn.functional.normalize(clip.model.encode_image(by_hand), dim=-1)
    assert torch.allclose(clip.images(pictures), want, atol=1e-6)


def test_each_score_is_clamped_before_the_mean():
    image = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    text = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert clip_scores(image, text).tolist() == [100.0, 0.0]


def test_the_prefix_goes_before_each_prompt(folder, clip):
    prefixed = load_clip(f"local-dir:{folder}", prefix="a ")
    assert torch.equal(prefixed.texts(["red cat"]), clip.texts(["a red cat"]))


@pytest.mark.parametrize("quick", [True, False])
def test_weights_of_a_tag_are_used_with_the_activation_they_were_trained_with(folder, tmp_path, monkeypatch, quick):
    """open_clip only warns of OpenAI's weights, which it built with QuickGELU before version 3; the scores differ."""
    from open_clip import factory, pretrained
    from open_clip.model import CLIP

    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    config["text_cfg"].pop("hf_tokenizer_name")
    weights = CLIP(**config).state_dict()
    torch.save(weights, tmp_path / "tiny.pt")
    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny", config)
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny", {"own": {"url": "x", "quick_gelu": quick, "mean": (0.5,) * 3}})
    monkeypatch.setattr(factory, "download_pretrained", lambda *_, **__: str(tmp_path / "tiny.pt"))
    pictures = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    found = load_clip("tiny", pretrained="own")
    wanted = CLIP(**config, quick_gelu=quick)
    wanted.load_state_dict(weights)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (found.mean, found.std))
    with torch.no_grad():
        embedded = wanted.eval().encode_image((pictures / 255 - mean) / std)
    assert torch.allclose(found.images(pictures), torch.nn.functional.normalize(embedded, dim=-1), atol=1e-6)


def test_models_that_cannot_be_had_are_said_in_one_line(tmp_path, caplog):
    for name, words in (
        ("ViT-Z-99", "open_clip"),
        ("ViT-B-32", "pretrained"),
        (f"local-dir:{tmp_path}", "open_clip_config"),
    ):
        with pytest.raises(InputError, match=words):
            load_clip(name)
    with pytest.raises(InputError, match=r"got ViT-B-32 with /gone\.pt, which could not be loaded .* the path"):
        load_clip("ViT-B-32", pretrained="/gone.pt")
    assert "ERROR" not in caplog.text


def test_probes_count_only_what_prompts_name(tmp_path):
    weights = torch.eye(2)
    tensors = {"hat.weight": weights, "hat.bias": torch.zeros(2), "hair.weight": weights.clone()}
    save_file(tensors | {"hair.bias": torch.tensor([0.0, 9.0])}, tmp_path / "probes.safetensors")
    (tmp_path / "probes.json").write_text(json.dumps({"hat": ["no", "yes"], "hair": ["short", "long"]}))
    probes = load_probes(tmp_path)
    embedding = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    truth = [{"hat": "no", "hair": "short"}, {"hat": "no", "hair": "long"}, {"hat": "yes", "hair": "long"}]
    judged = probes.judge(embedding, truth, [["hat"], ["hat", "hair"], ["hair"]])
    assert judged.tolist() == [[1, -1], [0, 1], [-1, 1]]
    found = Attributes.figures(judged, SimpleNamespace(probes=probes))
    values = {name: figure.value for name, figure in found.items()}
    assert values == {"attribute_accuracy": 3 / 4, "attribute:hat": 1 / 2, "attribute:hair": 1.0}
    # a ratio of sums: 1/1, 1/2, 1/1 answers, so (1 - 3/4, 1 - 3/2, 1 - 3/4) over 4/3 questions per image
    assert found["attribute_accuracy"].influence.tolist() == pytest.approx([3 / 16, -3 / 8, 3 / 16])
    assert {name: (len(figure.influence), figure.trials) for name, figure in found.items()} == {
        "attribute_accuracy": (3, 3), "attribute:hat": (2, 2), "attribute:hair": (2, 2),  # of the images it applies to
    }  # fmt: skip
    assert "attribute:hat" not in Attributes.figures(torch.tensor([[-1, 1]]), SimpleNamespace(probes=probes))


def test_an_attribute_without_a_probe_and_broken_probes_are_refused(tmp_path):
    probes = Probes({"hat": ["no", "yes"]}, {"hat": torch.eye(2)}, {"hat": torch.zeros(2)})
    with pytest.raises(InputError, match="'beard'"):
        probes.judge(torch.eye(2)[:1], [{"beard": "yes"}], [["beard"]])
    (tmp_path / "probes.json").write_text(json.dumps({"hat": ["no", "yes"]}))
    with pytest.raises(InputError, match="probes"):
        load_probes(tmp_path)
