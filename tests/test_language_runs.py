"""Whole runs of the language baselines through their command: tables, resume, shared controls, rejections."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_decoders import lines_of, tiny_decoder, tokenizer, write_text

from stepdistill.baselines import BASELINES, get
from stepdistill.baselines.language.corpus import Corpus
from stepdistill.baselines.language.models import Decoder, logits, open_decoder
from stepdistill.baselines.language.run import DecoderConfig
from stepdistill.baselines.learner import Learner
from stepdistill.cli import main as cli
from stepdistill.cli.baselines import flags, main
from stepdistill.training.from_yaml import from_yaml

METHODS = ("forward_kl", "gkd", "distillm", "minillm")
FOLDER = Path(__file__).parents[1] / "train_scripts" / "configs" / "baselines"
SMALL = ["--block", "24", "--prompt", "8", "--validation", "4", "--limit", "60", "--test-tokens", "300", "--shown", "3",
         "--window", "32", "--stride", "16", "--batch-size", "4", "--checkpoint-every", "3"]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def words(name: str, text: str, out: Path, *more: str, steps: int = 6) -> list[str]:
    given = ["--data", text, "--teacher-steps", "8", "--max-train-steps", str(steps), "--out", str(out)]
    return ["run", name, *SMALL, *given, *more]


@pytest.fixture(scope="module")
def first(tmp_path_factory, text) -> Path:
    """A run of forward_kl, whose teacher and control the others reuse."""
    out = tmp_path_factory.mktemp("runs") / "forward_kl"
    main(words("forward_kl", text, out))
    return out


def figures(out: Path) -> dict[str, dict]:
    return {row["role"]: row["figures"] for row in json.loads((out / "results.json").read_text())["rows"]}


@pytest.mark.parametrize("name", METHODS)
def test_a_run_ends_with_teacher_before_control_and_student(name, text, first, tmp_path):
    out = first if name == "forward_kl" else tmp_path / name
    if name != "forward_kl":
        main(words(name, text, out, "--beside", str(first)))
        assert not (out / "control-0").exists() and not (out / "teacher").exists()
    found = figures(out)
    assert list(found) == ["teacher", "before", "control", "student"]
    shared = [{role: values for role, values in figures(run).items() if role != "student"} for run in (first, out)]
    assert shared[0] == shared[1]
    assert found["before"]["nll"] < math.log(300)  # of a trained teacher's layers, not of random ones
    for values in found.values():
        assert values["perplexity"] == pytest.approx(math.exp(values["nll"]))
    assert found["control"]["nll"] < found["before"]["nll"]
    generations = (out / "generations.md").read_text()
    assert generations.count("- **student, seed 0**:") == generations.count("- **teacher**:") == 3
    lines = [json.loads(line) for line in (out / "student-0" / "metrics.jsonl").read_text().splitlines()]
    terms = {"forward_kl": {"forward_kl", "cross_entropy"}, "minillm": {"single", "long", "cross_entropy"}}
    assert terms.get(name, set()) <= lines[-1].keys() and math.isfinite(found["student"]["nll"])


@pytest.mark.parametrize("part", ["student-0", "control-0"])
def test_a_student_and_its_control_are_exported_as_transformers_loads_them(part, first):
    """Other methods start from the control: a student fine-tuned on the text."""
    model = open_decoder(str(first / part / "model"))
    weights = load_file(first / part / "weights" / "student.safetensors")
    own = dict(model.network.named_parameters())
    assert all(torch.equal(own[name], value) for name, value in weights.items() if name in own)
    ids = torch.tensor([model.tokenizer("the cat sees").input_ids])
    assert logits(model.network, ids, torch.ones_like(ids)).shape[-1] == len(model.tokenizer)


def test_a_run_that_was_cut_goes_on_to_the_same_bits(text, first, tmp_path, monkeypatch):
    fit = Learner.fit

    def cut(self: Learner) -> Path:
        step = self.step

        def stop() -> dict:
            if self.update == 4 and self.out.name == "student-0":
                raise ConnectionAbortedError
            return step()

        self.step = stop
        return fit(self)

    monkeypatch.setattr(Learner, "fit", cut)
    with pytest.raises(ConnectionAbortedError):
        main(words("forward_kl", text, tmp_path, "--beside", str(first)))
    monkeypatch.setattr(Learner, "fit", fit)
    main(words("forward_kl", text, tmp_path, "--beside", str(first)))
    a, b = (load_file(run / "student-0" / "weights" / "student.safetensors") for run in (tmp_path, first))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert figures(tmp_path) == figures(first)


def test_a_teacher_whose_vocabulary_a_student_has_cut_is_trained_as_another(text, tmp_path):
    for name, more in (("large", 24), ("small", 8)):
        tiny_decoder(vocab_size=len(tokenizer()) + more).network.save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    models = ["--teacher", str(tmp_path / "large"), "--over", f"student=layers:1;{tmp_path / 'small'}"]
    train = ["--correction-steps", "2", "--max-train-steps", "2", "--learning-rate", "1e-3", "--data", text]
    main(["sweep", "forward_kl", *SMALL, *models, *train, "--out", str(tmp_path / "out")])
    second, first = (run for run in sorted((tmp_path / "out").iterdir()) if run.is_dir())
    assert first.name == "student-layers:1"
    assert (first / "teacher").is_dir() and (second / f"teacher-{len(tokenizer())}").is_dir()


def test_trained_in_half_precision_networks_are_measured_in_full(text, tmp_path):
    """A finished run only loads its weights, so otherwise its figures would differ from those of the first time."""
    main(words("forward_kl", text, tmp_path, "--mixed-precision", "bf16"))
    before = figures(tmp_path)
    main(["eval", str(tmp_path)])
    assert figures(tmp_path) == before


def test_measured_anew_a_run_has_the_same_figures(first):
    before = figures(first)
    main(["eval", str(first)])
    assert figures(first) == before


def test_a_teacher_that_comes_trained_is_fitted_to_the_text_before_it_teaches(text, first, tmp_path):
    trained = ["--teacher", str(first / "student-0" / "model"), "--student", "layers:1", "--learning-rate", "1e-3"]
    found, corrected = [], ["--correction-steps", "20", "--teacher-learning-rate", "1.5e-3"]
    for name, more in (("as-it-is", []), ("corrected", corrected)):
        main(words("forward_kl", text, tmp_path / name, *trained, *more))
        assert (tmp_path / name / "teacher").exists() == bool(more)
        found.append(figures(tmp_path / name))
    plain, corrected = found
    assert corrected["teacher"]["nll"] < plain["teacher"]["nll"]
    assert corrected["before"] != plain["before"]  # the student starts from the corrected teacher
    record = json.loads((tmp_path / "corrected" / "results.json").read_text())
    assert record["rows"][0]["seconds"] > 0


@pytest.mark.parametrize(
    "more", [["--student", "prune:layers=0.5"], ["--trainer", "trl"], ["--mixed-precision", "bf16"]]
)
def test_one_student_or_control_at_a_time_is_there(more, text, first, tmp_path, monkeypatch):
    """So that a device needs room for one, not for all seeds'."""
    if "trl" in more:
        pytest.importorskip("trl")
    made, maker = [], DecoderConfig._maker

    def noted(self, teacher: Decoder, corpus: Corpus) -> Callable[[int], torch.nn.Module]:
        make = maker(self, teacher, corpus)

        def new(seed: int) -> torch.nn.Module:
            assert not any(one() for one in made)
            network = make(seed)
            made.append(weakref.ref(network))
            return network

        return new

    monkeypatch.setattr(DecoderConfig, "_maker", noted)
    main(words("gkd", text, tmp_path, "--seeds", "0", "1", *more, steps=2))
    assert len(made) == 1 + 4


