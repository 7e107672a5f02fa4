"""Minitron: importance by its definition, and that removing what has no effect changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity

from stepdistill.baselines.language import run
from stepdistill.baselines.language.importance import Importance, importance
from stepdistill.baselines.language.minitron import MinitronConfig
from stepdistill.baselines.language.prune import cut, pruned
from stepdistill.baselines.language.shares import Kept, Shares, choose
from stepdistill.baselines.language.tokens import Tokens
from stepdistill.errors import InputError


@pytest.fixture(autouse=True)
def norms_in_float64(monkeypatch):
    """Computes RMS norms in float64; transformers' go through float32, which hides exactness."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt()

    for kind in (LlamaRMSNorm, Qwen2RMSNorm):
        monkeypatch.setattr(kind, "forward", norm)


RECORDS = Path(__file__).parents[1] / "benchmarks" / "results" / "baselines"
KINDS = ("llama", "llama-mha", "llama-mqa", "qwen2", "gpt2")


def decoder(kind: str, layers: int = 3):
    """A random decoder in float64, with non-trivial biases and norms: 4 heads of 8, 32 channels, 24 neurons."""
    import transformers as hf

    torch.manual_seed(0)
    if kind == "gpt2":
        config = hf.GPT2Config(vocab_size=19, n_embd=32, n_layer=layers, n_head=4, n_inner=24, n_positions=16)
        network = hf.GPT2LMHeadModel(config)
    else:
        shared = {"llama": 2, "llama-mha": 4, "llama-mqa": 1, "qwen2": 2}[kind]
        config_class, network_class = (
            (hf.Qwen2Config, hf.Qwen2ForCausalLM) if kind == "qwen2" else (hf.LlamaConfig, hf.LlamaForCausalLM)
        )
        network = network_class(config_class(
            vocab_size=19, hidden_size=32, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=shared, max_position_embeddings=16, tie_word_embeddings=kind == "llama",
        ))  # fmt: skip
    network = network.double().eval()
    with torch.no_grad():
        for name, p in network.named_parameters():
            p.copy_(torch.randn_like(p) * 0.3 + ("norm" in name or ".ln_" in name) * name.endswith("weight"))
    return network


def parts(network, kind: str):
    """For each layer, the modules that write to the residual stream: attention's and the MLP's."""
    if kind == "gpt2":
        return [(h.attn.c_proj, h.mlp.c_proj) for h in network.transformer.h]
    return [(layer.self_attn.o_proj, layer.mlp.down_proj) for layer in network.model.layers]


def columns(module, kind: str) -> torch.Tensor:
    """A view of its weight as (out, in)."""
    return module.weight.T if kind == "gpt2" else module.weight


def everything(network) -> Kept:
    config = network.config
    inner = getattr(config, "n_inner", None) or config.intermediate_size
    layers = config.num_hidden_layers
    wide = [torch.arange(n).expand(layers, n) for n in (config.num_attention_heads, inner)]
    return Kept(torch.arange(layers), wide[0], torch.arange(config.hidden_size), wide[1])


def without(kept: Kept, **changes) -> Kept:
    return Kept(**{name: changes.get(name, getattr(kept, name)) for name in kept.__dataclass_fields__})


IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])


@torch.no_grad()
def logits(network) -> torch.Tensor:
    return network(input_ids=IDS).logits


