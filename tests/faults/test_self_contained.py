"""A folder with its own code loads, generates, trains and saves where this package is not."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import llama_models
import pytest
import small_models
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moe_emergence.models.self_contained import code_of, save_self_contained

MODELS = {
    "gpt2": lambda: small_models.make_model(2, use_expert_bias=True),
    "gpt2-pools": lambda: small_models.make_model(1, pool_size=2),
    "gpt2-hash": lambda: small_models.make_model(2, router="hash"),
    "gpt2-frozen": lambda: small_models.make_model(
        1, router="frozen", variance_coef=0.1, top1_weight="probability"
    ),
    "llama": lambda: llama_models.make_mixture("llama", 2),
    "mistral": lambda: llama_models.make_mixture("mistral-window", 1, pool_size=2),
    "qwen2": lambda: llama_models.make_mixture("qwen2-window", 2, use_expert_bias=True),
    "qwen3": lambda: llama_models.make_mixture("qwen3", 2, router="hash"),
}

ELSEWHERE = """
import sys
from pathlib import Path

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("moe_emergence", "emergence_kernels", "triton"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

torch.set_num_threads(1)
root, ids = Path(sys.argv[1]), torch.tensor([[5, 9, 3, 7, 11, 2, 30, 41]])

def computed(model):
    out = model(ids, labels=ids)
    parts = {"logits": out.logits, "loss": out.loss}
    for place, decision in enumerate(out.router_decisions):
        parts[f"experts {place}"] = decision.topk_experts
    return {name: part.detach().clone() for name, part in parts.items()}

def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

for folder in sorted(root.iterdir()):
    model = load(folder)
    found = computed(model)
    cached = model.config.use_cache
    found["generated"] = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=cached)
    model.train()
    model(ids, labels=ids).loss.backward()
    found |= {f"grad {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    again = folder / "again"
    model.eval().save_pretrained(again)
    stepped, reloaded = computed(model), computed(load(again))
    assert not torch.equal(stepped["logits"], found["logits"])
    assert all(torch.equal(stepped[name], reloaded[name]) for name in stepped)
    if folder.name == "llama":
        base = AutoModel.from_pretrained(folder, trust_remote_code=True)
        assert type(base).__name__ == type(model.base_model).__name__
    save_file({n: t.contiguous() for n, t in found.items()}, folder / "found.safetensors")
try:
    AutoConfig.from_pretrained(root.parent / "plain")
except ValueError as error:
    assert "moe_gpt2" in str(error)
else:
    raise AssertionError("a folder without code was opened")
assert not {"moe_emergence", "emergence_kernels", "triton"} & {n.split(".")[0] for n in sys.modules}
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model saved, loaded and used in a process that has none of this package."""
    root = tmp_path_factory.mktemp("self-contained")
    for name, make in MODELS.items():
        save_self_contained(make(), root / "models" / name)
    small_models.make_model().save_pretrained(root / "plain")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "HF_HOME")}
    environment |= {"HF_HOME": str(root / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(root / "models")],
        env=environment, cwd=root, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return root / "models"


@pytest.mark.parametrize("name", MODELS)
def test_elsewhere_it_computes_the_same_as_here(name: str, folders: Path) -> None:
    """Bitwise what the sequential path does; its routing is that of the plain-torch twin."""
    model: Any = MODELS[name]()
    model.set_dispatch("sequential")
    ids = torch.tensor([[5, 9, 3, 7, 11, 2, 30, 41]])
    found = load_file(folders / name / "found.safetensors")
    out = model(ids, labels=ids)
    assert torch.equal(out.logits, found.pop("logits"))
    torch.testing.assert_close(out.loss, found.pop("loss"))
    for place, decision in enumerate(out.router_decisions):
        assert torch.equal(decision.topk_experts, found.pop(f"experts {place}"))
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": model.config.use_cache}
    assert torch.equal(model.generate(ids, **options), found.pop("generated"))
    model.train()
    model(ids, labels=ids).loss.backward()
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, found.pop(f"grad {key}"))
    assert not found


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_here_its_own_code_is_not_needed(name: str, folders: Path) -> None:
    """Nor asked about: the package's classes load it, and write the folder as ever."""
    model = AutoModelForCausalLM.from_pretrained(folders / name)
    assert type(model) is type(MODELS[name]())


def test_a_plain_folder_has_a_card_that_says_what_is_missing(tmp_path: Path) -> None:
    """Elsewhere transformers names the type, see above; somebody's own card stays."""
    folder = tmp_path / "models"
    small_models.make_model().save_pretrained(folder)
    card = (folder / "README.md").read_text()
    assert "import moe_emergence.models" in card
    assert "type moe_gpt2" in card
    (folder / "README.md").write_text("mine")
    small_models.make_model().save_pretrained(folder)
    assert (folder / "README.md").read_text() == "mine"


def test_the_code_is_one_file_of_the_packages_sources(folders: Path) -> None:
    config = json.loads((folders / "gpt2" / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "modeling_moe_gpt2.MoEGPT2Config",
        "AutoModel": "modeling_moe_gpt2.MoEGPT2Model",
        "AutoModelForCausalLM": "modeling_moe_gpt2.MoEGPT2LMHeadModel",
    }
    (file,) = (folders / "gpt2").glob("*.py")
    tree = ast.parse(file.read_text())
    imported = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        for name in (
            [node.module or "."] if isinstance(node, ast.ImportFrom)
            else [one.name for one in node.names] if isinstance(node, ast.Import) else []
        )
    }  # fmt: skip
    assert imported - sys.stdlib_module_names == {"torch", "transformers"}


def test_two_meanings_of_a_name_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "emergence_kernels_of_a_test"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "one.py").write_text(
        f"from {package.name}.two import other\n\ndef _same(): ...\n\n"
        "class One:\n    def f(self): return _same(), other()\n"
    )
    (package / "two.py").write_text("_same = 3\n\ndef other(): return _same\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("moe_emergence.models.self_contained._OURS", (package.name,))
    from emergence_kernels_of_a_test.one import One  # type: ignore[import-not-found]

    with pytest.raises(ValueError, match=r"^_same: defined twice"):
        code_of(One)
