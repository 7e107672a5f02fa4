"""Hinton's classifier: its loss in closed form, networks as published, and a run from the command line."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from safetensors.torch import load_file, load_model
from torch import nn

from stepdistill.baselines import BASELINES, get
from stepdistill.baselines.base import Batch, TeacherStudent
from stepdistill.baselines.classifier import hinton
from stepdistill.baselines.classifier.data import Labelled, normalise, open_labelled, view
from stepdistill.baselines.classifier.hinton import Hinton, HintonConfig
from stepdistill.baselines.classifier.networks import build, load
from stepdistill.baselines.divergence import softened_kl
from stepdistill.baselines.learner import Learner, learn
from stepdistill.baselines.reduce import masked_mean
from stepdistill.baselines.results import Results, Row, gap_closed
from stepdistill.baselines.shown import show
from stepdistill.baselines.sweep import points
from stepdistill.cli import main
from stepdistill.data.sources import fitted
from stepdistill.draws import Draws
from stepdistill.methods.base import Clock
from stepdistill.training.config import LoopConfig


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0, 16.0])
def test_the_soft_term_is_its_definition(temperature):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64)
    expected = []
    for z, v in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = ([math.exp(x / temperature) for x in row] for row in (v, z))
        p, q = ([x / sum(row) for x in row] for row in (p, q))
        expected.append(temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    found = softened_kl(student, teacher, temperature)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_at_a_high_temperature_the_gradient_is_the_difference_of_logits():
    """Equation 4 of the paper: (z - v) / N for logits of mean 0, with T² in front."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 6, dtype=torch.float64)
    student, teacher = (x - x.mean(-1, keepdim=True) for x in (student, teacher))
    student.requires_grad_()
    softened_kl(student, teacher, 1e5).sum().backward()
    torch.testing.assert_close(student.grad, (student.detach() - teacher) / 6, rtol=1e-4, atol=1e-5)


