"""The generated tables of README.md and docs/: which models are served, and what works with which option, cache and attention.

**Models** (block `compatibility`): a verdict for every type in transformers' causal-LM mapping, found by running it. Each type is
built small, with random weights (`tests/zoo.py`), and shown to the cache: it is refused with a reason, or accepted with the way
in which it moves its keys. That what is accepted is exact is what `tests/test_zoo.py` proves, type by type. This takes about two
minutes.

**Options** (block `works-with`): every option of `generate`, every cache of transformers, every attention implementation. What is
refused comes from `custom_generate/` itself, with its reason. What works is listed here, with the test that shows it. To let
something work, take it out of `UNSUPPORTED_OPTIONS` there and add a line here. `tests/test_compatibility.py` sees to it that no
option is missing, that the tests exist, and that what is said to be refused is.

    python scripts/compatibility.py --check                   exits with 1 if a table is not what is found
    python scripts/compatibility.py --write                   puts what is found into the pages
    python scripts/compatibility.py --tables options --write  one of them only
"""

import argparse
import json
import sys
import warnings
from dataclasses import dataclass, field

import torch
import transformers
from tqdm import tqdm

from common import ROOT, add_block_arguments, check_or_write_block
from custom_generate.generate import SinkCache
from custom_generate.options import UNSUPPORTED_OPTIONS
from custom_generate.rotation import Rotation
from custom_generate.views import SUPPORTED_ATTENTION

sys.path.insert(0, str(ROOT / "tests"))

from zoo import LEFT_OUT, ZOO_TYPES, build_zoo_model  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------

WINDOW_LENGTH, NUM_SINK_TOKENS = 16, 4


def describe_rotation(rotation: Rotation) -> str:
    """In a few words: which pairs turn, how many of the dimensions, which way."""
    turning = rotation.frequency.nonzero().flatten()
    if not len(turning):
        return "none"
    distance = int((rotation.partner - torch.arange(len(rotation.partner)))[turning[0]].abs())
    words = ["interleaved pairs" if distance == 1 and len(turning) > 2 else "halves"]
    if rotation.frequency[turning[0]] > 0:
        words.append("the other way")
    if len(turning) < len(rotation.frequency):
        words.append("a part of the dimensions")
    return ", ".join(words)


def describe(traits) -> str:
    """How the keys of a model move, and what else its layers do."""
    layers = [layer for layer in traits.layers if layer is not None]
    if traits.is_ordered:
        return "not at all (biases by the order of keys)"
    kinds = {describe_rotation(next((r for r in layer.rotations if not r.is_identity), layer.rotations[0])) for layer in layers}
    words = sorted(kinds - {"none"})
    if "none" in kinds:
        words.append("layers without positions")
    if any(not layer.rotations[1].is_identity for layer in layers):
        words.append("in a latent cache")
    if any(layer.native_window is not None for layer in layers):
        words.append("sliding windows")
    if traits.is_chunked:
        words.append("chunks")
    if traits.is_indexed:
        words.append("indexers")
    if len({rotation.fingerprint for layer in layers for rotation in layer.rotations if not rotation.is_identity}) > 1:
        words.append("several tables")
    if traits.is_recurrent:
        words.append("recurrent states")
    elif None in traits.layers:
        words.append("shared keys")
    return "; ".join(words)


def reason_of(message: str) -> str:
    """The part of a refusal that says why, without the name of the class and what varies from run to run."""
    for pattern, reason in [
        ("no known rotation", "absolute or learned positions, or a rotation of its own"),
        ("is an encoder-decoder", "encoder-decoder"),
        ("do not put their keys", "no cache of keys and values"),
        ("split into passes", "logits depend on how a text is split into passes (transformers' Mamba 1)"),
        ("where a text stands", "scores depend on the position itself"),
        ("not the mask alone", "recurrent states and scores by the order of keys"),
        ("another kind of state", "a kind of cache layer that can't be bounded"),
        ("a first look", "own cache class, or inputs of its own"),
        ("different lengths", "layers with different windows share one mask"),
    ]:
        if pattern in message:
            return reason
    return message


