"""`python -m moe_emergence.verify`: certify that a path computes what is defined.

Needs nothing but torch, Triton, tyro and rich, so that any machine with a GPU can run it;
transformers for `--implementation` only.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moe_emergence.names import DispatchName, DtypeName
from moe_emergence.settings import check

PROG = "python -m moe_emergence.verify"


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Compare paths through the experts with the sequential one: outputs and every gradient, on
    every shape, layout and arithmetic, both judged against fp64."""

    dispatch: tuple[DispatchName, ...] = ()
    """Paths to certify; fused where no implementation is named."""
    implementation: tuple[str, ...] = ()
    """Experts implementations of transformers to certify, on this library's layer and on tiny
    models of transformers' families; MODULE:NAME for one that MODULE registers when imported."""
    family: tuple[str, ...] = ()
    """Families for --implementation; without it all."""
    dtype: tuple[DtypeName, ...] = ()
    """Arithmetics; without it all that the device has."""
    activation: tuple[Literal["gelu_tanh", "swiglu"], ...] = ("gelu_tanh", "swiglu")
    """Activations of the experts; GELU comes with biases, SwiGLU without."""
    device: str = "auto"
    """Where to run: auto (cuda where there is one), cpu or cuda."""
    cases: int = 10
    """Random cases on top of the fixed ones."""
    seed: int = 0
    """Seed of all numbers and of the random cases."""
    jobs: int = 0
    """Processes that share the cases; 0 takes one on a CPU and up to 12 on a GPU, where compiling
    the kernels for so many shapes is what takes time."""
    json: str | None = None
    """File for the certificate with every figure and bound; whole at any time, "unfinished" until
    the end."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        check(
            not (self.dispatch and self.implementation),
            "--dispatch",
            " ".join(self.dispatch),
            "certify implementations of transformers in a run of their own",
        )
        check(
            bool(self.implementation) or not self.family,
            "--family",
            " ".join(self.family),
            "give --implementation too",
        )
        check(bool(self.activation), "--activation", "of nothing", "name at least one")
        check(0 <= self.cases <= 10_000, "--cases", self.cases, "give a number from 0 to 10000")
        check(0 <= self.jobs <= 256, "--jobs", self.jobs, "give a number from 0 to 256")
        check(0 <= self.seed < 2**31, "--seed", self.seed, "give a number from 0 to 2^31 - 1")
        check(
            self.device in ("auto", "cpu", "cuda"),
            "--device",
            self.device,
            "give auto, cpu or cuda",
        )
        check(
            self.json is None or Path(self.json).absolute().parent.is_dir(),
            "--json",
            self.json,
            "give a file in a folder that exists",
        )


def main(argv: list[str]) -> int:
    """Certify as the flags say; 1 when something fails."""
    from moe_emergence.command import loading, parse

    config = parse(VerifyConfig, argv, PROG)

    with loading():
        from moe_emergence.verify.work import verify

    return verify(config)
