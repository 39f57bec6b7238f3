"""Sampling: the right distribution, one stream per sample, nothing that depends on the company."""

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import MODELS, build
from tiny import byte_tokenizer
from tiny_tokenizers import llama_legacy
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lit_align.data.generation import filtered_probabilities, generate, sample_responses
from lit_align.data.sampling import (
    Response,
    SampleRequest,
    Sampling,
    check_stop,
    cut,
    sampling_batches,
    seed_of,
    uniform_numbers,
)
from lit_align.errors import UserError
from lit_align.logprobs import enable_prefix_sharing
from lit_align.policy import Policy, PolicyConfig


@pytest.fixture(scope="module")
def model(tiny_model):
    return Policy.load(PolicyConfig(tiny_model)).merged_copy()


def test_samples_follow_the_models_distribution(model):
    """Frequencies of the first token against softmax(logits / temperature), 4 standard errors."""
    sampling, rows = Sampling(max_new_tokens=1, temperature=0.7), 4000
    prompt = [70, 71, 72]
    drawn = generate(model, [prompt] * rows, sampling, uniform_numbers(rows, 0)[:, None], [0])
    counts = torch.bincount(torch.tensor([ids[0] for ids in drawn]), minlength=259)
    with torch.no_grad():
        expected = (model(torch.tensor([prompt])).logits[0, -1] / 0.7).softmax(-1)
    error = (expected * (1 - expected) / rows).sqrt()
    assert ((counts / rows - expected).abs() <= 4 * error + 2 / rows).all()


def test_the_uniform_number_picks_the_token_by_the_distribution_function(model):
    with torch.no_grad():
        cumulative = model(torch.tensor([[70]])).logits[0, -1].softmax(-1).cumsum(-1)
    for u in (0.0, 0.2, 0.5, 0.999999):
        ((token,),) = generate(model, [[70]], Sampling(max_new_tokens=1), torch.tensor([[u]]), [0])
        below = cumulative[token - 1].item() if token else 0.0
        assert below - 1e-5 <= u <= cumulative[token].item() + 1e-5


def test_each_sample_has_its_own_stream_whatever_samples_with_it(model):
    tokenizer, sampling = byte_tokenizer(), Sampling(max_new_tokens=6)
    prompts = {"a": [70, 71], "b": [80], "c": [90, 91, 92]}

    def draw(*keys):
        drawn = sample_responses(
            model, tokenizer, SampleRequest([prompts[k] for k in keys], list(keys), 3, sampling, [0])
        )
        return dict(zip(keys, drawn, strict=True))

    together = draw("a", "b", "c")
    assert draw("c", "b", "a") == together
    assert draw("b")["b"] == together["b"]
    assert len({tuple(r.ids) for r in together["a"]}) == 3


def test_a_response_ends_with_its_end_token(model):
    ids = generate(model, [[70]] * 50, Sampling(max_new_tokens=40), uniform_numbers(50 * 40, 1).view(50, 40), [0, 5, 9])
    ended = [row for row in ids if row[-1] in (0, 5, 9)]
    assert ended
    assert all(not set(row[:-1]) & {0, 5, 9} for row in ids)
    assert all(len(row) == 40 for row in ids if row[-1] not in (0, 5, 9))


def test_greedy_is_the_likeliest_token(model):
    (ids,) = generate(model, [[70, 71]], Sampling(max_new_tokens=3, temperature=0), torch.zeros(1, 3), [0])
    row = [70, 71]
    for token in ids:
        with torch.no_grad():
            assert model(torch.tensor([row])).logits[0, -1].argmax() == token
        row.append(token)


def test_a_stop_string_cuts_text_and_tokens():
    tokenizer = byte_tokenizer()
    ids = tokenizer("one line\nanother").input_ids
    response = cut(ids, tokenizer, ["\n"], [0])
    assert (response.text, tokenizer.decode(response.ids), response.finished) == ("one line", "one line\n", True)
    assert cut(ids[:5], tokenizer, ["\n"], [0]).finished is False


