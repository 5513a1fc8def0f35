"""What model folders hold."""

import filecmp


def names_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def assert_same_files(one, other):
    names = names_of(other)
    assert [name for name in names_of(one) if name != ".pacatune-lock"] == names
    assert filecmp.cmpfiles(one, other, names, shallow=False)[0] == names


def contents(folder):
    return {
        name: (folder / name).read_bytes() for name in names_of(folder) if name != ".pacatune-lock"
    }
