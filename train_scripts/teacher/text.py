"""Tokenizer and text tower: a CLIP tower that learns to predict which attributes a caption names, and their classes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from teacher.attributes import Heads, attribute_classes, attribute_labels
from teacher.loop import Budget, Figures, Run, train
from torch import Tensor, nn

from stepdistill.data import avatars
from stepdistill.errors import InputError


def build_tokenizer(captions: list[str], max_length: int):
    """A byte-level BPE in CLIP's format, learned from the captions. As in CLIP, the end token has the highest id."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    learner.normalizer = normalizers.Lowercase()
    words = pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), "removed", invert=True)
    learner.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner.train_from_iterator(
        captions,
        trainers.BpeTrainer(vocab_size=1024, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False),
    )
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *dict.fromkeys("".join(pair) for pair in merges)]
    vocabulary = {token: i for i, token in enumerate([*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length)


def tokenize(tokenizer, captions: list[str], device: str) -> Tensor:
    """(N, max_length) token ids, padded as in StableDiffusionPipeline."""
    options = {"padding": "max_length", "truncation": True, "max_length": tokenizer.model_max_length}
    return tokenizer(captions, return_tensors="pt", **options).input_ids.to(device)


def run_text(run: Run, max_length: int, sizes: dict, budget: Budget) -> Figures:
    """Trains the text tower to predict from its pooled state which attributes a caption names, and their classes."""
    from transformers import CLIPTextConfig, CLIPTextModel

    data = avatars.load("train")
    tokenizer = build_tokenizer(data.captions, max_length)
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    tower = CLIPTextModel(
        CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=max_length, **special, **sizes)
    )
    heads = Heads(sizes["hidden_size"], [len(values) + 1 for values in attribute_classes().values()])
    model = nn.ModuleDict({"tower": tower, "heads": heads}).to(run.device)
    ids, labels = (
        tokenize(tokenizer, data.captions, run.device),
        attribute_labels("train", mentioned_only=True).to(run.device),
    )

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(ids), (budget.batch_size,), generator=generator)
        return heads.loss(tower(ids[index]).pooler_output, labels[index])

    model.load_state_dict(train("text", model, loss, budget, run), strict=False)
    model.eval()
    with torch.no_grad():
        pooled = tower(tokenize(tokenizer, avatars.load("test").captions, run.device)).pooler_output
        accuracy = heads.accuracy(pooled, attribute_labels("test", mentioned_only=True).to(run.device)).mean()
    tower.save_pretrained(run.out / "text_encoder")
    tokenizer.save_pretrained(run.out / "tokenizer")
    return {"held_out_accuracy": round(accuracy.item(), 5)}  # mentioned and unmentioned attributes, from captions


def load_tokenizer(run: Run):
    """The tokenizer of the `text` stage."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(_made(run, "tokenizer"))


def load_text(run: Run):
    """The tokenizer and text tower of the `text` stage."""
    from transformers import CLIPTextModel

    tower = CLIPTextModel.from_pretrained(_made(run, "text_encoder")).to(run.device).eval()
    return load_tokenizer(run), tower


def _made(run: Run, name: str) -> Path:
    if not (run.out / name).is_dir():
        raise InputError(f"{run.out / name}: not there; run the stage text first")
    return run.out / name
