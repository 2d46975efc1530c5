"""The few layers that the backbone, the pyramid and the decoders are made of.

Stages 1-2 hold a mask unit (one 16x16 patch) as 4x4, then 2x2 cells: ``[B, N, h, w, C]``; stage 3 holds it as
one token: ``[B, N, C]``. Layers that act per cell take either.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from itpn.nn.linear import Linear, linear
from itpn.nn.positions import Grid, Relative, resample_axis, resample_relative
from itpn.nn.windows import Windows


def units_of(images: Tensor, patch_size: int) -> Tensor:
    """Cut ``[B, c, H, W]`` into units ``[B, N, P, P, c]``, N in row-major order of the grid."""
    B, c, H, W = images.shape
    P = patch_size
    return images.view(B, c, H // P, P, W // P, P).permute(0, 2, 4, 3, 5, 1).reshape(B, -1, P, P, c)


def to_map(cells: Tensor, grid: tuple[int, int]) -> Tensor:
    """Lay units ``[B, N, h, w, C]`` or ``[B, N, C]`` out as a map ``[B, C, rows * h, cols * w]``."""
    if cells.ndim == 3:
        cells = cells[:, :, None, None]
    B, _, h, w, C = cells.shape
    rows, cols = grid
    return cells.view(B, rows, cols, h, w, C).permute(0, 5, 1, 3, 2, 4).reshape(B, C, rows * h, cols * w)


def cells_of(images: Tensor, patch_size: int, ids: Tensor | None = None) -> Tensor:
    """Cut the units ``ids [B, K]`` of ``[B, c, H, W]``, or all, into ``[B, K, 4, 4, (P / 4)^2 * c]``.

    The pixels of other units are not touched. ``gather`` and not indexing: the backward of ``x[ids]`` is not
    deterministic on a multi-threaded CPU.
    """
    B, c, H, W = images.shape
    P, Q = patch_size, patch_size // 4
    if ids is None:
        cells = images.view(B, c, H // P, 4, Q, W // P, 4, Q).permute(0, 2, 5, 3, 6, 4, 7, 1)
        return cells.reshape(B, -1, 4, 4, Q * Q * c)
    pixel = torch.arange(c * H * W, device=images.device).view(c, H, W)
    corner = F.embedding(ids, pixel[0, ::P, ::P].reshape(-1, 1))
    offset = pixel[:, :P, :P].reshape(c, 4, Q, 4, Q).permute(1, 3, 2, 4, 0).flatten()
    return images.flatten(1).gather(1, (corner + offset).flatten(1)).view(*ids.shape, 4, 4, Q * Q * c)


def drop_path_rates(last: float, num_branches: Sequence[int]) -> Tensor:
    """Rates ``[D]`` of all residual branches, growing linearly over the blocks from 0 to ``last``.

    Args:
        num_branches: residual branches of each block.
    """
    rates = torch.linspace(0, last, len(num_branches))
    return torch.cat([rate.expand(count) for rate, count in zip(rates, num_branches, strict=True)])


def drop_path_factors(uniform: Tensor, rates: Tensor) -> Tensor:
    """Factors ``[B, D]`` of residual branches: 0 where a uniform number lies below its branch's rate, else
    1 / (1 - rate).

    They are made once, before the blocks: a rate inside a block would be a constant of its compiled graph.
    """
    return (uniform >= rates).to(rates.dtype) / (1.0 - rates)


def add_branch(x: Tensor, branch: Tensor, factor: Tensor | None = None) -> Tensor:
    """Add a residual branch to ``x``, scaled for each sample by ``factor [B]`` (drop path)."""
    if factor is not None:
        branch = branch * factor.to(branch.dtype).view(-1, *[1] * (branch.ndim - 1))
    if x.device.type == "cpu" and x.dtype == torch.float32 != branch.dtype:
        return branch.float().add_(x)  # a CPU adds two dtypes slowly
    return x + branch


class Mlp(nn.Module):
    """Linear, GELU, linear; with ``norm_eps`` a LayerNorm on the hidden channels before the second one."""

    def __init__(self, width: int, ratio: float, norm_eps: float | None = None) -> None:
        super().__init__()
        hidden = int(width * ratio)
        self.fc1 = Linear(width, hidden)
        self.norm = nn.Identity() if norm_eps is None else nn.LayerNorm(hidden, norm_eps)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc2(self.norm(self.fc1(x, F.gelu)))
        return x


class SwiGlu(nn.Module):
    """Gated MLP of Fast-iTPN: ``fc2(norm(silu(gate(x)) * fc1(x)))``."""

    def __init__(self, width: int, ratio: float, norm_eps: float) -> None:
        super().__init__()
        hidden = int(width * ratio)
        self.gate = Linear(width, hidden)
        self.fc1 = Linear(width, hidden)
        self.norm = nn.LayerNorm(hidden, norm_eps)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc2(self.norm(self.gate(x, F.silu) * self.fc1(x)))
        return x


SHORT = 256
"""Tokens up to which attention on a CPU in bf16 holds all its scores at once."""


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax attention of ``[B, heads, L, D]``, with a bias that broadcasts to ``[B, heads, L, L]``.

    The backward pass of the fused kernel takes three times as long as its parts for a short sequence in bf16
    on a CPU, less in fp32. On a GPU a compiled block adds a bias that all samples share inside the kernel.
    """
    if bias is not None and bias.ndim == 3 and _compiles_for_gpu(q):
        return attend_biased(q, k, v, bias)
    if not _holds_scores(k):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    B, heads, L, D = q.shape
    q, k, v = (x.reshape(-1, L, D) for x in (q, k, v))  # products gather strided batches slowly
    scale, keys = D**-0.5, k.transpose(1, 2)
    if bias is None:
        scores = torch.bmm(q * scale, keys)
    else:
        scores = bias.expand(B, heads, L, L).clone(memory_format=torch.contiguous_format).view(-1, L, L)
        scores.baddbmm_(q, keys, alpha=scale)
    return torch.bmm(scores.softmax(-1), v).view(B, heads, L, D)


