"""The sentence: what it may say, and of which layers."""

from hypothesis import given
from hypothesis import strategies as st

from moe_emergence.analysis.report.verdict import ALPHA, LayerFinding, headline, type_sentence

SHARE = st.floats(0.001, 1)
BITS = st.floats(0, 1.5)


def finding(layer: int, bits: float, null: float, p: float, p_router: float) -> LayerFinding:
    return LayerFinding(layer, bits, bits, bits, p, null, null, p_router, 0.0)


@st.composite
def findings(draw: st.DrawFn) -> list[LayerFinding]:
    count = draw(st.integers(1, 8))
    return [
        finding(10 + layer, *(draw(BITS) for _ in range(2)), *(draw(SHARE) for _ in range(2)))
        for layer in range(count)
    ]


@given(findings())
def test_a_layer_is_praised_only_with_both_p_values(layers: list[LayerFinding]) -> None:
    sentence = headline(layers, ["a", "b"], 1.0)
    clauses = [clause for clause in sentence.split("; ") if not clause.startswith("a random")]
    praised = [c for c in clauses if " tell " in c and "shuffled" not in c]
    good = [layer for layer in layers if layer.p < ALPHA and layer.p_router < ALPHA]
    assert len(praised) == bool(good)
    if good and len(good) <= 4:
        assert all(str(layer.layer) in praised[0] for layer in good)
    blamed = [c for c in clauses if "no better than a random router" in c]
    assert len(blamed) == any(la.p < ALPHA <= la.p_router for la in layers)
    assert sentence.count("shuffled domains") == any(la.p >= ALPHA for la in layers)
    assert sentence.startswith("The experts of ")
    assert sentence.endswith(").")


def test_the_examples() -> None:
    more, same = finding(2, 0.93, 0.25, 0.005, 0.01), finding(3, 0.41, 0.39, 0.005, 0.4)
    assert headline([more], ["a", "b"], 1.58) == (
        "The experts of layer 2 tell 0.93 of 1.58 bits of a token's domain; a random router's tell "
        "0.25 (p 0.01)."
    )
    assert headline([same], ["a", "b"], None) == (
        "The experts of layer 3 know the domain no better than a random router's would: 0.41 bits, "
        "a random router's 0.39 (p 0.40)."
    )
    assert "shuffled domains (p 0.60)" in headline([finding(1, 0.1, 0.1, 0.6, 0.01)], ["a"] * 2, 1)
    assert headline([more], ["prose"], 0.0).startswith("All text is prose")
    assert "in 1 of 2" in type_sentence([more, same])
    assert type_sentence([]) == ""
