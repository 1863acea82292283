"""What `scripts/publish.py` puts on the Hub, what it refuses, and the ways in from there. Over HTTP, with the real client and a Hub on
loopback; scripts and users run in processes of their own, with empty caches."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import publish
import pytest
import yaml
from families import TRANSFORMERS
from hub import File, Hub, Repo
from packaging.version import Version

ROOT = Path(__file__).parents[1]
REPO = "acme/streams"
NOBODY = "http://127.0.0.1:1"
WITHOUT_RUNNING = """
import sys
sys.path[0] = sys.argv.pop(1)
import publish
publish.run_child = lambda *arguments: {}
sys.exit(publish.main())
"""


@pytest.fixture(scope="module")
def hub():
    with Hub({"writer": "write", "reader": "read"}) as hub:
        yield hub
    assert not hub.unknown


@pytest.fixture(autouse=True)
def _no_fault_outlives_its_test(hub):
    yield
    hub.faults, hub.swapped = [], {}


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A copy of what belongs on the Hub, as a checkout from there would be: without git."""
    folder = tmp_path_factory.mktemp("original") / "sink_cache"
    for path in publish.list_files(ROOT, publish.PATTERNS):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, folder / path)
    return folder


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """One to spoil."""
    return Path(shutil.copytree(original, tmp_path / "sink_cache"))


@pytest.fixture(scope="module")
def weights(original, tmp_path_factory) -> Path:
    """The model alone: some releases look for a method beside every model that they load."""
    folder = tmp_path_factory.mktemp("weights")
    for path in publish.list_files(original, publish.MODEL_PATTERNS):
        shutil.copyfile(original / path, folder / path)
    return folder


@pytest.fixture
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def published(hub, original, tmp_path_factory) -> dict:
    """`REPO`, published and tagged as v1.0.0."""
    done = run_publish(hub.url, original, tmp_path_factory.mktemp("home"), "--tag", "v1.0.0")
    return result_of(done)


def run(command: list, url: str, home: Path, token: str | None) -> subprocess.CompletedProcess:
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    variables |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    variables |= {"NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"} | ({"HF_TOKEN": token} if token else {})
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=variables, timeout=300)


def run_publish(url: str, folder: Path, home: Path, *arguments, repo_id: str = REPO, token: str | None = "writer", running=True):
    """Without running the model, which takes most of the time, where that is not what is tested."""
    script = [folder / "scripts" / "publish.py"] if running else ["-c", WITHOUT_RUNNING, folder / "scripts"]
    return run([sys.executable, *script, "--repo-id", repo_id, *arguments], url, home, token)


def result_of(done: subprocess.CompletedProcess) -> dict:
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def refusal_of(done: subprocess.CompletedProcess) -> str:
    """The one line that says why."""
    assert done.returncode == 1 and not done.stdout and "Traceback" not in done.stderr, done.stderr[-3000:]
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    return line


def run_user(hub: Hub, home: Path, code: str, token: str | None = None) -> str:
    done = run([sys.executable, "-c", textwrap.dedent(code)], hub.url, home, token)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


# What belongs there


