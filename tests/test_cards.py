"""A student's card shows measured figures in their place, and none before they were measured."""

from __future__ import annotations

from stepdistill.evaluation.cards import write_cards
from stepdistill.evaluation.records import FIELDS
from stepdistill.export.card import FIGURES_END, FIGURES_START, model_card, put_figures


def row(**values):
    return dict.fromkeys(FIELDS) | {"protocol": "tiny", "protocol_hash": "abc", "n": 5, "device": "cpu"} | values


def card(folder):
    folder.mkdir()
    text = model_card(
        method="lcm-lora", teacher="t", out=str(folder), scheduler="LCMScheduler", lora=True, prompt="a hat",
        settings={"rank": 4}, grid=None,
    )  # fmt: skip
    (folder / "README.md").write_text(text)
    return folder / "README.md"


def test_figures_stand_between_their_marks_and_are_replaced_by_later_ones(tmp_path):
    file = card(tmp_path / "student")
    before = file.read_text()
    spec = f"t,lora={tmp_path / 'student'}"
    teacher = row(model="teacher", method="teacher", spec="t", steps=50, seed=0, fd=12.5)
    for fd in (33.25, 22.0):
        student = row(model="student", method="lcm-lora", spec=spec, steps=4, seed=0, fd=fd, fd_extractor="Pools")
        assert write_cards([teacher, student]) == [tmp_path / "student"]
    after = file.read_text()
    assert "| student | 4 | – | 22.0 |" in after and "| teacher | 50 | – | 12.5 |" in after and "33.2" not in after
    inside = after.partition(FIGURES_START)[2].partition(FIGURES_END)[0]
    assert after.replace(inside, "") == before.replace(before.partition(FIGURES_START)[2].partition(FIGURES_END)[0], "")


def test_a_card_without_the_marks_is_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    assert not put_figures(tmp_path, "figures") and not put_figures(tmp_path / "none", "figures")
    assert (tmp_path / "README.md").read_text() == "mine"
