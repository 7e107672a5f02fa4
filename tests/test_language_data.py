"""Texts as tokens: packing, padding, a pad token that is eos, and unreadable input."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_decoders import sentences, tiny_decoder, tokenizer, write_text

from stepdistill.baselines.language import losses
from stepdistill.baselines.language.models import logits, positions
from stepdistill.baselines.language.texts import Pair, check_kinds, open_texts
from stepdistill.baselines.language.tokens import pack, pair_up, stream
from stepdistill.errors import InputError

PAIRS = [Pair("the cat", " sees red hats."), Pair("a dog likes the old", " owl.")]
PROMPT, COMPLETION = 12, 9
KINDS = ("llama", "gpt2")


def by_hand(network: torch.nn.Module) -> float:
    """Nats per token of the completions and their ends, each pair alone and without padding."""
    end, values = tokenizer().eos_token_id, []
    for pair in PAIRS:
        before, after = (tokenizer()(text).input_ids for text in (pair.prompt, pair.completion))
        ids = torch.tensor([before + after + [end]])
        log_probs = network(input_ids=ids).logits[0].double().log_softmax(-1)
        values += [-log_probs[i - 1, ids[0, i]].item() for i in range(len(before), ids.shape[1])]
    return sum(values) / len(values)


@pytest.fixture(params=KINDS)
def network(request):
    return tiny_decoder(request.param).network


@torch.no_grad()
def test_padding_on_both_sides_changes_nothing(network):
    rows = pair_up(PAIRS, tokenizer(), prompt=PROMPT, completion=COMPLETION)
    assert (~rows.attention[:, 0]).any() and (~rows.attention[:, -1]).any()  # padding on both sides
    student_logits = logits(network, rows.ids, rows.attention)
    ours = losses.cross_entropy(*losses.shift(student_logits, rows.ids, rows.counts)).item()
    assert ours == pytest.approx(by_hand(network), abs=1e-5)


@torch.no_grad()
def test_padding_that_counts_or_is_attended_to_is_another_loss(network):
    rows = pair_up(PAIRS, tokenizer(), prompt=PROMPT, completion=COMPLETION)
    student_logits = logits(network, rows.ids, rows.attention)
    truth = by_hand(network)
    all_count = losses.cross_entropy(*losses.shift(student_logits, rows.ids, torch.ones_like(rows.counts))).item()
    attended = logits(network, rows.ids, torch.ones_like(rows.attention))
    all_seen = losses.cross_entropy(*losses.shift(attended, rows.ids, rows.counts)).item()
    assert abs(all_count - truth) > 1e-2 and abs(all_seen - truth) > 1e-2


@torch.no_grad()
def test_of_left_padding_the_first_true_token_is_at_place_0():
    """GPT-2 has learned positions: counted from the first column, as they are by default, they are wrong."""
    network = tiny_decoder("gpt2").network
    rows = pair_up(PAIRS, tokenizer(), prompt=PROMPT, completion=COMPLETION)
    assert positions(rows.attention)[0, PROMPT].item() == len(tokenizer()(PAIRS[0].prompt).input_ids)
    unplaced = network(input_ids=rows.ids, attention_mask=rows.attention.long(),
                       position_ids=torch.arange(PROMPT + COMPLETION)[None]).logits  # fmt: skip
    mistaken = losses.cross_entropy(*losses.shift(unplaced, rows.ids, rows.counts)).item()
    assert abs(mistaken - by_hand(network)) > 1e-2


@torch.no_grad()
def test_where_pad_is_eos_the_end_of_a_text_still_counts(network):
    """A mask made from the pad token drops the ends, and the student never learns to stop."""
    rows = pair_up(PAIRS, tokenizer(), prompt=PROMPT, completion=COMPLETION)
    end = tokenizer().eos_token_id
    assert tokenizer().pad_token_id is None and (rows.ids[~rows.attention] == end).all()
    assert (rows.counts & (rows.ids == end)).sum(1).tolist() == [1, 1]
    student_logits = logits(network, rows.ids, rows.attention)
    ours = losses.cross_entropy(*losses.shift(student_logits, rows.ids, rows.counts)).item()
    by_token = losses.cross_entropy(*losses.shift(student_logits, rows.ids, rows.counts & (rows.ids != end))).item()
    assert ours == pytest.approx(by_hand(network), abs=1e-5) and abs(by_token - ours) > 1e-3


def test_gradients_through_padded_rows_are_finite(network):
    rows = pair_up(PAIRS, tokenizer(), prompt=PROMPT, completion=COMPLETION)
    student_logits = logits(network, rows.ids, rows.attention)
    losses.cross_entropy(*losses.shift(student_logits, rows.ids, rows.counts)).backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())


def test_long_prompts_keep_their_end_and_cut_completions_have_none():
    rows = pair_up([Pair("a dog likes the old owl", " sees the cat")], tokenizer(), prompt=2, completion=2)
    before, after = (tokenizer()(text).input_ids for text in ("a dog likes the old owl", " sees the cat"))
    assert rows.ids.tolist() == [before[-2:] + after[:2]] and rows.counts.tolist() == [[False, False, True, True]]


def test_blocks_are_the_texts_one_behind_the_other_with_ends_between():
    texts = sentences(9)
    blocks = pack(texts, tokenizer(), 8, prompt=3)
    ids = [i for text in texts for i in [*tokenizer()(text).input_ids, tokenizer().eos_token_id]]
    assert blocks.ids.flatten().tolist() == ids[: len(ids) // 8 * 8] and blocks.attention.all()
    assert not blocks.counts[:, 0].any() and blocks.counts[:, 1:].all()
    assert stream(texts, tokenizer(), 5).tolist() == ids[:5]
    assert len(pack(texts, tokenizer(), 8, prompt=3, limit=2)) == 2


def test_the_last_tenth_of_a_file_is_held_out_where_no_test_file_is_named(tmp_path):
    file = write_text(tmp_path / "a.txt", 200)
    (train,), (test,) = (open_texts(file, split) for split in ("train", "test"))
    assert train + test == (tmp_path / "a.txt").read_text() and 0.08 < len(test) / len(train + test) < 0.1
    other = write_text(tmp_path / "b.txt", 3)
    assert open_texts(file, "test", test=other) == [(tmp_path / "b.txt").read_text()]
    assert open_texts(file, "train", test=other) == [(tmp_path / "a.txt").read_text()]


def test_a_jsonl_holds_texts_or_prompts_with_completions(tmp_path):
    rows = [{"text": t} for t in sentences(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert open_texts(str(tmp_path / "a.jsonl"), "train") == [row["text"] for row in rows[:18]]
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": "2+2=", "completion": "4"}) + "\n")
    assert open_texts(str(tmp_path / "b.jsonl"), "train") == [Pair("2+2=", "4")]


@pytest.mark.parametrize(
    ("train", "test", "got"),
    [
        (["a"] * 3, PAIRS, "0 prompts and 3 texts to train on, and held out 2 and 0"),
        (PAIRS, ["a"], "2 prompts and 0 texts to train on, and held out 0 and 1"),
        ([*PAIRS, "a"], PAIRS, "2 prompts and 1 texts to train on, and held out 2 and 0"),
        (["a"], ["a", *PAIRS], "0 prompts and 1 texts to train on, and held out 2 and 1"),
    ],
)
def test_texts_and_prompts_are_not_mixed(train, test, got):
    with pytest.raises(InputError, match=f"data: got {got}; allowed: all prompts, or all texts"):
        check_kinds(train, test)
    check_kinds(PAIRS, PAIRS[:1])
    check_kinds(["a"], ["b", "c"])


def test_captions_of_the_embedded_set_are_texts():
    train, test = (open_texts("avatars", split) for split in ("train", "test"))
    assert (len(train), len(test)) == (20_000, 2_500) and train[0].startswith("a picture of two people")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "whose train text is empty"),
        ("blank.txt", " \n\n", "whose train text is empty"),
        ("none.jsonl", "", "whose train text is empty"),
        ("bad.jsonl", "{not json", "cannot be read"),
        ("odd.jsonl", '{"words": "a"}\n', "cannot be read ('text')"),
        ("null.jsonl", '{"text": "a"}\n{"text": null}\n', "cannot be read (null is no text)"),
        ("number.jsonl", '{"prompt": "a", "completion": 3}\n', "cannot be read (3 is no text)"),
        ("half.jsonl", '{"text": "\\ud800 a"}\n', "cannot be read ('utf-8' codec can't encode"),
        ("deep.jsonl", '{"text": ' + "[" * 100_000 + "\n", "cannot be read (maximum recursion depth"),
        ("table.csv", "a,b", "which is no text; allowed: avatars"),
        ("missing.txt", None, "cannot be read"),
    ],
)
def test_what_holds_no_text_is_refused(tmp_path, name, content, message):
    file = tmp_path / name
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError) as error:
        open_texts(str(file), "train")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_less_than_a_block_is_refused():
    with pytest.raises(InputError, match=r"corpus: got \d+ tokens; allowed: 512"):
        pack(sentences(2), tokenizer(), 512, prompt=3)
    with pytest.raises(InputError, match="corpus: got no prompts"):
        pair_up([], tokenizer(), prompt=2, completion=2)
