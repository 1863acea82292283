"""How a text comes to a cache: its prompt in chunks, and then what the model's own `generate` has chosen."""

import contextlib
import copy
import functools

import torch
from transformers import StoppingCriteriaList

from .doors import count_tokens
from .options import PICTURES, TOKEN_TYPES, refusal, without_our_options
from .prompt import SEE_EACH_OTHER, Prompt
from .releases import CACHE_NAME, CACHE_NAMES, input_device, shallow_copy, stop_counting, uncompiled_copy

# Tokens of a prompt that go through the model in one pass: while the window is filling, once it is full, and where it is full but
# the pass can't come in parts. There is one moved copy of the sinks for each token: with many sinks, passes are shorter.
DEFAULT_PREFILL_CHUNK_SIZES = (1024, 512, 128)
MAX_SINK_COPIES = 4 * 512
# Arguments of a forward pass that `SinkCache.prepare` makes.
PREPARED_INPUTS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position", *CACHE_NAMES)


class Feed(contextlib.AbstractContextManager):
    """Gives the model's own `generate` a view of the model whose forward passes take their inputs from here. As a context manager
    it leaves a consistent cache behind, whatever happens.

    Attributes:
        prompt: what the cache has not seen yet.
        chunk_size: tokens of the prompt in one pass; None for what is fastest.
        is_synced: other processes have passes when this one has, for as long as one of them needs any (`synced_gpus`).
        num_last: tokens of the prompt that `generate` begins with. None: as many as go through in one pass.
        shortest_pass: 1 column, or 2 if the model computes a single token in another way than several (and nobody asks for it).
        num_padding_columns: columns of input_ids that the cache never counted: a constant, once the prompt has been fed.
        is_idle: this text has ended, and texts of other processes have not.
        stopped: which rows the stopping criteria have ended last, `[rows]`, and the number of columns then.
        ends: of rows that have ended, the number of columns up to their end. What `generate` feeds behind it is padding.
        sequences: what `generate` has returned. None if it was interrupted.
    """

    num_last: int | None = None
    has_rows_that_end = True

    def __init__(self, model: torch.nn.Module, cache, prompt: Prompt | None, chunk_size: int | None, is_synced: bool = False):
        self.model, self.cache, self.prompt, self.chunk_size, self.is_synced = model, cache, prompt, chunk_size, is_synced
        self.num_padding_columns, self.is_idle, self.sequences = None, False, None
        self.stopped, self.ends = None, {}
        self.shortest_pass = 1 if cache.traits.splits_exactly or chunk_size == 1 else 2
        self.before = cache.num_tokens_seen_by_row, cache.unseen_token_ids

    def __exit__(self, *error) -> None:
        cache, sequences = self.cache, self.sequences
        if sequences is not None:
            self._note_ends()
            num_rows, num_columns = sequences.shape
            last = [self.ends.get(row, num_columns) - 1 for row in range(num_rows)]
            has_last = num_columns > 0 and num_rows == cache.batch_size
            cache.unseen_token_ids = sequences[range(num_rows), last].tolist() if has_last else None
            return
        (num_seen, unseen), now = self.before, cache.num_tokens_seen_by_row
        num_copies = len(now) // len(num_seen)
        if not any(now) and cache.is_initialized:  # no pass has ended: another batch may come
            is_recording = cache.stream.is_recording
            cache.reset()
            cache.stream.is_recording = is_recording
        elif now == [num for num in num_seen for _ in range(num_copies)]:
            with contextlib.suppress(ValueError):  # a pass that can't be repeated: who comes next is told
                if num_copies > 1:
                    cache.batch_select_indices(torch.arange(0, len(now), num_copies))
                cache.unseen_token_ids = unseen

    def view(self) -> torch.nn.Module:
        """A shallow copy of the model that shares all of it, but takes the inputs of its forward passes from here. The model
        stays as it is, whatever happens; and several threads can have views of one model."""
        model, view = self.model, shallow_copy(self.model)
        view.generation_config = without_our_options(model.generation_config)

        @functools.wraps(model.prepare_inputs_for_generation)
        def prepare_inputs_for_generation(input_ids, *args, **kwargs):
            others = model.prepare_inputs_for_generation(input_ids[:, -1:], *args, **kwargs | {CACHE_NAME: None})
            others = {name: value for name, value in others.items() if not (name in PREPARED_INPUTS or name.startswith(PICTURES))}
            return others | self._inputs_of_next_pass(input_ids, others)

        def update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs):
            # These would be made longer with each token, and the cache has no need of them.
            kept = {name: value for name, value in model_kwargs.items() if name not in ("attention_mask", "position_ids")}
            updated = model._update_model_kwargs_for_generation(outputs, kept, *args, **kwargs)
            if "cache_position" in updated:
                updated["cache_position"] = updated["cache_position"][-1:]
            return updated

        def get_stopping_criteria(*args, **kwargs):
            criteria = model._get_stopping_criteria(*args, **kwargs)
            # Without a token that ends texts, transformers goes on with the text of a row that has ended, not with padding.
            has_padding = self.has_rows_that_end and any(hasattr(each, "eos_token_id") for each in criteria)
            return NotedCriteria(criteria, self) if has_padding else criteria

        def has_unfinished_sequences(this_peer_finished, *args, **kwargs):
            self.is_idle = self.is_synced and bool(this_peer_finished)
            return model._has_unfinished_sequences(this_peer_finished, *args, **kwargs)

        view.prepare_inputs_for_generation = prepare_inputs_for_generation
        view._update_model_kwargs_for_generation = update_model_kwargs_for_generation
        view._get_stopping_criteria = get_stopping_criteria
        view._has_unfinished_sequences = has_unfinished_sequences
        stop_counting(view)
        return view

    def _inputs_of_next_pass(self, input_ids: torch.Tensor, others: dict) -> dict:
        device = input_device(self.model)
        if self.is_idle:
            return {"input_ids": input_ids[:, -1:].to(device), "use_cache": False}
        if self.num_padding_columns is None:
            return self.first_pass(input_ids, others)
        self._note_ends()
        if self.ends:  # all rows: a step that is taken back
            is_token = torch.tensor([[len(self.ends) == len(input_ids) or row not in self.ends] for row in range(len(input_ids))])
            return self.cache.prepare(input_ids[:, -1:].to(device), is_token)
        return self.cache.prepare(input_ids[:, self.num_padding_columns + self.cache.get_seq_length() :].to(device))

    def _note_ends(self) -> None:
        """Read which rows have ended. Not at once: `generate` itself waits for the device first."""
        if self.stopped is not None:
            (has_ended, num_columns), self.stopped = self.stopped, None
            self.ends = {row: num_columns for row, ended in enumerate(has_ended.tolist()) if ended} | self.ends

    def first_pass(self, input_ids: torch.Tensor, others: dict) -> dict:
        """Feeds the prompt. Returns the inputs of its last pass, the first one of which `generate` knows."""
        chunk = self.last_chunk(self.all_but_last_chunk(others), input_ids)
        num_copies = len(input_ids) // len(chunk.tokens)
        if num_copies > 1:
            chunk = chunk.repeat(num_copies)
            self.cache.batch_repeat_interleave(num_copies)
        inputs = self.cache.prepare(**chunk.arguments)
        self.num_padding_columns = input_ids.shape[1] - max(self.cache.stream.current.num_after)
        return inputs

    def last_chunk(self, chunk: Prompt, input_ids: torch.Tensor) -> Prompt:
        """The last chunk of the prompt, when all others are in the cache: other kinds of feeds prepare for the text here."""
        return chunk

    def all_but_last_chunk(self, others: dict) -> Prompt:
        """Run the prompt through the model but for its last chunk, which is returned. Each pass takes `others`, too."""
        cache, device = self.cache, input_device(self.model)
        rest = self.prompt.changed(lambda each: each.to(device))
        others = {name: value for name, value in others.items() if not name.startswith("output_")}
        uncompiled = uncompiled_copy(self.model)
        while True:
            is_unpadded = rest.mask is None or bool(rest.mask[:, 0].all())  # padding is on the left
            takes_parts = cache.takes_parts and is_unpadded and not rest.pictures
            part_length = cache.window.part_length if takes_parts else rest.num_columns
            edges = self._edges(rest)
            shortest = 1 if edges or rest.pictures else self.shortest_pass
            size = min(self._longest_pass(rest, takes_parts), *edges, rest.num_columns)
            longest_last = max(min(size, part_length), 2 * shortest - 1)
            is_last = not rest.pictures and rest.num_columns <= (self.num_last or longest_last)
            if not self.model._has_unfinished_sequences(is_last, synced_gpus=self.is_synced, device=rest.tokens.device):
                return rest
            if is_last:  # a pass that only keeps step: where weights are sharded, no process can run the model alone
                uncompiled(**others | {rest.name: rest.tokens[:, -1:], "use_cache": False})
                continue
            size = min(size, rest.num_columns - (self.num_last or shortest))
            chunk, rest = rest.split(size - size % part_length if size > part_length else size)
            inputs = cache.prepare(**chunk.arguments, num_parts=cache.num_parts_of(chunk.num_columns) if takes_parts else 1)
            if inputs["attention_mask"] is not None and not chunk.pictures.keys().isdisjoint(TOKEN_TYPES):
                raise refusal(max(chunk.pictures), SEE_EACH_OTHER)
            uncompiled(**others | chunk.pictures | inputs)

    def _longest_pass(self, rest: Prompt, takes_parts: bool) -> int:
        """How many columns of the rest of the prompt may come in one pass, and are fastest so."""
        cache, traits = self.cache, self.cache.traits
        filling, full, undivided = DEFAULT_PREFILL_CHUNK_SIZES
        if rest.pictures:
            return rest.num_columns
        if cache.num_tokens_seen < cache.window_length:
            size = filling if traits.splits_exactly else cache.window_length  # at once, as transformers does
        else:
            size = max(min(full, MAX_SINK_COPIES // max(cache.num_sink_tokens, 1)), undivided) if takes_parts else undivided
        return max(min(self.chunk_size or size, cache.num_columns_at_once), self.shortest_pass)

    def _edges(self, rest: Prompt) -> list[int]:
        """Columns where a pass has to end: with recurrent states, a row that goes on has to be all padding, or to have none."""
        if not self.cache.traits.is_recurrent or rest.mask is None:
            return []
        rows = zip(self.cache.num_tokens_seen_by_row, count_tokens(rest.mask))
        edges = [rest.num_columns - num_new for num_seen, num_new in rows if num_seen > 0]
        return [edge for edge in edges if 0 < edge < rest.num_columns]


class NotedCriteria(StoppingCriteriaList):
    """Stopping criteria that tell a feed of several rows which of them have ended."""

    def __init__(self, criteria: StoppingCriteriaList, feed: Feed):
        super().__init__(criteria)
        self.feed = feed

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        has_ended = super().__call__(input_ids, scores, **kwargs)
        if len(input_ids) > 1:
            self.feed.stopped = has_ended, input_ids.shape[1]
        return has_ended


class BeamFeed(Feed):
    """For beams, which go on with a copy of the cache: it ends as the beams of the last step, not as the returned sequences. The
    cache itself is left with the prompt but for its last token, in as many rows as are returned."""

    num_last = 1
    has_rows_that_end = False  # beams that have ended are kept elsewhere, and others take their rows

    def last_chunk(self, chunk: Prompt, input_ids: torch.Tensor) -> Prompt:
        self.original, self.num_columns = self.cache, input_ids.shape[1]
        self.cache = copy.deepcopy(self.cache)
        return chunk

    def __exit__(self, *error) -> None:
        if self.num_padding_columns is not None:
            self.cache = self.original
        if self.sequences is not None:
            if self.cache.is_initialized:
                self.cache.batch_repeat_interleave(len(self.sequences) // self.cache.batch_size)
            self.sequences = self.sequences[:, : self.num_columns]  # no columns for embeddings: their last token has no id
        super().__exit__(*error)
