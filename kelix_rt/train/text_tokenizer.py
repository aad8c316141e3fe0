"""The text tokenizer of kelix-tiny: byte-level BPE on the world's texts, the release's special ids.

The release puts its 293 special tokens at the end of the text vocabulary, so an id here has the
same distance to the vocabulary's size as there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel

from kelix_rt.errors import ConfigError
from kelix_rt.train.recipe import SPECIAL_TOKENS, Sizes
from kelix_rt.train.states import write_whole
from kelix_rt.train.world import corpus

CORPUS_SAMPLES = 4000
# How Qwen cuts text into words; digits stand alone.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NAMES = {  # distance to the first special id
    0: "<|endoftext|>",
    1: "<|im_start|>",
    2: "<|im_end|>",
    9: "<|vision_start|>",
    10: "<|vision_end|>",
    12: "<|image_pad|>",
    38: "<|q_eos|>",
    39: "<|pos_start|>",
    40: "<|pos_end|>",
}
CHAT_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# What the template writes itself, so that the roles become single ids.
TEMPLATE_TEXTS = ("system\nYou are a helpful assistant.", "user\n", "assistant\n")


def special_tokens() -> list[str]:
    """All special tokens in the order of their ids."""
    return [NAMES.get(i, f"<|reserved_{i}|>") for i in range(SPECIAL_TOKENS)]


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE over `texts` with exactly `vocab_size` ids, special tokens last.

    Ids that the texts have no use for are named ``<|unused_i|>``. The same texts give the same
    tokenizer. Raises ConfigError when the bytes and the special tokens do not fit.
    """
    ordinary = vocab_size - SPECIAL_TOKENS
    alphabet = sorted(ByteLevel.alphabet())
    if ordinary < len(alphabet):
        raise ConfigError(
            f"text tokenizer: vocab_size must be at least {SPECIAL_TOKENS + len(alphabet)} "
            f"(special tokens and bytes), got {vocab_size}"
        )
    learner = _tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=ordinary, initial_alphabet=alphabet, show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    learned = json.loads(learner.to_str())["model"]
    vocab = {token: i for i, token in enumerate(sorted(learned["vocab"], key=learned["vocab"].get))}
    vocab |= {f"<|unused_{i}|>": i for i in range(len(vocab), ordinary)}
    merges = [(left, right) for left, right in learned["merges"]]
    tokenizer = _tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in special_tokens()]
    )
    return tokenizer


def _tokenizer(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def preprocessor(sizes: Sizes) -> dict[str, object]:
    """preprocessor_config.json: pictures keep their size up to `sizes.side` squared pixels."""
    return {
        "image_processor_type": "SiglipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "patch_size": sizes.patch,
        "merge_size": 2,
        "temporal_patch_size": 1,
        "min_pixels": min(sizes.side, *sizes.other_sides) ** 2,
        "max_pixels": sizes.side**2,
        "position_markers": sizes.marker,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def write_text_tokenizer(
    directory: Path, sizes: Sizes, seed: int = 0, samples: int = CORPUS_SAMPLES
) -> None:
    """Trains on the world's texts and writes the tokenizer, chat template and preprocessor files.

    Files: tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja,
    preprocessor_config.json. samples: scenes whose texts are read. Raises ConfigError as `train`
    does, TrainingError when a file cannot be written.
    """
    texts = [*TEMPLATE_TEXTS * samples, *corpus(samples, seed)]
    tokenizer = train(texts, sizes.vocab)
    names = {"eos_token": NAMES[2], "pad_token": NAMES[0]}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": sizes.max_positions,
        **names,
    }
    directory.mkdir(parents=True, exist_ok=True)
    files = {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(names, indent=2) + "\n",
        "preprocessor_config.json": json.dumps(preprocessor(sizes), indent=2) + "\n",
        "chat_template.jinja": CHAT_TEMPLATE,
    }
    for name, content in files.items():
        write_whole(directory / name, content.encode())
