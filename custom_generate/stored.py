"""What quantized and offloaded windows have in common: keys and values are kept elsewhere than where attention reads them."""

import torch

from .layers import Ring
from .plan import Plan


class StoredRing(Ring):
    """A ring of which `slots` holds the sinks alone. The rest is kept in another form, or in other memory.

    For a pass, `fetch` makes the slots behind the sinks, which are let go afterwards, and `store` keeps the new tokens. What a
    query sees and how sinks move is the same as in a plain ring.
    """

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [*super().tensors, self.recent]

    def views(self, num_tokens: int) -> dict[str, torch.Tensor]:
        num_recent = max(min(num_tokens, self.window.length) - self.window.num_sinks, 0)
        return {"slots": self.slots, "recent": self.recent[:, :, :num_recent]}

    @torch.inference_mode(False)
    def allocate(self, batch_size: int) -> None:
        self.forget()
        self.slots = self.slots.new_zeros(batch_size, self.slots.shape[1], self.window.num_sinks, self.slots.shape[3])

    def update(self, plan: Plan, new: torch.Tensor, held: torch.Tensor | None = None) -> torch.Tensor:
        held = torch.cat([self.slots, self.fetch(plan)], dim=2)
        handed_out = super().update(plan, new, held)
        if plan.writes_sinks:
            self.slots.copy_(held[:, :, : self.window.num_sinks])
        self.store(plan, new)
        return handed_out

    def fetch(self, plan: Plan) -> torch.Tensor:
        """The slots behind the sinks as they are before the pass, `[batch, heads, plan.num_held - num_sinks, head_dim]`."""
        raise NotImplementedError

    def store(self, plan: Plan, new: torch.Tensor) -> None:
        """Keep the new keys or values `[batch, heads, num_columns, head_dim]`, except for the sinks."""
        raise NotImplementedError
