"""`scripts/chat.py`: what is fed, what is printed, and Ctrl-C in a terminal."""

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from packaging.version import Version

import chat
import processes
from custom_generate.generate import SinkCache
from families import TRANSFORMERS
from processes import run_script
from test_readme import CHAT_TEMPLATE

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | processes.ENVIRONMENT
pytestmark = pytest.mark.skipif(TRANSFORMERS < Version("4.53"), reason="the README says that scripts want 4.53 or newer")


def run(lines: list[str], *options) -> str:
    shown = ["--temperature", 0, "--window-length", 32, *options]
    return run_script("scripts/chat.py", *shown, cwd=ROOT, input="\n".join(lines)).stdout


def without_speed(text: str) -> str:
    return re.sub(r" \| [\d.]+ tokens a second", "", text)


def test_a_conversation_goes_on_in_another_process(tmp_path):
    """Four turns far past the window: two of them, saved, and the other two from the file, are the same text."""
    turns, path = ["import os", "class Reader:", "def main():", "return"], tmp_path / "talk"
    whole = run([turns[0], turns[1], f"/save {path}", turns[2], "/nothing", turns[3], "/stats"], "--max-new-tokens", 40)
    parts = run(["/reset", f"/load {path}", turns[2], turns[3], f"/load {tmp_path / 'none'}"], "--max-new-tokens", 40)
    _, _, after_save = whole.partition(f"Saved to {path}.\n")
    _, loaded, after_load = parts.partition("(window 32, 4 sinks) with ")
    assert loaded and "There is no command /nothing" in whole and "There is no file" in parts
    expected, parts = without_speed(after_save).split("> /nothing")[0], without_speed(after_load).split("\n", 1)[1]
    assert parts.startswith(expected) and len(expected) > 100
    last = without_speed(whole).split("> return\n")[1].split("> /stats")[0]
    assert f"> return\n{last}" in parts
    status = json.loads(whole.splitlines()[-1])
    assert status["tokens_held"] == 32 and 160 < status["tokens_seen"] < 200 and status["tokens_per_second"] > 0
    assert f"tokens_seen={status['tokens_seen']}" in whole and f"[{status['tokens_seen']} tokens seen | 32 held in " in whole


def new_chat(model, tokenizer, template=None, system=None, **options) -> tuple[chat.Chat, list[int]]:
    """A chat, and a list of all that goes through the model."""
    fed: list[int] = []
    cache = SinkCache.from_model(model, 32, 4)
    model.register_forward_pre_hook(lambda _, args, kwargs: fed.extend(kwargs["input_ids"].flatten().tolist()), with_kwargs=True)
    tokenizer.chat_template = template
    return chat.Chat(model, tokenizer, cache, system, {"max_new_tokens": 30, "do_sample": False, **options}), fed


@pytest.fixture
def own_tokenizer(tokenizer):
    yield tokenizer
    tokenizer.chat_template = None


@pytest.mark.parametrize("system", [None, "You write Python."])
@pytest.mark.parametrize("is_finished", [True, False], ids=["finished answers", "answers cut short"])
def test_what_is_fed_is_the_template_of_the_whole_conversation(tiny_model, own_tokenizer, capsys, system, is_finished):
    """Each token once, and in the ids of the template: whether an answer ended by itself or was stopped."""
    ends = {"forced_eos_token_id": own_tokenizer.eos_token_id} if is_finished else {}
    talk, fed = new_chat(tiny_model, own_tokenizer, CHAT_TEMPLATE, system, **ends)
    messages = [{"role": "system", "content": system}] if system else []
    for question in ("What is it?", "And who keeps it?", "Where?", "Why?"):
        answer = talk.answer(question)
        assert answer and answer in capsys.readouterr().out
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    expected = own_tokenizer.apply_chat_template(messages, tokenize=False)
    seen = own_tokenizer.decode(fed + (talk.cache.unseen_token_ids or []))
    assert seen + own_tokenizer.eos_token == expected and seen.count("<s>") == 1
    assert talk.cache.num_tokens_seen == len(fed) > 4 * 32


DROPPED = "{{ bos_token }}{{ '[user]' + messages[-1].content + eos_token + '[assistant]' }}"
REWRITTEN = CHAT_TEMPLATE.replace("{{ message.content }}", "{{ message.content if loop.last else message.content[:32].upper() }}")


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, DROPPED, REWRITTEN], ids=["keeps", "drops", "rewrites"])
def test_a_template_that_drops_or_rewrites_earlier_turns_feeds_only_the_new_one(tiny_model, own_tokenizer, template):
    talk, fed = new_chat(tiny_model, own_tokenizer, template)
    talk.answer("What is it?")
    before = len(fed)
    talk.answer("And who keeps it?")
    new = own_tokenizer.decode(fed[before:])
    assert new.count("[user]And who keeps it?</s>[assistant]") == 1 and "What" not in new and "<s>" not in new


def test_without_a_template_text_goes_on(tiny_model, own_tokenizer):
    talk, fed = new_chat(tiny_model, own_tokenizer, None, "# A module.")
    first = talk.answer("import os")
    second = talk.answer("import sys")
    text = own_tokenizer.decode(fed + talk.cache.unseen_token_ids)
    assert text == f"<s># A module.\n\nimport os\n{first}\n\nimport sys\n{second}"


