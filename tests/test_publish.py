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

import pytest
import yaml

import publish
from amalgamate import FOLDER, published_code, read_modules
from hub import File, Hub, Repo

ROOT = Path(__file__).parents[1]
REPO = "acme/streams"
NOBODY = "http://127.0.0.1:1"
WITHOUT_RUNNING = """
import sys
sys.path[0] = sys.argv.pop(1)
import publish
publish.run_child = lambda *arguments: None
publish.difference_of_logits = lambda *arguments: 0.0
sys.exit(publish.main())
"""
# What is for those who work on the method, and does not go up.
STAYS = ("custom_generate/", "scripts/", "tests/", "results/", "pyproject.toml")


@pytest.fixture(scope="module")
def hub():
    with Hub({"writer": "write", "reader": "read"}) as hub:
        yield hub
    assert not hub.unknown


@pytest.fixture(autouse=True)
def _no_fault_outlives_its_test(hub):
    yield
    hub.fault, hub.swapped = None, {}


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A copy of the repository, without git."""
    folder = tmp_path_factory.mktemp("original") / "sink_cache"
    scripts = [f"scripts/{name}.py" for name in ("amalgamate", "publish")]
    modules = [f"{FOLDER}/{name}.py" for name in read_modules(ROOT)]
    for path in {*publish.list_files(ROOT), *scripts, *modules}:
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
    for path in publish.MODEL:
        shutil.copyfile(original / path, folder / path)
    return folder


@pytest.fixture
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def published(hub, original, tmp_path_factory) -> dict:
    """`REPO`, published and tagged as v2. It was private until then: the script loads what it has published with its token, too."""
    hub.repos[REPO] = Repo(is_private=True)
    result = result_of(run_publish(hub.url, original, tmp_path_factory.mktemp("home"), "--tag", "v2"))
    hub.repos[REPO].is_private = False
    return result


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


# What goes up


def test_all_that_git_tracks_goes_up_or_is_known_to_stay():
    """New files too, so that none is forgotten: in a folder that no pattern names, this fails."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    tracked = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.splitlines()
    visible = {path for path in tracked if not path.startswith(".") and "/." not in path and (ROOT / path).exists()}
    goes_up = publish.list_files(ROOT)
    assert {path for path in visible if not path.startswith(STAYS)} == {path for path in goes_up if not path.startswith(STAYS)}
    assert {path for path in goes_up if path.startswith(STAYS)} == {publish.METHOD, "custom_generate/requirements.txt"}