def test_all_that_git_tracks_is_published_but_for_hidden_files():
    """New files too, so that none is forgotten: in a folder that no pattern names, this fails."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    tracked = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.splitlines()
    visible = {path for path in tracked if not path.startswith(".") and "/." not in path and (ROOT / path).exists()}
    assert set(publish.list_files(ROOT, publish.PATTERNS)) == visible


def test_what_lies_around_is_not_published(hub, published, original, folder, home):
    litter = [
        ".gitignore",
        ".ci/run",
        ".git/config",
        "notes.txt",
        "model.bin",
        "scripts/.hidden.py",
        "scripts/__pycache__/common.cpython-311.pyc",
        "scripts/sub/deep.py",
        "tests/.pytest_cache/README.md",
        "tests/output.json",
        "custom_generate/other.py",
    ]
    for path in litter:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("x")
    clean = sorted(path.relative_to(original).as_posix() for path in original.rglob("*") if path.is_file())
    clean = [path for path in clean if "__pycache__" not in path]
    done = run_publish(hub.url, folder, home, "--dry-run")
    result = result_of(done)
    assert result["files"] == clean and result["unchanged"] == len(clean)
    told = re.findall(r"left out (\S+):", done.stderr)
    assert told == ["custom_generate/other.py", "model.bin", "notes.txt", "scripts/sub/deep.py", "tests/output.json"]


def test_a_dry_run_tells_the_difference_and_only_reads(hub, published, folder, home):
    (folder / "LICENSE").write_text("another")
    (folder / "figures").mkdir(exist_ok=True)
    (folder / "figures" / "new.svg").write_text("<svg/>")
    (folder / "model.safetensors").write_bytes(b"other weights")
    (folder / "tests" / "oracle.py").unlink()
    hub.requests.clear()
    result = result_of(run_publish(hub.url, folder, home, "--dry-run", token=None))
    assert result["added"] == ["figures/new.svg"] and result["removed"] == ["tests/oracle.py"]
    assert result["changed"] == ["LICENSE", "model.safetensors"] and result["unchanged"] == len(result["files"]) - 3
    assert hub.requests and {method for method, _ in hub.requests} == {"GET"}


def test_a_dry_run_needs_no_network(original, other_model, home):
    result = result_of(run_publish(NOBODY, original, home, "--dry-run", token=None))
    assert result["files"] == publish.list_files(original, publish.PATTERNS) and "added" not in result
    result = result_of(run_publish(NOBODY, original, home, "--dry-run", "--base-model", other_model, token=None))
    models = publish.list_files(other_model, publish.MODEL_PATTERNS)
    assert result["files"] == sorted(publish.list_files(original, publish.METHOD_PATTERNS) + models)


# What arrives


def test_what_is_published_is_the_folder(hub, published, original):
    """In one commit, with the name in the model card, the weights in LFS, and checked from the Hub before it is tagged."""
    repo = hub.repos[REPO]
    local = {path: (original / path).read_bytes() for path in publish.list_files(original, publish.PATTERNS)}
    remote = repo.files()
    assert published["added"] == sorted(local) == sorted(remote.keys() - {".gitattributes"})
    card = remote.pop("README.md").decode()
    assert f'custom_generate="{REPO}"' in card and "org/sink_cache" not in card
    assert card.replace(REPO, "org/sink_cache") == local.pop("README.md").decode().replace(REPO, "org/sink_cache")
    assert all(remote[path] == content for path, content in local.items())
    assert repo.commits[published["commit"]]["model.safetensors"].is_large
    assert (
        len(repo.commits) == 2 and repo.branches == {"main": published["commit"]} and repo.tags == {"v1.0.0": published["commit"]}
    )
    assert published["commit_url"] == f"{hub.url}/{REPO}/commit/{published['commit']}" and published["pr_url"] is None
    assert published["max_logit_difference"] == 0 and published["tag"] == "v1.0.0" and not repo.is_private


def test_every_way_in_from_the_hub(hub, published, weights, home):
    run_user(
        hub,
        home,
        f"""
        from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        repo, commit, weights = {REPO!r}, {published["commit"]!r}, {str(weights)!r}
        model, tokenizer = AutoModelForCausalLM.from_pretrained(weights), AutoTokenizer.from_pretrained(repo)
        inputs = tokenizer("import os\\n", return_tensors="pt")
        window = dict(window_length=16, num_sink_tokens=4)
        trust = dict(custom_generate=repo, trust_remote_code=True)
        arguments = dict(max_new_tokens=40, min_new_tokens=40, do_sample=False, return_dict_in_generate=True)
        texts = []

        def check(outputs):
            cache = outputs.past_key_values
            assert type(cache).__name__ == "SinkCache" and cache.num_tokens_held == 16, cache
            texts.append(outputs.sequences[0].tolist())

        check(model.generate(**inputs, **trust, **window, **arguments))
        for revision in ("v1.0.0", commit, "main"):
            check(model.generate(**inputs, **trust, **window, **arguments, revision=revision))
        try:
            model.generate(**inputs, **trust, **window, **arguments, revision="v0")
        except OSError:
            pass
        else:
            raise AssertionError("a revision that does not exist")
        generate = model.load_custom_generate(repo, trust_remote_code=True)
        check(generate(model=model, **inputs, **window, **arguments))
        loaded = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True, revision="v1.0.0")
        check(loaded.generate(**inputs, **window, **arguments))
        SinkCache = get_class_from_dynamic_module("custom_generate/generate.SinkCache", repo, trust_remote_code=True)
        check(model.generate(**inputs, **trust, past_key_values=SinkCache(**window), **arguments))
        generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
        options = dict(max_new_tokens=40, min_new_tokens=40, do_sample=False, return_tensors=True)
        texts.append(generator("import os\\n", **trust, **window, **options)[0]["generated_token_ids"])
        assert len(texts[0]) == inputs.input_ids.shape[1] + 40 and all(text == texts[0] for text in texts), texts
        print("the same", len(texts), "times")
        """,
    )


def make_model(folder: Path) -> Path:
    """Another model than that of the repository, in several shards."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="300KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ROOT / name, folder / name)
    (folder / "training_args.bin").write_bytes(b"does not belong there")
    return folder