def attend_biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The same with a bias ``[heads, L, L]`` as FlexAttention, which holds neither scores nor their gradient:
    that of the bias is summed over the samples in the kernel of the backward pass."""
    from torch.nn.attention.flex_attention import flex_attention  # which takes a second to import

    def biased(score: Tensor, _sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + bias[head, query, key]

    out = flex_attention(q, k, v, score_mod=biased)
    assert isinstance(out, Tensor)
    return out


def _holds_scores(keys: Tensor) -> bool:
    return keys.device.type == "cpu" and keys.dtype == torch.bfloat16 and keys.shape[-2] <= SHORT


def _compiles_for_gpu(x: Tensor) -> bool:
    """FlexAttention is a kernel only where it is compiled, and adds up gradients in any order."""
    wanted = torch.compiler.is_compiling() and not torch.are_deterministic_algorithms_enabled()
    return wanted and x.device.type == "cuda"


class Attention(nn.Module):
    """Multi-head self-attention over any set of tokens, with an optional relative-position bias per head.

    Args:
        window: grid ``(rows, cols)`` that the bias is learned for, or None for no bias.
        decomposed: learn the bias as ViTDet does, one vector per row and per column offset, which all heads
            share and whose products with the unscaled query are added; else one number per head and offset.
        key_bias: give queries, keys and values a bias; without it only queries and values (Fast-iTPN).
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        window: Grid | None = None,
        decomposed: bool = False,
        key_bias: bool = True,
    ) -> None:
        super().__init__()
        self.num_heads, self.window, self.decomposed = num_heads, window, decomposed
        self.qkv = Linear(width, 3 * width, bias=key_bias)
        self.q_bias = None if key_bias else nn.Parameter(torch.zeros(width))
        self.v_bias = None if key_bias else nn.Parameter(torch.zeros(width))
        self.proj = Linear(width, width)
        if window is not None and decomposed:
            self.relative_position_rows = nn.Parameter(torch.zeros(2 * window[0] - 1, width // num_heads))
            self.relative_position_cols = nn.Parameter(torch.zeros(2 * window[1] - 1, width // num_heads))
        elif window is not None:
            self.relative_position = nn.Parameter(
                torch.zeros((2 * window[0] - 1) * (2 * window[1] - 1), num_heads)
            )

    def forward(self, x: Tensor, relative: Relative | None = None, windows: Windows | None = None) -> Tensor:
        """``relative``: the pairs of positions among the tokens, or among those of each window."""
        if windows is not None:
            x = windows.cut(x)
        B, L, C = x.shape
        bias: Tensor | None = self.qkv.bias
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = linear(x, self.qkv.weight, bias)
        qkv = qkv.view(B, L, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.contiguous() if _holds_scores(qkv) else qkv
        added = self.bias(relative, q)
        if windows is not None and windows.filled is not None:
            filled = windows.filled.to(q.dtype).repeat(B // len(windows.filled), 1, 1, 1)
            added = filled if added is None else added + filled
        x = attend(q, k, v, added)
        x = self.proj(x.transpose(1, 2).reshape(B, L, C))
        return x if windows is None else windows.join(x)

    def bias(self, relative: Relative | None, q: Tensor) -> Tensor | None:
        """The bias ``[heads, L, L]`` or ``[B, heads, L, L]`` for the given pairs of positions."""
        if self.window is None or relative is None:
            return None
        if not self.decomposed:
            table = resample_relative(self.relative_position, self.window, relative.grid, relative.method)
            return F.embedding(relative.pairs, table.to(q.dtype)).movedim(-1, -3).contiguous()
        num_cols = 2 * relative.grid[1] - 1
        pairs = relative.pairs if relative.pairs.ndim == 3 else relative.pairs[None]
        return self._along(q, self.relative_position_rows, relative.grid[0], pairs // num_cols) + self._along(
            q, self.relative_position_cols, relative.grid[1], pairs % num_cols
        )

    def _along(self, q: Tensor, table: Tensor, size: int, offsets: Tensor) -> Tensor:
        """Products ``[B, heads, L, L]`` of each query with the vectors of its keys' offsets on one axis."""
        products = q @ resample_axis(table, size).to(q.dtype).T
        return products.gather(-1, offsets[:, None].expand(*products.shape[:3], offsets.shape[-1]))


class LayerScale(nn.Module):
    def __init__(self, width: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def layer_scale(width: int, init: float | None) -> nn.Module:
    return nn.Identity() if init is None else LayerScale(width, init)


class LocalBlock(nn.Module):
    """Pre-norm residual MLP on every cell by itself: no unit sees another one."""

    num_drops = 1

    def __init__(
        self,
        width: int,
        mlp_ratio: float,
        norm_eps: float,
        scale: float | None = None,
        inner_norm: bool = False,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, norm_eps)
        self.mlp = Mlp(width, mlp_ratio, norm_eps if inner_norm else None)
        self.scale = layer_scale(width, scale)

    def forward(self, x: Tensor, drop: Tensor | None = None) -> Tensor:
        """``drop [B, 1]``: the samples' factors of the branch under drop path."""
        return add_branch(x, self.scale(self.mlp(self.norm(x))), None if drop is None else drop[:, 0])


class GlobalBlock(nn.Module):
    """Pre-norm attention over all given tokens, or within windows of them, then a pre-norm MLP.

    Args:
        window, decomposed: see `Attention`.
        fast: Fast-iTPN's choice: no bias for the keys, a gated MLP.
    """

    num_drops = 2

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        norm_eps: float,
        window: Grid | None = None,
        scale: float | None = None,
        decomposed: bool = False,
        fast: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, norm_eps)
        self.attn = Attention(width, num_heads, window, decomposed, key_bias=not fast)
        self.scale1 = layer_scale(width, scale)
        self.norm2 = nn.LayerNorm(width, norm_eps)
        self.mlp = SwiGlu(width, mlp_ratio, norm_eps) if fast else Mlp(width, mlp_ratio)
        self.scale2 = layer_scale(width, scale)

    def forward(
        self,
        x: Tensor,
        relative: Relative | None = None,
        drop: Tensor | None = None,
        windows: Windows | None = None,
    ) -> Tensor:
        """``drop [B, 2]``: the samples' factors under drop path, that of the attention branch first."""
        first, second = (None, None) if drop is None else drop.unbind(1)
        x = add_branch(x, self.scale1(self.attn(self.norm1(x), relative, windows)), first)
        return add_branch(x, self.scale2(self.mlp(self.norm2(x))), second)


class Merge(nn.Module):
    """2x2 cells become one of twice the width: gather, LayerNorm, linear 4C -> 2C without bias.

    The four are gathered with the row changing fastest, (0,0), (1,0), (0,1), (1,1), as the released weights
    need. ``fast``: LayerNorm of each cell first, then gather and a linear layer with bias, which is
    Fast-iTPN's 2x2 convolution of stride 2.
    """

    def __init__(self, width: int, norm_eps: float, fast: bool = False) -> None:
        super().__init__()
        self.fast = fast
        self.norm = nn.LayerNorm(width if fast else 4 * width, norm_eps)
        self.reduce = Linear(4 * width, 2 * width, bias=fast)

    def forward(self, x: Tensor) -> Tensor:
        x = gather_2x2(self.norm(x)) if self.fast else self.norm(gather_2x2(x))
        x = self.reduce(x)
        return x


def gather_2x2(x: Tensor) -> Tensor:
    """``[B, N, h, w, C]`` to ``[B, N, h / 2, w / 2, 4C]``, the row changing fastest among the four."""
    B, N, h, w, C = x.shape
    x = x.view(B, N, h // 2, 2, w // 2, 2, C).permute(0, 1, 2, 4, 5, 3, 6)
    return x.reshape(B, N, h // 2, w // 2, 4 * C)


class Split(nn.Module):
    """One cell becomes 2x2: LayerNorm, linear C -> 4F, the four laid out row by row.

    With ``bias`` [F] it is Fast-iTPN's transposed 2x2 convolution of stride 2.
    """

    def __init__(self, width: int, out: int, norm_eps: float, bias: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, norm_eps)
        self.expand = Linear(width, 4 * out, bias=False)
        self.bias = nn.Parameter(torch.zeros(out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        B, N, h, w, _ = x.shape
        x = self.expand(self.norm(x)).view(B, N, h, w, 2, 2, -1)
        x = x.permute(0, 1, 2, 4, 3, 5, 6).reshape(B, N, 2 * h, 2 * w, -1)
        return x if self.bias is None else x + self.bias


def init_linears(module: nn.Module, scheme: str) -> None:
    """Initialise every Linear: ``"normal"`` is N(0, 0.02) as the authors' code, ``"xavier"`` is
    Xavier-uniform as MAE."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            if scheme == "xavier":
                nn.init.xavier_uniform_(layer.weight)
            else:
                nn.init.normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
