"""The generated tables of options, caches and attention: nothing that transformers knows is missing, what is said to work has a test, and
what is said to be refused is. (The table of models is checked in tests/test_scripts.py.)"""

import inspect
import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import DynamicCache, GenerationConfig, GenerationMixin
from transformers.generation import configuration_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from checks import random_ids
from common import page_block
from compatibility import CACHES, NO_EFFECT, OPTION, PROCESSORS, REFUSED, TABLES, WORKS, options_tables, rows
from custom_generate.generate import SinkCache, generate
from custom_generate.options import LOADER_ARGUMENTS
from families import build_model

WINDOW = {"window_length": 8, "num_sink_tokens": 2}
ROWS = [row for head in TABLES for row in rows(head)]
PROMPT = random_ids(5)


@pytest.fixture(scope="module")
def model():
    return build_model("qwen3", "sdpa")


@pytest.fixture(scope="module")
def greedy(model):
    return generate(PROMPT, model=model, max_new_tokens=37, do_sample=False, **WINDOW)


def names_in(head: str) -> list[str]:
    return [name for row in rows(head) for name in row.names]


def test_the_tables_in_the_pages_are_these():
    assert page_block("works-with") == options_tables(), "python scripts/compatibility.py --tables options --write"


def test_every_option_is_in_the_table_once():
    names = names_in(OPTION)
    assert len(set(names)) == len(names)
    options = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    options |= inspect.signature(GenerationMixin.generate).parameters.keys() - {"self", "kwargs"}
    covered = {name.partition("=")[0] for name in names} | LOADER_ARGUMENTS
    assert options - covered == set()


def test_every_cache_and_every_attention_is_in_its_table():
    names = [name for row in CACHES for name in row.names]
    assert {*getattr(configuration_utils, "ALL_CACHE_IMPLEMENTATIONS", ()), "paged"} <= {*names}
    known = {name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if not name.startswith("paged|")}
    assert known <= {*names_in("attention")}


@pytest.mark.parametrize("row", [row for row in ROWS if row.verdict == WORKS], ids=lambda row: row.names[0])
def test_what_works_has_a_test(row):
    file, _, function = row.test.partition("::")
    source = (Path(__file__).parent / file).read_text(encoding="utf-8")
    assert re.search(rf"^def {function}\(", source, re.MULTILINE)
    if function == PROCESSORS.partition("::")[2]:  # one test for many options: each has to be in it
        assert all(re.search(rf'["( ]{name}["=]', source) for name in row.names)


def trials(row) -> list:
    return [pytest.param(row.note, name, value, id=f"{name}-{value}") for name, value in row.trial.items()]


def other_model(name: str):
    sizes = {"vocab_size": 97, "num_hidden_layers": 2}
    if name == "t5":
        config = transformers.T5Config(
            d_model=32, d_ff=32, d_kv=8, num_layers=2, num_heads=2, vocab_size=97, decoder_start_token_id=0
        )
        return transformers.T5ForConditionalGeneration(config).eval()
    return transformers.MambaForCausalLM(transformers.MambaConfig(hidden_size=32, state_size=4, **sizes)).eval()


@pytest.mark.parametrize("reason, name, value", [trial for row in ROWS if row.verdict == REFUSED for trial in trials(row)])
def test_what_is_refused_is_refused_for_that_reason(model, reason, name, value):
    options = {name: value}
    if name == "model":
        model, options = other_model(value), {}
    elif name == "past_key_values":
        cache = DynamicCache()
        cache.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 0)
        options = {name: cache}
    elif isinstance(value, list):
        options = {name: torch.tensor(value)}
    else:
        SinkCache.from_model(model, **WINDOW)
    with pytest.raises(ValueError, match=re.escape(reason)):
        generate(PROMPT, model=model, max_new_tokens=3, **options, **WINDOW)


def test_each_refused_row_is_tried():
    for row in ROWS:
        assert row.verdict != REFUSED or row.trial, row


@pytest.mark.parametrize("note, name, value", [trial for row in ROWS if row.verdict == NO_EFFECT for trial in trials(row)])
def test_what_has_no_effect_has_none(model, greedy, note, name, value):
    """Past the window the text is the same; or the release refuses the option in its own generate, too."""
    options = {"do_sample": False, name: value}
    try:
        model.generate(PROMPT, max_new_tokens=2, **options)
    except Exception as error:
        with pytest.raises(type(error), match=re.escape(str(error)[:40])):
            generate(PROMPT, model=model, max_new_tokens=2, **options, **WINDOW)
    else:
        assert generate(PROMPT, model=model, max_new_tokens=37, **options, **WINDOW).equal(greedy)
