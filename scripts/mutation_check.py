"""Does the test suite notice when generate.py is wrong? Small changes, one at a time, and the tests that ought to fail.

`MUTATIONS` are written by hand: what to look for, which must stand in the file exactly once, and what to put there. `--automatic`
adds those that a program makes: comparisons and signs the other way, 1 for 2, min for max, statements left out. The tests run in
a copy of the repository; those that fail fastest come first, and the first failure is enough. What no test notices is listed at
the end; a change that makes no difference stands in `EQUIVALENT`, with the reason. The last line is one JSON document.

    python scripts/mutation_check.py                                   # the list: about half an hour on one core
    python scripts/mutation_check.py --only "slot" "sinks" --jobs 2    # those with such a name
    python scripts/mutation_check.py --automatic 100 --seed 1          # and a sample of what a program makes
"""

import argparse
import ast
import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
SOURCE = Path("custom_generate", "generate.py")

# What pytest is given, one after the other until something fails: a few seconds each at first.
TESTS = [
    [
        "tests/test_cache.py::test_slots_of_tokens_by_hand",
        "tests/test_cache.py::test_operations_on_a_batch_of_rows_of_different_lengths[lengths0]",
        "tests/test_families.py::test_logits_equal_the_oracle_however_the_tokens_are_fed[llama-sdpa]",
        "tests/test_families.py::test_a_row_does_not_depend_on_padding_or_other_rows[qwen2-half-sliding-eager]",
        "tests/test_families.py::test_a_row_does_not_depend_on_padding_or_other_rows[bloom-eager]",
        "tests/test_static.py::test_however_the_tokens_are_fed_without_compiling",
        "tests/test_static.py::test_rows_come_and_go[options1]",
        "tests/test_cache.py::test_roll_back_over_several_passes_and_a_rebase",
        "tests/test_generate.py::test_the_longest_row_may_be_another_one_after_a_turn",
    ],
    ["tests/test_rotation.py", "tests/test_invariants.py"],
    ["tests/test_cache.py"],
    ["tests/test_generate.py"],
    ["tests/test_families.py", "-k", "(qwen2-half-sliding or mistral-long or gpt-j or dynamic or every_shape) and not oracle_notices"],
    ["tests/test_errors.py", "tests/test_memory.py", "tests/test_state.py"],
    ["tests/test_fuzz.py"],
    ["tests/test_families.py", "tests/test_static.py", "-m", "not also_eager"],
]  # fmt: skip

# In place of those, for what they don't use: by the name with which a change begins.
STORED = ["tests/test_quantized.py", "tests/test_offloaded.py"], ["tests/test_stored_state.py", "tests/test_memory.py"]
TESTS_OF = {
    "StoredStates": STORED,
    "QuantizedStates": STORED,
    "Quantization": STORED,
    "OffloadedStates": STORED,
    "Feed": [["tests/test_generate.py"], ["tests/test_beams.py", "tests/test_assisted.py"], ["tests/test_modes.py", "tests/test_distributed.py"]],
    "Drafter": [["tests/test_assisted.py"]],
    "Guidance": [["tests/test_modes.py"]],
    "History": [["tests/test_generate.py"]],
    "Saved": [["tests/test_state.py"], ["tests/test_stored_state.py"]],
}  # fmt: skip

