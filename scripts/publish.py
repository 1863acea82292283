"""Publish the method on the Hugging Face Hub, and check what has been published by loading it from there.

What goes up: the modules of custom_generate/ as one file (scripts/amalgamate.py), requirements.txt, README.md, docs/, LICENSE and
the tiny model. What differs from what the Hub has goes there in one commit: all of it or nothing. Then a new process with an
empty cache loads model and method from the Hub, at that commit, and has to find the logits that the modules give here; only then
the tag is set. Whatever fails, run the same command again: it compares before it publishes. Progress goes to standard error; the
last line on standard output is one JSON document.

    python scripts/publish.py --repo-id ORG/NAME --dry-run
    python scripts/publish.py --repo-id ORG/NAME --tag v2

The first version, for releases of transformers before 4.57 (its users pass `revision="v1"`), is one file already. It is published
from its commit, before the others, so that the main branch goes on from it:

    python scripts/publish.py --repo-id ORG/NAME --commit 925a8cd --tag v1

The repository is created if it is not there; for a private one, create it by hand before. The token is that of `hf auth login`,
or HF_TOKEN.
"""

import argparse
import fnmatch
import functools
import hashlib
import io
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from amalgamate import CannotAmalgamate, published_code, source_of, version_of

ROOT = Path(__file__).resolve().parents[1]
METHOD = "custom_generate/generate.py"
MODEL = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
REQUIRED = ("README.md", "LICENSE", METHOD, "custom_generate/requirements.txt", *MODEL)
PATTERNS = (*REQUIRED, "CHANGELOG.md", "docs/*.md", "figures/*.png", "docs/*.png")
OF_THE_HUB = {".gitattributes"}
OF_A_NEW_REPOSITORY = {"README.md", "LICENSE"}  # which the Hub's form for new repositories can put there
METADATA = {"library_name": "transformers", "license": None, "pipeline_tag": None}  # None: any value
TAG_OF_METHODS = "custom_generate"
NAME_IN_EXAMPLES = re.compile(r'custom_generate="([\w.-]+/[\w.-]+)"')
MAX_LOGIT_DIFFERENCE = 1e-5  # of two runs on one machine
AGAIN = "Run the same command again: it compares before it publishes."
# httpx does not derive its errors from OSError, and which library the Hub's client uses depends on its release.
NETWORK_ERRORS = (OSError, HfHubHTTPError.__bases__[0])


log = functools.partial(print, file=sys.stderr, flush=True)


class Refusal(Exception):
    """The reason why nothing is done, or why it ended: one line for the user."""


