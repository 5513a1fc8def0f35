"""The cases that PEFT's parametrized tests get in place of their own: one method, ours."""

from __future__ import annotations

LABEL = "Paca"
BASE = {"r": 2}
INIT_OFF = {"init_weights": False}
# Suites by the models that their tests load.
OF_MODELS = ("decoder", "encdec", "feature", "seqcls", "tokencls")
MLP_1, MLP_2 = {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}
BOTH = {"target_modules": ["lin0", "lin1"]}
EXCLUDED = {"target_modules": "lin.*", "exclude_modules": ["lin1"]}
PATTERNS = {"rank_pattern": {"lin0": 3}, "alpha_pattern": {"lin1": 5}}

# Test name (MockTransformerWrapper's ids), model, options. Not MlpUsingParameters: PaCA refuses
# two-dimensional `target_parameters`, which are layers.
CUSTOM = [
    ("Vanilla MLP 1", "MLP", {"target_modules": "lin0"}),
    ("Vanilla MLP 2", "MLP", MLP_1),
    ("Vanilla MLP 3", "MLP", MLP_2),
    ("Vanilla MLP 4", "MLP", BOTH),
    ("Vanilla MLP 5 modules_to_save", "MLP", {**MLP_1, "modules_to_save": ["lin1"]}),
    ("Vanilla MLP 6 exclude_modules", "MLP", EXCLUDED),
    ("Vanilla MLP 7 patterns", "MLP", {**BOTH, **PATTERNS}),
    ("Embedding + transformers Conv1D 1", "EmbConv1D", {"target_modules": ["conv1d"]}),
    ("Embedding + transformers Conv1D 2", "EmbConv1D", {"target_modules": ["emb"]}),
    ("Embedding + transformers Conv1D 3", "EmbConv1D", {"target_modules": ["emb", "conv1d"]}),
    ("Conv1d 1", "Conv1dBigger", {"target_modules": ["conv1d"]}),
    ("Conv2d 1", "Conv2d", {"target_modules": ["conv2d"]}),
    # With a rank of 2, both columns of lin0 would be of channels that its relu has silenced.
    ("Conv2d 2", "Conv2d", {"target_modules": ["conv2d", "lin0"], "r": 4}),
    ("Conv2d 3", "Conv2d2", {"target_modules": ["conv2d", "lin0"]}),
    ("Conv2d 1x1", "Conv2d1x1", {"target_modules": ["conv2d"], "r": 1}),  # one input channel
    ("Conv2d Groups", "Conv2dGroups", {"target_modules": ["conv2d"]}),
    ("Conv2d Groups2", "Conv2dGroups2", {"target_modules": ["conv2d"]}),
    ("Conv3d 1", "Conv3d", {"target_modules": ["conv3d"]}),
    ("Conv3d 2", "Conv3d", {"target_modules": ["conv3d", "lin0"]}),
]


def _row(value):
    """Return the plain tuple in an argvalues entry, which may be a pytest.param."""
    return tuple(getattr(value, "values", value)) if not isinstance(value, type) else (value,)


def replacement(suite, names, values):
    """New argvalues for one parametrize mark, or None where the mark is not about PEFT methods."""
    import peft  # not before HF_HOME is set, which is read at import

    from pacatune import PacaConfig as cls

    def are_configs(kinds):
        return all(isinstance(kind, type) and issubclass(kind, peft.PeftConfig) for kind in kinds)

    rows = list(values)
    match suite, names:
        case "custom", ["test_name", "model_id", "config_cls", "config_kwargs"]:
            return [(f"{name} {LABEL}", model, cls, {**BASE, **kw}) for name, model, kw in CUSTOM]
        case "custom", ["test_name", "tuner_method", "config_cls", "config_kwargs_1", _]:
            one, two = ({**BASE, **INIT_OFF, **targets} for targets in (MLP_1, MLP_2))
            named = (("Same", one, one), ("Different", one, two))
            return [(f"{LABEL} {name}", LABEL.lower(), cls, *both) for name, *both in named]
        # A list over (nearly) all methods, e.g. ALL_PEFT_CONFIG_CLASSES.
        case "custom", ["config_cls"] if len(rows) >= 5 and are_configs(rows):
            return [_with_base(cls)]
        case "custom", ["config0"] if len(rows) >= 5:
            return [cls(**BASE, **INIT_OFF, **MLP_1)]
        case "config", ["config_class", "mandatory_kwargs"] if len(rows) >= 5:
            return [(cls, {})]
        case _, ["config_cls", "config_kwargs"] if suite in OF_MODELS:
            rows = [_row(row) for row in rows]
            if len(rows) < 4 or not are_configs(row[0] for row in rows):
                return None
            # A list without any target_modules is one of prompt learning methods.
            if not any("target_modules" in row[1] for row in rows):
                return None
            task = next((row[1].get("task_type") for row in rows if row[1].get("task_type")), None)
            return [(cls, {**BASE, "task_type": task, "target_modules": None})]
        case "quant", ["config_cls", "config_kwargs"]:
            return [(cls, {**BASE, "target_modules": ["q_proj", "v_proj"]})]
        case "params", ["model_id", "config_cls", "config_kwargs"]:
            keep = ("task_type", "target_modules", "target_parameters")
            return [
                (model, cls, {**BASE, **{name: kw[name] for name in keep if name in kw}})
                for model, _, kw in map(_row, rows)
            ]
        case "vision", ["config"]:
            saved = {"modules_to_save": ["classifier", "normalization"]}
            return [cls(**BASE, target_modules=["convolution"], **saved)]
        case "compile", ["settings"]:
            options = {**BASE, "task_type": "CAUSAL_LM"}
            return [(cls(**options, **more), {}) for more in ({}, {"target_modules": "all-linear"})]
    return None


def _with_base(cls):
    """Return a subclass whose defaults are BASE: such tests give `target_modules` only."""

    def __init__(self, *args, **kwargs):
        cls.__init__(self, *args, **{**BASE, **kwargs})

    return type(cls.__name__, (cls,), {"__init__": __init__, "__module__": cls.__module__})
