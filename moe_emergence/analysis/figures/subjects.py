"""One function per figure: from a table of an analysis to a Figure."""

import pandas as pd
from matplotlib.figure import Figure

from moe_emergence.analysis.figures.panels import bars, heatmaps, lines
from moe_emergence.analysis.routing_tables import ALL_SLOTS
from moe_emergence.config.data import ALL


def plot_expert_domain(table: pd.DataFrame) -> Figure:
    """Share of each domain's assignments per expert."""
    return heatmaps(
        table[table["slot"] == ALL_SLOTS], rows="domain", columns="expert", value="fraction",
        label="share of the domain's assignments (%)", scale=100,
        title="Where each domain's tokens go",
    )  # fmt: skip


def plot_expert_slots(table: pd.DataFrame) -> Figure | None:
    """The same for every top-k slot; None for one expert per token."""
    slots = table[table["slot"] != ALL_SLOTS]
    if slots["slot"].nunique() < 2:
        return None
    slots = slots.assign(row=slots["domain"] + " #" + (slots["slot"] + 1).astype(str))
    return heatmaps(
        slots, rows="row", columns="expert", value="fraction", scale=100,
        label="share of the domain's tokens in the slot (%)",
        title="Where each domain's tokens go, by choice (#1 most probable)",
    )  # fmt: skip


def plot_token_types(table: pd.DataFrame) -> Figure:
    """Share of each token type's assignments per expert."""
    table = table[table["slot"] == ALL_SLOTS]
    table = table.assign(row=table["domain"] + ": " + table["token_type"])
    return heatmaps(
        table, rows="row", columns="expert", value="fraction", scale=100,
        label="share of the type's assignments (%)", title="Where each type of token goes",
    )  # fmt: skip


def plot_information(table: pd.DataFrame) -> Figure:
    """I(expert; domain) beside its nulls, in bits."""
    return bars(
        table[table["label"] == "domain"],
        values={
            "bits": "measured", "null_router_95": "random routers, same states, 95%",
            "permuted_95": "permuted domains, 95%",
        },
        low="bits_low", high="bits_high", label="I(expert; domain) (bits)",
        title="What the expert tells of the domain, and what it would anyway",
    )  # fmt: skip


def plot_type_information(table: pd.DataFrame) -> Figure | None:
    """I(expert; token type) beside its null, in bits; None without token types."""
    table = table[table["label"] == "token type"]
    if table.empty:
        return None
    return bars(
        table,
        values={
            "bits": "measured", "null_router_95": "random routers, same states, 95%",
            "permuted_95": "permuted types, 95%",
        },
        low="bits_low", high="bits_high", label="I(expert; token type) (bits)",
        title="What the first expert tells of the token's type within a domain",
    )  # fmt: skip


def plot_entropy(table: pd.DataFrame) -> Figure:
    """Entropy of the router per layer."""
    return bars(
        table,
        values={
            "entropy_token": "of a token", "entropy_mean": "of the mean",
            "entropy_uniform": "uniform",
        },
        label="entropy (nats)", title="How sure the router is of a token, and how it spreads them",
    )  # fmt: skip


def plot_predictability(table: pd.DataFrame) -> Figure:
    """Persistence beside its expectation, and how much the token id alone tells."""
    return bars(
        table,
        values={
            "persistence": "neighbours with the same expert",
            "persistence_expected": "by chance, same loads",
            "token_id_share": "told by the token id alone",
        },
        label="share (0 to 1)", title="How predictable routing is",
    )  # fmt: skip


def plot_load(table: pd.DataFrame) -> Figure:
    """Load of every expert, all slots."""
    return heatmaps(
        table[table["slot"] == ALL_SLOTS], rows="layer", columns="expert", value="fraction",
        panels=("run",), label="share of the layer's assignments (%)", scale=100, form="{:.1f}",
        title="Load",
    )  # fmt: skip


def plot_violation(table: pd.DataFrame) -> Figure:
    """Imbalance of the load per layer."""
    return bars(
        table, values={"max_violation": "largest over mean, less 1", "load_cv": "std over mean"},
        label="imbalance (1)", title="How uneven the load is",
    )  # fmt: skip


def plot_coactivation(table: pd.DataFrame) -> Figure:
    """Co-activation beyond what loads explain."""
    table = table.assign(
        excess=table["conditional"] - table["expected"],
        where=table["layer"].astype(str) + " → " + table["other_layer"].astype(str),
    )
    return heatmaps(
        table, rows="expert", columns="other_expert", value="excess", panels=("run", "where"),
        signed=True, scale=100, label="share of the expert's tokens, less what loads give (points)",
        title="Which experts share tokens, within a layer and from one to the next",
    )  # fmt: skip


def plot_vocabulary(table: pd.DataFrame) -> Figure:
    """Vocabulary specialisation of every expert."""
    return heatmaps(
        table, rows="layer", columns="expert", value="specialisation", panels=("run",), scale=100,
        label="share of its tokens' ids that the expert takes (%)",
        title="Vocabulary specialisation",
    )  # fmt: skip


