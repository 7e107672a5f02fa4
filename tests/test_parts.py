"""A pipeline that lacks any of its parts is rejected in one line, before anything is trained."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
from safetensors.torch import load_file, save_file

from stepdistill import embedded
from stepdistill.denoiser.load import load_teacher, open_pipeline
from stepdistill.denoiser.parts import check_folder
from stepdistill.errors import InputError


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("whole") / "sd3", "sd3")


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "pipe")


def refused(capfd, call, *arguments) -> str:
    with pytest.raises(InputError) as error:
        call(*arguments)
    message, said = str(error.value), capfd.readouterr()
    assert "\n" not in message and len(message) < 500
    assert said.out + said.err == ""
    return message


@pytest.mark.parametrize(
    ("part", "file", "says"),
    [
        ("tokenizer", None, "tokenizer (CLIPTokenizer) lacks the folder"),
        ("tokenizer", "tokenizer.json", "tokenizer (CLIPTokenizer) lacks tokenizer.json;"),
        ("tokenizer_3", "tokenizer_config.json", ") lacks tokenizer_config.json;"),
        ("text_encoder", "config.json", "text_encoder (CLIPTextModelWithProjection) lacks config.json"),
        ("transformer", None, "transformer (SD3Transformer2DModel) lacks the folder"),
        ("vae", "config.json", "vae (AutoencoderKL) lacks config.json"),
        ("scheduler", None, "scheduler (FlowMatchEulerDiscreteScheduler) lacks the folder"),
    ],
)
def test_a_part_that_is_missing_is_named(folder, capfd, part, file, says):
    shutil.rmtree(folder / part) if file is None else (folder / part / file).unlink()
    message = refused(capfd, load_teacher, folder)
    assert message.startswith(f"pipeline: got {folder}, whose {part} (") and "copy or fetch it again" in message
    assert says in message


def test_weights_that_are_missing_are_never_made_up(folder, capfd):
    """The libraries initialise them at random, and only log it."""
    for part, name in (("text_encoder_3", "model"), ("transformer", "diffusion_pytorch_model")):
        file = folder / part / f"{name}.safetensors"
        weights = load_file(file)
        weights.pop(min(weights))
        save_file(weights, file, metadata={"format": "pt"})
    message = refused(capfd, open_pipeline, folder)
    assert "lack weights of" in message and "T5EncoderModel" in message and "SD3Transformer2DModel" in message


def test_a_tokenizer_of_other_words_than_its_encoders_is_refused(folder, capfd):
    from transformers import CLIPTokenizer

    CLIPTokenizer().save_pretrained(folder / "tokenizer_2")
    capfd.readouterr()
    message = refused(capfd, open_pipeline, folder)
    words = len(tiny.tokenizer())
    assert f"whose tokenizer_2 knows 2 words of the {words} of its text encoder" in message


def test_what_is_not_loaded_or_not_named_may_be_missing(folder):
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"):
        shutil.rmtree(folder / name)
    assert load_teacher(folder, text=False).source.tokenizer is None
    index = json.loads((folder / "model_index.json").read_text())
    index |= {name: [None, None] for name in index if name.startswith(("text_encoder", "tokenizer"))}
    (folder / "model_index.json").write_text(json.dumps(index))
    check_folder(folder)


def test_vocabularies_may_be_kept_as_any_of_their_kinds(folder):
    (folder / "tokenizer" / "tokenizer.json").rename(folder / "tokenizer" / "vocab.json")
    (folder / "tokenizer" / "merges.txt").write_text("")
    (folder / "tokenizer_3" / "tokenizer.json").rename(folder / "tokenizer_3" / "spiece.model")
    check_folder(folder)


@pytest.mark.parametrize("name", embedded.TEACHERS)
def test_the_embedded_teachers_are_whole(name):
    check_folder(embedded.path(embedded.TEACHERS[name]))
