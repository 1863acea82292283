"""Where a token is stored: the slots of a ring behind the sinks.

    [ 0 .. num_sinks - 1 | the most recent tokens, in a ring ]        `length` slots in all
"""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Window:
    """The tokens that a layer holds: the first `num_sinks` and the most recent ones, `length` in all.

    Tokens are numbered 0, 1, 2, ... in each row by itself, padding not counted. Until `length` tokens have been seen, token t
    is in slot t. From then on the slots behind the sinks are a ring, and each new token takes the slot of the oldest.
    """

    length: int
    num_sinks: int

    @property
    def num_recent(self) -> int:
        return self.length - self.num_sinks

    def slot(self, token):
        """The slot of a token (an int, or a tensor of them)."""
        on_ring = self.num_sinks + (token - self.num_sinks) % (self.length - self.num_sinks)
        if isinstance(token, torch.Tensor):
            return torch.where(token < self.num_sinks, token, on_ring)
        return token if token < self.num_sinks else on_ring

    def token(self, slot: torch.Tensor, num_seen: torch.Tensor) -> torch.Tensor:
        """The token in each slot after `num_seen` tokens; for a slot not yet used, a number that is not less than `num_seen`."""
        laps = torch.div(num_seen - 1 - slot, self.num_recent, rounding_mode="floor").clamp(min=0)
        return torch.where(slot < self.num_sinks, slot, slot + laps * self.num_recent)

    def sees(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Whether the query of one token attends to the key of another."""
        return (key <= query) & ((key < self.num_sinks) | (key > query - self.num_recent))

    def shift(self, position):
        """How far the sinks are moved for the query at a position, so that sink 0 stands `length - 1` before the query."""
        shift = position - self.length + 1
        return shift.clamp(min=0) if isinstance(shift, torch.Tensor) else max(shift, 0)

    @property
    def part_length(self) -> int:
        """How many tokens a part of a long pass over a full window should have (`Plan`): a power of two, as most prompts are cut.

        Long parts attend to many copies of the sinks, and each short part needs its own copy of the recent tokens. The formula
        was fitted to the fastest lengths for 4 sinks and windows of 256 to 4,096 on a CPU.
        """
        return 2 ** max(0, round(math.log2(1.2 * self.num_recent**0.75 / (self.num_sinks + 1) ** 0.5)))