def plot_knockout(table: pd.DataFrame) -> Figure:
    """Loss without each expert."""
    return heatmaps(
        table, rows="domain", columns="expert", value="increase", signed=True, scale=1000,
        label="increase of lm_loss (thousandths of a nat per token)",
        title="What is lost without each expert",
    )  # fmt: skip


def plot_modules(table: pd.DataFrame) -> Figure:
    """Damage of each module on each domain."""
    return heatmaps(
        table, rows="domain", columns="on", value="damage", panels=("run", "corpus"), signed=True,
        scale=1000, label="increase of lm_loss on the domain (thousandths of a nat per token)",
        title="What is lost without each domain's module",
    )  # fmt: skip


def plot_retention(table: pd.DataFrame) -> Figure:
    """Loss with few experts."""
    table = table.assign(kept=table["kept"].astype(str) + " kept")
    return heatmaps(
        table, rows="best_for", columns="on", value="increase", panels=("run", "kept"), signed=True,
        scale=1000, label="increase of lm_loss on the domain (thousandths of a nat per token)",
        title="What is lost with the best experts of one domain alone, by how many are kept",
    )  # fmt: skip


def plot_regret(table: pd.DataFrame) -> Figure:
    """What the routers' choices gain over chance."""
    return bars(
        table.assign(**{"layer, domain": table["layer"].astype(str) + "\n" + table["domain"]}),
        x="layer, domain", values={"gain": "router's choice", "random_regret": "best expert"},
        low="gain_low", high="gain_high", label="loss below that of an expert drawn (nats)",
        title="What choosing is worth",
    )  # fmt: skip


def plot_similarity(table: pd.DataFrame) -> Figure:
    """Cosines between experts; of one with itself it is 1 and left blank."""
    return heatmaps(
        table.assign(cosine=table["cosine"].where(table["expert"] != table["other_expert"])),
        rows="expert", columns="other_expert", value="cosine",
        panels=("run", "layer", "kind"), from_least=True, label="cosine", form="{:.2f}",
        across=3,
        title="How alike experts are: weights, what they moved, outputs",
    )  # fmt: skip


def plot_movement(table: pd.DataFrame) -> Figure:
    """Distance from the common start."""
    return heatmaps(
        table, rows="layer", columns="expert", value="relative_distance", panels=("run",),
        scale=100, label=f"distance from the {table['start'].iloc[0]} (% of its norm)",
        title="How far experts have moved",
    )  # fmt: skip


def plot_saturation(table: pd.DataFrame) -> Figure:
    """Router saturation over checkpoints."""
    return lines(
        table, x="step", y="share", series="layer", panels=("run",), x_label="training step",
        label="share of final assignments", title="Router saturation",
    )  # fmt: skip


def plot_router_gradients(table: pd.DataFrame) -> Figure:
    """Whether two halves of a text ask the same change of a router, loss by loss."""
    names = {"lm": "language model", "lb": "balance", "z": "z"}
    long = pd.concat(
        [table.assign(loss=name, cosine=table[f"agreement_{key}"]) for key, name in names.items()]
    )
    return lines(
        long, x="step", y="cosine", series="loss", panels=("run", "layer"),
        x_label="training step", label="cosine between two halves of a text",
        title="Does a loss know what it wants of the router?",
    )  # fmt: skip


def plot_training(table: pd.DataFrame) -> Figure | None:
    """Evaluation losses of the runs, all and per domain."""
    table = table[table["metric"].str.startswith("eval/lm_loss")]
    if table.empty:
        return None
    names = table["metric"].str.removeprefix("eval/lm_loss").str.removeprefix("_")
    return lines(
        table.assign(domain=names.replace("", ALL)), x="step", y="value", series="run",
        panels=("domain",), x_label="training step", label="evaluation lm_loss (nats per token)",
        title="Loss over training",
    )  # fmt: skip


def plot_collapse(table: pd.DataFrame) -> Figure:
    """Largest expert's share over training, all runs side by side."""
    return lines(
        table, x="step", y="largest_share", series="run", panels=("layer",),
        x_label="training step", label="largest expert's share (0 to 1)",
        title="Does one expert take it all?",
    )  # fmt: skip


def plot_load_over_training(table: pd.DataFrame) -> Figure:
    """Every expert's share over training."""
    return lines(
        table, x="step", y="fraction", series="expert", x_label="training step",
        label="share of the step's assignments (0 to 1)", title="Load over training",
    )  # fmt: skip


def plot_entropy_over_training(table: pd.DataFrame) -> Figure:
    """Router entropy over training."""
    return lines(
        table, x="step", y="entropy", series="layer", panels=("run",), x_label="training step",
        label="router entropy of a token (nats)", title="Entropy over training",
    )  # fmt: skip