@pytest.fixture(scope="module")
def other_model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("other_model"))


def test_a_private_repository_with_another_model(hub, original, other_model, weights, home, tmp_path):
    """The model comes from the Hub. The script loads what it has published with the token of the environment, a user with `token=`."""
    base = hub.repos["acme/base"] = Repo(is_private=False)
    files = {path.name: File(path.read_bytes(), path.suffix == ".safetensors") for path in other_model.iterdir()}
    base.branches["main"] = base.commit(base.branches["main"], files, "a model")
    result = result_of(run_publish(hub.url, original, home, "--private", "--base-model", "acme/base", repo_id="acme/private"))
    repo = hub.repos["acme/private"]
    assert repo.is_private and result["max_logit_difference"] == 0
    remote = repo.files()
    assert publish.split_card(remote["README.md"].decode())[0]["base_model"] == "acme/base"
    shards = {path.name: path.read_bytes() for path in other_model.glob("*.safetensors")}
    assert len(shards) > 1 and all(remote[name] == content for name, content in shards.items())
    assert "model.safetensors" not in remote and "training_args.bin" not in remote and "tests/oracle.py" in remote
    assert remote["config.json"] == (other_model / "config.json").read_bytes()
    assert remote["custom_generate/generate.py"] == (original / "custom_generate" / "generate.py").read_bytes()
    # Up to 4.56, `generate` looks for the method with the token of the environment only.
    token = "reader" if TRANSFORMERS < Version("4.57") else None
    run_user(
        hub,
        tmp_path,
        f"""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        repo, weights = "acme/private", {str(weights)!r}

        def load(**token):
            return AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True, **token)

        def generate(model, **token):
            arguments = dict(window_length=16, max_new_tokens=30, min_new_tokens=30, return_dict_in_generate=True)
            outputs = model.generate(**inputs, custom_generate=repo, trust_remote_code=True, **arguments, **token)
            assert outputs.past_key_values.num_tokens_held == 16

        inputs = AutoTokenizer.from_pretrained(repo, token="reader")("import os", return_tensors="pt")
        model = AutoModelForCausalLM.from_pretrained(weights)
        for action in (load, lambda **token: generate(model, **token)):
            try:
                action(token=False)
            except OSError:
                pass
            else:
                raise AssertionError("without a token")
        assert load(token="reader").config.model_type == "llama"
        generate(model, token="reader")
        print("ok")
        """,
        token=token,
    )


