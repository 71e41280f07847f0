"""Our side of the SFT bench: `TreeTrainer` with `add_lora`, the same rows, sizes and seed. python ours_sft.py [--steps 12] [--profile]"""
import argparse, json, time

import torch

from common import ALPHA, BATCH, LENGTH, LR, RANK, clock, instructions, say, shares
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
started = time.perf_counter()
if a.profile:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as prof: trainer.fit()
    print(json.dumps(shares(prof)))
else:
    trainer.fit()
    say("ftcourse", timer.times, whole_s=round(time.perf_counter() - started, 1), loss=[round(h["loss"], 4) for h in trainer.state.log_history if "loss" in h])
