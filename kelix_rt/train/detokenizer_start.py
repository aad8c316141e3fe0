"""Where the image DiT's training starts: random weights that know which code lies where.

The report starts from a pretrained SANA. A DiT that starts from plain random weights first has to
find out that the condition is the picture in reading order; until then it learns the average of all
pictures. So it is told: queries are a projection of a token's place, keys of the place of a code,
which a linear map reads from the language model's states. Training may change everything.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kelix_rt.config import SanaConfig
from kelix_rt.models.dit import KelixDiT
from kelix_rt.models.dit_blocks import Block
from kelix_rt.models.dit_positions import grid_positions, sincos_table

SHARPNESS = 2.0  # weight of the norm of queries
QUIET = 0.3  # share of the latent's embedding that is left beside the table of places
BESIDE = 0.03  # its variance then


def new_dit(config: SanaConfig, device: torch.device | str, seed: int) -> KelixDiT:
    """A DiT with random weights.

    As SANA starts: Linear layers Xavier-uniform with zero biases, time and caption layers normal
    with standard deviation 0.02, the final layer zero. As Kelix-DiT starts: the connector's norm
    weight zero, so that the condition begins as nothing. The cross-attention's output layers are
    not zero, as SANA's would be: with a zero condition they would never get a gradient.
    """
    dit = KelixDiT(config).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in dit.named_parameters():
        if name == "modulation_table":
            nn.init.normal_(parameter, std=config.hidden_size**-0.5, generator=generator)
        elif name == "y_embedding":
            nn.init.xavier_uniform_(parameter, generator=generator)
        elif name == "connector_norm" or name.startswith("final.") or name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif name == "y_norm":
            nn.init.constant_(parameter, config.y_norm_scale_factor)
        elif parameter.dim() == 1:
            nn.init.ones_(parameter)  # norms of queries and keys
        elif name.startswith(("time_", "caption_")):
            nn.init.normal_(parameter, std=0.02, generator=generator)
        elif "depth_weight" in name:
            nn.init.uniform_(parameter, -1 / 3, 1 / 3, generator=generator)
        else:
            nn.init.xavier_uniform_(parameter, generator=generator)
    dit.requires_grad_(True)
    dit.y_embedding.requires_grad_(False)  # a buffer in the release: never optimised
    return dit.to(device)


@torch.no_grad()
def look_where_it_lies(dit: KelixDiT, condition: Tensor, places: Tensor, seed: int) -> None:
    """Starts every cross-attention with each image token on the code of its place.

    condition: [n, L, K] of training pictures. places: [L, 2] row and column of the image token that
    a row of the condition belongs to, -1 for rows that are no codes. Opens the connector's norm.
    Needs the DiT's position table (use_pe) and cross_norm.
    """
    config = dit.config
    side, width = config.input_size // config.patch_size, config.hidden_size
    dit.connector_norm.fill_(1.0)
    y = dit.normalise_caption(dit.project_caption(dit.connect(condition)))
    coded = places[:, 0] >= 0
    of_codes = _place_vectors(places[coded], side).repeat(len(y), 1)
    key_map, key_bias = _ridge(y[:, coded].flatten(0, 1), of_codes, 1e-3)
    table = sincos_table(
        side, side, width, side, config.pe_interpolation, torch.float32, dit.device
    )
    of_tokens = _place_vectors(grid_positions(side, side).to(dit.device), side)
    dit.x_embedder.weight.mul_(QUIET)
    query_map, query_bias = _ridge(table, of_tokens, BESIDE)
    generator = torch.Generator().manual_seed(seed)
    for block in dit.blocks:
        assert isinstance(block, Block)
        cross = block.cross
        head_dim = width // cross.num_heads
        turns = [
            torch.linalg.qr(torch.randn(head_dim, head_dim, generator=generator)).Q[:, : 2 * side]
            for _ in range(cross.num_heads)
        ]
        turn = torch.cat(turns).to(dit.device)
        cross.q.weight.copy_(turn @ query_map)
        cross.q.bias.copy_(turn @ query_bias)
        cross.kv.weight[:width] = turn @ key_map
        cross.kv.bias[:width] = turn @ key_bias
        if cross.q_norm is not None:
            cross.q_norm.fill_(SHARPNESS)


def _place_vectors(places: Tensor, side: int) -> Tensor:
    """(row, column) [n, 2] -> [n, 2 side]: two ones, one for each; the mean taken off."""
    return F.one_hot(places, side).flatten(1).float() - 1 / side


def _ridge(x: Tensor, wanted: Tensor, variance: float) -> tuple[Tensor, Tensor]:
    """Weights [E, C] and bias [E] of the linear map from x [n, C] to wanted [n, E].

    variance: of noise in every channel of x.
    """
    mean, offset = x.mean(0), wanted.mean(0)
    centred = x - mean
    noise = variance * len(x) * torch.eye(x.shape[1], device=x.device)
    weight = torch.linalg.solve(centred.t() @ centred + noise, centred.t() @ (wanted - offset)).t()
    return weight, offset - weight @ mean