# name: (what stands in generate.py exactly once, what is put there)
MUTATIONS = {
    # Where a token is stored
    "slot: ring of one slot more": (
        "on_ring = self.num_sinks + (token - self.num_sinks) % self.num_recent",
        "on_ring = self.num_sinks + (token - self.num_sinks) % (self.num_recent + 1)",
    ),
    "slot: ring begins one later": (
        "on_ring = self.num_sinks + (token - self.num_sinks) % self.num_recent",
        "on_ring = self.num_sinks + (token - self.num_sinks + 1) % self.num_recent",
    ),
    "slot: the last sink is on the ring (numbers)": (
        "return token if token < self.num_sinks else on_ring",
        "return token if token < self.num_sinks - 1 else on_ring",
    ),
    "slot: sinks are on the ring (tensors)": ("return torch.where(token < self.num_sinks, token, on_ring)", "return on_ring"),
    "token in a slot: a lap late": ("torch.div(num_seen - 1 - slot,", "torch.div(num_seen - 2 - slot,"),
    "token in a slot: sinks take part in laps": (
        "return torch.where(slot < self.num_sinks, slot, slot + laps * self.num_recent)",
        "return slot + laps * self.num_recent",
    ),
    "sees: not itself": ("return (key <= query) &", "return (key < query) &"),
    "sees: one token more": ("(key > query - self.num_recent))", "(key >= query - self.num_recent))"),
    "sees: one token less": ("(key > query - self.num_recent))", "(key > query - self.num_recent + 1))"),
    "sees: no sinks": ("((key < self.num_sinks) | (key >", "((key < 0) | (key >"),
    "shift: sinks one too near": ("shift = position - self.length + 1", "shift = position - self.length + 2"),
    "shift: sinks one too far": ("shift = position - self.length + 1", "shift = position - self.length"),
    "shift: backwards while filling (numbers)": ("else max(shift, 0)", "else shift"),
    "shift: backwards while filling (tensors)": ("return shift.clamp(min=0) if", "return shift if"),
    # How a key is moved
    "rotation: the wrong way": ("frequency[first], frequency[second] = -inv_freq, inv_freq", "frequency[first], frequency[second] = inv_freq, -inv_freq"),
    "rotation: both of a pair with one sign": ("frequency[first], frequency[second] = -inv_freq, inv_freq", "frequency[first], frequency[second] = inv_freq, inv_freq"),
    "rotation: partners not exchanged": ("partner[first], partner[second] = second, first", "partner[first], partner[second] = first, second"),
    "rotation: angle of the difference": (
        "return stop[..., None].float() * self.frequency - start[..., None].float() * self.frequency",
        "return (stop - start)[..., None].float() * self.frequency",
    ),
    "rotation: sine and cosine exchanged": (
        "(keys, partners), (cosines, sines) = with_partners, turn",
        "(keys, partners), (sines, cosines) = with_partners, turn",
    ),
    "rotation: in the dtype of the keys": ("wide = keys.float()\n        return wide", "wide = keys\n        return wide"),
    "rotation: by cosines only": ("return torch.addcmul(keys * cosines, partners, sines)", "return keys * cosines"),
    "rotation: any misfit will do": ("if best[0] <= tolerance:", "if best[0] <= 10:"),
    "rotation: the first layer need not count by position": ("if is_first and misfit <= tolerance:", "if False:"),
    # What a pass does
    "step: two kinds confused at the edge": (
        "self.hands_out_slots = num_columns == 1 or max(num_after) <= window.length",
        "self.hands_out_slots = num_columns == 1 or max(num_after) <= window.length + 1",
    ),
    "step: the shortest row decides": (
        "self.hands_out_slots = num_columns == 1 or max(num_after) <= window.length",
        "self.hands_out_slots = num_columns == 1 or min(num_after) <= window.length",
    ),
    "step: held, of the shortest row": ("self.num_held = min(max(num_after), window.length)", "self.num_held = min(min(num_after), window.length)"),
    "step: recent tokens without the last": (
        "self.recent_before = slice(window.num_sinks, max(min(max(num_seen), window.length), window.num_sinks))",
        "self.recent_before = slice(window.num_sinks, max(min(max(num_seen), window.length) - 1, window.num_sinks))",
    ),
    "step: recent tokens of the shortest row": (
        "self.recent_before = slice(window.num_sinks, max(min(max(num_seen), window.length), window.num_sinks))",
        "self.recent_before = slice(window.num_sinks, max(min(min(num_seen), window.length), window.num_sinks))",
    ),
    "step: new sinks go unnoticed": ("self.writes_sinks = min(num_seen) < window.num_sinks", "self.writes_sinks = max(num_seen) < window.num_sinks"),
    "step: the last new sink goes unnoticed": ("self.writes_sinks = min(num_seen) < window.num_sinks", "self.writes_sinks = min(num_seen) < window.num_sinks - 1"),
    "step: any pass can be undone": ("self.can_be_undone = self.hands_out_slots or num_columns <= window.num_recent", "self.can_be_undone = True"),
    "step: undone, off by one": ("num_columns <= window.num_recent", "num_columns <= window.num_recent + 1"),
    "step: causal though rows differ": ("num_columns == 1 and min(num_after) >= self.num_held)", "num_columns == 1)"),
    "step: shift without the base (rows)": ("[window.shift(seen - start) for seen, start in zip(num_seen, base)]", "[window.shift(seen) for seen, start in zip(num_seen, base)]"),
    "step: shift without the base (queries)": ("window.shift(self.tokens - torch.tensor(base, device=device)[:, None])", "window.shift(self.tokens)"),
    "step: copies of the sinks, one less": ("num_copies = self.window.num_sinks * self.part_length", "num_copies = self.window.num_sinks * (self.part_length - 1)"),
    "parts: recent tokens, one too early": ("recent = recent[:, :, 1:].unfold(", "recent = recent.unfold("),
    "parts: recent tokens in the order of the slots": ("torch.cat([_take_slots(held, step.recent_slots), new], dim=2)", "torch.cat([held[:, :, self.window.num_sinks :], new], dim=2)"),
    "parts: a query sees one token more": ("(distance >= 0) & (distance < window.num_recent)", "(distance >= 0) & (distance <= window.num_recent)"),
    "parts: a query does not see the oldest token": ("(distance >= 0) & (distance < window.num_recent)", "(distance > 0) & (distance < window.num_recent)"),
    "parts: rows are mixed": ("states.unflatten(0, (-1, self.num_parts)).transpose(1, 2)", "states.unflatten(0, (self.num_parts, -1)).transpose(0, 1).transpose(1, 2)"),
    "parts: memory that is in use": ("and _num_users(room) == num_users:", "and room is not None:"),
    "parts: memory is never used again": ("and _num_users(room) == num_users:", "and room is None:"),
    "parts: a row is not full": ("is_plain and min(self._num_seen) >= self.window_length", "is_plain and max(self._num_seen) >= self.window_length"),
    "parts: while the window is filling": ("is_plain and min(self._num_seen) >= self.window_length", "is_plain and min(self._num_seen) >= self.window_length - 1"),
    "parts: recurrent layers, too": ("not (traits.is_recurrent or traits.is_ordered or", "not (traits.is_ordered or"),
    "parts: chunked attention, too": ("or traits.is_chunked or traits.is_indexed)", "or traits.is_indexed)"),
    "parts: indexed attention, too": ("or traits.is_chunked or traits.is_indexed)", "or traits.is_chunked)"),
    "parts: padding goes unnoticed": ("elif min(num_new) < num_columns:", "elif False:"),
    "parts: generate divides padding": ("cache.takes_parts and rest.begins_without_padding", "cache.takes_parts"),
    "parts: generate never divides": ("num_parts = cache.num_parts_of(size) if takes_parts else 1", "num_parts = 1"),
    "step: padding counts as tokens": ("self.tokens = self.num_seen + column - num_padding", "self.tokens = self.num_seen + column"),
    "step: padding is written": ("is_held = ~self.is_padding & window.sees(last, self.tokens)", "is_held = window.sees(last, self.tokens)"),
    "step: evicted tokens are written": ("is_held = ~self.is_padding & window.sees(last, self.tokens)", "is_held = ~self.is_padding"),
    "mask: padding sees nothing": ("return window.sees(query.clamp(min=0), token)", "return window.sees(query, token)"),
    "mask: every copy of the sinks": ("sinks = own_copy & (sink <= query)", "sinks = sink <= query"),
    "mask: sinks that come later": ("sinks = own_copy & (sink <= query)", "sinks = own_copy.expand(len(query), -1, -1)"),
    "mask: slots not yet used": ("recent = (held < self.num_seen[:, :, None]) & window.sees(query, held)", "recent = window.sees(query, held)"),
    "mask: recent tokens for ever": (
        "recent = (held < self.num_seen[:, :, None]) & window.sees(query, held)",
        "recent = (held < self.num_seen[:, :, None]).expand(-1, query.shape[1], -1)",
    ),
    "mask: new sinks twice": ("(token >= window.num_sinks) & window.sees(query, token)", "window.sees(query, token)"),
    "mask: padding among the new": ("new = ~self.is_padding[:, None, :] & (token", "new = (token"),
    "mask: padding does not see itself": ("return torch.cat([sinks.expand(len(query), -1, -1), recent, new | itself], dim=-1)", "return torch.cat([sinks.expand(len(query), -1, -1), recent, new], dim=-1)"),
    "order: full one token late": ("is_full = after > window.length", "is_full = after > window.length + 1"),
    "order: sinks in their places": ("torch.where(is_full & (column < window.num_sinks), column, after - self.num_held + column)", "after - self.num_held + column"),
    "order: what is not held is visible": ("self.is_held = token >= 0", "self.is_held = token >= -1"),
    # Keys and values
    "cursor: sinks written over the token": ("torch.where(sinks == slots, num_sinks, sinks)", "sinks.expand(len(slots), -1)"),
    "cursor: one slot visible less": ("num_visible = [min(seen + 1, self.window.length) for seen in num_seen]", "num_visible = [min(seen, self.window.length) for seen in num_seen]"),
    "cursor: slots of new rows not set": ("if not (has_all_sinks and self._has_all_sinks):", "if not has_all_sinks:"),
    "cursor: slot of the first row for all": ("self.slots[:, -1].copy_(torch.tensor(slots))", "self.slots[:, -1].fill_(slots[0])"),
    "cursor: mask as it was": ("if num_visible != self._num_visible:", "if len(num_visible) != len(self._num_visible):"),
    "states: sinks not turned": ("            self._move_sinks(step.shifts)\n", "            self._move_sinks([0])\n"),
    "states: copies of the sinks not turned": (
        "            sinks = turned(self.rotation.with_partners(sinks), self._copies_turn).to(held.dtype)\n",
        "            pass\n",
    ),
    "states: copies of the sinks turned twice": ("            self._move_sinks([0])\n            self._copies_turn", "            self._copies_turn"),
    "states: new sinks not kept": ("self._sinks_are_new = step.writes_sinks", "self._sinks_are_new = False"),
    "states: sinks kept once they have moved": ("if any(self._sinks_are_at):\n", "if False:\n"),
    "states: sinks thought to stand where they were": ("            self._sinks_are_at = shifts\n\n", "            pass\n\n"),
    "states: turns for ever the first ones": ("            self._set_turns(shifts[0])\n", "            self._set_turns(shifts[0] + 1)\n"),
    "states: one turn too many taken ahead": ("if not 0 <= shifts[0] - self._first_turn < NUM_TURNS_AT_ONCE:", "if not 0 <= shifts[0] - self._first_turn < NUM_TURNS_AT_ONCE + 1:"),
    "states: the first row's turn for all": ("return self._turn_by(torch.tensor(shifts)[:, None])", "return self._turn_by(torch.tensor(shifts[:1])[:, None])"),
    "states: new sinks of a long pass not written first": ("            held[rows, :, slots] = new[rows, :, columns]\n", "            pass\n"),
    "states: recent tokens handed out after the write": (
        "handed_out = torch.cat([sinks.flatten(2, 3), held[:, :, step.recent_before], new], dim=2)\n        held[step.rows, :, step.slots] = new[step.rows, :, step.columns]",
        "held[step.rows, :, step.slots] = new[step.rows, :, step.columns]\n        handed_out = torch.cat([sinks.flatten(2, 3), held[:, :, step.recent_before], new], dim=2)",
    ),
    "states: all slots handed out": ("return held if step.num_held == held.shape[2] else held.narrow(2, 0, step.num_held)", "return held"),
    "states: turned back by the first row's amount": ("start = torch.tensor(num_positions, device=self.slots[0].device)[:, None, None]", "start = torch.tensor(num_positions[:1], device=self.slots[0].device)[:, None, None]"),
    "states: turned back the wrong way": ("return self.rotation.angles(start, torch.zeros_like(start))", "return self.rotation.angles(torch.zeros_like(start), start)"),
    "states: sinks turned back as well": ("recent = held[:, :, self.window.num_sinks :]\n", "recent = held[:, :, :]\n"),
    "states: what was evicted is not turned back": ("                old.copy_(self.rotation.turn(old,", "                (self.rotation.turn(old,"),
    "states: undone, one too many": ("undone = tokens >= (first if len(first) == 1 else first[rows])", "undone = tokens > (first if len(first) == 1 else first[rows])"),
    "states: undone in the order of the passes": ("for rows, slots, tokens, overwritten in reversed(log):", "for rows, slots, tokens, overwritten in log:"),
    "states: sinks of other rows": ("self._sinks = _selected(self._sinks, 2, index)", "pass"),
    "states: moves of other rows": ("self._sinks_are_at = [self._sinks_are_at[row] for row in index.tolist()]", "pass"),
    "states: room not taken over": ("                self.slots[index][:, :, :capacity] = held\n", ""),
    "states: looks at sinks that are gone (room)": ("                self.slots[index][:, :, :capacity] = held\n            self._look_at_sinks()", "                self.slots[index][:, :, :capacity] = held"),
    "states: looks at sinks that are gone (rows)": ("        self._look_at_sinks()\n        if self._moves_sinks:\n            self._sinks = _selected", "        if self._moves_sinks:\n            self._sinks = _selected"),
    "states: new room is as it comes": ("self.slots[index] = held.new_zeros(batch_size, num_heads, wider, head_dim)", "self.slots[index] = held.new_full((batch_size, num_heads, wider, head_dim), float('nan'))"),
    # The cache
    "cache: base not applied to positions": ("stop = [after - start for after, start in zip(self._pass.num_seen_after, self._base)]", "stop = list(self._pass.num_seen_after)"),
    "cache: values are not turned back": ("            for states in self._states:\n                states.move_back(back)", "            for states in self._states[::2]:\n                states.move_back(back)"),
    "cache: only the first layers are turned back": ("            for states in self._states:\n                states.move_back(back)", "            for states in self._groups[0].states:\n                states.move_back(back)"),
    "cache: turned back, but the base stays": ("        self._num_seen, self._base = num_seen, base\n", "        self._num_seen = num_seen\n"),
    "cache: never turned back": ("back.append(seen - start - lowest if is_due or seen - start < lowest else 0)", "back.append(0)"),
    "cache: turned back to the start": ("lowest = min(seen, self.window_length)", "lowest = min(seen, self.num_sink_tokens)"),
    "cache: turned back one late": ("is_due = seen - start >= self._traits.turns_at or", "is_due = seen - start > self._traits.turns_at or"),
    "cache: too late for the limit of the model": ("(limit is not None and after - start > limit)", "(limit is not None and after - start > limit + 1)"),
    "cache: rows thought alike by what they have seen": ("if len(set(zip(num_seen, num_new, base))) == 1:", "if len(set(num_seen)) == 1:"),
    "cache: rows thought alike whatever their base": ("if len(set(zip(num_seen, num_new, base))) == 1:", "if len(set(zip(num_seen, num_new))) == 1:"),
    "cache: more columns than the model has positions": ("if limit is not None and max(num_columns, *(after", "if limit is not None and max(0, *(after"),
    "cache: a layer is told the tokens seen": ("return max(last - current.num_columns, 0)", "return self.num_tokens_seen"),
    "cache: a layer is told where the longest row began": ("return max(last - current.num_columns, 0)", "return max(seen - start for seen, start in zip(self._num_seen, self._base))"),
    "cache: queries are scaled unnoticed": ("        limits.append(config.floor_scale - 1)\n", "        pass\n"),
    "cache: a window longer than a chunk": ("    if probe.is_chunked:\n", "    if False:\n"),
    "cache: an indexer chooses among more than it may": ("    if probe.is_indexed:\n", "    if False:\n"),
    "cache: an indexer is given less than is held": ("expand(batch_size, self._kv_length, dim)", "expand(batch_size, self._kv_length - 1, dim)"),
    "cache: recurrent states elsewhere for each text": ("        if rows == {batch_size}:\n", "        if False:\n"),
    "cache: recurrent states of the text before": ("                LinearAttentionLayer.reset(layer)\n", "                pass\n"),
    "cache: recurrent states elsewhere for other rows": ("if self.is_static and len(index) == self._batch_size:", "if False:"),
    "cache: a compiled pass over recurrent states is repeated": ("has_begun = self._pass.is_at_cursor or len(", "has_begun = len("),
    "cache: rows that wait go on": ("            self._put_back_idle_rows()\n", "            pass\n"),
    "cache: all rows are put back": ("rows = [row for row in range(self._batch_size) if num_new[row % len(num_new)] == 0]", "rows = [*range(self._batch_size)] if 0 in num_new else []"),
    "generate: rows wait and go on in one pass": ("cache.num_columns_at_once, self._num_columns_alike(rest))", "cache.num_columns_at_once)"),
    "cache: padding stands where it likes": ("positions = positions.clamp(min=0)\n", "pass\n"),
    "cache: a native window longer than ours is kept": ("keeps_native = layer.native_window is not None and layer.native_window <= self.window_length", "keeps_native = layer.native_window is not None"),
    "cache: a native window as long as ours gets sinks": ("layer.native_window <= self.window_length\n", "layer.native_window < self.window_length\n"),
    "cache: a native window has sinks": ("return Window(layer.native_window, 0) if keeps_native", "return Window(layer.native_window, min(1, layer.native_window - 1)) if keeps_native"),
    "cache: any interrupted pass can be repeated": ("can_be_repeated = not evicts and not quantizes and not self._traits.is_recurrent", "can_be_repeated = True"),
    "cache: tokens seen before the pass has ended": ("        self._num_seen, self._base = num_seen, base\n", "        self._num_seen, self._base = num_seen_after, base\n"),
    "cache: the ids of another pass": ("self._token_ids[step.rows, step.slots] = input_ids[step.rows, step.columns]", "self._token_ids[step.rows, step.slots] = input_ids[step.rows, step.columns] * 0"),
    "cache: ids of other rows": ("self._token_ids = self._token_ids.index_select(0, index.to(self._token_ids.device))", "self._token_ids = self._token_ids[: len(index)].repeat(len(index), 1)[: len(index)]"),
    "cache: base of other rows": (
        "self._num_seen, self._base = [self._num_seen[row] for row in rows], [self._base[row] for row in rows]",
        "self._num_seen = [self._num_seen[row] for row in rows]",
    ),
    "cache: the token returned last of other rows": ("self.unseen_token_ids = [self.unseen_token_ids[row] for row in index.tolist()]", "pass"),
    "cache: the token returned last for ever": ("        self.unseen_token_ids = None\n        if self._batch_size == -1:", "        if self._batch_size == -1:"),
    "cache: recorded of the row that has the most": ("self._num_recorded += min(after - seen", "self._num_recorded += max(after - seen"),
    "cache: recorded, though rows have changed": ("        self._batch_size = len(index)\n        self._forget_recorded()\n", "        self._batch_size = len(index)\n"),
    "cache: recorded, though it is too long": ("if not all(states.can_undo(finished.steps[states.window]) for states in self._states):", "if False:"),
    "cache: crop does not count what is recorded": ("if max(self._num_seen) > group.num_intact and self._num_recorded < removed:", "if False:"),
    "cache: crop looks at the shortest row": ("if max(self._num_seen) > group.num_intact and", "if min(self._num_seen) > group.num_intact and"),
    "cache: crop leaves the ids": ("                self._token_ids[rows, slots] = old[undone]\n", "                pass\n"),
    "cache: a reset keeps the positions": ("self._num_seen, self._base = [0], [0]  #", "self._num_seen, self._base = [0], getattr(self, '_base', [0])  #"),
    "cache: unprepared passes at any position": ("elif any(self._base):", "elif False:"),
    "cache: unprepared passes of any length": ("if num_columns > 1 and num_after > length:", "if False:"),
    "cache: unprepared passes, off by one": ("if num_columns > 1 and num_after > length:", "if num_columns > 1 and num_after > length + 1:"),
    "cache: mask sizes of the window without sinks": ("return min(self.num_tokens_seen + num_columns, window.length), 0", "return min(self.num_tokens_seen + num_columns, window.num_recent), 0"),
    "cache: query offset, off by one": ("return min(self.num_tokens_seen, window.length - 1)", "return min(self.num_tokens_seen, window.length)"),
    "cache: query offset of a prepared pass": ("return self._pass.steps[window].kv_length - self._pass.part_length", "return self._pass.steps[window].kv_length - self._pass.part_length - 1"),
    "cache: a mask that is made by the model, for any pass": ("        if is_causal and self._model_makes_this_mask():", "        if self._model_makes_this_mask():"),
    # generate
    "generate: new tokens counted from the row that was the longest": (
        "num_other = input_ids.shape[1] - max(self.cache._pass.num_seen_after)",
        "num_other = input_ids.shape[1] - self.cache.get_seq_length() - chunk.num_columns",
    ),
    "generate: chunks over the edge": ("size = min(size, cache.num_columns_at_once, self", "size = min(size, self"),
    "generate: the end of a history, one token late": ("if ids[num - length : num].equal(recent[len(recent) - length :]):\n                    return num", "if ids[num - length : num].equal(recent[len(recent) - length :]):\n                    return num - 1"),
    "generate: the shortest fitting end": ("for num in range(min(num_tokens - 1, num_seen), 0, -1):", "for num in range(1, min(num_tokens - 1, num_seen) + 1):"),
    "generate: the first tokens of a history are not looked at": ("if num_tokens > num_seen and ids[: len(first)].equal(first) and", "if num_tokens > num_seen and"),
    "generate: padding of new columns is lost": ("mask = column >= num_columns - torch.tensor(num_tokens, device=tokens.device)[:, None]", "mask = column >= torch.zeros(len(num_tokens), 1)"),
    "generate: the text is copied over the room of another": ("if length > room.shape[1] or room.num_used != ids.shape[1]:", "if length > room.shape[1]:"),
}  # fmt: skip

