"""Models that transformers does not have: a decoder with a rotation and a table of its own, and decoders that are refused."""

import pytest
import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from checks import NUM_SINK_TOKENS, WINDOW_LENGTH, assert_same, difference, feed, random_ids
from custom_generate.generate import SinkCache
from oracle import TOLERANCE, oracle_logits


class BackwardsConfig(PretrainedConfig):
    model_type = "backwards"

    def __init__(self, vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8, **kwargs):
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads, self.head_dim = num_attention_heads, head_dim
        super().__init__(**kwargs)


class BackwardsAttention(nn.Module):
    """The last half of each head turns in interleaved pairs, the other way round than usual."""

    def __init__(self, config, index):
        super().__init__()
        self.index, self.head_dim = index, config.head_dim
        self.qkv = nn.Linear(config.hidden_size, 3 * config.num_attention_heads * config.head_dim, bias=False)
        self.out = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)

    def turn(self, x, angles):
        still, turning = x.chunk(2, dim=-1)
        even, odd = turning[..., ::2], turning[..., 1::2]
        cos, sin = angles.cos()[:, None].to(x.dtype), angles.sin()[:, None].to(x.dtype)
        return torch.cat([still, torch.stack([even * cos + odd * sin, odd * cos - even * sin], -1).flatten(-2)], -1)

    def seen(self, queries, keys, mask):
        """What made-up models change: the queries, and what they see of the keys."""
        return queries, mask

    def forward(self, hidden, angles, mask, cache):
        q, k, v = self.qkv(hidden).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k = self.turn(q, angles), self.turn(k, angles)
        k, v = cache.update(k, v, self.index)
        q, mask = self.seen(q, k, mask)
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1)
        return self.out(out.transpose(1, 2).flatten(-2))


class BackwardsForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = BackwardsConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(BackwardsAttention(config, index) for index in range(config.num_hidden_layers))
        self.norms = nn.ModuleList(nn.LayerNorm(config.hidden_size) for _ in self.layers)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("inv_freq", 3.0 / (1 + torch.arange(config.head_dim // 4)) ** 3, persistent=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def angles(self, position_ids):
        return position_ids[..., None].float() * self.inv_freq

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, **kwargs):
        hidden = self.embed(input_ids)
        mask = create_causal_mask(self.config, hidden, attention_mask, past_key_values=past_key_values, position_ids=position_ids)
        angles = self.angles(position_ids)
        for norm, layer in zip(self.norms, self.layers):
            hidden = hidden + layer(norm(hidden), angles, mask, past_key_values)
        return CausalLMOutputWithPast(logits=self.head(hidden), past_key_values=past_key_values)


def build(cls=BackwardsForCausalLM):
    torch.manual_seed(0)
    model = cls(BackwardsConfig(attn_implementation="sdpa")).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.25)
    return model


def test_the_last_half_of_each_head_turns_backwards():
    """Would catch pairs taken at the beginning of the head, a wrong direction, and sinks left where they were."""
    model, input_ids = build(), random_ids()
    expected = oracle_logits(model, input_ids, WINDOW_LENGTH, NUM_SINK_TOKENS)
    for passes in ([1] * 80, [3, 30, 1, 1, 40, 5], [80], [16, (8, 2), 1, (40, 5), (15, 15)]):
        cache = SinkCache.from_model(model, WINDOW_LENGTH, NUM_SINK_TOKENS)
        assert_same(feed(model, cache, input_ids, passes), expected)
    unmoved = oracle_logits(model, input_ids, WINDOW_LENGTH, NUM_SINK_TOKENS, shift=False)
    assert difference(unmoved, expected) > 10 * TOLERANCE


class SquareRoots(BackwardsForCausalLM):
    """Turned by the square root of the position: by how much a key has to be moved depends on where it stands."""

    def angles(self, position_ids):
        return position_ids[..., None].float().sqrt() * self.inv_freq


def test_angles_that_are_not_proportional_to_the_position_are_refused():
    """Would catch a probe that compares too few positions: between two of them, any angle is some rotation."""
    with pytest.raises(ValueError, match="no known rotation explains how the keys of layer 0"):
        SinkCache.from_model(build(SquareRoots), WINDOW_LENGTH, NUM_SINK_TOKENS)


def test_a_table_of_two_dimensions_is_several_tables():
    model, input_ids = build(), random_ids(40)
    expected = oracle_logits(model, input_ids, WINDOW_LENGTH, NUM_SINK_TOKENS)
    model.inv_freq = torch.stack([model.inv_freq * 0.5, model.inv_freq])
    model.angles = lambda position_ids: position_ids[..., None].float() * model.inv_freq[1]
    assert_same(feed(model, SinkCache.from_model(model, WINDOW_LENGTH, NUM_SINK_TOKENS), input_ids, [30] + [1] * 10), expected)
    other = build()
    other.inv_freq = torch.tensor(1.0)
    with pytest.raises(ValueError, match="no known rotation"):
        SinkCache.from_model(other, WINDOW_LENGTH, NUM_SINK_TOKENS)


class Stretching(BackwardsForCausalLM):
    """Beyond a length it registers other frequencies, for good: as the dynamic rotary embeddings of older remote code do."""

    max_length = 20

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        if position_ids.max() >= self.max_length:
            self.register_buffer("inv_freq", self.inv_freq * 0.5, persistent=False)
        return super().forward(input_ids, attention_mask, position_ids, past_key_values, **kwargs)


def test_a_model_that_changes_its_frequencies_is_refused_and_left_as_it_was():
    model = build(Stretching)
    before = model.inv_freq.clone()
    with pytest.raises(ValueError, match=r"it changes its frequencies \(inv_freq\).*shorter window"):
        SinkCache.from_model(model, WINDOW_LENGTH, NUM_SINK_TOKENS)
    assert model.inv_freq.equal(before)
    SinkCache.from_model(model, 8, 2)  # positions stay below


class PuttingBack(BackwardsForCausalLM):
    """The frequencies in use and the original ones become one tensor, as in the longrope of transformers 5.0."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        self.register_buffer("inv_freq", self.original_inv_freq, persistent=False)
        return super().forward(input_ids, attention_mask, position_ids, past_key_values, **kwargs)


def test_a_model_that_puts_back_its_frequencies_is_served():
    model = build(PuttingBack)
    model.register_buffer("original_inv_freq", model.inv_freq.clone(), persistent=False)
    assert SinkCache.from_model(model, WINDOW_LENGTH, NUM_SINK_TOKENS).traits is not None


def test_frequencies_that_are_found_nowhere_are_named():
    model = build()
    model.frequencies = model.inv_freq
    model.angles = lambda position_ids: position_ids[..., None].float() * model.frequencies
    del model.inv_freq
    with pytest.raises(ValueError, match="a buffer whose name ends in inv_freq"):
        SinkCache.from_model(model, WINDOW_LENGTH, NUM_SINK_TOKENS)


class TakesCache(BackwardsForCausalLM):
    """Named as in transformers 5.24, with room for any other name: a cache under the older name would go unseen."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, cache=None, **kwargs):
        return super().forward(input_ids, attention_mask, position_ids, cache)


def test_a_model_that_takes_its_cache_under_the_newer_name():
    model, input_ids = build(TakesCache), random_ids(40)
    expected = oracle_logits(model, input_ids, WINDOW_LENGTH, NUM_SINK_TOKENS)
    assert_same(feed(model, SinkCache.from_model(model, WINDOW_LENGTH, NUM_SINK_TOKENS), input_ids, [30] + [1] * 10), expected)
    assert_same(expected, oracle_logits(build(), input_ids, WINDOW_LENGTH, NUM_SINK_TOKENS))


def by_order(queries, keys, mask):
    """Keys that stand further back in the cache count for less, beside the rotation."""
    bias = 0.1 * torch.arange(keys.shape[2], dtype=queries.dtype).expand(1, 1, queries.shape[2], -1)
    if mask is None:
        mask = torch.ones(queries.shape[2], keys.shape[2], dtype=torch.bool).tril(keys.shape[2] - queries.shape[2])
    return queries, bias.masked_fill(~mask, float("-inf"))


def without_masks(queries, keys, mask):
    return queries, None


def by_number(queries, keys, mask):
    """Queries grow with the number of keys."""
    return queries * torch.tensor(keys.shape[2]).log(), mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seen", [by_order, without_masks, by_number])
def test_a_model_that_does_not_go_by_its_mask_is_refused(seen, dtype):
    """A pass of several tokens over a full window hands out more keys than tokens are held, in another order, and hides some."""
    model = build().to(dtype)
    assert SinkCache.from_model(model, WINDOW_LENGTH, NUM_SINK_TOKENS).traits is not None
    model = build().to(dtype)
    for layer in model.layers:
        layer.seen = seen
    with pytest.raises(ValueError, match="the mask alone.*logits do not depend on how a text is fed"):
        SinkCache.from_model(model, WINDOW_LENGTH, NUM_SINK_TOKENS)
