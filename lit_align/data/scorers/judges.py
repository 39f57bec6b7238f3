"""Language models as judges, over any endpoint that speaks OpenAI's chat completions protocol.

    GradingJudge    grades each response on criteria (TR paper: coherence, correctness, helpfulness, harmlessness);
                    the reward is their mean, and the grades are recorded with it
    PairwiseJudge   compares each pair of responses to a prompt in both orders; P(y_i ≻ y_j) is the mean of the two
                    verdicts (1, ½ or 0), and the influence of the order is reported

The judge's instructions are text files (`templates/`): copy one, edit it, and give its path. Each answer is cached on
disk as it comes, so that no run with the same cache sends the same request again. The API key is read from the
environment and never logged or written.
"""

import hashlib
import itertools
import re
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from lit_align.console import print_field
from lit_align.data.formats.rows import Text
from lit_align.data.scorers.base import PairwiseScorer, Scorer, Scores, excerpt, said
from lit_align.data.scorers.chat_api import ATTEMPTS, Client, Unanswerable, UsageStats
from lit_align.data.scorers.chat_request import CUT, JudgeError
from lit_align.data.scorers.endpoint import Endpoint
from lit_align.errors import UserError, amount, check_number

SHIPPED = Path(__file__).parent / "templates"
CRITERIA = ("coherence", "correctness", "helpfulness", "harmlessness")
T = TypeVar("T")


class JudgePrompter(Generic[T]):
    """Sends filled-in templates to an endpoint, and deals with answers that cannot be read."""

    def __init__(
        self,
        endpoint: Endpoint,
        template: str,
        kind: str,
        fields: set[str],
        unanswered: T | None,
        schema: dict[str, Any],
    ):
        self.client = Client(endpoint, schema)
        self.text = _template(template, kind, fields)
        self.unanswered = unanswered

    @property
    def identity(self) -> str:
        endpoint = self.client.endpoint
        request = repr((endpoint.address, self.text, endpoint.temperature, endpoint.max_tokens, self.unanswered))
        request += "".join(repr(each) for each in (self.client.schema, endpoint.extra_body) if each)
        return f"{endpoint.model}@{hashlib.sha256(request.encode()).hexdigest()[:8]}"

    def ask(self, filled: Sequence[dict[str, str]], parse: Callable[[str], T | None], wanted: str) -> list[T | None]:
        """Query the judge with each filled-in template, remind it of the format if necessary, and parse the answers.

        Args:
            filled: The fields of each template.
            parse: Reads an answer; None if it cannot be read.
            wanted: The format of an answer.

        Returns:
            What is read of each answer; None where `unanswered` must take its place.

        Raises:
            JudgeError: an answer still cannot be read, and `unanswered` gives no substitute.
        """
        conversations = [
            [{"role": "user", "content": string.Template(self.text).substitute(fields)}] for fields in filled
        ]
        read: list[T | None] = [None] * len(conversations)
        answers: list[str | Unanswerable] = [""] * len(conversations)
        for _ in range(ATTEMPTS):
            open_ = [n for n, value in enumerate(read) if value is None and not isinstance(answers[n], Unanswerable)]
            for place, answer in zip(open_, self.client.ask_all([conversations[n] for n in open_]), strict=True):
                answers[place] = answer
                if isinstance(answer, Unanswerable):
                    continue
                read[place] = parse(answer)
                reminder = f"That cannot be read. Answer with one line of JSON and nothing else: {wanted}"
                conversations[place] = [
                    *conversations[place],
                    {"role": "assistant", "content": answer if answer.strip() else "…"},  # some refuse an empty one
                    {"role": "user", "content": reminder},
                ]
        for fields, answer, value in zip(filled, answers, read, strict=True):
            if value is None:
                if self.unanswered is None:
                    raise self._unread(answer, wanted, fields["response"])
                self.client.usage.unanswered += 1
        return read

    def filled_in(self, value: T | None) -> T:
        """A value, or what takes its place."""
        return self.unanswered if value is None else value  # type: ignore[return-value]

    def _unread(self, answer: str | Unanswerable, wanted: str, response: str) -> JudgeError:
        name, shown = self.client.endpoint.model, excerpt(response)
        if isinstance(answer, Unanswerable):
            return JudgeError(
                f"the judge {name} does not take a request: {answer.said} (response {shown}). Use another judge, such "
                "as one with a longer context, or set scorer.unanswered to the value for such responses."
            )
        return JudgeError(
            f"the judge {name} was queried {ATTEMPTS} times for an answer like {wanted} and gave {excerpt(answer)} "
            f"(response {shown}). Use a better judge or template, raise endpoint.max_tokens, or set scorer.unanswered "
            "to the value for such responses."
        )

    def release(self, more: str = "") -> None:
        """Close the cache, and report the usage."""
        usage, self.client.usage = self.client.usage, UsageStats()
        self.client.close()
        if usage.calls or usage.cached:
            print_field("judge", usage.line(self.client.endpoint))
            if more:
                print_field("", more)


