"""StochasticAdamW: AdamW for parameters in BF16 without FP32 masters.

BF16 has 8 significant bits, and a step of AdamW is smaller than half of the last one for most weights at QAT's learning
rates: rounded to nearest, it vanishes. Rounded stochastically, up with a probability equal to the fraction that is cut
off, it arrives on average (Gupta et al., arXiv:1502.02551). The same holds for the second moment, which would stay
where it is once it changes by less than half a step of BF16 (0.1 % at beta2 = 0.999). So parameter and moments are
rounded stochastically; the arithmetic is that of torch.optim.AdamW in FP32.

`update_plain` is the specification; `triton_adamw.py` computes the same bits on a GPU in one kernel. A random word of
32 bits (random_bits.py) serves an element in a step: its upper half rounds the parameter, its lower half the second
moment, and the upper half of its product with an odd number, as random as the word is, the first moment.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor, Shard

from . import triton_adamw
from .random_bits import SECOND_WORD, keys, random_words

_CHUNK = 2**16  # elements at a time on a CPU: what is computed for them stays in its caches
_CHUNK_OF_A_GPU = 2**26


class Scalars(NamedTuple):
    """What a step of AdamW multiplies with: FP32 numbers on the device."""

    beta1: float
    beta2: float
    rest1: float  # 1 - beta1
    rest2: float  # 1 - beta2
    root_correction2: float  # sqrt(1 - beta2^step)
    eps: float
    decay: float  # 1 - learning rate * weight decay
    step_size: float  # learning rate / (1 - beta1^step)

    @classmethod
    def of(cls, group: dict, step: int) -> Scalars:
        """Those of the settings of a group of parameters in step `step`, counted from 1."""
        (beta1, beta2), lr = group["betas"], float(group["lr"])
        root, size = math.sqrt(1 - beta2**step), lr / (1 - beta1**step)
        return cls(beta1, beta2, 1 - beta1, 1 - beta2, root, group["eps"], 1 - lr * group["weight_decay"], size)


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW whose BF16 parameters are rounded stochastically; FP32 parameters are updated as by torch.optim.AdamW.

    A parameter may be a DTensor that is sharded in its first dimension.

    Args:
        moment_dtype: of the moments of BF16 parameters, torch.bfloat16 (rounded stochastically) or torch.float32.
            Those of other parameters are FP32.
        seed: of the rounding.

    Raises:
        ValueError: a parameter is neither BF16 nor FP32, or is sharded otherwise.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        moment_dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
    ) -> None:
        self.moment_dtype, self.seed = moment_dtype, seed
        self._numbers: dict[torch.Tensor, int] = {}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def number_parameters(self) -> None:
        """Give each parameter the number that its random bits depend on: its place among all groups.

        The first step does it; it is to be called before where a step is going to see a part of the parameters.
        """
        parameters = [p for group in self.param_groups for p in group["params"]]
        if not all(p in self._numbers for p in parameters):
            self._numbers = {p: number for number, p in enumerate(parameters)}

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.number_parameters()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: torch.Tensor, group: dict) -> None:
        state = self._state_of(parameter)
        state["step"] += 1
        step = int(state["step"])
        scalars = Scalars.of(group, step)
        tensors = [_local(t) for t in (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])]
        update(tensors, scalars, keys(self.seed, step, self._numbers[parameter]), _first_element(parameter))

    def _state_of(self, parameter: torch.Tensor) -> dict:
        state = self.state[parameter]
        if not state:
            if parameter.dtype not in (torch.bfloat16, torch.float32):
                raise ValueError(f"a parameter is {parameter.dtype}; StochasticAdamW takes torch.bfloat16 or float32")
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=self._moment_dtype_of(parameter))
        return state

    def _moment_dtype_of(self, parameter: torch.Tensor) -> torch.dtype:
        return self.moment_dtype if parameter.dtype == torch.bfloat16 else torch.float32

    def load_state_dict(self, state_dict: dict) -> None:
        """That of torch, which would round moments in FP32 to the dtype of their parameter."""
        super().load_state_dict(state_dict)
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        for number, parameter in zip(saved, own, strict=True):
            for name in ("exp_avg", "exp_avg_sq"):
                if (moment := state_dict["state"].get(number, {}).get(name)) is not None:
                    dtype = self._moment_dtype_of(parameter)
                    self.state[parameter][name] = moment.to(parameter.device, dtype, copy=True)


def update(tensors: list[torch.Tensor], scalars: Scalars, keys: tuple[int, int], first: int = 0) -> None:
    """One step of AdamW, in place, by the kernel where there is one.

    Args:
        tensors: parameter, gradient, first and second moment, of one shape. A BF16 parameter is rounded stochastically,
            as are BF16 moments.
        keys: of the random bits, see random_bits.py.
        first: number of the first element in the whole parameter.
    """
    parameter = tensors[0]
    flat = [tensor.detach().contiguous().view(-1) for tensor in tensors]
    if parameter.dtype == torch.bfloat16 and triton_adamw.is_available(parameter.device):
        triton_adamw.update(flat, scalars, keys, first)
    else:
        update_plain(flat, scalars, keys, first)
    for tensor, values in zip(tensors, flat, strict=True):
        if tensor is not tensors[1] and values.data_ptr() != tensor.data_ptr():
            tensor.copy_(values.view(tensor.shape))


def update_plain(flat: list[torch.Tensor], scalars: Scalars, keys: tuple[int, int], first: int = 0) -> None:
    """`update` of contiguous tensors [n], in PyTorch's operations on some elements at a time."""
    chunk = _CHUNK if flat[0].device.type == "cpu" else _CHUNK_OF_A_GPU
    done, count = 0, flat[0].numel()
    buffers = torch.empty(5, min(chunk, count), dtype=torch.float32, device=flat[0].device)
    while done < count:
        size = min(chunk - (first + done) % chunk, count - done)  # no chunk contains a multiple of 2^32
        parts = [tensor[done : done + size] for tensor in flat]
        _update_part(*parts, scalars, keys, first + done, buffers[:, :size])
        done += size


