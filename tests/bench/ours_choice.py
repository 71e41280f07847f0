"""Our side: `TreeLM`, the same tasks. python ours_choice.py MODEL_FOLDER [--work none|same|own|perplexity|generation] [--limit 100] [--profile]"""
import contextlib, io, json

import torch

from common import shares
from evals import arguments, measure
from ftcourse.evals.harness import TreeLM
from ftcourse.models import load

a = arguments(__doc__)
model, tokenizer = load(a.model, dtype=torch.float32 if a.float32 else torch.bfloat16)
lm = TreeLM(model, tokenizer, batch_size=a.batch, max_len=a.window if a.work == "perplexity" else None, tokens_per_batch=16_384 if torch.cuda.is_available() else 1024)
if a.profile:
    with contextlib.redirect_stdout(io.StringIO()), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as prof: measure("ftcourse", lm, a)
    print(json.dumps(shares(prof)))
else: measure("ftcourse", lm, a)
