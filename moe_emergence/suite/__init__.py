"""`python -m moe_emergence.suite plan|run|report`: experiments that a referee would believe."""


def main(argv: list[str]) -> int:
    """Plan, run or report, as `argv[0]` says."""
    from moe_emergence.suite.verbs import answer

    return answer(argv)
