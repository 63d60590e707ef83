"""A text with something to learn, a finetuning of it, and a reporter that keeps records and can interrupt."""

import numpy as np
from training_models import CONFIG

from cluscomp_jax.config.finetune import FinetuneConfig
from cluscomp_jax.config.training import TrainingConfig
from cluscomp_jax.runtime.reporter import SilentReporter
from cluscomp_jax.text.token_rows import pack

STEPS, LENGTH = 8, 10
CFG = FinetuneConfig(
    model=CONFIG,
    training=TrainingConfig(
        steps=STEPS, batch_size=2, learning_rate=0.02, trainable=(".*/codebook", ".*norm/weight")
    ),
    evaluate_every=3,
    save_every=2,
)  # fmt: skip


def text(seed=0, tokens=130):
    """A stream in which every token is followed by one of two others, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    stream = [0]
    while len(stream) < tokens:
        stream.append((3 * stream[-1] + int(rng.integers(1, 3))) % CONFIG.vocab_size)
    return np.array(stream, np.int32)


ROWS, HELD_OUT = pack(text(), LENGTH), pack(text(1, 50), LENGTH)


class Recorder(SilentReporter):
    """Keeps the records and warnings; raises after the record of step `stop`."""

    def __init__(self, stop=None):
        self.records, self.warnings, self.stop = [], [], stop

    def warn(self, text):
        self.warnings.append(text)

    def record(self, event, **fields):
        fields = {key: value for key, value in fields.items() if key not in ("time", "seconds")}
        self.records.append({"event": event, **fields})
        if event == "step" and fields["step"] == self.stop:
            raise KeyboardInterrupt
