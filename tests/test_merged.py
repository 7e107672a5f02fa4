"""LoRAs are part of the weights while a pipeline is timed, and nothing has changed afterwards."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer

from stepdistill.evaluation.generate import backbone
from stepdistill.evaluation.merged import merged


def adapted(family: str, **options):
    """A tiny pipeline with a LoRA on its network, and that network."""
    pipe = tiny.make(family)
    network = backbone(pipe)
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "to_v", "conv1"], **options), network)
    assert tiny.stir_adapter(network, "default")
    return pipe, network


def latents(pipe) -> torch.Tensor:
    call = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
    return pipe("a hat", generator=torch.Generator().manual_seed(1), **call)[0]


def tuned(network) -> list[BaseTunerLayer]:
    return [layer for layer in network.modules() if isinstance(layer, BaseTunerLayer)]


@pytest.mark.parametrize(("family", "options"), [("sd", {}), ("sd", {"use_rslora": True}), ("sd3", {}), ("flux", {})])
def test_merged_layers_are_plain_and_compute_the_same(family, options):
    pipe, network = adapted(family, **options)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    layers, apart = tuned(network), latents(pipe)
    with merged(pipe):
        assert not tuned(network)
        torch.testing.assert_close(latents(pipe), apart, atol=1e-5, rtol=1e-4)
        assert not torch.equal(latents(pipe), apart), "another order of sums rounds differently"
    assert all(a is b for a, b in zip(tuned(network), layers, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(latents(pipe), apart)


def test_the_strength_of_an_adapter_is_kept_and_an_inactive_one_left_out():
    pipe, network = adapted("sd")
    for layer in tuned(network):
        layer.scale_layer(0.5)
    weak = latents(pipe)
    with merged(pipe):
        torch.testing.assert_close(latents(pipe), weak, atol=1e-5, rtol=1e-4)
    for layer in tuned(network):
        layer.enable_adapters(False)
    plain = latents(pipe)
    with merged(pipe):
        torch.testing.assert_close(latents(pipe), plain, atol=1e-5, rtol=1e-4)


def test_a_failure_in_between_leaves_nothing_merged():
    pipe, network = adapted("sd")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(ZeroDivisionError), merged(pipe):
        raise ZeroDivisionError
    assert tuned(network) and all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert not any(layer.merged for layer in tuned(network))
