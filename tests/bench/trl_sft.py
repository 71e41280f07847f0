"""The peer: TRL's SFTTrainer with PEFT. python trl_sft.py MODEL_FOLDER [--steps 12] [--attention sdpa|eager] [--checkpointing]"""
import argparse, tempfile, time

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from common import ALPHA, BATCH, LENGTH, LR, RANK, clock, instructions, say

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model")
parser.add_argument("--steps", type=int, default=12)
parser.add_argument("--attention", default="sdpa")
parser.add_argument("--checkpointing", action="store_true")
a = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(a.model)
model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.bfloat16)
model.set_attn_implementation(a.attention)
lora = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
args = SFTConfig(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=BATCH, max_steps=a.steps, learning_rate=LR, bf16=True,
                 use_cpu=not torch.cuda.is_available(), max_length=LENGTH, gradient_checkpointing=a.checkpointing, logging_steps=1,
                 save_strategy="no", report_to=[], disable_tqdm=True, seed=0)
timer = clock()
trainer = SFTTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=Dataset.from_list(instructions(BATCH * a.steps)),
                     peft_config=lora, callbacks=[timer])
started = time.perf_counter()
trainer.train()
say(f"trl {a.attention}" + (" checkpointing" if a.checkpointing else ""), timer.times, whole_s=round(time.perf_counter() - started, 1),
    loss=[round(h["loss"], 4) for h in trainer.state.log_history if "loss" in h])
