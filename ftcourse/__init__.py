__version__ = "0.1.0"

_LAZY = {"load": "ftcourse.models", "finetune": "ftcourse.tune.sft", "prefer": "ftcourse.align.prefer"}
__all__ = sorted(_LAZY)


def __getattr__(name):
    "`load`, `finetune` and `prefer` are imported when they are asked for: `import ftcourse` alone imports no torch."
    if name not in _LAZY: raise AttributeError(f"module 'ftcourse' has no attribute {name!r}")
    from importlib import import_module
    value = globals()[name] = getattr(import_module(_LAZY[name]), name)
    return value


def __dir__(): return sorted({*globals(), *_LAZY})
