"""A chat without an end, in the terminal: the cache goes on from turn to turn, and nothing is read twice.

Only what is new is fed: of a chat template, what stands between the last answer and the next one. So where a template drops or
rewrites earlier turns (the thoughts of a model, say), they stay in the cache as they were fed, until they are evicted. A model
without a chat template, as that of this repository, goes on with plain text. Ctrl-C stops an answer, Ctrl-D leaves; /help lists
the commands. The last line is one JSON document.

    python scripts/chat.py
    python scripts/chat.py --model Qwen/Qwen3-0.6B --window-length 4096 --system "Answer in one sentence."
    echo "What is a lighthouse?" | python scripts/chat.py --model Qwen/Qwen3-0.6B --temperature 0
"""

import argparse
import contextlib
import copy
import json
import signal
import sys
import time
import uuid

import torch
import transformers
from transformers import StoppingCriteria, TextStreamer

from common import add_model_arguments, load_model
from custom_generate.generate import DEFAULT_NUM_SINK_TOKENS, DEFAULT_WINDOW_LENGTH, SinkCache, generate

COMMANDS = """\
/save FILE   write the conversation to a file
/load FILE   go on with one that was saved, of the same model
/regenerate  the last answer once more, in its place: another one, if answers are drawn at random
/reset       begin anew
/stats       what the cache holds
/help        this
/exit        leave, as Ctrl-D does
Ctrl-C stops an answer; while a text is being read, after its first token."""