def test_a_dry_run_tells_the_difference_and_only_reads(hub, published, folder, home):
    for path in ("notes.txt", ".git/config", "figures/.hidden.png", "docs/sub/deep.md", "custom_generate/other.txt"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("not to be published")
    (folder / "docs" / "new.md").write_text("new")
    (folder / "LICENSE").write_text("another")
    (folder / "model.safetensors").write_bytes(b"other weights")
    (folder / "figures" / "kept.png").unlink()
    hub.requests.clear()
    result = result_of(run_publish(hub.url, folder, home, "--dry-run", token=None))
    assert result["added"] == ["docs/new.md"] and result["removed"] == ["figures/kept.png"]
    assert result["changed"] == ["LICENSE", "model.safetensors"]
    assert hub.requests and {method for method, _ in hub.requests} == {"GET"}


def test_a_dry_run_needs_no_network(original, home):
    result = result_of(run_publish(NOBODY, original, home, "--dry-run", token=None))
    assert result["files"] == publish.list_files(original) and "added" not in result


# What arrives


def test_what_is_published_is_the_repository_with_its_modules_as_one_file(hub, published, original):
    """In one commit, with the name in the pages, the weights in LFS, and checked from the Hub before it is tagged."""
    repo = hub.repos[REPO]
    remote = repo.files()
    assert published["added"] == publish.list_files(original) == sorted(remote.keys() - {".gitattributes"})
    assert remote[publish.METHOD].decode() == published_code(original)
    for path, content in remote.items():
        if path.endswith(".md"):
            text, local = content.decode(), (original / path).read_text(encoding="utf-8").replace("org/sink_cache", REPO)
            assert "org/sink_cache" not in text and re.sub(r"\]\([^)]*\)|\[", "", text) == re.sub(r"\]\([^)]*\)|\[", "", local).replace("]", "]")
        elif path not in (".gitattributes", publish.METHOD):
            assert content == (original / path).read_bytes()
    assert f'custom_generate="{REPO}"' in remote["README.md"].decode()
    assert repo.commits[published["commit"]]["model.safetensors"].is_large
    assert len(repo.commits) == 2 and repo.main == published["commit"] and repo.tags == {"v2": published["commit"]}
    assert published["max_logit_difference"] == 0 and published["tag"] == "v2"


def test_logits_from_the_hub_are_those_of_the_modules(hub, published, weights, home):
    """A batch of rows of different lengths, chunks over the edge of the window and far past it; and one file is all that is asked for."""
    hub.requests.clear()
    run_user(
        hub,
        home,
        f"""
        import sys
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        sys.path.insert(0, {str(ROOT)!r})
        from custom_generate.generate import SinkCache, generate

        repo = {REPO!r}
        model = AutoModelForCausalLM.from_pretrained({str(weights)!r})
        ids = torch.randint(2, 2000, (3, 70), generator=torch.Generator().manual_seed(0))
        mask = (torch.arange(70) >= torch.tensor([0, 9, 40])[:, None]).long()
        found = get_class_from_dynamic_module("custom_generate/generate.SinkCache", repo, trust_remote_code=True)
        assert found is not SinkCache

        @torch.no_grad()
        def feed(kind):
            cache = kind.from_model(model, 16, 4)
            parts = zip(ids.split([20, 9, 1, 1, 12, 27], 1), mask.split([20, 9, 1, 1, 12, 27], 1))
            return torch.cat([model(**cache.prepare(*part)).logits for part in parts], 1)

        assert feed(found).equal(feed(SinkCache))
        options = dict(attention_mask=mask, window_length=16, max_new_tokens=30, min_new_tokens=30, do_sample=False)
        options |= dict(output_logits=True, return_dict_in_generate=True)
        there = model.generate(ids, custom_generate=repo, trust_remote_code=True, **options)
        here = generate(ids, model=model, **options)
        assert torch.stack(there.logits).equal(torch.stack(here.logits)) and len(here.logits) == 30
        print("ok")
        """,
    )
    asked = {path.rpartition("/")[2] for method, path in hub.requests if method == "GET" and path.endswith(".py")}
    assert asked == {"generate.py"}


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
        for revision in ("v2", commit, "main"):
            check(model.generate(**inputs, **trust, **window, **arguments, revision=revision))
        try:
            model.generate(**inputs, **trust, **window, **arguments, revision="v0")
        except OSError:
            pass
        else:
            raise AssertionError("a revision that does not exist")
        generate = model.load_custom_generate(repo, trust_remote_code=True)
        check(generate(model=model, **inputs, **window, **arguments))
        loaded = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True, revision="v2")
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


