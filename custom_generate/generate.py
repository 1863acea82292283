"""Text of any length from a cache that never holds more than `window_length` tokens: attention sinks + recent tokens.

    model.generate(**inputs, custom_generate="org/sink_cache", trust_remote_code=True, window_length=256, num_sink_tokens=4)

The method is StreamingLLM (https://arxiv.org/abs/2309.17453). Of the tokens seen so far, the cache holds

    [ 0 .. num_sink_tokens - 1 | the most recent ones ]        window_length in all, the newest included

and the model sees them as if they were numbered 0 .. window_length - 1. It does not see further back than that: the context
does not get longer, the text does. While nothing has been evicted, the logits are those of `DynamicCache`.

One token: `prepare` decides what the pass does (`Pass`, and a `Plan` for each window) and moves the sinks to where its query
needs them. The model then calls `update` for each attention layer: the key and the value are written to a slot, and all slots are
handed out. After the last layer, `Stream.commit` counts the token as seen.

Read in this order: `window.py` (where a token is stored), `rotation.py` (how a key moves), `plan.py` (what one forward pass
does), `layers.py` (which carry it out), `SinkCache` and `generate` here; then `sinks.py` (which moves the sinks), `stream.py`
(which opens and ends a pass) and `feed.py` (which calls `prepare` for each pass of a text). What differs between models
stands in `models.py` and `probe.py`, between releases in `releases.py`; a kind of window is a `Stream` that `bind` chooses.

Nothing opens a connection, changes anything global, or leaves anything on the model. No file is opened but the file whose path is
passed to `SinkCache.load`, or to `SinkCache.save`, which writes a file beside it first.
"""

import contextlib
import copy
import functools
import os
import threading
import weakref

import torch
from transformers import GenerationConfig

# transformers up to 5.5 copies only the modules that THIS file imports: name all of them here.
from .doors import (
    check_arguments,
    check_crop,
    check_keys,
    check_parts,
    check_pass,
    check_rows,
    check_tokens,
    check_unprepared,
    in_use,
)
from .drafting import DraftFeed, check_drafting, drafting_model
from .feed import BeamFeed, Feed
from .guidance import Guidance, with_processors
from .inputs import ModelInputs
from .layers import SinkLayer  # noqa: F401
from .models import check_mode, check_model, check_same
from .offloaded import OffloadedStream
from .options import Call
from .plan import Pass  # noqa: F401
from .probe import model_traits
from .prompt import unseen_part, whole_prompt, with_pictures
from .quantized import Quantization, QuantizedStream
from .reading import ReadableCache
from .recurrent import RecurrentStates, layers_of_model
from .releases import CACHE_NAME, NotesRecurrentLayers, unwrapped
from .rotation import Rotation  # noqa: F401
from .saving import load_cache, save_cache
from .sinks import Sinks  # noqa: F401
from .static import StaticStream
from .stream import Stream
from .views import check_attention, model_for, view_of, viewed
from .window import Window  # noqa: F401
from .workspace import Workspace  # noqa: F401

DEFAULT_WINDOW_LENGTH = 256
DEFAULT_NUM_SINK_TOKENS = 4


