"""A small `--data` folder, each domain with words of its own."""

import json
import random
from pathlib import Path

from moe_emergence.config import SHIPPED


def write_texts(folder: Path) -> None:
    """40 short documents a domain."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for domain in SHIPPED:
        words = [f"{domain}{i}" for i in range(30)] + ["and", "the", "of"]
        texts = [" ".join(rng.choices(words, k=60)) for _ in range(40)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{domain}.jsonl").write_text(lines, encoding="utf-8")
