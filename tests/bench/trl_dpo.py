"""The peer: TRL's DPOTrainer with PEFT. python trl_dpo.py MODEL_FOLDER [--steps 12] [--attention sdpa|eager] [--precompute] [--words 0] [--replies 2]"""
import argparse, tempfile, time

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from common import ALPHA, BATCH, LENGTH, LR, RANK, clock, long_preferences, pairs, preferences, say

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model")
parser.add_argument("--steps", type=int, default=12)
parser.add_argument("--attention", default="sdpa")
parser.add_argument("--precompute", action="store_true", help="reference log-probabilities computed before the first step")
parser.add_argument("--words", type=int, help="words put in front of each prompt")
parser.add_argument("--replies", type=int, default=2, help="replies to a prompt, of which all pairs are learnt from")
parser.add_argument("--batch", type=int, default=BATCH, help="prompts a step")
parser.add_argument("--float32", action="store_true")
a = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(a.model)
model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32 if a.float32 else torch.bfloat16)
model.set_attn_implementation(a.attention)
lora = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
n_pairs = a.batch * a.replies * (a.replies - 1) // 2
micro = max(m for m in range(1, 9) if n_pairs % m == 0)  # at most 8 pairs at once: 28 of 500 tokens don't fit
rows = preferences(a.batch * a.steps) if a.words is None else pairs(long_preferences(a.batch * a.steps, a.words, a.replies))
args = DPOConfig(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=micro, gradient_accumulation_steps=n_pairs // micro, max_steps=a.steps, learning_rate=LR, bf16=not a.float32,
                 use_cpu=not torch.cuda.is_available(), max_length=2048 if a.words else LENGTH, gradient_checkpointing=False, logging_steps=1,
                 precompute_ref_log_probs=a.precompute, save_strategy="no", report_to=[], disable_tqdm=True, seed=0)
timer = clock()
trainer = DPOTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=Dataset.from_list(rows), peft_config=lora, callbacks=[timer])
started = time.perf_counter()
trainer.train()
say(f"trl {a.attention}" + (" cached" if a.precompute else " online"), timer.times, whole_s=round(time.perf_counter() - started, 1),
    loss=[round(h["loss"], 4) for h in trainer.state.log_history if "loss" in h])