class GradingJudge(Scorer):
    """A language model that grades each response on several criteria; the reward is the mean of the grades.

    Args:
        endpoint: The judge's model and server.
        template: The instructions: tldr or hh, or a text file with $prompt, $response, $lowest, $highest and $answer.
        criteria: Names of the criteria, as the template explains them.
        lowest: The worst grade.
        highest: The best grade.
        unanswered: Grade on each criterion if the judge gives none; such responses are counted. null stops the run.
    """

    batch_size = 4096  # responses per call; `endpoint.concurrency` limits the requests

    def __init__(
        self,
        endpoint: Endpoint,
        template: str = "hh",
        criteria: Sequence[str] = CRITERIA,
        lowest: int = 1,
        highest: int = 10,
        unanswered: float | None = None,
    ):
        if not criteria or not all(re.fullmatch(r"\w+", name) for name in criteria):
            raise UserError(
                f"scorer.criteria={[*criteria]} must be one or more names of letters, digits and _. Rename them."
            )
        if not lowest < highest:
            raise UserError(f"scorer.lowest={lowest} must be below scorer.highest={highest}. Lower it.")
        check_number("scorer.unanswered", unanswered, least=lowest, most=highest)
        self.criteria = tuple(criteria)
        self.lowest, self.highest = lowest, highest
        grades = None if unanswered is None else {name: float(unanswered) for name in self.criteria}
        fields = {"prompt", "response", "lowest", "highest", "answer"}
        grade = {"type": "integer", "minimum": lowest, "maximum": highest}
        schema = object_schema(dict.fromkeys(self.criteria, grade))
        self._prompter = JudgePrompter(endpoint, template, "grades", fields, grades, schema)

    @property
    def identity(self) -> str:
        """The model, and a digest of its address and of all that determines its requests."""
        return f"{self._prompter.identity} grades {self.lowest}–{self.highest}: {', '.join(self.criteria)}"

    def __call__(self, prompts: Sequence[Text], responses: Sequence[str]) -> Scores:
        wanted = ", ".join(f'"{name}": {self.highest}' for name in self.criteria)
        fixed = {"lowest": str(self.lowest), "highest": str(self.highest), "answer": wanted}
        filled = [
            {"prompt": _as_text(prompt), "response": response} | fixed
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        asked = self._prompter.ask(filled, self.read, f"{{{wanted}}}")
        grades = [self._prompter.filled_in(each) for each in asked]
        return Scores(
            [sum(each.values()) / len(each) for each in grades],
            {name: [each[name] for each in grades] for name in self.criteria},
        )

    def read(self, answer: str) -> dict[str, float] | None:
        """The grades in an answer; None unless there is one for each criterion, within the limits."""
        grades = {}
        for name in self.criteria:
            found = re.findall(rf'\b{name}\b["\'*]*\s*[:=]\s*["\'*]*\s*(-?\d+(?:\.\d+)?)', answer, re.IGNORECASE)
            if not found or not self.lowest <= float(found[-1]) <= self.highest or answer.endswith(found[-1] + CUT):
                return None  # a grade that was cut may have been a longer one
            grades[name] = float(found[-1])
        return grades

    def release(self) -> None:
        self._prompter.release()


# A verdict must end its line, field or sentence, so that neither "A or B?" nor "a close call" is read as A
_WINNER = re.compile(
    r"""["'*\s]* (?:a\s+(?=tie))? (a|b|tie)\b ["'*]*
    (?: [^\w?\n]*$                 # the end of the line,
      | \s*\}(?!\s*,)              # of the JSON object (with a comma it is the question, repeated),
      | \s*,\s*["']\w+["']\s*:     # of this field,
      | [.!]\s                     # or of the sentence
    )""",
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
_ALONE = re.compile(r"[^\w?]*(?:a\s+(?=tie))?(a|b|tie)[^\w?]*$", re.IGNORECASE)


class PairwiseJudge(PairwiseScorer):
    """A language model that says which of two responses is better; each pair is compared in both orders.

    K responses take K·(K−1) requests. The end of each phase reports how often the first place won (50 % for an unbiased
    judge), and the share of pairs in which one place won in both orders (0 %).

    Args:
        endpoint: The judge's model and server.
        template: The instructions: tldr or hh, or a text file with $prompt, $first and $second.
        unanswered: Probability that the first wins if the judge gives no verdict (½ is a tie); such answers are
            counted. null stops the run.
    """

    def __init__(self, endpoint: Endpoint, template: str = "hh", unanswered: float | None = None):
        check_number("scorer.unanswered", unanswered, least=0, most=1)
        schema = object_schema({"winner": {"type": "string", "enum": ["A", "B", "tie"]}})
        self._prompter = JudgePrompter(endpoint, template, "pair", {"prompt", "first", "second"}, unanswered, schema)
        self._verdicts: list[tuple[float, float]] = []  # of each pair, the first place's wins in the two orders

    @property
    def identity(self) -> str:
        """The model, and a digest of its address and of all that determines its requests."""
        return f"{self._prompter.identity} pairwise"

    def preferences(self, prompts: Sequence[Text], responses: Sequence[Sequence[str]]) -> list[list[list[float]]]:
        pairs = [
            (n, i, j) for n, group in enumerate(responses) for i, j in itertools.combinations(range(len(group)), 2)
        ]
        filled = [
            {"prompt": _as_text(prompts[n]), "first": responses[n][first], "second": responses[n][second]}
            | {"response": responses[n][first]}
            for n, i, j in pairs
            for first, second in ((i, j), (j, i))
        ]
        verdicts = self._prompter.ask(filled, self.read, '{"winner": "A"}, "B" or "tie"')
        P = [[[0.5] * len(group) for _ in group] for group in responses]
        for (n, i, j), straight, swapped in zip(pairs, verdicts[::2], verdicts[1::2], strict=True):
            if straight is not None and swapped is not None and responses[n][i] != responses[n][j]:
                self._verdicts.append((straight, swapped))
            P[n][i][j] = (self._prompter.filled_in(straight) + 1 - self._prompter.filled_in(swapped)) / 2
            P[n][j][i] = 1 - P[n][i][j]
        return P

    @staticmethod
    def read(answer: str) -> float | None:
        """1 if the first place wins, 0 if the second wins, ½ for a tie; None if the answer is unclear."""
        *before, last = re.split(r"""\bwinner\b["'*]*\s*[:=]""", answer, flags=re.IGNORECASE)
        if before and re.search(r"\bor\W*$", before[-1], re.IGNORECASE):
            return None  # the judge repeats the question
        found = (_WINNER if before else _ALONE).match(last)
        return {"a": 1.0, "b": 0.0, "tie": 0.5}[found[1].lower()] if found else None

    def position_bias(self) -> dict[str, float]:
        """Shares over the pairs with two verdicts since the last release; empty if there are none.

        first_place is the share of verdicts that the first place won, ties counted as half. decided_by_place is the
        share of pairs in which one place won in both orders.
        """
        if not self._verdicts:
            return {}
        both = [straight + swapped for straight, swapped in self._verdicts]
        count = len(both)
        return {
            "pairs": float(count),
            "first_place": sum(both) / (2 * count),
            "decided_by_place": sum(each in (0.0, 2.0) for each in both) / count,
        }

    def release(self) -> None:
        bias = self.position_bias()
        self._verdicts = []
        self._prompter.release(
            f"position bias: the first place won {bias['first_place']:.1%} of {2 * bias['pairs']:.0f} verdicts; the "
            f"place alone decided {bias['decided_by_place']:.1%} of {amount(bias['pairs'], 'pairs')}"
            if bias
            else ""
        )


def object_schema(properties: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of an object that has exactly these properties."""
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


def _as_text(prompt: Text) -> str:
    """A prompt as the judge reads it; a chat has the names of its speakers."""
    if isinstance(prompt, str):
        return prompt
    names = {"user": "Human", "assistant": "Assistant", "system": "System"}
    return "\n\n".join(f"{names.get(turn['role'], turn['role'])}: {said(turn)}" for turn in prompt)


def _template(name: str, kind: str, fields: set[str]) -> str:
    """The text of a shipped template, or of a file.

    Raises:
        UserError: the template does not exist, or its fields are wrong.
    """
    path = SHIPPED / f"{name}_{kind}.txt"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem.partition("_")[0] for file in SHIPPED.glob(f"*_{kind}.txt")))
        raise UserError(f"scorer.template={name!r} must be one of {shipped}, or a text file. See {SHIPPED}.")
    text = path.read_text(encoding="utf-8")
    template = string.Template(text)
    needed = fields & {"response", "first", "second"}
    if not template.is_valid() or not needed <= set(template.get_identifiers()) <= fields:
        raise UserError(
            f"scorer.template={name!r} must contain {_dollars(needed)} and may contain {_dollars(fields - needed)}. "
            "Write any other dollar sign twice ($$)."
        )
    return text


def _dollars(names: set[str]) -> str:
    return ", ".join(f"${name}" for name in sorted(names))
