"""Our side of the SFT bench: `TreeTrainer` with `add_lora`, the same rows, sizes and seed. python ours_sft.py [--steps 12] [--profile]"""
import argparse, json, time

import torch

from common import ALPHA, BATCH, LENGTH, LR, RANK, clock, instructions, say
from ftcourse.data.batches import encode_rows
from ftcourse.models import load
from ftcourse.tune.lora import add_lora
from ftcourse.tune.sft import SFT
from ftcourse.tune.trainer import Run, TreeTrainer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=12)
parser.add_argument("--profile", action="store_true", help="print where the processor time goes instead")
a = parser.parse_args()

model, tokenizer = load("smollm2-135m", dtype=torch.bfloat16)
add_lora(model, r=RANK, alpha=ALPHA)
trees = encode_rows(instructions(BATCH * a.steps), tokenizer, max_len=LENGTH)
timer = clock()
run = Run(lr=LR, max_steps=a.steps, batch_size=BATCH, seed=0, progress=False)
trainer = TreeTrainer(model, SFT, trees, run=run, callbacks=[timer])
KINDS = {"matrix products": ("mm", "addmm", "addmm_", "bmm", "baddbmm", "linear", "matmul"),
         "copies and gathers": ("copy_", "cat", "index", "index_select", "index_put_", "gather", "scatter_", "scatter_add_", "embedding", "fill_", "zero_"),
         "optimiser": ("_fused_adamw_", "_foreach_norm", "_foreach_mul_")}


def shares(prof):
    "Share of the processor time of the operators, by kind; what no list names works element by element."
    spent = dict.fromkeys([*KINDS, "element by element and the rest"], 0.0)
    for event in prof.key_averages():
        name = event.key.removeprefix("aten::")
        spent[next((kind for kind, names in KINDS.items() if name in names), "element by element and the rest")] += event.self_cpu_time_total
    return {kind: round(t / sum(spent.values()), 2) for kind, t in spent.items()}


started = time.perf_counter()
if a.profile:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as prof: trainer.fit()
    print(json.dumps(shares(prof)))
else:
    trainer.fit()
    say("ftcourse", timer.times, whole_s=round(time.perf_counter() - started, 1), loss=[round(h["loss"], 4) for h in trainer.state.log_history if "loss" in h])