class TimedStreamer(TextStreamer):
    """Prints an answer as it comes, and notes when each token came."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
        super().put(value)

    @property
    def tokens_per_second(self) -> float | None:
        return (len(self.times) - 1) / (self.times[-1] - self.times[0]) if len(self.times) > 1 else None


class CtrlC(StoppingCriteria):
    """Meanwhile, Ctrl-C ends the answer behind the token that is being made: no pass of the model is cut in two."""

    def __init__(self):
        self.was_pressed = False

    def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.was_pressed, device=input_ids.device)

    def _press(self, *_) -> None:
        self.was_pressed = True

    def __enter__(self):
        self.before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGINT, self.before)


class Chat:
    """A conversation. All of it is in the cache: what it has seen, and the one token that was chosen and not yet fed."""

    def __init__(self, model, tokenizer, cache: SinkCache, system: str | None, options: dict):
        self.model, self.tokenizer, self.cache, self.system, self.options = model, tokenizer, cache, system, options
        ends = model.generation_config.eos_token_id
        self.ends = set(ends) if isinstance(ends, list) else {ends}
        self.tokens_per_second: float | None = None
        # The last question, and a copy of the cache from before it: a cache by itself can't go back to what it has evicted.
        self.last_turn: tuple[str, SinkCache] | None = None

    def next_turn(self, question: str) -> str:
        """The text between the last answer and the next one: the question, and what a template puts around it."""
        is_first = self.cache.num_tokens_seen == 0
        if self.tokenizer.chat_template is None:
            before = self.system if is_first else ""  # the end of the last answer
            return f"{question}\n" if before is None else f"{before}\n\n{question}\n"

        def render(messages: list[dict]) -> str:
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

        system = [{"role": "system", "content": self.system}] if self.system else []
        asked = [{"role": "user", "content": question}]
        if is_first:
            return render(system + asked)
        answer = uuid.uuid4().hex  # any one that stands nowhere else
        text = render(system + [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": answer}] + asked)
        if answer in text:
            return text.rpartition(answer)[2]
        return render(asked).removeprefix(self.tokenizer.bos_token or "")  # a template that keeps the last turn only

    def answer(self, question: str) -> str:
        """Feed a question and print its answer, which is returned."""
        self.last_turn = question, copy.deepcopy(self.cache)
        cache, is_first = self.cache, self.cache.num_tokens_seen == 0
        special = is_first and self.tokenizer.chat_template is None
        new_ids = self.tokenizer(self.next_turn(question), add_special_tokens=special, return_tensors="pt").input_ids
        unseen = torch.tensor([cache.unseen_token_ids or []], dtype=torch.long)
        ids = torch.cat([unseen, new_ids], dim=1).to(self.model.device)
        streamer = TimedStreamer(self.tokenizer)
        with CtrlC() as ctrl_c:
            text = generate(
                ids,
                model=self.model,
                attention_mask=torch.ones(1, cache.num_tokens_seen + ids.shape[1], dtype=torch.long, device=ids.device),
                past_key_values=cache,
                streamer=streamer,
                stopping_criteria=[ctrl_c],
                **self.options,
            )
        self.tokens_per_second = streamer.tokens_per_second
        if int(text[0, -1]) in self.ends:
            cache.unseen_token_ids = None  # how a turn ends is for the template to say
        return self.tokenizer.decode(text[0, ids.shape[1] :], skip_special_tokens=True)

    @property
    def status(self) -> dict:
        speed = self.tokens_per_second and round(self.tokens_per_second, 1)
        cache = self.cache
        return {
            "tokens_seen": cache.num_tokens_seen,
            "tokens_held": cache.num_tokens_held,
            "bytes_held": cache.num_bytes_held,
            "tokens_per_second": speed,
        }

    def status_line(self) -> str:
        status = self.status
        speed = f" | {status['tokens_per_second']} tokens a second" if self.tokens_per_second else ""
        held = f"{status['tokens_held']:,} held in {status['bytes_held'] / 2**20:.2f} MiB"
        return f"[{status['tokens_seen']:,} tokens seen | {held}{speed}]"

    def command(self, line: str) -> str:
        """Do what a line with a slash says, and return what there is to say of it."""
        name, _, path = (part.strip() for part in line.partition(" "))
        if name in ("/save", "/load") and not path:
            return f"{name} what? Add the name of a file."
        if name == "/save":
            self.cache.save(path)
            return f"Saved to {path}."
        if name == "/load":
            self.cache, self.last_turn = SinkCache.load(path, self.model), None
            window = f"window {self.cache.window_length}, {self.cache.num_sink_tokens} sinks"
            return f"Going on from {path} ({window}) with {self.cache.num_tokens_seen:,} tokens seen."
        if name == "/regenerate":
            if self.last_turn is None:
                return "There is no answer yet."
            question, self.cache = self.last_turn
            self.answer(question)
            return self.status_line()
        if name == "/reset":
            self.cache.reset()
            self.last_turn = None
            return "A new conversation."
        if name == "/stats":
            return f"{self.cache!r}\n{self.status_line()}"
        return COMMANDS if name == "/help" else f"There is no command {name}.\n{COMMANDS}"


def read_lines(prompt: str):
    """What is typed, or comes through a pipe, line by line; Ctrl-C throws a line away."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() has line editing and a history from now on)
    while True:
        try:
            line = input(prompt if is_terminal else "").strip()
            if not is_terminal:
                print(f"{prompt}{line}")
            yield line
        except KeyboardInterrupt:
            print("\nCtrl-D or /exit leaves.")
        except EOFError:
            print()
            return


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that begins it in the background has it ignored
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--window-length", type=int, default=DEFAULT_WINDOW_LENGTH, help="tokens held (default: %(default)s)")
    parser.add_argument(
        "--num-sink-tokens", type=int, default=DEFAULT_NUM_SINK_TOKENS, help="first tokens that stay (default: %(default)s)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=300, help="the longest answer, in tokens (default: %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="of sampling; 0 takes the likeliest token (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: %(default)s)")
    parser.add_argument("--system", help="what stands before the conversation; as sinks it stays: see --num-sink-tokens")
    args = parser.parse_args()

    transformers.logging.set_verbosity_error()  # "exceeded the model's maximum length": that is the purpose
    model, tokenizer = load_model(args)
    try:
        cache = SinkCache.from_model(model, args.window_length, args.num_sink_tokens)
    except ValueError as error:
        parser.error(str(error))
    sampling = {"do_sample": True, "temperature": args.temperature, "top_k": 40} if args.temperature > 0 else {"do_sample": False}
    torch.manual_seed(args.seed)
    chat = Chat(model, tokenizer, cache, args.system, {"max_new_tokens": args.max_new_tokens, **sampling})
    if sys.stdin.isatty():
        print(f"{args.model}, {args.dtype} on {args.device}, {cache!r}. /help lists the commands.")
    for line in read_lines("> "):
        try:
            if line == "/exit":
                break
            elif line.startswith("/"):
                print(chat.command(line))
            elif line:
                chat.answer(line)
                print(chat.status_line(), flush=True)
        except KeyboardInterrupt:
            print("\nStopped.")
        except (ValueError, OSError) as error:
            print(error)
    print(json.dumps({"model": args.model, "device": args.device, "dtype": args.dtype, **chat.status}))


if __name__ == "__main__":
    main()
