"""Publish this repository on the Hugging Face Hub, and check what has been published by loading it from there.

What belongs there is put together first, and its own code is run on its own weights. Then it is compared with what the Hub has,
and the difference goes there in one commit: all of it or nothing. At last a new process with an empty cache loads model and
method from the Hub, at that commit, and has to find the same logits; only then the tag is set. Progress goes to standard error;
the last line on standard output is one JSON document.

    python scripts/publish.py --repo-id ORG/NAME --dry-run
    python scripts/publish.py --repo-id ORG/NAME --tag v1.0.0
    python scripts/publish.py --repo-id ORG/NAME --base-model Qwen/Qwen3-0.6B --create-pr

The token is that of `hf auth login`, or HF_TOKEN.
"""

import argparse
import dataclasses
import fnmatch
import functools
import gc
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

ROOT = Path(__file__).resolve().parents[1]
METHOD = "custom_generate/generate.py"
# What belongs on the Hub; an asterisk stops at a slash. What is there and matches is ours to change and to remove.
METHOD_PATTERNS = (
    "README.md",
    "LICENSE",
    METHOD,
    "custom_generate/requirements.txt",
    "scripts/*.py",
    "scripts/requirements.txt",
    "tests/*.py",
    "tests/requirements.txt",
    "tests/pytest.ini",
    "figures/*.png",
    "figures/*.svg",
    "results/*.csv",
)
MODEL_PATTERNS = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
PATTERNS = METHOD_PATTERNS + MODEL_PATTERNS
REQUIRED_FILES = ("README.md", METHOD, "config.json", "*.safetensors")
OF_THE_HUB = {".gitattributes"}
OF_A_NEW_REPOSITORY = {"README.md", "LICENSE"}  # which the Hub's form for new repositories can put there
REQUIRED_METADATA = {"library_name": "transformers", "license": None, "pipeline_tag": None}  # None: any value
TAG_OF_METHODS = "custom_generate"
MODEL_CHAPTER = re.compile(r"(?<=\n)## Base model\n.*?(?=\n## )", re.DOTALL)
MODEL_CHAPTER_TEXT = """## Base model

Any decoder-only model that encodes positions relatively; see the next chapter. Weights, configuration and tokenizer in this repository
are those of {model}, so that method and model can be tried together:

{code}
The **tiny model** that the rest of this page speaks of, and that some of `tests/` need, is not in this repository;
`scripts/train_tiny_model.py` makes it.
"""
MAX_LOGIT_DIFFERENCE = 1e-5  # of two runs on one machine
# httpx and httpx2 do not derive their errors from OSError, and which of them the Hub's client uses depends on its release.
NETWORK_ERRORS = (OSError, HfHubHTTPError.__bases__[0])

log = functools.partial(print, file=sys.stderr, flush=True)


class Refusal(Exception):
    """The reason why nothing is done, or why it ended: one line for the user."""


