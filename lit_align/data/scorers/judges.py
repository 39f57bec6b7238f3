"""Language models as judges, over any endpoint that speaks OpenAI's chat completions protocol.

    GradingJudge    grades each response on criteria (TR paper: coherence, correctness, helpfulness, harmlessness);
                    the reward is their mean, and the grades are kept beside it
    PairwiseJudge   compares each two responses to a prompt, in both orders; P(y_i ≻ y_j) is the mean of the two
                    verdicts (1, ½ or 0), and how much the order decided is told

What the judge is asked stands in text files (`templates/`): copy one, edit it, and name its path. An answer is written
to the cache on disk as it comes, and is never asked for again: not after a kill, nor by a run with the same cache.
The API key is read from the environment; it is neither logged nor written anywhere.
"""

import hashlib
import itertools
import re
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from lit_align.console import print_field
from lit_align.data.formats.rows import Text
from lit_align.data.scorers.base import PairwiseScorer, Scorer, Scores, excerpt
from lit_align.data.scorers.chat_api import ATTEMPTS, Client, Endpoint, JudgeError, UsageStats
from lit_align.errors import UserError

SHIPPED = Path(__file__).parent / "templates"
CRITERIA = ("coherence", "correctness", "helpfulness", "harmlessness")
T = TypeVar("T")


class JudgePrompter(Generic[T]):
    """A template, the endpoint it is sent to, and what is done with answers that cannot be read."""

    def __init__(self, endpoint: Endpoint, template: str, kind: str, fields: set[str], unanswered: T | None):
        self.client = Client(endpoint)
        self.text = _template(template, kind, fields)
        self.unanswered = unanswered

    @property
    def identity(self) -> str:
        endpoint = self.client.endpoint
        asked = repr((endpoint.address, self.text, endpoint.temperature, endpoint.max_tokens, self.unanswered))
        return f"{endpoint.model}@{hashlib.sha256(asked.encode()).hexdigest()[:8]}"

    def ask(self, filled: Sequence[dict[str, str]], parse: Callable[[str], T | None], wanted: str) -> list[T]:
        """What `parse` reads in the answers to the filled-in templates; where it reads nothing, the judge is reminded.

        Raises:
            JudgeError: an answer cannot be read even so, and `unanswered` has no substitute.
        """
        asked = [[{"role": "user", "content": string.Template(self.text).substitute(fields)}] for fields in filled]
        read: list[T | None] = [None] * len(asked)
        texts = [""] * len(asked)
        for _ in range(ATTEMPTS):
            open_ = [place for place, value in enumerate(read) if value is None]
            for place, text in zip(open_, self.client.ask_all([asked[place] for place in open_]), strict=True):
                texts[place], read[place] = text, parse(text)
                reminder = f"That cannot be read. Answer with one line of JSON and nothing else: {wanted}"
                asked[place] = [
                    *asked[place],
                    {"role": "assistant", "content": text},
                    {"role": "user", "content": reminder},
                ]
        for place, value in enumerate(read):
            if value is None:
                if self.unanswered is None:
                    raise JudgeError(
                        f"the judge {self.client.endpoint.model} was asked {ATTEMPTS} times and did not answer like "
                        f"{wanted}, but {excerpt(texts[place])} (response {excerpt(filled[place]['response'])}). Take "
                        "a better judge or template, raise endpoint.max_tokens, or set scorer.unanswered to the value "
                        "that such responses get."
                    )
                self.client.usage.unanswered += 1
        return [self.unanswered if value is None else value for value in read]  # type: ignore[misc]

    def release(self, more: str = "") -> None:
        """Close what is open, and tell the account."""
        usage, self.client.usage = self.client.usage, UsageStats()
        self.client.close()
        if usage.calls or usage.cached:
            print_field("judge", usage.line(self.client.endpoint))
            if more:
                print_field("", more)


