"""Trains what a recipe says: `python -m tpbook.train RECIPE.yaml [key=value …] [out=FOLDER]`.

Keys are those of `tpbook.training.recipes.Recipe`, values YAML; `keep_ratio=0.7,0.5,0.3` is a list, `teacher=` is none.
The same command under `accelerate launch` runs on many GPUs and machines; Accelerate takes care of devices, processes,
precision and accumulation, timm of augmentation, optimisers and schedules. What is written to the folder:

    metrics.jsonl        a line every few steps and each epoch
    epoch-NNNN/          the last finished epoch: weights, optimiser, average, and what run they belong to
    model.safetensors    the trained weights, in the end; ema.safetensors beside it where the recipe keeps an average
    result.json          accuracy and confusion matrix on the test set, class names, the recipe, where and for how long

Stopped anywhere and started again with the same command a run goes on from its last finished epoch.

Chapter: :doc:`/book/reproduction`
"""

import sys
from dataclasses import fields
from pathlib import Path

from .training.loop import evaluate, load, predict, run, taught, terms_of, test_tensors
from .training.models import adapt, build, lookup_of, names_of, new_model, teacher_of
from .training.recipes import Recipe, parse
from .training.setup import fast_attention, half, load_data, loader_of, optimizer_of

__all__ = [
    "adapt", "build", "evaluate", "fast_attention", "half", "load", "load_data", "loader_of", "lookup_of", "main",
    "names_of", "new_model", "optimizer_of", "predict", "run", "taught", "teacher_of", "terms_of", "test_tensors",
]  # fmt: skip


def main(arguments=None):
    """The command: 0 when the run is finished, else a line that says why not."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return
    if not words:
        sys.exit(__doc__)
    recipe = Path(words[0])
    try:
        changes = parse(words[1:], {one.name: one.type for one in fields(Recipe)} | {"out": str})
        out = changes.pop("out", Path("_build/runs") / recipe.parent.name / recipe.stem)
        if not str(out):
            raise ValueError("out must name a folder, got ''")
        result = run(recipe, out, **changes)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        sys.exit(f"tpbook.train: {error}")
    said = result["accuracy"]
    print(f"{out}: {said['right']} of {said['n']} test images right ({said['percent']:.1f} %)")


if __name__ == "__main__":
    main()
