"""Parity of the language model with golden outputs of the released implementation.

A golden directory holds a checkpoint, `fixtures.safetensors` and, for some of the cases,
`fixtures.json`. In float32 every tensor is compared absolutely and generated ids must be equal. In
lower precisions tensors are compared by relative L2 error along the golden ids, and an id only
counts where the golden gap between the two best logits exceeds that error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from kelix_rt.models.backbone import PagedKV, StepContext
from kelix_rt.models.condition import build_condition, find_condition
from kelix_rt.models.language_model import KelixLM
from kelix_rt.ops.sampling import kept_scores
from kelix_rt.parity import report
from kelix_rt.parity.fixtures import read_notes
from kelix_rt.parity.report import Check
from kelix_rt.processing.chat import image_prompt

ABSOLUTE = 3e-5
BLOCK_OUT_ABSOLUTE = 1e-4
RELATIVE = 2e-2
_PAGE_SIZE = 16


@dataclass(frozen=True)
class GreedyRun:
    """ids: [T, N+1] prompt and generated blocks. hidden: [T-1, D] of all blocks but the last."""

    ids: Tensor
    hidden: Tensor


@torch.inference_mode()
def greedy(lm: KelixLM, prompt_ids: Tensor, image_ids: Tensor | None, max_blocks: int) -> GreedyRun:
    """Greedy generation for one prompt: at most max_blocks blocks, up to and including eos.

    As in the release, the first generated block does not end the generation.
    """
    prompt = lm.expand(prompt_ids, image_ids).to(lm.device)
    qwen = lm.config.qwen_config
    num_pages = -(-(prompt.shape[0] + max_blocks) // _PAGE_SIZE)
    kv = PagedKV.allocate(qwen, num_pages, _PAGE_SIZE, lm.device, lm.dtype)
    blocks, hidden = [prompt], []
    start = 0
    for step in range(max_blocks):
        latest = blocks[-1]
        ctx = StepContext.of_chunks(
            [range(num_pages)], [start], [latest.shape[0]], _PAGE_SIZE, lm.device
        )
        hidden.append(lm(latest, ctx, kv))
        start += latest.shape[0]
        blocks.append(greedy_blocks(lm, hidden[-1][-1:], step))
        if step > 0 and int(blocks[-1][0, 0]) == qwen.eos_token_id:
            break
    return GreedyRun(torch.cat(blocks), torch.cat(hidden))


def greedy_blocks(lm: KelixLM, hidden: Tensor, step: int = 0) -> Tensor:
    """The greedy block of every state: [B, D] -> [B, N+1]."""
    batch = hidden.shape[0]
    params = torch.zeros(batch, lm.config.num_codes + 1, 4, device=lm.device)
    steps = torch.full((batch,), step, dtype=torch.int64, device=lm.device)
    return lm.decode_blocks(hidden, params, torch.zeros_like(steps), steps)[0]


class _Golden:
    """Fixtures of one directory, the model under test, and how to compare for its dtype."""

    def __init__(self, path: Path, lm: KelixLM) -> None:
        self.lm = lm
        self.exact = lm.dtype == torch.float32
        self.tensors = load_file(path / "fixtures.safetensors", device=str(lm.device))
        self.meta = read_notes(path)

    def get(self, key: str) -> Tensor | None:
        return self.tensors.get(key)

    def close(self, key: str, got: Tensor, tolerance: float = ABSOLUTE) -> Iterator[Check]:
        """Compares with fixture `key`; no row when the fixture is absent."""
        want = self.get(key)
        if want is not None:
            yield self.compare(key, got, want, tolerance)

    def compare(self, name: str, got: Tensor, want: Tensor, tolerance: float = ABSOLUTE) -> Check:
        """Absolute in float32, relative below."""
        if self.exact:
            return report.max_abs(name, got, want, tolerance)
        return report.relative_rms(name, got, want, RELATIVE)

    def equal(self, key: str, got: Tensor, want: Tensor | None = None) -> Iterator[Check]:
        """Compares integers with fixture `key` (or `want`); no row when the fixture is absent."""
        want = self.get(key) if want is None else want
        if want is not None:
            yield report.equal(key, got, want)


def run(
    path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> list[Check]:
    """Checks one golden directory; fixtures that are absent give no row."""
    path = Path(path)
    golden = _Golden(path, KelixLM.from_pretrained(path, device, dtype))
    with torch.inference_mode():
        return [check for part in _PARTS for check in part(golden)]


def _prompts(golden: _Golden) -> Iterator[Check]:
    lm = golden.lm
    for name in ("text", "img"):
        ids = golden.get(f"{name}/ids2d")
        if ids is None:
            continue
        blocks = lm.expand(ids, golden.get(f"{name}/image_ids"))
        yield from golden.equal(f"{name}/expanded_ids", blocks)
        states = lm.hidden_states(blocks)
        yield from golden.close(f"{name}/embeds", states[0])
        for index, state in enumerate(states):
            yield from golden.close(f"{name}/hidden_{index}", state)
        yield from golden.close(f"{name}/final_normed", lm.normed(states[-1]))
        inputs = lm.teacher_inputs(blocks, states[-1])
        yield from golden.close(f"{name}/block_in", inputs)
        outputs = lm.block_decoder(inputs)
        yield from golden.close(f"{name}/block_out", outputs, BLOCK_OUT_ABSOLUTE)
        yield from golden.close(f"{name}/tf_logits", lm.teacher_forced_logits(blocks))


def _quirks(golden: _Golden) -> Iterator[Check]:
    ids = golden.get("quirk/ids")
    if ids is not None:
        yield from golden.close("quirk/embeds", golden.lm.embed_blocks(ids))


def _along(golden: _Golden, prompt: Tensor, ids: Tensor) -> GreedyRun:
    """States along golden ids; their prompt rows are taken from the expanded prompt."""
    blocks = torch.cat((prompt, ids[prompt.shape[0] :]))
    return GreedyRun(blocks, golden.lm.hidden_states(blocks[:-1])[-1])


def _generations(golden: _Golden) -> Iterator[Check]:
    lm = golden.lm
    names = sorted({key.split("/")[0] for key in golden.tensors if key.endswith("/ids")})
    for name in names:
        prompt_ids, ids = golden.get(f"{name}/prompt_ids2d"), golden.get(f"{name}/ids")
        if prompt_ids is None or ids is None:
            continue
        image_ids = golden.get(f"{name}/image_ids")
        prompt = lm.expand(prompt_ids, image_ids)
        length = prompt.shape[0]
        if golden.exact:
            most = golden.meta.get("generate", {}).get("max_new_tokens")
            cap = ids.shape[0] - length if name == "budget" or most is None else most + 1
            result = greedy(lm, prompt_ids, image_ids, cap)
            yield from golden.equal(f"{name}/ids", result.ids[length:], ids[length:])
        else:
            result = _along(golden, prompt, ids)
            yield from _clear_ids(golden, name, result.hidden[length - 1 :], ids[length:])
        yield from golden.close(f"{name}/last_hidden", result.hidden)
        yield from _substeps(golden, name, result.hidden[length - 1 :])


def _clear_ids(golden: _Golden, name: str, hidden: Tensor, ids: Tensor) -> Iterator[Check]:
    """Ids of each block given the golden blocks before it, where the golden choice is clear."""
    gap = golden.get(f"{name}/gap")
    if gap is None:
        return
    noise = RELATIVE * float(golden.lm.head_logits(hidden).abs().max())
    drawn = greedy_blocks(golden.lm, hidden)
    same = drawn == ids
    before = torch.cat((torch.ones_like(same[:, :1]), same[:, :-1]), dim=1).cumprod(-1).bool()
    clear = before & (gap > noise)
    mistakes = int((clear & ~same).sum())
    note = f"{int(clear.sum())} of {clear.numel()} ids have a gap above {noise:.2g}"
    yield Check(f"{name}/ids", float(mistakes), 0.0, mistakes == 0, note)


def _substeps(golden: _Golden, name: str, hidden: Tensor) -> Iterator[Check]:
    stem = f"{name}/substep_logits_"
    keys = sorted(key for key in golden.tensors if key.startswith(stem))
    pairs = [_slot_logits(golden, key, hidden[int(key.removeprefix(stem))]) for key in keys]
    if golden.exact:
        for key, (got, want) in zip(keys, pairs, strict=True):
            yield golden.compare(key, got, want)
    elif pairs:  # one position alone is too small a sample of rounding errors
        got, want = (torch.cat(rows) for rows in zip(*pairs, strict=True))
        yield golden.compare(stem.rstrip("_"), got, want)


def _slot_logits(golden: _Golden, key: str, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of one block and fixture `key`; the placeholder, never drawn, is 0 in both."""
    want = golden.tensors[key].clone()
    ids = None if golden.exact else want.new_zeros(1, golden.lm.config.num_codes + 1).long()
    if ids is not None:  # rounding must not lead the slots along another block
        ids[0, : want.shape[0]] = want.argmax(-1)
    got = golden.lm.full_logits(hidden.unsqueeze(0), ids)[0, : want.shape[0]]
    if golden.lm.banned_id >= 0:
        got[:, golden.lm.banned_id] = want[:, golden.lm.banned_id] = 0.0
    return got, want