def test_a_response_that_continues_a_text_keeps_its_first_space():
    tokenizer = llama_legacy()
    prompt, space, none = (tokenizer(text, add_special_tokens=False).input_ids for text in ("Say:", "yes", "Say:no"))
    tokens = [space, none[len(prompt) :]]
    assert tokenizer.decode(tokens[0]) == "yes", "the tokenizer leaves out the space"

    def texts(*continued: str) -> list[str]:
        request = SampleRequest([prompt] * 2, ["a", "b"], 1, Sampling(), [0], continued)
        return [response.text for (response,) in request.grouped(tokens, tokenizer)]

    assert texts("a", "b") == [" yes", "no"]
    assert texts() == texts("b") == ["yes", "no"]


def cut_token_by_token(ids: list[int], tokenizer: Any, stop: list[str], end_ids: list[int]) -> Response:
    """The definition of `cut`, slow because it decodes every prefix for every stop string."""
    for size in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:size], skip_special_tokens=True)
        if any(string in text for string in stop):
            return Response(ids[:size], text[: min(text.find(s) for s in stop if s in text)], finished=True)
    return Response(ids, tokenizer.decode(ids, skip_special_tokens=True), finished=ids[-1] in end_ids)


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes with merges, some within and some across characters, as language models have them."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    backend.train_from_iterator([Path(__file__).read_text(), "שלום 👩‍👩‍👧 naïve – ½ " * 9], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


@pytest.mark.parametrize("make", [byte_tokenizer, merging_tokenizer])
def test_a_response_is_cut_where_trying_token_by_token_would_cut_it(make):
    """Random tokens, so broken characters and special tokens too; random stop strings, of what comes up in them."""
    draw, tokenizer, found = random.Random(0), make(), 0
    text = tokenizer("naïve 👩‍👩‍👧 שלום\n\nHuman: ½ – the end").input_ids
    for _ in range(600):
        ids = [draw.randrange(len(tokenizer)) for _ in range(draw.randrange(1, 40))]
        place = draw.randrange(len(ids))
        ids[place:place] = text[: draw.randrange(len(text))]
        whole = tokenizer.decode(ids, skip_special_tokens=True).replace("�", "") or "a"
        starts = [draw.randrange(len(whole)) for _ in range(draw.randrange(3))]
        stop = [whole[start : start + draw.randrange(1, 6)] for start in starts] + ["\n\nHuman", "never"]
        expected = cut_token_by_token(ids, tokenizer, stop, [0])
        assert cut(ids, tokenizer, stop, [0]) == expected
        found += len(expected.ids) < len(ids)
    assert found > 200


def test_cutting_a_long_response_decodes_it_a_few_times_only():
    class Counting:
        calls, tokenizer = 0, byte_tokenizer()
        added_tokens_decoder, all_special_tokens = tokenizer.added_tokens_decoder, tokenizer.all_special_tokens
        all_special_ids = tokenizer.all_special_ids

        def decode(self, ids: list[int], **options: Any) -> str:
            self.calls += 1
            return self.tokenizer.decode(ids, **options)  # type: ignore[return-value]

    counting = Counting()
    ids = counting.tokenizer("x" * 1500 + "END" + "x" * 500).input_ids
    assert cut(ids, counting, ["never", "nor this"], [0]).ids == ids
    assert counting.calls == 1
    assert len(cut(ids, counting, ["END", "never"], [0]).ids) == 1503
    assert counting.calls <= 1 + 1 + 11 + 1


def test_stopping_a_row_early_equals_cutting_it_later(model):
    tokenizer, prompts, keys = byte_tokenizer(), [[70, 71]], ["a"]
    request = SampleRequest(prompts, keys, 20, Sampling(max_new_tokens=30), [0])
    (free,) = sample_responses(model, tokenizer, request)
    letter = next(c for r in free for c in r.text[3:] if c.isascii() and c.isalnum())
    stopping = Sampling(max_new_tokens=30, stop=[letter])
    (stopped,) = sample_responses(model, tokenizer, replace(request, sampling=stopping))
    assert any(letter in r.text for r in free)
    for before, after in zip(free, stopped, strict=True):
        assert after.text == before.text.partition(letter)[0]
        assert after.ids == before.ids[: len(after.ids)]


