"""Our side of the DPO bench: `TreeTrainer` with `add_lora`, the same rows, sizes and seed. python ours_dpo.py [--steps 12] [--cached] [--words 0] [--replies 2] [--profile]"""
import argparse, json, time

import torch

from common import ALPHA, BATCH, LENGTH, LR, RANK, clock, long_preferences, preferences, say, shares
from ftcourse.align.prefer import make_objective, preference_trees, with_reference
from ftcourse.models import load
from ftcourse.tune.lora import add_lora
from ftcourse.tune.trainer import Run, TreeTrainer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=12)
parser.add_argument("--cached", action="store_true", help="reference log-probabilities computed before the first step")
parser.add_argument("--words", type=int, help="words put in front of each prompt")
parser.add_argument("--replies", type=int, default=2, help="replies to a prompt")
parser.add_argument("--batch", type=int, default=BATCH, help="prompts a step")
parser.add_argument("--float32", action="store_true")
parser.add_argument("--profile", action="store_true", help="print where the processor time goes instead")
a = parser.parse_args()

model, tokenizer = load("smollm2-135m", dtype=torch.float32 if a.float32 else torch.bfloat16)
rows = preferences(a.batch * a.steps) if a.words is None else long_preferences(a.batch * a.steps, a.words, a.replies)
trees = preference_trees(rows, tokenizer, max_len=2048 if a.words else LENGTH)
started = time.perf_counter()
if a.cached: trees = with_reference(model, trees, tokenizer.pad_token_id)
cached = time.perf_counter() - started
add_lora(model, r=RANK, alpha=ALPHA)
timer = clock()
trainer = TreeTrainer(model, make_objective("dpo", beta=0.1), trees, run=Run(lr=LR, max_steps=a.steps, batch_size=a.batch, seed=0, progress=False), callbacks=[timer])
started = time.perf_counter()
if a.profile:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as prof: trainer.fit()
    print(json.dumps(shares(prof)))
else:
    trainer.fit()
    say("ftcourse " + ("cached" if a.cached else "online"), timer.times, whole_s=round(time.perf_counter() - started, 1), reference_s=round(cached, 1),
        loss=[round(h["loss"], 4) for h in trainer.state.log_history if "loss" in h])
