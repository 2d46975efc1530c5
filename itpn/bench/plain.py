"""The pre-training model written plainly: what `itpn bench pretrain --baseline` compares the library with.

Softmax attention as it stands in textbooks, a stem that works on all units before the hidden ones are
dropped, and torch's default AdamW. Masked feature modeling's part is the library's own.
"""

from functools import reduce

import torch
from torch import Tensor, nn

from itpn.engine.optim import AdamWConfig, parameter_groups
from itpn.errors import UserError
from itpn.nn.hivit import Features, HiViT
from itpn.nn.layers import Attention, GlobalBlock, LocalBlock
from itpn.objectives.pixel import PixelObjective


class Plain(nn.Module):
    """An objective's forward pass once more, with its weights."""

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        if not isinstance(objective, PixelObjective) or objective.frozen is not None:
            raise UserError("--baseline supports only pixels without a frozen teacher; leave it out")
        config = objective.model.config.backbone
        if config.drop_path or config.relative_position_bias:
            raise UserError("--baseline supports neither drop path nor relative positions; leave it out")
        self.objective = objective

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        objective = self.objective
        whole = (batch["images"].float() / 255 - objective.normalise.mean) / objective.normalise.std
        keep = batch["keep"].flatten(0, 1)
        images = whole.repeat_interleave(objective.config.masks_per_image, 0)

        model = objective.model
        features = backbone(model.backbone, images, keep)
        levels = model.pyramid(features) if model.pyramid else None
        embedded = objective.embed(levels) if levels else [objective.embed(features.c16)]
        visible = reduce(torch.add, embedded)

        B, N, E = len(images), objective.num_units, visible.shape[-1]
        tokens = (len(embedded) * objective.mask_token).to(visible.dtype).expand(B, N, E)
        x = tokens.scatter(1, keep[..., None].expand(-1, -1, E), visible)
        x = x + objective.decoder.position
        for block in objective.decoder.blocks:
            x = transformer_block(block, x)  # type: ignore[arg-type]
        decoded = objective.decoder.norm(x)

        target = units(images, model.backbone.config.patch_size)
        variance = target.var(-1, keepdim=True)
        target = (target - target.mean(-1, keepdim=True)) / (variance + 1e-6).sqrt()
        error = ((objective.head(decoded).float() - target) ** 2).mean(-1)
        hidden = torch.ones(B, N, dtype=torch.bool, device=keep.device).scatter(1, keep, False)
        pixel = ((error * hidden).sum(1) / hidden.sum(1)).mean()
        if objective.features is None:
            return {"loss": pixel}
        feature, _ = objective.features(whole, decoded, embedded, keep, hidden)
        return {"loss": pixel + objective.features.weight * feature}


def plain_adamw(model: nn.Module, config: AdamWConfig) -> torch.optim.AdamW:
    groups = parameter_groups(model, config)
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps)


def units(images: Tensor, patch_size: int) -> Tensor:
    """Images ``[B, c, H, W]`` to the pixels of their units, ``[B, N, P * P * c]``."""
    B, c, H, W = images.shape
    P = patch_size
    return images.view(B, c, H // P, P, W // P, P).permute(0, 2, 4, 3, 5, 1).reshape(B, -1, P * P * c)


def backbone(model: HiViT, images: Tensor, keep: Tensor) -> Features:
    P, c = model.config.patch_size, images.shape[1]
    B, N, _ = (pixels := units(images, P)).shape
    cells = pixels.view(B, N, 4, P // 4, 4, P // 4, c).transpose(3, 4).reshape(B, N, 4, 4, -1)
    cells = model.stem_norm(model.stem_proj(cells))
    c4 = cells.gather(1, keep[:, :, None, None, None].expand(-1, -1, *cells.shape[2:]))
    for block in model.stage1:
        c4 = mlp_block(block, c4)  # type: ignore[arg-type]
    c8 = model.merge1(c4)
    for block in model.stage2:
        c8 = mlp_block(block, c8)  # type: ignore[arg-type]
    c16 = model.embed(model.merge2(c8).flatten(2), model.grid_of(images), keep)
    for block in model.stage3:
        c16 = transformer_block(block, c16)  # type: ignore[arg-type]
    return Features(c4, c8, c16)


def mlp_block(block: LocalBlock, x: Tensor) -> Tensor:
    x = x + block.scale(block.mlp(block.norm(x)))
    return x


def transformer_block(block: GlobalBlock, x: Tensor) -> Tensor:
    x = x + block.scale1(attention(block.attn, block.norm1(x)))
    x = x + block.scale2(block.mlp(block.norm2(x)))
    return x


def attention(layer: Attention, x: Tensor) -> Tensor:
    B, L, C = x.shape
    q, k, v = layer.qkv(x).view(B, L, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
    weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1)
    x = layer.proj((weights @ v).transpose(1, 2).reshape(B, L, C))
    return x
