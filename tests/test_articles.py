"""The task made from WikiText: paragraphs with their article's title, every fifth for test, none in both."""

from __future__ import annotations

import articles


def test_every_fifth_paragraph_of_an_article_is_held_out(tmp_path):
    lines = [" = One = \n"]
    for i in range(6):
        lines += [f" paragraph {i} of one \n", " \n", " = = a section = = \n"]
    lines += [" = Two = \n", " first of two \n"]
    (tmp_path / "wiki.txt").write_text("".join(lines))
    articles.main(tmp_path / "wiki.txt", tmp_path / "out")
    train, test = ((tmp_path / "out" / f"{name}.tsv").read_text().splitlines() for name in ("train", "test"))
    one = [f"One\tparagraph {i} of one" for i in range(6)]
    assert test == [one[4]] and train == [*one[:4], one[5], "Two\tfirst of two"]
