"""Plausible wrong answers to the exercises of 5_evals/harness."""
import re

def _first_in_list(text, until):
    for stop in until:
        if stop in text: return text[:text.find(stop)]
    return text
def _keeps_the_stop(text, until):
    ends = [text.find(s) + len(s) for s in until if s in text]
    return text[:min(ends)] if ends else text
def _minus_one(text, until): return text[:min((text.find(s) for s in until), default=len(text))]
def _not_at_the_start(text, until): return text[:min((at for at in map(text.find, until) if at > 0), default=len(text))]

STRICT, NUMBER = r"#### (\-?[0-9\.\,]+)", r"-?[0-9][0-9.,]*"
def _first_number(text):
    strict, numbers = re.search(STRICT, text), re.findall(NUMBER, text)
    return strict and strict[1].rstrip(".,"), numbers[0].rstrip(".,") if numbers else None
def _with_full_stop(text):
    strict, numbers = re.search(STRICT, text), re.findall(NUMBER, text)
    return strict and strict[1], numbers[-1] if numbers else None
def _strict_or_last(text):
    strict, numbers = re.search(STRICT, text), re.findall(NUMBER, text)
    last = numbers[-1].rstrip(".,") if numbers else None
    return strict[1].rstrip(".,") if strict else last, last
def _last_strict(text):
    strict, numbers = re.findall(STRICT, text), re.findall(NUMBER, text)
    return strict[-1].rstrip(".,") if strict else None, numbers[-1].rstrip(".,") if numbers else None

WRONG = {"harness.1": [_first_in_list, _keeps_the_stop, _minus_one, _not_at_the_start], "harness.2": [_first_number, _with_full_stop, _strict_or_last, _last_strict]}
