"""A small compressed model, texts, settings and the command line that finetunes it, for the tests of that command."""

from pathlib import Path

from cli_models import write_model, write_text

from cluscomp_jax.cli import main

CONFIG = """
save_every = 2
evaluate_every = 4
[data]
length = 16
[training]
batch_size = 2
learning_rate = 0.01
trainable = [".*/codebook", "model/norm/weight"]
"""


def write_inputs(folder: Path) -> Path:
    """Fills a folder with all that `finetune_argv` names, and returns it."""
    write_model(folder / "model")
    write_text(folder / "held_out.txt", 100, seed=1)
    (folder / "text.txt").write_text("the cat sat on the mat. " * 30)
    (folder / "run.toml").write_text(CONFIG)
    argv = ["compress", str(folder / "model"), "--out", str(folder / "small"), "--g", "4", "--num-codes", "8"]
    assert main(argv) == 0
    return folder


def finetune_argv(folder: Path, out: Path, *more: str, steps: int) -> list[str]:
    return [
        "finetune", str(folder / "small"), "--data", str(folder / "text.txt"), "--out", str(out),
        "--evaluation", str(folder / "held_out.txt"), "--config", str(folder / "run.toml"),
        "--steps", str(steps), *more,
    ]  # fmt: skip