def test_a_private_repository(hub, published, weights, home):
    """A user loads it with `token=`, of which `generate` makes nothing else."""
    repo = hub.repos["acme/private"] = Repo(is_private=True)
    repo.main = repo.commit(repo.main, hub.repos[REPO].commits[published["commit"]])
    run_user(
        hub,
        home,
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
        assert load(token="reader").config.model_type == "qwen3"
        generate(model, token="reader")
        print("ok")
        """,
    )


def test_the_first_version_is_published_from_its_commit_as_it_is(hub, original, folder, weights, home, tmp_path):
    """And the modules after it: who asks for revision="v1" has the single file, word for word, and others what came later."""
    first = published_code(original) + '\n_generate = generate\n\n\ndef generate(**kwargs):\n    return "the first version"\n'

    def git(*arguments) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "core.excludesFile="]
        return subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()

    modules = {path: path.read_bytes() for path in (folder / FOLDER).glob("*.py")}
    for path in modules:
        path.unlink()
    (folder / FOLDER / "generate.py").write_text(first)
    for command in (["init"], ["add", "-f", "."], ["commit", "-m", "one file"]):
        git(*command)
    commit = git("rev-parse", "HEAD")
    for path, content in modules.items():
        path.write_bytes(content)

    def attempt(*arguments, **options) -> dict:
        return result_of(run_publish(hub.url, folder, home, *arguments, repo_id="acme/two", running=False))

    attempt("--commit", commit, "--tag", "v1")
    repo = hub.repos["acme/two"]
    assert repo.files()[publish.METHOD].decode() == first
    assert attempt("--tag", "v2")["changed"] == [publish.METHOD]
    assert repo.files("v1")[publish.METHOD].decode() == first
    assert "with changes that are not committed" in repo.files("v2")[publish.METHOD].decode() or len(modules) == 1
    run_user(
        hub,
        tmp_path,
        f"""
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained({str(weights)!r})
        arguments = dict(custom_generate="acme/two", trust_remote_code=True, window_length=16, max_new_tokens=20)
        ids = torch.tensor([[0, 5, 6]])
        assert model.generate(ids, revision="v1", **arguments) == "the first version"
        assert model.generate(ids, **arguments).shape == (1, 23)
        print("ok")
        """,
    )


def test_commit_925a8cd_goes_up_as_it_is(tmp_path):
    """The first version itself."""
    found = subprocess.run(["git", "show", f"925a8cd:{publish.METHOD}"], capture_output=True, cwd=ROOT)
    if found.returncode:
        pytest.skip("not a git checkout with that commit")
    root = publish.checked_out("925a8cd", tmp_path / "checkout")
    publish.stage(root, REPO, "", tmp_path / "staged")
    assert (tmp_path / "staged" / publish.METHOD).read_bytes() == found.stdout
    with pytest.raises(publish.Refusal, match="--commit nowhere: "):
        publish.checked_out("nowhere", tmp_path)


def test_links_work_on_the_hub_too():
    """A link to a file that does not go up becomes its text; code, pictures and links to elsewhere stay."""
    files = ["README.md", "docs/speed.md", "docs/models.md"]
    text = "[a](models.md#x) [`b`](../scripts/plot.py) [c](../README.md) [d](https://e.org/f) [g](#h) ![i](../figures/i.png) `[j](k)`\n"
    text += "```python\ntable[0](l)\n```\n[m](../docs) [n](../tests)"
    expected = text.replace("[`b`](../scripts/plot.py)", "`b`").replace("[n](../tests)", "n")
    assert publish.with_own_links(text, "docs/speed.md", files) == expected


# What goes wrong


def test_an_answer_that_is_lost_is_found_by_the_next_run(hub, original, home):
    """All is there then, the user is told to look, and the next run finds nothing to do but to tag."""

    def attempt():
        return run_publish(hub.url, original, home, "--tag", "v1", repo_id="acme/lost", running=False)

    hub.fault = ("/commit/", "answer lost")
    assert "Run the same command again" in refusal_of(attempt())
    repo = hub.repos["acme/lost"]
    head = repo.main
    assert not hub.fault and len(repo.commits) == 2 and not repo.tags
    for _ in range(2):  # also with the tag there already
        result = result_of(attempt())
        assert result["commit"] == head and not result["added"] + result["changed"] + result["removed"]
        assert len(repo.commits) == 2 and repo.tags == {"v1": head} and result["tag"] == "v1"


def test_an_upload_that_fails_publishes_nothing(hub, published, folder, home):
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    hub.fault = ("/large/", 413)
    assert "413" in refusal_of(run_publish(hub.url, folder, home, running=False)) and not hub.fault
    assert hub.repos[REPO].main == published["commit"]


def test_what_somebody_else_commits_meanwhile_is_not_overwritten(hub, published, folder, home):
    (folder / "LICENSE").write_text("another")
    repo = hub.repos[REPO]

    def commit():
        repo.main = repo.commit(published["commit"], repo.commits[published["commit"]] | {"LICENSE": File(b"theirs")})

    hub.fault = ("/commit/", commit)
    line = refusal_of(run_publish(hub.url, folder, home, running=False))
    theirs, repo.main = repo.main, published["commit"]
    assert "A commit has happened since" in line and repo.files(theirs)["LICENSE"] == b"theirs"


def test_what_differs_on_the_hub_is_found_and_not_tagged(hub, published, original, home):
    code = published_code(original)
    code += "\n\n_generate = generate\n\n\ndef generate(**kwargs):\n    return _generate(**(kwargs | {'num_sink_tokens': 3}))\n"
    hub.swapped = {publish.METHOD: code.encode()}
    line = refusal_of(run_publish(hub.url, original, home, "--tag", "v3"))
    assert published["commit"] in line and "logits differ by" in line and "v3" not in hub.repos[REPO].tags


# What is refused


def test_code_that_does_not_work_is_not_published(hub, published, folder, home):
    (folder / publish.METHOD).write_text("def generate(*args, **kwargs):\n    raise ValueError('broken')\n")
    for path in (folder / FOLDER).glob("*.py"):
        if path.name != "generate.py":
            path.unlink()
    line = refusal_of(run_publish(hub.url, folder, home))
    assert "nothing was published" in line and "broken" in line
    (folder / FOLDER / "more.py").write_text('"""More."""\n')
    (folder / publish.METHOD).write_text('"""One."""\n')
    assert "generate.py does not import from more.py" in refusal_of(run_publish(hub.url, folder, home))
    assert hub.repos[REPO].main == published["commit"]


def test_a_token_that_may_only_read(hub, published, folder, home):
    (folder / "LICENSE").write_text("another")
    line = refusal_of(run_publish(hub.url, folder, home, token="reader", running=False))
    assert "The token may not write there." in line and hub.repos[REPO].main == published["commit"]


@pytest.mark.parametrize(
    ("arguments", "options", "reason"),
    [
        ([], {"token": None}, "No token: log in"),
        ([], {"token": "of somebody else"}, "The Hub does not accept the token."),
        ([], {"repo_id": "streams"}, "--repo-id must be ORG/NAME, got streams."),
        ([], {"repo_id": "acme/a--b"}, "--repo-id: "),
        (["--dry-run"], {"token": "of somebody else"}, "The Hub does not accept the token."),
        (["--tag", "a b"], {}, "--tag must be of letters"),
        (["--commit", "nowhere"], {}, "--commit nowhere: "),
    ],
)
def test_it_is_refused_at_once(hub, published, original, home, arguments, options, reason):
    hub.requests.clear()
    assert reason in refusal_of(run_publish(hub.url, original, home, *arguments, **options))
    assert {method for method, _ in hub.requests} <= {"GET", "HEAD"}


def test_a_tag_of_another_state_is_refused_before_the_commit(hub, published, folder, home):
    (folder / "LICENSE").write_text("another")
    assert "The tag v2 exists" in refusal_of(run_publish(hub.url, folder, home, "--tag", "v2"))
    assert hub.repos[REPO].main == published["commit"]


def test_no_network(original, home):
    assert f"{NOBODY} does not answer." in refusal_of(run_publish(NOBODY, original, home))


def test_files_of_others_are_not_touched(hub, published, original, home):
    """But for what the Hub itself puts there."""
    repo = hub.repos[REPO]
    theirs = {path: File(b"theirs") for path in ("weights.bin", "docs/more/README.md", "scripts/run.py")}
    repo.main = repo.commit(published["commit"], repo.commits[published["commit"]] | theirs)
    try:
        line = refusal_of(run_publish(hub.url, original, home))
    finally:
        repo.main = published["commit"]
    assert "docs/more/README.md, scripts/run.py, weights.bin" in line and ".gitattributes" not in line


def test_a_repository_of_something_else_is_left_alone(hub, original, home):
    """All its files have names that ours have, too."""
    repo = hub.repos["acme/model"] = Repo()
    files = {name: File(b"theirs") for name in ("README.md", "config.json", "model.safetensors")}
    before = repo.main = repo.commit(repo.main, files)
    line = refusal_of(run_publish(hub.url, original, home, repo_id="acme/model"))
    assert "holds something else" in line and "README.md, config.json, model.safetensors" in line
    assert repo.main == before


def test_what_is_missing_is_named(folder, tmp_path):
    (folder / "LICENSE").unlink()
    with pytest.raises(publish.Refusal, match="lacks LICENSE: .* has no such file"):
        publish.stage(folder, REPO, "", tmp_path)
    (folder / "LICENSE").write_text("x")
    (folder / "README.md").write_text("no example")
    with pytest.raises(publish.Refusal, match="no example with custom_generate"):
        publish.stage(folder, REPO, "", tmp_path)


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
    with pytest.raises(publish.Refusal, match=re.escape(reason)) as refused:
        publish.check_card(f"---\n{header.strip()}\n---\ntext\n" if header else "text\n")
    assert "\n" not in str(refused.value)


def test_a_card_as_the_hub_wants_it_passes():
    publish.check_card(f"---\n{yaml.safe_dump(CARD)}---\ntext\n")