def _update_part(parameter, grad, exp_avg, exp_avg_sq, s: Scalars, keys: tuple[int, int], first: int, buffers) -> None:
    value, g, m, v, other = buffers
    g.copy_(grad)
    m.copy_(exp_avg).mul_(s.beta1).add_(torch.mul(g, s.rest1, out=other))
    v.copy_(exp_avg_sq).mul_(s.beta2).add_(g.mul_(g).mul_(s.rest2))
    root = torch.sqrt(v, out=other).div_(s.root_correction2).add_(s.eps)
    value.copy_(parameter).mul_(s.decay).sub_(torch.div(m, root, out=g).mul_(s.step_size))
    if parameter.dtype == torch.float32:
        for target, result in ((parameter, value), (exp_avg, m), (exp_avg_sq, v)):
            target.copy_(result)
        return
    words, bits = g.view(torch.int32), other.view(torch.int32)
    random_words(keys, first, words, bits)
    _store(parameter, value, torch.bitwise_right_shift(words, 16, out=bits))
    if exp_avg.dtype == torch.bfloat16:
        bits.copy_(words)
        _store(exp_avg_sq, v, bits)
        _store(exp_avg, m, words.mul_(SECOND_WORD).bitwise_right_shift_(16))
    else:
        exp_avg.copy_(m)
        exp_avg_sq.copy_(v)


def _store(target: torch.Tensor, values: torch.Tensor, bits: torch.Tensor) -> None:
    """Write FP32 `values` to the BF16 `target`, rounded by the lowest 16 bits of each word in `bits`."""
    target.copy_(round_stochastically(values, bits))


def round_stochastically(values: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """FP32 values rounded to numbers of BF16, away from zero with a probability equal to the fraction cut off.

    Args:
        values: FP32. Numbers of BF16, infinities and NaN stay as they are.
        bits: int32, whose lowest 16 bits are random; overwritten.

    Returns:
        FP32 numbers that BF16 has, in the memory of `bits`.
    """
    bits.bitwise_and_(0xFFFF).add_(values.view(torch.int32)).bitwise_and_(-65536)
    rounded = bits.view(torch.float32)
    return torch.where(values == values, rounded, values, out=rounded)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _first_element(parameter: torch.Tensor) -> int:
    """The number that the first local element has in the whole parameter."""
    if not isinstance(parameter, DTensor):
        return 0
    mesh = parameter.device_mesh
    shards = [d for d, placement in enumerate(parameter.placements) if isinstance(placement, Shard)]
    if not shards:
        return 0
    if len(shards) > 1 or parameter.placements[shards[0]].dim != 0:
        raise ValueError(f"a parameter is sharded as {parameter.placements}; StochasticAdamW takes Shard(0)")
    rows = parameter.shape[0]
    first = first_row(rows, mesh.size(shards[0]), mesh.get_local_rank(shards[0]))
    return first * (parameter.numel() // max(rows, 1))


def first_row(rows: int, parts: int, part: int) -> int:
    """The first of `rows` in a part of Shard(0), which deals them out as torch.chunk does."""
    return min(-(-rows // parts) * part, rows)