def explain(error: BaseException) -> str:
    """One line for an error of a library, with the causes that it hides behind a general sentence."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    hint = {401: "The Hub does not accept the token. ", 403: "The token may not write there. "}.get(status, "")
    if status is None and type(error).__module__.startswith(("requests", "httpx")):
        hint = f"{constants.ENDPOINT} does not answer. "
    line = hint + f"{type(error).__name__}: {' '.join(str(error).split())}"
    return line if hint or status or error.__cause__ is None else f"{line} {explain(error.__cause__)}"


# What goes up


def checked_out(commit: str, folder: Path) -> Path:
    """The files of a commit of this repository, put into the folder."""
    done = subprocess.run(["git", "archive", commit], capture_output=True, cwd=ROOT)
    if done.returncode:
        raise Refusal(f"--commit {commit}: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return folder


def list_files(root: Path) -> list[str]:
    """What goes up of a checkout, as paths in it."""
    found = (path.relative_to(root).as_posix() for pattern in PATTERNS for path in root.glob(pattern))
    return sorted({path for path in found if not Path(path).name.startswith(".")})


def stage(root: Path, repo_id: str, version: str, folder: Path) -> list[str]:
    """Put what goes up into a folder, as it goes up: the method as one file, pages with the name and the links of the
    repository."""
    files = list_files(root)
    lacking = [path for path in REQUIRED if path not in files]
    if lacking:
        raise Refusal(f"What would be published lacks {', '.join(lacking)}: {root} has no such file.")
    example = NAME_IN_EXAMPLES.search((root / "README.md").read_text(encoding="utf-8"))
    if example is None:
        raise Refusal('README.md has no example with custom_generate="ORG/NAME", in which to put the name of the repository.')
    for path in files:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        if path == METHOD:
            text = published_code(root, source_of(ROOT), version)
        elif path.endswith(".md"):
            text = with_own_links((root / path).read_text(encoding="utf-8").replace(example[1], repo_id), path, files)
        else:
            shutil.copyfile(root / path, folder / path)
            continue
        (folder / path).write_text(text, encoding="utf-8", newline="\n")
    check_card((folder / "README.md").read_text(encoding="utf-8"))
    return files


def with_own_links(text: str, page: str, files: list[str]) -> str:
    """A page whose links to files that do not go up are their text alone; code is left as it is."""

    def kept(link: re.Match) -> str:
        if link[2] is None:
            return link[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page), link[2].partition("#")[0]))
        is_there = re.match(r"\w+:|#", link[2]) or path in files or any(name.startswith(f"{path}/") for name in files)
        return link[0] if is_there else link[1]

    return re.sub(r"```.*?```|`[^`\n]*`|(?<!!)\[([^\]\n]*)\]\(([^)\s]+)\)", kept, text, flags=re.DOTALL)


def check_card(text: str) -> None:
    """The metadata of a model card has to be what the Hub needs to list a method."""
    block = re.match(r"---\n(.*?\n)---\n", text, re.DOTALL)
    try:
        header = yaml.safe_load(block[1]) if block else None
    except yaml.YAMLError as error:
        raise Refusal(f"The metadata of README.md is not valid YAML. {explain(error)}") from error
    if not isinstance(header, dict):
        raise Refusal("README.md does not begin with metadata: `name: value` lines between two lines of three dashes.")
    for name, value in METADATA.items():
        if header.get(name) is None or value not in (None, header[name]):
            raise Refusal(f"The metadata of README.md needs {name}{f': {value}' if value else ''}, got {header.get(name)!r}.")
    if not isinstance(header.get("tags"), list) or TAG_OF_METHODS not in header["tags"]:
        raise Refusal(f"The metadata of README.md needs tags, a list with {TAG_OF_METHODS} in it, got {header.get('tags')!r}.")


# What the Hub has


def look(api: HfApi, repo_id: str) -> tuple[str | None, dict[str, RepoFile], dict[str, str]]:
    """The commit of its main branch, the files there, and the commits of its tags; nothing of a repository that is not there."""
    try:
        head = api.model_info(repo_id).sha
    except RepositoryNotFoundError:
        return None, {}, {}
    tree = api.list_repo_tree(repo_id, recursive=True, revision=head)
    files = {entry.path: entry for entry in tree if isinstance(entry, RepoFile) and entry.path not in OF_THE_HUB}
    foreign = sorted(path for path in files if not is_ours(path))
    if foreign:
        raise Refusal(
            f"{repo_id} has files that are not of this method: {', '.join(foreign)}. Delete them there, or take another name."
        )
    if METHOD not in files and not files.keys() <= OF_A_NEW_REPOSITORY:
        raise Refusal(f"{repo_id} holds something else: it has no {METHOD}, but {', '.join(sorted(files))}. Take another name.")
    return head, files, {tag.name: tag.target_commit for tag in api.list_repo_refs(repo_id).tags}


def is_ours(path: str) -> bool:
    """Whether a file on the Hub is one that this script could have put there; an asterisk stops at a slash."""
    return any(fnmatch.fnmatchcase(path, pattern) and path.count("/") == pattern.count("/") for pattern in PATTERNS)


def is_same(content: bytes, remote: RepoFile) -> bool:
    """Without a download: the Hub tells git's hash of a file, or SHA-256 of a large one."""
    if remote.lfs is not None:
        return hashlib.sha256(content).hexdigest() == remote.lfs.sha256
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == remote.blob_id


def compare(folder: Path, files: list[str], remote: dict[str, RepoFile]) -> dict[str, list[str]]:
    common = sorted(remote.keys() & set(files))
    changed = [path for path in common if not is_same((folder / path).read_bytes(), remote[path])]
    return {"added": sorted(set(files) - remote.keys()), "changed": changed, "removed": sorted(remote.keys() - set(files))}


# Publishing


def publish(args: argparse.Namespace, folder: Path) -> dict:
    root = checked_out(args.commit, folder / "checkout") if args.commit else ROOT
    staged = folder / "staged"
    files = stage(root, args.repo_id, version_of(ROOT, args.commit), staged)
    result = {"repo_id": args.repo_id, "files": files}
    api = HfApi()
    try:
        head, remote, tags = look(api, args.repo_id)
    except NETWORK_ERRORS as error:
        if not args.dry_run or getattr(error, "response", None) is not None:
            raise
        log(f"Not compared with the Hub. {explain(error)}")
        return result
    difference = compare(staged, files, remote)
    result |= difference
    for kind, paths in difference.items():
        log("".join(f"  {kind:8}{path}\n" for path in paths).rstrip() or f"  {kind:8}nothing")
    if args.tag in tags and (any(difference.values()) or tags[args.tag] != head):
        raise Refusal(f"The tag {args.tag} exists, and names another state ({tags[args.tag]}). Take another name.")
    if args.dry_run:
        return result

    log("Running the modules here ...")
    run_child(root, "", staged, folder / "here.pt")
    if any(difference.values()):
        log(f"Publishing to {args.repo_id} ...")
        if head is None:
            api.create_repo(args.repo_id)
            head, *_ = look(api, args.repo_id)
        operations = [CommitOperationAdd(path, staged / path) for path in difference["added"] + difference["changed"]]
        operations += [CommitOperationDelete(path) for path in difference["removed"]]
        message = f"Publish {args.tag or 'the attention-sink KV cache'}"
        try:  # `parent_commit`: refused if somebody else was faster
            head = api.create_commit(args.repo_id, operations, commit_message=message, parent_commit=head).oid
        except Exception as error:  # of the client, or of what it uploads with
            raise Refusal(f"{explain(error)} {AGAIN}") from error
    log(f"Running it from the Hub, {head} ...")
    run_child(root, head, args.repo_id, folder / "there.pt")
    result |= {"commit": head, "max_logit_difference": difference_of_logits(folder, head)}
    if args.tag and args.tag not in tags:
        api.create_tag(args.repo_id, tag=args.tag, revision=head)
    return result | {"tag": args.tag}


