"""Every case in every arithmetic through every path, judged; and the certificate that results."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from emergence_kernels.processes import warm_processes
from moe_emergence.certificate.arithmetic import Arithmetic, get_arithmetic
from moe_emergence.certificate.cases import Case
from moe_emergence.certificate.judge import ENOUGH, Draw, Verdict, judge
from moe_emergence.certificate.problem import Results, draw_problem, run_exact, run_layer
from moe_emergence.certificate.properties import Property
from moe_emergence.interrupt import leave_to_parent
from moe_emergence.moe import Dispatcher, get_dispatcher
from moe_emergence.names import DtypeName

Status = Literal["passed", "failed", "refused", "not promised"]


@dataclass(frozen=True)
class Row:
    """One case or property, in one arithmetic, through one path."""

    dispatch: str
    dtype: str
    name: str
    reason: str
    settings: dict[str, Any]
    """The case: shape, activation, routing, layouts."""
    status: Status
    note: str
    """What is wrong, why it was refused, or the measured figure of a property."""
    draws: int
    tensors: tuple[Verdict, ...] = ()
    is_property: bool = False
    """Whether it measures something else than errors."""


@dataclass(frozen=True)
class Certificate:
    """All rows; certified when some passed and none failed."""

    rows: tuple[Row, ...]

    def count(self, status: Status) -> int:
        """Rows with this status."""
        return sum(row.status == status for row in self.rows)

    @property
    def certified(self) -> bool:
        """Whether every row that ran holds, and there is one."""
        return self.count("failed") == 0 and self.count("passed") > 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: every figure with its bound."""
        return asdict(self)


def certify(
    paths: Mapping[str, Dispatcher],
    cases: Sequence[Case],
    properties: Sequence[Property],
    arithmetics: Sequence[Arithmetic],
    device: torch.device,
    seed: int = 0,
    on_rows: Callable[[Sequence[Row]], None] = lambda rows: None,
    jobs: int = 1,
    make: Callable[[str], Dispatcher] = get_dispatcher,
) -> Certificate:
    """Judge every path in `paths`, by name.

    An exception is a failure of its row, and the rest still runs; a `ValueError` that begins with
    `dispatch` is a path's own word that it does not take such a case. `on_rows` is called with
    the rows of every case or property in every arithmetic once they are known, in any order. With
    several `jobs` the cases are shared among as many processes, which `make` the paths anew from
    their names.
    """
    rows: list[Row] = []
    tasks = [
        (case, arithmetic.name, device, 10_000 * seed + 20 * place)
        for arithmetic in arithmetics
        for place, case in enumerate(cases)
    ]
    if jobs == 1:
        for task in tasks:
            found = _compare_alone(paths, *task)
            on_rows(found)
            rows += found
    else:
        context = warm_processes(__name__)
        with ProcessPoolExecutor(jobs, context, initializer=leave_to_parent) as pool:
            shares = [pool.submit(_compare_by_name, tuple(paths), make, *task) for task in tasks]
            try:
                for share in as_completed(shares):
                    on_rows(share.result())
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            for share in shares:
                rows += share.result()
    for arithmetic in arithmetics:
        for row in properties:
            found = []
            if row.promise is None or arithmetic.name in row.promise.dtypes:
                found = [_check(path, paths[path], row, arithmetic, device, seed) for path in paths]
            on_rows(found)
            rows += found
    return Certificate(tuple(rows))


def _compare_by_name(
    names: tuple[str, ...],
    make: Callable[[str], Dispatcher],
    case: Case,
    arithmetic: DtypeName,
    device: torch.device,
    seed: int,
) -> list[Row]:
    paths = {name: make(name) for name in names}
    return _compare_alone(paths, case, arithmetic, device, seed)


def _compare_alone(
    paths: Mapping[str, Dispatcher],
    case: Case,
    arithmetic: DtypeName,
    device: torch.device,
    seed: int,
) -> list[Row]:
    with one_thread(device):
        return list(_compare(paths, case, get_arithmetic(arithmetic, device), device, seed))


@contextlib.contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU: the comparisons' tensors are so small that a second thread only waits."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def draws_of(case: Case) -> int:
    """Draws that give the smallest tensor, the routing weights' gradient, enough elements."""
    rows = case.tokens * case.top_k
    return max(2, min(16, -(-ENOUGH // rows))) if rows else 1


def _compare(
    paths: Mapping[str, Dispatcher],
    case: Case,
    arithmetic: Arithmetic,
    device: torch.device,
    seed: int,
) -> Iterator[Row]:
    """One row per path, all on the same numbers."""
    found: dict[str, list[Draw]] = {path: [] for path in paths}
    broken: dict[str, tuple[Status, str]] = {}
    fp64 = get_arithmetic("fp64", device)
    for draw in range(draws_of(case)):
        try:
            problem = draw_problem(case, arithmetic, device, seed + draw)
            exact = run_exact(case, problem, fp64)
            sequential: Results = exact
            if arithmetic.name != "fp64":
                sequential = run_layer(case, problem, get_dispatcher("sequential"), arithmetic)
        except Exception as error:  # noqa: BLE001 whatever it is, the other cases still run
            broken.update(dict.fromkeys(paths, ("failed", f"the definition: {_words(error)}")))
            break
        for path in [path for path in paths if path not in broken]:
            try:
                ours = run_layer(case, problem, paths[path], arithmetic)
                found[path].append(Draw(ours, sequential, exact))
            except Exception as error:  # noqa: BLE001 a finding, not an accident
                broken[path] = finding(error)
    for path, draws in found.items():
        tensors = [] if path in broken else judge(draws, arithmetic, case)
        wrong = [f"{v.tensor}: {v.problem}" for v in tensors if v.problem is not None]
        status, note = broken.get(path, ("failed" if wrong else "passed", "; ".join(wrong)))
        yield Row(
            path,
            arithmetic.name,
            case.name,
            case.reason,
            asdict(case),
            status,
            note,
            draws=len(draws),
            tensors=tuple(tensors),
        )


def _check(
    path: str,
    dispatcher: Dispatcher,
    row: Property,
    arithmetic: Arithmetic,
    device: torch.device,
    seed: int,
) -> Row:
    try:
        outcome = row.measure(dispatcher, row.case, arithmetic, device, seed)
        promised = row.promise is None or path in row.promise.paths
        status: Status = (
            "passed" if outcome.holds and promised else "failed" if promised else "not promised"
        )
        note = outcome.note
    except Exception as error:  # noqa: BLE001 a finding, not an accident
        status, note = finding(error)
    return Row(
        path,
        arithmetic.name,
        row.name,
        row.reason,
        asdict(row.case),
        status,
        note,
        draws=1,
        is_property=True,
    )


def finding(error: Exception) -> tuple[Status, str]:
    """A refusal in the path's own words, or a failure."""
    if isinstance(error, ValueError) and str(error).startswith(("dispatch ", "--implementation")):
        return "refused", str(error)
    return "failed", _words(error)


def _words(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
