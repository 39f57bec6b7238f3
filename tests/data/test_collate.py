"""One way from text to tokens, and a loader that resumes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import byte_tokenizer
from tokenizers import AddedToken

from lit_align.data.batches import Example, collate
from lit_align.data.loader import ExampleLoader
from lit_align.data.tokenization import Encoder
from lit_align.errors import UserError

CHAT = [{"role": "user", "content": "Hi"}]


def encoder(**options) -> Encoder:
    chat = options.pop("chat", True)
    return Encoder(byte_tokenizer(chat), **{"max_prompt_length": 64, "max_response_length": 64} | options)


def test_a_chat_is_rendered_once_with_the_assistants_turn_opened():
    made = encoder()
    ids = made.prompt(CHAT, "")
    assert made.tokenizer.decode(ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_a_reply_ends_the_turn_and_a_text_ends_the_text():
    made = encoder()
    assert made.tokenizer.decode(made.response("ok", chat=True)) == "ok<|im_end|>"
    assert made.tokenizer.decode(made.response("ok", chat=False)) == "ok<|endoftext|>"
    assert made.end_ids() == [0, 2]
    assert encoder(chat=False).end_ids() == [0]


def test_an_empty_prompt_begins_with_a_token_of_its_own():
    assert encoder().prompt("", "") == [0]


def test_a_beginning_of_sequence_that_is_token_0_is_one():
    made = encoder()
    made.tokenizer.bos_token, made.tokenizer.eos_token = "<|endoftext|>", "<|im_start|>"
    assert (made.tokenizer.bos_token_id, made.tokenizer.eos_token_id) == (0, 1)
    assert made.prompt("", "") == [0]


def test_the_turns_end_may_be_a_token_that_is_only_marked_as_special():
    tokenizer = byte_tokenizer(chat=False)  # as Phi-3's: <|end|> is special, but no role's token
    tokenizer.add_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|end|>\n{% endfor %}{{ eos_token }}"
    made = Encoder(tokenizer, max_prompt_length=64, max_response_length=64)
    assert tokenizer.decode(made.response("ok", chat=True)) == "ok<|end|>"
    assert [tokenizer.decode([token]) for token in made.end_ids()] == ["<|endoftext|>", "<|end|>"]
    made.prompt([{"role": "user", "content": "forged<|end|>"}], "")
    assert made.counts == {"chats with special tokens in their text": 1}


def test_a_chat_that_its_template_refuses_is_an_error_that_names_the_row():
    made = encoder()
    made.tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    )
    words = r"rows.jsonl:1: the chat template .* refuses the messages \(system, user\): System role not supported"
    with pytest.raises(UserError, match=words):
        made.prompt([{"role": "system", "content": "S"}, *CHAT], "rows.jsonl:1")


def test_no_beginning_of_sequence_is_doubled():
    made = encoder()
    made.tokenizer.bos_token = "<|im_start|>"
    ids = made.prompt(CHAT, "")
    assert ids is not None
    assert ids[:2].count(made.tokenizer.bos_token_id) == 1


def test_a_long_prompt_is_an_error_or_is_dropped_or_cut_as_asked_and_counted():
    with pytest.raises(
        UserError, match=r"rows.jsonl:3: the prompt has 9 tokens, but max_prompt_length=4. Raise it, or"
    ):
        encoder(max_prompt_length=4).prompt("long text", "rows.jsonl:3")
    dropping = encoder(max_prompt_length=4, long_prompts="drop")
    assert dropping.prompt("long text", "") is None
    assert dropping.counts == {"prompts too long, dropped": 1}
    cutting = encoder(max_prompt_length=4, long_prompts="truncate_left")
    assert cutting.tokenizer.decode(cutting.prompt("long text", "")) == "text"
    assert cutting.counts == {"prompts too long, cut": 1}


def test_a_long_response_loses_its_end_and_is_counted():
    made = encoder(max_response_length=3)
    assert made.tokenizer.decode(made.response("abcdef", chat=False)) == "abc"
    assert made.counts == {"responses too long, cut": 1}


def test_a_chat_needs_a_chat_template():
    with pytest.raises(UserError, match=r"rows.jsonl:1: the prompt is a chat, but .* has no chat template"):
        encoder(chat=False).prompt(CHAT, "rows.jsonl:1")


@given(st.text())
def test_any_response_comes_back_from_its_tokens(text):
    made = encoder(max_response_length=1 << 20)
    assert made.tokenizer.decode(made.response(text, chat=False), skip_special_tokens=False) == text + "<|endoftext|>"


def test_a_batch_holds_each_prompt_once_with_padding_on_the_right():
    batch = collate(
        [
            Example([5, 6, 7], [[8], [9, 10]], "", rewards=[1.0, 0.0]),
            Example([4], [[3, 2, 1], [6]], "", rewards=[2.0, 1.0]),
        ],
        [40, 41],
    )
    assert batch.prompt_ids.tolist() == [[5, 6, 7], [4, 0, 0]]
    assert batch.prompt_mask.tolist() == [[True] * 3, [True, False, False]]
    assert batch.response_ids.tolist() == [[[8, 0, 0], [9, 10, 0]], [[3, 2, 1], [6, 0, 0]]]
    assert batch.lengths.tolist() == [[1, 2], [3, 1]]
    assert (batch.index.tolist(), batch.rewards.tolist()) == ([40, 41], [[1.0, 0.0], [2.0, 1.0]])
    assert batch.sampler_logps is None


def examples(count: int) -> list[Example]:
    return [Example([i + 1], [[1], [2]], "") for i in range(count)]


def order(loader: ExampleLoader) -> list[int]:
    return [i for batch in loader for i in batch.index.tolist()]


def test_every_example_is_served_once_in_an_order_of_seed_and_epoch():
    first = order(ExampleLoader(examples(10), 3, seed=1, epoch=lambda: 0))
    assert sorted(first) == list(range(10))
    assert first == order(ExampleLoader(examples(10), 3, seed=1, epoch=lambda: 0))
    assert first != order(ExampleLoader(examples(10), 3, seed=1, epoch=lambda: 1))
    assert first != order(ExampleLoader(examples(10), 3, seed=2, epoch=lambda: 0))


def test_processes_share_the_examples_without_overlap_and_in_equal_numbers():
    loaders = [ExampleLoader(examples(11), 2, seed=1, rank=rank, world_size=2) for rank in range(2)]
    served = [order(loader) for loader in loaders]
    assert [len(loader) for loader in loaders] == [2, 2]
    assert not set(served[0]) & set(served[1])
    assert [len(s) for s in served] == [4, 4]
    assert loaders[0].dropped == 3


def test_batches_of_like_length_are_the_same_for_any_number_of_processes():
    lengths = torch.randint(1, 200, (203,), generator=torch.Generator().manual_seed(0)).tolist()
    some = [Example([1] * length, [[2], [3]], "") for length in lengths]

    def batches(size: int, epoch: int = 0, **kwargs: int) -> list[list[int]]:
        loader = ExampleLoader(some, size, seed=1, group_by_length=True, epoch=lambda: epoch, **kwargs)
        return [batch.index.tolist() for batch in loader]

    whole = batches(4)
    assert sorted(i for batch in whole for i in batch) == list(range(203))
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in whole[:-1]]
    assert sum(spread) / len(spread) < 15  # of batches drawn at random it is about 120
    assert whole != batches(4, epoch=1)
    firsts = [lengths[batch[0]] for batch in whole]
    assert firsts != sorted(firsts)
    shares = [batches(2, rank=rank, world_size=2) for rank in (0, 1)]
    assert [{*a, *b} for a, b in zip(*shares, strict=True)] == [set(batch) for batch in whole[:-1]]


def test_a_loader_goes_on_behind_what_it_served():
    whole = ExampleLoader(examples(10), 3, seed=1)
    batches = [batch.index.tolist() for batch in whole]
    stopped = ExampleLoader(examples(10), 3, seed=1)
    iterator = iter(stopped)
    next(iterator), next(iterator)
    resumed = ExampleLoader(examples(10), 3, seed=1)
    resumed.load_state_dict(stopped.state_dict())
    assert [batch.index.tolist() for batch in resumed] == batches[2:]
    assert [batch.index.tolist() for batch in resumed] == batches  # the next epoch is whole again


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_an_epoch_that_was_served_whole_begins_anew_in_batches_of_any_size(batch_size):
    loader = ExampleLoader(examples(4), 2, seed=1)
    order(loader)
    resumed = ExampleLoader(examples(4), batch_size, seed=1)
    resumed.load_state_dict(loader.state_dict())
    assert len(order(resumed)) == 4


def test_within_an_epoch_the_batches_keep_their_size_over_all_processes():
    stopped = ExampleLoader(examples(16), 4, seed=1)
    served = [next(iter(stopped)).index.tolist()]
    with pytest.raises(UserError, match=r"4 batches of 4 examples, and now they are 8 of 2 \(data.batch_size=2 × 1"):
        ExampleLoader(examples(16), 2, seed=1).load_state_dict(stopped.state_dict())
    halves = [ExampleLoader(examples(16), 2, seed=1, rank=rank, world_size=2) for rank in (0, 1)]
    for half in halves:
        half.load_state_dict(stopped.state_dict())
    rest = [i for half in halves for i in order(half)]
    assert sorted(served[0] + rest) == list(range(16))


def test_more_processes_do_not_begin_an_epoch_again_whose_batches_have_all_been_served():
    """Two processes leave two of the ten examples out, and have no third batch."""
    stopped = ExampleLoader(examples(10), 4, seed=1)
    for _ in zip(range(2), stopped, strict=False):
        pass
    assert stopped.state_dict()["served"] == 2
    with pytest.raises(UserError, match=r"3 batches of 4 examples, and now they are 2 of 4 .*resume from the end"):
        ExampleLoader(examples(10), 2, seed=1, world_size=2).load_state_dict(stopped.state_dict())


def test_within_an_epoch_the_data_stay_what_they_were():
    stopped = ExampleLoader(examples(10), 4, seed=1)
    next(iter(stopped))
    changed = [*examples(10)[:-1], Example([1], [[1], [2, 3, 4, 5, 6]], "")]
    with pytest.raises(
        UserError, match=r"an epoch over \d+ tokens of data, and now there are \d+: the data have chang"
    ):
        ExampleLoader(changed, 4, seed=1).load_state_dict(stopped.state_dict())


def test_recorded_numbers_travel_with_their_example():
    one = Example([1], [[1], [2]], "", sampler_logps=[-1.0, -2.0], reference_logps=[-3.0, -4.0])
    batch = collate([one], [0])
    assert torch.equal(batch.sampler_logps, torch.tensor([[-1.0, -2.0]]))
    assert torch.equal(batch.reference_logps, torch.tensor([[-3.0, -4.0]]))


def test_a_stream_goes_through_its_examples_again_and_again_each_time_in_another_order():
    served = order(ExampleLoader(examples(4), 2, seed=1, length=6))
    passages = [served[start : start + 4] for start in (0, 4, 8)]
    assert all(sorted(passage) == [0, 1, 2, 3] for passage in passages)
    assert passages[0] != passages[1]
    assert order(ExampleLoader(examples(4), 2, seed=1, length=1)) == served[:2]


def test_a_stream_goes_on_behind_what_it_served():
    stopped = ExampleLoader(examples(4), 2, seed=1, length=6)
    iterator = iter(stopped)
    before = [next(iterator).index.tolist() for _ in range(3)]
    resumed = ExampleLoader(examples(4), 2, seed=1, length=6)
    resumed.load_state_dict(stopped.state_dict())
    after = [batch.index.tolist() for batch in resumed]
    assert before + after == [batch.index.tolist() for batch in ExampleLoader(examples(4), 2, seed=1, length=6)]
