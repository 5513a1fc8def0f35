"""The cases that PEFT's parametrized tests get in place of their own: one method, ours."""

from __future__ import annotations

import importlib

FAMILIES = (
    "linear",
    "hfconv1d",
    "embedding",
    "conv1d",
    "conv2d",
    "conv2d_groups",
    "conv3d",
    "mha",
    "params",
)


def custom_cases(cls, label, families, base, has_field):
    """List (test name, model id, config class, kwargs); the ids are MockTransformerWrapper's."""
    out = []

    def add(name, model_id, **kwargs):
        out.append((f"{name} {label}", model_id, cls, {**base, **kwargs}))

    def rank(r):
        return {"r": r} if "r" in base else {}

    if "linear" in families:
        add("Vanilla MLP 1", "MLP", target_modules="lin0")
        add("Vanilla MLP 2", "MLP", target_modules=["lin0"])
        add("Vanilla MLP 3", "MLP", target_modules=["lin1"])
        add("Vanilla MLP 4", "MLP", target_modules=["lin0", "lin1"])
        if has_field("modules_to_save"):
            add(
                "Vanilla MLP 5 modules_to_save",
                "MLP",
                target_modules=["lin0"],
                modules_to_save=["lin1"],
            )
        if has_field("exclude_modules"):
            add(
                "Vanilla MLP 6 exclude_modules",
                "MLP",
                target_modules="lin.*",
                exclude_modules=["lin1"],
            )
        if has_field("rank_pattern") and has_field("alpha_pattern"):
            add(
                "Vanilla MLP 7 patterns",
                "MLP",
                target_modules=["lin0", "lin1"],
                rank_pattern={"lin0": 3},
                alpha_pattern={"lin1": 5},
            )
    if "hfconv1d" in families:
        add("Embedding + transformers Conv1D 1", "EmbConv1D", target_modules=["conv1d"])
    if "embedding" in families:
        add("Embedding + transformers Conv1D 2", "EmbConv1D", target_modules=["emb"])
        if "hfconv1d" in families:
            add("Embedding + transformers Conv1D 3", "EmbConv1D", target_modules=["emb", "conv1d"])
    if "conv1d" in families:
        add("Conv1d 1", "Conv1dBigger", target_modules=["conv1d"])
    if "conv2d" in families:
        add("Conv2d 1", "Conv2d", target_modules=["conv2d"])
        # With a rank of 2, both columns of lin0 would be of channels that its relu has silenced.
        add("Conv2d 2", "Conv2d", target_modules=["conv2d", "lin0"], **rank(4))
        add("Conv2d 3", "Conv2d2", target_modules=["conv2d", "lin0"])
        add("Conv2d 1x1", "Conv2d1x1", target_modules=["conv2d"], **rank(1))  # one input channel
    if "conv2d_groups" in families:
        add("Conv2d Groups", "Conv2dGroups", target_modules=["conv2d"])
        add("Conv2d Groups2", "Conv2dGroups2", target_modules=["conv2d"])
    if "conv3d" in families:
        add("Conv3d 1", "Conv3d", target_modules=["conv3d"])
        add("Conv3d 2", "Conv3d", target_modules=["conv3d", "lin0"])
    if "mha" in families:
        add("MHA 1", "MHA", target_modules=["mha"])
        add("MHA 2", "MHA", target_modules=["mha", "lin0"])
    # Not MlpUsingParameters: PaCA refuses two-dimensional `target_parameters`, which are layers.
    return out


def multi_cases(cls, label, base, init_off):
    """List (test name, method, config class, kwargs of the 1st adapter, of the 2nd)."""
    same = {**base, **init_off, "target_modules": ["lin0"]}
    other = {**base, **init_off, "target_modules": ["lin1"]}
    method = label.lower()
    return [
        (f"{label} Same", method, cls, same, same),
        (f"{label} Different", method, cls, same, other),
    ]


class Method:
    """The method under test, as the options name it."""

    def __init__(self, options):
        self.options = options
        module = importlib.import_module(options["module"])
        self.cls = getattr(module, options["config"])
        self.label = options["label"] or self.cls.__name__.removesuffix("Config")
        self.base = dict(options["kwargs"])
        self.families = set(options["layers"])

    def has_field(self, name):
        return name in getattr(self.cls, "__dataclass_fields__", {})

    def init_off(self):
        for name in ("init_weights", "init_lora_weights", "init_ia3_weights"):
            if self.has_field(name):
                return {name: False}
        return {}


