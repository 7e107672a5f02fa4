"""The verdict on two runs: better or worse if they differ, open if they do not, rejected if it would be meaningless."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
from pathlib import Path

import pytest
import test_suite
import torch
from test_suite import base, protocol, tools  # noqa: F401 (fixtures)
from torch import Tensor

from stepdistill import cli
from stepdistill.errors import InputError
from stepdistill.evaluation.cells import Cell, cells, read_folder, read_run
from stepdistill.evaluation.compare import OPEN, compare, pairs, ratio
from stepdistill.evaluation.figures import Figure, Ratio, difference, gap
from stepdistill.evaluation.frechet import Moments, frechet_figure
from stepdistill.evaluation.protocols import ExtractorSpec, Protocol
from stepdistill.evaluation.records import Book, units_file
from stepdistill.evaluation.seeds import pooled
from stepdistill.evaluation.summary import print_table

ROOT = Path(__file__).parents[1]
PROTOCOL = Protocol("tiny", 400, "set", "set", ExtractorSpec("pools", 32), guidance=2.0)
CONTENT = {"prompts": "p" * 64, "reference": "r" * 64}


def draws(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def row(model: str, steps: int, seed: int | None, found: dict[str, Figure], by: Protocol = PROTOCOL):
    metrics = {
        name: dict(zip(("low", "high"), f.interval(), strict=True))
        | {"value": f.value, "n": len(f.influence), "of": f.unit, "trials": f.trials}
        for name, f in found.items()
    }
    return {
        "protocol": by.name, "protocol_hash": by.hash(CONTENT), "n": by.n, "model": model,
        "settings": by.settings() | {"content": CONTENT}, "weights": model, "steps": steps, "seed": seed,
        "guidance": 1.0, "fd_extractor": "Pools", "metrics": metrics,
    }  # fmt: skip


def run(folder, *measured: tuple[str, int, int | None, dict[str, Figure]]):
    """A folder of these cells, with their influences."""
    book = Book(folder, {"protocol_hash": PROTOCOL.hash(CONTENT), "protocol": PROTOCOL.name})
    for model, steps, seed, found in measured:
        each = row(model, steps, seed, found)
        book.units(each, found)
        book.add(each)
    return folder


def loose(found: dict[str, Figure], seed: int = 0) -> Cell:
    """A cell whose influences were not stored."""
    return cells([row("m", 4, seed, found)])[0]


def test_between_two_runs_of_one_model_with_different_seeds_no_difference_is_found():
    """Of 300 pairs at 95 %, fewer than 4 or more than 27 are judged different once in 500 trials."""
    reference = Moments.of(draws(10_000, 20_000, 4))
    runs = [
        loose({"fd": frechet_figure(0.5 + 1.2 * draws(seed, 400, 4), reference),
               "clip_score": Figure.mean(30 + draws(seed + 5_000, 400))}, seed)
        for seed in range(600)
    ]  # fmt: skip
    for name in ("fd", "clip_score"):
        words = [compare(a, b, [name])[0].word for a, b in zip(runs[::2], runs[1::2], strict=True)]
        assert 273 <= words.count(OPEN) <= 296, (name, words)


def test_a_known_shift_is_called_better_or_worse_by_what_the_figure_means():
    reference = Moments.of(draws(10_000, 20_000, 4))

    def at(shift: float, seed: int) -> Cell:
        features = shift + draws(seed, 400, 4)
        score, other = Figure.mean(30 - shift + draws(seed + 1, 400)), Figure.mean(shift + draws(seed + 2, 400))
        return loose({"fd": frechet_figure(features, reference), "clip_score": score, "unheard of": other}, seed)

    near, far = at(0.2, 100), at(0.6, 200)
    assert {c.name: c.word for c in compare(near, far)} == {
        "fd": "better",
        "clip_score": "better",
        "unheard of": "lower",
    }
    assert {c.name: c.word for c in compare(far, near)} == {
        "fd": "worse",
        "clip_score": "worse",
        "unheard of": "higher",
    }
    (gap,) = compare(near, far, ["clip_score"])
    assert gap.gap.low < 0.4 < gap.gap.high and not gap.gap.paired


def test_pictures_of_the_same_noise_are_compared_one_by_one_and_the_interval_is_narrower(tmp_path):
    hard = 3 * draws(0, 400)
    ours, theirs = Figure.mean(30 + hard + 0.3 * draws(1, 400)), Figure.mean(29.8 + hard + 0.3 * draws(2, 400))
    a = run(tmp_path / "a", ("m", 4, 0, {"clip_score": ours}))
    b = run(tmp_path / "b", ("m", 4, 0, {"clip_score": theirs}))
    (paired,) = compare(*pairs(read_run(a), read_run(b))[0])
    exact = difference(ours, theirs, paired=True)
    assert paired.gap.paired and paired.word == "better"
    # influences are stored in single precision
    assert (paired.gap.value, paired.gap.low, paired.gap.high) == pytest.approx(
        (exact.value, exact.low, exact.high), abs=1e-6
    )
    for file in (tmp_path / "b" / "units").iterdir():
        file.unlink()
    (apart,) = compare(*pairs(read_run(a), read_run(b))[0])
    exact = difference(ours, theirs, paired=False)
    assert not apart.gap.paired and apart.word == "no difference found"
    assert (apart.gap.low, apart.gap.high) == pytest.approx((exact.low, exact.high), abs=1e-6)
    assert paired.gap.high - paired.gap.low < 0.2 * (apart.gap.high - apart.gap.low)


def test_other_noise_is_paired_by_prompts_alone_and_other_units_not_at_all(tmp_path):
    hard = 3 * draws(0, 400)
    ours, theirs = Figure.mean(hard + draws(1, 400)), Figure.mean(hard + draws(2, 400))
    groups = Figure(ours.value, ours.influence, "prompts")
    first = read_run(run(tmp_path / "a", ("m", 4, 0, {"clip_score": ours, "diversity": ours})))
    other = read_run(run(tmp_path / "seed", ("m", 4, 1, {"clip_score": theirs})))
    (paired,) = compare(first[0], other[0])
    exact = difference(ours, theirs, paired=True)
    assert paired.gap.paired and (paired.gap.low, paired.gap.high) == pytest.approx((exact.low, exact.high), abs=1e-6)
    unit = read_run(run(tmp_path / "unit", ("m", 4, 0, {"diversity": groups})))
    assert [c.gap.paired for c in compare(first[0], unit[0])] == [False]


def of_seeds(figures: dict[int, Figure]) -> Cell:
    """A cell of these seeds, as if its influences had been stored."""
    (cell,) = cells([row("m", 4, seed, {"clip_score": figure}) for seed, figure in figures.items()])
    cell.__dict__["by_seed"] = {"clip_score": figures}
    return cell


def test_every_seed_of_either_model_is_in_the_comparison_and_prompts_are_paired(tmp_path):
    """The closed form: the textbook's interval of the prompts' differences between the models' means over seeds."""
    hard = 3 * draws(0, 400)
    a, b = (hard + draws(seed, 3, 400) for seed in (1, 2))
    a, b = a - a.mean(1, keepdim=True) + 30.1, (b - b.mean(1, keepdim=True) + 30)[:2]  # seeds differ by nothing else
    ours, theirs = ([Figure.mean(values) for values in side] for side in (a, b))
    ours[2] = Figure(ours[2].value + 0.03, ours[2].influence)  # less than noise explains
    a[2] += 0.03
    found_a = read_run(run(tmp_path / "a", *(("m", 4, i, {"clip_score": f}) for i, f in enumerate(ours))))
    found_b = read_run(run(tmp_path / "b", *(("m", 4, i, {"clip_score": f}) for i, f in enumerate(theirs))))
    ((found,), (back,)) = compare(found_a[0], found_b[0]), compare(found_b[0], found_a[0])
    between = a.mean(0) - b.mean(0)
    half = 1.959964 * between.std().item() / 20
    assert (found.gap.value, found.gap.low, found.gap.high) == pytest.approx(
        (0.11, between.mean().item() - half, between.mean().item() + half), abs=1e-6
    )
    assert (found.a.value, found.b.value) == pytest.approx((30.11, 30.0), abs=1e-9)
    assert found.gap.value == found_a[0].figures["clip_score"].value - found_b[0].figures["clip_score"].value
    assert (found.row()["seeds_a"], found.row()["seeds_b"]) == (3, 2) and found.gap.paired
    assert (back.gap.low, back.gap.high) == pytest.approx((-found.gap.high, -found.gap.low), abs=1e-12)
    times = ratio(found_a[0], found_b[0], "clip_score")
    relative = a.mean(0) / 30.11 - b.mean(0) / 30
    assert times.value == found.a.value / found.b.value
    assert math.log(times.high / times.value) == pytest.approx(1.959964 * relative.std().item() / 20, rel=1e-5)