def explain(error: BaseException) -> str:
    """One line, with the causes that libraries hide behind a general sentence."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    hint = {401: "The Hub does not accept the token. ", 403: "The token may not write there. "}.get(status, "")
    if status is None and type(error).__module__.startswith(("requests", "httpx")):
        hint = f"{constants.ENDPOINT} does not answer. "
    line = hint + " ".join(f"{type(error).__name__}: {error}".split())
    return line if hint or status or error.__cause__ is None else f"{line} {explain(error.__cause__)}"


# What is published


def list_files(folder: Path, patterns: tuple[str, ...]) -> list[str]:
    found = (path for pattern in patterns for path in folder.glob(pattern) if path.is_file() and not path.name.startswith("."))
    return sorted(path.relative_to(folder).as_posix() for path in found)


def list_left_out(folder: Path, listed: list[str]) -> list[str]:
    """What lies where ours does and is not published: it may have been meant to be."""
    places = {Path(pattern).parts[0] for pattern in METHOD_PATTERNS if "/" in pattern}
    found = [*folder.glob("*"), *(path for place in places for path in (folder / place).rglob("*"))]
    paths = {path.relative_to(folder) for path in found if path.is_file()}
    is_hidden = {path for path in paths if any(part.startswith((".", "__pycache__")) for part in path.parts)}
    return sorted({path.as_posix() for path in paths - is_hidden} - set(listed))


def is_ours(path: str) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) and path.count("/") == pattern.count("/") for pattern in PATTERNS)


def stage(repo_id: str, base_model: str | None, folder: Path) -> dict[str, CommitOperationAdd]:
    """Put what is published into the folder, the model card as it will read, and all else as links."""
    model_folder = find_model(base_model) if base_model else ROOT
    sources = {path: ROOT / path for path in list_files(ROOT, METHOD_PATTERNS)}
    sources |= {path: model_folder / path for path in list_files(model_folder, MODEL_PATTERNS)}
    lacking = [path for path in REQUIRED_FILES if not fnmatch.filter(sources, path)]
    if lacking:
        raise Refusal(
            f"What would be published lacks {', '.join(lacking)} (code is taken from {ROOT}, weights from {model_folder})."
        )
    for path in list_left_out(ROOT, list_files(ROOT, PATTERNS)):
        log(f"  left out {path}: not one of the files that belong to the method")
    card = make_card(sources.pop("README.md").read_text(encoding="utf-8"), repo_id, base_model)
    (folder / "README.md").write_text(card, encoding="utf-8", newline="\n")
    for path, source in sources.items():
        (folder / path).parent.mkdir(exist_ok=True)
        try:
            (folder / path).symlink_to(source.resolve())
        except OSError:  # Windows, without the right to make links
            shutil.copyfile(source, folder / path)
    return {path: CommitOperationAdd(path, folder / path) for path in sorted(["README.md", *sources])}


def find_model(base_model: str) -> Path:
    """The folder with a model's files; those of a model on the Hub are downloaded."""
    if Path(base_model).is_dir():
        return Path(base_model)
    log(f"Getting {base_model} ...")
    try:
        return Path(snapshot_download(base_model, allow_patterns=list(MODEL_PATTERNS)))
    except (*NETWORK_ERRORS, ValueError) as error:
        raise Refusal(f"The base model {base_model} is neither a folder nor can it be downloaded. {explain(error)}") from error


def make_card(text: str, repo_id: str, base_model: str | None) -> str:
    """The model card with the real name in its examples and, with another model, what has to be said of that."""
    shown = re.search(r'custom_generate="([\w.-]+/[\w.-]+)"', text)
    if shown is None:
        raise Refusal('README.md has no example with custom_generate="ORG/NAME", in which to put the name of the repository.')
    text = text.replace(shown[1], repo_id)
    header, body = split_card(text)
    if base_model is None:
        return text
    chapter = MODEL_CHAPTER.search(body)
    code = re.search(r"```python\n.*?```\n", chapter[0], re.DOTALL) if chapter else None
    if code is None:
        raise Refusal('README.md has no chapter "## Base model" with an example that could be written for the base model.')
    if Path(base_model).is_dir():  # whose name says nothing to others
        name = f"a `{json.loads(Path(base_model, 'config.json').read_text())['architectures'][0]}`"
    else:
        name = f"[{base_model}](https://huggingface.co/{base_model})"
        header["base_model"] = base_model
    header.pop("language", None)  # the tiny model's
    log(f"The card says license: {header['license']}. See that the base model's allows it.")
    body = body.replace(chapter[0], MODEL_CHAPTER_TEXT.format(model=name, code=code[0]))
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n{body}"


def split_card(text: str) -> tuple[dict, str]:
    """Metadata and text of a model card, once the metadata has been found to be what the Hub needs to list a method."""
    block = re.match(r"---\n(.*?\n)---\n", text, re.DOTALL)
    try:
        header = yaml.safe_load(block[1]) if block else None
    except yaml.YAMLError as error:
        raise Refusal(f"The metadata of README.md is not valid YAML. {explain(error)}") from error
    if not isinstance(header, dict):
        raise Refusal("README.md does not begin with metadata: `name: value` lines between two lines of three dashes.")
    for name, value in REQUIRED_METADATA.items():
        if header.get(name) is None or value not in (None, header[name]):
            raise Refusal(f"The metadata of README.md needs {name}{f': {value}' if value else ''}, got {header.get(name)!r}.")
    if not isinstance(header.get("tags"), list) or TAG_OF_METHODS not in header["tags"]:
        raise Refusal(f"The metadata of README.md needs tags, a list with {TAG_OF_METHODS} in it, got {header.get('tags')!r}.")
    return header, text[block.end() :]


