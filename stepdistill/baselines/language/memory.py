"""State of on-policy training between updates, as buffers of a module beside the student, so that checkpoints keep it.

All processes keep the same state, gathered from all of them, so that one checkpoint serves all.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from stepdistill.baselines.language.generate import TokenBatch
from stepdistill.draws import Draws

RISE = 0.1  # rise of the validation loss at which the threshold is raised, and by how much


class Replay(nn.Module):
    """The last `capacity` rows that the student generated, and the share of updates on its own text.

    Args:
        capacity: rows. length: tokens of a row. threshold: the initial share.
    """

    def __init__(self, capacity: int, length: int, threshold: float) -> None:
        super().__init__()
        self.register_buffer("ids", torch.zeros(capacity, length, dtype=torch.int64))
        self.register_buffer("attention", torch.zeros(capacity, length, dtype=torch.bool))
        self.register_buffer("counts", torch.zeros(capacity, length, dtype=torch.bool))
        self.register_buffer("rows_written", torch.tensor(0))  # overwritten ones included
        self.register_buffer("threshold", torch.tensor(threshold, dtype=torch.float64))
        self.register_buffer("lowest", torch.tensor(torch.inf, dtype=torch.float64))
        self.register_buffer("looked", torch.tensor(-1))  # the update of the last call of `look`

    @property
    def filled(self) -> int:
        """The number of rows held."""
        return min(self.rows_written.item(), len(self.ids))

    def keep(self, generated: TokenBatch) -> None:
        """Stores the rows generated on all processes, overwriting the oldest; of more than there is room for, the
        last."""
        from accelerate.utils import gather

        rows = [gather(x) for x in (generated.ids, generated.attention, generated.counts)]
        numbers = torch.arange(len(rows[0]), device=self.rows_written.device)[-len(self.ids) :]
        for buffer, new in zip((self.ids, self.attention, self.counts), rows, strict=True):
            buffer[(self.rows_written + numbers) % len(self.ids)] = new[numbers]
        self.rows_written += len(rows[0])

    def recall(self, draws: Draws) -> TokenBatch:
        """A random row for each of these samples."""
        places = draws.integers(self.filled)
        return TokenBatch(self.ids[places], self.attention[places], self.counts[places])

    def look(self, loss: float, update: int) -> None:
        """Raises the threshold if the validation loss is RISE above its lowest value since the threshold last rose.

        The authors compare with the loss before training, of students that were fine-tuned first. One that was not
        never returns to that loss, and would never train on its own text.
        """
        self.looked.fill_(update)
        if loss >= self.lowest.item() + RISE:
            self.threshold += RISE
            self.threshold.clamp_(max=1.0)
            self.lowest.fill_(loss)
        self.lowest.clamp_(max=loss)


class Rollouts(nn.Module):
    """An update's texts, sampled from the mixture, and their tokens' log-likelihoods by teacher and student.

    Args:
        rows: samples of an update, over all batches and processes. length: tokens of a row.
    """

    def __init__(self, rows: int, length: int) -> None:
        super().__init__()
        self.register_buffer("ids", torch.zeros(rows, length, dtype=torch.int64))
        self.register_buffer("attention", torch.zeros(rows, length, dtype=torch.bool))
        self.register_buffer("counts", torch.zeros(rows, length, dtype=torch.bool))
        self.register_buffer("log_p", torch.zeros(rows, length - 1))  # of the teacher
        self.register_buffer("log_q", torch.zeros(rows, length - 1))  # of the student, when they were sampled
        self.register_buffer("seen", torch.tensor(0))  # samples of the run

    @property
    def at_start(self) -> bool:
        """Whether the next batch is the first of an update."""
        return self.seen.item() % len(self.ids) == 0

    def keep(self, samples: Iterable[tuple[TokenBatch, Tensor, Tensor]]) -> None:
        """Stores the texts of an update, with log p and log q: those of this process's batches, in order, and of the
        batches of the others."""
        from accelerate.utils import gather

        start = 0
        for new, log_p, log_q in samples:
            values = {"ids": new.ids, "attention": new.attention, "counts": new.counts, "log_p": log_p, "log_q": log_q}
            gathered = {name: gather(value) for name, value in values.items()}
            end = start + len(gathered["ids"])
            for name, value in gathered.items():
                getattr(self, name)[start:end] = value
            start = end

    def next(self, count: int) -> slice:
        """The place of this process's next `count` rows of the run."""
        from accelerate import PartialState

        state = PartialState()
        start = self.seen.item() % len(self.ids) + count * state.process_index
        self.seen += count * state.num_processes
        return slice(start, start + count)