@pytest.mark.parametrize(("seeds", "effect"), [((0,), 0.0), ((0, 1), 0.0), ((0, 1), 0.3), ((3, 4), 0.3)])
def test_intervals_between_models_of_any_seeds_cover_the_truth(seeds, effect):
    """Model a is of seeds 0 to 2. Prompts are hard for both, a seed's noise moves both, and seeds may differ by more
    than noise, in each model for itself."""
    covered = 0
    for trial in range(300):
        hard, noise, own = draws(trial, 80), draws(trial + 1000, 5, 80), 0.5 * draws(trial + 2000, 2, 5, 80)
        more = draws(trial + 3000, 2, 5)
        a, b = (
            {seed: Figure.mean(hard + noise[seed] + own[side, seed] + effect * more[side, seed]) for seed in of}
            for side, of in ((1, (0, 1, 2)), (0, seeds))
        )
        (found,) = compare(of_seeds(a), of_seeds(b))
        covered += found.gap.low <= 0 <= found.gap.high
    assert covered >= 270, covered


@pytest.mark.parametrize("stored", [True, False])
def test_two_runs_of_a_model_that_gets_everything_right_may_differ_by_what_their_intervals_leave_open(stored, tmp_path):
    """Not by nothing: the interval is Newcombe's, of Wilson's intervals, with influences stored and without."""
    for name in ("a", "b"):
        run(tmp_path / name, ("m", 4, 0, {"precision": Figure.share(torch.ones(400))}))
        if not stored:
            shutil.rmtree(tmp_path / name / "units")
    (found,) = compare(*pairs(read_run(tmp_path / "a"), read_run(tmp_path / "b"))[0])
    left = 1 - Figure.share(torch.ones(400)).interval()[0]
    assert left > 0.009 and found.word == OPEN and found.gap.paired == stored
    assert (found.gap.low, found.gap.high) == pytest.approx((-left, left), abs=1e-6)


