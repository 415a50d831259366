"""The README.md of a saved mixture: what has to be installed to load it."""

from pathlib import Path

_CARD = """---
library_name: transformers
tags: [mixture-of-experts, moe_emergence]
---

# A mixture of experts of type {model_type}

transformers does not know this type by itself. With the package moe_emergence installed:

    import moe_emergence.models
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(FOLDER)

Where a file `modeling_{model_type}.py` lies beside `config.json`, it loads without the package, by
running that file:

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
"""


def write_card(folder: str | Path, model_type: str) -> None:
    """Write it into `folder`, which is made where it is missing; one that is there stays."""
    card = Path(folder) / "README.md"
    card.parent.mkdir(parents=True, exist_ok=True)
    if not card.exists():
        card.write_text(_CARD.format(model_type=model_type), encoding="utf-8")
