"""Plausible wrong answers to the chapter's exercises: each must be refused."""
from ftcourse.data.formats import PREAMBLE, format_input


def chatml_without_last_line_end(messages): return "\n".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>" for m in messages)
def chatml_stripped(messages): return "".join(f"<|im_start|>{m['role']}\n{m['content'].strip()}<|im_end|>\n" for m in messages)
def chatml_open(messages): return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages) + "<|im_start|>assistant\n"


def always_input(e): return PREAMBLE + "\n\n### Instruction:\n" + e["instruction"] + "\n\n### Input:\n" + e["input"]
def input_if_key(e): return PREAMBLE + "\n\n### Instruction:\n" + e["instruction"] + (f"\n\n### Input:\n{e['input']}" if "input" in e else "")
def with_response(e): return format_input(e) + "\n\n### Response:\n"
def stanford(e): return format_input(e).replace("a task.", "a task, paired with an input that provides further context.") if e.get("input") else format_input(e)


def first_answer(t):
    end = t.index("\n\nAssistant:") + len("\n\nAssistant:")
    return t[:end], t[end:]


def without_line_ends(t):
    end = t.rindex("Assistant:") + len("Assistant:")
    return t[:end], t[end:]


def stripped(t):
    end = t.rindex("\n\nAssistant:") + len("\n\nAssistant:")
    return t[:end], t[end:].strip()


WRONG = {
    "formats.1": [chatml_without_last_line_end, chatml_stripped, chatml_open],
    "formats.2": [always_input, input_if_key, with_response, stanford],
    "formats.3": [first_answer, without_line_ends, stripped],
}
