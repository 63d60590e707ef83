"""The harness: our model class next to its PyTorch backend: `bench_lm_eval.py OUT`, `--limit 50` for fewer documents.

Makes the local tasks and a dense export of the compressed folder OUT in a scratch folder, runs both backends in
processes of their own, one after the other, and compares accuracies, every log-likelihood and the seconds between
the first request and the last. Needs `pip install ".[lm-eval,parity]"`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TASKS = ("wiki_next_words", "wiki_next_sentence", "wiki_last_word")


def run_backend(
    backend: str, model: str, folder: str, tasks: list[str], limit: int | None, batch_size: int
) -> dict[str, Any]:
    """Returns {task: {"acc", "scores"}} and the seconds of one backend."""
    from lm_eval import simple_evaluate
    from lm_eval.api.registry import get_model
    from lm_eval.tasks import TaskManager

    if backend == "cluscomp":
        import cluscomp_jax.evaluation.lm_eval  # noqa: F401  (registers the class)

        lm = get_model("cluscomp")(path=model, batch_size=batch_size)
    else:
        lm = get_model("hf")(pretrained=model, dtype="float32", batch_size=batch_size, device="cpu")
    spent = [0.0]
    whole = lm.loglikelihood

    def timed(requests: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return whole(requests, **options)
        finally:
            spent[0] += time.perf_counter() - began

    lm.loglikelihood = timed
    found = simple_evaluate(
        model=lm,
        tasks=tasks,
        task_manager=TaskManager(include_path=folder, include_defaults=False),
        limit=limit,
        log_samples=True,
        bootstrap_iters=0,
    )
    results: dict[str, Any] = {"seconds": spent[0]}
    for task in tasks:
        scores = [float(r[0]) for sample in found["samples"][task] for r in sample["filtered_resps"]]
        results[task] = {"acc": found["results"][task]["acc,none"], "scores": scores}
    return results


def compare(model: str, tasks: list[str], limit: int | None, batch_size: int) -> None:
    from cluscomp_jax.checkpoint.reader import open_checkpoint
    from cluscomp_jax.export import export_checkpoint
    from cluscomp_jax.reporting.tables import format_table

    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([sys.executable, Path(__file__).with_name("make_lm_eval_tasks.py"), scratch], check=True)
        export_checkpoint(open_checkpoint(model), Path(scratch, "dense"), "dense")
        for backend, path in (("cluscomp", model), ("hf", str(Path(scratch, "dense")))):
            out = Path(scratch, f"{backend}.json")
            argv = [sys.executable, __file__, path, "--backend", backend, "--folder", scratch, "--out", str(out)]
            argv += ["--tasks", *tasks, "--batch-size", str(batch_size), *(["--limit", str(limit)] if limit else [])]
            subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
            found[backend] = json.loads(out.read_text())
    ours, theirs = found["cluscomp"], found["hf"]
    rows = []
    for task in tasks:
        apart = max(abs(a - b) for a, b in zip(ours[task]["scores"], theirs[task]["scores"], strict=True))
        count = str(len(ours[task]["scores"]))
        rows.append((task, count, f"{ours[task]['acc']:.4f}", f"{theirs[task]['acc']:.4f}", f"{apart:.2e}"))
    print(format_table(("task", "requests", "accuracy, ours", "hf", "log-likelihoods apart by at most"), rows))
    ratio = theirs["seconds"] / ours["seconds"]
    print(f"seconds: ours {ours['seconds']:.1f}, hf {theirs['seconds']:.1f}; {ratio:.2f} times as fast")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="compressed folder")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--limit", type=int, help="documents per task; all 200 if left out")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--backend", choices=("cluscomp", "hf"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.backend is None:
        compare(options.model, options.tasks, options.limit, options.batch_size)
        return
    found = run_backend(
        options.backend, options.model, options.folder, options.tasks, options.limit, options.batch_size
    )
    options.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
