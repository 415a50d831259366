"""Certify paths through the experts, or implementations of transformers, and write it down."""

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from moe_emergence.certificate import (
    FAMILIES,
    Certificate,
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
from moe_emergence.device import find_device
from moe_emergence.disk import clear_unfinished
from moe_emergence.moe.dispatch import Dispatcher, get_dispatcher
from moe_emergence.progress import progress_bar
from moe_emergence.run_folder import write_json
from moe_emergence.settings import check_known, to_dict
from moe_emergence.terminal import Console
from moe_emergence.verify import VerifyConfig


def verify(config: VerifyConfig) -> int:
    """Certify and print the tables and the verdict; 1 when something fails."""
    device = find_device(config.device)
    dtypes = config.dtype or available_dtypes(device)
    arithmetics = [get_arithmetic(name, device) for name in dict.fromkeys(dtypes)]
    names = config.implementation or config.dispatch or ("fused",)
    make = _implementation if config.implementation else get_dispatcher
    paths: dict[str, Dispatcher] = {name: make(name) for name in names}
    families = _families(config)
    cases = grid(device, config.activation)
    cases += random_cases(config.cases, config.seed, config.activation)
    rows = properties(device)
    jobs = config.jobs or (min(12, os.cpu_count() or 1) if device.type == "cuda" else 1)
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
        check_known("--family", name, known)
    return [known[name] for name in config.family or known]


class _Writer:
    """Keeps `--json` whole on disk while rows come, at most `_EVERY` seconds behind."""

    _EVERY = 1.0

    def __init__(self, config: VerifyConfig, device: torch.device) -> None:
        self.config, self.machine = config, describe_machine(device)
        self.rows: list[Row] = []
        self.written = -math.inf
        if config.json is not None:
            path = Path(config.json)
            clear_unfinished(path.parent, only=path.name)

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
