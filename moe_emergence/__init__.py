"""Turn a GPT-2 into a mixture of experts, train it, and see whether experts become specialists."""

__version__ = "0.1.0"
