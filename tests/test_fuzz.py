"""Whatever is done to a cache, in whatever order, the next logits are the oracle's.

A machine draws a model, a window and a mode, and then operations on up to three caches at once: it feeds, generates, copies, selects
rows, rolls back, interrupts passes, tries what must be refused, and lets a billion tokens go by. Every logit that comes out is
compared. Tokens come from a table, by variant and position, so that the oracle's work is shared by all that has the same
beginning; what branches off goes on with another variant, so that a key of the wrong branch shows.

    python -m pytest tests/test_fuzz.py                                                       # as in CI: the same every time
    FUZZ_OPERATIONS=100000 python -m pytest tests/test_fuzz.py -s --hypothesis-seed=1         # long, another one for each seed
"""

import copy
import functools
import math
import os
import re
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
import torch
import transformers
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from packaging.version import Version

from checks import assert_same, interrupted_at, left_padded, move_ahead, random_ids
from custom_generate.generate import SinkCache, generate
from custom_generate.layers import MIN_SLOTS
from custom_generate.releases import MODELS_ASK_FOR_QUERY_OFFSET
from custom_generate.sinks import NUM_SHIFTS_AHEAD
from families import EAGER_ONLY, FAMILIES, ORDERED, TRANSFORMERS, build_model, is_refused
from oracle import GrowingOracle, Text, oracle_logits
from zoo import ZOO_RELEASE, build_zoo_model

