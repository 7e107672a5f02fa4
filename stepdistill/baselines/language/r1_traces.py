"""DeepSeek-AI (2025), *DeepSeek-R1*, section 2.4: a small model learns to reason from a large one's traces, of which
only those that a verifier accepts are kept.

stepdistill baselines run r1_traces --quick
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

from stepdistill.baselines.base import BaselineConfig, TeacherStudent
from stepdistill.baselines.exports import refresh
from stepdistill.baselines.language import arithmetic
from stepdistill.baselines.language.collect import Answered, as_rows, check_room, collect
from stepdistill.baselines.language.cross_entropy import CrossEntropy
from stepdistill.baselines.language.models import Decoder, open_decoder
from stepdistill.baselines.language.problems import bare_answer, open_problems
from stepdistill.baselines.language.saved import save
from stepdistill.baselines.language.students import check_rate, make_student
from stepdistill.baselines.language.traces import solved
from stepdistill.baselines.learner import learn
from stepdistill.baselines.results import Results, Role, Row, count_parameters
from stepdistill.errors import InputError


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
    """Peak learning rate. The default is for tiny models; a pretrained student is refused with it."""
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
    IRRELEVANT_FLAGS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "teacher": ("student", "samples", "temperature", "keep", "together", "max_train_steps"),
        "traces": ("student", "keep", "max_train_steps"),
        "control": ("samples", "temperature", "keep", "together"),
    }  # fmt: skip

    def check(self) -> None:
        """See LoopConfig.check."""
        super().check()
        self.require("problems", "held_out", "teacher_steps", "samples", "completion", "keep", "together",
                     least=1)  # fmt: skip
        self.require("digits", least=1, most=18, fix="try 3")  # numbers of 64 bits
        self.require("temperature", above=0, fix="try 1")
        check_rate("learning_rate", self.learning_rate, self.student, self.teacher)
        if self.teacher == "tiny" and self.task != "addition":
            raise InputError(f"teacher: got tiny for {self.task}; allowed: a model that can solve it; tiny adds only")

    def run(self) -> Results:
        """Samples the teacher's answers once; then trains, for each seed, a control on the correct answers and a
        student on the teacher's reasoning."""
        from stepdistill.training.processes import world

        self.check()
        train, held = open_problems(self.task, self.problems, self.held_out, digits=self.digits, seed=self.seed,
                                    test=self.test)  # fmt: skip
        state, spent = world(), None
        if self.teacher == "tiny":
            teacher = Decoder(*arithmetic.build(self.seed), "tiny")
        else:
            teacher = open_decoder(self.teacher, seed=self.seed)
        teacher.network.to(state.device)
        first = self._student(teacher, self.seeds[0])
        for model in (teacher, first):
            check_room(model, [*train, *held], self.completion)
        tokenizer = first.tokenizer
        del first
        if self.teacher == "tiny":
            worked: Answered = [(problem, [arithmetic.worked(problem).completion]) for problem in train]
            part = self.part("teacher", max_train_steps=self.teacher_steps)
            rows = as_rows(teacher.tokenizer, worked, self.completion)
            spent = learn(CrossEntropy(), TeacherStudent(teacher.network), rows, part)
        texts: dict[str, Answered] = {"answers": [(problem, [bare_answer(problem.answer)]) for problem in train]}
        texts["traces"], note = (texts["answers"], "") if self.dry_run else collect(teacher, train, self)

        of = f" of {self.digits} digits" if self.task == "addition" else ""
        results = Results("r1_traces", "accuracy", True, f"{len(held):,} held-out problems: {self.task}{of}", note=note)
        examples = {name: as_rows(tokenizer, answered, self.completion) for name, answered in texts.items()}
        for name, rows in examples.items():
            if lost := sum(len(answers) for _, answers in texts[name]) - len(rows):
                results.note += f"; {lost:,} {name} exceed --completion in the student's tokens and are dropped"

        def add(role: Role, name: str, model: Decoder, seconds: float | None = None, seed: int | None = None) -> None:
            if not self.dry_run:
                figures = solved(model, held, self.completion, self.together)
                results.rows.append(Row(role, name, figures, count_parameters(model.network), seconds, seed))

        add("teacher", self.teacher, teacher, spent)
        drawn = self.student.startswith("config:")  # otherwise the same for every seed
        for seed in self.seeds if drawn else self.seeds[:1]:
            add("before", self.student, self._student(teacher, seed), seed=seed if drawn else None)
        for seed in self.seeds:
            for role, name in (("control", "answers"), ("student", "traces")):
                model, part = self._student(teacher, seed), self.part(f"{role}-{seed}", seed=seed)
                add(role, name, model, learn(CrossEntropy(), TeacherStudent(model.network), examples[name], part), seed)
                if not self.dry_run and state.is_main_process:
                    refresh(part.out / "model", part.out, partial(save, model.network, model.tokenizer))
        return results

    def _student(self, teacher: Decoder, seed: int) -> Decoder:
        """The student, and the control, before training, on the teacher's device."""
        if self.student.startswith(("config:", "layers:")):
            made = Decoder(make_student(self.student, teacher, seed=seed), teacher.tokenizer, self.student)
        else:
            made = open_decoder(self.student, seed=seed)
        made.network.to(teacher.network.device)
        return made