# Changes that no test can notice: name -> why.
EQUIVALENT = {
    "rotation: the wrong way": "both directions are tried, and the one that explains the model is found under the other name",
    "rotation: angle of the difference": "the difference of two rounded angles is rounded as well: up to half a unit in the last place, or up to one",
    "step: copies of the sinks, one less": "it is told to nobody: a pass of this kind has a mask of its own, which has its length",
    "mask: padding sees nothing": "from torch 2.5 on, what attends to nothing is 0, and padding is not looked at; before, it is NaN",
    "mask: padding does not see itself": "as above",
}

# Where a program makes changes.
CLASSES = {"Window", "Rotation", "Step", "Cursor", "States", "LayerGroup", "SinkCache", *TESTS_OF}
OTHER_WAY = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==", ast.Add: "-", ast.Sub: "+",
    ast.And: "or", ast.Or: "and",
}  # fmt: skip


def mutated(source: str, name: str) -> str:
    """The file with one change of the list.

    Raises:
        ValueError: what it looks for is not there exactly once.
    """
    old, new = MUTATIONS[name]
    if source.count(old) != 1:
        raise ValueError(f"{name!r} looks for what stands {source.count(old)} times in {SOURCE}, and must once:\n{old}")
    return source.replace(old, new)


def automatic_mutations(source: str) -> dict[str, str]:
    """Name -> the file with one change, for all that a program can think of."""
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line.encode()))
    raw, found = source.encode(), {}

    def place(line: int, column: int) -> int:
        return starts[line - 1] + column

    def change(where: str, start: int, stop: int, new: str) -> None:
        old = raw[start:stop].decode()
        line = lines[raw[:start].count(b"\n")].strip()
        name = f"{where}: {line:.90}: {old.strip():.60} -> {new or 'nothing'}"
        found[name if name not in found else f"{name} (at {start})"] = (raw[:start] + new.encode() + raw[stop:]).decode()

    def between(where: str, left: ast.AST, right: ast.AST, kind: ast.AST) -> None:
        start, stop = place(left.end_lineno, left.end_col_offset), place(right.lineno, right.col_offset)
        symbols = {
            "<": ast.Lt,
            "<=": ast.LtE,
            ">": ast.Gt,
            ">=": ast.GtE,
            "==": ast.Eq,
            "!=": ast.NotEq,
            "+": ast.Add,
            "-": ast.Sub,
        }
        symbols |= {"and": ast.And, "or": ast.Or}
        old = next((symbol for symbol, its_kind in symbols.items() if isinstance(kind, its_kind)), None)
        text = raw[start:stop].decode()
        if old is not None and text.count(old) == 1:
            change(where, start, stop, text.replace(old, OTHER_WAY[type(kind)]))

    for outer in ast.parse(source).body:
        if not isinstance(outer, ast.ClassDef) or outer.name not in CLASSES:
            continue
        for function in (node for node in outer.body if isinstance(node, ast.FunctionDef)):
            where = f"{outer.name}.{function.name}"
            raised = {id(inner) for node in ast.walk(function) if isinstance(node, ast.Raise) for inner in ast.walk(node)}
            for node in ast.walk(function):
                if id(node) in raised or function.name == "__repr__":
                    continue
                if isinstance(node, ast.Compare) and len(node.ops) == 1:
                    between(where, node.left, node.comparators[0], node.ops[0])
                elif isinstance(node, ast.BinOp):
                    between(where, node.left, node.right, node.op)
                elif isinstance(node, ast.BoolOp) and len(node.values) == 2:
                    between(where, *node.values, node.op)
                elif isinstance(node, ast.Name) and node.id in ("min", "max"):
                    start = place(node.lineno, node.col_offset)
                    change(where, start, start + 3, "max" if node.id == "min" else "min")
                elif isinstance(node, ast.Constant) and type(node.value) is int and node.value in (0, 1):
                    start = place(node.lineno, node.col_offset)
                    change(where, start, start + 1, str(node.value + 1))
                elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) or isinstance(node, ast.AugAssign):
                    change(where, place(node.lineno, node.col_offset), place(node.end_lineno, node.end_col_offset), "pass")
    return found


