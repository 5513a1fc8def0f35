"""`pacatune completion`: print a script by which a shell completes commands and options.

The scripts are made of the parsers, and of the source of `train`'s options (`option_names`), since
its parser takes seconds to make. They start nothing: a shell runs `pacatune` once, for the script.
"""

import argparse
import ast
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from pacatune.cli.options import find_parser, new_parser, positive

_HELP = "show this text"
_SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True)
class Option:
    """An option (`--model`), or a word without one (no name), and what may stand there."""

    name: str
    help: str
    takes: str = "file"
    """nothing, number, file (or anything else), or choice."""

    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Command:
    """A command (`merge`, `patch make`): what may follow its words."""

    words: str
    help: str
    options: tuple[Option, ...]


def run(argv: list[str]) -> int:
    """Run `pacatune completion` with the words after it; return the exit status."""
    parser = new_parser(
        "completion", "Print a script by which a shell completes commands and options."
    )
    where = 'bash and zsh: eval "$(pacatune completion bash)"; fish: pipe it into source'
    parser.add_argument("shell", metavar="SHELL", choices=_SHELLS, help=where)
    shell = parser.parse_args(argv).shell
    make = {"bash": bash_script, "zsh": zsh_script, "fish": fish_script}[shell]
    print(make(list(all_commands())))
    return 0


def all_commands() -> Iterator[Command]:
    """Yield every command; one of two words (`patch`) comes before its own."""
    from pacatune.cli.entry import COMMANDS

    for name, text in COMMANDS.items():
        if name in ("train", "train-image"):
            yield Command(name, text, tuple(_options_of_a_run(name)))
            continue
        module = importlib.import_module(f"pacatune.cli.{name.replace('-', '_')}")
        subcommands = getattr(module, "SUBCOMMANDS", None)
        if subcommands is None:
            yield Command(name, text, tuple(_options(find_parser(module.run))))
            continue
        second = Option("", "", "choice", tuple(subcommands))
        yield Command(name, text, (second, Option("--help", _HELP, "nothing")))
        for word, (run_it, what) in subcommands.items():
            yield Command(f"{name} {word}", what, tuple(_options(find_parser(run_it))))


def _options(parser: argparse.ArgumentParser) -> Iterator[Option]:
    for action in parser._actions:
        text = _first_sentence(action.help)
        for name in [name for name in action.option_strings if name.startswith("--")] or [""]:
            if not action.option_strings and action.nargs == argparse.REMAINDER:
                continue
            choices = tuple(map(str, action.choices or ())) or _choices_shown(action.metavar)
            is_number = action.type in (int, float, positive)
            takes = "nothing" if action.nargs == 0 else "number" if is_number else "file"
            yield Option(name, text, "choice" if choices else takes, choices)


def _choices_shown(metavar: Any) -> tuple[str, ...]:
    """Return the choices of an option of `add_fields`, whose metavar is `{a,b}`."""
    shown = re.fullmatch(r"\{(.+)\}", str(metavar))
    return () if shown is None else tuple(shown[1].split(","))


def _options_of_a_run(name: str) -> Iterator[Option]:
    """Yield the options of `train`, for all its tasks, or of `train-image`."""
    from pacatune.methods import CLASSIFIER_METHODS, TEXT_METHODS
    from pacatune.training.tasks import TASKS

    yield Option("--help", _HELP, "nothing")
    if find_spec("yaml") is None or find_spec("trl") is None:
        return  # not installed: the command only says how to do that
    from pacatune.cli.option_names import option_annotations
    from pacatune.cli.run_options import FLAGS

    module = importlib.import_module(f"pacatune.cli.{name.replace('-', '_')}")
    for flag, arguments in {**FLAGS, **module.FLAGS}.items():
        takes = "nothing" if arguments.get("action") == "store_true" else "file"
        takes = "number" if arguments.get("metavar") == "N" else takes
        yield Option(f"--{flag}", _first_sentence(arguments["help"]), takes)
    classes = TASKS.values() if name == "train" else [module.RUN_CLASS]
    methods = TEXT_METHODS if name == "train" else CLASSIFIER_METHODS
    known = {"method": methods, "task": tuple(TASKS)}
    found: dict[str, str] = {}
    for path in classes:
        found |= option_annotations(*path.rsplit(".", 1))
    sections = {option.partition(".")[0] for option in found if "." in option}
    for option, annotation in found.items():
        if option not in sections:
            choices = known.get(option) or _choices_written(annotation)
            takes = "choice" if choices else _takes(annotation)
            yield Option(f"--{option}", "", takes, choices)


