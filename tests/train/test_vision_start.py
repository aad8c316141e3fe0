"""The start of the vision transformer: whitened patches, heads that look at neighbours."""

from __future__ import annotations

import torch

from kelix_rt.models.vision_layers import VisionAttention
from kelix_rt.train.recipe import Sizes, tokenizer_config
from kelix_rt.train.vision_start import (
    LOCAL_LAYERS,
    NEIGHBOURS,
    WHITE_SIZE,
    new_vision_tokenizer,
    whiten_patches,
)

CONFIG = tokenizer_config(Sizes(vision_width=128, vision_heads=4))


def test_whitened_patches_have_equal_variance_in_every_direction() -> None:
    generator = torch.Generator().manual_seed(0)
    model = new_vision_tokenizer(CONFIG, "cpu", 0)
    # Brightness varies most by far, and nothing has zero mean.
    patches = torch.randn(3000, 3, 14, 14, generator=generator) + 0.5
    patches += 8 * torch.randn(3000, 1, 1, 1, generator=generator)
    whiten_patches(model, patches, 0)
    with torch.no_grad():
        embedded = patches.flatten(1) @ model.patch_embedding.weight.flatten(1).t()
        embedded += model.patch_embedding.bias
    covariance = embedded.t().cov() / WHITE_SIZE**2
    torch.testing.assert_close(covariance, torch.eye(128), atol=0.01, rtol=0)
    torch.testing.assert_close(embedded.mean(0), torch.zeros(128), atol=0.01, rtol=0)


def test_heads_of_the_first_layers_look_at_their_neighbour() -> None:
    model = new_vision_tokenizer(CONFIG, "cpu", 0)
    side, row, column = 16, 7, 9
    grid = torch.tensor([[1, side, side]])
    layout = model.layout(torch.zeros(side * side, 3, 14, 14), grid)
    nothing = torch.zeros(side * side, 128)  # so that the constants alone speak
    for index in range(LOCAL_LAYERS):
        attention = model.layers[index].attention
        assert isinstance(attention, VisionAttention)
        with torch.no_grad():
            queries, keys, _ = attention.rotated(nothing, layout)
        for head, (down, right) in enumerate(NEIGHBOURS):
            scores = keys[:, head] @ queries[row * side + column, head]
            assert int(scores.argmax()) == (row + down) * side + column + right
