"""Operators of a mixture-of-experts layer, each with a plain-torch twin in `reference`.

Letters: T tokens, H model width, F expert width, E experts, K experts per token, S = T*K rows.
"""

from .expert_mlp import expert_mlp
from .grouped_gemm import grouped_gemm, grouped_gemm_dw, grouped_gemm_dx
from .grouped_linear import grouped_linear
from .permutation import Permutation, sort_by_expert
from .routing import Routing, route

__all__ = [
    "Permutation",
    "Routing",
    "expert_mlp",
    "grouped_gemm",
    "grouped_gemm_dw",
    "grouped_gemm_dx",
    "grouped_linear",
    "route",
    "sort_by_expert",
]