# What the Hub has


@dataclasses.dataclass
class Remote:
    """A repository on the Hub, or what it will be as soon as it is created."""

    exists: bool = False
    refs: dict[str, str] = dataclasses.field(default_factory=dict)  # branch or pull request -> commit
    tags: dict[str, str] = dataclasses.field(default_factory=dict)
    head: str | None = None  # the commit on which ours is put
    files: dict[str, RepoFile] = dataclasses.field(default_factory=dict)


def look(api: HfApi, args: argparse.Namespace) -> Remote:
    try:
        info = api.model_info(args.repo_id)
    except RepositoryNotFoundError:
        if args.create_pr or args.revision != "main":
            raise Refusal(
                f"{args.repo_id} does not exist, or the token does not open it: there is no {args.revision} in it."
            ) from None
        return Remote()
    if args.private and not info.private:
        raise Refusal(f"{args.repo_id} exists and is public. Make it private in its settings, or leave out --private.")
    found = api.list_repo_refs(args.repo_id, include_pull_requests=True)
    refs = {ref.name: ref.target_commit for ref in found.branches}
    refs |= {ref.ref: ref.target_commit for ref in found.pull_requests}
    if args.revision not in refs:
        raise Refusal(f"{args.repo_id} has no branch {args.revision}, only {', '.join(refs)}. Create it there, or take another.")
    head = refs[args.revision]
    tree = api.list_repo_tree(args.repo_id, recursive=True, revision=head)
    files = {entry.path: entry for entry in tree if isinstance(entry, RepoFile) and entry.path not in OF_THE_HUB}
    foreign = sorted(path for path in files if not is_ours(path))
    if foreign:
        raise Refusal(
            f"{args.repo_id} has files that are not of this repository: {', '.join(foreign)}. Delete them there, or publish to another "
            "repository."
        )
    if METHOD not in files and not files.keys() <= OF_A_NEW_REPOSITORY:
        raise Refusal(
            f"{args.repo_id} holds something else: it has no {METHOD}, but {', '.join(sorted(files))}. Publish to another repository."
        )
    return Remote(True, refs, {ref.name: ref.target_commit for ref in found.tags}, head, files)


def is_same(local: CommitOperationAdd, remote: RepoFile) -> bool:
    """Without a download: the Hub tells git's hash of a file, or SHA-256 of a large one."""
    if remote.lfs is not None:
        return local.upload_info.sha256.hex() == remote.lfs.sha256
    with local.as_file() as file:
        content = file.read()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == remote.blob_id


def compare(local: dict[str, CommitOperationAdd], remote: dict[str, RepoFile]) -> dict:
    common = local.keys() & remote.keys()
    changed = sorted(path for path in common if not is_same(local[path], remote[path]))
    difference = {
        "added": sorted(local.keys() - common),
        "changed": changed,
        "removed": sorted(remote.keys() - common),
        "unchanged": len(common) - len(changed),
    }
    for kind in ("added", "changed", "removed"):
        for path in difference[kind]:
            log(f"  {kind:8}{path}")
    log(f"  unchanged: {difference['unchanged']} files")
    return difference


# Publishing


@dataclasses.dataclass
class Published:
    commit_url: str
    commit: str
    pr_url: str | None
    revision: str  # at which it can be loaded


def put(api: HfApi, args: argparse.Namespace, remote: Remote, operations: list) -> Published:
    if not operations:
        log("Nothing has changed: no commit.")
        return Published(f"{api.endpoint}/{args.repo_id}/commit/{remote.head}", remote.head, None, remote.head)
    if not remote.exists:
        log(f"Creating {args.repo_id}, {'private' if args.private else 'public'} ...")
        api.create_repo(args.repo_id, private=args.private)
        remote = look(api, args)
    log(f"Committing {len(operations)} file{'s' * (len(operations) > 1)} ...")
    try:
        info = api.create_commit(
            args.repo_id,
            operations,
            commit_message=args.message,
            revision=args.revision,
            create_pr=args.create_pr,
            parent_commit=remote.head,  # refused if somebody else was faster
        )
    except Exception as error:  # whatever it was, the question is what stands on the Hub now
        raise Refusal(f"{what_arrived(api, args, remote)} {explain(error)}") from error
    log(f"Published: {info.pr_url or info.commit_url}")
    return Published(info.commit_url, info.oid, info.pr_url, info.pr_revision or info.oid)


