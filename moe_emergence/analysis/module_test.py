"""The module test of a source: modules, retention, and what single choices are worth."""

from dataclasses import replace

import pandas as pd

from moe_emergence.analysis.documents import blocks_each, take
from moe_emergence.analysis.module_sets import Naming
from moe_emergence.analysis.modules import halves, module_tables, name_on
from moe_emergence.analysis.regret import regret_table
from moe_emergence.analysis.retention import retention_table
from moe_emergence.analysis.settings import AnalyzeConfig
from moe_emergence.analysis.sources import Source, Text, read_text, same_text, text_choice
from moe_emergence.settings import check


def modules_of(
    source: Source,
    text: Text,
    config: AnalyzeConfig,
) -> tuple[dict[str, pd.DataFrame], Naming]:
    """Modules named on the first half of every domain's blocks, and tested on the second.

    Raises:
        ValueError: naming the flag, for one domain alone, a second text that is the first, too few
            blocks, a tokenizer without an end of text.
    """
    check(
        len(text.blocks) > 1, "--test", config.test,
        f"experts of {' '.join(text.blocks)} are told from those of other domains; give two or "
        "more with --data or --domains",
    )  # fmt: skip
    named_on = config.data or (source.config.data.data if source.config else "embedded")
    if config.second_data is not None:
        check(
            not same_text(config.second_data, named_on), "--second-data", config.second_data,
            "the modules are named on that text; give another",
        )  # fmt: skip
    eos_id = source.tokenizer.eos_token_id
    check(
        isinstance(eos_id, int), "--test", config.test,
        f"the tokenizer of {source.name} has no end of text, which tells documents apart",
    )  # fmt: skip
    first, second = halves(text.blocks)
    naming = name_on(
        source.model, take(first, config.knockout_tokens), batch_size=config.batch_size
    )
    corpora = {"second half": second}
    if config.second_data is not None:
        other = replace(text_choice(config), data=config.second_data, domains=tuple(text.blocks))
        corpora[config.second_data] = read_text(source, other).blocks
    found = module_tables(
        source.model, naming, corpora, eos_id=int(eos_id),
        most=blocks_each(second, config.knockout_tokens), batch_size=config.batch_size,
        seed=config.seed,
    )  # fmt: skip
    second = take(second, config.knockout_tokens)
    top_k = int(getattr(source.model.config, "num_experts_per_tok", 1))
    found["retention"] = retention_table(
        source.model, naming, second, top_k, batch_size=config.batch_size, seed=config.seed
    )
    num_experts = naming.load.shape[1]
    if num_experts > top_k:
        found["regret"] = regret_table(
            source.model, second, num_experts, top_k, batch_size=config.batch_size, seed=config.seed
        )
    return found, naming