def test_the_card_with_another_model(original, other_model):
    """Says whose weights they are, in metadata and text, and no longer that they are the tiny model's."""
    text = (original / "README.md").read_text(encoding="utf-8")
    card = publish.make_card(text, REPO, "Qwen/Qwen3-0.6B")
    header, body = publish.split_card(card)
    expected = publish.split_card(text)[0] | {"base_model": "Qwen/Qwen3-0.6B"}
    expected.pop("language", None)  # the tiny model's
    assert header == expected
    before, chapter = (
        re.search(r"\n## Base model\n.*?\n## Model compatibility\n", page, re.DOTALL).group() for page in (text, body)
    )
    _, code, training = re.split("```(?:python)?\n", before)
    assert (
        "[Qwen/Qwen3-0.6B](https://huggingface.co/Qwen/Qwen3-0.6B)" in chapter
        and "tiny model** that the rest of this page" in chapter
    )
    assert code.replace("org/sink_cache", REPO) in chapter and training not in chapter and "2 M parameters" not in chapter
    same = publish.make_card(text, REPO, None).split("\n## Model compatibility\n")[1]
    assert same == card.split("\n## Model compatibility\n")[1]

    header, body = publish.split_card(publish.make_card(text, REPO, str(other_model)))
    assert "base_model" not in header and str(other_model) not in body and "those of a `LlamaForCausalLM`" in body


def test_a_pull_request(hub, published, folder, home):
    """It is loaded from its own reference, and the branch stays as it was. Whoever may only read may propose."""
    (folder / "LICENSE").write_text("another")
    (folder / "tests" / "oracle.py").unlink()
    result = result_of(run_publish(hub.url, folder, home, "--create-pr", "--message", "Propose", token="reader"))
    repo = hub.repos[REPO]
    assert result["pr_url"] == f"{hub.url}/{REPO}/discussions/1" and repo.pulls == {"refs/pr/1": result["commit"]}
    assert repo.messages[result["commit"]] == "Propose" and repo.branches["main"] == published["commit"]
    assert result["changed"] == ["LICENSE"] and result["removed"] == ["tests/oracle.py"] and result["max_logit_difference"] == 0
    assert repo.files("refs/pr/1")["LICENSE"] == b"another" and "tests/oracle.py" not in repo.files("refs/pr/1")
    assert ("HEAD", f"/{REPO}/resolve/refs%2Fpr%2F1/custom_generate/generate.py") in hub.requests


def test_a_lost_connection_leaves_all_or_nothing(hub, original, home):
    """The commit lost: nothing is there, though the weights had been uploaded (after a first try that was lost, too, and that the client
    repeats). Its answer lost: all is there, the user is told to look, and the next run finds nothing to do but to tag."""

    def attempt():
        return run_publish(hub.url, original, home, "--tag", "v1", repo_id="acme/lost", running=False)

    hub.large.clear()  # what the Hub has is not sent again
    hub.faults = [("/large/", "lost"), ("/commit/", "lost")]
    assert "Nothing was published, acme/lost is empty." in refusal_of(attempt())
    repo = hub.repos["acme/lost"]
    assert list(repo.files()) == [".gitattributes"] and not repo.tags and not hub.faults
    hub.faults = [("/commit/", "answer lost")]
    assert "main of acme/lost has changed: run the same command again" in refusal_of(attempt())
    head = repo.branches["main"]
    assert not hub.faults and len(repo.commits) == 2 and not repo.tags
    for _ in range(2):  # also with the tag there already
        result = result_of(attempt())
        assert result["commit"] == head and not result["added"] and result["unchanged"] == len(repo.files()) - 1
        assert len(repo.commits) == 2 and repo.tags == {"v1": head} and result["tag"] == "v1"
        assert result["commit_url"] == f"{hub.url}/acme/lost/commit/{head}"


def test_a_tag_that_fails_is_told_apart_from_a_commit_that_fails(hub, published, original, home):
    hub.faults = [("/tag/", 403)]
    line = refusal_of(run_publish(hub.url, original, home, "--tag", "v3", running=False))
    assert f"{published['commit_url']} is published and works, but could not be tagged. The token may not" in line


def test_a_hub_that_is_gone_after_the_commit(hub, original, home):
    """Then nobody knows whether it arrived, and that is what is said."""
    hub.faults = [("/commit/", "lost"), ("/api/models/acme/gone", "lost")]
    line = refusal_of(run_publish(hub.url, original, home, repo_id="acme/gone", running=False))
    assert "Whether the commit arrived is not known: run the same command again" in line and not hub.faults


def test_an_upload_that_fails_publishes_nothing(hub, published, folder, home):
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    hub.faults = [("/large/", 413)]
    line = refusal_of(run_publish(hub.url, folder, home, "--replace-model", running=False))
    assert line.startswith("error: Nothing was published. ") and "413" in line and not hub.faults
    assert hub.repos[REPO].branches["main"] == published["commit"]


