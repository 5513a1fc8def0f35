"""Descriptions in JSON that somebody has tampered with."""

VALUES = [None, True, -1, 0, 1, 2.5, 3, 2**70, float("inf"), float("nan"), "", "x", [], [[1]], {}]


def mutated(value, generator):
    """Change one to three places of a value of JSON, in place where it can be, and return it."""
    for _ in range(generator.choice([1, 1, 2, 3])):
        value = _change(value, generator)
    return value


def _change(value, generator):
    is_inner = isinstance(value, dict | list) and value and generator.random() < 0.9
    if not is_inner:
        return generator.choice(VALUES)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = generator.choice(keys)
    match generator.randrange(8):
        case 0:
            del value[key]
        case 1:
            other = generator.choice(keys)
            value[key], value[other] = value[other], value[key]
        case 2 if isinstance(value, list):
            value.append(value[key])
        case 2:
            value[f"{key}x"] = value.pop(key)
        case _:
            value[key] = _change(value[key], generator)
    return value
