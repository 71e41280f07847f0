"""The peer: lm-eval with its own engine. python lm_eval_choice.py MODEL_FOLDER [--work none|same|own|perplexity|generation] [--limit 100] [--batch 16]"""
import torch
from lm_eval.models.huggingface import HFLM

from evals import arguments, measure

a = arguments(__doc__)
lm = HFLM(a.model, device="cuda" if torch.cuda.is_available() else "cpu", dtype="float32" if a.float32 else "bfloat16", batch_size=a.batch, max_length=a.window if a.work == "perplexity" else None)
measure("lm-eval", lm, a)
