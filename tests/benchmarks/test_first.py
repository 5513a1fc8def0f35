"""The table of README's first screen."""

from benchmarks import first


def test_losses_are_better_or_worse_after_holms_correction_over_tasks():
    near = [0.50, 0.54, 0.46, 0.52, 0.48]

    def runs(losses):
        common = {"learning rate": 1e-3, "validation loss": 1.0}
        return [common | {"seed": seed, "test loss": loss} for seed, loss in enumerate(losses)]

    wide = [loss + step for loss, step in zip(near, (0.2, -0.1, 0.3, 0.0, 0.1), strict=True)]
    less, more = ([loss + by * (1 + loss) for loss in near] for by in (-0.1, 0.1))
    studies = {
        task: {first.OURS: runs(ours), first.LORA: runs(near)}
        for task, ours in {"a": wide, "b": less, "c": near, "d": more, "e": less}.items()
    }
    said = "better on 2, no significant difference on 2, worse on 1"
    assert first.losses(studies) == said