LIMITS_TIME_STEPS = "transformers limits the time steps of Mamba 2 in passes of several tokens only"


def verdicts() -> list[dict]:
    """One entry for each type: `type`, `verdict` (exact, fed as by transformers, refused, left out), `keys` or `reason`."""
    found = []
    for model_type in tqdm(ZOO_TYPES, unit="type", file=sys.stderr):
        if model_type in LEFT_OUT:
            found.append({"type": model_type, "verdict": "left out", "reason": LEFT_OUT[model_type]})
            continue
        try:
            traits = SinkCache.from_model(build_zoo_model(model_type), WINDOW_LENGTH, NUM_SINK_TOKENS).traits
            verdict = {"verdict": "exact", "keys": describe(traits)}
            if not traits.splits_exactly:
                verdict = {"verdict": "fed as by transformers", "reason": LIMITS_TIME_STEPS}
            found.append({"type": model_type, **verdict})
        except ValueError as error:
            found.append({"type": model_type, "verdict": "refused", "reason": reason_of(str(error))})
    return found


def models_table(found: list[dict]) -> str:
    """Markdown: the exact types by how their keys move, the others by reason."""
    num_exact = sum(entry["verdict"] == "exact" for entry in found)
    lines = [
        f"{num_exact} of {len(found)} types in the causal-LM mapping of transformers {transformers.__version__} are exact.",
        "",
    ]
    for verdict, key, head in (
        ("exact", "keys", "how keys move"),
        ("fed as by transformers", "reason", "reason"),
        ("refused", "reason", "reason"),
        ("left out", "reason", "reason"),
    ):
        groups: dict[str, list[str]] = {}
        for entry in found:
            if entry["verdict"] == verdict:
                groups.setdefault(entry[key], []).append(entry["type"])
        lines += [f"| {verdict}: {head} | types |", "|---|---|"]
        lines += [
            f"| {name} | {', '.join(sorted(types))} |" for name, types in sorted(groups.items(), key=lambda g: (-len(g[1]), g[0]))
        ]
        lines.append("")
    return "\n".join(lines).strip()


# ---------------------------------------------------------------------------------------------------------------------
# Options, caches, attention implementations
# ---------------------------------------------------------------------------------------------------------------------

