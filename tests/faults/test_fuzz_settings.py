"""Command lines and saved configurations of any content are taken or refused in one line."""

import contextlib
import io
import json
import math
import resource
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import flags_of, tiny
from hypothesis import event, example, given, reject
from hypothesis import strategies as st
from mutated import changed, command_lines, is_sentence, often
from warm_commands import WarmCommand

from moe_emergence.analysis.settings import AnalyzeConfig
from moe_emergence.command import parse
from moe_emergence.config import RunConfig
from moe_emergence.entry import run
from moe_emergence.generate import GenerateConfig
from moe_emergence.presets import PRESETS, get_preset
from moe_emergence.settings import from_dict, to_dict
from moe_emergence.suite.options import PlanOptions, ReportOptions, RunOptions
from moe_emergence.suite.verbs import options_of
from moe_emergence.verify import VerifyConfig

NEEDED = {AnalyzeConfig: ["runs/x"], GenerateConfig: ["--checkpoint", "x", "--prompt", "y"]}
ENTRY_POINTS = {
    "train": RunConfig,
    "analyze": AnalyzeConfig,
    "generate": GenerateConfig,
    "verify": VerifyConfig,
    "plan": PlanOptions,
    "run": RunOptions,
    "report": ReportOptions,
}


def read(name: str, argv: list[str]) -> Any:
    """What an entry point makes of a command line before it loads anything."""
    cls = ENTRY_POINTS[name]
    if name in ("plan", "run", "report"):
        return options_of([name, *argv])
    start = get_preset("demo") if cls is RunConfig else None
    return parse(cls, [*NEEDED.get(cls, ()), *argv], name, default=start)


def answered(name: str, argv: list[str]) -> tuple[int, str, Any]:
    """Exit code, what stands on stderr, and the configuration if there is one."""
    found: list[Any] = []
    said = io.StringIO()

    def main(argv: list[str]) -> int:
        found.append(read(name, argv))
        return 0

    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = run(main, argv)
        except SystemExit as stop:  # --help
            code = int(stop.code or 0)
    return code, said.getvalue(), found[0] if found else None


def plain(config: Any) -> bool:
    """Whether files, names and arithmetic can hold every value."""
    values = [getattr(config, field.name) for field in fields(config)]
    nested = [value for value in values if is_dataclass(value)]
    each = [v for value in values for v in (value if isinstance(value, tuple) else (value,))]
    for one in each:
        if isinstance(one, float) and not math.isfinite(one):
            return False
        if isinstance(one, int) and abs(one) >= 2**63:
            return False
        if isinstance(one, str) and ("\0" in one or one != one.encode(errors="replace").decode()):
            return False
    return all(plain(one) for one in nested)


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_fuzz_command_lines(name: str) -> None:
    """Any flags with any values."""

    @often(50, 200)
    @given(command_lines(ENTRY_POINTS[name]))
    def check(argv: list[str]) -> None:
        if "--debug" in " ".join(argv):  # asks for tracebacks
            return
        code, said, config = answered(name, argv)
        assert code in (0, 2)
        if code == 2:
            assert said.startswith("error: "), said
            assert said.count("\n") == 1, said
            sentence = said.rpartition(" (see ")[0]
            assert is_sentence(sentence) or "more words" in sentence, said
        elif config is not None:
            assert plain(config)

    check()


SIZES = st.sampled_from([0, 1, 2, 3, 5, 2**31 - 1, 2**31, 2**40, 2**62])
RATES = st.sampled_from([0.0, 1e-320, 1e-30, 0.5, 1.0, 3.0, 1e30, 1e308])
"""Little takes no time, and so much never fits: nothing between them."""


@st.composite
def extremes(draw: st.DrawFn, config: RunConfig) -> RunConfig:
    """Like `config`, which trains for a few steps, with one to three numbers at their limits."""
    values = to_dict(config)
    groups = [values["model"], values["data"], values["optim"], values["monitor"], values]
    places = [
        (group, name) for group in groups for name, value in group.items()
        if type(value) in (int, float, bool) and name not in ("pretrain_steps", "debug", "autotune")
    ]  # fmt: skip
    for _ in range(draw(st.integers(1, 3))):
        group, name = draw(st.sampled_from(places))
        kind = type(group[name])
        group[name] = draw({int: SIZES, float: RATES, bool: st.booleans()}[kind])
        if name == "max_steps":
            values["stop_after"] = 2
    try:
        return from_dict(RunConfig, values)
    except ValueError:
        return reject()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited by prlimit")
@often(3, 100)
@given(data=st.data())
def test_fuzz_extreme_runs(
    data: st.DataObject,
    data_folder: Path,
    cache_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """A run of extreme numbers trains, or ends with a sentence, in 4 GB and two minutes."""
    where = tmp_path_factory.mktemp("run")
    config = data.draw(extremes(tiny(data_folder, cache_folder, where)))
    said = where / "stderr.txt"
    flags = ("-m", "moe_emergence.train", *flags_of(config))
    command = WarmCommand(flags, where, where / "stdout.txt", said)
    resource.prlimit(command.pid, resource.RLIMIT_DATA, (4 * 2**30, 4 * 2**30))
    code = command.wait(120)
    command.terminate()
    errors = [line for line in said.read_text().splitlines() if line.startswith("error: ")]
    assert code in (0, 1, 2), said.read_text()
    event(f"exit code {code}")
    assert len(errors) == (code != 0), said.read_text()
    assert "Traceback" not in said.read_text()
    for line in errors:
        assert "--" in line, line
    assert not list(where.rglob("*.tmp")), "left behind"


SAVED = st.sampled_from(sorted(PRESETS)).map(lambda name: to_dict(get_preset(name)))


@often(100, 700)
@given(SAVED.flatmap(lambda values: changed(values, most=3)))
@example([])
@example({**to_dict(get_preset("demo")), "model": None})
def test_fuzz_saved_configurations(values: Any) -> None:
    """What `config.json` may hold; that which is read can be written and read again."""
    values = json.loads(json.dumps(values))
    try:
        config = from_dict(RunConfig, values)
    except ValueError as error:
        said = str(error)
        assert "\n" not in " ".join(said.split())
        assert is_sentence(said) or "Config" in said, said
        return
    assert plain(config)
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config