class GradingJudge(Scorer):
    """A language model that grades each response on several criteria; the reward is the mean of the grades.

    Args:
        endpoint: Which model is asked, and where.
        template: What it is asked: tldr or hh, or a text file with $prompt, $response, $lowest, $highest and $answer.
        criteria: Names of the criteria, as the template explains them.
        lowest: The worst grade.
        highest: The best grade.
        unanswered: Grade on each criterion where the judge gives none, counted; null stops the run instead.
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
            raise UserError(f"scorer.criteria={[*criteria]}: give one or more names of letters, digits and _.")
        if not lowest < highest:
            raise UserError(f"scorer.lowest={lowest} must be below scorer.highest={highest}.")
        self.criteria = tuple(criteria)
        self.lowest, self.highest = lowest, highest
        grades = None if unanswered is None else {name: float(unanswered) for name in self.criteria}
        fields = {"prompt", "response", "lowest", "highest", "answer"}
        self._prompter = JudgePrompter(endpoint, template, "grades", fields, grades)

    @property
    def identity(self) -> str:
        """The model, and a digest of its address and all that it is asked."""
        return f"{self._prompter.identity} grades {self.lowest}–{self.highest}: {', '.join(self.criteria)}"

    def __call__(self, prompts: Sequence[Text], responses: Sequence[str]) -> Scores:
        wanted = ", ".join(f'"{name}": {self.highest}' for name in self.criteria)
        fixed = {"lowest": str(self.lowest), "highest": str(self.highest), "answer": wanted}
        filled = [
            {"prompt": _as_text(prompt), "response": response} | fixed
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        grades = self._prompter.ask(filled, self.read, f"{{{wanted}}}")
        return Scores(
            [sum(each.values()) / len(each) for each in grades],
            {name: [each[name] for each in grades] for name in self.criteria},
        )

    def read(self, answer: str) -> dict[str, float] | None:
        """The grades in an answer; None unless it has one for each criterion, within the limits."""
        grades = {}
        for name in self.criteria:
            found = re.findall(rf'\b{name}\b["\'*]*\s*[:=]\s*["\'*]*\s*(-?\d+(?:\.\d+)?)', answer, re.IGNORECASE)
            if not found or not self.lowest <= float(found[-1]) <= self.highest:
                return None
            grades[name] = float(found[-1])
        return grades

    def release(self) -> None:
        self._prompter.release()


# What may follow a verdict: nothing, so that neither "A or B?" nor "a close call" is one for A
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
    """A language model that says which of two responses is better; each two are compared in both orders.

    K responses take K·(K−1) requests. Told at the end of a phase: how often the first place won (an unbiased judge is
    at 50 %), and in how many pairs it, or the second, won in both orders (0 %).

    Args:
        endpoint: Which model is asked, and where.
        template: What it is asked: tldr or hh, or a text file with $prompt, $first and $second.
        unanswered: Probability that the first wins where the judge says nothing, counted (½ is a tie); null stops the
            run instead.
    """

    def __init__(self, endpoint: Endpoint, template: str = "hh", unanswered: float | None = None):
        if unanswered is not None and not 0 <= unanswered <= 1:
            raise UserError(f"scorer.unanswered={unanswered} is a probability: it must lie in [0, 1].")
        self._prompter = JudgePrompter(endpoint, template, "pair", {"prompt", "first", "second"}, unanswered)
        self._verdicts: list[tuple[float, float]] = []  # of each pair, how far the first place won in either order

    @property
    def identity(self) -> str:
        """The model, and a digest of its address and all that it is asked."""
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
            P[n][i][j] = (straight + 1 - swapped) / 2
            P[n][j][i] = 1 - P[n][i][j]
            if responses[n][i] != responses[n][j]:
                self._verdicts.append((straight, swapped))
        return P

    @staticmethod
    def read(answer: str) -> float | None:
        """How far the first place wins: 1, ½ or 0; None where the last "winner:", or all of the answer, is unclear."""
        *before, last = re.split(r"""\bwinner\b["'*]*\s*[:=]""", answer, flags=re.IGNORECASE)
        if before and re.search(r"\bor\W*$", before[-1], re.IGNORECASE):
            return None  # {"winner": "A"} or {"winner": "B"}: the question, repeated
        found = (_WINNER if before else _ALONE).match(last)
        return {"a": 1.0, "b": 0.0, "tie": 0.5}[found[1].lower()] if found else None

    def position_bias(self) -> dict[str, float]:
        """Shares over the pairs compared since the last release; none if there were none.

        first_place: of all verdicts, how often the first place won, ties as half. decided_by_place: of all pairs, those
        where the first place, or the second, won in both orders.
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
            f"place alone decided {bias['decided_by_place']:.1%} of {bias['pairs']:.0f} pairs"
            if bias
            else ""
        )


def _as_text(prompt: Text) -> str:
    """A prompt as a judge reads it: a chat with the names of its speakers."""
    if isinstance(prompt, str):
        return prompt
    names = {"user": "Human", "assistant": "Assistant", "system": "System"}
    return "\n\n".join(f"{names.get(turn['role'], turn['role'])}: {turn['content']}" for turn in prompt)


def _template(name: str, kind: str, fields: set[str]) -> str:
    """The text of a shipped template, or of a file.

    Raises:
        UserError: there is none of that name, or it does not have the fields that are filled in.
    """
    path = SHIPPED / f"{name}_{kind}.txt"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem.partition("_")[0] for file in SHIPPED.glob(f"*_{kind}.txt")))
        raise UserError(f"scorer.template={name!r} is neither one of {shipped} nor a text file. See {SHIPPED}.")
    text = path.read_text(encoding="utf-8")
    template = string.Template(text)
    needed = fields & {"response", "first", "second"}
    if not template.is_valid() or not needed <= set(template.get_identifiers()) <= fields:
        raise UserError(
            f"scorer.template={name!r} must hold {_dollars(needed)}, may hold {_dollars(fields - needed)}, and any "
            "other dollar sign is written twice ($$)."
        )
    return text


def _dollars(names: set[str]) -> str:
    return ", ".join(f"${name}" for name in sorted(names))