def test_as_many_tokens_are_seen_in_measuring_as_in_training_where_nothing_else_is_said():
    kind = get("forward_kl").config
    assert kind(block=24).windows == {"window": 24, "stride": 12}
    assert kind(block=24, window=40).windows == {"window": 40, "stride": 20}
    assert kind(block=24, stride=3).windows == {"window": 24, "stride": 3}


def test_prompts_with_completions_are_measured_on_the_completions(tmp_path):
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(10) for b in range(10)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    main(words("gkd", str(tmp_path / "sums.jsonl"), tmp_path / "run", "--lmbda", "1"))
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["n"].startswith("3 held-out completions") and math.isfinite(
        figures(tmp_path / "run")["student"]["nll"]
    )


def test_a_student_learns_its_teacher_better_than_the_text_alone_teaches(text, tmp_path):
    """By the divergence from the teacher, its objective: 60 updates of each, on the same samples."""
    main(words("forward_kl", text, tmp_path, "--soft-weight", "1", "--hard-weight", "0", steps=60))
    found = figures(tmp_path)
    assert found["student"]["own_kl"] < found["control"]["own_kl"] / 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--student", "layers:9"], "student: got layers:9; allowed: 1 to 4"),
        (["--data", "/nowhere.txt"], "--data: got /nowhere.txt, which cannot be read"),
        (["--window", "600"], "block, window: got 600 tokens; allowed: 512"),
        (["--validation", "60"], "corpus: got 60 training samples"),
        (["--teacher", "smollm3.gguf", "--learning-rate", "1e-4"], "model: got smollm3.gguf, which does not exist"),
        (["--prompt", "24"], "prompt: got 24; allowed: below 24, the block"),
        (["--test", "{}/pairs.jsonl"], "got 0 prompts and 1 texts to train on, and held out 60 and 0; allowed: all"),
        (["--data", "{}/pairs.jsonl", "--test", "{}/text.txt"], "got 60 prompts and 0 texts to train on, and held out"),
        (["--data", "{}/mixed.jsonl"], "got 54 prompts and 36 texts to train on, and held out 6 and 4; allowed: all"),
    ],
)
def test_bad_input_ends_in_one_line_and_2_before_anything_is_trained(more, message, text, tmp_path, capsys):
    folder = Path(text).parent
    pairs = [json.dumps({"prompt": "the cat", "completion": f" likes {i}."}) for i in range(6)]
    (folder / "pairs.jsonl").write_text("\n".join(pairs * 10))
    (folder / "mixed.jsonl").write_text("\n".join([*pairs, *['{"text": "a dog"}'] * 4] * 10))
    command = words("forward_kl", text, tmp_path, *[word.format(folder) for word in more])
    assert cli(["baselines", *command]) == 2
    (error,) = lines_of(capsys.readouterr().err)
    assert error.startswith("error: ") and message in error and not list(tmp_path.glob("*/metrics.jsonl"))


