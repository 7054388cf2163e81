"""Countdown: reach a target from given numbers, each used exactly once, with + - * /.

The prompt is the user turn of the held-out rows (`python -m longcot.data countdown` writes them),
so a model is asked in the words it was trained on. The judge is the one that verified the
training rows. One sample per problem, at the sampling that is usual for reasoning models.
"""

from pathlib import Path

from ..data.examples import Example, read_examples
from ..data.sampling import Sampling
from ..data.verify import verify_countdown
from .tasks import Question, Score, Task


def load(problems: Path) -> list[Question]:
    """Read Examples whose answer is `{"numbers": [3, 5, 7], "target": 26}`.

    Raises:
        ValueError: a malformed row (its line or id is named), an id that comes twice, no rows.
    """
    questions: dict[str, Question] = {}
    for example in read_examples(problems):
        _check(example, problems)
        if example.id in questions:
            raise ValueError(f"{problems}: id {example.id!r} comes twice; ids must be unique")
        questions[example.id] = Question(
            id=example.id, messages=example.messages, answer=example.answer
        )
    if not questions:
        raise ValueError(f"{problems} holds no problems")
    return list(questions.values())


def _check(example: Example, problems: Path) -> None:
    answer = example.answer
    if not (
        isinstance(answer, dict)
        and isinstance(answer.get("target"), int)
        and isinstance(answer.get("numbers"), list)
        and answer["numbers"]
        and all(isinstance(number, int) for number in answer["numbers"])
    ):
        raise ValueError(
            f"{problems}, id {example.id!r}: the answer must be like "
            f'{{"numbers": [3, 5, 7], "target": 26}}, found {answer!r}'
        )


def score(response: str, question: Question) -> Score:
    """Right if the boxed expression uses each number once and equals the target."""
    verdict = verify_countdown(response, question.answer["numbers"], question.answer["target"])
    return Score(correct=verdict.correct, parsed=verdict.answer is not None, reason=verdict.reason)


COUNTDOWN = Task(
    name="countdown",
    version=1,
    sampling=Sampling(temperature=0.6, top_p=0.95),
    num_samples=1,
    load=load,
    score=score,
)
