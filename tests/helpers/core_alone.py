"""The work of the library where nothing but the core is installed: `python core_alone.py MODEL OUT`.

Refuses every import of an extra as if it were not there, then compresses, saves, loads, evaluates, generates and
finetunes a Hugging Face folder on random tokens, and prints "done".
"""

import sys
from pathlib import Path

EXTRAS = frozenset(
    {
        "datasets", "gguf", "huggingface_hub", "jinja2", "lm_eval", "matplotlib", "pandas", "rich", "safetensors",
        "tensorboardX", "tokenizers", "torch", "tqdm", "transformers", "tyro",
    }
)  # fmt: skip
"""Modules that only extras bring, and rich, which flax brings."""


class Refuse:
    """Finds nothing, and refuses the modules of the extras."""

    def __init__(self, allowed: frozenset[str] = frozenset()):
        self._refused = EXTRAS - allowed

    def find_spec(self, name, path=None, target=None):
        if (top := name.partition(".")[0]) in self._refused:
            raise ModuleNotFoundError(f"No module named {name!r}", name=top)


def work(model: Path, out: Path) -> None:
    import jax
    import numpy as np

    import cluscomp_jax as cc

    opened = cc.open_model(model)
    config = opened.config
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, 4096)
    calibration = cc.calibration_samples(tokens, samples=2, length=32, seed=0)
    cfg = cc.CompressConfig(
        model=config,
        cluster=cc.ClusterConfig(bits=2.6),
        calibration=cc.CalibrationConfig(samples=2, length=32),
        tuning=cc.BlockTuningConfig(epochs=1, batch_size=2),
    )
    compressed = cc.compress(opened.source, cfg, calibration=calibration)
    assert cc.size_report(compressed).bits_per_weight < 2.7
    cc.save_checkpoint(out / "small", compressed, cfg)
    params, loaded = cc.load_checkpoint(out / "small")
    assert loaded == config
    for before, after in zip(jax.tree.leaves(compressed), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(np.asarray(before), np.asarray(after))
    logits = cc.llama.forward(cc.decompress(params), calibration, config)
    assert np.isfinite(np.asarray(logits)).all()
    assert np.isfinite(cc.perplexity(params, tokens[:256], config, context=64).perplexity)
    assert cc.generate(params, tokens[:5], config, max_new_tokens=3).shape == (3,)
    training = cc.TrainingConfig(steps=2, batch_size=2)
    cc.finetune(params, calibration, cc.FinetuneConfig(model=config, training=training), state_dir=out / "states")


def main() -> None:
    sys.meta_path.insert(0, Refuse())
    work(Path(sys.argv[1]), Path(sys.argv[2]))
    assert not {name.partition(".")[0] for name in sys.modules} & EXTRAS
    print("done")


if __name__ == "__main__":
    main()