def clear_channels(network, kind: str, gone: torch.Tensor) -> None:
    """Makes nothing write to these channels; for GPT-2, whose norms subtract a mean, each write also sums to 0."""
    stay = torch.ones(32, dtype=torch.bool).index_fill(0, gone, False)

    def clear(x: torch.Tensor, axis: int) -> None:
        x = x.movedim(axis, -1)
        x[..., gone] = 0
        if kind == "gpt2":
            x[..., stay] -= x[..., stay].mean(-1, keepdim=True)

    for module in [m for pair in parts(network, kind) for m in pair]:
        clear(columns(module, kind), 0)
        if module.bias is not None:
            clear(module.bias, 0)
    clear(network.get_input_embeddings().weight, 1)
    if kind == "gpt2":
        clear(network.transformer.wpe.weight, 1)
        for name, p in network.named_parameters():
            if ".ln_" in name and name.endswith("bias"):
                p[gone] = 0


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_without_what_does_nothing_a_decoder_says_the_same(kind):
    network = decoder(kind)
    kept, size = everything(network), 8
    neurons = torch.stack([torch.randperm(24)[:17].sort().values for _ in range(3)])
    heads = torch.tensor([[0, 3], [1, 2], [0, 2]])  # one of each group of two
    channels = torch.randperm(32)[: 16 if kind == "gpt2" else 20].sort().values
    for (attention, mlp), some, few in zip(parts(network, kind), neurons, heads, strict=True):
        idle = torch.ones(24, dtype=torch.bool).index_fill(0, some, False)
        columns(mlp, kind)[:, idle] = 0
        alone = torch.ones(4, dtype=torch.bool).index_fill(0, few, False).repeat_interleave(size)
        columns(attention, kind)[:, alone] = 0
    for module in parts(network, kind)[1]:  # the layer in the middle adds nothing
        columns(module, kind).zero_()
        if module.bias is not None:
            module.bias.zero_()
    clear_channels(network, kind, torch.tensor(sorted(set(range(32)) - set(channels.tolist()))))

    truth = logits(network)
    assert torch.equal(logits(cut(network, kept)), truth)
    ends = torch.tensor([0, 2])
    changes = {
        "layers": {"layers": ends, "heads": kept.heads[ends], "neurons": kept.neurons[ends]},
        "neurons": {"neurons": neurons},
        "heads and channels": {"heads": heads, "channels": channels},
        "all": {"layers": ends, "heads": heads[ends], "channels": channels, "neurons": neurons[ends]},
    }
    if kind != "gpt2":  # its heads and channels are pruned together
        changes |= {"heads": {"heads": heads}, "channels": {"channels": channels}}
    for what, change in changes.items():
        smaller = cut(network, without(kept, **change))
        assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in network.parameters())
        assert (logits(smaller) - truth).abs().max() < 1e-10, what