def test_filters_keep_the_fewest_and_likeliest_tokens():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    top_k = filtered_probabilities(logits, Sampling(top_k=2))
    assert top_k[0].tolist() == pytest.approx([0.625, 0.375, 0, 0])
    top_p = filtered_probabilities(logits, Sampling(top_p=0.6))
    assert (top_p[0] > 0).tolist() == [True, True, False, False]
    cold = filtered_probabilities(logits, Sampling(temperature=0.5))
    assert cold[0, 0].item() == pytest.approx(0.25 / (0.25 + 0.09 + 0.0225 + 0.0025))


def test_batches_are_cut_by_length_and_depend_on_nothing_else():
    lengths = [3, 9, 1, 9, 5]
    assert sampling_batches(lengths, 2) == [[1, 3], [4, 0], [2]]


def test_numbers_of_a_key_are_uniform_and_the_same_on_every_platform():
    assert uniform_numbers(3, 1, 2, "a", 0).tolist() == [0.9788755774497986, 0.8045365214347839, 0.48850399255752563]
    numbers = uniform_numbers(100_000, "key").double()
    counts = torch.histc(numbers, 64, 0, 1)
    assert ((counts - 100_000 / 64) ** 2 / (100_000 / 64)).sum() < 110, "χ² of 63 degrees of freedom"
    assert (numbers * 2**24 % 1 == 0).all()
    assert numbers.max() < 1


def test_keys_that_share_32_bits_of_their_hash_have_numbers_of_their_own():
    """The first two of 200,000 keys that torch's generator on CPUs would not tell apart."""
    seeds = [seed_of("seed", i) for i in (33_262, 52_847)]
    assert seeds[0] % 2**32 == seeds[1] % 2**32
    assert torch.equal(*(torch.rand(4, generator=torch.Generator().manual_seed(seed)) for seed in seeds))
    assert not torch.equal(uniform_numbers(4, "seed", 33_262), uniform_numbers(4, "seed", 52_847))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"temperature": -1}, "temperature=-1 must be at least 0. Raise it"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
        ({"temperature": math.nan}, "temperature=nan must be at least 0 and finite. Change it"),
        ({"top_p": math.nan}, "top_p=nan must be above 0 and at most 1"),
        ({"top_k": -1}, "top_k=-1 must be at least 0"),
        ({"stop": ["END", ""]}, "stop holds an empty string"),
    ],
)
def test_impossible_sampling_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        Sampling(**options)


def test_a_stop_string_that_is_not_text_is_refused_before_sampling():
    tokenizer = byte_tokenizer()
    message = r"sampling.stop: '<\|im_end\|>\\n' would never .* '<\|im_end\|>' is a special token.* Take it out"
    sampling = Sampling(stop=["END", "<|im_end|>\n"])
    with pytest.raises(UserError, match=message):
        sample_responses(None, tokenizer, SampleRequest([[70]], ["a"], 1, sampling, [0]))  # type: ignore[arg-type]
    check_stop(["<|im_en", "im_end", ">"], tokenizer)


@pytest.mark.parametrize("architecture", MODELS)
def test_a_shared_prompt_gives_the_samples_of_a_repeated_one(architecture: str) -> None:
    model = build(architecture, torch.float32)
    prompts = [[3, 7, 9, 20, 4], [8, 2], [5]]
    uniforms = uniform_numbers(9 * 12, 2).view(9, 12)
    together = generate(model, prompts, Sampling(max_new_tokens=12), uniforms, [0])
    apart = [
        generate(model, [prompt], Sampling(max_new_tokens=12), uniforms[3 * i + k : 3 * i + k + 1], [0])[0]
        for i, prompt in enumerate(prompts)
        for k in range(3)
    ]
    assert together == apart
    if enable_prefix_sharing(model):  # then steps of one token have an attention of their own
        assert generate(model, prompts, Sampling(max_new_tokens=12), uniforms, [0]) == apart
