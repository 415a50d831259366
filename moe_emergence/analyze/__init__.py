"""`python -m moe_emergence.analyze`: see how a mixture routes, in tables, figures and one page."""

PROG = "python -m moe_emergence.analyze"


def main(argv: list[str]) -> int:
    """Analyse as the flags say; print where the report is."""
    from moe_emergence.analysis.settings import AnalyzeConfig
    from moe_emergence.command import loading, parse

    config = parse(AnalyzeConfig, argv, PROG)

    with loading():
        from moe_emergence.analyze.work import report

    return report(config, f"{PROG} {' '.join(argv)}")