def what_arrived(api: HfApi, args: argparse.Namespace, before: Remote) -> str:
    again = "run the same command again, it compares before it publishes."
    try:
        after = look(api, args)
    except (*NETWORK_ERRORS, Refusal):
        return f"Whether the commit arrived is not known: {again}"
    moved = [name for name, commit in after.refs.items() if before.refs.get(name) != commit]
    if moved:
        return f"Meanwhile {', '.join(moved)} of {args.repo_id} has changed: {again}"
    return f"Nothing was published{'' if before.files else f', {args.repo_id} is empty'}."


def publish(args: argparse.Namespace, folder: Path, logits: str) -> dict:
    check_arguments(args)
    additions = stage(args.repo_id, args.base_model, folder)
    api = HfApi()
    try:
        remote = look(api, args)
    except NETWORK_ERRORS as error:
        if not args.dry_run or getattr(error, "response", None) is not None:  # an answer that nothing can be seen there is one
            raise
        log(f"Not compared with the Hub. {explain(error)}")
        return {"repo_id": args.repo_id, "dry_run": True, "files": list(additions)}
    log(f"{args.repo_id}, {args.revision}: {remote.head if remote.exists else 'not there yet'}")
    difference = compare(additions, remote.files)
    operations = [additions[path] for path in difference["added"] + difference["changed"]]
    operations += [CommitOperationDelete(path) for path in difference["removed"]]
    replaced = [path for path in difference["changed"] + difference["removed"] if path == "config.json" or "safetensors" in path]
    if replaced and not args.replace_model:
        reason = (
            f"{args.repo_id} holds another model than what would be published ({', '.join(replaced)} would change). Give --base-model as "
            "when it was published, or --replace-model if another model is meant to go there."
        )
        if not args.dry_run:
            raise Refusal(reason)
        log(reason)
    if args.tag in remote.tags and (operations or remote.tags[args.tag] != remote.head):
        raise Refusal(f"The tag {args.tag} exists, and names another state ({remote.tags[args.tag]}). Take another name.")
    if args.dry_run:
        return {"repo_id": args.repo_id, "dry_run": True, "files": list(additions), **difference}

    log("Running it from here ...")
    check = run_child("save_local_logits", str(folder), logits)
    if "error" in check:
        raise Refusal(f"What would be published does not work, and nothing was published. {check['error']}")
    published = put(api, args, remote, operations)
    log(f"Running it from the Hub, {published.revision} ...")
    check = run_child("compare_logits", args.repo_id, published.revision, logits)
    if "error" in check:
        raise Refusal(f"What is published now ({published.commit_url}) does not work, and is not tagged. {check['error']}")
    log("The logits are the same.")
    if args.tag and args.tag not in remote.tags:
        try:
            api.create_tag(args.repo_id, tag=args.tag, revision=published.commit)
        except NETWORK_ERRORS as error:
            raise Refusal(f"{published.commit_url} is published and works, but could not be tagged. {explain(error)}") from error
        log(f"Tagged: {args.tag}")
    found = {"commit_url": published.commit_url, "commit": published.commit, "tag": args.tag, "pr_url": published.pr_url}
    return {"repo_id": args.repo_id, **found, **difference, **check}


def check_arguments(args: argparse.Namespace) -> None:
    try:
        validate_repo_id(args.repo_id)
    except HFValidationError as error:
        raise Refusal(f"--repo-id: {error}") from error
    if "/" not in args.repo_id:
        raise Refusal(f"--repo-id must be ORG/NAME, got {args.repo_id}.")
    if args.tag and args.create_pr:
        raise Refusal("--tag names what is published, and a pull request is not yet: tag it when it is merged.")
    if args.tag and not re.fullmatch(r"\w[\w.+-]*", args.tag):
        raise Refusal(f"--tag must be of letters, digits, dots, plus, minus and underscores, got {args.tag!r}.")
    if not args.dry_run and not get_token():
        raise Refusal("No token: log in by `hf auth login`, or set HF_TOKEN to a token that may write.")


