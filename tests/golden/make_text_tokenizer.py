"""Writes the text tokenizer of the golden language model llm/tiny_a.

    python tests/golden/make_text_tokenizer.py [directory]

The model came without one. Its ids follow the release: 347 ordinary tokens, then 293 special ones
at the release's offsets, and the ids 72, 77 and 98 are those its prompts use for "user",
"assistant" and the line break.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from kelix_rt.train.text_tokenizer import CHAT_TEMPLATE, NAMES, PATTERN

VOCAB_SIZE = 640
NUM_SPECIAL = 293
FIRST_SPECIAL = VOCAB_SIZE - NUM_SPECIAL
FIXED = {"user": 72, "assistant": 77, "Ċ": 98}  # Ċ is how byte-level BPE writes the line break
# Whole words, found without merges (ignore_merges); Ġ is a leading space.
WORDS = (
    "user assistant system You Ġare Ġa Ġhelpful Ġassistant Ġthe Ġof Ġand Ġto Ġin Ġis Ġan Ġon Ġit "
    "Ġred Ġgreen Ġblue Ġwhite Ġblack Ġcircle Ġsquare Ġimage Ġpicture Ġphoto Ġcup Ġcoffee Ġtable "
    "Ġwith Ġwhat Ġdraw Ġme Ġdescribe Ġthis Draw Describe What The A Hello Ġyou"
)
# Pairs of symbols joined inside the other words, the most frequent of English text first.
PAIRS = (
    "Ġ t,h e,i n,e r,a n,r e,o n,e s,e d,n d,o r,t i,e n,t h,Ġ a,Ġ s,Ġ w,Ġ c,Ġ b,Ġ p,Ġ f,Ġ m,Ġ d,"
    "Ġ h,Ġ l,i t,i s,a l,a r,o u,l e,s t,o w,l y,l l,in g,ti on,e l,r o,i c,a s,a t,u r,o m,c h,"
    "s h,i d,a d,e t,v e"
)
PREPROCESSOR = {
    "image_processor_type": "SiglipImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 1,
    "min_pixels": 3136,
    "max_pixels": 12544,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def special_tokens() -> list[str]:
    return [NAMES.get(i, f"<|reserved_{i}|>") for i in range(NUM_SPECIAL)]


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """347 ordinary tokens with their ids, and the merges between them."""
    merges = [(left, right) for left, right in (pair.split(" ") for pair in PAIRS.split(","))]
    symbols = sorted(ByteLevel.alphabet())
    names = list(dict.fromkeys([*symbols, *(a + b for a, b in merges), *WORDS.split()]))
    if len(names) != FIRST_SPECIAL:
        raise SystemExit(f"{len(names)} ordinary tokens, expected {FIRST_SPECIAL}")
    free = iter(sorted(set(range(FIRST_SPECIAL)) - set(FIXED.values())))
    return {name: FIXED[name] if name in FIXED else next(free) for name in names}, merges


def build() -> Tokenizer:
    vocab, merges = vocabulary()
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in special_tokens()]
    )
    return tokenizer


def write(directory: Path) -> None:
    build().save(str(directory / "tokenizer.json"))
    names = {"eos_token": NAMES[2], "pad_token": NAMES[0]}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        **names,
    }
    for name, value in (
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", names),
        ("preprocessor_config.json", PREPROCESSOR),
    ):
        (directory / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "llm" / "tiny_a")