def test_an_answer_is_regenerated_in_its_place(tiny_model, own_tokenizer, tmp_path):
    """Past the window, so that tokens have been evicted: the same text if nothing is drawn at random, and the conversation goes on as if
    there had been one answer. With sampling it is another one."""
    talk, _ = new_chat(tiny_model, own_tokenizer, CHAT_TEMPLATE)
    assert talk.command("/regenerate") == "There is no answer yet."
    answers = [talk.answer(question) for question in ("What is it?", "And who keeps it?", "Where?")]
    seen, last = talk.cache.num_tokens_seen, talk.cache.known_token_ids(0)
    assert seen > 2 * 32
    for _ in range(2):
        assert f"[{seen} tokens seen" in talk.command("/regenerate")
        assert talk.cache.num_tokens_seen == seen and all(map(torch.equal, talk.cache.known_token_ids(0), last))
    after = talk.answer("Why?")
    straight, _ = new_chat(tiny_model, own_tokenizer, CHAT_TEMPLATE)
    assert [straight.answer(question) for question in ("What is it?", "And who keeps it?", "Where?", "Why?")] == [*answers, after]

    torch.manual_seed(0)
    talk.options |= {"do_sample": True, "temperature": 3.0}
    drawn = {talk.answer("When?")}
    question, _ = talk.last_turn
    for _ in range(3):
        talk.command("/regenerate")
        drawn.add(own_tokenizer.decode(talk.cache.known_token_ids(0)[1]))
    assert question == "When?" and len(drawn) == 4
    talk.cache.save(tmp_path / "talk")
    for command in (f"/load {tmp_path / 'talk'}", "/reset"):
        talk.last_turn = "When?", talk.cache
        talk.command(command)
        assert talk.command("/regenerate") == "There is no answer yet."


class Terminal:
    """The script at the other end of a pseudo terminal."""

    def __init__(self, *options):
        pty = pytest.importorskip("pty", reason="no pseudo terminals here")
        self.screen, (self.ours, theirs) = "", pty.openpty()
        command = [sys.executable, "scripts/chat.py", "--window-length", "32", *options]
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL, env=ENVIRONMENT, cwd=ROOT, start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(theirs)

    def type(self, keys: str) -> None:
        os.write(self.ours, keys.encode())

    def wait_for(self, pattern: str, again: str = "") -> str:
        """What comes, up to the pattern. While nothing comes, a key may be pressed again."""
        deadline = time.monotonic() + 120
        while not (found := re.search(pattern, self.screen)):
            if not select.select([self.ours], [], [], 10)[0]:
                assert time.monotonic() < deadline, self.screen
                self.type(again)
                continue
            try:
                self.screen += os.read(self.ours, 4096).decode(errors="replace").replace("\r\n", "\n")
            except OSError:  # closed at the other end
                assert re.search(pattern, self.screen), self.screen
        before, self.screen = self.screen[: found.end()], self.screen[found.end() :]
        return before


def test_ctrl_c_stops_the_answer_and_not_the_program(tmp_path, tiny_model, tokenizer):
    """Three times, past the window; and what the cache holds is what was printed."""
    terminal, path = Terminal("--max-new-tokens", "100000"), tmp_path / "talk"
    terminal.wait_for("/help lists the commands.*\n.*> ")
    for question in ("import os", "class Reader:", "def main():"):
        terminal.type(question + "\n")
        answer = terminal.wait_for(r"\n(.*\n){10}")
        terminal.type("\x03")
        answer += terminal.wait_for(r"\[[\d,]+ tokens seen \| \d+ held in .*\]\n")
        terminal.wait_for("> ")
    terminal.type("half a line\x03")
    terminal.wait_for("/exit leaves(.|\n)*> ", again="\x03")  # Python itself misses one that comes just before it waits for keys
    terminal.type(f"/save {path}\n")
    terminal.wait_for("Saved to(.|\n)*> ")  # typed before the prompt, Ctrl-D would be lost
    terminal.type("\x04")
    status = json.loads(re.search(r"\{.*\}", terminal.wait_for(r"\{.*\}")).group())
    assert terminal.process.wait(timeout=60) == 0
    os.close(terminal.ours)
    cache = SinkCache.load(path, tiny_model)
    assert cache.num_tokens_seen == status["tokens_seen"] > 100
    _, recent = cache.known_token_ids(0)
    held = tokenizer.decode(recent[-20:].tolist() + cache.unseen_token_ids)
    printed = answer.replace("^C", "")[: answer.rindex("[") - 2]
    assert printed.rstrip().endswith(held.rstrip()), (printed, held)


def test_numbers_that_make_no_window_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["chat.py", "--num-sink-tokens", "300"])
    with pytest.raises(SystemExit) as stopped:
        chat.main()
    assert stopped.value.code == 2
    assert "num_sink_tokens must be less than window_length=256" in capsys.readouterr().err


def test_an_answer_that_was_stopped_is_an_answer(tiny_model, own_tokenizer):
    """Ctrl-C at the tenth token; the handler of before is back after it."""
    talk, fed = new_chat(tiny_model, own_tokenizer, CHAT_TEMPLATE)
    before = signal.getsignal(signal.SIGINT)
    tiny_model.register_forward_hook(lambda *_: signal.raise_signal(signal.SIGINT) if talk.cache.num_tokens_seen == 20 else None)
    with torch.no_grad():
        talk.answer("What?")
    assert talk.cache.num_tokens_seen == 20 and signal.getsignal(signal.SIGINT) is before
