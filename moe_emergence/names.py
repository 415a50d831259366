"""Names that flags take and that several layers of the package know."""

from typing import Literal

DispatchName = Literal["auto", "sequential", "grouped", "fused", "megablocks"]
DtypeName = Literal["fp64", "fp32", "tf32", "bf16", "fp16", "autocast-bf16"]
WeightDtype = Literal["auto", "fp32", "bf16", "fp16"]
SPREAD = "spread"
"""The device that is all of them, and the host's memory for what is left."""
