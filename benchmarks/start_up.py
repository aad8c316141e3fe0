"""A process that does nothing but start, load and draw once; prints what that took as JSON.

Run by bench_e2e: `python -m benchmarks.start_up DIRECTORY DEVICE THREADS`.
"""

from __future__ import annotations

import json
import resource
import sys
import time


def main(directory: str, device: str, threads: str) -> None:
    """Imports inside, so that they are part of what is timed."""
    begin = time.perf_counter()
    import torch

    from kelix_rt import Engine, RenderParams, SamplingParams

    torch.set_num_threads(int(threads))
    imported = time.perf_counter()
    engine = Engine.from_pretrained(directory, device=device)
    loaded = time.perf_counter()
    sampling = SamplingParams(temperature=0.0, max_blocks=8)
    engine.generate_image([1, 2, 3], sampling=sampling, render=RenderParams(steps=1, seed=0))
    drawn = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated()
    facts = {
        "import_s": imported - begin,
        "load_s": loaded - imported,
        "first_picture_s": drawn - loaded,
        "peak_mib": peak / 2**20,
    }
    print(json.dumps({name: round(value, 3) for name, value in facts.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
