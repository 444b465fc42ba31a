"""Random inputs for operator tests, and error budgets against float64."""

from dataclasses import dataclass

import torch
from torch import Tensor

EXACT = 1e-11  # float64 against float64: rounding only
# Budgets of the relative RMS error of results and gradients. Rounding alone uses about 0.4 of the 16-bit ones. What
# arithmetic may add is tested at sizes with meaningful statistics (1.5 times eager's error).
VALUE = {torch.float64: EXACT, torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}
GRADIENT = {torch.float64: EXACT, torch.float32: 1e-4, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """RMS of the difference relative to the RMS of `wanted` (0 / 0 is 0). Infinities must be in the same places."""
    assert got.shape == wanted.shape, f"shape {tuple(got.shape)}, expected {tuple(wanted.shape)}"
    got, wanted = got.double(), wanted.double()
    infinite = wanted.isinf()
    assert torch.equal(got[infinite], wanted[infinite]), "infinities differ"
    got, wanted = got[~infinite], wanted[~infinite]
    difference = (got - wanted).norm()
    return 0.0 if difference == 0 else float(difference / wanted.norm().clamp_min(1e-30))


def random_step_ids(
    batch: int, time: int, *, prompt: int = 5, longest: int = 7, padding: int = 0, skip: bool = False, generator=None
) -> Tensor:
    """int32 [B, T]: about `prompt` prompt tokens, then steps of 1 to `longest` tokens, with up to `padding` tokens of
    padding at either end. skip: ids leave out values now and then.
    """

    def draw(high: int) -> int:
        return int(torch.randint(0, high + 1, (), generator=generator))

    rows = torch.full((batch, time), -1, dtype=torch.int32)
    for row in rows:
        left, right = draw(padding), draw(padding)
        ids = [0] * draw(2 * prompt)
        step = 0
        while len(ids) < time:
            step += 1 + (draw(3) == 0) * skip
            ids += [step] * (1 + draw(longest - 1))
        end = max(left, time - right)
        row[left:end] = torch.tensor(ids[: end - left], dtype=torch.int32)
    return rows


@dataclass
class Heads:
    """Numbers of heads, and widths, of a case."""

    q: int
    k: int
    v: int
    key_width: int
    value_width: int

    def qkv(self, batch: int, time: int, dtype=torch.float64, keys: int | None = None, requires_grad: bool = False):
        """Random q [B, T, Hq, Dk], k [B, keys, Hk, Dk], v [B, keys, Hv, Dv]."""
        keys = time if keys is None else keys
        shapes = (time, self.q, self.key_width), (keys, self.k, self.key_width), (keys, self.v, self.value_width)
        tensors = [torch.randn(batch, *shape, dtype=torch.float64).to(dtype) for shape in shapes]
        return [x.requires_grad_(requires_grad) for x in tensors]
