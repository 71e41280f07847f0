"""What torch.compile gives a DPO step: the model's own RMSNorm, forward and backward, eager and compiled. python compiled.py [--tokens 600]"""
import argparse, json, time

import torch

from ftcourse.models import load

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--tokens", type=int, default=600, help="of a packed step")
a = parser.parse_args()


def fastest(layer, x, times=30):
    "Seconds of the fastest forward and backward pass."
    best = float("inf")
    for _ in range(times):
        started = time.perf_counter()
        layer(x).sum().backward()
        best = min(best, time.perf_counter() - started)
    return best


model, _ = load("smollm2-135m", dtype=torch.bfloat16)
norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
layer = norms[0].requires_grad_(False)
x = torch.randn(1, a.tokens, model.config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
eager, started = fastest(layer, x), time.perf_counter()
compiled = torch.compile(layer, dynamic=True)
compiled(x).sum().backward()
warm_up = time.perf_counter() - started
step = (eager - fastest(compiled, x)) * len(norms)
print(json.dumps(dict(norms=len(norms), eager_ms=round(1e3*eager, 2), saved_s=round(step, 3), warm_up_s=round(warm_up, 1))))
