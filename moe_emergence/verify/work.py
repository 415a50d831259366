"""`python -m moe_emergence.verify`: certify that a path computes what is defined.

Needs nothing but torch, Triton and rich, so that any machine with a GPU can run it; transformers
for `--implementation` only.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, get_args

import torch
from rich.console import Console

from emergence_kernels.activations import Activation
from moe_emergence.certificate import (
    ACTIVATIONS,
    FAMILIES,
    Certificate,
    DtypeName,
    Family,
    Row,
    Status,
    available_dtypes,
    certificate_table,
    certify,
    certify_family,
    describe_machine,
    get_arithmetic,
    grid,
    properties,
    random_cases,
    summary_lines,
)
from moe_emergence.errors import exit_code
from moe_emergence.moe.dispatch import Dispatcher, DispatchName, get_dispatcher
from moe_emergence.progress import progress_bar
from moe_emergence.run_folder import write_json
from moe_emergence.settings import check, to_dict

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
    activation: tuple[Activation, ...] = ACTIVATIONS
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
            self.device != "cuda" or torch.cuda.is_available(),
            "--device",
            "cuda",
            "this PyTorch sees no CUDA device; use --device cpu",
        )
        check(
            self.json is None or Path(self.json).absolute().parent.is_dir(),
            "--json",
            self.json,
            "give a file in a folder that exists",
        )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message.removeprefix('argument ')} (see {PROG} --help)")


def parse_flags(argv: list[str]) -> VerifyConfig:
    """The settings that the flags give.

    Raises:
        ValueError: for flags that cannot be used, in one line.
    """
    parser = _Parser(prog=PROG, description=" ".join((VerifyConfig.__doc__ or "").split()))
    several: dict[str, tuple[Any, str]] = {
        "dispatch": (DispatchName, "paths to certify (default: fused)"),
        "dtype": (DtypeName, "arithmetics (default: all that the device has)"),
        "activation": (Activation, "of the experts; GELU comes with biases, SwiGLU without"),
    }
    for name, (choices, text) in several.items():
        parser.add_argument(f"--{name}", nargs="+", choices=get_args(choices), help=text)
    parser.add_argument(
        "--implementation",
        nargs="+",
        help="experts implementations of transformers to certify; MODULE:NAME for one that MODULE "
        "registers when imported",
    )
    parser.add_argument("--family", nargs="+", help="families for --implementation (default: all)")
    parser.add_argument("--device", help="auto (cuda where there is one), cpu or cuda")
    parser.add_argument("--cases", type=int, help="random cases on top of the fixed ones (10)")
    parser.add_argument("--seed", type=int, help="of all numbers and of the random cases (0)")
    parser.add_argument(
        "--jobs", type=int, help="processes that share the cases (one on a CPU, up to 12 on a GPU)"
    )
    parser.add_argument("--json", help="file for the certificate with every figure and bound")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(parser.parse_args(argv)).items()
        if value is not None
    }
    return VerifyConfig(**given)


def main(argv: list[str]) -> int:
    """Certify as the flags say; 1 when something fails."""
    config = parse_flags(argv)
    on_cuda = config.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_cuda else "cpu")
    dtypes = config.dtype or available_dtypes(device)
    arithmetics = [get_arithmetic(name, device) for name in dict.fromkeys(dtypes)]
    names = config.implementation or config.dispatch or ("fused",)
    make = _implementation if config.implementation else get_dispatcher
    paths: dict[str, Dispatcher] = {name: make(name) for name in names}
    families = _families(config)
    cases = grid(device, config.activation)
    cases += random_cases(config.cases, config.seed, config.activation)
    rows = properties(device)
    jobs = config.jobs or (min(12, os.cpu_count() or 1) if on_cuda else 1)
    writer = _Writer(config, device)
    steps = len(arithmetics) * (len(cases) + len(rows)) + len(families) * len(paths)
    with progress_bar("verify", steps) as advance:

        def on_rows(found: Sequence[Row]) -> None:
            writer.add(found)
            advance(1)

        certificate = certify(
            paths, cases, rows, arithmetics, device, config.seed, on_rows, jobs, make
        )
        of_families: list[Row] = []
        for name in paths if families else ():
            for family in families:
                found = certify_family(name, family, arithmetics, device, config.seed)
                on_rows(found)
                of_families += found
    certificate = Certificate((*certificate.rows, *of_families))
    writer.write(certificate, "certified" if certificate.certified else "not certified")
    console = Console(markup=False, highlight=False)
    for name in paths:
        console.print(certificate_table(certificate, name))
    for line in summary_lines(certificate, device):
        console.print(line, soft_wrap=True)
    return 0 if certificate.certified else 1


def _implementation(name: str) -> Dispatcher:
    from moe_emergence.integrations.transformers import ImplementationDispatcher

    return ImplementationDispatcher(name)


def _families(config: VerifyConfig) -> list[Family]:
    if not config.implementation:
        return []
    known = {family.name: family for family in FAMILIES}
    for name in config.family:
        check(name in known, "--family", name, f"choose from {', '.join(known)}")
    return [known[name] for name in config.family or known]


class _Writer:
    """Keeps `--json` whole on disk while rows come, at most `_EVERY` seconds behind."""

    _EVERY = 1.0

    def __init__(self, config: VerifyConfig, device: torch.device) -> None:
        self.config, self.machine = config, describe_machine(device)
        self.rows: list[Row] = []
        self.written = -math.inf

    def add(self, rows: Sequence[Row]) -> None:
        """Take these rows; what they say so far is unfinished."""
        self.rows += rows
        if time.monotonic() - self.written > self._EVERY:
            self.write(Certificate(tuple(self.rows)), "unfinished")

    def write(self, certificate: Certificate, verdict: str) -> None:
        """Replace the file, if there is to be one."""
        if self.config.json is None:
            return
        content: dict[str, Any] = {
            "verdict": verdict,
            "counts": {status: certificate.count(status) for status in get_args(Status)},
            "machine": self.machine,
            "settings": to_dict(self.config),
            **certificate.to_dict(),
        }
        write_json(Path(self.config.json), content)
        self.written = time.monotonic()


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
