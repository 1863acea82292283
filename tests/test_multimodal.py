"""Multimodal decoder-only models: with text they are as exact as any other; pictures go through the model in one pass."""

import copy
import dataclasses
import functools

import pytest
import torch
import transformers
from packaging import version

from checks import NUM_SINK_TOKENS, WINDOW_LENGTH, assert_same, difference, feed, left_padded, random_ids
from custom_generate.generate import SinkCache, generate
from families import TRANSFORMERS
from oracle import oracle_logits
from zoo import ZOO_RELEASE, tiny_config

pytestmark = pytest.mark.skipif(TRANSFORMERS < version.parse(ZOO_RELEASE), reason="tiny models for the newest release only")

CLASSES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "gemma3": "Gemma3ForConditionalGeneration",
    "mistral3": "Mistral3ForConditionalGeneration",
    "idefics3": "Idefics3ForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration",
    "llama4": "Llama4ForConditionalGeneration",
    "paligemma": "PaliGemmaForConditionalGeneration",
}


def build(model_type: str):
    """A tiny one, all weights large. The sizes of multi-dimensional positions have to fit the heads."""
    torch.manual_seed(0)
    config_class = transformers.CONFIG_MAPPING[model_type]
    sections = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
    parts = {"text_config": sections} if "_vl" in model_type else {}
    if model_type == "qwen2_vl":  # its vision tower has names of its own for its sizes
        parts["vision_config"] = {"depth": 2, "embed_dim": 32}
    config = tiny_config(config_class, **parts)
    model = getattr(transformers, CLASSES[model_type])._from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25 if parameter.ndim > 1 else 0.1)
    model.generation_config.eos_token_id = None
    return model.eval()


