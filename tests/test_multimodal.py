"""Multimodal decoder-only models: with text they are as exact as any other, an image is refused."""

import pytest
import torch
import transformers
from packaging import version

from checks import NUM_SINK_TOKENS, WINDOW_LENGTH, assert_same, difference, feed, left_padded, random_ids
from custom_generate.generate import SinkCache, generate
from families import TRANSFORMERS
from oracle import oracle_logits
from zoo import ZOO_RELEASE, _tiny_config

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
    config = _tiny_config(config_class, **({"text_config": sections} if "_vl" in model_type else {}))
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


def test_an_image_is_refused():
    with pytest.raises(ValueError, match="pixel_values can't be used with SinkCache"):
        generate(random_ids(5), model=build("llava"), pixel_values=torch.zeros(1, 3, 8, 8), window_length=WINDOW_LENGTH)


def build_with_eyes():
    """A LLaVA that can be shown pictures of 16 x 16 pixels: 16 tokens each, where its id 96 stands in a text."""
    torch.manual_seed(0)
    heads = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 4, "projection_dim": 32, **heads}
    text = {"model_type": "llama", "vocab_size": 97, "num_key_value_heads": 2, **heads}
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=96, vision_feature_layer=-1)
    model = transformers.LlavaForConditionalGeneration._from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25 if parameter.ndim > 1 else 0.1)
    model.generation_config.eos_token_id = None
    return model.eval()


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
