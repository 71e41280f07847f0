"""The least time a step can take: floating-point operations of the packed trees, over the bf16 matmul peak measured now."""
import argparse, json

from common import BATCH, LENGTH, instructions, matmul_peak
from ftcourse.data.batches import encode_rows
from ftcourse.models import load

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=12)
a = parser.parse_args()

model, tokenizer = load("smollm2-135m")
trees = encode_rows(instructions(BATCH * a.steps), tokenizer, max_len=LENGTH)
tokens, counted = sum(map(len, trees)) / a.steps, sum(t.n_tokens for t in trees) / a.steps
head = model.get_output_embeddings().weight.numel()
body = sum(p.numel() for p in model.parameters()) - head  # the embedding is tied to the output layer and costs no product
# Forward and the gradient of the input, 2 FLOP a weight and token each; frozen weights need no gradient. LoRA and attention are left out: under 5 %.
flop = 4 * (body * tokens + head * counted)
peak = max(matmul_peak() for _ in range(3))
print(json.dumps(dict(tree_tokens=round(tokens), supervised_tokens=round(counted), gflop=round(flop / 1e9), peak_tflops=round(peak / 1e12, 2), floor_s=round(flop / peak, 3))))
