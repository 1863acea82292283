"""How a model moves a key by some positions: rotary position embedding, described without the code of any model."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rotation:
    """Rotary position embedding (https://arxiv.org/abs/2104.09864) as a model applies it to the keys of a layer.

    Dimension i of a key turns with dimension `partner[i]` (int64 `[head_dim]`), by `frequency[i]` (float32 `[head_dim]`) radians
    per position. The two dimensions of a pair carry opposite signs, and a dimension that does not turn has frequency 0. This
    covers halves and interleaved pairs, leading, trailing or all dimensions, either direction, and no rotation at all.
    """

    frequency: torch.Tensor
    partner: torch.Tensor

    @classmethod
    def of_pairs(cls, head_dim: int, inv_freq: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> "Rotation":
        """The rotation that turns dimension `first[i]` towards dimension `second[i]`, `inv_freq[i]` radians a position."""
        frequency, partner = torch.zeros(head_dim, dtype=torch.float32), torch.arange(head_dim)
        frequency[first], frequency[second] = -inv_freq, inv_freq
        partner[first], partner[second] = second, first
        return cls(frequency, partner)

    @classmethod
    def identity(cls, head_dim: int) -> "Rotation":
        """No rotation: keys do not depend on the position."""
        return cls(torch.zeros(head_dim, dtype=torch.float32), torch.arange(head_dim))

    @property
    def is_identity(self) -> bool:
        return not self.frequency.any()

    @property
    def fingerprint(self) -> tuple:
        return tuple(self.frequency.tolist()), tuple(self.partner.tolist())

    def as_tensor(self) -> torch.Tensor:
        """Frequencies and partners in one tensor, float32 `[2, head_dim]`."""
        return torch.stack([self.frequency, self.partner.float()])

    def to(self, device: torch.device) -> "Rotation":
        return Rotation(self.frequency.to(device), self.partner.to(device))

    def angles(self, start: torch.Tensor, stop: torch.Tensor) -> torch.Tensor:
        """Angles that move a key from position `start` to `stop`: `[...]` -> `[..., head_dim]`, float32.

        Each end is rounded as the model rounds it, so that a moved key meets the query as the model's own key would.
        """
        return stop[..., None].float() * self.frequency - start[..., None].float() * self.frequency

    def turn(self, keys: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        """Keys `[..., head_dim]` rotated by angles that broadcast to them. Computed in float32 and rounded once."""
        return rotate(self.pairs(keys), (angles.cos(), angles.sin())).to(keys.dtype)

    def pairs(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The two operands of a rotation, float32: each dimension of the keys, and the dimension that turns together with it."""
        wide = keys.float()
        return wide, wide[..., self.partner]

    def misfit(self, keys: torch.Tensor, positions: torch.Tensor) -> float:
        """How far keys `[tokens, positions, heads, head_dim]` are from the keys at the first position, moved to the others.

        The worst dimension, relative to the length of the pair it belongs to: a wrong frequency can't hide behind right ones.
        """
        if keys.numel() == 0:  # the rotated part of the keys, in a layer that rotates none (Mistral Large 4)
            return 0.0
        first = keys[:, :1].float()
        angles = self.angles(positions[:1].expand_as(positions), positions)
        error = self.turn(first, angles[None, :, None]) - keys.float()
        length = (first.square() + first[..., self.partner].square()).mean((0, 2))
        return (error.square().mean((0, 2)) / (length + 1e-4 * length.mean())).max().sqrt().item()


def rotate(pairs: tuple[torch.Tensor, torch.Tensor], cos_sin: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Keys, given with their partners (`Rotation.pairs`), rotated by an angle that is given by its cosines and sines: float32."""
    (keys, partners), (cosines, sines) = pairs, cos_sin
    return torch.addcmul(keys * cosines, partners, sines)


def candidate_rotations(head_dim: int, tables: list[torch.Tensor]) -> Iterator[Rotation]:
    """Every rotation that models are known to apply, with the frequencies in `tables`; the most usual first."""
    yield Rotation.identity(head_dim)
    for inv_freq in tables:
        num_pairs = len(inv_freq)
        index = torch.arange(num_pairs)
        if 2 * num_pairs > head_dim:
            continue  # a table for wider heads
        for offset in sorted({0, head_dim - 2 * num_pairs}):
            halves = offset + index, offset + index + num_pairs
            interleaved = offset + 2 * index, offset + 2 * index + 1
            for first, second in (halves, interleaved, halves[::-1], interleaved[::-1]):
                yield Rotation.of_pairs(head_dim, inv_freq, first, second)