class Fixed(nn.Module):
    """Returns the same logits for any input."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(len(pixels), -1)


def test_weights_are_named_and_the_temperature_is_on_the_soft_term_alone(monkeypatch):
    z, v = torch.tensor([[[0.0, math.log(3.0)]], [[math.log(3.0), 0.0]]], dtype=torch.float64)
    batch = Batch({"pixels": torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "labels": torch.tensor([1, 0])}, Draws([1, 2]))
    objective = Hinton(temperature=4.0, soft_weight=2.0, hard_weight=3.0, flip=False)
    models = TeacherStudent(Fixed(z), Fixed(v))
    loss = objective.loss("student", batch, models, Clock(0, 1))
    hard = (-math.log(0.75) - math.log(0.25)) / 2
    p = 3**0.25 / (1 + 3**0.25)  # of the likelier class at T = 4
    soft = 4**2 * (p - (1 - p)) * math.log(p / (1 - p))
    assert loss.total.item() == pytest.approx(2 * soft + 3 * hard, abs=1e-10)
    assert {k: v.item() for k, v in loss.terms.items()} == pytest.approx({"hard": hard, "soft": soft}, abs=1e-10)
    with monkeypatch.context() as shared:
        shared.setattr(hinton, "masked_mean", lambda values: values.new_tensor(7.0))
        assert objective.loss("student", batch, models, Clock(0, 1)).total.item() == (2 + 3) * 7
    loss.total.backward()
    assert models.teacher.logits.grad is None and models.student.logits.grad is not None


def test_a_control_never_asks_the_teacher():
    models = TeacherStudent(Fixed(torch.zeros(1, 2)))
    batch = Batch({"pixels": torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "labels": torch.tensor([0])}, Draws([1]))
    loss = Hinton(4.0, 0.0, 1.0, False).loss("student", batch, models, Clock(0, 1))
    assert loss.total.item() == pytest.approx(math.log(2)) and models.teacher is None


def test_the_one_mean_counts_what_the_mask_says_and_nothing_else():
    values = torch.tensor([[1.0, 2.0, math.nan], [4.0, math.inf, 0.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert masked_mean(values, mask).item() == pytest.approx(7 / 3)
    assert masked_mean(values, torch.zeros_like(mask)).item() == 0
    assert masked_mean(torch.tensor([1.0, 4.0]).half()).dtype == torch.float32
    with pytest.raises(ValueError, match="mask: got shape"):
        masked_mean(values, mask[:, :2])


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("resnet20", 269_722), ("resnet56", 853_018), ("resnet18", 11_173_962)],  # with ten classes, as published
)
def test_networks_have_the_published_number_of_parameters(name, parameters):
    network = build(name, 10, 32, seed=0)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert network.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_a_network_that_was_probed_has_its_initial_running_statistics():
    statistics = {name: value for name, value in build("resnet8", 2, 8, seed=0).named_buffers() if value.ndim}
    assert statistics and all((value == ("var" in name)).all() for name, value in statistics.items())


def test_large_pictures_keep_the_published_stem():
    assert build("resnet18", 10, 224, seed=0).conv1.stride == (2, 2)
    assert build("resnet18", 10, 32, seed=0).conv1.stride == (1, 1)


def test_views_are_moved_and_mirrored_pictures():
    pixels = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    views = view(pixels, Draws.at(3, 0, 6), flip=True)
    again = Draws.at(3, 0, 6)
    rows, columns, mirrored = again.integers(9).tolist(), again.integers(9).tolist(), again.uniform() < 0.5
    assert 0 < mirrored.sum() < 6
    for i in range(6):
        padded = np.pad(normalise(pixels[i]).numpy(), ((0, 0), (4, 4), (4, 4)), mode="edge")
        cut = padded[:, rows[i] : rows[i] + 8, columns[i] : columns[i] + 8]
        assert np.array_equal(views[i].numpy(), cut[:, :, ::-1] if mirrored[i] else cut)


def test_a_gap_is_closed_by_a_share_or_not_told():
    assert gap_closed(0.9, 0.7, 0.8) == pytest.approx(0.5)
    assert gap_closed(1.0, 3.0, 2.5) == pytest.approx(0.25)  # for a loss, lower is better
    assert gap_closed(0.701, 0.70, 0.8) is None
    rows = [Row("teacher", "t", {"accuracy": 0.9}, 10), Row("control", "s", {"accuracy": 0.6}, 5, 1.0, 0)]
    rows += [
        Row("student", "s", {"accuracy": a, "latency_ms": ms}, 5, 1.0, seed)
        for seed, (a, ms) in enumerate(((0.7, 2.0), (0.8, 4.0)))
    ]
    results = Results("hinton", "accuracy", True, "4 pictures", rows)
    assert results.gaps() == {"s": pytest.approx(0.5)}
    assert gap_closed(0.0, 0.0, 0.0) is None
    swept = points({4.0: results.record()})
    assert swept[0]["student"] == {
        "mean": pytest.approx(0.75), "seeds": [0.7, 0.8], "other_figures": {"latency_ms": 3.0}, "parameters": {"s": 5}
    }  # fmt: skip
    assert swept[0]["teacher"]["parameters"] == {"t": 10} and swept[0]["gap_closed"] == {"s": pytest.approx(0.5)}


@pytest.mark.parametrize(
    ("teacher", "expected"),
    [(0.9, "50.0%"), (0.605, "not reported: teacher and control are too close"),
     (0.4, "not reported: the control is better than the teacher"), (None, "not reported: no teacher or no control")],
)  # fmt: skip
def test_why_a_gap_is_not_told_is_said(teacher, expected, capsys):
    rows = [Row("control", "s", {"accuracy": 0.6}, 5, 1.0, 0), Row("student", "s", {"accuracy": 0.75}, 5, 1.0, 0)]
    rows += [] if teacher is None else [Row("teacher", "t", {"accuracy": teacher}, 10)]
    show(json.loads(json.dumps(Results("hinton", "accuracy", True, "4 pictures", rows).record())))
    assert f"mean over seeds: {expected}" in " ".join(capsys.readouterr().out.split())


def test_a_student_is_compared_with_the_control_of_its_name():
    rows = [Row("teacher", "t", {"fd": 10.0}, 10)]
    for name, control, student in (("small", 20.0, 15.0), ("tiny", 30.0, 25.0)):
        rows += [Row("control", name, {"fd": control}, 5, 1.0, 0), Row("student", name, {"fd": student}, 5, 1.0, 0)]
    rows.append(Row("student", "other", {"fd": 10.0}, 5, 1.0, 0))
    gaps = Results("prune_then_steps", "fd", False, "4 pictures", rows).gaps()
    assert gaps == pytest.approx({"small": 0.5, "tiny": 0.25, "other": 1.0})


def shapes() -> Labelled:
    """Two classes that differ in colour."""
    pixels = torch.randint(0, 128, (40, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 2
    pixels[labels == 1, 0] += 100
    return Labelled(pixels, labels, ["blue", "red"], flip=True)


def test_a_run_that_was_cut_ends_with_the_same_bits(tmp_path):
    """Includes batch normalisation's running statistics, and dropout."""

    def teacher_student() -> TeacherStudent:
        student, teacher = build("resnet8", 2, 8, seed=1), build("resnet8", 2, 8, seed=2)
        student.head = nn.Sequential(nn.Dropout(0.5), student.head)
        return TeacherStudent(student, teacher)

    objective = Hinton(2.0, 1.0, 1.0, True)
    config = LoopConfig(out=tmp_path / "whole", max_train_steps=6, batch_size=4, checkpoint_every=3)
    whole = teacher_student()
    learn(objective, whole, shapes(), config)
    cut = LoopConfig(out=tmp_path / "cut", max_train_steps=6, batch_size=4, checkpoint_every=3)
    first = Learner(objective, teacher_student(), shapes(), cut)
    for _ in range(3):
        first.step()
    first._save()
    second = teacher_student()
    learn(objective, second, shapes(), cut)
    for (name, a), b in zip(whole.bare.state_dict().items(), second.bare.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    third = teacher_student()
    learn(objective, third, lambda: pytest.fail("a finished training opens no data"), cut)
    assert torch.equal(third.bare.head[1].weight, whole.bare.head[1].weight) and not third.bare.training


def test_a_finished_training_is_loaded_onto_the_runs_device(tmp_path, monkeypatch):
    config = LoopConfig(out=tmp_path, max_train_steps=1, batch_size=4)
    learn(Hinton(2.0, 1.0, 1.0, True), TeacherStudent(build("resnet8", 2, 8, seed=1), build("resnet8", 2, 8, seed=2)),
          shapes(), config)  # fmt: skip
    monkeypatch.setitem(PartialState._shared_state, "device", torch.device("meta"))
    again = TeacherStudent(build("resnet8", 2, 8, seed=1), build("resnet8", 2, 8, seed=2))
    learn(Hinton(2.0, 1.0, 1.0, True), again, shapes(), config)
    assert {p.device.type for network in (again.student, again.teacher) for p in network.parameters()} == {"meta"}


@pytest.mark.parametrize("name", ["resnet8", "timm:test_resnet"])
def test_a_student_learns_the_toy_data(name, tmp_path):
    models = TeacherStudent(build(name, 2, 8, seed=1))
    config = LoopConfig(out=tmp_path, max_train_steps=30, batch_size=8, learning_rate=3e-3)
    learn(Hinton(1.0, 0.0, 1.0, True), models, shapes(), config)
    data = shapes()
    with torch.no_grad():
        right = models.student(normalise(data.pixels)).argmax(-1) == data.labels
    assert right.float().mean() >= 0.9


QUICK = ["--limit", "64", "--teacher-steps", "2", "--max-train-steps", "2", "--batch-size", "8", "--teacher", "resnet8"]


def test_from_the_command_line_to_the_table_and_again(tmp_path, capsys):
    out = tmp_path / "run"
    argv = ["baselines", "run", "hinton", "--quick", *QUICK, "--out", str(out), "--label", "background"]
    assert main(argv) == 0
    assert "gap closed" in capsys.readouterr().out
    record = json.loads((out / "results.json").read_text())
    assert [row["role"] for row in record["rows"]] == ["teacher", "control", "student"]
    assert record["n"] == "2,500 test pictures, 6 classes" and record["commit"] and record["config"]["quick"]
    weights = (out / "student-0/weights/student.safetensors").stat().st_mtime_ns
    assert main(["baselines", "eval", str(out)]) == 0
    again = json.loads((out / "results.json").read_text())
    for one, two in zip(record["rows"], again["rows"], strict=True):
        assert one["figures"]["nll"] == two["figures"]["nll"] and one["seconds"] == two["seconds"]
    assert (out / "student-0/weights/student.safetensors").stat().st_mtime_ns == weights
    held = open_labelled("avatars", "test", label=("background",), limit=8)
    for part in ("control-0", "student-0"):
        saved = load(out / part / "model")
        trained = build("resnet8", 6, 32, seed=5)
        load_model(trained, str(out / part / "weights" / "student.safetensors"))
        assert torch.equal(saved(normalise(held.pixels)), trained.eval()(normalise(held.pixels)))
    config = json.loads((out / "student-0/model/config.json").read_text())
    assert config == {"network": "resnet8", "classes": list(held.classes), "resolution": 32}
    assert main(["baselines", "eval", str(out), "--temperature", "3"]) == 2
    assert f"got --temperature 3 for {out}; allowed: a run's folder alone" in capsys.readouterr().err
    assert main([*argv, "--temperature", "3"]) == 2
    assert "temperature = 4.0 (now 3.0)" in capsys.readouterr().err
    assert json.loads((out / "run.json").read_text())["temperature"] == 4.0  # that of the existing run, for `eval`


def test_a_run_that_goes_on_exports_what_it_has_become(tmp_path, capsys):
    argv = ["baselines", "run", "hinton", "--quick", *QUICK, "--out", str(tmp_path), "--lr-scheduler", "constant"]
    argv += ["--label", "background", "--max-train-steps"]
    for steps in ("1", "3"):
        assert main([*argv, steps]) == 0
        for part in (tmp_path / "control-0", tmp_path / "student-0"):
            saved, trained = (load_file(part / at) for at in ("model/model.safetensors", "weights/student.safetensors"))
            assert all(torch.equal(saved[name], trained[name]) for name in trained)
    record = (tmp_path / "results.json").read_text()
    assert main([*argv, "2"]) == 2
    assert "max_train_steps: got 2 for" in (error := capsys.readouterr().err) and "trained for 3; allowed" in error
    assert (tmp_path / "results.json").read_text() == record
    shutil.rmtree(tmp_path / "student-0" / "weights")
    assert main(["baselines", "eval", str(tmp_path)]) == 2
    assert "student-0, which is not trained to the end; allowed: a finished run" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], ["run", "--help"], ["sweep", "-h"], ["eval", "--help"]])