@pytest.mark.parametrize("name", ["gkd", "distilbert"])
@pytest.mark.parametrize(("content", "part"), [("", "train"), (" \n", "train"), ("a few words", "test")])
def test_a_corpus_of_nothing_ends_in_one_line_and_2(name, content, part, tmp_path, capsys):
    file = tmp_path / "text.txt"
    file.write_text(content)
    command = ["run", name, "--quick", "--data", str(file), "--out", str(tmp_path / "run")]
    assert cli(["baselines", *command]) == 2
    (line,) = lines_of(capsys.readouterr().err)
    assert line.startswith(f"error: --data: got {file}, whose {part} text is empty; allowed: avatars, a .txt")


def test_an_empty_test_file_is_named_as_such(text, tmp_path, capsys):
    (tmp_path / "blank.txt").write_text("\n")
    command = words("gkd", text, tmp_path / "run", "--test", str(tmp_path / "blank.txt"))
    assert cli(["baselines", *command]) == 2
    assert f"error: --test: got {tmp_path}/blank.txt, whose test text is empty" in capsys.readouterr().err


def test_a_dry_run_trains_and_measures_nothing(text, tmp_path):
    main(words("distillm", text, tmp_path, "--dry-run"))
    assert not list(tmp_path.rglob("*.safetensors")) and not (tmp_path / "results.json").exists()


