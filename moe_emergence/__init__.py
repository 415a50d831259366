"""Turn a GPT-2 into a mixture of experts, train it, and see whether experts become specialists."""

__version__ = "0.1.0"


def register() -> None:
    """Make `experts_implementation="emergence"` known to every model in transformers."""
    from moe_emergence.integrations.transformers import register

    register()
