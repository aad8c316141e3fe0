"""Random checkpoints in the released layout, for measuring without a download."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.models import plain_dit, plain_tokenizer

# The released layout at a width where one image of 224 x 224 takes some 10 ms.
TOKENIZER: dict[str, Any] = plain_tokenizer.make_config(
    {
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
    },
    codebook_size=16384,
    embedding_dim=64,
    llm_hidden_size=512,
    n_q_tokens=8,
    split_voc=8,
)
del TOKENIZER["__class__"]  # nested configs carry none

# Between the golden models and the release: big enough that its time is spent in its weights, small
# enough for two CPU cores.
MID_SIZE: dict[str, Any] = {
    "model_class": "KeyeARModel",
    "__class__": "KeyeARConfig",
    "qwen_config": {
        "model_class": "UnifiedQwen3Model",
        "vocab_size": 32768,
        "embed_dim": 512,
        "num_layers": 8,
        "tie_word_embeddings": False,
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_dim": 64,
        "intermediate_dim": 1536,
        "max_seq_len": 4096,
        "rope_base": 1e6,
        "eos_token_id": 32477,
        "image_token_id": 32487,
        "pad_token_id": 32475,
        "q_eos_token": 32513,
        "vision_start_token_id": 32484,
        "vision_end_token_id": 32485,
        "codebook_size": 16384,
        "n_q_tokens": 8,
    },
    "tokenizer_config": TOKENIZER,
    "token_decoder_config": {
        "d_model": 256,
        "nhead": 4,
        "num_layers": 1,
        "dim_feedforward": 1024,
        "max_pos_length": 16,
        "max_length": 10,
        "eos_token": 32513,
        "input_dim": 512,
    },
}

# The image DiT that belongs to it: 512 x 512 pixels, conditions as wide as the language model.
MID_SIZE_DIT: dict[str, Any] = plain_dit.options(
    input_size=16,
    in_channels=32,
    hidden_size=512,
    depth=6,
    num_heads=8,
    mlp_ratio=2.5,
    caption_channels=512,
    linear_head_dim=32,
    connector_channels=512,
    model_max_length=720,
)

# 32 times smaller latents as the release has, but few channels: both sides decode with diffusers.
VAE: dict[str, Any] = {
    "latent_channels": 32,
    "attention_head_dim": 32,
    "encoder_block_types": "ResBlock",
    "decoder_block_types": "ResBlock",
    "encoder_block_out_channels": (8, 16, 32, 64, 64, 64),
    "decoder_block_out_channels": (8, 16, 32, 64, 64, 64),
    "encoder_layers_per_block": (0, 1, 1, 1, 1, 1),
    "decoder_layers_per_block": (0, 1, 1, 1, 1, 1),
    "encoder_qkv_multiscales": ((), (), (), (), (), ()),
    "decoder_qkv_multiscales": ((), (), (), (), (), ()),
    "upsample_block_type": "interpolate",
    "decoder_conv_act_fn": "relu",
    "scaling_factor": 0.41407,
}


def language_model_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Kelix-LLM checkpoint without its image tokenizer."""
    qwen, decoder = config["qwen_config"], config["token_decoder_config"]
    rows = qwen["vocab_size"] + qwen["codebook_size"]
    hidden, ffn, head_dim = qwen["embed_dim"], qwen["intermediate_dim"], qwen["head_dim"]
    q_width, kv_width = qwen["num_heads"] * head_dim, qwen["num_kv_heads"] * head_dim
    d, f = decoder["d_model"], decoder["dim_feedforward"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.model.tok_embeddings.embed_tokens.weight": (rows, hidden),
        "model.model.output.weight": (rows, hidden),
        "model.model.norm.scale": (hidden,),
        "model.model.token_head.position_embedding.weight": (decoder["max_pos_length"], d),
        "model.model.token_head.input_linear.weight": (d, hidden),
        "model.model.token_head.input_linear.bias": (d,),
        "model.model.token_head.output_linear.weight": (hidden, d),
        "model.model.token_head.output_linear.bias": (hidden,),
    }
    for layer in range(qwen["num_layers"]):
        shapes |= {
            f"model.model.layers.{layer}.{name}": shape
            for name, shape in {
                "sa_norm.scale": (hidden,),
                "mlp_norm.scale": (hidden,),
                "attn.q_proj.weight": (q_width, hidden),
                "attn.k_proj.weight": (kv_width, hidden),
                "attn.v_proj.weight": (kv_width, hidden),
                "attn.output_proj.weight": (hidden, q_width),
                "attn.q_norm.scale": (head_dim,),
                "attn.k_norm.scale": (head_dim,),
                "mlp.w1.weight": (ffn, hidden),
                "mlp.w3.weight": (ffn, hidden),
                "mlp.w2.weight": (hidden, ffn),
            }.items()
        }
    for layer in range(decoder["num_layers"]):
        prefix = f"model.model.token_head.transformer.layers.{layer}"
        shapes |= {
            f"{prefix}.{n}.{p}": (d,) for n in ("sa_norm", "mlp_norm") for p in ("weight", "bias")
        }
        for projection in ("q_proj", "k_proj", "v_proj", "output_proj"):
            shapes[f"{prefix}.attn.{projection}.weight"] = (d, d)
            shapes[f"{prefix}.attn.{projection}.bias"] = (d,)
        shapes |= {
            f"{prefix}.mlp.w1.weight": (f, d),
            f"{prefix}.mlp.w3.weight": (f, d),
            f"{prefix}.mlp.w2.weight": (d, f),
        }
    return shapes


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Seeded float32 weights that keep activations near unit size."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        if "norm" in name:
            fill = 0.0 if name.endswith("bias") else 1.0
            tensors[name] = torch.full(shape, fill)
        else:
            fan_in = shape[-1] if len(shape) > 1 else 1e4
            tensors[name] = torch.randn(shape, generator=generator) * fan_in**-0.5
    return tensors


