"""DeepSeek-AI (2025), *DeepSeek-R1*, section 2.4: a small model learns to reason from a large one's traces, of which
only those that a verifier accepts are kept.

stepdistill baselines run r1_traces --quick
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from stepdistill.baselines.base import BaselineConfig, Pupils, learn
from stepdistill.baselines.language import arithmetic
from stepdistill.baselines.language.models import Decoder, check_length, open_decoder
from stepdistill.baselines.language.problems import Problem, bare_answer, open_problems
from stepdistill.baselines.language.run import CrossEntropy, save
from stepdistill.baselines.language.students import make_student
from stepdistill.baselines.language.texts import Pair
from stepdistill.baselines.language.tokens import Tokens, ask, pair_up, prompt_ids
from stepdistill.baselines.language.traces import answer, keep, sample_all, solved, unopened
from stepdistill.baselines.less_memory import halved
from stepdistill.baselines.results import Results, Role, Row, count_parameters
from stepdistill.errors import InputError
from stepdistill.training.processes import HALF, in_turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class R1TracesConfig(BaselineConfig):
    """Flags of `r1_traces`. For real models: train_scripts/configs/baselines/r1_qwen.yaml."""

    out: Path = Path("out/r1_traces")
    """Output folder. Run the same command again to resume."""
    task: str = "addition"
    """addition, a .jsonl file of prompt and answer, or a `datasets` name such as openai/gsm8k:main."""
    test: str | None = None
    """For a task file: the held-out file; by default its own last tenth."""
    digits: int = 3
    """Digits of the numbers that are added."""
    problems: int = 2000
    """Training problems at most."""
    held_out: int = 300
    """Held-out problems at most."""
    teacher: str = "tiny"
    """tiny (trained on worked sums first, but not until it makes no mistakes), or a model as for other baselines."""
    teacher_steps: int = 450
    """Updates of the tiny teacher."""
    student: str = "config:hidden_size=48,intermediate_size=96"
    """config:KEY=VALUE,... (the teacher's configuration with changes, random weights), layers:N, or any model, whose
    tokenizer may differ from the teacher's."""

    samples: int = 4
    """Answers sampled from the teacher per problem."""
    temperature: float = 1.0
    """Sampling temperature of the teacher."""
    completion: int = 64
    """Tokens of an answer with its reasoning at most; longer ones are not kept."""
    keep: int = 2
    """Answers kept per problem at most."""
    together: int = 64
    """Problems that are answered in one batch."""

    max_train_steps: int = 800
    """Updates of student and control."""
    batch_size: int = 32
    """Answers per process in one forward."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "linear"
    """Learning rate schedule after the warm-up."""
    lr_warmup: int = 20
    """Updates over which the learning rate rises."""
    weight_decay: float = 0.01
    """Decoupled weight decay, as in AdamW."""

    QUICK: ClassVar[Mapping[str, object]] = {
        "digits": 2, "problems": 600, "held_out": 100, "samples": 2, "teacher_steps": 260, "max_train_steps": 250,
    }  # fmt: skip
    SWEEP: ClassVar[tuple[str, tuple]] = ("keep", (1, 2, 4))
    UNTOLD: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "teacher": ("student", "samples", "temperature", "keep", "together", "max_train_steps"),
        "traces": ("student", "keep", "max_train_steps"),
        "control": ("samples", "temperature", "keep", "together"),
    }  # fmt: skip

    def check(self) -> None:
        """See LoopConfig.check."""
        super().check()
        self.require("digits", "problems", "held_out", "teacher_steps", "samples", "completion", "keep", "together",
                     least=1)  # fmt: skip
        self.require("temperature", above=0, fix="try 1")
        if self.teacher == "tiny" and self.task != "addition":
            raise InputError(f"teacher: got tiny for {self.task}; allowed: a model that can solve it; tiny adds only")

    def run(self) -> Results:
        """Samples the teacher's answers once; then trains, for each seed, a control on the correct answers and a
        student on the teacher's reasoning."""
        from accelerate import PartialState

        from stepdistill.training.processes import on_cpu

        self.check()
        train, held = open_problems(self.task, self.problems, self.held_out, digits=self.digits, seed=self.seed,
                                    test=self.test)  # fmt: skip
        state, spent = PartialState(cpu=on_cpu()), None
        if self.teacher == "tiny":
            teacher = Decoder(*arithmetic.build(self.seed), "tiny")
        else:
            teacher = open_decoder(self.teacher, seed=self.seed)
        tokenizer = self._fitting(teacher, [*train, *held])
        teacher.network.to(state.device)
        if self.teacher == "tiny":
            lessons = self._rows(teacher.tokenizer, [(p, [arithmetic.worked(p).completion]) for p in train])
            part = self.part("teacher", max_train_steps=self.teacher_steps)
            spent = learn(CrossEntropy(), Pupils(teacher.network), lessons, part)
        traces, note = self._traces(teacher, train)

        of = f" of {self.digits} digits" if self.task == "addition" else ""
        results = Results("r1_traces", "accuracy", True, f"{len(held):,} held-out problems: {self.task}{of}", note=note)

        def add(role: Role, name: str, one: Decoder, seconds: float | None = None, seed: int | None = None) -> None:
            if not self.dry_run:
                figures = solved(one, held, self.completion, self.together)
                results.rows.append(Row(role, name, figures, count_parameters(one.network), seconds, seed))

        add("teacher", self.teacher, teacher, spent)
        answers = [(problem, [bare_answer(problem.answer)]) for problem in train]
        rows = {"answers": self._rows(tokenizer, answers), "traces": self._rows(tokenizer, traces)}
        for name, texts in (("answers", answers), ("traces", traces)):
            if lost := sum(len(said) for _, said in texts) - len(rows[name]):
                results.note += f"; {lost:,} {name} exceed --completion in the student's tokens and are dropped"
        for seed in self.seeds:
            add("before", self.student, self._student(teacher, seed), seed=seed)
            for role, name in (("control", "answers"), ("student", "traces")):
                one, part = self._student(teacher, seed), self.part(f"{role}-{seed}", seed=seed)
                one.network.to(state.device)
                add(role, name, one, learn(CrossEntropy(), Pupils(one.network), rows[name], part), seed)
                if role == "student" and not self.dry_run and state.is_main_process:
                    save(one.network, one.tokenizer, part.out / "model")
        return results

    def _student(self, teacher: Decoder, seed: int) -> Decoder:
        """The student, and the control, before training."""
        if self.student.startswith(("config:", "layers:")):
            return Decoder(make_student(self.student, teacher, seed=seed), teacher.tokenizer, self.student)
        return open_decoder(self.student, seed=seed)

    def _fitting(self, teacher: Decoder, problems: list[Problem]) -> PreTrainedTokenizerBase:
        """The student's tokenizer.

        Raises:
            InputError: there is no such student; or teacher or student has too few positions for a problem and answer.
        """
        student = self._student(teacher, self.seeds[0])
        for one in (teacher, student):
            asked = [ask(one.tokenizer, problem.prompt) for problem in problems]
            longest = max(len(prompt_ids(one.tokenizer, text)) for text in asked)
            check_length(one.network, longest + self.completion, "the longest prompt and completion")
        return student.tokenizer

    def _rows(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[Problem, list[str]]]) -> Tokens:
        """Prompts, each with its completion and end of text; completions longer than the limit are dropped."""
        pairs, sizes = [], []
        for problem, said in texts:
            asked = ask(tokenizer, problem.prompt)
            for pair in (Pair(asked, unopened(asked, text)) for text in said):
                before = len(prompt_ids(tokenizer, asked))
                after = len(tokenizer(pair.completion, add_special_tokens=False).input_ids)
                if after < self.completion:  # and its end of text
                    pairs.append(pair)
                    sizes.append((before, after + 1))
        if not pairs:
            raise InputError(f"completion: got {self.completion} tokens, fewer than any answer has; raise it")
        prompt, completion = (max(each) for each in zip(*sizes, strict=True))
        return pair_up(pairs, tokenizer, prompt=prompt, completion=completion)

    def _traces(self, teacher: Decoder, train: list[Problem]) -> tuple[list[tuple[Problem, list[str]]], str]:
        """The problems with the teacher's answers that are kept, and what became of the others, in words.

        Raises:
            InputError: the verifier accepts none.
        """
        if self.dry_run:  # nothing is sampled
            return [(problem, [bare_answer(problem.answer)]) for problem in train], ""
        names = ("task", "digits", "problems", "teacher", "teacher_steps", "samples", "temperature", "completion",
                 "together", "seed", "mixed_precision")  # fmt: skip
        settings = {name: getattr(self, name) for name in names}
        say = partial(answer, teacher, samples=self.samples, new=self.completion, temperature=self.temperature,
                      seed=self.seed)  # fmt: skip
        fell: Counter[str] = Counter()
        kept = []
        device, half = teacher.network.device, HALF[self.mixed_precision]
        file, autocast = self.out / "traces.jsonl", torch.autocast(device.type, half, half is not None)
        with in_turn(file), halved(teacher.network, self.mixed_precision), autocast:
            answers = sample_all(file, train, say, self.together, settings)
        for problem, said in zip(train, answers, strict=True):
            texts, lost = keep(problem, said, self.keep)
            fell += lost
            kept += [(problem, texts)] if texts else []
        lost = ", ".join(f"{count:,} {why}" for why, count in fell.most_common())
        if not kept:
            raise InputError(
                f"traces: got {len(train) * self.samples:,} answers, of which the verifier accepts none ({lost}); "
                "allowed: one or more; raise --samples or --completion, or take a better --teacher"
            )
        count = sum(len(texts) for _, texts in kept)
        return kept, (
            f"{count:,} of {len(train) * self.samples:,} answers are kept, for {len(kept):,} of {len(train):,} "
            f"problems; dropped: {lost or 'none'}; the control is trained on the correct answers to all problems"
        )
