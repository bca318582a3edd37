"""BF16 matrix products at FP32 speed on CPUs that have no BF16 instructions.

PyTorch's matrix products of BF16 tensors are fast where the CPU multiplies BF16 natively (AVX512-BF16, AMX) or where
oneDNN emulates it (AVX-512). On every other CPU, most laptops among them, they fall back to loops that are 8 to 100
times slower than FP32. The product of two BF16 numbers is exact in FP32, so the same result comes from the FP32
routine: convert the operands, multiply and accumulate in FP32, round once to BF16. That is what BF16 hardware does,
too.

Installed by `use_fast_bfloat16()` for the whole process, for BF16 tensors on the CPU only.
"""

from __future__ import annotations

import warnings

import torch

_library: torch.library.Library | None = None


def is_needed() -> bool:
    """Whether PyTorch has no fast BF16 matrix product on this CPU."""
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def use_fast_bfloat16() -> None:
    """Replace BF16 mm, addmm, bmm, baddbmm, grouped_mm and attention's backward on the CPU, once."""
    global _library
    if _library is not None:
        return
    _library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Oo]verrid")
        _library.impl("mm", _mm, "CPU")
        _library.impl("addmm", _addmm, "CPU")
        _library.impl("bmm", _bmm, "CPU")
        _library.impl("baddbmm", _baddbmm, "CPU")
        _library.impl("_grouped_mm", _grouped_mm, "CPU")
        _library.impl("_scaled_dot_product_flash_attention_for_cpu_backward", _attention_backward, "CPU")


# The `out=` forms are operators of their own with their original kernels, so calling them does not come back here.


def _check_same(first, *others):
    """As PyTorch's own kernels do: dtypes that meet without autocast are a fault of the model."""
    for other in others:
        if other.dtype != first.dtype:
            raise RuntimeError(f"expected tensors of the same dtype, but got: {first.dtype} != {other.dtype}")


def _mm(a, b):
    _check_same(a, b)
    out = torch.mm(_up(a), _up(b), out=_fp32_or_same(a, (a.shape[0], b.shape[1])))
    return out.to(a.dtype)


def _addmm(bias, a, b, *, beta=1, alpha=1):
    _check_same(a, b, bias)
    out = _fp32_or_same(a, (a.shape[0], b.shape[1]))
    return torch.addmm(_up(bias), _up(a), _up(b), beta=beta, alpha=alpha, out=out).to(a.dtype)


def _bmm(a, b):
    _check_same(a, b)
    out = _fp32_or_same(a, (a.shape[0], a.shape[1], b.shape[2]))
    return torch.bmm(_up(a), _up(b), out=out).to(a.dtype)


def _baddbmm(bias, a, b, *, beta=1, alpha=1):
    _check_same(a, b, bias)
    out = _fp32_or_same(a, (a.shape[0], a.shape[1], b.shape[2]))
    return torch.baddbmm(_up(bias), _up(a), _up(b), beta=beta, alpha=alpha, out=out).to(a.dtype)


def _grouped_mm(a, b, offs=None, bias=None, out_dtype=None):
    """[S, K] x [E, K, N] -> [S, N], rows in groups; [M, S] x [S, N] -> [E, M, N], columns in groups."""
    assert offs is not None and bias is None and a.dim() == 2, "experts have 2-D inputs"
    _check_same(a, b)
    ends, start = offs.tolist(), 0
    if b.dim() == 3:
        out = a.new_zeros((a.shape[0], b.shape[2]), dtype=out_dtype)
    else:
        out = a.new_zeros((len(ends), a.shape[0], b.shape[1]), dtype=out_dtype)
    for i, end in enumerate(ends):
        if b.dim() == 3:
            out[start:end] = _mm(a[start:end], b[i])
        else:
            out[i] = _mm(a[:, start:end], b[start:end])
        start = end
    return out


def _attention_backward(
    grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, *, attn_mask=None, scale=None
):
    """FlashAttention's gradients (Dao et al., arXiv:2205.14135, appendix B.2), a batch element at a time, in FP32.

    All of [batch, heads, time, head_dim], but logsumexp, FP32 [batch, heads, time]; key and value may have fewer heads
    (grouped queries). The operator has no `out=` form to fall back on, so FP32 tensors take this path as well.
    """
    assert dropout_p == 0.0, "PyTorch's CPU kernel takes no dropout"
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    gradients = [torch.empty_like(t) for t in (query, key, value)]
    group = query.shape[1] // key.shape[1]
    for i in range(query.shape[0]):
        q, k, v, o, g = (_up(t[i]) for t in (query, key, value, out, grad_out))
        k, v = (t.repeat_interleave(group, 0) if group > 1 else t for t in (k, v))
        scores = q @ k.transpose(-1, -2) * scale
        if attn_mask is not None:
            mask = attn_mask.expand(query.shape[0], *attn_mask.shape[1:])[i] if attn_mask.dim() == 4 else attn_mask
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask
        if is_causal:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            scores.masked_fill_(future, -torch.inf)
        probability = scores.sub_(logsumexp[i].unsqueeze(-1)).exp_().nan_to_num_(0.0)
        gradients[2][i] = _sum_groups(probability.transpose(-1, -2) @ g, group)
        grad_scores = (g @ v.transpose(-1, -2) - (g * o).sum(-1, keepdim=True)).mul_(probability).mul_(scale)
        gradients[0][i] = grad_scores @ k
        gradients[1][i] = _sum_groups(grad_scores.transpose(-1, -2) @ q, group)
    return tuple(gradients)


def _sum_groups(heads: torch.Tensor, group: int) -> torch.Tensor:
    return heads.unflatten(0, (-1, group)).sum(1) if group > 1 else heads


def _up(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype is torch.bfloat16 else tensor


def _fp32_or_same(like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return like.new_empty(shape, dtype=torch.float32 if like.dtype is torch.bfloat16 else like.dtype)