def test_help_names_every_baseline(argv, capsys):
    assert main(["baselines", *argv]) == 0
    output = capsys.readouterr().out
    assert all(name in output for name in BASELINES) and "baselines eval out/hinton" in output


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["run"], "allowed: a name"),
        (["run", "hintn"], "baseline: got 'hintn'"),
        (["go"], "allowed: list, run, sweep, eval"),
        (["eval", "nowhere"], "allowed: a finished run's folder"),
        (["run", "hinton", "--quick", "--temperature", "0"], "temperature: got 0"),
        (["run", "hinton", "--quick", "--label", "mood"], "--label: got mood; allowed: one or more of pattern"),
        (
            [
                "run",
                "hinton",
                "--quick",
                "--label",
                "left hair color",
                "right hair color",
                "left clothes",
                "right clothes",
                "background",
                "pattern",
                "left hat",
            ],
            "--label: got 7 attributes, of which the test pictures have",
        ),
        (["run", "hinton", "--quick", "--student", "resnet19x"], "network: got 'resnet19x'"),
        (["run", "hinton", "--quick", "--data", "nowhere"], "--data: got nowhere"),
        (
            ["run", "hinton", "--quick", "--test", "nowhere"],
            "--test: got nowhere with --data avatars, which has",
        ),
        (["run", "hinton", "--quick", "--batch-size", "1"], "batch_size: got 1; allowed: 2 or more"),
        (["run", "hinton", "--quick", "--seed", str(2**63)], "seed: got 9223372036854775808; allowed: -2^63 to below"),
        (["run", "hinton", "--quick", "--seeds", "0", str(2**63)], "seed: got 9223372036854775808; allowed: -2^63"),
        (
            ["run", "hinton", "--quick", "--student", "timm:vit_tiny_patch16_224"],
            "for images of 32 pixels (Input height",
        ),
        (
            ["run", "hinton", "--quick", "--student", "googlenet"],
            "got googlenet, which gives no logits (B, 36) in training",
        ),
        (["run", "hinton", "--quick", "--seeds", "0", "1", "0"], "seeds: got 0 1 0; allowed: each once"),
        (["list", "nonsense"], "baselines list: got nonsense; allowed: nothing behind it"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(argv, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["baselines", *argv]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_a_set_with_one_class_is_refused(tmp_path, capsys):
    for name in ("one/train/cat", "one/test/cat"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name / "a.png")
    words = ["run", "hinton", "--quick", "--data", str(tmp_path / "one"), "--out", str(tmp_path / "out")]
    assert main(["baselines", *words]) == 2
    error = capsys.readouterr().err
    assert "of 1 class" in error and "two classes or more" in error and error.count("\n") == 1


def test_a_folder_of_folders_is_read_in_order(tmp_path):
    for split in ("train", "test"):
        for i, name in enumerate(("dark", "light")):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8), (200 * i,) * 3).save(tmp_path / split / name / "a.png")
    found = open_labelled(str(tmp_path), "test", label=(), limit=None)
    assert found.classes == ["dark", "light"] and found.labels.tolist() == [0, 1]
    assert found.pixels[:, 0, 0, 0].tolist() == [0, 200]


