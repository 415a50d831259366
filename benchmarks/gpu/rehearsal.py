"""The program on a CPU, at toy sizes, with the packages of a GPU machine and no index to ask."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.pack import FOLDER, LOCAL
from benchmarks.gpu.program import REPOSITORY

MACHINE = (
    "torch==2.11.0", "triton==3.6.0", "transformers==5.17.0", "accelerate==1.15.0",
    "tokenizers==0.23.2", "safetensors==0.8.0", "huggingface_hub==1.33.0", "numpy==2.2.6",
    "pandas", "scipy", "scikit-learn", "statsmodels", "matplotlib", "jinja2", "pyarrow", "psutil",
    "rich", "packaging", "pyyaml", "tqdm", "tensorboard", "hypothesis", "pytest", "pytest-xdist",
    "pytest-benchmark", "pytest-timeout",
)  # fmt: skip
"""What is there before the wheels come; numpy as the interpreter of Triton 3.6 takes it."""


def make_environment(python: str) -> str:
    """An environment of `MACHINE` for the interpreter `python`, made once; its interpreter.

    Raises:
        subprocess.CalledProcessError: when it cannot be made; what pip says goes to stderr.
    """
    folder = LOCAL / "rehearsal"
    made = folder / "bin" / "python"
    if not (folder / "complete").exists():
        subprocess.run([python, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(made), "-m", "pip", "install", "--quiet", *MACHINE], check=True)
        (folder / "complete").touch()
    return str(made)


def install_wheels(python: str) -> Path:
    """The packed wheels in a folder of their own, as docs/gpu.md says, with no index to ask.

    Raises:
        subprocess.CalledProcessError: when something is missing.
    """
    site, wheels = LOCAL / "site", sorted((FOLDER / "wheels").glob("*.whl"))
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade",
         "--target", str(site), *map(str, wheels)],
        check=True,
    )  # fmt: skip
    return site


def rehearse(python: str, site: Path | None, out: Path, stages: Sequence[str] | None) -> int:
    """Run the program with the interpreter `python` and the packages in `site`; its exit code."""
    places = [REPOSITORY, REPOSITORY / "kernels", *([] if site is None else [site])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, places)),
        "TRITON_INTERPRET": "1",
        "HF_HUB_OFFLINE": "1",
        "PIP_NO_INDEX": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [python, "-m", "benchmarks.gpu", "run", "--tiny", "--device", "cpu"]
    command += ["--out", str(out), *(["--stages", *stages] if stages else [])]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, check=False).returncode
