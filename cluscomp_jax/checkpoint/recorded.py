"""What a manifest records of its run, as far as it has the shape that our commands write.

`save_checkpoint` takes any JSON as provenance and metrics. What reports and exports read of them is taken from here;
what has another shape is not theirs, and is left out.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

_Check = Callable[[Any], bool]


def recorded(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the manifest with those entries of "provenance", "metrics" and "run_config" alone that we know.

    Args:
      manifest: as `describe` returns it.
    """
    provenance, metrics = manifest["provenance"], manifest["metrics"]
    kept = {key: provenance[key] for key, check in _PROVENANCE.items() if check(provenance.get(key))}
    measured = {key: metrics[key] for key, check in _METRICS.items() if check(metrics.get(key))}
    settings = {k: v for k, v in manifest["run_config"].items() if k != "cluster" or isinstance(v, dict)}
    return {**manifest, "provenance": kept, "metrics": measured, "run_config": settings}


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _absent_or(check: _Check) -> _Check:
    return lambda value: value is None or check(value)


def _list_of(check: _Check, *, length: int | None = None) -> _Check:
    return lambda value: isinstance(value, list) and length in (None, len(value)) and all(check(item) for item in value)


def _dict_of(check: _Check) -> _Check:
    return lambda value: isinstance(value, dict) and all(check(item) for item in value.values())


def _record(**checks: _Check) -> _Check:
    """Returns the check of a dict in which each of these keys passes its own; an absent key counts as None."""
    return lambda value: isinstance(value, dict) and all(check(value.get(key)) for key, check in checks.items())


_MODEL = _record(name=_is_text, kind=_absent_or(_is_text), files=_absent_or(_list_of(_record(name=_is_text))))
_SHAPE = _list_of(_is_whole, length=2)
_MATRIX = _record(
    path=_is_text,
    shape=_SHAPE,
    axis=_is_text,
    g=_is_whole,
    num_codes=_is_whole,
    bits=_is_number,
    step_bits=_absent_or(_is_whole),
    bits_per_weight=_is_number,
    relative_error=_absent_or(_is_number),
)
_PROVENANCE: dict[str, _Check] = {
    "model": _MODEL,
    "original": _MODEL,
    "teacher": _MODEL,
    "calibration": _record(name=_absent_or(_is_text), shape=_SHAPE),
    "tokenizer": _is_text,
    "versions": _dict_of(_is_text),
    "device": _is_text,
    "finished": _is_text,
    "command": _is_text,
}
_METRICS: dict[str, _Check] = {
    "perplexity": _dict_of(_record(perplexity=_absent_or(_is_number), windows=_is_whole, context=_is_whole)),
    "matrices": _list_of(_MATRIX),
    "blocks": _list_of(
        _record(
            index=_is_whole,
            epoch_losses=_absent_or(_list_of(_absent_or(_is_number))),
            held_out_losses=_absent_or(_list_of(_absent_or(_is_number))),
        )
    ),
    "stages": _dict_of(_record(seconds=_is_number, peak_rss_bytes=_absent_or(_is_number))),
    "seconds": _is_number,
    "peak_rss_bytes": _is_number,
    "finetune": lambda value: isinstance(value, dict),
}