def _conditions(golden: _Golden) -> Iterator[Check]:
    lm, prompt_ids = golden.lm, golden.get("cond/prompt_ids2d")
    special = golden.meta.get("special_ids")
    if prompt_ids is None or special is None:
        return
    start = special["vision_start"]
    ids2d = image_prompt(prompt_ids.tolist(), golden.meta["assistant_start_ids"], start)
    prompt = lm.expand(torch.tensor(ids2d, device=lm.device), golden.get("cond/image_ids"))
    length = prompt.shape[0]
    for case, facts in golden.meta.get("cond", {}).items():
        key, longest = f"cond/{case}", facts["max_condition_length"]
        ids = golden.get(f"{key}/gen_ids")
        if ids is None:
            continue
        if golden.exact:
            result = greedy(lm, prompt, None, 2 * longest + 11)
            yield from golden.equal(f"{key}/gen_ids", result.ids[length:], ids[length:])
        else:
            result = _along(golden, prompt, ids)
        yield from golden.close(f"{key}/last_hidden", result.hidden)
        rows = find_condition(
            result.ids, length, start, special["vision_end"],
            lm.config.qwen_config.vocab_size, longest, facts["condition_on_special_tokens"],
        )  # fmt: skip
        embeds, mask, rows_found = build_condition(result.hidden, rows, longest)
        yield from golden.close(f"{key}/embeds", embeds)
        yield from golden.equal(f"{key}/mask", mask)
        if facts.get("token_embed_lengths") is not None:
            lengths = torch.tensor(facts["token_embed_lengths"])
            yield from golden.equal(f"{key}/length", torch.tensor([rows_found]), lengths)


