"""What can be read off a cache. Nothing in here changes it."""

import math

import torch
from transformers import Cache
from transformers.utils import is_torchdynamo_compiling

from .doors import check_count, check_unprepared
from .layers import SinkLayer
from .window import Window


class ReadableCache(Cache):
    """Counts, sizes, positions, and what the next pass may bring.

    `traits`, `stream`, `inputs` and `recurrent` are None until the cache knows its model (`bind`).
    """

    traits = stream = inputs = recurrent = None

    def __repr__(self) -> str:
        mode = ", static=True" if self.is_static else ", offloaded=True" if self.is_offloaded else ""
        if self.quantization is not None:
            mode = f", quantized={self.quantization.backend!r}, nbits={self.quantization.nbits or 8}"
        on_host = f", bytes_on_host={self.num_bytes_on_host}" if self.is_offloaded else ""
        return (
            f"{type(self).__name__}(window_length={self.window_length}, num_sink_tokens={self.num_sink_tokens}{mode}, "
            f"tokens_seen={self.num_tokens_seen}, tokens_held={self.num_tokens_held}, bytes_held={self.num_bytes_held}{on_host})"
        )

    @property
    def window(self) -> Window:
        """The window of all layers that have no shorter one of their own."""
        return Window(self.window_length, self.num_sink_tokens)

    @property
    def batch_size(self) -> int:
        """Rows, or -1 before the first pass."""
        return -1 if self.stream is None else self.stream.batch_size

    @property
    def is_initialized(self) -> bool:
        return self.batch_size != -1

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile the model's forward pass, as it does on a GPU."""
        return self.is_static

    @property
    def num_tokens_seen(self) -> int:
        """Tokens that went through the cache, held or evicted: those of the row that has the most."""
        return 0 if self.stream is None else max(self.stream.num_tokens)

    @property
    def num_tokens_seen_by_row(self) -> list[int]:
        """Tokens that went through the cache, row by row: padding is not counted."""
        return self._by_row([0] if self.stream is None else self.stream.num_tokens)

    @property
    def num_tokens_held(self) -> int:
        """Tokens whose keys and values are held: those of the row that has the most. Never more than `window_length`."""
        return min(self.num_tokens_seen, self.window_length)

    @property
    def positions(self) -> list[int]:
        """The position at which the next token of each row will stand, unless positions are lowered first."""
        stream = self.stream
        return self._by_row([0] if stream is None else [seen - start for seen, start in zip(stream.num_tokens, stream.base)])

    def _by_row(self, numbers: list[int]) -> list[int]:
        return list(numbers) if len(numbers) > 1 else numbers * max(self.batch_size, 1)

    @property
    def is_interrupted(self) -> bool:
        """Whether the last pass, or a change of the cache, has not been through all layers, and can't be repeated: no pass with
        recurrent states can."""
        stream, current = self.stream, self.stream.current
        if stream.is_torn:
            return True
        if self.traits.is_recurrent:
            return current is not None or any(stream.num_seen) and not self.traits.noted_layers <= self.layers_reached
        if current is None or not stream.has_begun or current.num_columns == 1:  # a token may overwrite the oldest one twice
            return False
        return self.quantization is not None or not all(plan.hands_out_slots for plan in stream.plans)

    def get_seq_length(self, layer_idx: int | None = None, *args, **kwargs) -> int:
        """Tokens seen, as for every cache of transformers: what `generate` continues from.

        For a layer that asks in the middle of a prepared pass, the position of its first column: Llama 4 scales queries by it.
        """
        current = None if self.stream is None else self.stream.current
        if current is not None and self.stream.plans[0].is_in_tensors and is_torchdynamo_compiling():
            return self.window_length - 1  # slots before the query: a graph takes numbers for constants
        if current is None or layer_idx is None:
            return self.num_tokens_seen
        last = max(after - start for after, start in zip(current.num_after, current.base))
        return max(last - current.num_columns, 0)

    def get_mask_sizes(self, query_length, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of the keys that a pass will be handed, for the mask that a model makes by itself.

        `query_length` is a number, or the positions of the queries (before transformers 5).
        """
        num_columns = query_length.shape[0] if isinstance(query_length, torch.Tensor) else query_length
        stream, layer = self.stream, self._layer_at(layer_idx)
        if stream.current is not None and not stream.has_begun:
            return layer.kv_length, 0
        check_unprepared(self.traits, stream, num_columns)
        return min(self.num_tokens_seen + num_columns, layer.window.length), 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Where the queries of a pass stand among the keys that they are handed: at their end."""
        stream, layer = self.stream, self._layer_at(layer_idx)
        if stream.current is not None and not stream.has_begun:
            return layer.kv_length - stream.current.part_length
        return min(self.num_tokens_seen, layer.window.length - 1)

    def _layer_at(self, layer_idx: int) -> SinkLayer:
        """A layer; for a layer without keys the first layer with keys, as in the caches of transformers."""
        if self.stream is None:
            self.require_model()
        return self.stream.layers.get(layer_idx) or self.stream.layers[self.stream.first_layer]

    def update_indexer(self, indexer_key_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """What a layer calls to choose what it attends to: `[batch, num_columns, dim]` in, `[batch, kv_length, dim]` out.

        It may choose as many keys as the window holds, and so takes all that are visible, whatever they are: none is kept.
        """
        batch_size, _, dim = indexer_key_states.shape
        return indexer_key_states.new_zeros(1).expand(batch_size, self.stream.layers[layer_idx].kv_length, dim)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Tokens held at most: by any layer, or by the given one."""
        layer = None if self.stream is None else self.stream.layers.get(layer_idx)
        return self.window_length if layer is None else layer.window.length

    get_max_cache_shape = get_max_length  # its name before transformers 5

    def known_token_ids(self, row: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The ids of the first and of the most recent tokens held of a row, each in order; None if they are not known."""
        if not self.is_initialized or not self.stream.knows_ids:
            return None
        num_seen = self.num_tokens_seen_by_row[row]
        num_recent = num_seen if num_seen <= self.window_length else self.window.num_recent
        ids = self.stream.ids.slots[row, 0, :, 0].cpu()
        return ids[: min(num_seen, self.num_sink_tokens)], ids[self.window.slot(torch.arange(num_seen - num_recent, num_seen))]

    @property
    def num_bytes_held(self) -> int:
        """Bytes of all tensors of the cache: their storages, each once."""
        tensors = [] if self.stream is None else [*self.stream.tensors, *self.recurrent.tensors.values()]
        storages = [tensor.untyped_storage() for tensor in tensors]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    @property
    def num_bytes_on_host(self) -> int:
        """Those of `num_bytes_held` that are offloaded."""
        return sum(ring.host.nbytes for ring in self.stream.rings) if self.is_offloaded and self.stream is not None else 0

    @property
    def takes_parts(self) -> bool:
        """Whether the next pass may come in parts: all rows have full windows, and the model looks at nothing but positions,
        masks and keys to tell where in its row a token is."""
        self.require_model()
        traits = self.traits
        is_plain = not (traits.is_recurrent or traits.is_ordered or traits.is_chunked or traits.is_indexed)
        return is_plain and min(self.stream.num_tokens) >= self.window_length

    def num_parts_of(self, num_columns: int) -> int:
        """In how many parts the next pass should come, if it has so many columns and none of them is padding: the divisor of
        `num_columns` that makes parts nearest to the best length. 1 while a window is not full."""
        check_count("num_columns", num_columns)
        best = num_columns / self.window.part_length if self.takes_parts else 1
        divisors = (num for num in range(1, num_columns + 1) if num_columns % num == 0)
        return min(divisors, key=lambda num: abs(math.log(num / best))) if best > 1 else 1

    @property
    def num_columns_at_once(self) -> int:
        """The longest next pass that does not cross an edge: of the window while it is filling, then of the small positions."""
        self.require_model()
        columns, rebase_at = [], self.traits.rebase_at
        for seen, start in zip(self.stream.num_tokens, self.stream.base):
            left = self.window_length - seen if seen < self.window_length else rebase_at - (seen - start)
            columns.append(1 if self.traits.is_ordered and seen >= self.window_length else left)
        return min(num if num > 0 else rebase_at - self.window_length for num in columns)

    def require_model(self) -> None:
        if self.traits is None:
            raise ValueError(
                "This SinkCache does not know how the model moves keys. Make it with SinkCache.from_model(model, "
                f"window_length={self.window_length}, num_sink_tokens={self.num_sink_tokens}), or generate with custom_generate."
            )
