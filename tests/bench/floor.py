"""The least time a step can take: floating-point operations of the packed trees, over the bf16 matmul peak measured now."""
import argparse, json

from common import BATCH, LENGTH, instructions, matmul_peak, preferences
from ftcourse.data.batches import encode_rows
from ftcourse.models import load

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=12)
parser.add_argument("--pairs", action="store_true", help="of DPO on preference pairs, references online and cached, instead of supervised fine-tuning")
a = parser.parse_args()

model, tokenizer = load("smollm2-135m")
trees = encode_rows((preferences if a.pairs else instructions)(BATCH * a.steps), tokenizer, max_len=LENGTH)
tokens, counted = sum(map(len, trees)) / a.steps, sum(t.n_tokens for t in trees) / a.steps
head = model.get_output_embeddings().weight.numel()
body = sum(p.numel() for p in model.parameters()) - head  # the embedding is tied to the output layer and costs no product
# 2 FLOP a weight and token, forward, and the same for the gradient of the input; frozen weights need no gradient. LoRA and attention are left out: under 5 %.
forward = 2 * (body * tokens + head * counted)
peak = max(matmul_peak() for _ in range(3))
work = dict(online=3 * forward, cached=2 * forward) if a.pairs else {"": 2 * forward}  # a reference asked online is one more forward pass
named = lambda what, kind: f"{what}_{kind}" if kind else what
print(json.dumps(dict(tree_tokens=round(tokens), supervised_tokens=round(counted), peak_tflops=round(peak / 1e12, 2), **{named("gflop", k): round(v / 1e9) for k, v in work.items()},
                      **{named("floor", k) + "_s": round(v / peak, 3) for k, v in work.items()})))