NUM_OPERATIONS = int(os.environ.get("FUZZ_OPERATIONS", 400))
SHRINK = bool(os.environ.get("FUZZ_SHRINK"))
OPERATIONS_A_RUN = 40
MAX_STREAMS, MAX_ROWS = 3, 4
NUM_VARIANTS = 4
TOKENS = random_ids(8000, seed=11, num_rows=NUM_VARIANTS).tolist()
# Of one variant half the tokens are 2, 3 or 4: what ends rows or pads them then stands in the text, too, and several times in a row.
TOKENS[-1] = [token if token % 2 else 2 + token // 2 % 3 for token in TOKENS[-1]]
NO_TOKEN = 0  # in no text

SHAPES = [
    {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "num_hidden_layers": layers}
    for heads, kv_heads, layers in [(4, 2, 2), (8, 1, 1), (2, 2, 3)]
]
TWO_LAYERS = {"num_hidden_layers": 2}
ONE_OF_EACH = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
# Family, and what to build of it: rotations of halves, interleaved pairs, a part, the other way round, none in some layers, none at
# all (ALiBi), those of a latent, and those whose frequencies end somewhere; native windows in all layers or in some; recurrent states.
MODELS = [
    *(("llama", shape) for shape in SHAPES),
    ("cohere", SHAPES[0]),
    ("gpt-neox", TWO_LAYERS),
    ("gpt-j", {"n_layer": 2, "max_position_embeddings": 10_000}),
    ("nanochat", TWO_LAYERS),
    ("smollm3", {"num_hidden_layers": 2, "no_rope_layers": [0, 1]}),
    ("falcon-alibi", TWO_LAYERS),
    ("bloom", {"n_layer": 2}),
    ("deepseek-v3", {"num_hidden_layers": 2, "first_k_dense_replace": 2}),
    ("llama-dynamic", {"num_hidden_layers": 1, "max_position_embeddings": 10_000}),
    ("gemma3", ONE_OF_EACH),
    ("qwen2-half-sliding", ONE_OF_EACH),
    ("mistral-short-window", TWO_LAYERS),
    ("mistral-long-window", {"num_hidden_layers": 2, "sliding_window": 14}),
    ("llama4", {"num_hidden_layers": 2, "attention_chunk_size": 24, "floor_scale": 10_000}),
    ("glm-moe-dsa", {"num_hidden_layers": 2, "index_topk": 24, "indexer_types": ["full", "shared"]}),
]
# Where frequencies change, tables end or queries are scaled: soon, but not for the oracle.
NUM_POSITIONS = dict.fromkeys(("gpt-j", "llama-dynamic"), {"max_position_embeddings": 60}) | {"llama4": {"floor_scale": 61}}
MODELS = [(name, overrides) for name, overrides in MODELS if hasattr(transformers, FAMILIES[name][0]) and not is_refused(name)]
RECURRENT = ("lfm2", "granitemoehybrid") if TRANSFORMERS >= Version(ZOO_RELEASE) else ()
MODELS += [(name, {}) for name in RECURRENT]
PADDING_CAN_NOT_BE_TOLD = "has the padding token among its new tokens|Which of its padding tokens are text was inferred"
operations, generated = Counter(), Counter()  # what was done; of what was generated, what else is true


@functools.cache
def models_of(number: int, implementation: str):
    """The model, and what the oracle asks: itself, or one with the same weights whose positions do not end."""
    name, overrides = MODELS[number]
    if name in RECURRENT:
        return (build_zoo_model(name, implementation),) * 2
    asked = build_model(name, implementation, **overrides)
    if name not in NUM_POSITIONS:
        return asked, asked
    model = build_model(name, implementation, **overrides | NUM_POSITIONS[name])
    for parameter, same in zip(model.parameters(), asked.parameters()):
        parameter.data = same.data
    return model, asked


@functools.lru_cache(maxsize=8)
def oracle_of(number: int, implementation: str, window_length: int, num_sink_tokens: int) -> GrowingOracle:
    return GrowingOracle(models_of(number, implementation)[1], window_length, num_sink_tokens)


@dataclass
class Row:
    """What a row has seen, for the oracle, and which tokens come next."""

    text: Text
    variant: int = 0

    def next_tokens(self, num: int) -> list[int]:
        return TOKENS[self.variant][self.text.length : self.text.length + num]


@dataclass
class Stream:
    """A cache, and what it should say of itself."""

    cache: SinkCache
    rows: list[Row] = field(default_factory=list)
    num_gone_by: int = 0  # tokens that only the counters have seen
    knows_ids: bool = True
    recorded: list[int] | None = None  # tokens of each row that may be taken back
    returned: list[int] | None = None  # by `generate`, one a row: not yet seen
    have_ended: bool = False  # some rows, before others
    was_interrupted: bool = False  # so that what was made for a pass is still there

    def branch(self, offset: int) -> "Stream":
        rows = [replace(row, variant=(row.variant + offset) % NUM_VARIANTS) for row in self.rows]
        return replace(self, cache=copy.deepcopy(self.cache), rows=rows, recorded=copy.copy(self.recorded))

    @property
    def num_seen(self) -> list[int]:
        return [row.text.length + self.num_gone_by for row in self.rows]

    def says(self) -> tuple:
        return repr(self.cache), self.cache.num_tokens_seen_by_row, self.cache.positions, self.cache.batch_size


STREAM = st.integers(0, MAX_STREAMS - 1)
NUM_TOKENS = st.one_of(st.integers(1, 5), st.integers(1, 50))
# One number for all rows, or one for each.
COUNTS = st.one_of(
    NUM_TOKENS.map(lambda num: [num] * MAX_ROWS), st.lists(st.integers(0, 30), min_size=MAX_ROWS, max_size=MAX_ROWS)
)

TURN = st.fixed_dictionaries(
    {
        "counts": COUNTS,
        "num_new": st.integers(1, 8),
        "how": st.sampled_from(["all", "all", "new", "new with mask", "last", "nothing"]),
        "chunk": st.one_of(st.none(), st.integers(1, 20)),
        "num_copies": st.sampled_from([1, 1, 1, 2]),
        "ends": st.lists(st.integers(1, 12), min_size=MAX_ROWS, max_size=MAX_ROWS),
        "by_token": st.booleans(),
        "padding": st.sampled_from(["in no text", "chosen", "chosen last", "first", "new", "returned", "end"]),
        "masked": st.booleans(),
    }
)


class CacheMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.streams: list[Stream] = []

    @initialize(
        number=st.integers(0, len(MODELS) - 1),
        implementation=st.sampled_from(["eager", "sdpa"]),
        window_length=st.integers(1, 24),
        num_sink_tokens=st.integers(0, 6),
        mode=st.sampled_from(["", "static", "offloaded"]),
    )
    def start(self, number, implementation, window_length, num_sink_tokens, mode):
        name = MODELS[number][0]
        implementation = "eager" if name in EAGER_ONLY else implementation
        num_sink_tokens = min(num_sink_tokens, window_length - 1)
        self.is_ordered, self.is_recurrent = name in ORDERED, name in RECURRENT
        self.static = mode == "static" and not self.is_ordered
        self.model, _ = models_of(number, implementation)
        self.oracle = oracle_of(number, implementation, window_length, num_sink_tokens)
        if self.oracle.num_computed > 10_000:
            oracle_of.cache_clear()
            self.oracle = oracle_of(number, implementation, window_length, num_sink_tokens)
        self.window_length, self.num_sinks = window_length, num_sink_tokens
        modes = {"static": self.static, "offloaded": mode == "offloaded"}
        self.streams = [Stream(SinkCache.from_model(self.model, window_length, num_sink_tokens, **modes))]
        self.windows = [window or window_length for window in self.oracle.windows]
        self.has_native_windows = any(layer and layer.native_window for layer in self.streams[0].cache.traits.layers)

    # Feeding

    def begin(self, stream: Stream, num_rows: int) -> None:
        if not stream.cache.is_initialized:
            stream.rows = [Row(self.oracle.empty, variant) for variant in range(num_rows)]

    def started(self, stream: int) -> Stream:
        """One that has seen something."""
        stream = self.streams[stream % len(self.streams)]
        if not stream.cache.is_initialized:
            self.begin(stream, 2)
            self.run_pass(stream, [9, 5])
        return stream

    def tokens(self, stream: Stream, counts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The next tokens of each row, padded on the left, and their mask."""
        return left_padded([torch.tensor([row.next_tokens(num)], dtype=torch.long) for row, num in zip(stream.rows, counts)])

    def advance(self, stream: Stream, counts: list[int], logits: torch.Tensor | None) -> None:
        """Let the texts grow, and compare the logits `[rows, columns, vocab]` of what they have grown by."""
        ours, expected = [], []
        for index, (row, num) in enumerate(zip(stream.rows, counts)):
            for column, token in enumerate(row.next_tokens(num), -num):
                row.text = self.oracle.append(row.text, token)
                if logits is not None and -column <= logits.shape[1]:
                    ours.append(logits[index, column])
                    expected.append(row.text.logits)
        if ours:
            assert_same(torch.stack(ours), torch.stack(expected))

    def fitting(self, stream: Stream, counts: list[int]) -> list[int]:
        """One number for each row; of those with recurrent states, some may wait while all others go on by as many."""
        counts = counts[: len(stream.rows)]
        return [num * (num == max(counts)) for num in counts] if self.is_recurrent and any(stream.num_seen) else counts

    def evicts(self, stream: Stream, counts: list[int]) -> bool:
        """Whether a pass over several tokens goes past a window."""
        num_after = max(seen + num for seen, num in zip(stream.num_seen, counts))
        return max(counts) > 1 and num_after > min(*self.windows, self.window_length)

    def count_recorded(self, stream: Stream, counts: list[int]) -> None:
        if stream.recorded is None:
            return
        num_columns = max(counts)
        num_recent = min(self.window_length - self.num_sinks, *(self.windows if self.has_native_windows else ()), 99)
        if self.evicts(stream, counts) and num_columns > num_recent:
            stream.recorded = [0] * len(counts)
        else:
            stream.recorded = [have + num for have, num in zip(stream.recorded, counts)]

    @torch.no_grad()
    def run_pass(self, stream: Stream, counts: list[int], max_parts: int = 1) -> None:
        """One pass, in parts if it can be; where it is refused for a reason of the model, as few as it takes."""
        ids, mask = self.tokens(stream, counts)
        if max(counts) == 0:
            return
        before = stream.says()
        stream.knows_ids = stream.knows_ids or not any(stream.num_seen)
        try:
            can_be_divided = stream.cache.takes_parts and bool(mask.all())
            num_parts = next(num for num in range(max_parts, 0, -1) if ids.shape[1] % num == 0) if can_be_divided else 1
            operations["pass in parts"] += num_parts > 1
            inputs = stream.cache.prepare(ids, None if bool(mask.all()) else mask, num_parts=num_parts)
        except ValueError as error:
            limit = stream.cache.traits.max_positions
            assert (
                (self.is_ordered and self.evicts(stream, counts)) if "one by one" in str(error) else ("Feed fewer" in str(error))
            )
            assert "one by one" in str(error) or max(counts) > limit - self.window_length
            assert stream.says() == before
            half = max(counts) // 2
            self.run_pass(stream, [max(num - half, 0) for num in counts])
            return self.run_pass(stream, [min(num, half) for num in counts])
        logits = self.model(**inputs).logits.unflatten(0, (len(ids), -1)).flatten(1, 2)
        stream.returned, stream.was_interrupted = None, False
        self.count_recorded(stream, counts)
        self.advance(stream, counts, logits)

    @rule(
        stream=STREAM,
        num_rows=st.integers(1, 3),
        counts=COUNTS,
        chunk=st.one_of(st.none(), st.integers(1, 30)),
        max_parts=st.integers(1, 6),
    )
    def feed(self, stream, num_rows, counts, chunk, max_parts):
        """Any numbers of tokens, some rows possibly none, in one pass or in chunks of these columns."""
        operations["feed" if chunk is None else "feed in chunks"] += 1
        stream = self.streams[stream % len(self.streams)]
        self.begin(stream, num_rows)
        counts = self.fitting(stream, counts)
        left = max(counts)
        if left == 0:
            return
        while left:
            num = min(left, chunk or left)
            self.run_pass(stream, [min(max(count - left + num, 0), num) for count in counts], max_parts)
            left -= num
        self.check(stream)

    @rule(stream=STREAM, num=st.integers(1, 30))
    def feed_singly(self, stream, num):
        operations["feed one by one"] += 1
        stream = self.streams[stream % len(self.streams)]
        self.begin(stream, 1)
        for _ in range(num):
            self.run_pass(stream, [1] * len(stream.rows))
        self.check(stream)

    @rule(stream=STREAM, num=st.integers(1, 12))
    @torch.no_grad()
    def feed_unprepared(self, stream, num):
        """`model(ids, past_key_values=cache)`: exact, or refused."""
        stream = self.streams[stream % len(self.streams)]
        if stream.was_interrupted:
            return  # a pass that was prepared, and is still expected
        if self.is_ordered and stream.num_gone_by:
            return  # before the cache is asked, the model makes a bias for each of a billion tokens
        operations["unprepared"] += 1
        self.begin(stream, 1)
        ids, _ = self.tokens(stream, [num] * len(stream.rows))
        cache, before, last = stream.cache, stream.says(), stream.num_seen[0] + num
        may_refuse = (
            len(stream.rows) > 1
            or (num > 1 and last > min(*self.windows, self.window_length))
            or self.is_ordered
            or self.is_recurrent
            or (cache.traits.has_local_attention and not MODELS_ASK_FOR_QUERY_OFFSET)
            or any(cache.stream.base)
            or last > (cache.traits.max_positions or 2**24)
        )
        try:
            logits = self.model(ids, past_key_values=cache).logits
        except ValueError as error:
            assert may_refuse and "cache.prepare(" in str(error)
            assert stream.says() == before
            return
        assert not may_refuse
        stream.knows_ids, stream.returned = False, None
        self.count_recorded(stream, [num])
        self.advance(stream, [num], logits)
        self.check(stream)

    # Generating

    @rule(stream=STREAM, num_rows=st.sampled_from([1, 2, 3, 3]), turns=st.lists(TURN, min_size=1, max_size=3))
    def generate(self, stream, num_rows, turns):
        stream = self.streams[stream % len(self.streams)]
        self.begin(stream, num_rows)
        for turn in turns:
            self.turn(stream, **turn)

    def turn(self, stream, counts, num_new, how, chunk, num_copies, ends, by_token, padding, masked):
        """New tokens of the user, some each row, and a continuation. What is chosen is forced to stand in the table. Row i ends after
        `ends[i]` of them, if other rows go on: with a token that ends texts, or without. Behind it stands padding, a token like any
        other: `padding` says where in the text it stands, too."""
        rows, cache, W = stream.rows, stream.cache, self.window_length
        counts = [max(num, 1) for num in counts[: len(rows)]]
        num_copies = num_copies if num_copies * len(rows) <= MAX_ROWS else 1
        if how in ("new", "nothing"):
            counts = [1 if how == "nothing" else counts[0]] * len(rows)
        texts = [self.history(row) + row.next_tokens(num) for row, num in zip(rows, counts)]
        if not self.can_be_told(stream, texts, counts, how):
            return
        prompts = {"all": texts, "last": [text[-W:] for text in texts]}.get(how, [text[-n:] for text, n in zip(texts, counts)])
        after = [
            Row(row.text, (row.variant + copy) % NUM_VARIANTS) if copy else row for row in rows for copy in range(num_copies)
        ]
        forced = [
            TOKENS[row.variant][row.text.length + num :][:num_new] for row, num in zip(after, self.repeat(counts, num_copies))
        ]
        ends, eos = self.ends_of(forced, ends, by_token)
        pad = {
            "chosen": forced[0][0], "chosen last": forced[0][ends[0] - 1], "first": texts[0][0], "new": texts[-1][-counts[-1]],
            "returned": (stream.returned or [NO_TOKEN])[0], "end": eos[0],
        }.get(padding, NO_TOKEN)  # fmt: skip
        ids, mask = left_padded([torch.tensor([prompt]) for prompt in prompts])
        ids = torch.where(mask.bool(), ids, pad)
        is_inferred = not masked and self.padding_can_be_inferred(stream, texts, counts, how, pad, eos, bool(mask.all()))
        if how == "new with mask":
            mask = torch.cat([torch.ones(len(rows), max(stream.num_seen)), mask], 1).long()
        prompt = {} if how == "nothing" else {"inputs": ids} if is_inferred else {"inputs": ids, "attention_mask": mask}
        steps, num_columns = iter(range(num_new)), iter(range(1, num_new + 1))

        def stop(input_ids, scores, **kwargs):
            num = next(num_columns)
            return torch.tensor([num >= end for end in ends])

        def force(input_ids, scores):
            tokens = torch.tensor(forced)[:, next(steps), None]
            return torch.full_like(scores, -math.inf).scatter(1, tokens, 0.0)

        run = functools.partial(
            generate, **prompt, model=self.model, past_key_values=cache, max_new_tokens=num_new,
            prefill_chunk_size=chunk, logits_processor=[force], do_sample=num_copies > 1, num_return_sequences=num_copies,
            return_dict_in_generate=True, output_logits=True, stopping_criteria=[] if by_token else [stop], eos_token_id=eos,
            pad_token_id=pad,
        )  # fmt: skip
        if not self.continues(stream, how, prompts):
            return self.assert_refused(
                stream, run, "which the cache has not seen|has not been through the model|No prompt is passed"
            )
        may_refuse = is_inferred and any(pad in text for text in texts)
        before = stream.says()
        try:
            outputs = run()
        except ValueError as error:
            assert may_refuse and re.search(PADDING_CAN_NOT_BE_TOLD, str(error)) and stream.says() == before
            assert not self.padding_must_be_told(stream, texts, how, pad)
            operations["generate, refused for its padding"] += 1
            return
        self.count_generated(stream, how, by_token, is_inferred, pad, texts, [tokens[:end] for tokens, end in zip(forced, ends)])
        stream.was_interrupted, num_new = False, max(ends)
        stream.knows_ids = stream.knows_ids or not any(stream.num_seen)
        chosen = [tokens[:end] + [pad] * (num_new - end) for tokens, end in zip(forced, ends)]
        assert outputs.sequences[:, -num_new:].tolist() == chosen and outputs.past_key_values is cache
        self.advance(stream, counts, None)
        for index, row in enumerate(after):
            row.text = rows[index // num_copies].text
        stream.rows, logits = after, torch.stack(outputs.logits, 1)
        assert_same(logits[:, 0], torch.stack([row.text.logits for row in after]))
        logits = torch.stack([of_row[1:].roll(num_new - end, 0) for of_row, end in zip(logits, ends)])  # to their ends
        self.advance(stream, [end - 1 for end in ends], logits)
        if stream.recorded is not None:  # in passes of any length, which nobody tells us
            stream.recorded = [0] * len(after)
            cache.activate_past_recording()
        stream.returned = [tokens[end - 1] for tokens, end in zip(forced, ends)]
        self.check(stream)

    @staticmethod
    def ends_of(forced: list[list[int]], ends: list[int], by_token: bool) -> tuple[list[int], list[int]]:
        """After how many of its tokens each row ends, and which tokens end texts. Where they do, rows may end earlier than asked, and
        all of them before the last step."""
        num_new = len(forced[0])
        ends = [min(end, num_new) for end in ends[: len(forced)]]
        if not by_token:
            return ends if max(ends) == num_new else [num_new] * len(ends), [NO_TOKEN]
        eos = [tokens[end - 1] for tokens, end in zip(forced, ends)]
        return [1 + next(at for at, token in enumerate(tokens) if token in eos) for tokens in forced], eos

    @staticmethod
    def continues(stream: Stream, how: str, prompts: list[list[int]]) -> bool:
        """Whether a prompt of new tokens begins with those that were returned last."""
        if how == "nothing":
            return stream.returned is not None
        return "new" not in how or stream.returned in (None, [prompt[0] for prompt in prompts])

    @staticmethod
    def assert_refused(stream: Stream, run, match: str) -> None:
        before = stream.says()
        with pytest.raises(ValueError, match=match):
            run()
        assert stream.says() == before

    def padding_can_be_inferred(self, stream, texts, counts, how: str, pad: int, eos: list[int], has_none: bool) -> bool:
        """Whether a call without a mask can mean what it is meant to: the padding token is padding where it begins a row, unless it
        ends texts. (Of what the cache knows, it is a token all the same.)"""
        if how in ("new with mask", "nothing") or pad in eos:
            return has_none and how != "new with mask"
        returned = stream.returned or [None] * len(texts)
        if not any(stream.num_seen) or not stream.knows_ids:
            return all(text[0] != pad for text in texts)
        return how != "new" or all(text[-num] != pad or last == pad for text, num, last in zip(texts, counts, returned))

    def padding_must_be_told(self, stream, texts, how: str, pad: int) -> bool:
        """Whether it can be told from the text what is padding, without a mask: the padding token stands only in what the cache has
        seen or returned, and another token stands at the beginning, as far as that is known. (If the text begins with it and nothing
        was returned, all behind it may as well be new.)"""
        if how not in ("all", "new") or self.num_sinks == 0 or not stream.knows_ids or how == "new" and stream.returned is None:
            return False
        for row, text, last in zip(stream.rows, texts, stream.returned or [None] * len(texts)):
            seen = row.text.length
            known = text[: seen if seen <= self.window_length else self.num_sinks]
            if pad in text[seen + (last == pad) :] or all(token == pad for token in known) or text[0] == pad and last is None:
                return False
        return True

    @staticmethod
    def count_generated(stream, how, by_token, is_inferred, pad, texts, chosen) -> None:
        operations[f"generate, {how}"] += 1
        have_ended, stream.have_ended = stream.have_ended and stream.returned is not None, len({len(each) for each in chosen}) > 1
        also = {
            "rows end with a token": by_token and stream.have_ended,
            f"{how} after rows that ended": have_ended,
            "padding is generated": any(pad in tokens for tokens in chosen),
            "padding is text": any(pad in text for text in texts),
            "padding is text, without a mask": is_inferred and any(pad in text for text in texts),
        }
        generated.update(name for name, is_so in also.items() if is_so)

    @staticmethod
    def repeat(values: list, num: int) -> list:
        return [value for value in values for _ in range(num)]

    def history(self, row: Row) -> list[int]:
        return row.text.tokens

    def can_be_told(self, stream: Stream, texts: list[list[int]], counts: list[int], how: str) -> bool:
        """Whether what is passed can mean one thing only."""
        W, cache = self.window_length, stream.cache
        if how == "all":
            is_known = stream.knows_ids or cache.num_tokens_seen == 0 or stream.returned is None
            return not stream.num_gone_by and (is_known or all(text[0] != id for text, id in zip(texts, stream.returned)))
        if how == "nothing":
            return cache.num_tokens_seen > 0 and stream.returned in (None, [text[-1] for text in texts])
        if how == "new with mask":
            return not stream.num_gone_by and cache.num_tokens_seen > 0
        if not stream.knows_ids:
            return False
        for row, text, num, returned in zip(stream.rows, texts, counts, stream.returned or [NO_TOKEN] * len(texts)):
            seen = row.text.length
            recent = text[:seen][-(seen if seen <= W else W - self.num_sinks) :]
            first = text[: min(seen, self.num_sinks)]
            new = text[-num:]
            if how == "new":
                is_short = len(new) <= stream.num_gone_by + seen and len(new) != W
                ends = [at for at in range(2, num) if new[at] == returned and len(recent) > 1]
                repeats = any(new[max(at - len(recent), 0) : at] == recent[-min(at, len(recent)) :] for at in ends)
                if not is_short or repeats or (first and new[: len(first)] == first[: len(new)]):
                    return False
                continue
            passed = text[-W:]
            if len(text) + stream.num_gone_by <= W:
                continue  # it is the whole text
            ends = [end for end in range(1, W) if passed[max(end - len(recent), 0) : end] == recent[-min(end, len(recent)) :]]
            if num >= W or not ends or max(ends) != W - num or passed[0] == returned != new[0]:
                return False
        return True

    # One cache becomes another

    @precondition(lambda self: len(self.streams) < MAX_STREAMS)
    @rule(stream=STREAM, offset=st.integers(0, NUM_VARIANTS - 1))
    def branch(self, stream, offset):
        """Both live on."""
        operations["branch"] += 1
        self.streams.append(self.started(stream).branch(offset))

    @rule(stream=STREAM, chance=st.integers(0, 5))
    def reset(self, stream, chance):
        if chance < 5:
            return  # else most runs are short
        operations["reset"] += 1
        stream = self.started(stream)
        stream.cache.reset()
        assert stream.cache.num_tokens_seen == 0 and stream.cache.batch_size == -1
        self.streams[self.streams.index(stream)] = Stream(stream.cache)

    @rule(stream=STREAM, data=st.data(), how=st.sampled_from(["reorder", "repeat", "select", "select by mask"]))
    def choose_rows(self, stream, data, how):
        stream = self.started(stream)
        num_rows = len(stream.rows)
        operations[f"rows: {how}"] += 1
        if how == "repeat":
            repeats = data.draw(st.integers(1, MAX_ROWS // num_rows))
            chosen = self.repeat(range(num_rows), repeats)
            stream.cache.batch_repeat_interleave(repeats)
        elif how == "select by mask":
            mask = data.draw(st.lists(st.booleans(), min_size=num_rows, max_size=num_rows).filter(any))
            chosen = [row for row in range(num_rows) if mask[row]]
            stream.cache.batch_select_indices(torch.tensor(mask))
        else:
            max_size = num_rows if how == "reorder" else MAX_ROWS
            chosen = data.draw(
                st.lists(st.integers(0, num_rows - 1), min_size=num_rows if how == "reorder" else 1, max_size=max_size)
            )
            (stream.cache.reorder_cache if how == "reorder" else stream.cache.batch_select_indices)(torch.tensor(chosen))
        before = stream.rows
        stream.rows = [Row(before[row].text, (before[row].variant + index) % NUM_VARIANTS) for index, row in enumerate(chosen)]
        if stream.recorded is not None:
            stream.recorded = [0] * len(chosen)
        if stream.returned is not None:
            stream.returned = [stream.returned[row] for row in chosen]
        self.check(stream)

    @rule(stream=STREAM)
    def save_and_load(self, stream):
        stream = self.started(stream)
        if stream.recorded is not None:
            return
        operations["save and load"] += 1
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "cache")
            before = stream.says()
            try:
                stream.cache.save(path)
            except ValueError as error:
                assert stream.was_interrupted and "in the middle of a pass" in str(error)
                assert stream.says() == before and not os.listdir(folder)
                return
            stream.cache = SinkCache.load(path, self.model)
        if not any(stream.num_seen):  # a file of no tokens makes a new cache, for any number of rows
            assert stream.cache.num_tokens_seen == 0 and stream.cache.batch_size == -1
            self.streams[self.streams.index(stream)] = Stream(stream.cache)
            return
        self.check(stream)

    @rule(stream=STREAM, power=st.integers(4, 9))
    def let_tokens_go_by(self, stream, power):
        """The counters of a cache that is full, and has been for long: slots and positions are as they would be then."""
        stream = self.started(stream)
        if stream.recorded is not None:
            return
        missing = [max(self.window_length + 1 - seen, 0) for seen in stream.num_seen]
        self.run_pass(stream, [max(missing)] * len(missing) if self.is_recurrent else missing)
        operations["let tokens go by"] += 1
        lap = math.lcm(self.window_length - self.num_sinks, self.window_length, *self.windows)
        num = max(10**power // lap, 1) * lap
        move_ahead(stream.cache, num)
        stream.num_gone_by += num
        self.check(stream)

    # Roll-back

    @rule(stream=STREAM, is_on=st.booleans())
    def record(self, stream, is_on):
        stream = self.started(stream)
        if is_on:
            operations["record"] += 1
            stream.cache.activate_past_recording()
            stream.recorded = [0] * len(stream.rows)
        elif stream.recorded is not None:  # as assisted decoding does at its end
            operations["stop recording"] += 1
            stream.cache.crop(0)
            for layer in stream.cache.layers:
                layer.record_past = False
            stream.recorded = None

    @rule(stream=STREAM, num=st.integers(0, 12), offset=st.integers(0, NUM_VARIANTS - 1), counted=st.booleans())
    def crop(self, stream, num, offset, counted):
        """Take tokens back, and go on with others. What was not recorded is restored exactly all the same, or refused."""
        operations["crop"] += 1
        stream = self.started(stream)
        num_seen, before = stream.num_seen, stream.says()
        counted = counted and num < max(num_seen)
        must_fail = num > min(num_seen) or (num > 0 and self.is_recurrent)
        must_work = not must_fail and (num == 0 or self.is_recorded(stream, num))
        try:
            stream.cache.crop(max(num_seen) - num if counted else -num)
        except ValueError as error:
            assert "take back" in str(error) and not must_work
            assert stream.says() == before
            return
        assert not must_fail
        for row in stream.rows:
            for _ in range(num):
                row.text = row.text.before
            if num > 0:
                row.variant = (row.variant + offset) % NUM_VARIANTS
        if stream.recorded is not None:
            stream.recorded = [0] * len(stream.rows)
        stream.returned = stream.returned if num == 0 else None
        self.check(stream)

    def is_recorded(self, stream: Stream, num: int) -> bool:
        return max(stream.num_seen) <= min(*self.windows, self.window_length) or (
            stream.recorded is not None and min(stream.recorded) >= num
        )

    # What goes wrong

    def interruption(self, layer: int):
        """Before this layer; behind the last one if it is none."""
        layers = next(m for m in self.model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == len(self.windows))
        return interrupted_at(layers[layer] if layer < len(layers) else self.model.get_output_embeddings())

    @rule(stream=STREAM, num_rows=st.integers(1, 3), counts=COUNTS, layer=st.integers(0, 3), offset=st.integers(0, 1))
    @torch.no_grad()
    def interrupt(self, stream, num_rows, counts, layer, offset):
        """Ctrl-C in a pass. The next try, with these tokens or others, finds all as it was; or is told that it can't."""
        stream = self.streams[stream % len(self.streams)]
        self.begin(stream, num_rows)
        counts = self.fitting(stream, counts)
        if max(counts) == 0:
            return
        layer = min(layer, len(self.windows))
        ids, mask = self.tokens(stream, counts)
        cache = stream.cache
        stream.knows_ids = stream.knows_ids or not any(stream.num_seen)
        try:
            inputs = cache.prepare(ids, mask)
        except ValueError:  # see `run_pass`
            return
        operations["interrupt"] += 1
        stream.returned = None
        with self.interruption(layer):
            self.model(**inputs)
        stream.was_interrupted = layer < len(self.windows)
        if not stream.was_interrupted:  # all keys are there
            self.count_recorded(stream, counts)
            return self.advance(stream, counts, None)
        assert cache.num_tokens_seen_by_row == stream.num_seen
        if self.is_recurrent or layer > 0 and self.evicts(stream, counts):
            with pytest.raises(ValueError, match="can.t be repeated"):
                cache.prepare(ids[:, -1:])
            return self.reset(self.streams.index(stream), chance=5)
        for row in stream.rows:
            row.variant = (row.variant + offset) % NUM_VARIANTS

    @rule(stream=STREAM, which=st.integers(0, 8))
    def refuse(self, stream, which):
        """Bad input changes nothing."""
        operations["refuse"] += 1
        stream = self.streams[stream % len(self.streams)]
        cache, before = stream.cache, stream.says()
        num_rows = max(cache.batch_size, 1)
        ids = torch.full((num_rows, 3), 5)
        bad = [
            lambda: cache.prepare(ids[:, :0]),
            lambda: cache.prepare(ids, torch.tensor([[1, 0, 1]]).expand(num_rows, -1)),
            lambda: cache.prepare(ids, torch.ones(num_rows, 2)),
            lambda: cache.prepare(ids, torch.ones(num_rows + 1, 3)),
            lambda: cache.prepare(ids.repeat(2, 1)) if cache.is_initialized else cache.prepare(None),
            lambda: cache.crop(-cache.num_tokens_seen - 1),
            lambda: generate(ids, model=self.model, past_key_values=cache, window_length=self.window_length + 1),
            lambda: generate(ids, attention_mask=torch.tensor([[1, 1, 0]]).expand(num_rows, -1), model=self.model, past_key_values=cache),
            lambda: generate(ids.repeat(3, 1), model=self.model, past_key_values=cache) if cache.is_initialized else cache.prepare(None),
        ][which]  # fmt: skip
        with pytest.raises(ValueError):
            bad()
        assert stream.says() == before

    # What it says of itself

    def check(self, stream: Stream) -> None:
        cache, W = stream.cache, self.window_length
        assert cache.num_tokens_seen_by_row == stream.num_seen
        assert cache.num_tokens_seen == cache.get_seq_length() == max(stream.num_seen)
        assert cache.unseen_token_ids == stream.returned
        assert cache.num_tokens_held == min(max(stream.num_seen), W)
        assert cache.batch_size == len(stream.rows)
        for index, row in enumerate(stream.rows):
            known = cache.known_token_ids(index)
            if not stream.knows_ids:
                assert known is None
            elif known is not None:
                text, seen = row.text.tokens, row.text.length
                recent = text if seen <= W else text[-(W - self.num_sinks) :]
                assert [ids.tolist() for ids in known] == [text[: self.num_sinks], recent]
            else:
                assert cache.num_tokens_seen == 0
        if stream.recorded is None and not stream.was_interrupted and not self.is_recurrent:
            assert cache.num_bytes_held <= self.most_bytes(len(stream.rows))

    def most_bytes(self, num_rows: int) -> int:
        """Of keys and values that are kept, and sinks twice as they came; ids; and what does not grow with the rows' length."""
        total = 0
        for layer, window in zip(self.streams[0].cache.traits.layers, self.windows):
            num_slots = window if self.static else min(window, max(window, MIN_SLOTS))
            for heads, head_dim in layer.shapes:
                total += num_rows * heads * head_dim * (num_slots + 2 * self.num_sinks)
                total += 2 * head_dim * (1 + self.num_sinks * (NUM_SHIFTS_AHEAD + 2 * num_rows)) + num_rows * (
                    window + 2 * self.num_sinks + 8
                )
        return 4 * total + 8 * num_rows * self.window_length

    def teardown(self):
        """All go on: a step, a pass over several tokens, steps."""
        for stream in self.streams if sys.exc_info()[0] is None else ():
            if stream.cache.is_initialized:
                for num in (1, 6, 1, 1):
                    self.run_pass(stream, [num] * len(stream.rows))
                self.check(stream)


def test_whatever_is_done_the_next_logits_are_those_of_the_oracle(capsys):
    """Would catch what no list of cases thinks of: two operations that are right by themselves, in an order that is not."""
    operations.clear()
    generated.clear()
    start = time.perf_counter()
    is_long = "FUZZ_OPERATIONS" in os.environ
    try:
        run_state_machine_as_test(
            CacheMachine,
            settings=settings(
                max_examples=max(NUM_OPERATIONS // OPERATIONS_A_RUN, 1),
                stateful_step_count=OPERATIONS_A_RUN,
                derandomize=not is_long,
                database=None,
                deadline=None,
                report_multiple_bugs=False,
                phases=[Phase.generate, Phase.shrink] if SHRINK else [Phase.generate],
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        with capsys.disabled():
            counts = ", ".join(f"{name} {num}" for name, num in operations.most_common())
            print(f"\n{operations.total()} operations in {time.perf_counter() - start:.0f} s: {counts}")
            print("generated: " + ", ".join(f"{name} {num}" for name, num in generated.most_common()))
    assert operations.total() >= NUM_OPERATIONS // 4


@pytest.mark.parametrize("name", ["llama", "gemma3", "bloom", "lfm2"])
def test_the_growing_oracle_is_the_oracle(name):
    """Also where two texts branch, and where they end."""
    if name not in [each for each, _ in MODELS]:
        pytest.skip(f"refused with transformers {TRANSFORMERS}")
    model = build_zoo_model(name) if name in RECURRENT else build_model(name)
    oracle = GrowingOracle(model, 10, 3)
    beginning = random_ids(15)
    for seed in (2, 3):
        ids = torch.cat([beginning, random_ids(30, seed=seed)], dim=1)
        text, logits = oracle.empty, []
        for token in ids[0].tolist():
            text = oracle.append(text, token)
            logits.append(text.logits)
        torch.testing.assert_close(torch.stack(logits)[None], oracle_logits(model, ids, 10, 3), rtol=0, atol=1e-5)
    assert oracle.num_computed == 15 + 2 * 30 and text.tokens == ids[0].tolist()