def _is_peft_config(obj):
    import peft  # not before HF_HOME is set, which is read at import

    return isinstance(obj, type) and issubclass(obj, peft.PeftConfig)


def _row(value):
    """Return the plain tuple in an argvalues entry, which may be a pytest.param."""
    return tuple(getattr(value, "values", value)) if not isinstance(value, type) else (value,)


def replacement(method, suite, names, values):
    """New argvalues for one parametrize mark, or None where the mark is not about PEFT methods."""
    cls, label, base = method.cls, method.label, method.base
    rows = list(values)

    if suite == "custom" and names == ["test_name", "model_id", "config_cls", "config_kwargs"]:
        return custom_cases(cls, label, method.families, base, method.has_field)
    if suite == "custom" and names == [
        "test_name",
        "tuner_method",
        "config_cls",
        "config_kwargs_1",
        "config_kwargs_2",
    ]:
        return multi_cases(cls, label, base, method.init_off())
    if (
        suite == "custom"
        and names == ["config_cls"]
        and len(rows) >= 5
        and all(_is_peft_config(r) for r in rows)
    ):
        # A list over (nearly) all methods, e.g. ALL_PEFT_CONFIG_CLASSES; these tests give
        # target_modules only.
        return [_with_defaults(cls, base)]
    if suite == "custom" and names == ["config0"] and len(rows) >= 5:
        return [cls(**{**base, **method.init_off(), "target_modules": ["lin0"]})]
    if suite == "config" and names == ["config_class", "mandatory_kwargs"]:
        rows = [_row(r) for r in rows]
        if len(rows) >= 5:
            return [(cls, {})] if _supports_rows(rows, method) else []
        return None
    if names == ["config_cls", "config_kwargs"] and suite in (
        "decoder",
        "encdec",
        "feature",
        "seqcls",
        "tokencls",
    ):
        rows = [_row(r) for r in rows]
        if len(rows) < 4 or not all(_is_peft_config(r[0]) for r in rows):
            return None
        # A list without any target_modules is one of prompt learning methods.
        if not any("target_modules" in r[1] for r in rows):
            return None
        task = next((r[1].get("task_type") for r in rows if r[1].get("task_type")), None)
        return [(cls, {**base, "task_type": task, "target_modules": None})]
    if names == ["config_cls", "config_kwargs"] and suite == "quant":
        return [(cls, {**base, "target_modules": ["q_proj", "v_proj"]})]
    if names == ["model_id", "config_cls", "config_kwargs"] and suite == "params":
        if "params" not in method.families:
            return []
        keep = ("task_type", "target_modules", "target_parameters")
        return [
            (r[0], cls, {**base, **{k: v for k, v in r[2].items() if k in keep}})
            for r in map(_row, rows)
        ]
    if names == ["config"] and suite == "vision":
        if "conv2d" not in method.families:
            return []
        return [
            cls(
                **{
                    **base,
                    "target_modules": ["convolution"],
                    "modules_to_save": ["classifier", "normalization"],
                }
            )
        ]
    if names == ["settings"] and suite == "compile":
        return [
            (cls(**{**base, "task_type": "CAUSAL_LM"}), {}),
            (cls(**{**base, "task_type": "CAUSAL_LM", "target_modules": "all-linear"}), {}),
        ]
    return None


def _supports_rows(rows, method):
    """Filter our class as test_config filters its list by layers_to_transform/layers_pattern."""
    fields = ("layers_to_transform", "layers_pattern")
    filtered = all(set(fields) <= set(getattr(r[0], "__dataclass_fields__", {})) for r in rows)
    return (not filtered) or all(method.has_field(f) for f in fields)


def _with_defaults(cls, base):
    """Return the config class where its defaults do, else a subclass whose defaults are `base`.

    The tests over all methods call `config_cls(target_modules=[...])` only. A subclass keeps
    isinstance/issubclass and the `peft_type` intact.
    """
    fields = cls.__dataclass_fields__
    if all(fields[k].default == v for k, v in base.items() if k in fields):
        return cls

    def __init__(self, *args, **kwargs):
        cls.__init__(self, *args, **{**base, **kwargs})

    return type(cls.__name__, (cls,), {"__init__": __init__, "__module__": cls.__module__})