def test_what_somebody_else_commits_meanwhile_is_not_overwritten(hub, published, folder, home):
    (folder / "LICENSE").write_text("another")
    repo = hub.repos[REPO]
    files = repo.commits[published["commit"]]

    def commit():
        repo.branches["main"] = repo.commit(published["commit"], files | {"LICENSE": File(b"theirs")}, "theirs")

    hub.faults = [("/commit/", commit)]
    line = refusal_of(run_publish(hub.url, folder, home, running=False))
    theirs, repo.branches["main"] = repo.branches["main"], published["commit"]
    assert f"main of {REPO} has changed" in line and repo.files(theirs)["LICENSE"] == b"theirs"


def test_what_differs_on_the_hub_is_found_and_not_tagged(hub, published, original, home):
    code = (original / "custom_generate" / "generate.py").read_text(encoding="utf-8")
    code += "\n\n_generate = generate\n\n\ndef generate(**kwargs):\n    return _generate(**(kwargs | {'num_sink_tokens': 3}))\n"
    hub.swapped = {"custom_generate/generate.py": code.encode()}
    line = refusal_of(run_publish(hub.url, original, home, "--tag", "v2"))
    assert published["commit_url"] in line and "logits differ by" in line and "v2" not in hub.repos[REPO].tags


# What is refused


def test_code_that_does_not_work_is_not_published(hub, published, folder, home):
    (folder / "custom_generate" / "generate.py").write_text("def generate(model, **kwargs):\n    raise ValueError('broken')\n")
    line = refusal_of(run_publish(hub.url, folder, home))
    assert "nothing was published" in line and "broken" in line
    assert hub.repos[REPO].branches["main"] == published["commit"]


def test_a_token_that_may_only_read(hub, published, folder, home):
    (folder / "LICENSE").write_text("another")
    line = refusal_of(run_publish(hub.url, folder, home, token="reader", running=False))
    assert "The token may not write there." in line and "Nothing was published." in line
    assert hub.repos[REPO].branches["main"] == published["commit"]


@pytest.mark.parametrize(
    ("arguments", "options", "reason"),
    [
        ([], {"token": None}, "No token: log in"),
        ([], {"token": "of somebody else"}, "The Hub does not accept the token."),
        ([], {"repo_id": "streams"}, "--repo-id must be ORG/NAME, got streams."),
        ([], {"repo_id": "acme/a--b"}, "--repo-id: "),
        (["--private"], {}, f"{REPO} exists and is public."),
        (["--revision", "v1.0.0"], {}, f"{REPO} has no branch v1.0.0, only main"),
        (["--revision", "draft"], {}, f"{REPO} has no branch draft, only main"),
        (["--revision", "draft"], {"repo_id": "acme/new"}, "acme/new does not exist"),
        (["--create-pr"], {"repo_id": "acme/new"}, "acme/new does not exist"),
        (["--dry-run"], {"token": "of somebody else"}, "The Hub does not accept the token."),
        (["--create-pr", "--tag", "v2"], {}, "tag it when it is merged"),
        (["--tag", "a b"], {}, "--tag must be of letters"),
        (["--base-model", "acme/none"], {}, "acme/none is neither a folder nor can it be downloaded"),
        (["--base-model", Path(__file__).parent], {}, "lacks config.json, *.safetensors (code"),
    ],
)
def test_it_is_refused_at_once(hub, published, original, home, arguments, options, reason):
    hub.requests.clear()
    assert reason in refusal_of(run_publish(hub.url, original, home, *arguments, **options))
    assert {method for method, _ in hub.requests} <= {"GET", "HEAD"} and "acme/new" not in hub.repos


def test_a_tag_of_another_state_is_refused_before_the_commit(hub, published, folder, home):
    (folder / "LICENSE").write_text("another")
    assert "The tag v1.0.0 exists" in refusal_of(run_publish(hub.url, folder, home, "--tag", "v1.0.0"))
    assert hub.repos[REPO].branches["main"] == published["commit"]