@pytest.mark.parametrize("model_type", [name for name in CLASSES if name != "paligemma"])
def test_text_is_exact(model_type):
    model, input_ids = build(model_type), random_ids(60)
    try:
        model(input_ids)
    except AttributeError as error:  # Llama 4 in 5.24: it looks for images in any case
        pytest.skip(f"transformers itself can't run it with text: {error}")
    expected = oracle_logits(model, input_ids, WINDOW_LENGTH, NUM_SINK_TOKENS)
    for sizes in ([1] * 60, [3, 30, 1, 1, 25]):
        cache = SinkCache.from_model(model, WINDOW_LENGTH, NUM_SINK_TOKENS)
        assert_same(feed(model, cache, input_ids, sizes), expected)
    prompts = [input_ids[:, :length] for length in (3, 20)]
    ids, mask = left_padded(prompts)
    outputs = generate(
        ids,
        attention_mask=mask,
        model=model,
        window_length=WINDOW_LENGTH,
        max_new_tokens=20,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    for row, prompt in enumerate(prompts):
        sequence = outputs.sequences[row : row + 1, 20 - prompt.shape[1] :]
        expected = oracle_logits(model, sequence[:, :-1], WINDOW_LENGTH, NUM_SINK_TOKENS)[:, prompt.shape[1] - 1 :]
        assert_same(torch.stack([step[row] for step in outputs.logits])[None], expected)


def test_a_model_that_sees_its_prompt_as_a_whole_is_refused():
    """PaliGemma attends in both directions within its first pass: what it makes of a text depends on how it is fed."""
    with pytest.raises(ValueError, match="a token sees others that come after it"):
        SinkCache.from_model(build("paligemma"), WINDOW_LENGTH, NUM_SINK_TOKENS)


# Of models that can be shown pictures of 16 x 16 pixels: what their configs say beside the sizes below.
HEADS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {"image_size": 16, "patch_size": 4, **HEADS}
TEXT = {"vocab_size": 97, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": None, "pad_token_id": 0, **HEADS}
PICTURE = 96  # the id of tokens that stand for a picture
WITH_EYES = {
    "llava": {"vision_config": {"model_type": "clip_vision_model", "projection_dim": 32}, "vision_feature_layer": -1},
    "idefics3": {"scale_factor": 2},
    "smolvlm": {"scale_factor": 2},
    "internvl": {"vision_config": {"image_size": [16, 16], "patch_size": [4, 4]}, "text_config": {"model_type": "qwen2"}},
    "mistral3": {
        "vision_config": {"model_type": "pixtral", "head_dim": 8},
        "text_config": {"model_type": "mistral"},
        "vision_feature_layer": -1,
    },
    "gemma3": {
        "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False},
        "text_config": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 20},
        "mm_tokens_per_image": 4,
    },
}


@functools.cache
def build_with_eyes(model_type: str = "llava"):
    torch.manual_seed(0)
    options = copy.deepcopy(WITH_EYES[model_type])
    text, vision = options.pop("text_config", {"model_type": "llama"}), options.pop("vision_config", {})
    config_class = transformers.CONFIG_MAPPING[model_type]
    config = config_class(text_config=TEXT | text, vision_config=VISION | vision, image_token_id=PICTURE, **options)
    name = {"smolvlm": "SmolVLMForConditionalGeneration"}.get(model_type) or CLASSES[model_type]
    model = getattr(transformers, name)._from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        is_scale = "norm" in name and name.endswith("weight")
        torch.nn.init.normal_(parameter, mean=float(is_scale), std=0.25 if parameter.ndim > 1 else 0.1)
    model.generation_config.eos_token_id = None
    return model.eval()


def pictures_of(model, num: int, seed: int) -> dict:
    pixels = torch.randn(num, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    if model.config.model_type in ("idefics3", "smolvlm"):
        return {"pixel_values": pixels[None]}
    return {"pixel_values": pixels} | ({"image_sizes": torch.tensor([[16, 16]] * num)} if "mistral3" in model.config.model_type else {})


def merged(model, ids: torch.Tensor, pictures: dict) -> torch.Tensor:
    """The embeddings of one text."""
    embeddings = model.get_input_embeddings()(ids)
    if pictures:
        features = getattr(found := model.get_image_features(**pictures), "pooler_output", found)
        embeddings[ids == PICTURE] = torch.cat(list(features)).flatten(end_dim=-2)
    return embeddings


class Merged:
    """A model for the oracle: token `i` of its text is the embedding `i`. In a pass over more than the sinks the tokens of a picture see each other, if
    the model's own type ids say so."""

    def __init__(self, model, embeddings: torch.Tensor, **first):
        self.model, self.config, self.forward, self.embeddings, self.first = model, model.config, model.forward, embeddings[0], first

    def __call__(self, ids: torch.Tensor, **others):
        first = self.first if ids.shape[1] > NUM_SINK_TOKENS else {}
        return self.model(inputs_embeds=self.embeddings[ids], **others, **first)

    def __getattr__(self, name: str):
        return getattr(self.model, name)


def text_of(model, seed: int, num_before: int = 5) -> torch.Tensor:
    """With one picture."""
    before, after = (random_ids(num, seed=seed) % 90 + 2 for num in (num_before, 6))
    num = 16 if model.config.model_type == "llava" else 4
    return torch.cat([before, torch.full((1, num), PICTURE), after], dim=1)


WRITE = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}


@torch.no_grad()
@pytest.mark.parametrize("model_type", WITH_EYES)
def test_generate_with_a_picture(model_type):
    """As with DynamicCache as long as the text fits, and as the oracle over merged embeddings from then on. Other pixels change it."""
    model = build_with_eyes(model_type)
    ids, pictures = text_of(model, seed=1), pictures_of(model, 1, seed=1)
    num, types, length = ids.shape[1], {}, 30
    if model_type == "gemma3":
        types["token_type_ids"] = (ids == PICTURE).long()
    reference = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=length - num, **pictures, **types, **WRITE)
    outputs = generate(ids, model=model, window_length=length, max_new_tokens=60, **pictures, **types, **WRITE)
    logits = torch.stack(outputs.logits, dim=1)
    assert_same(logits[:, : length - num], torch.stack(reference.logits, dim=1))
    new = model.get_input_embeddings()(outputs.sequences[:, num:-1])
    oracle = Merged(model, torch.cat([merged(model, ids, pictures), new], dim=1), **types)
    expected = oracle_logits(oracle, torch.arange(num + 59)[None], length, NUM_SINK_TOKENS, num_at_once=num)
    assert_same(logits, expected[:, num - 1 :])
    others = [{**pictures_of(model, 1, seed=2), **types}] + [pictures] * bool(types)  # other pixels; a mask that is only causal
    for other in others:
        first = generate(ids, model=model, window_length=length, max_new_tokens=1, **other, **WRITE).logits[0]
        assert difference(first, logits[:, 0]) > 0.1