@pytest.mark.parametrize("kind", KINDS)
def test_a_pruned_decoder_is_saved_and_loaded_as_any_other(kind, tmp_path):
    network = decoder(kind)
    spec = "prune:layers=0.34,heads=0.5,channels=0.5,neurons=0.3"
    if kind == "llama-mqa":
        spec = "prune:layers=0.34,heads=0.25,channels=0.5"
    seen = torch.ones_like(IDS, dtype=torch.bool)
    smaller = pruned(spec, network, Tokens(IDS, seen, seen, 1))
    smaller.save_pretrained(tmp_path)
    again = type(network).from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(logits(again), logits(smaller))
    assert (smaller.get_input_embeddings().weight is smaller.lm_head.weight) == (kind in ("llama", "gpt2"))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_importance_is_what_its_definitions_say_of_the_tokens_that_count(kind):
    network = decoder(kind)
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    other = torch.where(mask.bool(), IDS, 11)  # the content of padding does not matter
    found = importance(network, [(other[:1], mask[:1]), (other[1:], mask[1:])])

    heard: dict[str, list] = {"layers": [], "heads": [], "channels": [], "neurons": []}
    layers = network.transformer.h if kind == "gpt2" else network.model.layers
    for layer, (attention, mlp) in zip(layers, parts(network, kind), strict=True):
        norms = (layer.ln_1, layer.ln_2) if kind == "gpt2" else (layer.input_layernorm, layer.post_attention_layernorm)
        layer.register_forward_hook(lambda m, i, o: heard["layers"].append((i[0], o[0] if isinstance(o, tuple) else o)))
        attention.register_forward_hook(lambda m, i, o: heard["heads"].append(i[0]))
        mlp.register_forward_hook(lambda m, i, o: heard["neurons"].append(i[0]))
        for norm in norms:
            norm.register_forward_hook(lambda m, i, o: heard["channels"].append(o))
    network(input_ids=IDS, attention_mask=mask)
    rows = [torch.arange(8), torch.arange(5)]
    for i in range(3):
        before, after = heard["layers"][i]
        change = sum((1 - cosine_similarity(before[b, r], after[b, r], dim=-1)).mean() for b, r in enumerate(rows))
        assert found.layers[i] == pytest.approx(change.item(), abs=1e-10)
        for head in range(4):
            means = [heard["heads"][i][b, r, 8 * head : 8 * head + 8].norm(dim=-1).mean() for b, r in enumerate(rows)]
            assert found.heads[i, head] == pytest.approx(torch.stack(means).norm().item(), abs=1e-10)
        for neuron in range(24):
            means = [heard["neurons"][i][b, r, neuron].abs().mean() for b, r in enumerate(rows)]
            assert found.neurons[i, neuron] == pytest.approx(torch.stack(means).norm().item(), abs=1e-10)
    for channel in range(32):
        means = [sum(x[b, r, channel].abs().mean() for x in heard["channels"]) for b, r in enumerate(rows)]
        assert found.channels[channel] == pytest.approx(torch.stack(means).norm().item(), abs=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_padding_on_the_left_changes_no_importance(kind):
    """GPT-2 has learned positions, counted from the first token that is attended to."""
    network = decoder(kind)
    right = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    left, ids = right.flip(1), IDS.clone()
    ids[1] = ids[1].roll(3)
    one, other = (importance(network, [(x, mask)]) for x, mask in ((IDS, right), (ids, left)))
    for name in ("layers", "heads", "channels", "neurons"):
        assert torch.allclose(getattr(one, name), getattr(other, name), rtol=1e-10, atol=1e-12), name


def test_heads_are_ranked_within_their_group_and_the_least_go():
    config = decoder("llama").config
    found = Importance(
        torch.tensor([1.0, 3.0, 2.0]), torch.tensor([[9.0, 8.0, 1.0, 2.0], [5.0, 6.0, 0.5, 0.1], [1.0, 2.0, 3.0, 4.0]]),
        torch.arange(32.0), torch.arange(24.0).flip(0).expand(3, 24),
    )  # fmt: skip
    kept = choose(found, config, Shares(layers=0.34, heads=0.5, channels=0.25, neurons=0.5))
    assert kept.layers.tolist() == [1, 2]
    assert kept.heads.tolist() == [[1, 2], [1, 3]]  # over all heads: 0 and 1 in the first of them
    assert kept.channels.tolist() == list(range(8, 32)) and kept.neurons.tolist() == [list(range(12))] * 2
    alone = choose(found, decoder("llama-mha").config, Shares(heads=0.5))
    assert alone.heads.tolist() == [[0, 1], [0, 1], [2, 3]]


def llama(channels: int, neurons: int, heads: int, keys: int):
    import transformers as hf

    return hf.LlamaConfig(hidden_size=channels, intermediate_size=neurons, num_attention_heads=heads,
                          num_key_value_heads=keys, head_dim=64)  # fmt: skip


def kept_of(config, spec: str) -> tuple[int, int]:
    """The channels and the neurons that stay, by random importance."""
    heads, neurons = (torch.rand(1, n) for n in (config.num_attention_heads, config.intermediate_size))
    kept = choose(Importance(torch.ones(1), heads, torch.rand(config.hidden_size), neurons), config, Shares.read(spec))
    return len(kept.channels), kept.neurons.shape[1]


@pytest.mark.parametrize(
    ("channels", "neurons", "heads", "keys", "spec", "left"),
    [
        (2048, 8192, 32, 8, "prune:channels=0.25,neurons=0.36", (1536, 5248)),  # Llama-3.2-1B
        (896, 4864, 14, 2, "prune:neurons=0.3", (896, 3392)),  # Qwen2.5-0.5B
        (576, 1536, 9, 3, "prune:neurons=0.25", (576, 1152)),  # SmolLM2-135M, as recorded
        (1536, 1000, 12, 2, "prune:channels=0.3,neurons=0.3", (1152, 700)),  # multiples of 64 and of 12 heads
        (2048, 1024, 32, 8, "prune:heads=0.25,channels=0.26", (1536, 1024)),  # of 64 and of 24 heads
        (2048, 5243, 32, 32, "prune:heads=0.1,channels=0.25", (1537, 5243)),  # of 29 heads: 1,856 is that of both
        (2048, 1500, 32, 32, "prune:heads=0.1", (2030, 1500)),  # the 71st multiple of 29 is above 2,048
    ],
)
def test_of_wide_parts_a_multiple_of_64_stays(channels, neurons, heads, keys, spec, left):
    assert kept_of(llama(channels, neurons, heads, keys), spec) == left


def test_the_recorded_student_has_the_shape_that_it_was_recorded_with():
    """SmolLM2-135M: 30 layers of 576 channels and 1,536 neurons, 9 heads of 64 in 3 groups, 49,152 tokens, tied."""
    record = json.loads((RECORDS / "minitron_smollm2.json").read_text())
    spec = record["config"]["student"]
    channels, neurons = kept_of(llama(576, 1536, 9, 3), spec)
    layer = channels * (2 * 576 + 2 * 192 + 3 * neurons + 2)
    parameters = 49_152 * channels + 30 * (1 - Shares.read(spec).layers) * layer + channels
    assert {row["parameters"] for row in record["rows"] if row["role"] == "student"} == {parameters}


@pytest.mark.parametrize(
    ("kind", "spec", "match"),
    [
        ("llama", "prune:heads=0.9", "got 0.9 of 2 heads that share keys pruned, which leaves none"),
        ("llama-mha", "prune:heads=0.9", "got 0.9 of 4 heads pruned, which leaves none"),
        ("llama", "prune:layers=0.9", "got 0.9 of 3 layers pruned, which leaves none"),
        ("llama", "prune:heads=1", "allowed: prune: and shares that go, 0 to below 1"),
        ("llama", "prune:depth=0.5", "of layers, heads, channels, neurons"),
        ("llama", "prune:layers=half", "allowed: prune: and shares that go"),
        ("gpt2", "prune:heads=0.25", "as many channels as heads times their size; give channels=0 and heads=0"),
        ("gpt2", "prune:channels=0.3", "give channels=0.5 and heads=0.5"),
    ],
)
def test_a_share_that_cannot_go_is_refused_in_a_line(kind, spec, match):
    seen = torch.ones_like(IDS, dtype=torch.bool)
    with pytest.raises(InputError, match=match) as error:
        pruned(spec, decoder(kind), Tokens(IDS, seen, seen, 1))
    assert "\n" not in str(error.value)


def test_what_minitron_cannot_prune_is_refused_before_anything_is_trained(tmp_path):
    for student in ("layers:2", "prune:heads=1.5"):
        with pytest.raises(InputError, match="allowed: prune: and shares"):
            MinitronConfig(out=tmp_path / "run", student=student).check()
    with pytest.raises(InputError, match="of 2 heads that share keys pruned, which leaves none"):
        MinitronConfig(out=tmp_path / "run", student="prune:heads=0.99", teacher_steps=1).run()
    assert not (tmp_path / "run").exists()


def test_minitron_trains_from_what_is_left_and_says_where_too_much_went(tmp_path, monkeypatch):
    few = {"limit": 80, "teacher_steps": 2, "max_train_steps": 2, "batch_size": 4, "test_tokens": 600, "shown": 2}
    asked, judged = [], []

    def kept(*given):
        asked.append(given)
        judged.append(pruned(*given))
        return judged[-1]

    monkeypatch.setattr(run, "pruned", kept)
    results = MinitronConfig(out=tmp_path, student="prune:layers=0.75,channels=0.5", seeds=(0, 1), **few).run()
    assert len(judged) == 2  # before the teacher is trained, to reject it early, and after; not per seed and role
    roles = {row.role: row for row in results.rows}
    assert list(roles) == ["teacher", "before", "control", "student"]
    anew = pruned(*asked[-1]).state_dict()  # the common starting point was not trained
    assert all(torch.equal(value, anew[name]) for name, value in judged[-1].state_dict().items())
    assert roles["student"].parameters == roles["before"].parameters < roles["teacher"].parameters / 2
    assert "of the parameters were removed in one round" in results.note