def test_no_network(original, home):
    assert f"{NOBODY} does not answer." in refusal_of(run_publish(NOBODY, original, home))


def test_files_of_others_are_not_touched(hub, published, original, home):
    """But for what the Hub itself puts there."""
    repo = hub.repos[REPO]
    theirs = {path: File(b"theirs") for path in ("weights.bin", "docs/README.md", "scripts/more/run.py")}
    repo.branches["main"] = repo.commit(published["commit"], repo.commits[published["commit"]] | theirs, "theirs")
    try:
        line = refusal_of(run_publish(hub.url, original, home))
    finally:
        repo.branches["main"] = published["commit"]
    assert "docs/README.md, scripts/more/run.py, weights.bin" in line and ".gitattributes" not in line


def test_a_model_is_not_replaced_unasked(hub, published, folder, original, other_model, home):
    """By the tiny one, for want of --base-model in a later run: that would be the end of the model that is there."""
    for path in publish.list_files(folder, publish.MODEL_PATTERNS):
        (folder / path).unlink()
    for path in other_model.iterdir():
        shutil.copyfile(path, folder / path.name)
    line = refusal_of(run_publish(hub.url, folder, home, running=False))
    assert "holds another model" in line and "config.json, " in line and "--base-model" in line and "--replace-model" in line
    done = run_publish(hub.url, folder, home, "--dry-run")
    assert "holds another model" in done.stderr and "config.json" in result_of(done)["changed"]
    assert hub.repos[REPO].branches["main"] == published["commit"]
    result = result_of(run_publish(hub.url, folder, home, "--replace-model", running=False))
    assert "config.json" in result["changed"] and hub.repos[REPO].branches["main"] == result["commit"]
    hub.repos[REPO].branches["main"] = published["commit"]


def test_a_repository_of_something_else_is_left_alone(hub, original, home):
    """All its files have names that ours have, too."""
    repo = hub.repos["acme/model"] = Repo(is_private=False)
    files = {name: File(b"theirs") for name in ("README.md", "config.json", "model.safetensors")}
    before = repo.branches["main"] = repo.commit(repo.branches["main"], files, "a model")
    line = refusal_of(run_publish(hub.url, original, home, "--replace-model", repo_id="acme/model"))
    assert "holds something else" in line and "README.md, config.json, model.safetensors" in line
    assert repo.branches["main"] == before


CARD = {"library_name": "transformers", "license": "apache-2.0", "pipeline_tag": "text-generation", "tags": ["custom_generate"]}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (CARD | {"library_name": "diffusers"}, "needs library_name: transformers, got 'diffusers'"),
        (CARD | {"tags": "custom_generate"}, "needs tags, a list with custom_generate"),
        (CARD | {"tags": ["other"]}, "needs tags, a list with custom_generate"),
        (CARD | {"license": None}, "needs license, got None"),
        ({name: CARD[name] for name in CARD if name != "pipeline_tag"}, "needs pipeline_tag, got None"),
        ("license: [apache", "not valid YAML"),
        ("just text", "does not begin with metadata"),
        (None, "does not begin with metadata"),
    ],
)
def test_a_card_that_the_hub_could_not_list_is_refused(header, reason):
    header = yaml.safe_dump(header) if isinstance(header, dict) else header
    text = (
        f"---\n{header.strip()}\n---\n" if header else ""
    ) + '\n```python\nmodel.generate(custom_generate="org/sink_cache")\n```\n'
    with pytest.raises(publish.Refusal, match=re.escape(reason)) as refused:
        publish.make_card(text, REPO, None)
    assert "\n" not in str(refused.value)


def test_a_card_as_the_hub_wants_it_passes():
    text = f'---\n{yaml.safe_dump(CARD)}---\n\n```python\nmodel.generate(custom_generate="org/sink_cache")\n```\n'
    assert publish.make_card(text, REPO, None) == text.replace("org/sink_cache", REPO)
    with pytest.raises(publish.Refusal, match="no example"):
        publish.make_card(text.replace("custom_generate=", ""), REPO, None)
    with pytest.raises(publish.Refusal, match='no chapter "## Base model"'):
        publish.make_card(text, REPO, "Qwen/Qwen3-0.6B")
