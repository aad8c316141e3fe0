"""Training runs the models that inference runs: their gradients against plain torch models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kelix_rt import ops
from kelix_rt.errors import InputError
from kelix_rt.models import dit_weights, language_weights, vision_weights
from kelix_rt.models.dit import KelixDiT
from kelix_rt.models.language_model import KelixLM
from kelix_rt.models.layers import add, add_and_norm, gated_add
from kelix_rt.models.vision_tokenizer import VisionTokenizer
from kelix_rt.testing import randn
from kelix_rt.weights import Source
from tests.models import plain_dit, plain_tokenizer
from tests.models import toy_llm as toy

FIRST = torch.cat((toy.text(1, 2, toy.VISION_START), toy.image((0, 1, 2), (7, 7, 7))))
SECOND = torch.cat((toy.text(5, 6, 45), toy.image((3, 4, 5)), toy.text(toy.VISION_END, 9, 1)))


def watch(tensors: dict[str, Tensor]) -> None:
    for tensor in tensors.values():
        tensor.requires_grad_()


def assert_same_gradients(
    module: nn.Module, plain: Mapping[str, Tensor], sources: Mapping[str, Source], tolerance: float
) -> None:
    """Every parameter's gradient equals the joined gradients of the tensors it was loaded from."""
    for name, parameter in module.named_parameters():
        source = sources[name]
        stored = [plain[n] for n in source.names]
        grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in stored]
        want = torch.cat([grad if source.rows is None else grad[source.rows] for grad in grads])
        assert parameter.grad is not None, f"{name} has no gradient"
        error = (parameter.grad.double().flatten() - want.double().flatten()).abs().max()
        assert error <= tolerance * max(1.0, float(want.abs().max())), f"{name}: {error:.2e}"


def plain_logits(plain: toy.PlainLM, ids: Tensor) -> Tensor:
    """[S - 1, N + 1, VT]: what each position but the last says about the next row."""
    hidden, rows = plain.hidden(ids), []
    for i, following in enumerate(ids[1:].tolist()):
        seen = following if following[0] >= toy.V else [following[0]] * toy.N
        rows += [plain.slot_logits(hidden[i], seen[:j]) for j in range(toy.N + 1)]
    return torch.stack(rows).view(len(ids) - 1, toy.N + 1, -1)


@pytest.mark.parametrize(
    "qwen",
    [
        {},
        {"q_proj_bias": True, "v_proj_bias": True, "k_norm": False},
        {"q_norm": False, "num_kv_heads": 4},
    ],
)
def test_language_model_on_packed_sequences(tmp_path: Path, qwen: dict[str, Any]) -> None:
    config = toy.config_json(qwen)
    state = toy.random_state(config)
    lm = KelixLM.from_pretrained(toy.write(tmp_path, config, state)).requires_grad_(True)
    plain = toy.PlainLM(config, state)
    watch(plain.state)
    ids, lengths = torch.cat((FIRST, SECOND)), [len(FIRST), len(SECOND)]
    got = lm.teacher_forced_logits(ids, lengths)
    got = torch.cat([part[:-1] for part in got.split(lengths)])
    want = torch.cat([plain_logits(plain, part) for part in (FIRST, SECOND)])
    torch.testing.assert_close(got.double(), want, atol=2e-4, rtol=1e-4)
    with torch.inference_mode():  # the paged path
        paged = lm.teacher_forced_logits(ids, lengths)
    paged = torch.cat([part[:-1] for part in paged.split(lengths)])
    torch.testing.assert_close(got, paged, atol=1e-4, rtol=1e-4)
    upstream = randn(*got.shape, seed=2, scale=0.1)
    (got * upstream).sum().backward()
    (want * upstream.double()).sum().backward()
    sources = language_weights.weight_map(lm.config)
    assert_same_gradients(lm, plain.state, sources, 2e-5)


def test_frozen_backbone_passes_gradients_to_the_embeddings(tmp_path: Path) -> None:
    config = toy.config_json()
    path = toy.write(tmp_path, config, toy.random_state(config))
    lm = KelixLM.from_pretrained(path)
    lm.embeddings.requires_grad_(True)
    lm.teacher_forced_logits(FIRST).square().sum().backward()
    assert lm.embeddings.grad is not None and lm.backbone.norm.grad is None
    assert lm.embeddings.grad.abs().sum() > 0


