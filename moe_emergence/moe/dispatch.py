"""placeholder"""
from typing import Literal
DispatchName = Literal["auto", "sequential", "grouped", "fused", "megablocks"]