VERDICTS = WORKS, NO_EFFECT, REFUSED, NOT_TRIED = "works", "no effect", "refused", "not tried"


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        names: what it is about. In the table of options: their names.
        verdict: one of the four words above.
        note: the reason, or what to know.
        test: `file::function` that shows that it works.
        trial: what shows that it is refused or has no effect, each by itself: arguments of `generate`, or, under `model`,
            another model.
    """

    names: tuple[str, ...]
    verdict: str
    note: str = ""
    test: str = ""
    trial: dict = field(default_factory=dict)


def works(names: str, test: str, note: str = "") -> Row:
    return Row(tuple(names.split()), WORKS, note, test)


def not_tried(names: str, note: str = "") -> Row:
    return Row(tuple(names.split()), NOT_TRIED, note)


def no_effect(note: str, **trial) -> Row:
    return Row(tuple(trial), NO_EFFECT, note, trial=trial)


def refused(names: tuple[str, ...], reason: str, **trial) -> Row:
    return Row(names, REFUSED, reason, trial=trial)


PROCESSORS = "test_modes.py::test_an_option_makes_of_the_logits_what_it_stands_for"
GUIDANCE = "test_modes.py::test_guidance_follows_both_oracles"
SHAPES = "test_modes.py::test_shapes_of_what_is_recorded_past_the_window"
BEAMS = "test_beams.py::test_beams_past_the_window_equal_beams_without_a_cache"
LENGTHS = "test_modes.py::test_lengths_count_what_transformers_counts"

OPTIONS = [
    works("inputs input_ids attention_mask", "test_generate.py::test_left_padded_prompts_of_very_different_lengths", "padding on the left"),
    works("inputs_embeds", "test_generate.py::test_embeddings_in_place_of_ids"),
    works("bos_token_id", "test_modes.py::test_bos_token_id_in_place_of_a_prompt", "in place of a prompt"),
    works("past_key_values cache", "test_generate.py::test_several_turns_with_one_cache", "a `SinkCache` to continue; by either name with every release"),
    works("generation_config", "test_modes.py::test_a_generation_config_says_the_same_as_arguments"),
    works("max_length max_new_tokens", LENGTHS, "of the text, not of the window"),
    works("min_length min_new_tokens", PROCESSORS),
    works("max_time", "test_modes.py::test_time_that_is_up"),
    works("stop_strings tokenizer", "test_modes.py::test_stop_strings_and_streamers_past_the_window"),
    works("eos_token_id pad_token_id", "test_generate.py::test_eos_in_one_row_before_the_others", "one or several"),
    works("do_sample temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff", PROCESSORS),
    works("repetition_penalty no_repeat_ngram_size", PROCESSORS, "look at the whole text, evicted or not"),
    works("encoder_repetition_penalty encoder_no_repeat_ngram_size", PROCESSORS, "look at the prompt"),
    works("bad_words_ids sequence_bias suppress_tokens begin_suppress_tokens", PROCESSORS),
    works("forced_bos_token_id", "test_modes.py::test_forced_bos_token_id"),
    works("forced_eos_token_id exponential_decay_length_penalty", PROCESSORS),
    works("remove_invalid_values renormalize_logits watermarking_config", PROCESSORS, "SynthID too"),
    works("prefix_allowed_tokens_fn", PROCESSORS),
    works("logits_processor stopping_criteria", "test_generate.py::test_streamers_criteria_and_processors_are_called_as_in_transformers"),
    works("streamer", "test_modes.py::test_stop_strings_and_streamers_past_the_window"),
    works(
        "guidance_scale negative_prompt_ids negative_prompt_attention_mask",
        GUIDANCE,
        "the second text has a window of its own, and begins anew with each call; not with beams or assisted decoding",
    ),
    works("num_return_sequences", "test_generate.py::test_several_return_sequences_past_the_window_each_follow_the_rules"),
    works("num_beams early_stopping length_penalty", BEAMS, "the cache stays at the prompt, and the next call reads the answer again"),
    works("assistant_model", "test_assisted.py::test_an_assistant_has_a_window_of_its_own", "one text at a time; see *Assisted decoding and beams*"),
    works("assistant_early_exit", "test_assisted.py::test_the_first_layers_draft"),
    works("prompt_lookup_num_tokens max_matching_ngram_size", "test_assisted.py::test_looking_up_the_prompt"),
    works("assistant_tokenizer target_lookbehind assistant_lookbehind", "test_assisted.py::test_two_tokenizers", "with `tokenizer`"),
    works(
        "num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold",
        "test_assisted.py::test_an_assistant_that_is_sometimes_right",
    ),
    works("return_dict_in_generate output_logits output_scores", PROCESSORS),
    works("output_attentions output_hidden_states", SHAPES, "see *Output Type changes*"),
    works("prefill_chunk_size", "test_generate.py::test_the_chunk_length_does_not_change_the_logits"),
    works("cache_implementation", "test_static.py::test_generate_compiles_once", "see the table of caches"),
    works("cache_config", "test_kinds_of_windows.py::test_generate_quantized", 'with `cache_implementation="quantized"`'),
    works("compile_config", "test_static.py::test_generate_compiles_once", 'with `cache_implementation="static"`'),
    works("use_model_defaults", "test_modes.py::test_defaults_of_the_model", "transformers 4"),
    works("custom_generate trust_remote_code", "test_loading.py::test_every_way_in_gives_the_same_text", "and what goes with them: `revision`, `token`, ..."),
    refused(("use_cache=False",), "without a cache there is nothing to bound", use_cache=False),
    works(
        "pixel_values image_sizes pixel_attention_mask",
        "test_multimodal.py::test_generate_with_a_picture",
        "and what goes with them: the new tokens go through in one pass, and have to fit into the window; see *A picture in the prompt*",
    ),
    works("token_type_ids mm_token_type_ids", "test_multimodal.py::test_a_later_picture_is_refused", "for pictures in the first turn, or all 0"),
    refused(("other tensors",), "it can't be split over the passes", input_features=[[0] * 5]),
    no_effect("for assisted decoding with `do_sample`", assistant_ensemble_weight=0.5),
    no_effect("set by transformers on an assistant; fails without one, as in transformers", is_assistant=True),
    no_effect("for `num_beam_groups`", diversity_penalty=0.5),
    no_effect("for encoder-decoder models", decoder_start_token_id=3, forced_decoder_ids=[[1, 2]], generation_kwargs={"a": 1}),
    no_effect("transformers has dropped it", low_memory=True),
    no_effect('without `cache_implementation="static"`', disable_compile=True),
    works("synced_gpus", "test_distributed.py::test_a_process_that_has_done_keeps_step", "FSDP and DeepSpeed: one process that has done waits for the others"),
    no_effect("only the last logits are computed anyway", logits_to_keep=3),
    no_effect("says which release wrote the config", transformers_version="4.52.0"),
]  # fmt: skip


OTHER_CACHE = UNSUPPORTED_OPTIONS["cache_implementation"]

CACHES = [
    works("dynamic", "test_errors.py::test_a_cache_of_another_class", "also an empty `DynamicCache`: a `SinkCache` takes its place"),
    works("hybrid", "test_errors.py::test_a_generation_config_of_gemma_may_be_passed", "in generation configs of Gemma: taken for dynamic, as in transformers"),
    works("static", "test_static.py::test_generate_compiles_once", "a `SinkCache` whose buffers never move, for compiled models"),
    works("quantized", "test_kinds_of_windows.py::test_it_equals_the_reference", "sinks and the most recent tokens stay as they are, each older token is quantized once"),
    works("offloaded offloaded_static offloaded_hybrid offloaded_hybrid_chunked", "test_kinds_of_windows.py::test_generate_offloaded", "the window is kept in the memory of the host"),
    refused(("sliding_window",), OTHER_CACHE, cache_implementation="sliding_window"),
    refused(("hybrid_chunked",), OTHER_CACHE, cache_implementation="hybrid_chunked"),
    refused(("dynamic_full",), OTHER_CACHE, cache_implementation="dynamic_full"),
    refused(("mamba",), OTHER_CACHE, cache_implementation="mamba"),
    refused(("paged",), OTHER_CACHE, cache_implementation="paged"),
    refused(("a cache with tokens in it",), "already holds tokens, and nobody knows their positions", past_key_values="DynamicCache"),
    Row(("layers with a sliding window",), WORKS, "see *Model compatibility*", "test_families.py::test_logits_equal_the_oracle_however_the_tokens_are_fed"),
    Row(("recurrent states beside attention",), WORKS, "see *Model compatibility* and, for turns of a batch in your own loop, *Limits*", "test_zoo.py::test_exact_or_refused"),
    refused(("recurrent states alone",), "attention layers do not put their keys and values into its cache", model="mamba"),
    refused(("encoder-decoder",), "SinkCache serves decoder-only models", model="t5"),
]  # fmt: skip

ATTENTION = [
    *(works(name, "test_families.py::test_logits_equal_the_oracle_however_the_tokens_are_fed") for name in SUPPORTED_ATTENTION),
    works(
        "flex_attention flash_attention_2 flash_attention_3 flash_attention_4 paged|eager",
        "test_any_attention.py::test_generate_equals_that_of_the_sdpa_model",
        "any other, too: sdpa takes its place; in your own loop, call `SinkCache.model_for(model)`",
    ),
]

AROUND = [
    Row(("padded batches",), WORKS, "on the left", "test_generate.py::test_left_padded_prompts_of_very_different_lengths"),
    Row(("rows that end before others",), WORKS, "the padding behind their end is not counted", "test_rows_that_end.py::test_the_next_turns_are_those_of_each_row_alone"),
    Row(("several calls, chats",), WORKS, "", "test_generate.py::test_several_turns_with_one_cache"),
    Row(("`pipeline`",), WORKS, "", "test_loading.py::test_pipeline"),
    Row(("`transformers serve`, `transformers chat`",), WORKS, "", "test_readme.py::test_a_chat_with_the_server_is_answered_from_the_window"),
    Row(("`torch.compile`",), WORKS, "the static mode", "test_static.py::test_a_model_that_the_user_compiled"),
    Row(("a copy of a cache",), WORKS, "`copy.deepcopy`", "test_cache.py::test_a_deep_copy_goes_on_by_itself"),
    Row(("saving and loading a cache",), WORKS, "`cache.save`, `SinkCache.load`; also quantized or offloaded", "test_state.py::test_every_kind_of_window_goes_on_with_the_same_bits"),
    Row(("several threads",), WORKS, "each with its own cache", "test_threads.py::test_streams_in_threads_do_not_touch_each_other"),
    Row(("PEFT adapters",), WORKS, "prompt tuning and prefix tuning are refused", "test_wrapped.py::test_adapters"),
    Row(("`device_map`",), WORKS, "layers on several devices, weights in the memory of the host or on disk", "test_devices.py::test_weights_that_are_offloaded"),
    Row(("tensor parallel",), WORKS, "", "test_distributed.py::test_layers_that_are_split_over_processes"),
]  # fmt: skip

OPTION = "option of `generate`"
TABLES = {OPTION: OPTIONS, "cache": CACHES, "attention": ATTENTION, "beside these": AROUND}


def unsupported() -> list[Row]:
    """What `generate` refuses by name: one row for each reason."""
    names: dict[str, list[str]] = {}
    for name, reason in UNSUPPORTED_OPTIONS.items():
        if name == "cache_implementation":
            continue  # some work: the table of caches
        names.setdefault(reason, []).append(name)
    return [refused(tuple(group), reason, **dict.fromkeys(group, 2)) for reason, group in names.items()]


def rows(head: str) -> list[Row]:
    """Those of one table: what works, what has no effect, what is refused, what was not tried."""
    found = TABLES[head] + (unsupported() if head == OPTION else [])
    return sorted(found, key=lambda row: VERDICTS.index(row.verdict))


def options_tables() -> str:
    """Markdown. What is refused for the same reason shares a line."""
    lines = []
    for head in TABLES:
        shown: dict[tuple, list[str]] = {}
        for number, row in enumerate(rows(head)):
            in_code = head in (OPTION, "attention")
            names = [f"`{name}`" if in_code and " " not in name else name for name in row.names]
            shown.setdefault((row.verdict, row.note, None if row.verdict == REFUSED else number), []).extend(names)
        lines += [f"| {head} | | |", "|---|---|---|"]
        lines += [
            f"| {', '.join(names)} | {verdict} | {note} |".replace("|eager", "\\|eager")
            for (verdict, note, _), names in shown.items()
        ]
        lines.append("")
    return "\n".join(lines).strip()


def report_models(args: argparse.Namespace) -> dict:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    found = verdicts()
    text = models_table(found)
    print(text)
    check_or_write_block(args, "compatibility", text)
    return {verdict: sum(entry["verdict"] == verdict for entry in found) for verdict in ("exact", "fed as by transformers", "refused", "left out")}


def report_options(args: argparse.Namespace) -> dict:
    text = options_tables()
    print(text)
    check_or_write_block(args, "works-with", text)
    every = [row for head in TABLES for row in rows(head)]
    return {verdict: sum(len(row.names) for row in every if row.verdict == verdict) for verdict in VERDICTS}


def main() -> None:
    reports = {"options": report_options, "models": report_models}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=reports, default=[*reports], help="(default: both)")
    add_block_arguments(parser)
    args = parser.parse_args()
    counts = {}
    for name in args.tables:
        counts[name] = reports[name](args)
        print()
    print(json.dumps({"transformers": transformers.__version__, **counts}))


if __name__ == "__main__":
    main()