def test_trained_block_decoder_is_the_one_that_decodes(tmp_path: Path) -> None:
    """The packed weights follow the optimizer and a loaded state."""
    config = toy.config_json()
    lm = KelixLM.from_pretrained(toy.write(tmp_path, config, toy.random_state(config)))
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    lm.requires_grad_(True)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=0.05)
    lm.teacher_forced_logits(FIRST).square().mean().backward()
    optimizer.step()
    for state in (None, before):
        if state is not None:
            lm.load_state_dict(state)
        hidden = randn(4, toy.D, seed=5)
        greedy = torch.zeros(4, toy.N + 1, 4)
        numbers = torch.zeros(4, dtype=torch.int64)
        with torch.no_grad():
            ids, logprobs = lm.decode_blocks(hidden, greedy, numbers, numbers)
            logits = lm.full_logits(hidden, ids)
        admitted = logits[:, 0, : toy.V + toy.K]
        assert torch.equal(ids[:, 0], admitted.argmax(-1))
        best = admitted.log_softmax(-1).amax(-1)
        torch.testing.assert_close(logprobs[:, 0], best, atol=1e-4, rtol=0)


@pytest.mark.parametrize("lengths", [[5, 3], [0, 10], []])
def test_lengths_that_do_not_fit_are_refused(tmp_path: Path, lengths: list[int]) -> None:
    config = toy.config_json()
    lm = KelixLM.from_pretrained(toy.write(tmp_path, config, toy.random_state(config)))
    with pytest.raises(InputError, match="lengths must be positive with sum 5"):
        lm.teacher_forced_logits(FIRST, lengths)