def steer_to_codes(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Changes random weights so that slot j takes sub-codebook j, as training makes it.

    Channel j, of the Block Decoder and of the state, says that slot j is next: nothing but the
    slot's position embedding writes it, and the head's rows of sub-codebook j read it. Within a
    sub-codebook the choice stays as random as the weights are. Embeddings grow, or every block
    would be nearly the one before it.
    """
    qwen, slots = config["qwen_config"], config["qwen_config"]["n_q_tokens"]
    text, book = qwen["vocab_size"], qwen["codebook_size"] // slots
    positions = tensors["model.model.token_head.position_embedding.weight"]
    outward = tensors["model.model.token_head.output_linear.weight"]
    table = tensors["model.model.tok_embeddings.embed_tokens.weight"]
    head = tensors["model.model.output.weight"]
    writers = re.compile(r".*(attn\.output_proj|mlp\.w2|input_linear|output_linear)\.(weight|bias)")
    for name, tensor in tensors.items():
        if writers.fullmatch(name):
            tensor[:slots] = 0
    table *= 20
    for matrix in (table, head, positions):
        matrix[:, :slots] = 0
    for slot in range(slots):
        positions[slot, slot] = outward[slot, slot] = 8.0
        head[text + slot * book : text + (slot + 1) * book, slot] = 2.0


def prefer_text(head: Tensor) -> None:
    """Makes text win slot 0 of a steered model; head [VT, D] is changed in place."""
    with torch.no_grad():
        head[: MID_SIZE["qwen_config"]["vocab_size"], 0] = 4.0


def write_language_model(directory: Path) -> Path:
    """Writes the mid-size Kelix-LLM with its vision tokenizer, random but for `steer_to_codes`."""
    tensors = random_tensors(language_model_shapes(MID_SIZE))
    steer_to_codes(MID_SIZE, tensors)
    state = plain_tokenizer.make_state(TOKENIZER)
    tensors |= {f"visual_tokenizer.{name}": tensor for name, tensor in state.items()}
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(MID_SIZE, indent=2))
    return directory


def dit_tensors() -> dict[str, Tensor]:
    """Random tensors of the mid-size image DiT under the stored names."""
    return plain_dit.random_tensors(MID_SIZE_DIT, rows=MID_SIZE_DIT["model_max_length"])


def write_kelix(directory: Path) -> Path:
    """Writes a whole mid-size Kelix: language model, vision tokenizer, dit/ and vae/."""
    from diffusers import AutoencoderDC

    write_language_model(directory)
    plain_dit.write(directory / "dit", MID_SIZE_DIT, dit_tensors())
    torch.manual_seed(0)
    AutoencoderDC(**VAE).save_pretrained(str(directory / "vae"))
    return directory
