"""The table of a run with decoders: each network's figures, and its continuations of the held-out prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from torch import nn

from stepdistill.baselines.language import measure
from stepdistill.baselines.language.corpus import Corpus, CorpusConfig
from stepdistill.baselines.language.models import Decoder
from stepdistill.baselines.results import Results, Role, Row, count_parameters


@dataclass(frozen=True)
class Table:
    """Measures networks into `results`; a dry run measures none.

    Attributes:
        generations: the texts of each network, after the same prompts.
    """

    config: CorpusConfig
    teacher: Decoder
    corpus: Corpus
    results: Results
    generations: dict[str, list[str]] = field(default_factory=dict)

    def add(
        self, role: Role, name: str, network: nn.Module, seconds: float | None = None, seed: int | None = None
    ) -> None:
        """Adds a row; see Row for the arguments."""
        if self.config.dry_run:
            return
        generated = measure.continuations(
            network, self.teacher, self.corpus.test[: self.config.shown], self.config.seed
        )
        figures = self._nll(network)
        if network is not self.teacher.network:
            figures["own_kl"] = measure.own_kl(network, self.teacher.network, generated)
        self.results.rows.append(Row(role, name, figures, count_parameters(network), seconds, seed))
        texts = measure.decode(self.teacher.tokenizer, generated.ids, generated.counts)
        self.generations[role if seed is None else f"{role}, seed {seed}"] = texts

    def write(self, file: Path) -> None:
        """Writes the generated texts of all networks, on the main process."""
        if self.config.dry_run or not PartialState().is_main_process:
            return
        held = self.corpus.test[: self.config.shown]
        prompts = (x[:, : held.prompt] for x in (held.ids, held.attention))
        measure.write_generations(file, measure.decode(self.teacher.tokenizer, *prompts), self.generations)

    def _nll(self, network: nn.Module) -> dict[str, float]:
        if self.corpus.text is None:
            return measure.with_perplexity(measure.mean_nll(network, self.corpus.test))
        return measure.perplexity(network, self.corpus.text, first=self.corpus.first, **self.config.windows)
