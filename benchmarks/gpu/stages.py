"""What the program consists of, the most valuable first."""

from benchmarks.gpu import checks, layers, runs, sweep, training
from benchmarks.gpu.program import Stage

STAGES = (
    Stage("layers", layers.layers, 150),
    Stage("taken-apart", layers.taken_apart, 15),
    Stage("correctness", layers.correctness, 40),
    Stage("training", training.steps, 60),
    Stage("train", runs.short_training, 130),
    Stage("tests", checks.tests, 130),
    Stage("sweep", sweep.sweep, 60),
    Stage("certificate", checks.certificate, 90),
    Stage("runs", runs.equal_steps, 240),
)
"""In seconds of a machine with 16 cores."""