def test_what_seeds_differ_by_widens_the_interval_of_a_difference_of_shares_as_it_does_a_means():
    """In each model 95, 80 and 65 % of images are right, as the seed has it: in the difference this cancels if the
    seeds are the same, and else adds in quadrature."""
    ours, theirs = (
        {seed: Figure.share(torch.arange(400) < 380 - 60 * i) for i, seed in enumerate(seeds)}
        for seeds in ((0, 1, 2), (3, 4, 5))
    )
    same, other = compare(of_seeds(ours), of_seeds(ours))[0].gap, compare(of_seeds(ours), of_seeds(theirs))[0].gap
    more = math.hypot(*[pooled(list(ours.values())).apart] * 2)
    assert same.high < 0.01 and more > 0.4
    assert other.high == pytest.approx(math.hypot(same.high, more)) == -other.low


def test_of_the_same_seeds_what_a_seed_does_to_both_cancels():
    hard, seeds = 50 + draws(0, 400), (0.0, 1.0, -1.5)
    ours = {i: Figure.mean(hard + effect + 0.1 * draws(i + 1, 400)) for i, effect in enumerate(seeds)}
    theirs = {i: Figure.mean(hard + effect + 0.1 * draws(i + 11, 400)) for i, effect in enumerate(seeds)}
    (found,) = compare(of_seeds(ours), of_seeds(theirs))
    exact = pooled([gap(ours[i], theirs[i]) for i in ours])
    assert (found.gap.low, found.gap.high) == pytest.approx(exact.interval(), abs=1e-9)
    two = of_seeds({i: theirs[i] for i in (0, 1)})
    (fewer,), times = compare(of_seeds(ours), two), ratio(of_seeds(ours), two, "clip_score")
    apart = math.hypot(pooled(list(ours.values())).apart, pooled([theirs[0], theirs[1]]).apart)
    assert fewer.gap.high - fewer.gap.value == pytest.approx(apart, rel=0.01) and found.gap.high < 0.05 < apart
    assert math.log(times.high / times.value) == pytest.approx(apart / 50, rel=0.02)


