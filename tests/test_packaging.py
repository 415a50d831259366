"""The package imports from anywhere, lightly, and stays out of transformers' way."""

import pkgutil
import subprocess
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from conftest import REPOSITORY

import emergence_kernels
import moe_emergence
from moe_emergence.extras import EXTRAS

pytestmark = pytest.mark.slow

Command = Callable[..., "subprocess.CompletedProcess[str]"]


def modules() -> list[str]:
    found = []
    for package in (moe_emergence, emergence_kernels):
        walked = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        found += [package.__name__, *(module.name for module in walked)]
    return [name for name in found if not name.startswith("emergence_kernels.gpu.")]


def test_kernels_is_a_source_root_and_no_package() -> None:
    assert not (REPOSITORY / "kernels" / "__init__.py").exists()
    assert not any((REPOSITORY / name / "__init__.py").exists() for name in ("tests", "benchmarks"))


WITHOUT_TRITON = """
import importlib, sys
import emergence_kernels
assert "triton" not in sys.modules, "importing emergence_kernels imported triton"
sys.modules.update(dict.fromkeys(("triton", "wandb", "megablocks", "stk")))
for name in {modules!r}:
    importlib.import_module(name)
if {installed}:
    import kernels
    kernels.get_local_kernel

import torch
from emergence_kernels.operators import triton_is_installed
from moe_emergence import train, verify
from moe_emergence.moe import MoELayer, auxiliary_losses

assert not triton_is_installed()


def gradients(layer, path):
    layer.dispatch = path
    x = torch.randn(12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y, decision = layer(x.requires_grad_())
    (y * torch.arange(8)).sum().add(sum(auxiliary_losses([decision]))).backward()
    found = [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]
    layer.zero_grad()
    return found


for activation in ("gelu_tanh", "swiglu"):
    layer = MoELayer(8, 16, num_experts=4, top_k=2, activation=activation).double()
    torch.testing.assert_close(gradients(layer, "fused"), gradients(layer, "sequential"))
experts = torch.zeros(3, 1, dtype=torch.int64)
w1, w2 = torch.randn(2, 4, 8).double(), torch.randn(2, 8, 4)
try:
    permutation = emergence_kernels.sort_by_expert(experts, 2)
    emergence_kernels.expert_mlp(
        torch.randn(3, 4), torch.ones(3, 1), w1, None, w2, None, permutation, "gelu_tanh"
    )
except ValueError as refusal:
    assert "dtype" in str(refusal), refusal
else:
    raise AssertionError("weights of another dtype were taken")
certified = ["--device", "cpu", "--dtype", "fp32", "--activation", "swiglu", "--cases", "1"]
assert verify.main(certified) == 0
assert train.main({flags!r}) == 0
print("all of it")
"""


def test_everything_but_the_gpu_works_without_triton_and_the_optional_packages(
    command: Command, tiny_flags: list[str]
) -> None:
    """None in sys.modules makes an import fail, as where there is no Triton (Windows, macOS).

    From the repository's root, where `kernels` must not be taken for the package of that name which
    transformers looks for, nor hide it.
    """
    installed = any(found.name == "kernels" for found in metadata.distributions())
    flags = [*tiny_flags, "--dispatch", "fused"]
    script = WITHOUT_TRITON.format(modules=modules(), installed=installed, flags=flags)
    done = command("-c", script, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith("all of it\n")
    assert "certified: fused on cpu" in done.stdout


CORE = """
import contextlib, io, sys
from importlib import import_module

sys.modules.update(dict.fromkeys({hidden!r}))
for name in ("moe", "models", "integrations.transformers", "generate.work", "verify.work"):
    import_module(f"moe_emergence.{{name}}")

import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from moe_emergence.models import upcycle

sizes = dict(vocab_size=40, n_positions=8, n_layer=2, n_embd=16, n_head=2)
config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
model = upcycle(GPT2LMHeadModel(config), layers=[1], num_experts=4, top_k=1).eval()
ids = torch.zeros(1, 8, dtype=torch.long)
model(ids, labels=ids).loss.backward()
model.save_pretrained("core")
again = AutoModelForCausalLM.from_pretrained("core")
torch.testing.assert_close(again(ids).logits, model(ids).logits)

from moe_emergence.entry import run

for line in {lines!r}:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = run(import_module(f"moe_emergence.{{line[0]}}").main, line[1:])
    print(code, said.getvalue(), end="")
"""


def test_the_core_needs_no_extra_and_a_command_names_its_own(command: Command) -> None:
    """And no Triton: torch for a GPU brings it."""
    train, analysis = EXTRAS.values()
    lines = [["train"], ["analyze", "runs/demo"], ["suite", "plan", "demo"]]
    done = command("-c", CORE.format(hidden=(*train, *analysis, "triton"), lines=lines))
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stdout.splitlines()
    assert len(said) == len(lines), done.stdout
    for (verb, *_), line in zip(lines, said, strict=True):
        assert line.startswith("2 error: "), line
        assert "is not installed; run pip install 'moe-emergence[" in line
        assert verb == "train" or "[analysis]" in line


AS_MODULES = """
import runpy, sys

for verb in ("train", "generate", "verify", "suite", "analyze"):
    sys.argv = ["-m", "--help"]
    try:
        runpy.run_module(f"moe_emergence.{verb}", run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        assert stop.code == 0, (verb, stop.code)
"""


def test_entry_points_run_as_modules_from_another_folder(command: Command) -> None:
    done = command("-c", AS_MODULES)
    assert done.returncode == 0, done.stderr
    for verb in ("train", "generate", "verify", "suite", "analyze"):
        assert f"python -m moe_emergence.{verb}" in done.stdout


def test_typed_packages_ship_their_marker() -> None:
    for package in (moe_emergence, emergence_kernels):
        assert (Path(package.__path__[0]) / "py.typed").is_file()


def test_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    citation = (REPOSITORY / "CITATION.cff").read_text("utf-8")
    assert project["version"] == moe_emergence.__version__
    assert f"\nversion: {moe_emergence.__version__}\n" in citation