@pytest.mark.parametrize(
    ("more", "flag", "start"),
    [
        (["--teacher", "org/large", "--student", "org/small"], "learning_rate", "org/small"),
        (["--teacher", "org/large", "--student", "layers:6"], "learning_rate", "org/large"),
        (["--teacher", "org/large", "--student", "prune:layers=0.2"], "learning_rate", "org/large"),
        (["--teacher", "tiny", "--student", "out/small"], "learning_rate", "out/small"),
        (["--teacher", "org/large", "--learning-rate", "5e-3"], "learning_rate", "org/large"),
        (["--teacher", "org/large", "--student", "config:num_hidden_layers=2", "--correction-steps", "9"],
         "teacher_learning_rate", "org/large"),
    ],
)  # fmt: skip
def test_pretrained_weights_are_not_trained_at_a_tiny_models_rate(more, flag, start, capsys):
    assert cli(["baselines", "run", "forward_kl", *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"error: {flag}: got 0.00" in line and f" for {start}, which is pretrained; allowed: below 0.002" in line
    lower = flags("forward_kl", [*more, "--learning-rate", "5e-4"])
    lower.check()
    assert lower.learning_rate == 5e-4


@pytest.mark.parametrize(
    ("name", "more", "rate"),
    [
        ("forward_kl", ["--teacher", "tiny-gpt2", "--correction-steps", "9"], 2e-3),
        ("forward_kl", ["--teacher", "org/large", "--student", "config:num_hidden_layers=2"], 2e-3),
        ("r1_traces", ["--student", "layers:1"], 3e-3),
    ],
)
def test_random_weights_are_trained_at_a_tiny_models_rate(name, more, rate):
    config = flags(name, more)
    config.check()
    assert config.learning_rate == rate


def test_seeds_are_added_to_a_finished_run_and_none_is_refused(text, first, tmp_path, capsys):
    main(words("forward_kl", text, tmp_path, "--seeds", "0", "--beside", str(first)))
    weights = tmp_path / "student-0" / "weights" / "student.safetensors"
    written = weights.stat().st_mtime_ns
    main(words("forward_kl", text, tmp_path, "--seeds", "0", "1", "--beside", str(first)))
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["seed"] for row in rows if row["role"] == "student"] == [0, 1]
    assert weights.stat().st_mtime_ns == written
    (tmp_path / "none.yaml").write_text("seeds: []\n")
    for name in ("forward_kl", "hinton"):
        assert cli(["baselines", "run", name, "--config", str(tmp_path / "none.yaml")]) == 2
        assert "error: seeds: got none; allowed: one or more; give --seeds 0" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["gpt2_lab", "qwen_lab"])
def test_a_lab_is_a_configuration_of_every_divergence(file):
    path = FOLDER / f"{file}.yaml"
    lab = from_yaml(path, get("forward_kl").config)
    for name in METHODS:
        config = flags(name, ["--config", str(path), "--beside", str(lab.out)])
        assert config.shared == lab.shared and config.student.count("/") == 1


def test_the_teacher_fine_tuned_on_instructions_serves_all_three_runs():
    file = FOLDER / "gpt2_dolly.yaml"
    own = from_yaml(file, get("forward_kl").config)
    for name, more in (("distillm", []), ("minillm", ["--learning-rate", "5e-6"])):
        other = flags(name, ["--config", str(file), "--student", f"{own.out}/control-0/model", "--out", "b", *more])
        teacher = [one.shared.part("teacher", learning_rate=one.teacher_learning_rate).record() for one in (own, other)]
        assert teacher[0] | {"out": ""} == teacher[1] | {"out": ""}


def test_every_method_has_a_paper_and_small_numbers():
    for name in METHODS:
        kind = BASELINES[name].config
        assert BASELINES[name].paper and name == kind.NAME and kind.QUICK["max_train_steps"] <= 100
