"""The package: what settings.ini says, what ftcourse/ holds, and data/ as ftcourse._sets."""
import configparser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).resolve().parent
settings = configparser.ConfigParser()
settings.read(here / "settings.ini", encoding="utf-8")
settings = settings["DEFAULT"]
sets = ["ftcourse._sets"] + ["ftcourse._sets." + ".".join(d.relative_to(here / "data").parts)
                             for d in sorted((here / "data").rglob("*")) if d.is_dir()]

# Lower bounds are what Colab has installed, so that installing there adds packages and changes none.
runtime = ["torch>=2.11", "transformers>=5.15,<6", "peft>=0.20", "datasets>=4.0", "accelerate>=1.14", "safetensors>=0.8",
           "gguf>=0.19", "numpy>=2.1", "matplotlib>=3.10", "typer>=0.27", "rich>=13.9"]
notebooks = ["jupyterlab", "ipywidgets"]
quant = ["bitsandbytes>=0.48"]
evals = ["evaluate>=0.4.6", "lm-eval>=0.4.13", "sacrebleu>=2.4", "rouge-score>=0.1.2", "nltk>=3.9", "scikit-learn>=1.6", "openai>=2"]
dev = ["nbdev>=2.4.14,<3", "execnb<0.2", "fastcore<2", "ghapi<2", "fastgit==0.1.4", "jupytext", "nbclient", "ipykernel", "jupyterlab",
       "pytest", "pytest-xdist", "hypothesis", "scipy", "trl==1.16.0", *quant, *evals, "ipywidgets", "ruff", "build", "uv",
       "torchmetrics", "statsmodels", "krippendorff", "alpaca-eval==0.6.6", "arena-rank==0.1.1",
       "sphinx==9.0.4", "myst-nb==1.4.0", "myst-parser==5.2.0", "sphinx-book-theme==1.4.0", "pydata-sphinx-theme==0.20.0",
       "sphinx-design==0.8.0", "sphinx-togglebutton==0.4.5", "sphinx-copybutton==0.5.2", "sphinx-autobuild", "playwright"]

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    keywords=settings["keywords"],
    license="Apache-2.0",
    python_requires=f">={settings['min_python']}",
    packages=find_packages(include=["ftcourse", "ftcourse.*"]) + sets,
    package_dir={"ftcourse._sets": "data"},
    package_data={"": ["*.json", "*.jsonl", "*.gz", "*.csv", "*.md", "*.txt", "LICENSE*", "py.typed"]},
    install_requires=runtime,
    extras_require={"quant": quant, "trl": ["trl==1.16.0"], "eval": evals, "notebooks": notebooks, "dev": dev},
    entry_points={"console_scripts": ["ftcourse = ftcourse.cli:main"], "nbdev": ["ftcourse = ftcourse._modidx:d"]},
)