@pytest.mark.parametrize(
    "changes",
    [{}, {"attn_type": "flash"}, {"ffn_type": "mlp", "cross_attn_x_norm": True}],
    ids=["linear", "softmax", "mlp"],
)
def test_dit(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = plain_dit.options(**changes)
    tensors = plain_dit.random_tensors(config)
    dit = KelixDiT.from_pretrained(plain_dit.write(tmp_path, config, tensors)).requires_grad_(True)
    plain = plain_dit.PlainDiT(config, {name: t.clone() for name, t in tensors.items()})
    watch(plain.tensors)
    latent, condition = randn(2, 4, 4, 6, seed=1), randn(2, 7, 28, seed=2)
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    times = torch.tensor([300.0, 900.0])
    got = dit.velocity(latent, times, condition, mask)
    want = torch.cat(
        [
            plain.velocity(latent[i, None], times[i, None], plain.connect(condition[i, None, :n]))
            for i, n in enumerate((7, 4))
        ]
    )
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    upstream = randn(*got.shape, seed=3)
    (got * upstream).sum().backward()
    (want * upstream).sum().backward()
    plain.tensors["y_embedder.y_embedding"].grad = None
    dit.y_embedding.grad = torch.zeros_like(dit.y_embedding)
    assert_same_gradients(dit, plain.tensors, dit_weights.weight_map(dit.config), 2e-4)


def test_dit_unconditional_embedding_can_be_trained(tmp_path: Path) -> None:
    config = plain_dit.options()
    tensors = plain_dit.random_tensors(config)
    dit = KelixDiT.from_pretrained(plain_dit.write(tmp_path, config, tensors)).requires_grad_(True)
    modulation = dit.prepare_modulation(torch.tensor([500.0]))
    out = dit.forward_cached(randn(1, 4, 4, 4), modulation, dit.unconditional(1))
    out.square().sum().backward()
    assert dit.y_embedding.grad is not None and dit.y_embedding.grad.abs().min() > 0


def test_training_after_inference_in_one_process(tmp_path: Path) -> None:
    """Tables that inference cached must not be inference tensors."""
    config = plain_dit.options(use_cross_attn_rope=True, use_pe=True, hidden_size=48, num_heads=3)
    tensors = plain_dit.random_tensors(config)
    dit = KelixDiT.from_pretrained(plain_dit.write(tmp_path, config, tensors)).requires_grad_(True)
    inputs = (randn(1, 4, 4, 6), torch.tensor([10.0]), randn(1, 5, 28))
    with torch.inference_mode():
        seen = dit.velocity(*inputs)
    trained = dit.velocity(*inputs)
    trained.square().sum().backward()
    torch.testing.assert_close(seen, trained)


@pytest.mark.parametrize("options", [{}, {"pre_llm_align": True}], ids=["plain", "aligner"])
def test_vision_tokenizer(tmp_path: Path, options: dict[str, Any]) -> None:
    config = plain_tokenizer.make_config(**options)
    state = plain_tokenizer.make_state(config)
    path = plain_tokenizer.save_checkpoint(tmp_path, config, state)
    model = VisionTokenizer.from_pretrained(path).requires_grad_(True)
    plain = plain_tokenizer.PlainTokenizer(config, state)
    watch(plain.state)
    grids = [[1, 4, 2], [1, 2, 2]]
    pixels = randn(12, 3, 14, 14, seed=1)
    layout = model.layout(pixels, torch.tensor(grids))
    hidden = model.encode_patches(model.embed_patches(pixels, layout), layout)
    merged = model.merge(hidden, layout)
    upstream = randn(*merged.shape, seed=3, scale=1e-4)  # rows of about 2e-3 have huge gradients
    (merged * upstream).sum().backward()
    want = plain.merged(plain.hidden(pixels, grids), grids)
    (want * upstream.double()).sum().backward()
    behind = ("encoder.", "z_weight", "z_bias", "up_projectors", "aligner.")
    for name, parameter in model.named_parameters():
        if name.startswith(behind):
            parameter.grad = torch.zeros_like(parameter)
    assert_same_gradients(model, plain.state, vision_weights.weight_map(model.config, True), 1e-4)


def test_mixed_precision(tmp_path: Path) -> None:
    """Under autocast the models run, and their gradients stay near those of float32."""
    config = toy.config_json()
    lm = KelixLM.from_pretrained(toy.write(tmp_path / "lm", config, toy.random_state(config)))
    settings = plain_dit.options()
    tensors = plain_dit.random_tensors(settings)
    dit = KelixDiT.from_pretrained(plain_dit.write(tmp_path / "dit", settings, tensors))
    inputs = (randn(2, 4, 4, 6), torch.tensor([300.0, 900.0]), randn(2, 5, 28))
    calls = (
        (lm.requires_grad_(True), lambda: lm.teacher_forced_logits(FIRST)),
        (dit.requires_grad_(True), lambda: dit.velocity(*inputs)),
    )
    for model, call in calls:
        parameters = [p for name, p in model.named_parameters() if name != "y_embedding"]
        upstream = randn(*call().shape, seed=3)
        exact = torch.autograd.grad((call() * upstream).sum(), parameters)
        with torch.autocast("cpu", torch.bfloat16):
            loss = (call().float() * upstream).sum()
        got = torch.autograd.grad(loss, parameters)
        joined, wanted = (torch.cat([g.flatten() for g in grads]) for grads in (got, exact))
        assert all(g.dtype == torch.float32 for g in got)
        assert 0 < (joined - wanted).norm() < 0.05 * wanted.norm()


def test_residual_helpers_write_in_place_only_without_gradients() -> None:
    x, y, weight, gate = randn(2, 3, 8), randn(2, 3, 8, seed=1), torch.ones(8), randn(2, 8, seed=2)
    calls = (
        add,
        lambda a, b: add_and_norm(a, b, weight, 1e-6)[0],
        lambda a, b: gated_add(a, gate, b),
    )
    for call in calls:
        own, other = x.clone(), y.clone()
        inference = call(own, other)
        assert inference is own and not torch.equal(own, x)
        recorded = call(x.clone().requires_grad_(), other)
        assert recorded.requires_grad
        torch.testing.assert_close(recorded.detach(), inference)
    residual, normed = add_and_norm(x.clone().requires_grad_(), y, weight, 1e-6)
    assert torch.equal(normed, ops.rms_norm(residual, weight, 1e-6))