def test_the_interval_of_a_cell_of_several_seeds_is_pooled_from_influences_and_wide_without_them(tmp_path):
    own = [Figure.mean(draws(100 + seed, 400)) for seed in range(3)]
    folder = run(tmp_path / "a", *(("m", 4, i, {"clip_score": f}) for i, f in enumerate(own)))
    (cell,) = read_run(folder)
    found, exact = cell.figures["clip_score"], pooled(own)
    assert (found.low, found.high) == pytest.approx(exact.interval(), abs=1e-6) and (found.n, found.seeds) == (400, 3)
    for file in (folder / "units").iterdir():
        file.unlink()
    loose = read_run(folder)[0].figures["clip_score"]
    assert loose.value == found.value and loose.seeds == 3
    widest = max(own, key=lambda figure: figure.error).half
    assert found.half < 0.65 * widest and 0.9 * widest < loose.half <= 1.01 * widest


def test_a_ratio_of_the_same_noise_is_known_better_than_its_figures(tmp_path):
    hard = draws(0, 400)
    ours, theirs = Figure(30.0, 100 * hard + draws(1, 400)), Figure(20.0, 66 * hard + draws(2, 400))
    (a,) = read_run(run(tmp_path / "a", ("m", 4, 0, {"fd": ours})))
    (b,) = read_run(run(tmp_path / "b", ("m", 4, 0, {"fd": theirs})))
    found = ratio(a, b, "fd")
    influence = ours.influence / 30 - theirs.influence / 20
    half = 1.959964 * (influence.square().sum() / 399 / 400).sqrt().item()
    assert (found.value, found.low, found.high) == pytest.approx(
        (1.5, 1.5 * math.exp(-half), 1.5 * math.exp(half)), rel=1e-6
    )
    alone = ratio(*(cells([row("m", 4, 0, {"fd": f})])[0] for f in (ours, theirs)), "fd")
    half = math.hypot(ours.half / 30, theirs.half / 20)
    assert (alone.low, alone.high) == pytest.approx((1.5 * math.exp(-half), 1.5 * math.exp(half)), rel=1e-9)
    assert found.high - found.low < 0.1 * (alone.high - alone.low)
    old = cells([row("m", 4, 0, {}) | {"metrics": None, "fd": 30.0}])[0]
    assert (
        ratio(old, b, "fd") == Ratio(1.5)
        and ratio(a, cells([row("m", 4, 0, {"fd": Figure(0.0, hard)})])[0], "fd") is None
    )


def test_single_attributes_are_compared_by_name_alone():
    found = {"clip_score": Figure.mean(draws(0, 400)), "attribute:hat": Figure.share(draws(1, 400) > 0)}
    one, other = loose(found), loose(found, 1)
    assert [c.name for c in compare(one, other)] == ["clip_score"]
    assert [c.name for c in compare(one, other, ["attribute:hat"])] == ["attribute:hat"]


