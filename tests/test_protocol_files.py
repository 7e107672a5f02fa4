"""Any invalid value in any field of a protocol file, and any invalid file, is rejected in one line."""

from __future__ import annotations

import copy
import datetime
import itertools
import math
from pathlib import Path

import pytest
import yaml

from stepdistill import cli
from stepdistill.errors import InputError
from stepdistill.evaluation.protocols import load_protocol

FOLDER = Path(__file__).parents[1] / "benchmarks" / "protocols"
SHIPPED = {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in sorted(FOLDER.glob("*.yaml"))}
DAY = datetime.date(2024, 1, 1)
WHOLE = ["5", "", 2.5, 5.0, True, [5], {"a": 5}, math.nan, DAY, b"5"]
FEW = [0, -1, -(10**30)]
TEXT = [5, 2.5, True, ["a"], {"a": "b"}, [], {}, DAY, b"a", math.inf]
LIST = ["fd", 5, True, {"fd": 1}, {}, [["fd"]], [None], [2.5], [True], [{}], DAY]
PART = ["x", 5, 2.5, True, ["x"], [], {"other": 1}, {5: 1}, {"size": "5"}, {"size": [5]}, {}, DAY]
WRONG = {
    "n": [*WHOLE, *FEW, 1, None], "version": [*WHOLE, *FEW, None], "reference_n": [*WHOLE, *FEW, 1],
    "size": [*WHOLE, *FEW], "seed": [*WHOLE, None],
    "guidance": ["3", "", True, [3.0], {}, math.nan, math.inf, 0.5, -3],
    "name": [*TEXT, None, ""], "prompts": [*TEXT, None, ""], "reference": [*TEXT, None, ""],
    "description": [*TEXT, None], "where": [*TEXT, None], "negative_prompt": TEXT,
    "metrics": [*LIST, None, [], ["fd", "fd"], ["other"]],
    "steps": [*LIST, None, [0], [4, -1], [4, 4], ["4"]], "extractor": [*PART, None], "scorer": PART, "sampler": PART,
    "frame": PART,
    "extractor.name": [*TEXT, None, "other"], "extractor.size": [*WHOLE, *FEW], "extractor.resize": [*TEXT, "other"],
    "scorer.model": [*TEXT, None], "scorer.pretrained": TEXT, "scorer.prefix": [*TEXT, None], "scorer.frame": PART,
    "scorer.scale": ["1", True, [1], {}, math.nan, math.inf, 0, -1, None],
    "sampler.scheduler": [*TEXT, None, "other"], "sampler.spacing": [*TEXT, "other"],
    "frame.size": [*WHOLE, *FEW, None], "frame.fit": [*TEXT, None, "other"], "frame.filter": [*TEXT, None, "other"],
}  # fmt: skip
WHOLE_PARTS = {"scorer": {"model": "m"}, "sampler": {"scheduler": "euler"}, "frame": {"size": 8}}


def refused(file: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_protocol(file)
    said = str(caught.value)
    assert "\n" not in said and str(file) in said and "got " in said and "allowed: " in said
    return said


@pytest.mark.parametrize("name", SHIPPED)
def test_every_field_of_every_wrong_kind_is_refused_in_one_line(name, tmp_path):
    file = tmp_path / "p.yaml"
    for place, values in WRONG.items():
        for value in values:
            told = copy.deepcopy(SHIPPED[name])
            part, _, field = place.rpartition(".")
            (told.setdefault(part, dict(WHOLE_PARTS.get(part, {}))) if part else told)[field] = value
            file.write_text(yaml.safe_dump(told))
            assert field in refused(file) or part in refused(file), (place, value)


@pytest.mark.parametrize("name", SHIPPED)
def test_what_is_shipped_is_read_as_it_stands_there(name):
    protocol, told = load_protocol(name), SHIPPED[name]
    for field, value in told.items():
        found = getattr(protocol, field)
        if isinstance(value, dict):
            assert {k: getattr(found, k) for k in value if k != "frame"} == {
                k: v for k, v in value.items() if k != "frame"
            }
        else:
            assert (list(found) if isinstance(found, tuple) else found) == value
    assert load_protocol(FOLDER / f"{name}.yaml").hash({}) == protocol.hash({})


def test_a_number_has_one_hash_however_it_is_written(tmp_path):
    found = set()
    for guidance in (3, 3.0):
        (tmp_path / "p.yaml").write_text(yaml.safe_dump(SHIPPED["avatars-2k"] | {"guidance": guidance}))
        found.add(load_protocol(tmp_path / "p.yaml").hash({}))
    assert len(found) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "got None; allowed: fields"),
        (b"- a\n- b\n", "got ['a', 'b']; allowed: fields"),
        (b"just words", "got 'just words'"),
        (b"name: \xff\xfe", "no YAML ('utf-8' codec"),
        ("name: é".encode("latin-1"), "no YAML ('utf-8' codec"),
        (b"name: a\nn: 5\nname: b\n", "name stands there twice"),
        (b"name: a\nextractor: {name: x, name: y}\n", "name stands there twice"),
        (b"name: [a\nn: 5\n", "no YAML (expected ',' or ']'"),
        (b"name: a\n\tn: 5\n", "no YAML (found character '\\t'"),
        (b"name: 2024-99-99\n", "no YAML (month must be in 1..12)"),
        (b"name: !!python/object:os.system {}\n", "no YAML (could not determine a constructor"),
        (b"? [a, b]\n: 5\n", "no YAML (found unhashable key"),
        (b"name: \x00", "no YAML (unacceptable character"),
        (b"name: " + b"[" * 4000, "no YAML ("),
        (b"name: &a [*a]\n", "got no 'n'; allowed:"),
        (b"nme: a\n", "got the field 'nme'; allowed: name, n, "),
        (b"nme: a\n", "did you mean name?"),
        (b"5: a\n", "got the field 5"),
    ],
)
def test_a_file_that_is_no_protocol_is_refused_in_one_line(content, words, tmp_path):
    (tmp_path / "p.yaml").write_bytes(content)
    assert words in refused(tmp_path / "p.yaml")


def test_every_field_that_is_needed_is_asked_for_by_name(tmp_path):
    for left in itertools.chain(("name", "n", "prompts", "reference", "extractor"), ("name",)):
        told = {k: v for k, v in SHIPPED["avatars-2k"].items() if k != left}
        (tmp_path / "p.yaml").write_text(yaml.safe_dump(told))
        assert f"got no {left!r}; allowed: " in refused(tmp_path / "p.yaml")


def test_a_bad_protocol_ends_the_command_with_one_line_and_code_2(tmp_path, capsys):
    model = ["--model", "avatars,scheduler=ddim", "--dry-run", "--out", str(tmp_path / "out")]
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(SHIPPED["avatars-2k"] | {"n": "many"}))
    for asked, words in (
        (["--protocol", str(tmp_path / "p.yaml")], "got n: 'many'; allowed: a whole number; fix it"),
        (["--protocol", str(tmp_path / "gone.yaml")], "allowed: avatars-2k, "),
        (["--protocol", str(tmp_path)], "allowed: avatars-2k, "),
        (["--n", "-3"], "got n=-3; allowed: 2 or more"),
    ):
        assert cli.main(["bench", *model, *asked]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and words in error
    assert not (tmp_path / "out").exists()
