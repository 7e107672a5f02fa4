"""Less memory: half-precision weights that are restored exactly, recomputed activations, and advice if it runs out."""

from __future__ import annotations

import pytest
import torch
from test_baselines_classifier import shapes
from test_encoders import MASKING, batch, bert, lines
from tiny_decoders import tiny_decoder

from stepdistill.baselines.base import Batch, TeacherStudent
from stepdistill.baselines.classifier.hinton import Hinton
from stepdistill.baselines.classifier.networks import build
from stepdistill.baselines.language import arithmetic, collect
from stepdistill.baselines.language.cross_entropy import CrossEntropy
from stepdistill.baselines.language.masked import MaskedLM, MaskedModelling
from stepdistill.baselines.language.models import Decoder
from stepdistill.baselines.language.problems import Problem
from stepdistill.baselines.language.r1_traces import R1TracesConfig
from stepdistill.baselines.language.traces import Completion
from stepdistill.baselines.learner import Learner, learn
from stepdistill.baselines.less_memory import halved, recompute, recomputes
from stepdistill.draws import Draws
from stepdistill.errors import InputError
from stepdistill.methods.base import Clock
from stepdistill.training.config import LoopConfig

IDS = torch.arange(24).view(2, 12)
CLOCK = Clock(0, 1)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "resnet8"])
@torch.no_grad()
def test_half_weights_say_what_autocast_says_and_are_given_back_to_the_bit(kind):
    classifier = kind == "resnet8"
    network = build(kind, 3, 8, seed=0).eval() if classifier else tiny_decoder(kind).network
    inputs = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) if classifier else IDS

    def output() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out = network(inputs)
        return out if classifier else out.logits

    before, whole = output(), {name: p.clone() for name, p in network.named_parameters()}
    with pytest.raises(KeyError), halved(network, "bf16"):
        assert torch.equal(output(), before)
        halves = {name for name, p in network.named_parameters() if p.dtype == torch.bfloat16}
        raise KeyError
    inner = {"llama": "mlp.up_proj.weight", "gpt2": "attn.c_attn.weight", "resnet8": "conv1.weight"}[kind]
    assert any(name.endswith(inner) for name in halves)
    assert all(p.ndim > 1 for name, p in network.named_parameters() if name in halves)
    for name, p in network.named_parameters():
        assert p.dtype == torch.float32 and torch.equal(p, whole[name]), name
    with halved(network, "no"):
        assert all(p.dtype == torch.float32 for p in network.parameters())


def test_a_training_keeps_its_teacher_in_its_precision_and_gives_it_back(tmp_path):
    student, teacher = (build("resnet8", 2, 8, seed=seed) for seed in (1, 2))
    whole, seen = {name: p.clone() for name, p in teacher.named_parameters()}, []
    teacher.register_forward_hook(lambda module, *_: seen.append((module.head.weight.dtype, student.head.weight.dtype)))
    config = LoopConfig(out=tmp_path, max_train_steps=1, batch_size=4, mixed_precision="bf16")
    learn(Hinton(2.0, 1.0, 1.0, True), TeacherStudent(student, teacher), shapes(), config)
    assert seen == [(torch.bfloat16, torch.float32)]
    assert all(torch.equal(p, whole[name]) for name, p in teacher.named_parameters())


def test_a_teacher_answers_problems_in_the_precision_of_the_run(tmp_path, monkeypatch):
    teacher, seen = Decoder(*arithmetic.build(0), ""), []

    def noted(one, first, problems, **_):
        seen.append((torch.is_autocast_enabled("cpu"), one.network.lm_head.weight.dtype))
        return [[Completion(arithmetic.worked(problem).completion, True)] for problem in problems]

    monkeypatch.setattr(collect, "answer", noted)
    for precision in ("bf16", "no"):
        config = R1TracesConfig(out=tmp_path / precision, samples=1, mixed_precision=precision)
        (tmp_path / precision).mkdir()
        collect.collect(teacher, [Problem("7+5=", "12")], config)
    assert seen == [(True, torch.bfloat16), (False, torch.float32)]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_activations_that_are_computed_twice_give_the_same_gradients(kind):
    if kind == "bert":
        network, objective = MaskedLM(bert()), MaskedModelling(MASKING)
        inner, data = network.network.base_model.encoder.layer[0], batch(lines(5, 12, 8), 3)
    else:
        network, objective = tiny_decoder(kind).network.double(), CrossEntropy()
        inner = network.model.layers[0] if kind == "llama" else network.transformer.h[0]
        every = torch.ones_like(IDS, dtype=torch.bool)
        data = Batch({"ids": IDS, "attention": every, "counts": every}, Draws.at(0, 0, 2))
    network.train()
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    calls, found = [], []
    part = next(m for m in inner.modules() if not list(m.children()))
    part.register_forward_hook(lambda *_: calls.append(1))
    for twice in (False, True):
        if twice:
            recompute(network)
        network.zero_grad()
        objective.loss("student", data, TeacherStudent(network), CLOCK).total.backward()
        found.append({name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None})
        data = Batch(data.items, Draws.at(0, 0, len(data["ids"])))
    assert len(calls) == 1 + 2
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(value, found[1][name], rtol=0, atol=1e-10) for name, value in found[0].items())


def test_advice_for_a_full_device_is_one_that_is_taken(tmp_path):
    cases = ((build("resnet8", 2, 8, seed=1), False), (tiny_decoder().network, True))
    for number, (network, advised) in enumerate(cases):
        config = R1TracesConfig(out=tmp_path / str(number), max_train_steps=1, batch_size=4)
        run = Learner(Hinton(2.0, 0.0, 1.0, True), TeacherStudent(network), shapes(), config)

        def full():
            raise torch.OutOfMemoryError

        run.step = full
        with pytest.raises(InputError, match="lower --batch-size and raise --gradient-accumulation") as error:
            run.fit()
        assert ("add --gradient-checkpointing" in str(error.value)) == advised == recomputes(network)
    with pytest.raises(InputError, match="gradient_checkpointing: got it for a CifarResNet, which cannot"):
        recompute(build("resnet8", 2, 8, seed=1))
