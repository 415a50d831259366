"""Tables of routing against decisions made by hand, brute force and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mutual_info_score

from moe_emergence.analysis.counts import Batch, RoutingCounts
from moe_emergence.analysis.information_table import Resampling, information_table
from moe_emergence.analysis.routers import LayerRouting
from moe_emergence.analysis.routing_tables import (
    coactivation,
    expert_domain,
    expert_load,
    expert_token_type,
    routing_summary,
)
from moe_emergence.analysis.vocabulary import vocabulary_tables
from moe_emergence.config import SHIPPED

E, L = 3, 8
FEW = Resampling(permutations=39, bootstrap=20)


def counted(
    experts_NDRLK: np.ndarray, ids_DRL: np.ndarray, batch: int = 2, types: bool = True
) -> RoutingCounts:
    """Counts of decisions given for N layers, D domains, R blocks, streamed in batches."""
    classes = dict(zip(SHIPPED, ("python", "math", "words"), strict=True))
    counts = RoutingCounts(classes)
    hidden = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    for domain in range(len(SHIPPED)):
        for start in range(0, ids_DRL.shape[1], batch):
            ids = ids_DRL[domain, start : start + batch]
            groups = np.arange(start, start + len(ids))
            kinds = (ids % 2).astype(np.int8) if types else None
            routings = []
            for layer, chosen in enumerate(experts_NDRLK):
                flat = torch.tensor(chosen[domain, start : start + batch]).flatten(0, 1)
                probs = torch.full((len(flat), E), 0.1 / E)
                share = torch.linspace(0.6, 0.3, flat.shape[1]).expand(flat.shape)
                probs = probs.scatter_add(1, flat, share)
                inputs = hidden[torch.tensor(ids % 4).flatten()]
                routings.append(LayerRouting(layer, probs / probs.sum(1, True), flat, inputs))
            counts.add(Batch(ids.astype(np.int64), domain, groups, kinds), routings, seed=0)
    return counts


def random_decisions(seed: int, k: int, blocks: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (2, len(SHIPPED), blocks, L)
    experts = rng.permuted(np.broadcast_to(np.arange(E), (*shape, E)), axis=-1)[..., :k]
    return experts, rng.integers(0, 9, shape[1:])


def specialists(blocks: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """One layer, expert = domain."""
    experts = np.arange(3)[None, :, None, None, None] * np.ones((1, 3, blocks, L, 1), int)
    return experts, np.arange(3 * blocks * L).reshape(3, blocks, L) % 9


def test_a_perfect_specialist_tells_the_domain() -> None:
    counts = counted(*specialists())
    table = information_table(counts.layers, FEW).set_index("label")
    assert table.loc["domain", "bits"] == pytest.approx(math.log2(3))
    assert table.loc["domain", "share_of_label"] == pytest.approx(1)
    assert table.loc["domain", "p_permutation"] == 1 / 40
    assert table.loc["domain", "bits_low"] == pytest.approx(math.log2(3))
    assert table.loc["token type", "bits"] == pytest.approx(0, abs=1e-12)
    shares = expert_domain(counts.layers)
    own = shares[shares["domain"].map(SHIPPED.index) == shares["expert"]]
    assert (own["fraction"] == 1).all()
    row = routing_summary(counts.layers).iloc[0]
    assert row["max_violation"] == pytest.approx(0)
    assert row["persistence"] == 1
    assert row["persistence_expected"] == pytest.approx(1 / 3)


def test_one_collapsed_expert_tells_nothing() -> None:
    experts, ids = specialists()
    counts = counted(np.zeros_like(experts), ids)
    table = information_table(counts.layers, FEW).set_index("label")
    assert table.loc["domain", "bits"] == 0
    assert table.loc["domain", "p_permutation"] == 1
    row = routing_summary(counts.layers).iloc[0]
    assert row["max_violation"] == E - 1
    assert math.isnan(row["token_id_share"])


def test_routing_by_token_id_is_told_by_it() -> None:
    ids = np.arange(3 * 40 * L).reshape(3, 40, L) % 9
    counts = counted((ids % E)[None, ..., None], ids)
    assert routing_summary(counts.layers)["token_id_share"].iloc[0] == pytest.approx(1, abs=0.02)
    top, special = vocabulary_tables(counts.layers, str)
    assert (special["specialisation"] == 1).all()
    assert (top["token_id"] % E == top["expert"]).all()
    assert (top["token"] == top["token_id"].astype(str)).all()


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 2), batch=st.integers(1, 5))
def test_any_split_into_batches_gives_the_same_tables(seed: int, k: int, batch: int) -> None:
    experts, ids = random_decisions(seed, k)
    one, other = counted(experts, ids, 5), counted(experts, ids, batch)
    for make in (expert_load, expert_domain, expert_token_type):
        assert make(one.layers).equals(make(other.layers))
    assert coactivation(one).equals(coactivation(other))
    bits = [information_table(c.layers, FEW) for c in (one, other)]
    assert bits[0].equals(bits[1])


@pytest.mark.parametrize("k", [1, 2])
def test_counts_are_those_of_a_loop_and_of_scikit_learn(k: int) -> None:
    experts, ids = random_decisions(3, k)
    counts = counted(experts, ids)
    load = expert_load(counts.layers).set_index(["layer", "slot", "expert"])["tokens"]
    shares = expert_domain(counts.layers).set_index(["layer", "slot", "domain", "expert"])
    table = information_table(counts.layers, FEW).set_index(["layer", "label"])
    for layer in range(2):
        for expert in range(E):
            for slot in range(k):
                assert load[layer, slot, expert] == (experts[layer, ..., slot] == expert).sum()
            for d, domain in enumerate(SHIPPED):
                expected = (experts[layer, d] == expert).mean()
                assert shares.loc[(layer, -1, domain, expert), "fraction"] == pytest.approx(
                    expected
                )
        domains = np.broadcast_to(np.arange(3)[:, None, None, None], experts[layer].shape)
        nats = mutual_info_score(domains.ravel(), experts[layer].ravel())
        assert table.loc[(layer, "domain"), "bits"] == pytest.approx(nats / math.log(2))
        first = experts[layer, ..., 0]
        for d, domain in enumerate(SHIPPED):
            nats = mutual_info_score(ids[d].ravel() % 2, first[d].ravel())
            row = table.loc[(layer, f"token type: {domain}")]
            assert row["bits"] == pytest.approx(nats / math.log(2))
        nats = mutual_info_score(ids.ravel(), first.ravel())
        assert table.loc[(layer, "token id"), "bits"] == pytest.approx(nats / math.log(2))
        summary = routing_summary(counts.layers).iloc[layer]
        assert summary["persistence"] == pytest.approx((first[..., 1:] == first[..., :-1]).mean())


def test_coactivation_counts_pairs_within_and_between_layers() -> None:
    experts, ids = random_decisions(5, 2)
    table = coactivation(counted(experts, ids)).set_index(
        ["layer", "other_layer", "expert", "other_expert"]
    )
    has = [[(experts[n] == e).any(axis=-1) for e in range(E)] for n in range(2)]
    assert table.loc[(0, 0, 1, 2), "tokens"] == (has[0][1] & has[0][2]).sum()
    assert table.loc[(1, 1, 0, 2), "conditional"] == pytest.approx(has[1][2][has[1][0]].mean())
    assert (0, 0, 1, 1) not in table.index
    first = experts[..., 0]
    both = (first[0] == 1) & (first[1] == 2)
    assert table.loc[(0, 1, 1, 2), "tokens"] == both.sum()
    assert table.loc[(0, 1, 1, 2), "expected"] == pytest.approx((first[1] == 2).mean())


def test_without_token_types_there_are_no_rows_of_them() -> None:
    counts = counted(*random_decisions(1, 1), types=False)
    assert expert_token_type(counts.layers).empty
    labels = set(information_table(counts.layers, FEW)["label"])
    assert labels == {"domain", "token id"}


def test_null_routers_are_counted_as_a_loop_would() -> None:
    experts, ids = random_decisions(7, 2)
    counts = counted(experts, ids).layers[1]
    hidden = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))[torch.tensor(ids % 4)]
    for place, weight in enumerate(counts.null_weights_NEH):
        chosen = (hidden @ weight.T).topk(2, dim=-1).indices.numpy()
        for domain in range(3):
            for expert in range(E):
                of_all = (chosen[domain] == expert).sum()
                assert counts.null_grouped[place, domain, expert] == of_all
                odd = ((chosen[domain, ..., 0] == expert) & (ids[domain] % 2 == 1)).sum()
                assert counts.null_types[place, domain, 1, expert] == odd
    table = information_table([counts], FEW).set_index("label")
    bits = [
        mutual_info_score(None, None, contingency=counts.null_types[n, 0][:2]) / math.log(2)
        for n in range(len(counts.null_weights_NEH))
    ]
    assert table.loc["token type: code", "null_router_bits"] == pytest.approx(np.mean(bits))
