"""The ways in: folder, `load_custom_generate`, `from_pretrained`, `pipeline`, the class by itself. In a process of its own each, as a
user would have it, and offline; torch and transformers are imported once for all."""

import textwrap
from pathlib import Path

import pytest
from packaging import version

from families import TRANSFORMERS
from processes import run_code

ROOT = Path(__file__).parents[1]
COMMON = f"""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    repo = {str(ROOT)!r}
    tokenizer = AutoTokenizer.from_pretrained(repo)
    inputs = tokenizer("import os\\n", return_tensors="pt")
    window = dict(window_length=16, num_sink_tokens=4)
    trust = dict(custom_generate=repo, trust_remote_code=True)
    arguments = dict(max_new_tokens=40, do_sample=False, return_dict_in_generate=True)
    def check(outputs):
        assert outputs.sequences.shape[1] == inputs.input_ids.shape[1] + 40
        cache = outputs.past_key_values
        assert type(cache).__name__ == "SinkCache" and cache.num_tokens_held == 16, cache
        print(outputs.sequences[0].tolist())
    model = AutoModelForCausalLM.from_pretrained(repo).float()
"""
WAYS = {
    "folder": "check(model.generate(**inputs, **trust, **window, **arguments))",
    "positional": "check(model.generate(inputs.input_ids, **trust, **window, **arguments))",
    "load_custom_generate": """
        generate = model.load_custom_generate(repo, trust_remote_code=True)
        check(generate(model=model, **inputs, **window, **arguments))
    """,
    "loader arguments": """
        check(model.generate(**inputs, **trust, revision=None, token=None, local_files_only=True, **window, **arguments))
    """,
    "from_pretrained": """
        model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True).float()
        check(model.generate(**inputs, **window, **arguments))
    """,
    "from_pretrained, positional": """
        model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True).float()
        check(model.generate(inputs.input_ids, **window, **arguments))
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    """,
    "generation config": """
        model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True).float()
        for name, value in window.items():
            setattr(model.generation_config, name, value)
        check(model.generate(**inputs, **arguments))
    """,
    "class": """
        SinkCache = get_class_from_dynamic_module("custom_generate/generate.SinkCache", repo, trust_remote_code=True)
        check(model.generate(**inputs, **trust, past_key_values=SinkCache(**window), **arguments))
    """,
    "class of another load, twice": """
        SinkCache = get_class_from_dynamic_module("custom_generate/generate.SinkCache", repo, trust_remote_code=True)
        import importlib, sys
        sys.path.insert(0, repo)
        another = importlib.import_module("custom_generate.generate")
        assert another.SinkCache is not SinkCache
        check(model.generate(**inputs, **trust, past_key_values=another.SinkCache(**window), **arguments))
    """,
    "class, from_model, the model's own generate": """
        SinkCache = get_class_from_dynamic_module("custom_generate/generate.SinkCache", repo, trust_remote_code=True)
        check(model.generate(**inputs, past_key_values=SinkCache.from_model(model, **window), **arguments))
    """,
}


def run(code: str, cwd: Path) -> str:
    done = run_code(textwrap.dedent(COMMON) + textwrap.dedent(code), cwd=cwd, timeout=300)
    return done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> str:
    return run(WAYS["folder"], tmp_path_factory.mktemp("elsewhere"))


@pytest.mark.parametrize("way", WAYS)
def test_every_way_in_gives_the_same_text(way, expected, tmp_path):
    assert run(WAYS[way], tmp_path) == expected


def test_pipeline(tmp_path):
    run("""
        from transformers import pipeline
        generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
        call = dict(**trust, **window, max_new_tokens=40, do_sample=False)
        alone = [generator(text, **call)[0]["generated_text"] for text in ("import os\\n", "def main(arguments):\\n    ")]
        generator.tokenizer.pad_token = tokenizer.eos_token
        batched = generator(["import os\\n", "def main(arguments):\\n    "], batch_size=2, **call)
        assert [one[0]["generated_text"] for one in batched] == alone
        print("ok")
    """, tmp_path)


@pytest.mark.skipif(TRANSFORMERS < version.parse("5.16"), reason="local folders are trusted")
def test_it_is_refused_without_trust(tmp_path):
    run("""
        try:
            model.generate(**inputs, custom_generate=repo, trust_remote_code=False, **window)
        except ValueError as error:
            print("refused:", error)
        else:
            raise AssertionError
    """, tmp_path)