def _choices_written(annotation: str) -> tuple[str, ...]:
    """Return the values of an annotation that is only choices, as source has it."""
    found = [
        choice
        for node in ast.walk(ast.parse(annotation, mode="eval"))
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal"
        for choice in ast.literal_eval(f"[{ast.unparse(node.slice).strip('()')}]")
    ]
    return tuple(map(str, found)) or (("true", "false") if _names(annotation) == {"bool"} else ())


def _takes(annotation: str) -> str:
    return "number" if _names(annotation) <= {"int", "float"} else "file"


def _names(annotation: str) -> set[str]:
    return set(re.findall(r"\w+", annotation)) - {"None", "Optional"}


def _first_sentence(text: str | None) -> str:
    """Return the first sentence of a help text, without the default that a parser fills in."""
    plain = " ".join(re.sub(r"\(default[^)]*\)|\(default: %\(default\)s\)", "", text or "").split())
    return re.split(r"[.;] |\.$", plain.replace("%%", "%"))[0].strip()


def bash_script(commands: list[Command]) -> str:
    """Return the script for bash."""
    pairs = [command.words.split() for command in commands]
    twofold = sorted({first for first, *second in pairs if second})
    options, values = [], []
    for command in commands:
        names = " ".join(option.name for option in command.options if option.name)
        words = " ".join(
            choice for one in command.options if not one.name for choice in one.choices
        )
        has_files = any(not one.name and not one.choices for one in command.options)
        options.append(
            f"    '{command.words}') options='{names}' words='{words}' files={int(has_files)} ;;"
        )
        for takes, then in (("nothing", "value=none"), ("number", "value=number")):
            given = [
                f"'{command.words} {one.name}'"
                for one in command.options
                if one.takes == takes and one.name
            ]
            if given:
                values.append(f"    {'|'.join(given)}) {then} ;;")
        values += [
            f"    '{command.words} {one.name}') value=choice words='{' '.join(one.choices)}' ;;"
            for one in command.options
            if one.choices and one.name
        ]
    first = " ".join(dict.fromkeys(first for first, *_ in pairs))
    return _BASH.format(
        commands=first,
        twofold="|".join(twofold),
        options="\n".join(options),
        values="\n".join(values),
    )


# With COMPREPLY empty, `-o default` offers files.
_BASH = """\
# Completion of pacatune in bash: eval "$(pacatune completion bash)"
_pacatune() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD - 1]}}
  local first=1 command= options= words= files=0 value=file
  COMPREPLY=()
  # bash takes --option=value apart.
  if [[ $current == = ]]; then
    current=
  elif [[ $before == = ]]; then
    before=${{COMP_WORDS[COMP_CWORD - 2]}}
  fi
  [[ ${{COMP_WORDS[1]}} == --debug ]] && first=2
  if ((COMP_CWORD <= first)); then
    mapfile -t COMPREPLY < <(compgen -W '{commands} --debug --help --version' -- "$current")
    return
  fi
  command=${{COMP_WORDS[first]}}
  case $command in
    {twofold})
      if ((COMP_CWORD > first + 1)); then
        command+=" ${{COMP_WORDS[first + 1]}}"
        ((++first))
      fi
      ;;
  esac
  case $command in
{options}
    *) return ;;
  esac
  if [[ $before != -* ]] || ((COMP_CWORD == first + 1)); then
    value=none
  else
    case "$command $before" in
{values}
    esac
  fi
  case $value in
    number)
      compopt +o default
      return
      ;;
    file) return ;;
    none)
      if [[ $current == -* || -z $words$current && $files == 0 ]]; then
        words=$options
      fi
      ;;
  esac
  mapfile -t COMPREPLY < <(compgen -W "$words" -- "$current")
}}
complete -o default -F _pacatune pacatune"""