def test_pictures_of_any_shape_are_cut_to_squares_if_a_side_is_given(tmp_path, capsys):
    """Bars of three colours: of a wide or a tall picture the middle one is left."""
    for split in ("train", "test"):
        for i, (name, size) in enumerate((("dark", (24, 8)), ("light", (16, 48)))):
            (tmp_path / split / name).mkdir(parents=True)
            bars = Image.new("RGB", size, (9, 9, 9))
            side = min(size)
            bars.paste((50 + 100 * i,) * 3, ((size[0] - side) // 2, (size[1] - side) // 2,
                                             (size[0] + side) // 2, (size[1] + side) // 2))  # fmt: skip
            bars.save(tmp_path / split / name / "a.png")
    found = open_labelled(str(tmp_path), "train", label=(), limit=None, resolution=8)
    assert found.pixels.shape == (2, 3, 8, 8) and found.pixels.dtype == torch.uint8
    assert found.pixels[0].unique().tolist() == [50] and (found.pixels[1, :, 1:-1].int() - 150).abs().max() <= 2
    words = ["run", "hinton", "--quick", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(["baselines", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "got pictures of 2 shapes in" in line and line.endswith("allowed: squares of one size; give --resolution")


def test_the_embedded_pictures_are_made_smaller_as_the_folders_are():
    whole, small = (open_labelled("avatars", "test", label=("background",), limit=3, resolution=r) for r in (None, 8))
    hand = [fitted(picture.permute(1, 2, 0).numpy(), (8, 8)) for picture in whole.pixels]
    assert np.array_equal(small.pixels.permute(0, 2, 3, 1).numpy(), np.stack(hand))


def test_train_and_test_pictures_of_different_sizes_are_refused(tmp_path, capsys):
    for split, side in (("train", 8), ("test", 16)):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (side, side)).save(tmp_path / split / name / "a.png")
    words = ["run", "hinton", "--quick", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(["baselines", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--test: got pictures of 16 pixels; allowed: 8, as to train; give --resolution" in line


def test_a_limit_leaves_pictures_of_every_class(tmp_path):
    for i in range(4):
        (tmp_path / "train" / str(i)).mkdir(parents=True)
        for n in range(10):
            Image.new("RGB", (8, 8), (60 * i + n,) * 3).save(tmp_path / "train" / str(i) / f"{n}.png")
    found, again, other = (open_labelled(str(tmp_path), "train", label=(), limit=20, seed=s) for s in (0, 0, 1))
    assert len(found) == 20 and set(found.labels.tolist()) == {0, 1, 2, 3}
    shades = found.pixels[:, 0, 0, 0]
    assert len(set(shades.tolist())) == 20 and torch.equal(shades // 60, found.labels)
    assert torch.equal(found.pixels, again.pixels) and not torch.equal(found.labels, other.labels)


def test_quick_numbers_are_flags_of_theirs():
    assert set(get("hinton").config.QUICK) <= set(HintonConfig.__dataclass_fields__)