def compiles(changed: str, source: str) -> bool:
    """Whether the function in which a file differs from the source still is one."""
    at = len(os.path.commonprefix([changed, source]))
    ends = [match.start() for match in re.finditer(r"\n\n(?= *(?:@|def |class |#))", changed)]
    start = max((end for end in ends if end < at), default=0)
    stop = min((end for end in ends if end > at), default=len(changed))
    try:
        ast.parse(textwrap.dedent(changed[start:stop]))
    except SyntaxError:
        return False
    return True


def import_what_tests_need() -> None:
    """Once, before processes are made of this one for each change: that takes longer than most tests."""
    import hypothesis.stateful  # noqa: F401
    import pytest  # noqa: F401
    import torch._dynamo
    import transformers

    torch.set_num_threads(1)
    for name in ("Llama", "Qwen2", "Qwen3", "Gemma3", "GPTJ", "Bloom", "Falcon", "Cohere", "Mistral", "Phi3", "DeepseekV3"):
        getattr(transformers, f"{name}ForCausalLM", None)
    transformers.GenerationConfig, transformers.DynamicCache


def run_tests(folder: Path, log: Path, groups: list[list[str]]) -> None:
    """In a process of its own: ends it with 0 if all pass, 1 if one fails."""
    import pytest

    os.chdir(folder)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        for tests in groups:
            if not all(Path(test).exists() for test in tests if test.endswith(".py")):
                continue
            status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--tb=line", "-W", "ignore", *tests])
            for name in [name for name in sys.modules if name.startswith(("test_", "conftest"))]:
                del sys.modules[name]
            sys.stdout.flush()
            if status != 0:
                os._exit(1)
    os._exit(0)