def zsh_script(commands: list[Command]) -> str:
    """Return the script for zsh."""
    cases = []
    for command in commands:
        specs = [_zsh_spec(option) for option in command.options]
        if any(other.words.startswith(f"{command.words} ") for other in commands):
            continue
        cases.append(
            f"    {_quoted(command.words)})\n      _arguments \\\n        "
            + " \\\n        ".join(specs)
            + "\n      ;;"
        )
    return _ZSH.format(
        commands="\n".join(
            f"    {_zsh_described(one)}" for one in commands if " " not in one.words
        ),
        seconds="\n".join(_zsh_seconds(commands)),
        cases="\n".join(cases),
    )


def _zsh_seconds(commands: list[Command]) -> Iterator[str]:
    for first in dict.fromkeys(one.words.split()[0] for one in commands if " " in one.words):
        inner = [one for one in commands if one.words.startswith(f"{first} ")]
        described = " ".join(_zsh_described(one) for one in inner)
        yield f"    {first}) second=({described}) ;;"


def _zsh_described(command: Command) -> str:
    return _quoted(f"{command.words.split()[-1]}:{command.help}")


def _zsh_spec(option: Option) -> str:
    what = {"choice": f"({' '.join(option.choices)})", "number": " ", "file": "_files"}
    if not option.name:
        return _quoted(f"*:value:{what[option.takes]}")
    text = re.sub(r"([\[\]\\:])", r"\\\1", option.help)
    value = "" if option.takes == "nothing" else f":value:{what[option.takes]}"
    return _quoted(f"*{option.name}[{text}]{value}" if text else f"*{option.name}{value}")


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


_ZSH = """\
#compdef pacatune
# Completion of pacatune in zsh, after compinit: eval "$(pacatune completion zsh)"
_pacatune() {{
  local -a first second
  local command
  first=(
{commands}
  )
  [[ $words[2] == --debug ]] && {{ words[2]=(); ((CURRENT--)) }}
  if ((CURRENT == 2)); then
    _describe command first
    _arguments '--debug[show the traceback of an error]' '--version[show the version]' '--help'
    return
  fi
  command=$words[2]
  case $command in
{seconds}
  esac
  if (($#second)); then
    if ((CURRENT == 3)); then
      _describe what second
      return
    fi
    command+=" $words[3]"
    shift words
    ((CURRENT--))
  fi
  shift words
  ((CURRENT--))
  case $command in
{cases}
  esac
}}
if [[ $funcstack[1] == _pacatune ]]; then
  _pacatune "$@"
else
  compdef _pacatune pacatune
fi"""


_FISH = """\
# Completion of pacatune in fish: pacatune completion fish | source
function __pacatune_is
    set -l words (commandline -opc)
    test "$words[2]" = --debug; and set -e words[2]
    set -l last (math 1 + (count $argv))
    test $last -eq 1; or test "$words[2..$last]" = "$argv"
end
function __pacatune_needs
    set -l words (commandline -opc)
    test "$words[2]" = --debug; and set -e words[2]
    test (count $words) -eq (math 1 + (count $argv)); and __pacatune_is $argv
end
complete -c pacatune -f
complete -c pacatune -n __pacatune_needs -l debug -d 'show the traceback of an error'
complete -c pacatune -n __pacatune_needs -l version -d 'show the version'"""


def fish_script(commands: list[Command]) -> str:
    """Return the script for fish."""
    lines = [_FISH]
    for command in commands:
        *before, word = command.words.split()
        needs = " ".join(["__pacatune_needs", *before])
        text = _fish_quoted(command.help)
        lines.append(f"complete -c pacatune -n '{needs}' -a {word} -d {text}")
        lines += [
            f"complete -c pacatune -n '__pacatune_is {command.words}' {_fish_rule(option)}"
            for option in command.options
            if option.name or not any(one.words.startswith(f"{command.words} ") for one in commands)
        ]
    return "\n".join(lines)


def _fish_rule(option: Option) -> str:
    name = f"-l {option.name[2:]}" if option.name else ""
    words = f"-a {_fish_quoted(' '.join(option.choices))}"
    takes = {"nothing": "", "number": "-x", "choice": f"-x {words}", "file": "-r -F"}[option.takes]
    if not option.name:
        takes = words if option.choices else "-F"
    text = f"-d {_fish_quoted(option.help)}" if option.help else ""
    return " ".join(filter(None, (name, takes, text)))


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