# Running it: in a new process, so that nothing that is loaded or cached here can stand in for what is on the Hub


def run_child(function: str, *arguments: str) -> dict:
    """What the function of this file returns, or {"error": ...}."""
    hidden = re.compile(r"(HF|HUGGINGFACE|TRANSFORMERS)_(\w+_)?(CACHE|HOME|TOKEN_PATH|OFFLINE)")
    variables = {name: value for name, value in os.environ.items() if not hidden.fullmatch(name)}
    code = f"import sys, publish; publish.report(publish.{function}, *sys.argv[1:])"
    with tempfile.TemporaryDirectory() as home:
        variables |= {"HF_HOME": home, "HF_TOKEN": get_token()}
        command = [sys.executable, "-c", code, *arguments]
        options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}  # nobody is there to be asked
        done = subprocess.run(command, env=variables, cwd=Path(__file__).parent, **options)
    lines = done.stdout.strip().splitlines()
    return json.loads(lines[-1]) if done.returncode == 0 and lines else {"error": f"It ended with exit code {done.returncode}."}


def report(function, *arguments: str) -> None:
    try:
        result = function(*arguments)
    except Exception as error:
        result = {"error": explain(error)}
    print(json.dumps(result))


def save_local_logits(folder: str, file: str) -> dict:
    """Of what is going to be published. The code is imported as it is: some releases can't load it from a folder."""
    import torch

    sys.path.insert(0, f"{folder}/custom_generate")
    from generate import generate

    torch.save(compute_logits(folder, lambda model, **arguments: generate(model=model, **arguments)), file)
    return {}


def compare_logits(repo_id: str, revision: str, file: str) -> dict:
    """Of what has been published with those in the file."""
    import torch

    where = {"revision": revision, "trust_remote_code": True}

    def generate(model, **arguments):  # of the class: that of the model may be ours already
        return type(model).generate(model, custom_generate=repo_id, **where, **arguments)

    found, expected = compute_logits(repo_id, generate, **where), torch.load(file)
    if found.shape != expected.shape:
        return {"error": f"Its logits have the shape {tuple(found.shape)}, here they have {tuple(expected.shape)}."}
    difference = (found - expected).abs().max().item()
    if not difference <= MAX_LOGIT_DIFFERENCE:
        return {"error": f"Its logits differ by up to {difference} from those computed here."}
    return {"max_logit_difference": difference}


def compute_logits(model_id: str, generate, **where):
    """Of a text that goes on for longer than the window."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_id, **where)
    inputs = tokenizer("import os\nimport sys\n\n\ndef main():\n", return_tensors="pt")
    outputs = generate(
        AutoModelForCausalLM.from_pretrained(model_id, **where),
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        window_length=16,
        num_sink_tokens=4,
        max_new_tokens=24,
        min_new_tokens=24,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(outputs.logits)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo-id", required=True, help="ORG/NAME on the Hub; created if it is not there")
    parser.add_argument("--private", action="store_true", help="create it as a private repository")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument(
        "--revision", default="main", help="branch or refs/pr/N to commit to; it has to exist (default: %(default)s)"
    )
    parser.add_argument("--tag", help="name for this state, such as v1.0.0; set when it has been loaded from the Hub")
    parser.add_argument("--message", default="Publish the attention-sink KV cache", help="of the commit (default: %(default)s)")
    parser.add_argument("--base-model", help="Hub id or folder of the model to publish with it in place of that in this folder")
    parser.add_argument("--replace-model", action="store_true", help="put another model in the place of the one that is there")
    parser.add_argument("--dry-run", action="store_true", help="list what would be published and what it would change, no more")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "repository"
        folder.mkdir()
        reason = None
        try:
            print(json.dumps(publish(args, folder, logits=f"{temporary}/logits.pt")))
        except Refusal as error:
            reason = str(error)
        except NETWORK_ERRORS as error:
            reason = explain(error)
    if reason:
        gc.collect()  # closes progress bars that the error has left open: nothing is printed after the reason
        log(f"error: {reason}")
    return 1 if reason else 0


if __name__ == "__main__":
    sys.exit(main())