def verdict(folder: Path, text: str, log: Path, cpu_seconds: int, groups: list[list[str]]) -> str:
    """What these tests say of a file: caught, survived, or that they did not end."""
    (folder / SOURCE).write_text(text, encoding="utf-8")
    process = os.fork()
    if process == 0:
        with contextlib.suppress(BaseException):
            resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 5))
            run_tests(folder, log, groups)
        os._exit(1)
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        return "not ended" if os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL) else "caught"
    return "survived" if os.WEXITSTATUS(status) == 0 else "caught"


def failed_test(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith(("FAILED", "ERROR"))]
    return lines[-1].partition(" - ")[0].removeprefix("FAILED ").removeprefix("ERROR ") if lines else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="changes with one of these in their name (default: all)")
    parser.add_argument("--automatic", type=int, metavar="N", default=0, help="so many that a program makes, too (-1: all)")
    parser.add_argument("--seed", type=int, default=0, help="which of them (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="changes at a time (default: %(default)s)")
    parser.add_argument("--cpu-seconds", type=int, default=600, help="for the tests of one change (default: %(default)s)")
    parser.add_argument("--groups", type=int, default=len(TESTS), help="of tests, the fastest first (default: all %(default)s)")
    parser.add_argument("--list", action="store_true", help="name the changes, and run nothing")
    args = parser.parse_args()

    source = (ROOT / SOURCE).read_text(encoding="utf-8")
    changes = {name: mutated(source, name) for name in MUTATIONS}
    if args.automatic:
        automatic = automatic_mutations(source)
        names = sorted(automatic)
        random.Random(args.seed).shuffle(names)
        names = names if args.automatic < 0 else names[: args.automatic]
        changes |= {name: automatic[name] for name in names if compiles(automatic[name], source)}
    if args.only is not None:
        changes = {name: text for name, text in changes.items() if any(part in name for part in args.only)}
    if args.list:
        print("\n".join(changes))
        print(json.dumps({"changes": len(changes)}))
        return

    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    import_what_tests_need()
    results = {}
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(args.jobs) as pool:
        folders = []
        for job in range(args.jobs):
            folders.append(Path(temporary, f"copy-{job}"))
            ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", ".hypothesis")
            shutil.copytree(ROOT, folders[-1], ignore=ignored)

        def check(name: str) -> tuple[str, str, str, float]:
            folder, start = folders.pop(), time.perf_counter()
            log = Path(f"{folder}.log")
            try:
                groups = TESTS_OF.get(name.partition(".")[0], TESTS)[: args.groups]
                said = verdict(folder, changes[name], log, args.cpu_seconds, groups)
                return name, said, failed_test(log), time.perf_counter() - start
            finally:
                folders.append(folder)

        if args.only is None:
            changes = {"": source} | changes
        for name, said, test, seconds in tqdm(pool.map(check, changes), total=len(changes), desc="changes", disable=None):
            if name == "" and said != "survived":
                sys.exit(f"The tests fail without any change ({said}: {test}): nothing can be said.")
            if name:
                results[name] = said
                known = f" (known: {EQUIVALENT[name]})" if said == "survived" and name in EQUIVALENT else ""
                tqdm.write(f"{said:9} {seconds:4.0f} s  {name}  {test}{known}")
                sys.stdout.flush()
    survivors = [name for name, said in results.items() if said == "survived" and name not in EQUIVALENT]
    counts = {kind: sum(said == kind for said in results.values()) for kind in ("caught", "not ended", "survived")}
    print(f"\nNo test notices {len(survivors)} of {len(results)}:" if survivors else "\nNone is left unnoticed.")
    print("\n".join(survivors))
    print(json.dumps(counts | {"equivalent": counts["survived"] - len(survivors), "survivors": survivors}))
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