@torch.no_grad()
@pytest.mark.parametrize("model_type", [name for name in WITH_EYES if name != "gemma3"])
@pytest.mark.parametrize("kind", [{}, {"static": True}, {"offloaded": True}], ids=["dynamic", "static", "offloaded"])
def test_pictures_in_later_turns(model_type, kind):
    """The second and third turn bring pictures over a window that is full, and evict. As the oracle over all merged embeddings."""
    model = build_with_eyes(model_type)
    cache, embeddings, logits, places = SinkCache.from_model(model, 30, NUM_SINK_TOKENS, **kind), [], [], []
    text, seen = torch.zeros(1, 0, dtype=torch.long), 0
    for turn in range(3):
        new, pictures = text_of(model, seed=turn, num_before=4 + turn), pictures_of(model, 1, seed=turn)
        new = torch.cat([text[:, seen:], new], dim=1)
        mask = torch.ones(1, seen + new.shape[1], dtype=torch.long)
        outputs = generate(
            new, attention_mask=mask, model=model, past_key_values=cache, max_new_tokens=12, prefill_chunk_size=3, **pictures, **WRITE
        )
        text = torch.cat([text[:, :seen], outputs.sequences], dim=1)
        embeddings += [merged(model, new, pictures), model.get_input_embeddings()(outputs.sequences[:, new.shape[1] : -1])]
        places += range(seen + new.shape[1] - 1, text.shape[1] - 1)
        logits += outputs.logits
        seen = cache.get_seq_length()
    num = text.shape[1] - 1
    expected = oracle_logits(Merged(model, torch.cat(embeddings, dim=1)), torch.arange(num)[None], 30, NUM_SINK_TOKENS)
    assert_same(torch.stack(logits, dim=1), expected[:, places])


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llava", "gemma3"])
def test_a_picture_right_before_the_last_token(model_type):
    """Also for a model that computes a single token in another way than several: all but the last token comes with the picture."""
    model = build_with_eyes(model_type)
    ids, pictures, logits = text_of(model, seed=1)[:, :-5], pictures_of(model, 1, seed=1), []
    assert ids[0, -2] == PICTURE != ids[0, -1]
    types = {"token_type_ids": (ids == PICTURE).long()} if model_type == "gemma3" else {}
    for splits_exactly in (True, False):
        cache = SinkCache.from_model(model, 30, NUM_SINK_TOKENS)
        cache.traits = dataclasses.replace(cache.traits, splits_exactly=splits_exactly)
        outputs = generate(ids, model=model, past_key_values=cache, max_new_tokens=20, **pictures, **types, **WRITE)
        logits.append(torch.stack(outputs.logits, dim=1))
    assert_same(*logits)


@torch.no_grad()
def test_rows_with_pictures_of_their_own():
    """A padded batch, two pictures in one row and one in the other, several sequences for each, sampled: as the oracle, row by row."""
    model = build_with_eyes("llava")
    rows, first, second = [torch.cat([text_of(model, 1), text_of(model, 2)], 1), text_of(model, 3)], pictures_of(model, 2, 1), pictures_of(model, 1, 2)
    ids, mask = left_padded(rows)
    pictures = {"pixel_values": torch.cat([first["pixel_values"], second["pixel_values"]])}
    options = {"model": model, "window_length": 60, "max_new_tokens": 40, **WRITE, **pictures, "attention_mask": mask}
    outputs = generate(ids, **options | {"do_sample": True}, num_return_sequences=2)
    for row, sequence in enumerate(outputs.sequences):
        prompt, pictures = rows[row // 2], (first, second)[row // 2]
        new = model.get_input_embeddings()(sequence[None, ids.shape[1] : -1])
        embeddings = torch.cat([merged(model, prompt, pictures), new], dim=1)
        expected = oracle_logits(Merged(model, embeddings), torch.arange(embeddings.shape[1])[None], 60, NUM_SINK_TOKENS)
        assert_same(torch.stack(outputs.logits)[:, row][None], expected[:, prompt.shape[1] - 1 :])


@torch.no_grad()
@pytest.mark.parametrize("option", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"guidance_scale": 1.0}], ids=str)
def test_a_picture_with_other_ways_to_decode(option):
    """The tokens after the picture come one by one from a cache that has read it: the texts are the same."""
    model, cache = build_with_eyes("llava"), SinkCache(30, NUM_SINK_TOKENS)
    ids, pictures = text_of(model, seed=1), pictures_of(model, 1, seed=1)
    text = generate(ids, model=model, window_length=30, max_new_tokens=40, do_sample=False, **pictures, **option)
    cache = SinkCache.from_model(model, 30, NUM_SINK_TOKENS)
    model(**cache.prepare(ids[:, :-1]), **pictures)
    assert text.equal(generate(ids, model=model, past_key_values=cache, max_new_tokens=40, do_sample=False, **option))