def test_rows_of_two_protocols_are_refused_and_what_differs_is_named():
    found = {"clip_score": Figure.mean(draws(0, 400))}
    other = Protocol("tiny", 300, "set", "set", ExtractorSpec("pools", 64), version=2, guidance=2.0)
    one, two = (cells([row("m", 4, 0, found, by)])[0] for by in (PROTOCOL, other))
    with pytest.raises(InputError, match=r"differ in n 400 and 300, extractor.size 32 and 64, version 1 and 2;"):
        compare(one, two)
    same = cells([row("m", 4, 0, found) | {"protocol_hash": "x", "settings": PROTOCOL.settings() | {"content": {
        "prompts": "q" * 64, "reference": "r" * 64}}}])[0]  # fmt: skip
    with pytest.raises(InputError, match=r"differ in content.prompts p{16}… and q{16}…;"):
        compare(one, same)
    old = [cells([row("m", 4, 0, found, p) | {"settings": None}])[0] for p in (PROTOCOL, other)]
    with pytest.raises(InputError, match="differ in n 400 and 300;"):
        compare(*old)
    dated = cells([row("m", 4, 0, found) | {"clip_model": "towers"}])[0]
    with pytest.raises(InputError, match="differ in n 400 and 300, clip_model towers and none;"):
        compare(dated, old[1])
    blind = cells([row("m", 4, 0, found) | {"protocol_hash": "x", "settings": None}])[0]
    with pytest.raises(InputError, match="what these rows do not record"):
        compare(old[0], blind)


@pytest.fixture
def folder(tmp_path):
    """A teacher and a student at two step counts, and a second student alone in another folder."""
    hard = draws(0, 400)

    def figures(seed: int, fd: float) -> dict[str, Figure]:
        return {"fd": Figure(fd, 20 * hard + draws(seed, 400)), "kid": Figure(fd / 1e4, 0.001 * draws(seed + 1, 400))}

    run(tmp_path / "b", ("again", 4, 0, figures(40, 25.0)))
    return run(
        tmp_path / "a", ("teacher", 4, 0, figures(10, 50.0)), ("teacher", 50, 0, figures(20, 25.0)),
        ("student", 4, 0, figures(30, 25.05)), ("student", 8, 0, figures(50, 24.0)),
    )  # fmt: skip


def said(capsys, *argv: object) -> tuple[int, str, str]:
    code = cli.main(["bench", "compare", *map(str, argv)])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_the_command_compares_two_models_of_one_run_at_the_steps_of_both(folder, capsys):
    code, out, _ = said(capsys, folder, "--model-a", "student", "--model-b", "teacher")
    value = r"{}\.\d+ ± \d\.\d+ +"
    line = f"4 +FD +{value.format(25)}{value.format(50)}" + r"−2[45]\.\d+ .* 400 +better"
    assert code == 0 and re.search(line, out) and " 50 " not in out
    code, out, _ = said(
        capsys, folder, "--model-a", "student", "--steps-a", 4, "--model-b", "teacher", "--steps-b", 50, "--json"
    )
    told = json.loads(out)
    assert code == 0 and (told["a"]["model"], told["b"]["model"], told["n"]) == ("student", "teacher", 400)
    fd = told["comparisons"][0]
    assert fd["metric"] == "fd" and fd["verdict"] == OPEN and fd["paired"] and (fd["steps_a"], fd["steps_b"]) == (4, 50)
    assert fd["low"] < fd["difference"] < fd["high"] and fd["difference"] == pytest.approx(0.05)
    own = {
        c.steps: c.figures["fd"] for c in read_run(folder) if (c.model, c.steps) in (("student", 4), ("teacher", 50))
    }
    assert [fd[f"{side}_{end}"] for side in "ab" for end in ("low", "high")] == [
        getattr(own[steps], end) for steps in (4, 50) for end in ("low", "high")
    ]


def test_the_command_says_where_images_are_too_few_for_the_distances_order(folder, capsys):
    file = folder / "results.jsonl"
    file.write_text(file.read_text().replace('"Pools"', '"EfficientNet-Lite2"').replace('"fd": null', '"fd": 50.0'))
    argv = folder, "--model-a", "student", "--model-b", "teacher"
    assert "n = 400 is below the 1,280 features of EfficientNet-Lite2" in said(capsys, *argv)[1]
    assert "is below" not in said(capsys, *argv, "--metric", "kid")[1]