def check_arguments(args: argparse.Namespace) -> None:
    try:
        validate_repo_id(args.repo_id)
    except HFValidationError as error:
        raise Refusal(f"--repo-id: {error}") from error
    if "/" not in args.repo_id:
        raise Refusal(f"--repo-id must be ORG/NAME, got {args.repo_id}.")
    if args.tag and not re.fullmatch(r"\w[\w.+-]*", args.tag):
        raise Refusal(f"--tag must be of letters, digits, dots, plus, minus and underscores, got {args.tag!r}.")
    if not args.dry_run and not get_token():
        raise Refusal("No token: log in by `hf auth login`, or set HF_TOKEN to a token that may write.")


# Running it: in a new process, so that nothing that is loaded or cached here can stand in for what is on the Hub


def run_child(root: Path, revision: str, model_id: str | Path, file: Path) -> None:
    """Let `write_logits` write its file."""
    code = "import sys; sys.path[:0] = sys.argv[1:3]; import publish; publish.write_logits(*sys.argv[3:])"
    hidden = re.compile(r"(HF|HUGGINGFACE|TRANSFORMERS)_(\w+_)?(CACHE|HOME|TOKEN_PATH|OFFLINE)")
    variables = {name: value for name, value in os.environ.items() if not hidden.fullmatch(name)}
    with tempfile.TemporaryDirectory() as home:
        variables |= {"HF_HOME": home, "HF_TOKEN": get_token()}
        command = [sys.executable, "-c", code, root, Path(__file__).parent, model_id, revision, file]
        done = subprocess.run(list(map(str, command)), env=variables, cwd=home, capture_output=True, text=True)
    if done.returncode:
        what = "What is published now" if revision else "What would be published"
        end = f"and is not tagged ({model_id}, {revision})" if revision else "and nothing was published"
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise Refusal(f"{what} does not work, {end}. {reason}")


def write_logits(model_id: str, revision: str, file: str) -> None:
    """Of a text that goes on for longer than the window; without a revision, with the modules that can be imported."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"revision": revision, "trust_remote_code": True} if revision else {}
    inputs = AutoTokenizer.from_pretrained(model_id, **where)("import os\nimport sys\n\n\ndef main():\n", return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(model_id, **where)
    options = {"window_length": 16, "num_sink_tokens": 4, "max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True, "attention_mask": inputs.attention_mask}
    if revision:  # by the method of the class: that of the model may be ours already
        outputs = type(model).generate(model, inputs.input_ids, custom_generate=model_id, **where, **options)
    else:
        from custom_generate.generate import generate

        outputs = generate(inputs.input_ids, model=model, **options)
    torch.save(torch.stack(outputs.logits), file)


def difference_of_logits(folder: Path, commit: str) -> float:
    import torch

    there, here = torch.load(folder / "there.pt"), torch.load(folder / "here.pt")
    difference = (there - here).abs().max().item() if there.shape == here.shape else float("inf")
    if not difference <= MAX_LOGIT_DIFFERENCE:
        raise Refusal(
            f"What is published now ({commit}) is not tagged: its logits differ by up to {difference} from those of the modules."
        )
    return difference


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo-id", required=True, help="ORG/NAME on the Hub; created if it is not there")
    parser.add_argument("--commit", help="of this repository, published in place of the files as they are")
    parser.add_argument("--tag", help="name for this state, such as v2; set when it has been loaded from the Hub")
    parser.add_argument("--dry-run", action="store_true", help="list what would be published and what it would change, no more")
    args = parser.parse_args()
    disable_progress_bars()

    try:
        check_arguments(args)
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(publish(args, Path(folder))))
    except (Refusal, CannotAmalgamate) as error:
        log(f"error: {error}")
        return 1
    except NETWORK_ERRORS as error:
        log(f"error: {explain(error)} {AGAIN}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