REFUSED = {
    "too long": ("llava", {"window_length": 20}, "27 of them do not fit into window_length=20"),
    "three dimensions": ("qwen2_vl", {}, "pixel_values .* Qwen2VLForConditionalGeneration gives .* in three dimensions"),
    "unknown": ("llava", {"image_heights": torch.ones(1)}, "image_heights .* LlavaForConditionalGeneration does not take it"),
    "other tensors": ("llava", {"input_features": torch.ones(1)}, "input_features .* can't be split over the passes"),
    "longer than a native window": ("gemma3", {}, "token_type_ids .* see each other"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_picture_is_refused(case):
    model_type, options, message = REFUSED[case]
    model = build_with_eyes(model_type) if model_type in WITH_EYES else build(model_type)
    ids, pictures = text_of(model, seed=1), pictures_of(model, 1, seed=1)
    if model_type == "gemma3":
        ids = torch.cat([random_ids(14) % 90, ids], dim=1)
        pictures["token_type_ids"] = (ids == PICTURE).long()
    with pytest.raises(ValueError, match=message):
        generate(ids, **{"model": model, "window_length": 50, "max_new_tokens": 2} | pictures | options)


@torch.no_grad()
def test_a_later_picture_is_refused():
    """A history with the pictures of all turns would put them in the wrong places, in some models without a word."""
    model, cache = build_with_eyes("llava"), SinkCache(60, NUM_SINK_TOKENS)
    ids, pictures = text_of(model, seed=1), pictures_of(model, 1, seed=1)
    text = generate(ids, model=model, past_key_values=cache, max_new_tokens=3, **pictures)
    for prompt, message in (
        (torch.cat([text, ids], dim=1), "only 28 of the 57 that are passed are new"),
        (text[:, -1:], "a single new token is passed"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(prompt, model=model, past_key_values=cache, max_new_tokens=3, **pictures)
    assert cache.get_seq_length() == text.shape[1] - 1
    model, cache = build_with_eyes("gemma3"), SinkCache(60, NUM_SINK_TOKENS)
    ids, pictures = text_of(model, seed=1), pictures_of(model, 1, seed=1)
    types = {"token_type_ids": (ids == PICTURE).long()}
    text = generate(ids, model=model, past_key_values=cache, max_new_tokens=3, **pictures, **types)
    new, mask = torch.cat([text[:, -1:], ids], dim=1), torch.ones(1, text.shape[1] + ids.shape[1])
    types = {"token_type_ids": (new == PICTURE).long()}
    with pytest.raises(ValueError, match="token_type_ids can't be used with SinkCache: in this model the tokens of a picture see each other"):
        generate(new, attention_mask=mask, model=model, past_key_values=cache, **pictures, **types)
    ids = torch.cat([text, random_ids(5) % 90], dim=1)  # of text alone, processors say so
    generate(ids, model=model, past_key_values=cache, max_new_tokens=3, token_type_ids=torch.zeros_like(ids))


def text_with_picture(seed: int) -> torch.Tensor:
    before, after = (random_ids(num, seed=seed) % 90 for num in (5, 6))
    return torch.cat([before, torch.full((1, 16), 96), after], dim=1)


@torch.no_grad()
def test_pictures_in_passes_of_ones_own():
    """The recipe of docs/recipes.md: `pixel_values` beside the inputs of `prepare`, at first and with the window full. The logits
    equal those of merged embeddings fed one by one, and at first those with DynamicCache. Other pixels change them."""
    model, pixels = build_with_eyes(), torch.randn(2, 1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    texts = [text_with_picture(1), random_ids(40, seed=3) % 90, text_with_picture(2)]
    cache, by_one = (SinkCache.from_model(model, 30, NUM_SINK_TOKENS) for _ in range(2))
    for number, (ids, picture) in enumerate(zip(texts, (pixels[0], None, pixels[1]))):
        embeddings, others = model.get_input_embeddings()(ids), {}
        if picture is not None:
            others["pixel_values"] = picture
            features = torch.cat(list(getattr(found := model.get_image_features(picture), "pooler_output", found)))
            embeddings[ids == 96] = features.flatten(end_dim=-2)
        logits = model(**cache.prepare(ids), **others).logits
        assert_same(logits, feed_embeddings(model, by_one, embeddings))
        if number == 0:
            assert_same(logits, model(ids, past_key_values=transformers.DynamicCache(), **others).logits)
            blank = SinkCache.from_model(model, 30, NUM_SINK_TOKENS)
            assert difference(logits, model(**blank.prepare(ids), pixel_values=0 * picture).logits) > 0.1


def feed_embeddings(model, cache: SinkCache, embeddings: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(**cache.prepare(inputs_embeds=each)).logits for each in embeddings.split(1, dim=1)], dim=1)


@torch.no_grad()
def test_generate_goes_on_after_a_picture():
    model, ids, picture = build_with_eyes(), text_with_picture(1), torch.randn(1, 3, 16, 16)
    cache, other = (SinkCache.from_model(model, 24, NUM_SINK_TOKENS) for _ in range(2))
    model(**cache.prepare(ids[:, :-1]), pixel_values=picture)
    text = generate(ids, model=model, past_key_values=cache, max_new_tokens=40, do_sample=False)
    step = model(**other.prepare(ids), pixel_values=picture).logits
    for token in text[0, ids.shape[1] :]:
        assert step[0, -1].argmax() == token
        step = model(**other.prepare(token[None, None])).logits
