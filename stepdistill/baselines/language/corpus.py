"""What a decoder is trained on and measured with: texts from any source, as tokens of its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from stepdistill.baselines.base import BaselineConfig
from stepdistill.baselines.language.answers import answered
from stepdistill.baselines.language.models import Decoder
from stepdistill.baselines.language.prompts import begin, chat_prompt
from stepdistill.baselines.language.texts import Pair, check_kinds
from stepdistill.baselines.language.tokens import Tokens, pack, pair_up, stream
from stepdistill.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Corpus:
    """The tokens that a run is trained on and measured with.

    Attributes:
        train, validation: the latter is evaluated during training. test: its prompts are continued.
        text: the held-out text; None for prompts with completions, in which case those of `test` are measured.
        first: tokens that the teacher's tokenizer puts before each text.
    """

    train: Tokens
    validation: Tokens
    test: Tokens
    text: Tensor | None
    first: tuple[int, ...] = ()


@dataclass(frozen=True)
class CorpusConfig(BaselineConfig):
    """Flags of the corpus."""

    data: str = "avatars"
    """avatars (captions), a .txt, a .jsonl (text; prompt and completion; or prompt alone, which the teacher completes),
    wikitext, or a `datasets` name:config."""
    test: str | None = None
    """For a data file: the file of its held-out text; by default its own last tenth."""
    block: int = 64
    """Tokens of a training sample."""
    prompt: int = 16
    """Of these, tokens that generation starts from."""
    limit: int | None = None
    """Training samples at most; None for all."""
    validation: int = 32
    """Training samples at the end that are held out for validation."""
    window: int | None = None
    """Tokens of the held-out text that are seen at once; by default a block, as training sees no more."""
    stride: int | None = None
    """Tokens by which that window moves; by default half of it."""
    test_tokens: int | None = 20_000
    """Tokens of the held-out text, or a hundredth as many held-out prompts, at most; None for all."""
    shown: int = 16
    """Held-out prompts that all networks continue: for generations.md, and for the divergence on their own text."""

    def check(self) -> None:
        """See LoopConfig.check."""
        super().check()
        self.require("block", "prompt", "validation", "stride", "shown", least=1)
        self.require("window", least=2)
        sizes = {"block": self.block, "prompt": self.prompt} | self.windows
        for name, most in (("prompt", "block"), ("stride", "window")):
            if not sizes[name] < sizes[most]:
                got, top = sizes[name], sizes[most]
                raise InputError(f"{name}: got {got}; allowed: below {top}, the {most}; lower it, or raise --{most}")
        self.require("limit", "test_tokens", least=2, fix="leave it out for all")

    @property
    def windows(self) -> dict[str, int]:
        """`window` and `stride`, with defaults filled in."""
        window = self.block if self.window is None else self.window
        return {"window": window, "stride": window // 2 if self.stride is None else self.stride}

    def open_corpus(self, train: list[str] | list[Pair], test: list[str] | list[Pair], teacher: Decoder) -> Corpus:
        """Returns texts as packed tokens, or prompts with their completions.

        Raises:
            InputError: there is less than one block, nothing is left to train on, or the texts are of two kinds.
        """
        check_kinds(train, test)
        tokenizer = teacher.tokenizer
        if isinstance(train[0], Pair):
            sizes = {"prompt": self.prompt, "completion": self.block - self.prompt}
            rows, held = (
                pair_up([_asked(pair, tokenizer) for pair in pairs], tokenizer, **sizes)
                for pairs in (train[: self.limit], test[: self._most])
            )
            text = None
        else:
            rows = pack(train, tokenizer, self.block, prompt=self.prompt, limit=self.limit)
            text = stream(test, tokenizer, self.test_tokens)
            held = pack(test, tokenizer, self.block, prompt=self.prompt, limit=self.shown)
        if len(rows) <= self.validation:
            raise InputError(
                f"corpus: got {len(rows)} training samples of {self.block} tokens in {self.data}; allowed: more than "
                f"{self.validation}, the held-out ones; give more text, or lower --block or --validation"
            )
        first = tuple(begin(tokenizer))
        return Corpus(rows[: -self.validation], rows[-self.validation :], held, text, first)

    @property
    def _most(self) -> int | None:
        """Held-out prompts at most; None for all."""
        return None if self.test_tokens is None else max(self.test_tokens // 100, 1)

    def answered(self, texts: list[list[Pair]], teacher: Decoder, folder: Path) -> list[list[Pair]]:
        """Both splits; the teacher completes prompts without completions, once: `folder` keeps its answers."""
        given = zip(("train", "test"), texts, (self.limit, self._most), strict=True)
        return [
            answered(pairs[:most], teacher, folder / f"answers-{name}.jsonl", new=self.block - self.prompt,
                     seed=self.seed, precision=self.mixed_precision)
            for name, pairs, most in given
        ]  # fmt: skip

    def held_out(self, corpus: Corpus) -> str:
        """What is measured, in words."""
        if corpus.text is None:
            return f"{len(corpus.test):,} held-out completions of {self.test or self.data}"
        over = "windows of {window} at stride {stride}".format(**self.windows)
        return f"{len(corpus.text):,} held-out tokens of {self.test or self.data}, {over}"


def _asked(pair: Pair, tokenizer: PreTrainedTokenizerBase) -> Pair:
    return replace(pair, prompt=chat_prompt(tokenizer, pair.prompt), completion=pair.completion or "")