class SinkCache(NotesRecurrentLayers, ReadableCache):
    """A key/value cache that holds the first `num_sink_tokens` and the most recent tokens, `window_length` in all.

    A layer whose native sliding window is not longer than `window_length` keeps that window as it is, without sinks: the model
    was trained so. Every other attention layer gets sinks and window. Recurrent and convolutional states stay as they are.

    To move the sinks, the cache has to know how the model encodes positions. `generate` tells it. In a loop of your own:

        cache = SinkCache.from_model(model, window_length=256, num_sink_tokens=4)
        logits = model(**cache.prepare(input_ids)).logits        # any number of new tokens, padded batches too
        logits = model(input_ids, past_key_values=cache).logits  # one row; one token at a time once the window is full

    With the second form the model counts positions by itself, without an end. `prepare` keeps positions small, and so exact in
    float32 for texts of any length.

    Args:
        window_length: tokens held, the sinks and the newest token included.
        num_sink_tokens: how many of the first tokens are never evicted. 0 makes a plain sliding window.
        static: slots are allocated at once and never move, so that `torch.compile` makes one graph for all tokens.
        quantized: options of `Quantization` ({} for the defaults). All but the sinks and the most recent tokens is quantized;
            layers with native windows too short for that stay as they are.
        offloaded: all but the sinks is kept in the memory of the host.

    Attributes:
        unseen_token_ids: the last token that `generate` returned for each row, which is not yet processed; None if there is none.
        num_padding_columns: columns of `input_ids` that the cache never counted, because they are padding in every row. `crop`
            needs the number while `generate` counts all columns.

    Raises:
        ValueError: the numbers make no window, or the options don't go together.
        ImportError: the package that quantizes is not installed.
    """

    def __init__(
        self,
        window_length: int = DEFAULT_WINDOW_LENGTH,
        num_sink_tokens: int = DEFAULT_NUM_SINK_TOKENS,
        static: bool = False,
        quantized: dict | None = None,
        offloaded: bool = False,
    ):
        modes = {"static": static, "quantized": quantized is not None, "offloaded": offloaded}
        check_arguments(window_length, num_sink_tokens, **modes)
        self.quantization = None if quantized is None else Quantization.of(quantized)
        if quantized is not None:
            self.quantization.check_window(window_length, num_sink_tokens)
            quantized = vars(self.quantization)
        super().__init__(layers=[])
        self.window_length, self.num_sink_tokens = window_length, num_sink_tokens
        self.is_static, self.is_offloaded = static, offloaded
        sizes = {"window_length": window_length, "num_sink_tokens": num_sink_tokens}
        self.arguments = sizes | modes | {"quantized": quantized}
        self.reset()

    @classmethod
    def from_model(cls, model: torch.nn.Module, *args, **kwargs) -> "SinkCache":
        """A cache for this model; further arguments are those of `SinkCache`, and errors those of both and of `bind`."""
        cache = cls(*args, **kwargs)
        cache.bind(model)
        return cache

    model_for = staticmethod(model_for)

    def empty_like(self) -> "SinkCache":
        """A new cache of the same window and kind, which serves no model yet."""
        return type(self)(**self.arguments)

    def bind(self, model: torch.nn.Module) -> None:
        """Tell the cache which model it serves: once, before its first token.

        Raises:
            ValueError: the rules can't be kept for this model, or the cache serves another one.
        """
        called = unwrapped(model)
        config, model = called.config.get_text_config(decoder=True), viewed(called)
        check_attention(config)
        if self.traits is not None:
            check_mode(model)
            check_same(model, self.model_ref(), *self._bound_as)
            self.inputs.config = config
            return
        traits = model_traits(model, self.window_length)
        kind = StaticStream if self.is_static else OffloadedStream if self.is_offloaded else Stream
        if self.quantization is not None:
            kind = functools.partial(QuantizedStream, quantization=self.quantization)
        stream = kind(self.window, {index: layer for index, layer in enumerate(traits.layers) if layer is not None})
        check_model(model, traits, {index: layer.window for index, layer in stream.layers.items()}, self.is_static)
        self.traits, self.stream, self.inputs = traits, stream, ModelInputs(model, config, traits, stream)
        self.model_ref, self._bound_as = weakref.ref(model), (model.dtype, model.device)
        self._make_layers()

    def _make_layers(self) -> None:
        self.layers = layers_of_model(self.inputs.config, self.stream.layers)
        self.recurrent = RecurrentStates(self.layers)

    # One forward pass

    def prepare(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        num_parts: int = 1,
    ) -> dict:
        """The arguments with which the model takes the next tokens: `model(**cache.prepare(input_ids))`.

        Args:
            input_ids: the new tokens, `[batch, num_columns]`. Rows may go on by different numbers of tokens, padded on the left.
            attention_mask: 1 for a token and 0 for padding, for the new columns or for all so far: only the last ones are read.
            inputs_embeds: embeddings in place of ids, `[batch, num_columns, hidden]`.
            num_parts: for long passes over a full window, which are faster if the model takes each row as so many: its logits
                then are `[batch * num_parts, num_columns / num_parts, vocab]`. `num_parts_of` says how many are best.

        Raises:
            ValueError: what is passed does not fit to the cache or can't be processed exactly. The cache is as before.
        """
        if input_ids is not None and inputs_embeds is not None:
            raise ValueError("input_ids and inputs_embeds are two forms of the same tokens, and could differ. Pass one of them.")
        tokens, name, num_dims = (input_ids, "input_ids", 2) if inputs_embeds is None else (inputs_embeds, "inputs_embeds", 3)
        if self.stream is None:
            self.require_model()
        num_new = check_tokens(tokens, num_dims, attention_mask, self)
        if num_parts is True or num_parts != 1:
            check_parts(tokens.shape[1], num_new, num_parts, self.takes_parts)
        if self.is_static:  # a graph is made for one memory layout, and the ids are read once more when the next pass begins
            tokens = tokens.clone(memory_format=torch.contiguous_format)
        input_ids = tokens if inputs_embeds is None else None
        self._begin(*tokens.shape[:2], num_new, num_parts=num_parts, input_ids=input_ids)
        return self.inputs.of_pass(tokens, name) | {self.inputs.cache_name: self}

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs) -> tuple:
        """Called by attention layers: `[batch, heads, num_columns, head_dim]` -> `[batch, heads, kv_length, head_dim]`."""
        if self.stream is None:
            self.require_model()
        if torch.is_grad_enabled():  # what is held has no history: gradients end here
            key_states, value_states = key_states.detach(), value_states.detach()
        stream, layer = self.stream, self.stream.layers[layer_idx]
        # A compiled graph has no place for checks: `prepare` has checked what it may be called for.
        if layer_idx == stream.first_layer and (stream.current is None or not layer.plan.is_in_tensors):
            self._enter(key_states, value_states)
        handed_out = layer.update(key_states, value_states)
        if layer_idx == stream.last_layer:
            stream.commit()
        return handed_out

    def _enter(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """The first layer is reached: by the pass that was prepared, or by a pass that the model begins by itself."""
        stream, current, (num_rows, _, num_columns, _) = self.stream, self.stream.current, key_states.shape
        prepared = current if current is not None and current.is_prepared and not stream.has_begun else None
        check_keys(key_states, value_states, stream.rings[0].slots, prepared)
        if prepared is None:
            check_unprepared(self.traits, stream, num_columns, max(num_rows, stream.batch_size))
            self._begin(num_rows, num_columns, [num_columns], is_prepared=False)
        stream.has_begun = True

    @torch.inference_mode(False)  # what is made here may be changed in any mode
    def _begin(self, batch_size: int, num_columns: int, num_new: list[int], num_parts=1, input_ids=None, is_prepared=True):
        """Decide all that a pass does. The last pass is settled; nothing else is changed before all has been checked."""
        self.settle(gives_up=False)
        check_attention(self.inputs.config)
        stream, traits, model = self.stream, self.traits, self.model_ref()
        if model is not None and model.training:
            check_mode(model)
        current = stream.next_pass(traits, num_new, batch_size, num_columns, num_parts, is_prepared)
        check_pass(current, traits, stream.shortest_length)
        if stream.current is not None:
            stream.give_up()
        if traits.is_recurrent:
            if self.is_static and stream.batch_size == -1:
                self.recurrent.allocate(traits, batch_size)
            self.recurrent.begin(current)
            self.layers_reached = set()
        self.unseen_token_ids = None
        stream.begin(current, input_ids)

    def settle(self, is_reset: bool = False, gives_up: bool = True) -> None:
        """Before anything is changed: make the last pass part of what was seen, or give it up if it was interrupted (`gives_up`).

        Raises:
            ValueError: the interrupted pass can't be repeated, or a call of `generate` in another thread uses the cache.
        """
        user, stream = vars(self).get("_in_call"), self.stream
        if user is not None and user[0] != threading.get_ident():
            raise in_use()
        if stream is None:
            return
        if stream.done is not None:
            stream.settle()
        if self.traits.is_recurrent:
            self.recurrent.settle()
        may_be_interrupted = stream.current is not None or stream.is_torn or self.traits.is_recurrent
        if may_be_interrupted and self.is_interrupted and not is_reset:
            raise ValueError(
                f"The last pass (or change of the cache) has not been through all {len(self.layers)} layers, and can't be "
                "repeated. Call reset(), or go on from a copy that was made before."
            )
        if gives_up and stream.current is not None:
            stream.give_up()

    @contextlib.contextmanager
    def in_one_call(self):
        """For a call that runs many passes: meanwhile, no other call and no other thread may use the cache."""
        user = threading.get_ident(), object()
        if vars(self).setdefault("_in_call", user) is not user:  # one step, whatever other threads do
            raise in_use()
        config = self.inputs and self.inputs.config
        try:
            yield
        finally:
            if self.inputs is not None:  # the view of the call ends with it
                self.inputs.config = config or self.inputs.own_config
            with contextlib.suppress(ValueError):  # a pass that can't be repeated: who comes next is told
                self.settle()
            del self._in_call

    # The batch

    def reset(self) -> None:
        """As new: no tokens, any batch size."""
        self.settle(is_reset=True)
        self.unseen_token_ids: list[int] | None = None
        self.num_padding_columns = 0
        if self.stream is not None:
            self.stream.clear()
            if not self.is_static:
                self._make_layers()

    @torch.inference_mode(False)
    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes a copy of row `beam_idx[i]`."""
        self.settle()
        if not self.is_initialized:
            return
        check_rows(rows := beam_idx.tolist(), self.batch_size)
        with self.stream.changing():
            self.recurrent.select_rows(beam_idx)
            self.stream.select_rows(beam_idx)
            if self.unseen_token_ids is not None:
                self.unseen_token_ids = [self.unseen_token_ids[row] for row in rows]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` (numbers, or a mask), in this order."""
        self.reorder_cache(torch.arange(max(self.batch_size, 0), device=indices.device)[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row becomes `repeats` rows that stand together."""
        self.reorder_cache(torch.arange(max(self.batch_size, 0)).repeat_interleave(repeats))

    # Roll-back

    def activate_past_recording(self, is_active: bool = True) -> None:
        """Keep what passes evict from now on, until `crop` takes tokens back. False: stop, and nothing so far is taken back."""
        self.require_model()
        self.settle()
        self.num_padding_columns = 0
        if self.stream.is_recording != is_active:
            self.stream.is_recording = is_active
            self.stream.forget_recorded()

    def crop(self, num_tokens: int) -> None:
        """Take the last tokens back, as if they had never been seen: `-num_tokens` of them if not positive, else all but the
        first `num_tokens` (as before transformers 5.14, where `generate` counts all columns of its text). What was recorded is
        let go.

        Raises:
            ValueError: the tokens that those ones evicted were not recorded, or there are not so many. The cache is as before.
        """
        self.settle()
        if self.stream is None:
            return
        stream, num_tokens = self.stream, int(num_tokens)  # since 5.14, `generate` passes a tensor
        removed = -num_tokens if num_tokens <= 0 else max(0, self.num_tokens_seen + self.num_padding_columns - num_tokens)
        if removed:
            check_crop(removed, stream, self.traits)
            self.unseen_token_ids = None
            stream.undo([seen - removed for seen in stream.num_seen])
        stream.forget_recorded()

    # Copies

    def save(self, path: str | os.PathLike) -> None:
        """Write the cache to a file, from which `load` goes on as this one would, to the last bit; recorded drafts stand then.

        The file is there whole or not at all, and a file that was there before is replaced.

        Raises:
            ValueError: a pass was begun and has not reached the last layer, or the cache has no model.
            FileNotFoundError, IsADirectoryError: there is no such folder, or the path is a folder.
        """
        save_cache(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike, model: torch.nn.Module, **expected) -> "SinkCache":
        """The cache that `save` has written to a file, on the device of the model. Nothing in the file is executed.

        `expected` are arguments of `SinkCache` that you count on; else they are those in the file.

        Raises:
            ValueError: the file was cut off, or it holds a cache for a model with other settings, or of another window or kind.
            ImportError: the package that quantizes is not installed.
        """
        return load_cache(cls, path, model, expected)

    def __reduce_ex__(self, protocol):
        raise TypeError(
            "A SinkCache can't be pickled: it belongs to a model. Use cache.save(path) and SinkCache.load(path, model), or "
            "copy.deepcopy(cache) in one process."
        )

    @torch.inference_mode(False)  # the copy can be changed in any mode
    def __deepcopy__(self, memo) -> "SinkCache":
        self.settle(gives_up=False)  # a pass that was prepared can still be run, with this cache
        configs = (self.inputs.own_config, self.inputs.config) if self.inputs else ()
        memo |= {id(shared): shared for shared in (self.traits, *configs)}
        copied = memo[id(self)] = object.__new__(type(self))
        vars(copied).update(copy.deepcopy({name: each for name, each in vars(self).items() if name != "_in_call"}, memo))
        copied.settle()
        return copied


@torch.no_grad()
def generate(
    inputs: torch.Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    model: torch.nn.Module,
    window_length: int | None = None,
    num_sink_tokens: int | None = None,
    **kwargs,
):
    """The model's own `generate`, with a `SinkCache`. All other arguments and what it returns are as there.

    Args:
        model: given by transformers.
        window_length: tokens the cache holds, the sinks and the newest token included (default 256).
        num_sink_tokens: how many of the first tokens are never evicted (default 4). Both numbers may also stand in a generation
            config, or come with the cache.
        prefill_chunk_size: tokens of a prompt that go through the model in one pass.
        cache_implementation: "static" for a cache that never moves. On a GPU transformers then compiles the forward pass, as
            `compile_config` says; elsewhere, compile the model. "quantized" as `cache_config` says, a dict of options of
            `Quantization`; or "offloaded" to the memory of the host.
        past_key_values, or cache (as transformers says since 5.24): a `SinkCache` to continue, with either the whole history in
            `input_ids`, or its last `window_length` tokens, or only what the cache has not seen: that is
            `sequences[:, cache.get_seq_length():]` and what comes after it. Without a prompt, the last token goes on.
        guidance_scale: as in transformers, with a second cache of the same window for the second text. That one begins anew with
            each call, with `negative_prompt_ids`; to go on with it, pass the whole of it there.

    Raises:
        ValueError: what is passed can't be processed exactly, as the message says. The cache has seen no token of this call.
    """
    model = view_of(unwrapped(model))
    kwargs |= {"inputs": inputs, "generation_config": generation_config}
    kwargs |= {"window_length": window_length, "num_sink_tokens": num_sink_tokens}
    call = Call(model, kwargs)
    call.refuse_unsupported()
    cache = call.cache_to_continue()
    if cache is None:
        cache = SinkCache(**call.cache_arguments)
    with cache.in_one_call():
        cache.settle(gives_up=False)  # a compiled pass leaves that to the next call
        prompt = whole_prompt(call, cache)
        unseen = unseen_part(prompt, cache, 1 if call.has_beams else call.num_copies)  # beams go on from one text
        guidance = Guidance.of(call, cache, prompt)
        cache.bind(model)
        feed_arguments, others = (model, cache, with_pictures(unseen, prompt, call, cache), call.chunk_size, call.is_synced), {}
        if call.drafting_options:
            check_drafting(call, cache, prompt)
            others["assistant_model"] = drafting_model(call, cache)
            feed = DraftFeed(*feed_arguments, num_columns=prompt.num_columns)
        else:
            feed = BeamFeed(*feed_arguments) if call.has_beams else Feed(*feed_arguments)
        with feed:
            # For each pass, transformers asks the view for the inputs of the model: those of `cache.prepare`.
            view = with_processors(feed.view(), prompt, call.num_copies, guidance)
            outputs = type(model).generate(view, **call.arguments_with(cache, prompt.tokens.shape[:2], **others))
            feed.sequences = outputs if isinstance(outputs, torch.Tensor) else outputs.sequences
    if not isinstance(outputs, torch.Tensor):
        setattr(outputs, CACHE_NAME, cache)
    return outputs