def _samples(golden: _Golden) -> Iterator[Check]:
    lm = golden.lm
    prompt_ids, image_ids = golden.get("sample/prompt_ids2d"), golden.get("sample/image_ids")
    for index, rule in enumerate(golden.meta.get("sample", [])):
        logits, probs = golden.get(f"sample/{index}/logits"), golden.get(f"sample/{index}/probs")
        if logits is None:
            continue
        if prompt_ids is not None:
            state = lm.hidden_states(lm.expand(prompt_ids, image_ids))[-1][-1]
            key = f"sample/{index}/logits"
            yield golden.compare(key, *_slot_logits(golden, key, state))
        if probs is not None:
            row = [rule["temperature"], rule["top_k"], rule["top_p"], 0.0]
            params = torch.tensor(row, device=lm.device).expand(logits.shape[0], 4)
            got = kept_scores(logits, params, reference=True).softmax(-1)
            yield golden.compare(f"sample/{index}/probs", got, probs[: logits.shape[0]])


def _codes(golden: _Golden) -> Iterator[Check]:
    tokenizer, pixels = golden.lm.visual_tokenizer, golden.get("vis/pixel_values")
    grid = golden.get("vis/image_grid_thw")
    if tokenizer is None or pixels is None or grid is None or not golden.exact:
        return
    codes = tokenizer.encode(pixels, grid)
    yield from golden.equal("vis/indices", codes)
    vocab_size = golden.lm.config.qwen_config.vocab_size
    yield from golden.equal("vis/aligned_ids", tokenizer.global_ids(codes, vocab_size))


_PARTS = (_quirks, _prompts, _generations, _conditions, _samples, _codes)
