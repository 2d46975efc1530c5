"""Distillation's second branch, which predicts the teacher's tokens from a block in the middle of stage 3."""

import torch
from torch import Tensor, nn

from itpn.nn.hivit import HiViTConfig
from itpn.nn.layers import GlobalBlock, drop_path_factors, init_linears
from itpn.nn.positions import Relative


class Auxiliary(nn.Module):
    """Two blocks, a LayerNorm and a linear layer on a block of stage 3; its bias tables are its own.

    Beside a backbone without relative positions the tables are there, as in the authors' files, and frozen:
    nothing adds them. The blocks' LayerNorms have epsilon 1e-5 whatever the backbone's, as the released
    weights need.
    """

    drop_rates: Tensor

    def __init__(self, config: HiViTConfig, target_width: int) -> None:
        super().__init__()
        width, depths, num_heads, layers = config.shape
        window = config.relative_grid or config.grid
        self.blocks = nn.ModuleList(
            [
                GlobalBlock(
                    width, num_heads, config.stage3_mlp_ratio, 1e-5, window, config.layer_scale,
                    fast=layers == "fast",
                )
                for _ in range(2)
            ]
        )  # fmt: skip
        # They drop out as the blocks of stage 3 beside which they stand, or as the last where there is none.
        beside = [min(sum(depths[:2]) + 3 * depths[2] // 4 + i, sum(depths) - 1) for i in range(2)]
        rates = torch.linspace(0, config.drop_path, sum(depths))[beside].repeat_interleave(2)
        self.register_buffer("drop_rates", rates, persistent=False)
        self.norm = nn.LayerNorm(width, config.norm_eps)
        self.head = nn.Linear(width, target_width)
        init_linears(self, "normal")
        for name, parameter in self.named_parameters():
            if name.endswith(".relative_position"):
                parameter.requires_grad_(config.relative_position_bias)

    def forward(self, tokens: Tensor, relative: Relative | None, drop: Tensor | None = None) -> Tensor:
        """Tokens of stage 3 ``[B, N, C]`` to the teacher's.

        Args:
            relative: the backbone's pairs of positions.
            drop: the samples' uniform numbers for drop path, ``[B, 4]``.
        """
        drops = [None, None] if drop is None else drop_path_factors(drop, self.drop_rates).chunk(2, dim=1)
        for block, factors in zip(self.blocks, drops, strict=True):
            tokens = block(tokens, relative, factors)
        tokens = self.head(self.norm(tokens))
        return tokens
