"""Decoding against a forward pass over the whole text, in float64."""

import pytest
import torch
from architectures import MODELS, build
from torch import Tensor

from lit_align.decoding import can_decode, decode
from lit_align.logprobs import enable_prefix_sharing

PROMPTS = [[3, 7, 9, 20, 4], [8, 2], [5], [11, 12, 13, 14, 15]]
COUNT, STEPS, END = 3, 9, 1
WINDOWED = ["mistral (window)", "qwen2 (window)", "gemma3 (window)"]


def drawn(rows: Tensor, step: int, vocabulary: int) -> Tensor:
    """Tokens that look random; some rows end early, whole prompts among them."""
    tokens = 2 + (7 * rows + 13 * step) % (vocabulary - 2)
    return tokens.masked_fill(rows % 5 + rows // 3 == step, END)


@pytest.mark.parametrize("beginning", [[], [4, 9, 16, 25, 36, 49, 7, 3]], ids=["", "a common beginning"])
@pytest.mark.parametrize("architecture", MODELS)
def test_each_step_has_the_logits_of_the_whole_text(architecture: str, beginning: list[int]) -> None:
    model, prompts = build(architecture), [beginning + prompt for prompt in PROMPTS]
    seen: dict[tuple[int, int], Tensor] = {}

    def choose(logits: Tensor, rows: Tensor, step: int) -> Tensor:
        seen.update({(row, step): logits[place] for place, row in enumerate(rows.tolist())})
        return drawn(rows, step, logits.shape[1])

    if not enable_prefix_sharing(model):
        assert not can_decode(model)
        return
    responses = decode(model, prompts, COUNT, STEPS, choose, lambda each: [ids[-1] == END for ids in each])
    if architecture in WINDOWED:
        assert responses is None
        return
    assert responses is not None
    for row, ids in enumerate(responses):
        assert END not in ids[:-1]
        assert ids[-1] == END or len(ids) == STEPS
        prompt = prompts[row // COUNT]
        with torch.no_grad():
            exact = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(torch.stack([seen[row, step] for step in range(len(ids))]), exact)


def test_responses_that_have_ended_are_no_longer_computed() -> None:
    model = build("llama")
    assert enable_prefix_sharing(model)
    rows: list[int] = []
    lengths = torch.tensor([1, 9, 9, 2, 2, 2, 3, 9])

    def choose(logits: Tensor, numbers: Tensor, step: int) -> Tensor:
        rows.append(len(numbers))
        return torch.where(lengths[numbers] == step + 1, END, 5)

    responses = decode(model, [[3, 4], [5]], 4, 20, choose, lambda each: [ids[-1] == END for ids in each])
    assert responses is not None
    assert [len(ids) for ids in responses] == lengths.tolist()
    assert rows == [8, 7, 4, 3, 3, 3, 3, 3, 3]


def test_bfloat16_is_as_exact_as_a_forward_pass() -> None:
    exact, model = build("llama"), build("llama", torch.bfloat16)
    assert enable_prefix_sharing(model)
    prompts, steps = [[*range(2, 42)], [*range(20, 50)]], 16
    steps_logits: list[Tensor] = []

    def choose(logits: Tensor, rows: Tensor, step: int) -> Tensor:
        steps_logits.append(logits.double())
        return drawn(rows + 100, step, logits.shape[1])

    responses = decode(model, prompts, 4, steps, choose, lambda each: [False] * len(each))
    assert responses is not None
    texts = [prompts[row // 4] + ids for row, ids in enumerate(responses)]
    ours, theirs, true = [], [], []
    with torch.no_grad():
        for row, text in enumerate(texts):
            at = slice(len(text) - steps - 1, -1)
            ours.append(torch.stack([logits[row] for logits in steps_logits]))
            theirs.append(model(torch.tensor([text])).logits[0, at].double())
            true.append(exact(torch.tensor([text])).logits[0, at])
    off = [(torch.stack(each) - torch.stack(true)).norm() for each in (ours, theirs)]
    assert off[0] < 1.2 * off[1]