def test_the_documentations_example_is_what_the_commands_print(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)  # which xdist sets
    text = (ROOT / "docs/benchmark.md").read_text()
    example = text[text.index("What comes out, from the run") : text.index("Read aloud")]
    (command,) = re.findall(r"^    stepdistill bench compare ((?:.*\\\n)?.*)$", example, re.MULTILINE)
    argv = [str(ROOT / word) if "/" in word else word for word in shlex.split(command.replace("\\\n", " "))]
    print_table(read_folder(ROOT / "benchmarks/results/steps"), ROOT / "benchmarks/results/steps")
    assert cli.main(["bench", "compare", *argv]) == 0
    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    lines = [" ".join(line.split()) for line in re.findall(r"^     (.+)$", example, re.MULTILINE) if "--" not in line]
    found = [line for line in lines if line in printed]
    assert len(lines) == 15 and found == lines, set(lines) - set(found)


def test_the_command_finds_the_only_model_of_a_run(folder, capsys):
    code, out, _ = said(capsys, folder, folder.parent / "b", "--model-a", "student", "--metric", "kid")
    assert code == 0 and "again" in out and "KID" in out and "FD " not in out.split("\n\n")[-1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--model-a: got none; allowed: teacher, student"),
        (["--model-a", "nobody"], "got nobody"),
        (["--model-a", "student"], "--model-b: got none"),
        (["--model-a", "student", "--model-b", "teacher", "--steps-a", "3"], "--steps-a: got 3; allowed: 4, 8"),
        (["--model-a", "student", "--model-b", "teacher", "--metric", "cmmd"], "--metric: got cmmd"),
        (["nowhere"], "holds no results.jsonl"),
    ],
)
def test_bad_input_gets_one_line(folder, capsys, flags, words):
    code, _, err = said(capsys, folder, *flags)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_what_a_benchmark_keeps_is_what_is_compared(base, protocol, tools, tmp_path):  # noqa: F811
    models = {"ddim": f"{base},scheduler=ddim", "euler": f"{base},scheduler=euler"}
    test_suite.run(models, protocol, tools, tmp_path, (2,))
    found = read_run(tmp_path)
    told = compare(*pairs(found, found, "ddim", "euler")[0])
    assert {c.name for c in told} >= {"fd", "clip_score", "attribute_accuracy"} and all(c.gap.paired for c in told)
    assert all(c.word == OPEN for c in compare(*pairs(found, read_run(tmp_path), "ddim", "ddim")[0]))
    for same in ({}, {"steps_a": 2}, {"steps_a": 2, "steps_b": 2}):
        with pytest.raises(InputError, match="compare: got ddim twice; allowed: two models"):
            pairs(found, found, "ddim", "ddim", **same)
    assert found[0].row["settings"]["extractor"]["name"] == "pools" and found[0].row["settings"]["content"] == {
        "prompts": "k"
    }


def test_a_damaged_influence_file_is_named(folder, capsys):
    (cell,) = (c for c in read_run(folder) if (c.model, c.steps) == ("student", 4))
    units_file(folder, cell.row).write_bytes(b"nothing")
    code, _, err = said(capsys, folder, "--model-a", "student", "--model-b", "teacher")
    assert code == 2 and "which is damaged" in err and "student_4" in err


def test_help_lists_the_words_of_bench_and_bench_itself_still_takes_flags(capsys):
    assert cli.main([]) == 0
    told = capsys.readouterr().out
    assert "bench compare" in told and "bench gate" in told
    assert cli.main(["bench", "--help"]) == 0 and "bench compare" in capsys.readouterr().out
    assert cli.main(["bench", "compare", "--help"]) == 0 and "--model-a" in capsys.readouterr().out
    assert cli.main(["compare"]) == 2 and "did you mean bench compare?" in capsys.readouterr().err


def test_of_a_model_measured_again_under_its_name_the_newest_row_counts():
    old, new = (row("student", 4, 0, {"fd": Figure.mean(torch.full((5,), value))}) for value in (50.0, 40.0))
    other = row("student", 4, 1, {"fd": Figure.mean(torch.full((5,), 44.0))})
    (cell,) = cells([old | {"guidance": 1.0}, other | {"guidance": 3.0}, new | {"guidance": 3.0}])
    assert (
        cell.seeds == 2
        and cell.row["metrics"]["fd"]["value"] == 42.0
        and {r["guidance"] for r in cell.rows if r["seed"] == 0} == {3.0}
    )
