"""Conditions equal those that the pipelines make."""

from __future__ import annotations

import pytest
import tiny
import torch

from stepdistill import conditioning
from stepdistill.conditioning.labels import LabelConditioner
from stepdistill.errors import InputError
from stepdistill.guidance import stack


def encoded_by(pipe, negative: str | None, size: int = 32) -> dict[str, torch.Tensor]:
    """What the pipeline's own call passes to its UNet for a prompt: unconditional rows, then conditional ones."""
    seen: dict[str, torch.Tensor] = {}
    own = pipe.unet.forward

    def spy(sample, timestep, encoder_hidden_states, added_cond_kwargs=None, **rest):
        seen["text"] = encoder_hidden_states
        seen.update({"pooled": added_cond_kwargs["text_embeds"], "time_ids": added_cond_kwargs["time_ids"]}
                    if added_cond_kwargs else {})  # fmt: skip
        return own(sample, timestep, encoder_hidden_states, added_cond_kwargs=added_cond_kwargs, **rest)

    pipe.unet.forward = spy
    pipe(tiny.PROMPTS, negative_prompt=negative, num_inference_steps=1, guidance_scale=3.0, height=size, width=size,
         output_type="latent")  # fmt: skip
    pipe.unet.forward = own
    return seen


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl, lambda: tiny.sdxl(zeros_for_empty=False)])
def test_prompts_and_their_absence_are_encoded_as_the_pipeline_does(make):
    pipe = make()
    conditioner = conditioning.from_pipeline(pipe)
    theirs = encoded_by(pipe, None)
    both = stack(conditioner.unconditional(2), conditioner.encode(tiny.PROMPTS))
    assert both.keys() == theirs.keys() | {"pooled"}
    for key in theirs:
        assert torch.equal(both[key], theirs[key].to(both[key].dtype)), key


@pytest.mark.parametrize("pad_token", [None, "a</w>"])
def test_stable_diffusions_pooled_text_is_the_towers_own(pad_token):
    pipe = tiny.sd()
    pipe.tokenizer = tiny.tokenizer(pad_token=pad_token)
    prompts = [*tiny.PROMPTS, "", "a cat " * 40]
    cond = conditioning.from_pipeline(pipe).encode(prompts)
    options = {"padding": "max_length", "truncation": True, "max_length": pipe.tokenizer.model_max_length}
    encoded = pipe.text_encoder(pipe.tokenizer(prompts, return_tensors="pt", **options).input_ids)
    assert torch.equal(cond["text"], encoded.last_hidden_state) and torch.equal(cond["pooled"], encoded.pooler_output)


def test_unconditional_is_the_encoded_empty_prompt_for_sd_and_zeros_for_sdxl():
    sd, sdxl = (conditioning.from_pipeline(tiny.MAKERS[name]()) for name in ("sd", "sdxl"))
    assert torch.equal(sd.unconditional(1)["text"], sd.encode([""])["text"])
    assert sd.unconditional(1)["text"].abs().max() > 0
    nothing = sdxl.unconditional(3)
    assert nothing["text"].shape[0] == 3
    assert not nothing["text"].any() and not nothing["pooled"].any()
    assert nothing["time_ids"].any()
    kept = conditioning.from_pipeline(tiny.sdxl(zeros_for_empty=False))
    assert torch.equal(kept.unconditional(1)["pooled"], kept.encode([""])["pooled"])


def test_time_ids_are_original_size_crop_and_target_size():
    conditioner = conditioning.from_pipeline(tiny.sdxl())
    assert conditioner.encode(["a cat"], size=(24, 40))["time_ids"].tolist() == [[24, 40, 0, 0, 24, 40]]
    assert conditioner.unconditional(1, size=(24, 40))["time_ids"].tolist() == [[24, 40, 0, 0, 24, 40]]
    side = tiny.LATENT * tiny.FACTOR
    assert conditioner.encode(["a cat"])["time_ids"].tolist() == [[side, side, 0, 0, side, side]]


def test_sizes_that_half_precision_rounds_stay_exact():
    pipe = tiny.sdxl()
    pipe.text_encoder.to(torch.bfloat16)
    pipe.text_encoder_2.to(torch.bfloat16)
    cond = conditioning.from_pipeline(pipe).encode(["a cat"], size=(1023, 769))
    assert cond["text"].dtype == torch.bfloat16
    assert cond["time_ids"][0, :2].tolist() == [1023, 769]


def test_encoding_a_prompt_does_not_depend_on_its_neighbours():
    conditioner = conditioning.from_pipeline(tiny.sdxl())
    together = conditioner.encode(tiny.PROMPTS)
    for i, prompt in enumerate(tiny.PROMPTS):
        alone = conditioner.encode([prompt])
        for key in alone:
            torch.testing.assert_close(alone[key][0], together[key][i], atol=1e-6, rtol=0)


def test_a_pipeline_without_its_text_encoder_says_so():
    pipe = tiny.sd()
    pipe.text_encoder = None
    with pytest.raises(InputError, match="text encoder: got a pipeline loaded without one"):
        conditioning.from_pipeline(pipe).encode(["a cat"])


def test_labels_are_class_numbers_and_null_where_there_is_one():
    conditioner = LabelConditioner(5, null_label=4)
    assert conditioner.encode(["3", " 0 "])["labels"].tolist() == [3, 0]
    assert conditioner.unconditional(2)["labels"].tolist() == [4, 4]
    assert LabelConditioner(0).encode(["whatever"]) == LabelConditioner(0).unconditional(2) == {}
    for wrong in ("5", "-1", "cat", "²"):
        with pytest.raises(InputError, match=r"class label: got .*; allowed: numbers 0 to 4"):
            conditioner.encode([wrong])
    with pytest.raises(InputError, match="without a null label"):
        LabelConditioner(5).unconditional()


def test_the_conditioner_follows_from_the_pipeline():
    assert isinstance(conditioning.from_pipeline(tiny.pixel(classes=7)), LabelConditioner)
    assert conditioning.from_pipeline(tiny.pixel(classes=7)).classes == 7
    assert conditioning.from_pipeline(tiny.pixel()).classes == 0
    with pytest.raises(InputError, match="conditioning: got str; allowed: StableDiffusionPipeline"):
        conditioning.from_pipeline("a string")


def test_batches_are_taken_apart_repeated_and_cast():
    a = {"text": torch.arange(9.0).reshape(3, 3), "labels": torch.tensor([1, 2, 7])}
    assert conditioning.take(a, torch.tensor([2, 0]))["labels"].tolist() == [7, 1]
    assert conditioning.take(a, slice(0, 2))["text"].tolist() == a["text"][:2].tolist()
    repeated = conditioning.expand(conditioning.take(a, slice(1, 2)), 4)
    assert repeated["text"].tolist() == 4 * [[3, 4, 5]] and repeated["labels"].tolist() == 4 * [2]
    half = conditioning.to(a, "cpu", torch.float16)
    assert half["text"].dtype == torch.float16 and half["labels"].dtype == torch.int64
